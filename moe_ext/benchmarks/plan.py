"""`moe-ext bench plan`: the planner's step time beside real steps on this machine.

Small real models (a Mixtral of 4 layers with new experts and a connector) train on one and on two
ranks of one thread each, with our loading, layer and engine; every step's processor time is taken. The
planner predicts the same steps for a cluster that has what was measured just before: the rate of plain
products, and bandwidth and latency of an exchange between two ranks. `cluster.achieved_share` is 1 there,
so that prediction over measurement *is* the share of a plain product's rate that a step achieves: the
number to put into `cluster.achieved_share`. How much it differs from case to case says how far the planner's
comparison of placements can be trusted.

Processor time is of one rank, the mean of all, so that other work on the machine counts little; what
a rank waits for its peer is not in it.
"""

import argparse
import datetime
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn

from moe_ext.batch import IGNORED_LABEL, Batch
from moe_ext.benchmarks.report import Samples, environment, spread, write_json
from moe_ext.benchmarks.step import product_rate
from moe_ext.config import ExtensionConfig, Placement, Scope, Trainable
from moe_ext.config_cluster import ClusterConfig
from moe_ext.model.connectors import Connector
from moe_ext.model.extend import LayerPlan, add_extension, extended_layers, load_base
from moe_ext.model.multimodal import MultimodalMoE, Output
from moe_ext.planning.candidates import Subject, evaluate
from moe_ext.planning.memory import Placed
from moe_ext.planning.sizes import EncoderSizes, base_config, base_sizes, extension_sizes
from moe_ext.planning.step import Work
from moe_ext.training.engine import Engine, EngineSettings, TrainableParameter
from moe_ext.training.parts import choose
from moe_ext.training.topology import Topology, ranks_from_environment, start

LAYERS, DIM, FEATURES, IMAGE, CONNECTOR_DIM, NUM_NEW = 4, 512, 256, 32, 512, 2
EXCHANGED_BYTES = 8 << 20
TRAIN = [Trainable.connector, Trainable.new_experts, Trainable.new_rows, Trainable.calibration]


@dataclass(frozen=True)
class Case:
    """One model and where it lives."""

    experts: int = 8
    top_k: int = 2
    wide: int = 1024
    vocabulary: int = 2048
    sequences: int = 2
    length: int = 512
    ranks: int = 1
    ep_size: int = 1
    recompute: bool = False
    connector: bool = True
    """Train it, too; without it the layers below the first new experts have no backward pass."""


CASES = {
    "8x2": Case(),
    "8x2, long": Case(sequences=1, length=2048),
    "8x2, large vocabulary": Case(vocabulary=32768),
    "8x2, recomputed": Case(recompute=True),
    "8x2, new experts alone": Case(connector=False),
    "32x4": Case(32, 4, 256),
    "128x8": Case(128, 8, 128),
    "8x2, two ranks": Case(ranks=2),
    "8x2, two ranks, ep 2": Case(ranks=2, ep_size=2),
    "32x4, two ranks": Case(32, 4, 256, ranks=2),
    "32x4, two ranks, ep 2": Case(32, 4, 256, ranks=2, ep_size=2),
    "128x8, two ranks": Case(128, 8, 128, ranks=2),
    "128x8, two ranks, ep 2": Case(128, 8, 128, ranks=2, ep_size=2),
}


class _Cached(nn.Module):
    """The place of an encoder whose features are given."""

    tokens_per_item, feature_dim = IMAGE, FEATURES


def _base_config(case: Case) -> Any:
    from transformers import MixtralConfig

    return MixtralConfig(
        vocab_size=case.vocabulary,
        hidden_size=DIM,
        intermediate_size=case.wide,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=4,
        num_local_experts=case.experts,
        num_experts_per_tok=case.top_k,
        tie_word_embeddings=False,
    )


def _extension() -> ExtensionConfig:
    layers = (LAYERS - 2, LAYERS - 1)
    return ExtensionConfig(
        sources={layer: list(range(NUM_NEW)) for layer in layers}, scope=Scope.joint
    )


def _train(case: Case) -> list[Trainable]:
    return TRAIN if case.connector else TRAIN[1:]


def _model(folder: str, case: Case, dtype: torch.dtype, topology: Topology) -> MultimodalMoE:
    group = {"ep_rank": topology.ep_rank, "ep_size": topology.ep_size}
    lm = load_base(folder, dtype=dtype, ep_group=topology.ep_group, **group)
    plans = [
        LayerPlan(i, NUM_NEW, ids, [-0.1] * NUM_NEW) for i, ids in _extension().sources.items()
    ]
    add_extension(lm, folder, "vision", plans, _extension())
    connectors = nn.ModuleDict({"image": Connector(FEATURES, CONNECTOR_DIM, DIM, dtype=dtype)})
    return MultimodalMoE(lm, {1: _Cached()}, connectors, case.recompute)


def _batch(case: Case, rank: int, dtype: torch.dtype) -> Batch:
    """Whole rows that begin with the image: no token is dead, none is padding."""
    stream = torch.Generator().manual_seed(rank)
    shape = (case.sequences, case.length)
    ids = torch.randint(3, case.vocabulary, shape, generator=stream)
    modality = torch.zeros_like(ids)
    modality[:, :IMAGE] = 1
    labels = ids.masked_fill(modality == 1, IGNORED_LABEL)
    position = torch.arange(case.length).expand(shape).contiguous()
    features = torch.randn(case.sequences, IMAGE, FEATURES, generator=stream).to(dtype)
    return Batch(ids, labels, modality, torch.ones_like(ids), position, {1: features})


def _new_share(model: MultimodalMoE, output: Output) -> float:
    """Share of the slots of extended layers that chose new experts."""
    blocks = extended_layers(model.lm).items()
    chosen = [(output.context.records[i].expert_TS, b.num_frozen) for i, b in blocks if b.num_new]
    return sum(int((e >= first).sum()) for e, first in chosen) / sum(e.numel() for e, _ in chosen)


def _link() -> tuple[float, float]:
    """(10^9 bytes a second that a rank sends, microseconds that an empty exchange takes) of two ranks."""
    rates, latencies = [], []
    for number in (EXCHANGED_BYTES, 2):
        rows = torch.zeros(2, number // 2, dtype=torch.uint8)
        out = torch.empty_like(rows)
        for _ in range(20):
            began = time.process_time()
            dist.all_to_all_single(out, rows)
            took = time.process_time() - began
            (rates if number > 2 else latencies).append(took)
    latency = spread(latencies)["median"]
    return EXCHANGED_BYTES / 2 / (spread(rates)["median"] - latency) / 1e9, 1e6 * latency


def _rank(rank: int, folder: str, case: Case, dtype: torch.dtype, repetitions: int) -> None:
    """One rank of one case; every rank leaves what it measured in `folder`."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(case.ranks),
                      LOCAL_WORLD_SIZE=str(case.ranks), DS_ACCELERATOR="cpu")  # fmt: skip
    store = dist.FileStore(f"{folder}/store", case.ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=case.ranks,
                            timeout=datetime.timedelta(seconds=1200))  # fmt: skip
    topology = start(ranks_from_environment(), case.ep_size, timeout_s=1200.0, threads_per_rank=1)
    rate, link = product_rate(dtype), _link() if case.ranks > 1 else (1.0, 0.0)
    model = _model(f"{folder}/base", case, dtype, topology)
    parts = choose(model, _train(case))
    model.set_liveness()
    trainable = [
        TrainableParameter(p.name, p.parameter, p.trainable.name, p.sharded) for p in parts
    ]
    bf16 = dtype is torch.bfloat16
    engine = Engine(
        model.forward, trainable, EngineSettings(1, 1.0, 1, case.sequences, bf16), topology
    )
    batch, samples, share = _batch(case, rank, dtype), Samples(), 0.0
    for repetition in range(-1, repetitions):
        dist.barrier()
        cpu, wall = time.process_time(), time.perf_counter()
        output = engine(batch)
        engine.backward(output.nll_sum / (case.ranks * batch.labels.numel()))
        engine.step(1e-4)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        share = _new_share(model, output)
        if repetition >= 0:
            samples.cpu_s.append(cpu)
            samples.wall_s.append(wall)
    torch.save((samples, rate, link, share), f"{folder}/rank-{rank}")
    dist.barrier()
    os._exit(0)  # nothing is left to be put in order


def predicted(
    folder: Path, case: Case, dtype: torch.dtype, cluster: ClusterConfig, new_share: float
) -> dict[str, float]:
    """The planner's seconds of such a step, part by part."""
    base = base_sizes(base_config(folder))
    extension = extension_sizes(base, _extension())
    wide = CONNECTOR_DIM
    connector = (FEATURES * wide, wide, wide * DIM, DIM, FEATURES * DIM)
    encoder = EncoderSizes(0, FEATURES, IMAGE, 0.0, connector, 0)
    live = LAYERS if case.connector else LAYERS - extension.layers[0].layer
    work = Work(case.sequences, case.length, 1, 1, case.recompute, new_share, live, dtype.itemsize)
    placed = Placed(case.ep_size, Placement.shard, Placement.replicate, 1)
    subject = Subject(base, extension, [encoder], _train(case), work)
    time_s = evaluate(subject, placed, cluster).time
    return {**vars(time_s), "total": time_s.total}


def bench(name: str, dtype_name: str, repetitions: int) -> dict[str, Any]:
    """One case: what was measured, what was predicted, and their ratio."""
    from transformers import MixtralForCausalLM

    case = CASES[name]
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype_name]
    with tempfile.TemporaryDirectory(prefix="bench-plan-") as folder:
        torch.manual_seed(0)
        MixtralForCausalLM(_base_config(case)).to(dtype).save_pretrained(f"{folder}/base")
        torch.multiprocessing.spawn(_rank, (folder, case, dtype, repetitions), nprocs=case.ranks)
        found = [
            torch.load(f"{folder}/rank-{rank}", weights_only=False) for rank in range(case.ranks)
        ]
        samples, rates, links, shares = zip(*found, strict=True)
        cluster = ClusterConfig(
            name="this machine",
            ranks_per_node=case.ranks,
            intra_gb_per_s=sum(rate for rate, _ in links) / case.ranks,
            intra_latency_us=sum(latency for _, latency in links) / case.ranks,
            peak_tflops=sum(rates) / case.ranks / 1e12,
            achieved_share=1.0,
        )
        step_s = predicted(Path(folder) / "base", case, dtype, cluster, sum(shares) / case.ranks)
    cpu_s = [
        sum(of_ranks) / case.ranks for of_ranks in zip(*(s.cpu_s for s in samples), strict=True)
    ]
    return {
        "case": name,
        "dtype": dtype_name,
        "cluster": vars(cluster),
        "predicted_s": step_s,
        "samples": {f"rank {rank}": vars(each) for rank, each in enumerate(samples)},
        "cpu_s": spread(cpu_s),
        "ratios": {f"{name}/{dtype_name}": spread([step_s["total"] / s for s in cpu_s])},
    }


def median_of(case: dict[str, Any]) -> float:
    """Predicted over measured seconds."""
    (ratio,) = case["ratios"].values()
    return ratio["median"]


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="moe-ext bench plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, help="write all samples and figures to this file")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--dtypes", default="fp32,bf16")
    parser.add_argument("--cases", default=";".join(CASES), help="names, divided by ;")
    chosen = parser.parse_args(list(arguments))
    settings, cases = environment(), []
    print("  ".join(f"{name} {value}" for name, value in settings.items()), flush=True)
    for dtype in chosen.dtypes.split(","):
        for name in chosen.cases.split(";"):
            found = bench(name, dtype, chosen.repetitions)
            cases.append(found)
            cpu = found["cpu_s"]
            print(
                f"{dtype}  {name:<24}{1e3 * cpu['median']:8.0f} ms ({1e3 * cpu['q1']:.0f}-"
                f"{1e3 * cpu['q3']:.0f})  predicted {1e3 * found['predicted_s']['total']:6.0f} ms at "
                f"{1e3 * found['cluster']['peak_tflops']:.0f} GFLOP/s: "
                f"{median_of(found):.2f}",
                flush=True,
            )
        shares = spread([median_of(case) for case in cases if case["dtype"] == dtype])
        print(
            f"{dtype}  cluster.achieved_share={shares['median']:.2f}; with it predictions are "
            f"{shares['min'] / shares['median']:.2f} to {shares['max'] / shares['median']:.2f} times "
            "what was measured",
            flush=True,
        )
        if chosen.json:
            write_json(chosen.json, "plan", settings, cases)
    return 0
