"""A whole model's exchanges, layer by layer and both ways: planned bytes and collectives beside counted ones."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from transformers import AutoConfig

from moe_ext.batch import IGNORED_LABEL, Batch
from moe_ext.config import ExtensionConfig, Placement, RowInit, Scope, Trainable
from moe_ext.model.connectors import Connector
from moe_ext.model.extend import LayerPlan, add_extension, extended_layers
from moe_ext.model.load import load_base
from moe_ext.model.multimodal import MultimodalMoE
from moe_ext.planning.candidates import Subject, liveness_of, traffic_of
from moe_ext.planning.memory import Placed
from moe_ext.planning.sizes import base_sizes, extension_sizes
from moe_ext.planning.step import Work
from moe_ext.training.parts import choose
from moe_ext.training.topology import Ranks, start
from tests.model.tiny import save_tiny
from tests.ranks import run_ranks

SPARSE = (1, 2, 3)
"""Of the four layers, as the tiny configuration has them; the first is dense."""
ALL = (Trainable.connector, Trainable.new_experts, Trainable.new_rows, Trainable.calibration)
IMAGE = 4
FORWARD, BACKWARD = "forward", "backward"


@dataclass(frozen=True)
class Case:
    """One micro-batch of one model."""

    ep_size: int = 2
    frozen: Placement = Placement.shard
    new: Placement = Placement.replicate
    sources: tuple[tuple[int, int], ...] = ((1, 1), (3, 4))
    """(layer, number of its new experts)"""
    hot: tuple[int, ...] = ()
    """Hot experts of every sparse layer."""
    train: tuple[Trainable, ...] = ALL
    scope: Scope = Scope.preserve
    text: int = 0
    """Tokens before the image: without a gradient of use, where the scope looks back."""
    shares: bool = False
    recompute: bool = False
    fp32: bool = True

    @property
    def extension(self) -> ExtensionConfig:
        return ExtensionConfig(
            sources={layer: list(range(number)) for layer, number in self.sources},
            placement=self.new,
            scope=self.scope,
            row_init=RowInit.clone_shared if self.shares else RowInit.clone,
        )


SHARD, REPLICATE = Placement.shard, Placement.replicate
EXPERTS, ROWS = (Trainable.new_experts,), (Trainable.new_rows, Trainable.calibration)
CASES = {
    2: [
        Case(),
        Case(new=SHARD, text=9),
        Case(new=SHARD, text=9, scope=Scope.joint),
        Case(new=SHARD, frozen=REPLICATE, text=9),
        Case(hot=(2, 0, 3), text=9),
        Case(new=SHARD, hot=(0, 1, 1), fp32=False),
        Case(shares=True, text=9),
        Case(recompute=True, new=SHARD, text=9),
        Case(recompute=True, train=EXPERTS, sources=((2, 1), (3, 3))),
        Case(train=EXPERTS, new=SHARD, sources=((2, 1), (3, 3))),
        Case(train=EXPERTS, sources=((2, 2),)),
        Case(train=ROWS, new=SHARD, sources=((3, 2),), text=9),
        Case(train=(Trainable.connector,), new=SHARD, text=9),
    ],
    4: [
        Case(ep_size=4, new=SHARD, text=9),
        Case(ep_size=2, new=SHARD, hot=(1, 2, 0), text=9),
        Case(ep_size=4, frozen=REPLICATE, new=SHARD, fp32=False),
    ],
}
"""Ranks -> cases."""


def model_of(folder: str, case: Case, topology) -> MultimodalMoE:
    dtype = torch.float32 if case.fp32 else torch.bfloat16
    lm = load_base(
        folder,
        dtype=dtype,
        ep_rank=topology.ep_rank,
        ep_size=topology.ep_size,
        ep_group=topology.ep_group,
        frozen_placement=case.frozen,
        hot={layer: list(range(n)) for layer, n in zip(SPARSE, case.hot, strict=False)},
    )
    plans = [LayerPlan(layer, n, list(range(n))) for layer, n in case.sources]
    add_extension(lm, folder, "vision", plans, case.extension)
    connector = Connector(6, 16, lm.config.hidden_size, dtype=dtype)
    encoder = nn.Module()  # features are given: it never runs
    encoder.tokens_per_item, encoder.feature_dim = IMAGE, 6
    model = MultimodalMoE(lm, {1: encoder}, nn.ModuleDict({"image": connector}), case.recompute)
    choose(model, list(case.train))
    model.set_liveness()
    return model


def batch(text: int, rank: int, dtype: torch.dtype) -> Batch:
    """Two rows of 24 positions, of other tokens on every rank; the second one is text and padding."""
    ids = torch.randint(3, 100, (2, 24), generator=torch.Generator().manual_seed(rank))
    modality, segment = torch.zeros_like(ids), torch.ones_like(ids)
    modality[0, text : text + IMAGE] = 1
    segment[1, 17 + rank :] = 0
    labels = ids.masked_fill((modality == 1) | (segment == 0), IGNORED_LABEL)
    position = torch.arange(24).expand(2, -1).contiguous()
    return Batch(
        ids, labels, modality, segment, position, {1: torch.randn(1, IMAGE, 6, dtype=dtype)}
    )


@contextmanager
def counted(model: MultimodalMoE, group) -> Iterator[Counter]:
    """(layer, direction, "bytes" or "collectives") -> what this rank handed to others in exchanges."""
    found: Counter = Counter()
    now: list[tuple[int, str]] = []
    exchange, rank, world = dist.all_to_all_single, dist.get_rank(group), group.size()

    def spy(out, rows, *splits, **options):
        sent = splits[1] if len(splits) > 1 else [rows.shape[0] // world] * world
        others = sum(sent) - sent[rank]
        found[(*now[-1], "bytes")] += others * rows[:1].numel() * rows.element_size()
        found[(*now[-1], "collectives")] += 1
        return exchange(out, rows, *splits, **options)

    def passed(block, _, out):
        now.pop()  # a pass computed again in backward is forward work, what follows backward again
        if out.requires_grad:
            out.register_hook(lambda _: now.append((block.layer_index, BACKWARD)))

    hooks = []
    for index, block in extended_layers(model.lm).items():
        hooks += [
            block.register_forward_pre_hook(lambda *_, i=index: now.append((i, FORWARD))),
            block.register_forward_hook(passed),
        ]
    dist.all_to_all_single = spy
    try:
        yield found
    finally:
        dist.all_to_all_single = exchange
        for hook in hooks:
            hook.remove()


def exchanged(folder: str, cases: Sequence[Case]) -> list[tuple[dict, dict, dict]]:
    """Case by case: what was counted, liveness by layer, and rows (all, live) by layer, of this rank."""
    world, found = dist.get_world_size(), []
    for case in cases:
        topology = start(
            Ranks(dist.get_rank(), world, dist.get_rank(), world), case.ep_size, 60.0, 1
        )
        model = model_of(folder, case, topology)
        dtype = torch.float32 if case.fp32 else torch.bfloat16
        with counted(model, topology.ep_group) as travelled:
            output = model(batch(case.text, topology.rank, dtype))
            output.nll_sum.backward()
        blocks, context = extended_layers(model.lm), output.context
        rows = {}
        for index, block in blocks.items():
            expert_TS = context.records[index].expert_TS
            goes_T = torch.zeros(len(expert_TS))
            for rank in range(case.ep_size):
                if rank != topology.ep_rank:
                    goes_T += (owners_of(block, expert_TS) == rank).any(1)
            live_T = torch.ones(len(goes_T)) if context.live_T is None else context.live_T
            rows[index] = (int(goes_T.sum()), int((goes_T * live_T).sum()))
        found.append((dict(travelled), {i: b.liveness for i, b in blocks.items()}, rows))
    return found


def owners_of(block, expert_TS: torch.Tensor) -> torch.Tensor:
    """The rank of the group that a slot's expert has to be asked for; -1: none."""
    logical = {}
    for bank in block.banks:
        if bank in block.travelling:
            frozen = bank in block.frozen_banks
            first = 0 if frozen else block.num_frozen
            hot = block.hot.expert_ids if frozen and block.hot else []
            ids = [e for e in range(bank.num_experts + len(hot)) if e not in hot]
            small, more = divmod(len(ids), block.ep_group.size())
            place = [r for r in range(block.ep_group.size()) for _ in range(small + (r < more))]
            logical |= {first + e: rank for e, rank in zip(ids, place, strict=True)}
    return torch.tensor([[logical.get(e, -1) for e in row] for row in expert_TS.tolist()])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wire")
    save_tiny(folder, "deepseek_v2", num_hidden_layers=4)
    return folder


@pytest.mark.parametrize("world", CASES)
def test_every_layer_s_bytes_and_collectives_are_the_planned_ones(folder, world):
    ranks = run_ranks(exchanged, world, str(folder), CASES[world])
    base = base_sizes(AutoConfig.from_pretrained(folder))
    assert base.sparse_layers == SPARSE
    for index, case in enumerate(CASES[world]):
        extension = extension_sizes(base, case.extension)
        lowest = 0 if Trainable.connector in case.train else min(extension.new_of)
        work = Work(2, 24, 1, 1, case.recompute, 0.1, 4 - lowest, 4 if case.fp32 else 2)
        subject = Subject(base, extension, [], list(case.train), work)
        placed = Placed(case.ep_size, case.frozen, case.new, 1, 0, case.hot)
        counted_by_rank = [ranks[rank][index] for rank in range(world)]
        for _, liveness, _ in counted_by_rank:
            assert liveness == liveness_of(subject, placed), case
        dead = any(
            live < rows for _, _, by_layer in counted_by_rank for rows, live in by_layer.values()
        )
        assert dead == (case.scope is Scope.preserve and case.frozen is SHARD), case
        planned: Counter = Counter()
        for layer in traffic_of(subject, placed):
            rows, live = (
                sum(by_layer[layer.layer][kind] for _, _, by_layer in counted_by_rank)
                for kind in (0, 1)
            )
            assert rows > 0, (case, layer)
            planned[layer.layer, FORWARD, "bytes"] = rows * layer.forward + world * layer.counts
            planned[layer.layer, FORWARD, "collectives"] = world * layer.collectives_forward
            if layer.collectives_backward:
                planned[layer.layer, BACKWARD, "bytes"] = live * layer.backward
                planned[layer.layer, BACKWARD, "collectives"] = world * layer.collectives_backward
        found = sum((Counter(travelled) for travelled, _, _ in counted_by_rank), Counter())
        assert found == planned, case
