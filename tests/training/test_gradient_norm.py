"""The gradient's norm is the batch's: the same on 1, 2 and 4 ranks, whatever lives where (fp32, 1e-5)."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from moe_ext.batch import IGNORED_LABEL, Batch
from moe_ext.config import ExtensionConfig, Placement, Scope, Trainable
from moe_ext.model.connectors import Connector
from moe_ext.model.extend import LayerPlan, add_extension
from moe_ext.model.load import load_base
from moe_ext.model.multimodal import MultimodalMoE
from moe_ext.training.engine import Engine, EngineSettings, TrainableParameter
from moe_ext.training.loop import LOSSES, step_numbers
from moe_ext.training.parts import choose
from moe_ext.training.topology import Ranks, start
from tests.model.tiny import save_tiny
from tests.ranks import run_ranks

TRAIN = [Trainable.connector, Trainable.new_experts, Trainable.new_rows, Trainable.calibration]
SEQUENCES, LENGTH, IMAGE, FEATURES = 4, 32, 4, 6


def batch(rank: int, world: int) -> Batch:
    """This rank's rows of the one batch of all."""
    stream = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 100, (SEQUENCES, LENGTH), generator=stream)
    features = torch.randn(SEQUENCES, IMAGE, FEATURES, generator=stream)
    modality = torch.zeros_like(ids)
    modality[:, 2 : 2 + IMAGE] = 1
    labels = ids.masked_fill(modality == 1, IGNORED_LABEL)
    labels[0, 10:] = IGNORED_LABEL  # ranks have unequal numbers of targets
    position = torch.arange(LENGTH).expand(SEQUENCES, -1).contiguous()
    own = slice(rank * SEQUENCES // world, (rank + 1) * SEQUENCES // world)
    tensors = (ids, labels, modality, torch.ones_like(ids), position)
    return Batch(*(tensor[own] for tensor in tensors), {1: features[own]})


def norms(folder: str) -> dict[tuple, tuple[float, dict[str, float]]]:
    """(ep_size, placement of new experts) -> norms of the whole gradient and of its parts."""
    rank, world = dist.get_rank(), dist.get_world_size()
    found = {}
    for ep_size in (1, 2, 4):
        for placement, stage in ((Placement.replicate, 1), (Placement.shard, 2)):
            if ep_size <= world:
                topology = start(Ranks(rank, world, rank, world), ep_size, 60.0, 1)
                found[ep_size, placement.value] = norm_of(folder, topology, placement, stage)
    return found


def norm_of(folder: str, topology, placement: Placement, stage: int):
    place = {"ep_rank": topology.ep_rank, "ep_size": topology.ep_size}
    lm = load_base(folder, dtype=torch.float32, ep_group=topology.ep_group, **place)
    settings = ExtensionConfig(
        sources={0: [0, 1, 2], 2: [3]}, placement=placement, scope=Scope.joint
    )
    # biases: a clone that ties with its source would be chosen by the last bit, which summing moves
    plans = [LayerPlan(i, len(ids), ids, [0.3] * len(ids)) for i, ids in settings.sources.items()]
    add_extension(lm, folder, "vision", plans, settings)
    encoder = nn.Module()  # features are given: it never runs
    encoder.tokens_per_item, encoder.feature_dim = IMAGE, FEATURES
    connectors = nn.ModuleDict({"image": Connector(FEATURES, 16, lm.config.hidden_size)})
    model = MultimodalMoE(lm, {1: encoder}, connectors)
    parts = choose(model, TRAIN)
    model.set_liveness()
    trainable = [
        TrainableParameter(p.name, p.parameter, p.trainable.name, p.sharded) for p in parts
    ]
    engine = Engine(
        model.forward, trainable, EngineSettings(stage, 1.0, 1, SEQUENCES, False), topology
    )
    own = batch(topology.rank, topology.world_size)
    output = engine(own)
    targets = torch.tensor(float(output.nll_Z.numel()))
    dist.all_reduce(targets)
    engine.backward(output.nll_sum / targets.item())
    _, by_part, _ = step_numbers(torch.zeros(len(LOSSES), dtype=torch.float64), engine)
    _, norm = engine.step(1e-3)
    engine.destroy()
    return norm, by_part


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    folder: Path = tmp_path_factory.mktemp("norm")
    save_tiny(folder, "qwen2_moe")
    return str(folder)


def test_the_norm_does_not_depend_on_where_experts_live(folder):
    found = {(world, *case): value
             for world in (1, 2, 4)
             for case, value in run_ranks(norms, world, folder)[0].items()}  # fmt: skip
    assert len(found) == 2 + 4 + 6
    whole, parts = found[1, 1, "replicate"]
    assert whole > 0
    assert min(parts.values()) > 0, "every part has a gradient"
    for case, (norm, by_part) in found.items():
        assert norm == pytest.approx(whole, rel=1e-5), case
        assert by_part.keys() == parts.keys()
        for part, value in by_part.items():
            assert value == pytest.approx(parts[part], rel=1e-5), (case, part)
