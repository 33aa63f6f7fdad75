"""Planned operations of a step beside the products that a real model's forward and backward pass make."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig

from moe_ext.batch import IGNORED_LABEL, Batch
from moe_ext.config import ExtensionConfig, Placement, Scope, Trainable
from moe_ext.model.connectors import Connector
from moe_ext.model.extend import LayerPlan, add_extension, extended_layers
from moe_ext.model.load import load_base
from moe_ext.model.multimodal import MultimodalMoE
from moe_ext.planning.memory import Placed, loads_of
from moe_ext.planning.sizes import base_sizes, extension_sizes
from moe_ext.planning.step import Work, step_flops
from moe_ext.training.parts import choose
from tests.model.tiny import save_tiny

ROWS, LENGTH = 2, 512
ALL = [Trainable.connector, Trainable.new_experts, Trainable.new_rows, Trainable.calibration]
BASES = {
    # hidden width, experts, and what dominates
    "mixtral": {"hidden_size": 128, "intermediate_size": 256, "num_local_experts": 4},
    "qwen3_moe": {"hidden_size": 128, "moe_intermediate_size": 32, "num_experts": 64,
                  "head_dim": 32, "decoder_sparse_step": 1},
    "deepseek_v2": {"hidden_size": 128, "moe_intermediate_size": 64, "vocab_size": 4096},
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    family: str
    sources: tuple[tuple[int, int], ...] = ((1, 1), (2, 3))
    connector: bool = True
    recompute: bool = False


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("step")
    for family, sizes in BASES.items():
        save_tiny(folder / family, family, **sizes)
    return folder


def batch() -> Batch:
    """One image token a row, then text; the features are given."""
    ids = torch.randint(3, 100, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    modality = torch.zeros_like(ids)
    modality[:, 0] = 1
    labels = ids.masked_fill(modality == 1, IGNORED_LABEL)
    position = torch.arange(LENGTH).expand(ROWS, -1).contiguous()
    return Batch(
        ids, labels, modality, torch.ones_like(ids), position, {1: torch.randn(ROWS, 1, 6)}
    )


@pytest.mark.parametrize(
    "case",
    [
        *[Case(family) for family in BASES],
        Case("mixtral", recompute=True),
        Case("qwen3_moe", connector=False),
        Case("mixtral", sources=((2, 4),), connector=False, recompute=True),
    ],
    ids=str,
)
def test_planned_operations_are_counted_ones(folder, case):
    path = folder / case.family
    lm = load_base(path, dtype=torch.float32, attn_implementation="eager")
    settings = ExtensionConfig(
        sources={layer: list(range(n)) for layer, n in case.sources}, scope=Scope.joint
    )
    plans = [LayerPlan(layer, len(ids), ids) for layer, ids in settings.sources.items()]
    add_extension(lm, str(path), "vision", plans, settings)
    encoder = nn.Module()  # features are given: it never runs
    encoder.tokens_per_item, encoder.feature_dim = 1, 6
    connectors = nn.ModuleDict({"image": Connector(6, 8, lm.config.hidden_size)})
    model = MultimodalMoE(lm, {1: encoder}, connectors, case.recompute)
    train = ALL if case.connector else ALL[1:]
    choose(model, train)
    model.set_liveness()
    with FlopCounterMode(display=False) as counter:
        output = model(batch())
        output.nll_sum.backward()
    new = used = 0
    for index, block in extended_layers(lm).items():
        expert_TS = output.context.records[index].expert_TS
        if block.num_new:
            new, used = new + int((expert_TS >= block.num_frozen).sum()), used + expert_TS.numel()
    base = base_sizes(AutoConfig.from_pretrained(path))
    extension = extension_sizes(base, settings)
    live = base.num_layers - (0 if case.connector else min(extension.new_of))
    work = Work(ROWS, LENGTH, 1, 1, case.recompute, new / used, live, 4,
                live_input=case.connector)  # fmt: skip
    counted = counter.get_total_flops()
    # `eager` multiplies masked positions as well: causal attention needs half of them
    attention = base.attention_width * LENGTH * work.tokens
    backward = live if case.connector else live - 1
    again = live if case.recompute else 0
    counted -= attention * (base.num_layers + again + 2 * backward)
    planned = step_flops(base, extension, [], work)
    assert planned == pytest.approx(counted, rel=0.03), counter.get_flop_counts()["Global"]


def test_the_rank_with_most_experts_decides(folder):
    base = base_sizes(AutoConfig.from_pretrained(folder / "mixtral"))
    extension = extension_sizes(base, ExtensionConfig(sources={1: [0], 2: [0, 1, 2]}))
    shard = Placed(2, Placement.shard, Placement.shard, 1, hot=(0, 1, 0))
    assert loads_of(base, extension, shard) == {
        0: (1.0, 1.0),  # 4 experts on 2 ranks
        1: (5 / 4, 2.0),  # one hot, and 2 of the other 3; the one new expert is here
        2: (1.0, 4 / 3),  # 2 of 3 new ones
    }
    work = Work(ROWS, LENGTH, 1, 1, False, 0.1, base.num_layers, 2)
    even = step_flops(base, extension, [], work)
    assert step_flops(base, extension, [], work, loads_of(base, extension, shard)) > even
