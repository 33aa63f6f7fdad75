"""The planned bytes of every kind beside those of real ranks with a real engine, within 5 %."""

import itertools
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from transformers import AutoConfig

from moe_ext.batch import IGNORED_LABEL, Batch
from moe_ext.config import EncoderConfig, ExtensionConfig, Placement, Trainable
from moe_ext.model.connectors import Connector
from moe_ext.model.encoders import build_encoder
from moe_ext.model.extend import LayerPlan, attach_extension
from moe_ext.model.load import load_base
from moe_ext.model.multimodal import MultimodalMoE
from moe_ext.planning.memory import Placed, rank_memory
from moe_ext.planning.sizes import (
    base_sizes,
    encoder_sizes,
    extension_sizes,
    trained_elements,
)
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
LAYERS, NUM_NEW, CONNECTOR_DIM, ROWS, LENGTH, IMAGE = 2, 3, 64, 2, 160, 4
ENCODER = {"name": "hf_vision", "image_size": 16, "tokens_per_item": IMAGE}


def settings_of(placement: Placement) -> ExtensionConfig:
    return ExtensionConfig(layers=[0, 2], num_new_experts=NUM_NEW, placement=placement)


def batch(dtype: torch.dtype) -> Batch:
    ids = torch.randint(3, 100, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    modality = torch.zeros_like(ids)
    modality[:, 1 : 1 + IMAGE] = 1
    labels = ids.masked_fill(modality == 1, IGNORED_LABEL)
    position = torch.arange(LENGTH).expand(ROWS, -1).contiguous()
    media = {1: torch.rand(ROWS, 3, 16, 16, dtype=dtype)}
    return Batch(ids, labels, modality, torch.ones_like(ids), position, media)


def model_of(folder: str, placement: Placement, dtype: torch.dtype, topology) -> MultimodalMoE:
    lm = load_base(
        f"{folder}/base",
        dtype=dtype,
        ep_rank=topology.ep_rank,
        ep_size=topology.ep_size,
        ep_group=topology.ep_group,
        attn_implementation="sdpa",
    )
    plans = [LayerPlan(layer, NUM_NEW, list(range(NUM_NEW))) for layer in (0, 2)]
    attach_extension(lm, "vision", plans, settings_of(placement))
    encoder = build_encoder(path=f"{folder}/tower", dtype=dtype, **ENCODER)
    connector = Connector(encoder.feature_dim, CONNECTOR_DIM, lm.config.hidden_size, dtype=dtype)
    return MultimodalMoE(lm, {1: encoder}, nn.ModuleDict({"image": connector}))


def measured(folder: str, layouts: list[tuple[int, str]]) -> dict[tuple, dict[str, dict]]:
    """(ep_size, placement, bits, stage, accumulation) -> moment -> kind -> bytes on this rank."""
    world, found = dist.get_world_size(), {}
    for (ep_size, placement), dtype in itertools.product(layouts, (torch.bfloat16, torch.float32)):
        ranks = Ranks(dist.get_rank(), world, dist.get_rank(), world)
        topology = start(ranks, ep_size, 60.0, 1)
        model = model_of(folder, Placement(placement), dtype, topology)
        for stage, accumulation in ((1, 1), (1, 2), (2, 1), (2, 2)):
            case = (ep_size, placement, 8 * dtype.itemsize, stage, accumulation)
            found[case] = bytes_of(model, dtype, stage, accumulation, topology)
    return found


def bytes_of(model, dtype, stage: int, accumulation: int, topology) -> dict[str, dict[str, int]]:
    """Bytes by kind at four moments of one step of a real engine."""
    chosen = choose(model, TRAIN)
    model.set_liveness()
    trainable = [
        TrainableParameter(p.name, p.parameter, p.trainable.name, p.sharded) for p in chosen
    ]
    numbers = EngineSettings(stage, 1.0, accumulation, ROWS, dtype is torch.bfloat16)
    engine = Engine(model.forward, trainable, numbers, topology)
    zero = engine.deepspeed.optimizer
    release, during = zero._release_ipg_buffers, []

    def spy() -> None:  # the end of a backward: buckets are there, and gradients too
        during.append(held_bytes(model, engine))
        release()

    zero._release_ipg_buffers = spy
    weights = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    for _ in range(accumulation):
        saved: dict[int, int] = {}

        def pack(tensor, saved=saved):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = engine(batch(dtype))
        engine.backward(output.nll_sum / 100)
        during.append(held_bytes(model, engine))
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
        "activations": {"all": sum(saved.values())},
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("memory")
    save_tiny(folder / "base", "qwen2_moe", hidden_size=64, moe_intermediate_size=96, num_experts=7)
    make_tower(folder / "tower")
    return folder


def planned(folder: Path, case: tuple, world: int, rank: int):
    ep_size, placement, bits, stage, accumulation = case
    base = base_sizes(AutoConfig.from_pretrained(folder / "base"))
    extension = extension_sizes(base, settings_of(Placement(placement)))
    encoder = EncoderConfig(path=str(folder / "tower"), **ENCODER)
    encoders = [encoder_sizes(encoder, CONNECTOR_DIM, base.hidden_dim)]
    work = Work(ROWS, LENGTH, 1, accumulation, False, 0.06, base.num_layers, bits // 8)
    placed = Placed(ep_size, Placement.shard, Placement(placement), stage)
    trains = trained_elements(TRAIN, base, extension, encoders)
    return rank_memory(
        base, extension, encoders, trains, placed, work, world, ep_rank=rank % ep_size
    )


@pytest.mark.parametrize(
    ("world", "layouts"),
    [
        pytest.param(1, [(1, "replicate")], id="one rank"),
        pytest.param(
            2,
            [(1, "replicate"), (2, "replicate"), (2, "shard")],
            id="two ranks",
            marks=pytest.mark.slow,  # 24 engines
        ),
    ],
)
def test_planned_bytes_are_measured_ones(folder, world, layouts):
    for rank, cases in enumerate(run_ranks(measured, world, str(folder), layouts)):
        assert len(cases) == 8 * len(layouts)
        for case, moments in cases.items():
            memory = planned(folder, case, world, rank)
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
            within = 0.15 if case[0] == 1 else 0.3
            close(memory.activations, moments["activations"]["all"], f"{name}: saved", within)


def close(planned: float, found: float, what: str, within: float = 0.05) -> None:
    assert abs(planned - found) <= within * found, f"{what}: planned {planned}, measured {found}"
