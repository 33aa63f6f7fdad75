"""Loading: what a rank reads and keeps in memory, two ranks against one, and clear refusals."""

import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from moe_ext.config import Placement
from moe_ext.model.files import Checkpoint, base_sha256
from moe_ext.model.load import extended_layers, load_base
from tests.model.tiny import save_tiny
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    save_tiny(folder, "mixtral")
    return folder


@pytest.fixture
def copy(base, tmp_path):
    """A copy of the base that a test may damage."""
    return Path(shutil.copytree(base, tmp_path / "copy"))


def write(folder: Path, config, files: Iterator[dict[str, torch.Tensor]]) -> int:
    """A synthetic checkpoint, one file after the other; returns its bytes. Never whole in memory."""
    folder.mkdir(exist_ok=True)
    config.save_pretrained(folder)
    file_of, total = {}, 0
    for number, tensors in enumerate(files):
        name = f"model-{number:05d}.safetensors"
        total += sum(tensor.nbytes for tensor in tensors.values())
        save_file(tensors, folder / name)
        file_of |= dict.fromkeys(tensors, name)
    index = {"metadata": {"total_size": total}, "weight_map": file_of}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def config_of(model_type: str, hidden: int, wide: int, num_layers: int, num_experts: int, **more):
    return AutoConfig.for_model(
        model_type,
        vocab_size=256,
        hidden_size=hidden,
        intermediate_size=wide,
        num_hidden_layers=num_layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=hidden // 8,
        num_local_experts=num_experts,
        num_experts_per_tok=2,
        **more,
    )


def _plain(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    return {key: torch.full(shape, 0.01).bfloat16() for key, shape in shapes.items()}


def _dense(config, layer: int, bias: bool = False) -> dict[str, torch.Tensor]:
    """What a decoder layer has beside its sparse block; the rest of the model behind the last one."""
    hidden = config.hidden_size
    if layer == config.num_hidden_layers:
        return _plain({"lm_head.weight": (256, hidden), "model.norm.weight": (hidden,),
                       "model.embed_tokens.weight": (256, hidden)})  # fmt: skip
    prefix = f"model.layers.{layer}."
    norms = ("input_layernorm", "post_attention_layernorm")
    shapes: dict[str, tuple[int, ...]] = {f"{prefix}{name}.weight": (hidden,) for name in norms}
    for name in "qkvo":
        shapes[f"{prefix}self_attn.{name}_proj.weight"] = (hidden, hidden)
        if bias:
            shapes[f"{prefix}self_attn.{name}_proj.bias"] = (hidden,)
    return _plain(shapes)


def mixtral_files(config, fp8: bool = False) -> Iterator[dict[str, torch.Tensor]]:
    hidden, wide, num_experts = (
        config.hidden_size, config.intermediate_size, config.num_local_experts
    )  # fmt: skip
    for layer in range(config.num_hidden_layers + 1):
        tensors = _dense(config, layer)
        if layer < config.num_hidden_layers:
            prefix = f"model.layers.{layer}.block_sparse_moe."
            tensors |= _plain({f"{prefix}gate.weight": (num_experts, hidden)})
            for expert in range(num_experts):
                name = f"{prefix}experts.{expert}."
                shapes = {"w1": (wide, hidden), "w3": (wide, hidden), "w2": (hidden, wide)}
                own = _plain({f"{name}{w}.weight": shape for w, shape in shapes.items()})
                if fp8:
                    factors = {f"{key}_scale_inv": torch.ones(-(-value.shape[0] // 128), -(-value.shape[1] // 128))
                               for key, value in own.items()}  # fmt: skip
                    own = {k: v.to(torch.float8_e4m3fn) for k, v in own.items()} | factors
                tensors |= own
        yield tensors


def mxfp4_files(config) -> Iterator[dict[str, torch.Tensor]]:
    """GPT-OSS as published."""
    hidden, wide, num = config.hidden_size, config.intermediate_size, config.num_local_experts
    for layer in range(config.num_hidden_layers + 1):
        tensors = _dense(config, layer, bias=True)
        if layer < config.num_hidden_layers:
            prefix = f"model.layers.{layer}."
            experts = f"{prefix}mlp.experts."
            tensors |= _plain({f"{prefix}self_attn.sinks": (8,), f"{prefix}mlp.router.weight": (num, hidden),
                               f"{prefix}mlp.router.bias": (num,), f"{experts}gate_up_proj_bias": (num, 2 * wide),
                               f"{experts}down_proj_bias": (num, hidden)})  # fmt: skip
            for name, (out, width) in (
                ("gate_up_proj", (2 * wide, hidden)),
                ("down_proj", (hidden, wide)),
            ):
                blocks = torch.full((num, out, width // 32, 16), 17, dtype=torch.uint8)
                scales = torch.full((num, out, width // 32), 120, dtype=torch.uint8)
                tensors |= {f"{experts}{name}_blocks": blocks, f"{experts}{name}_scales": scales}
        yield tensors


def _anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon in /proc/self/status")


def _memory_of_loading(folder: str, warm_up: str) -> dict[str, int]:
    """On each of two ranks: bytes of own tensors, and growth of anonymous memory, at its peak."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    group = torch.distributed.group.WORLD
    settings = {"ep_rank": rank, "ep_size": world, "ep_group": group}
    load_base(warm_up, dtype=torch.bfloat16, **settings)  # imports, thread pools, allocator
    before = peak = _anonymous_bytes()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, _anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    lm = load_base(folder, dtype=torch.bfloat16, **settings)
    done.set()
    watcher.join()
    peak = max(peak, _anonymous_bytes())
    own = sum(t.nbytes for t in [*lm.parameters(), *lm.buffers()])
    block = extended_layers(lm)[0].frozen
    expert = (block.gate_up[0].nbytes + block.down[0].nbytes) if block.expert_ids else 0
    return {"own": own, "growth": peak - before, "expert": expert}


def _check_growth(results: list[dict[str, int]]) -> None:
    for result in results:
        assert result["growth"] <= result["own"] + max(result["own"] // 10, result["expert"]), (
            result
        )


def _check_memory(results: list[dict[str, int]], total: int) -> None:
    _check_growth(results)
    for result in results:
        assert result["own"] < 0.65 * total


def test_a_rank_keeps_its_own_tensors_and_no_more(base, tmp_path):
    config = config_of("mixtral", hidden=512, wide=1024, num_layers=4, num_experts=7)
    total = write(tmp_path, config, mixtral_files(config))
    assert total > 90e6
    _check_memory(run_ranks(_memory_of_loading, 2, str(tmp_path), str(base)), total)


def test_a_rank_unpacks_an_expert_at_a_time(base, tmp_path):
    """Formats of 4 and 8 bits, whose experts become bf16 on the way."""
    quantised = {"quant_method": "mxfp4"}
    config = config_of("gpt_oss", 512, 1024, 4, 12, quantization_config=quantised)
    write(tmp_path / "mxfp4", config, mxfp4_files(config))
    quantised = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    config = config_of("mixtral", 512, 1024, 4, 12, quantization_config=quantised)
    write(tmp_path / "fp8", config, mixtral_files(config, fp8=True))
    for name in ("mxfp4", "fp8"):
        _check_growth(run_ranks(_memory_of_loading, 2, str(tmp_path / name), str(base)))


@pytest.mark.slow
def test_a_rank_keeps_its_own_tensors_of_two_gigabytes(base, tmp_path):
    config = config_of("mixtral", hidden=1024, wide=3584, num_layers=12, num_experts=8)
    total = write(tmp_path, config, mixtral_files(config))
    assert total >= 2 << 30
    results = run_ranks(_memory_of_loading, 2, str(tmp_path), str(base), timeout_s=500)
    print(f"checkpoint {total:,} bytes; ranks {results}")
    _check_memory(results, total)


def _logits_of_two_ranks(folder: str) -> list[torch.Tensor]:
    rank, group = torch.distributed.get_rank(), torch.distributed.group.WORLD
    ids = torch.randint(3, 128, (2, 9 + rank), generator=torch.Generator().manual_seed(rank))
    logits = []
    hot = {0: [3], 1: [0, 2], 2: [1, 2, 3, 4]}  # of 5 experts in each of three layers
    for placement, hot_here in (*((p, None) for p in Placement), (Placement.shard, hot)):
        lm = load_base(
            folder,
            dtype=torch.float32,
            ep_rank=rank,
            ep_size=2,
            ep_group=group,
            frozen_placement=placement,
            hot=hot_here,
        )
        with torch.no_grad():
            logits.append(lm(ids).logits)
    return logits


def test_two_ranks_compute_what_one_computes(base):
    lm = load_base(base, dtype=torch.float32)
    for rank, logits in enumerate(run_ranks(_logits_of_two_ranks, 2, str(base))):
        assert len(logits) == 3
        ids = torch.randint(3, 128, (2, 9 + rank), generator=torch.Generator().manual_seed(rank))
        with torch.no_grad():
            expected = lm(ids).logits
        for ours in logits:
            assert (ours - expected).abs().max() < 1e-5 * expected.abs().max()


def test_a_rank_reads_only_what_it_holds(base, monkeypatch):
    read = set()

    class Watched(Checkpoint):
        def tensor(self, key):
            read.add(key)
            return super().tensor(key)

    monkeypatch.setattr("moe_ext.model.load.Checkpoint", Watched)
    load_base(base, dtype=torch.float32, ep_rank=1, ep_size=2)
    experts = {key.split(".experts.")[1].split(".")[0] for key in read if ".experts." in key}
    assert experts == {"3", "4"}


def test_one_file_loads_like_shards(base, tmp_path):
    shutil.copy(base / "config.json", tmp_path)
    tensors = {}
    for file in base.glob("*.safetensors"):
        tensors |= load_file(file)
    save_file(tensors, tmp_path / "model.safetensors")
    ids = torch.arange(3, 12).view(1, -1)
    with torch.no_grad():
        one = load_base(tmp_path, dtype=torch.float32)(ids).logits
        assert torch.equal(one, load_base(base, dtype=torch.float32)(ids).logits)


def test_the_hash_follows_the_contents(copy):
    first = base_sha256(copy)
    assert base_sha256(copy) == first
    shard = sorted(copy.glob("*.safetensors"))[0]
    tensors = load_file(shard)
    key = next(iter(tensors))
    tensors[key] = tensors[key] + 1
    save_file(tensors, shard)
    assert base_sha256(copy) != first


def _edit_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_refusals_name_the_folder_and_the_remedy(copy, tmp_path):
    def refused(message: str) -> None:
        with pytest.raises(ValueError, match=message):
            load_base(copy, dtype=torch.float32)

    shard = sorted(copy.glob("*.safetensors"))[-1]
    shard.rename(tmp_path / "away")
    refused(f"names 1 files that are not there .{shard.name}.; fetch them")
    (tmp_path / "away").rename(shard)

    index = copy / "model.safetensors.index.json"
    intact = index.read_text()
    weight_map = json.loads(intact)
    lost = "model.layers.1.block_sparse_moe.experts.4.w2.weight"
    del weight_map["weight_map"][lost]
    index.write_text(json.dumps(weight_map))
    refused(f"has no tensor '{lost}'")
    index.write_text(intact)

    _edit_config(copy, intermediate_size=20)
    refused("expert 0 gate has shape .24, 32., but config.json implies .20, 32.")
    _edit_config(copy, intermediate_size=24, quantization_config={"quant_method": "awq"})
    refused("is quantised")
    _edit_config(copy, model_type="llama")
    refused("'llama', which has no row in FAMILIES.*supported are .*mixtral.*base.dense")
    index.unlink()
    _edit_config(copy, model_type="mixtral", quantization_config=None)
    refused("neither model.safetensors nor model.safetensors.index.json")
    (copy / "pytorch_model.bin").touch()
    refused("pickled weights only")
    (copy / "config.json").unlink()
    refused("has no config.json")
