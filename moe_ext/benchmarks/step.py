"""`moe-ext bench step`: a whole training step on two ranks beside MoExtend's script and AutoEP.

One small Mixtral (30 experts x top-4 in 4 layers, 2 new experts a layer), a trained projector below
it, so the input of every layer is live; forward, backward, gradient reduction, clipping and AdamW
under DeepSpeed ZeRO-2. All engines live in one pair of processes and step in turn.

- `ours`: the frozen experts sharded over the two ranks, the new ones replicated, sequences packed,
  logits at targets only; `ours_replica`: the same with every frozen expert on each rank;
- `moextend_script`: our restatement of MoExtend's training script on the same sequences: every
  sequence padded to the full length, its `mask` loop in every layer, ZeRO-3 as its fine-tuning
  stage has it, which gathers every expert in every pass;
- `moextend_zero2`: the same script under ZeRO-2, a full replica a rank, which fits small models
  only; held against our replica;
- `moextend_equal`, `autoep_equal`: sequences of the full length for everybody, so that padding
  plays no part, both under ZeRO-2; AutoEP shards its experts over the two ranks and trains all of
  them (it refuses to mix).

One shape, at the load that random routers give; other shapes and loads are measured by `bench layer` alone.

CPU time is that of both ranks, all threads; a ratio is the median over repetitions. Of our own steps the
operations of all matrix products are counted, too, and set against what plain products reach.
"""

import argparse
import datetime
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from moe_ext.benchmarks.host_memory import keep_freed_memory
from moe_ext.benchmarks.peers import LayerWeights, MoExtendMask, shim_autoep
from moe_ext.benchmarks.report import Samples, environment, spread, write_json

RANKS, LAYERS, VOCAB, DIM, WIDE, EXPERTS, NEW, TOP_K = 2, 4, 2048, 512, 256, 30, 2, 4
FEATURES, FULL_LENGTH, SEQUENCES = 256, 256, 8
IMAGE_TOKENS = 32
LIKE_FOR_LIKE = {
    "moextend_script": "ours",
    "moextend_zero2": "ours_replica",
    "moextend_equal": "ours_replica_equal",
    "autoep_equal": "ours_equal",
}
"""Peer -> which of ours it is held against: pretrained weights divided over the ranks, or whole on each."""
LEARNING_RATE = 1e-4


def _config(num_experts: int):
    from transformers import MixtralConfig

    return MixtralConfig(
        vocab_size=VOCAB,
        hidden_size=DIM,
        intermediate_size=WIDE,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=4,
        num_local_experts=num_experts,
        num_experts_per_tok=TOP_K,
        tie_word_embeddings=False,
    )


class Sequences:
    """One rank's sequences: an image run, then text; lengths in [FULL_LENGTH / 4, 3 / 4], or full."""

    def __init__(self, rank: int, full: bool):
        stream = torch.Generator().manual_seed(rank)
        shortest, longest = FULL_LENGTH // 4, 3 * FULL_LENGTH // 4 + 1
        lengths = torch.randint(shortest, longest, (SEQUENCES,), generator=stream)
        self.lengths = [FULL_LENGTH] * SEQUENCES if full else lengths.tolist()
        self.ids = [torch.randint(VOCAB, (n,), generator=stream) for n in self.lengths]
        self.features = torch.randn(SEQUENCES, IMAGE_TOKENS, FEATURES, generator=stream)

    def padded(self) -> dict[str, Tensor]:
        """One row a sequence, of the full length (MoExtend)."""
        return self._rows([[i] for i in range(SEQUENCES)])

    def packed(self) -> dict[str, Tensor]:
        """As few rows as first fit needs."""
        rows: list[list[int]] = []
        for i in sorted(range(SEQUENCES), key=lambda i: -self.lengths[i]):
            fits = [
                r for r in rows if sum(self.lengths[j] for j in r) + self.lengths[i] <= FULL_LENGTH
            ]
            if fits:
                fits[0].append(i)
            else:
                rows.append([i])
        return self._rows(rows)

    def _rows(self, rows: list[list[int]]) -> dict[str, Tensor]:
        shape = (len(rows), FULL_LENGTH)
        ids, position, segment, image = (torch.zeros(shape, dtype=torch.int64) for _ in range(4))
        labels = torch.full(shape, -100)
        for r, row in enumerate(rows):
            start = 0
            for number, i in enumerate(row, 1):
                place = slice(start, start + self.lengths[i])
                ids[r, place], segment[r, place] = self.ids[i], number
                position[r, place] = torch.arange(self.lengths[i])
                image[r, start : start + IMAGE_TOKENS] = 1
                labels[r, start + IMAGE_TOKENS : place.stop - 1] = self.ids[i][IMAGE_TOKENS + 1 :]
                start = place.stop
        features = torch.cat([self.features[i] for row in rows for i in row])
        same = segment.unsqueeze(2) == segment.unsqueeze(1)
        causal = torch.ones(FULL_LENGTH, FULL_LENGTH, dtype=torch.bool).tril()
        return {"ids": ids, "position": position, "segment": segment, "image": image.bool(),
                "labels": labels, "features": features, "mask": (same & causal).unsqueeze(1)}  # fmt: skip


def _embed(lm: nn.Module, projector: nn.Linear, rows: dict[str, Tensor]) -> Tensor:
    text = lm.get_input_embeddings()(rows["ids"])
    images = projector(rows["features"].to(projector.weight.dtype))
    return text.masked_scatter(rows["image"].unsqueeze(-1), images)


def _hidden(lm: nn.Module, projector: nn.Linear, rows: dict[str, Tensor]) -> Tensor:
    embeds = _embed(lm, projector, rows)
    return lm.model(inputs_embeds=embeds, attention_mask=rows["mask"], position_ids=rows["position"],
                    use_cache=False).last_hidden_state  # fmt: skip


def _loss_at_targets(lm, projector, rows) -> Tensor:
    hidden, target = _hidden(lm, projector, rows), rows["labels"] >= 0
    return F.cross_entropy(lm.lm_head(hidden[target]).float(), rows["labels"][target])


def _loss_everywhere(lm, projector, rows) -> Tensor:
    logits = lm.lm_head(_hidden(lm, projector, rows)).float()
    return F.cross_entropy(logits.flatten(0, 1), rows["labels"].flatten(), ignore_index=-100)


class Ours:
    """Our layer and our engine."""

    def __init__(self, folder: Path, dtype: torch.dtype, topology, placement: str = "shard"):
        from moe_ext.config import (
            CalibrationKind,
            ExpertInit,
            ExtensionConfig,
            Placement,
            RowInit,
            Scope,
        )
        from moe_ext.model.extend import LayerPlan, add_extension, load_base
        from moe_ext.training.engine import Engine, EngineSettings, TrainableParameter

        self.lm = load_base(folder, dtype=dtype, ep_rank=topology.ep_rank, ep_size=topology.ep_size,
                            ep_group=topology.ep_group, frozen_placement=Placement(placement))  # fmt: skip
        settings = ExtensionConfig(scope=Scope.joint, expert_init=ExpertInit.random,
                                   row_init=RowInit.clone, calibration=CalibrationKind.none)  # fmt: skip
        # rows cloned a little below their sources: about the load of an average expert
        plans = [LayerPlan(l, NEW, list(range(NEW)), [-0.1] * NEW) for l in range(LAYERS)]
        add_extension(self.lm, str(folder), "new", plans, settings)
        torch.manual_seed(0)
        self.projector = nn.Linear(FEATURES, DIM).to(dtype)
        named = {**dict(self.lm.named_parameters()), **dict(self.projector.named_parameters())}
        trainable = [TrainableParameter(n, p, "new") for n, p in named.items() if p.requires_grad]
        engine_settings = EngineSettings(2, 1.0, 1, SEQUENCES, bf16=dtype is torch.bfloat16)
        self.engine = Engine(self._loss, trainable, engine_settings, topology)

    def _loss(self, rows: dict[str, Tensor]) -> Tensor:
        from moe_ext.model.context import RoutingContext

        self.lm.context_holder.context = RoutingContext(rows["image"].long(), rows["segment"])
        return _loss_at_targets(self.lm, self.projector, rows)

    def step(self, sequences: Sequences) -> None:
        self.engine.backward(self.engine(sequences.packed()) / RANKS)
        self.engine.step(LEARNING_RATE)


class _Whole(nn.Module):
    """Model and projector as one module, as a training script hands them to DeepSpeed."""

    def __init__(self, lm: nn.Module, projector: nn.Linear):
        super().__init__()
        self.lm, self.projector = lm, projector
        self.config = lm.config  # AutoEP reads top-k from it

    def forward(self, rows: dict[str, Tensor]) -> Tensor:
        return _loss_everywhere(self.lm, self.projector, rows)


class Script:
    """A peer: its blocks in a Mixtral, frozen as far as it can, under plain DeepSpeed."""

    def __init__(self, lm: nn.Module, dtype: torch.dtype, extra: dict[str, Any]):
        import deepspeed

        torch.manual_seed(0)
        whole = _Whole(lm, nn.Linear(FEATURES, DIM)).to(dtype)
        config = {
            "train_micro_batch_size_per_gpu": SEQUENCES,
            "gradient_clipping": 1.0,
            "steps_per_print": 10**9,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": 2, "reduce_bucket_size": 50_000_000},
            "optimizer": {
                "type": "AdamW",
                "params": {"lr": LEARNING_RATE, "torch_adam": True, "weight_decay": 0.0},
            },
            **({"bf16": {"enabled": True}} if dtype is torch.bfloat16 else {}),
            **extra,
        }
        trained = [p for p in whole.parameters() if p.requires_grad]
        plain_linear = F.linear
        self.engine, *_ = deepspeed.initialize(model=whole, config=config, model_parameters=trained)
        # ZeRO-3 puts a linear of its own into torch; the other engines of this process keep torch's
        self.linear, F.linear = F.linear, plain_linear

    def step(self, sequences: Sequences) -> None:
        plain_linear, F.linear = F.linear, self.linear
        self.engine.backward(self.engine(sequences.padded()))
        self.engine.step()
        F.linear = plain_linear


ZERO_3 = {
    "zero_optimization": {
        "stage": 3,
        "reduce_bucket_size": DIM * DIM,
        "stage3_prefetch_bucket_size": DIM * DIM * 9 // 10,
        "stage3_param_persistence_threshold": 10 * DIM,
    }
}
"""What `auto` in the script's own ZeRO-3 file becomes for this width."""


def moextend(dtype: torch.dtype, extra: dict[str, Any]) -> Script:
    from transformers import MixtralForCausalLM

    lm = MixtralForCausalLM(_config(EXPERTS + NEW)).requires_grad_(False)
    for layer in lm.model.layers:
        experts = layer.mlp.experts
        weights = LayerWeights(
            experts.gate_up_proj.data,
            experts.down_proj.data,
            layer.mlp.gate.weight.data,
            NEW,
            TOP_K,
        )
        layer.mlp = MoExtendMask(weights)
    return Script(lm, dtype, extra)


def autoep(dtype: torch.dtype) -> Script:
    from transformers import MixtralForCausalLM

    shim_autoep()
    lm = MixtralForCausalLM(_config(EXPERTS + NEW)).requires_grad_(False)
    for layer in lm.model.layers:
        layer.mlp.requires_grad_(True)
    expert_parallel = {
        "enabled": True,
        "autoep_size": RANKS,
        "preset_model": "mixtral",
        "moe_layer_pattern": r"lm\.model\.layers\.\d+\.mlp",
    }
    return Script(lm, dtype, {"expert_parallel": expert_parallel})


def _timed(step: Callable[[Sequences], None], sequences: Sequences) -> tuple[float, float]:
    """(CPU s of both ranks, wall s) of one step."""
    dist.barrier()
    cpu, wall = time.process_time(), time.perf_counter()
    step(sequences)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    total = torch.tensor([cpu])
    dist.all_reduce(total)
    return total.item(), wall


def product_rate(dtype: torch.dtype, size: int = 2048, repetitions: int = 5) -> float:
    """FLOP/s of a product of two square matrices on one thread: the best that this machine does."""
    a, b = torch.randn(2, size, size).to(dtype).unbind(0)
    rates = []
    for _ in range(repetitions):
        began = time.process_time()
        torch.mm(a, b)
        rates.append(2 * size**3 / (time.process_time() - began))
    return max(rates)


def counted_flop(step: Callable[[Sequences], None], sequences: Sequences) -> float:
    """Operations of the matrix products of one step, attention's included, over both ranks."""
    with FlopCounterMode(display=False) as counter:
        step(sequences)
    total = torch.tensor([counter.get_total_flops()], dtype=torch.float64)
    dist.all_reduce(total)
    return total.item()


def _rank(rank: int, folder: str, dtype_name: str, peers: list[str], repetitions: int) -> None:
    """One of the two processes; rank 0 leaves the samples in `folder`."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS),
                      LOCAL_WORLD_SIZE=str(RANKS), DS_ACCELERATOR="cpu")  # fmt: skip
    from moe_ext.training.topology import ranks_from_environment, start

    store = dist.FileStore(f"{folder}/store", RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS,
                            timeout=datetime.timedelta(seconds=1200))  # fmt: skip
    topology = start(ranks_from_environment(), RANKS, timeout_s=1200.0, threads_per_rank=1)
    keep_freed_memory()
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype_name]
    short, full = Sequences(rank, full=False), Sequences(rank, full=True)
    ours = Ours(Path(folder) / "base", dtype, topology)
    replica = Ours(Path(folder) / "base", dtype, topology, "replicate")
    runs: dict[str, tuple[Any, Sequences]] = {
        "ours": (ours, short),
        "ours_replica": (replica, short),
        "ours_equal": (ours, full),
        "ours_replica_equal": (replica, full),
    }
    if "moextend" in peers:
        runs["moextend_script"] = (moextend(dtype, ZERO_3), short)
        peer = moextend(dtype, {})
        runs |= {"moextend_zero2": (peer, short), "moextend_equal": (peer, full)}
    if "autoep" in peers:
        runs["autoep_equal"] = (autoep(dtype), full)
    samples = {name: Samples() for name in runs}
    for repetition in range(-1, repetitions):
        for name, (engine, sequences) in runs.items():
            cpu, wall = _timed(engine.step, sequences)
            if repetition >= 0:
                samples[name].cpu_s.append(cpu)
                samples[name].wall_s.append(wall)
    own = {name: run for name, run in runs.items() if isinstance(run[0], Ours)}
    flop = {name: counted_flop(engine.step, seen) for name, (engine, seen) in own.items()}
    peak = product_rate(dtype)
    if rank == 0:
        rows = short.packed()["ids"]
        rates = {n: f / spread(samples[n].cpu_s)["median"] for n, f in flop.items()}
        result = {
            "samples": {n: vars(s) for n, s in samples.items()},
            "packed_rows": len(rows),
            "gemm_peak_gflops": peak / 1e9,
            "achieved": {
                n: {"gflops": r / 1e9, "of_peak": r / peak, "flop": flop[n]}
                for n, r in rates.items()
            },
        }
        torch.save(result, f"{folder}/result")
    dist.barrier()
    os._exit(0)  # engines of several kinds do not agree on how to leave


def bench(dtype: str, peers: list[str], repetitions: int) -> dict[str, Any]:
    """All samples and ratios of one dtype."""
    from transformers import MixtralForCausalLM

    with tempfile.TemporaryDirectory(prefix="bench-step-") as folder:
        torch.manual_seed(0)
        MixtralForCausalLM(_config(EXPERTS)).save_pretrained(Path(folder) / "base")
        torch.multiprocessing.spawn(_rank, (folder, dtype, peers, repetitions), nprocs=RANKS)
        result = torch.load(f"{folder}/result")
    samples, ratios = result["samples"], {}
    for name, own in LIKE_FOR_LIKE.items():
        if name in samples:
            pairs = zip(samples[name]["cpu_s"], samples[own]["cpu_s"], strict=True)
            ratios[f"{name}/{dtype}"] = spread([a / b for a, b in pairs])
    return {"case": dtype, **result, "ratios": ratios}


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="moe-ext bench step", description=__doc__)
    parser.add_argument("--json", type=Path, help="write all samples and ratios to this file")
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--dtypes", default="fp32,bf16")
    parser.add_argument("--peers", default="moextend,autoep")
    chosen = parser.parse_args(list(arguments))
    settings, cases = environment(), []
    print("  ".join(f"{name} {value}" for name, value in settings.items()), flush=True)
    for dtype in chosen.dtypes.split(","):
        case = bench(dtype, chosen.peers.split(","), chosen.repetitions)
        cases.append(case)
        for name, sample in case["samples"].items():
            middle = spread(sample["cpu_s"])["median"]
            ratio = case["ratios"].get(f"{name}/{dtype}")
            text = (
                f"{ratio['median']:.2f} x ours ({ratio['q1']:.2f}-{ratio['q3']:.2f})"
                if ratio
                else ""
            )
            if name in case["achieved"]:
                rate = case["achieved"][name]
                text = f"{rate['gflops']:.0f} GFLOP/s, {rate['of_peak']:.0%} of plain products"
            print(f"{dtype}  {name:<18}{1e3 * middle:9.0f} ms CPU a step  {text}", flush=True)
        if chosen.json:
            write_json(chosen.json, "step", settings, cases)
    return 0
