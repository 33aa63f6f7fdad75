"""The planned bytes of every kind beside those of real ranks with a real engine, within 5 %."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from transformers import AutoConfig

from moe_ext.batch import IGNORED_LABEL, Batch
from moe_ext.config import EncoderConfig, ExpertType, ExtensionConfig, Placement, Trainable
from moe_ext.model.connectors import Connector
from moe_ext.model.encoders import build_encoder
from moe_ext.model.extend import LayerPlan, attach_extension, extended_layers
from moe_ext.model.families import sparse_layers
from moe_ext.model.load import load_base
from moe_ext.model.multimodal import MultimodalMoE, Output
from moe_ext.planning.memory import Placed, RankMemory, rank_memory
from moe_ext.planning.sizes import base_sizes, encoder_sizes, extension_sizes
from moe_ext.planning.step import Work
from moe_ext.training.engine import Engine, EngineSettings, TrainableParameter
from moe_ext.training.held import held_bytes
from moe_ext.training.parts import choose
from moe_ext.training.topology import Ranks, start
from tests.model.tiny import save_tiny
from tests.ranks import run_ranks
from tests.training.tiny import make_tower

TRAIN = [
    Trainable.new_experts,
    Trainable.new_rows,
    Trainable.calibration,
    Trainable.connector,
]
CONNECTOR_DIM, ROWS, LENGTH, IMAGE = 64, 2, 160, 4
ENCODER = {"name": "hf_vision", "image_size": 16, "tokens_per_item": IMAGE}
FAMILIES = {
    "qwen2_moe": {"num_experts": 7},
    "ernie4_5_moe": {"moe_num_experts": 8},  # its router, and new rows, stay fp32
    "gpt_oss": {"intermediate_size": 96},  # experts with biases
}
"""Family -> what its tiny base has beside sizes at which experts outweigh the rest."""


@dataclass(frozen=True)
class Case:
    """One engine: a base, an extension, where they live, how they are trained."""

    family: str = "qwen2_moe"
    new: tuple[int, ...] = (3, 3)
    """New experts of the first and of the last sparse layer."""
    lora_rank: int = 0
    ep_size: int = 1
    placement: Placement = Placement.replicate
    hot: tuple[int, ...] = ()
    """Hot experts of every sparse layer."""
    frozen_bits: int = 0
    fp32: bool = False
    stage: int = 1
    accumulation: int = 1
    train: tuple[Trainable, ...] = tuple(TRAIN)

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.fp32 else torch.bfloat16

    def extension(self, sparse: Sequence[int]) -> ExtensionConfig:
        ends = (sparse[0], sparse[-1])
        sources = {layer: list(range(n)) for layer, n in zip(ends, self.new, strict=True)}
        low = (
            {"expert_type": ExpertType.lora, "lora_rank": self.lora_rank} if self.lora_rank else {}
        )
        return ExtensionConfig(sources=sources, placement=self.placement, **low)

    def hot_lists(self, sparse: Sequence[int]) -> dict[int, list[int]]:
        return {layer: list(range(1, 1 + n)) for layer, n in zip(sparse, self.hot, strict=False)}


def batch(dtype: torch.dtype) -> Batch:
    ids = torch.randint(3, 100, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    modality = torch.zeros_like(ids)
    modality[:, 1 : 1 + IMAGE] = 1
    labels = ids.masked_fill(modality == 1, IGNORED_LABEL)
    position = torch.arange(LENGTH).expand(ROWS, -1).contiguous()
    media = {1: torch.rand(ROWS, 3, 16, 16, dtype=dtype)}
    return Batch(ids, labels, modality, torch.ones_like(ids), position, media)


def model_of(folder: str, case: Case, topology) -> MultimodalMoE:
    path = f"{folder}/{case.family}"
    sparse = sparse_layers(AutoConfig.from_pretrained(path))
    lm = load_base(
        path,
        dtype=case.dtype,
        ep_rank=topology.ep_rank,
        ep_size=topology.ep_size,
        ep_group=topology.ep_group,
        attn_implementation=None if case.family == "gpt_oss" else "sdpa",
        frozen_bits=case.frozen_bits,
        hot=case.hot_lists(sparse),
    )
    settings = case.extension(sparse)
    plans = [LayerPlan(layer, len(ids), ids) for layer, ids in settings.sources.items()]
    attach_extension(lm, "vision", plans, settings)
    encoder = build_encoder(path=f"{folder}/tower", dtype=case.dtype, **ENCODER)
    width = lm.config.hidden_size
    connector = Connector(encoder.feature_dim, CONNECTOR_DIM, width, dtype=case.dtype)
    return MultimodalMoE(lm, {1: encoder}, nn.ModuleDict({"image": connector}))


def measured(folder: str, cases: list[Case]) -> list[dict]:
    """Case by case, moment -> kind -> bytes on this rank; and the share of slots of new experts."""
    world = dist.get_world_size()
    ranks = Ranks(dist.get_rank(), world, dist.get_rank(), world)
    found = []
    for case in cases:
        topology = start(ranks, case.ep_size, 60.0, 1)
        found.append(bytes_of(model_of(folder, case, topology), case, topology))
    return found


def bytes_of(model, case: Case, topology) -> dict[str, Any]:
    """Bytes by kind at four moments of one step of a real engine."""
    chosen = choose(model, list(case.train))
    model.set_liveness()
    trainable = [
        TrainableParameter(p.name, p.parameter, p.trainable.name, p.sharded) for p in chosen
    ]
    numbers = EngineSettings(case.stage, 1.0, case.accumulation, ROWS, not case.fp32)
    engine = Engine(model.forward, trainable, numbers, topology)
    zero = engine.deepspeed.optimizer
    release, during = zero._release_ipg_buffers, []

    def spy() -> None:  # the end of a backward: buckets are there, and gradients too
        during.append(held_bytes(model, engine))
        release()

    zero._release_ipg_buffers = spy
    weights = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    for _ in range(case.accumulation):
        saved: dict[int, int] = {}

        def pack(tensor, saved=saved):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = engine(batch(case.dtype))
        engine.backward(output.nll_sum / 100)
        during.append(held_bytes(model, engine))
        share = new_share(model, output)
        del output
    before = held_bytes(model, engine)
    engine.step(1e-3)
    after = held_bytes(model, engine)
    zero._release_ipg_buffers = release
    engine.destroy()
    return {
        "state": before,
        "backward": max(during, key=lambda kinds: kinds["gradients"]),
        "after": after,
        "activations": sum(saved.values()),
        "new_share": share,
    }


def new_share(model: MultimodalMoE, output: Output) -> float:
    """Share of the slots of extended layers that went to new experts."""
    new = used = 0
    for index, block in extended_layers(model.lm).items():
        if block.num_new:
            expert_TS = output.context.records[index].expert_TS
            new += int((expert_TS >= block.num_frozen).sum())
            used += int((expert_TS >= 0).sum())
    return new / used


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("memory")
    for family, own in FAMILIES.items():
        wide = {"hidden_size": 64, "moe_intermediate_size": 96}
        save_tiny(folder / family, family, **{**wide, **own})
    make_tower(folder / "tower")
    return folder


def planned(folder: Path, case: Case, world: int, rank: int, share: float) -> RankMemory:
    base = base_sizes(AutoConfig.from_pretrained(folder / case.family))
    extension = extension_sizes(base, case.extension(base.sparse_layers))
    encoder = EncoderConfig(path=str(folder / "tower"), **ENCODER)
    encoders = [encoder_sizes(encoder, CONNECTOR_DIM, base.hidden_dim)]
    live, element = base.num_layers, case.dtype.itemsize
    work = Work(ROWS, LENGTH, 1, case.accumulation, False, share, live, element)
    lists = case.hot_lists(base.sparse_layers)  # a number for every sparse layer, or none at all
    hot = tuple(len(lists.get(layer, ())) for layer in base.sparse_layers) if lists else ()
    placed = Placed(
        case.ep_size, Placement.shard, case.placement, case.stage, case.frozen_bits, hot
    )
    return rank_memory(base, extension, encoders, list(case.train), placed, work, world, rank)


SHARDED = {"ep_size": 2, "placement": Placement.shard}
FEW = {
    1: [
        Case(),
        Case(fp32=True, stage=2, accumulation=2),
        Case(new=(1, 4), frozen_bits=8),
        Case(lora_rank=4, frozen_bits=4),
        Case("ernie4_5_moe", new=(4, 2)),
    ],
    2: [
        Case(new=(1, 4), hot=(2, 1), stage=2, **SHARDED),
        Case("ernie4_5_moe", new=(4, 1), lora_rank=4, frozen_bits=8, ep_size=2),
    ],
}
"""Ranks -> cases of the fast suite."""

STAGES = [{"stage": s, "accumulation": a} for s in (1, 2) for a in (1, 2)]
LAYOUTS = {1: [{}], 2: [{}, {"ep_size": 2}, SHARDED, {**SHARDED, "hot": (2, 1)}]}
SIZES = [{}, {"new": (1, 4)}, {"new": (1, 4), "lora_rank": 4}, {"frozen_bits": 8}, {"frozen_bits": 4},
         {"family": "ernie4_5_moe", "new": (4, 1)}, {"family": "gpt_oss"},
         {"train": (Trainable.new_experts, Trainable.connector)}]  # fmt: skip
GRID = {
    world: [Case(**numbers, **layout, **size, fp32=fp32)
            for numbers in STAGES for layout in LAYOUTS[world] for size in SIZES
            for fp32 in (False, True)]
    for world in (1, 2)
}  # fmt: skip


@pytest.mark.parametrize(
    ("world", "cases"),
    [
        pytest.param(1, FEW[1], id="one rank"),
        pytest.param(2, FEW[2], id="two ranks"),
        pytest.param(1, GRID[1], id="one rank, all", marks=pytest.mark.slow),  # 64 engines
        pytest.param(2, GRID[2], id="two ranks, all", marks=pytest.mark.slow),  # 256 engines
    ],
)
def test_planned_bytes_are_measured_ones(folder, world, cases):
    for rank, found in enumerate(run_ranks(measured, world, str(folder), cases, timeout_s=1200)):
        for case, moments in zip(cases, found, strict=True):
            memory = planned(folder, case, world, rank, moments["new_share"])
            state, name = moments["state"], f"rank {rank}, {case}"
            for kind, bytes_ in (
                ("frozen_experts", memory.frozen),
                ("rest", memory.rest),
                ("encoder", memory.encoder),
                ("trained", memory.trained),
                ("gradients", memory.gradients),
                ("optimizer", memory.optimizer),
            ):
                close(bytes_, state[kind], f"{name}: {kind}")
            close(memory.state, sum(state.values()), f"{name}: state")
            backward = moments["backward"]["gradients"]
            close(memory.buckets + memory.gradients, backward, f"{name}: backward")
            assert moments["after"]["gradients"] == 0
            # of what travels, a rank keeps what the router happened to send it
            within = 0.15 if case.ep_size == 1 else 0.3
            close(memory.activations, moments["activations"], f"{name}: saved", within)


def close(planned: float, found: float, what: str, within: float = 0.05) -> None:
    assert abs(planned - found) <= within * found, f"{what}: planned {planned}, measured {found}"
