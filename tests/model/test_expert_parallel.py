"""Two ranks give what one rank gives: output and every gradient, for both placements."""

import pytest
import torch
import torch.distributed as dist

from moe_ext.config import Placement, Scope
from moe_ext.model.context import RoutingContext
from moe_ext.model.dispatch import Liveness
from moe_ext.model.routing import RoutingRule
from tests.model.layers import DIM, Weights, build, sequences
from tests.ranks import run_ranks

RULE = RoutingRule(top_k=2)
NUM_FROZEN, NUM_NEW, LENGTH = 5, 2, 8  # 5 frozen, and 7 in all, on two ranks: neither divides
SITUATIONS = {
    # name: (sequences of rank 0 and of rank 1, images on rank 0 and on rank 1, scope)
    "both": ((3, 3), (True, True), Scope.preserve),
    "no_image_on_rank_1": ((3, 3), (True, False), Scope.preserve),
    "no_new_expert_on_rank_1": ((2, 4), (True, False), Scope.modality),
    "nothing_on_rank_1": ((3, 0), (True, True), Scope.joint),
    "padding_only_on_rank_0": ((2, 3), (True, True), Scope.joint),
}


def inputs(name: str, rank: int) -> tuple[RoutingContext, torch.Tensor, torch.Tensor]:
    """The context, hidden states and output gradient of one rank."""
    counts, images, _ = SITUATIONS[name]
    context = sequences(max(counts[rank], 1), LENGTH, seed=10 + rank, images=images[rank])
    if name == "padding_only_on_rank_0" and rank == 0:
        context.segment_BS.zero_()
    context = RoutingContext(
        context.modality_BS[: counts[rank]], context.segment_BS[: counts[rank]]
    )
    generator = torch.Generator().manual_seed(20 + rank)
    shape = (counts[rank], LENGTH, DIM)
    hidden, grad = torch.randn(2, *shape, generator=generator).unbind(0)
    return context, hidden, grad


def gradients(layer, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
    found = {n: p.grad.clone() for n, p in layer.named_parameters() if p.grad is not None}
    return found | {"input": x.grad.clone(), "output": y.detach()}


def run_one(name: str) -> list[dict[str, torch.Tensor]]:
    """Both ranks' batches on one rank without a group, gradients added up."""
    layer = build(Weights(NUM_FROZEN, NUM_NEW), RULE, scope=SITUATIONS[name][2])
    results = []
    for rank in range(2):
        context, hidden, grad = inputs(name, rank)
        layer.holder.context = context
        x = hidden.requires_grad_()
        y = layer(x)
        y.backward(grad)
        results.append(gradients(layer, x, y))
    return results


def run_rank(placement_name: str) -> dict[str, dict[str, torch.Tensor]]:
    """One of two ranks: every situation; a rank without images has an input that needs no gradient."""
    rank, group = dist.get_rank(), dist.group.WORLD
    results = {}
    for name, (_, _images, scope) in SITUATIONS.items():
        layer = build(
            Weights(NUM_FROZEN, NUM_NEW), RULE, scope=scope,
            placement=Placement(placement_name), group=group, rank=rank, world=2,
        )  # fmt: skip
        context, hidden, grad = inputs(name, rank)
        layer.holder.context = context
        x = hidden.requires_grad_()
        y = layer(x)
        y.backward(grad)
        results[name] = gradients(layer, x, y)
    # the frozen trunk: rank 1's input needs no gradient, rank 0's does; nothing may hang
    layer = build(
        Weights(NUM_FROZEN, NUM_NEW), RULE, placement=Placement(placement_name),
        group=group, rank=rank, world=2,
    )  # fmt: skip
    layer.holder.context, hidden, grad = inputs("no_image_on_rank_1", rank)
    x = hidden.requires_grad_(rank == 0)
    layer(x).backward(grad)
    # not live below: the router and the experts train, no gradient of the input travels
    for parameter in layer.parameters():
        parameter.grad = None
    layer.liveness = Liveness(input=False, weight=True)
    layer.holder.context, hidden, grad = inputs("both", rank)
    layer(hidden).backward(grad)
    results["not_live_below"] = {n: p.grad.clone() for n, p in layer.named_parameters()}
    # nothing live: no backward at all
    for parameter in layer.parameters():
        parameter.requires_grad_(False)
    layer.liveness = Liveness(input=False, weight=False, output=False)
    layer.holder.context, hidden, grad = inputs("both", rank)
    assert not layer(hidden).requires_grad
    return results


@pytest.mark.parametrize("placement", list(Placement), ids=lambda p: p.value)
def test_two_ranks_are_one(placement):
    ranks = run_ranks(run_rank, 2, placement.value)
    for name in SITUATIONS:
        alone = run_one(name)
        for rank in range(2):
            for key in ("output", "input"):
                compare(ranks[rank][name][key], alone[rank][key], f"{name} {key} rank {rank}")
        compare_parameters([r[name] for r in ranks], alone[1], name, placement)
    alone = run_one("both")
    compare_parameters([r["not_live_below"] for r in ranks], alone[1], "not live", placement)


def compare_parameters(ranks, alone, name: str, placement: Placement) -> None:
    """Summed over ranks; a sharded expert's gradient is whole on its owner and never reduced."""
    for key, expected in alone.items():
        if key in ("input", "output"):
            continue
        parts = [r[key] for r in ranks]
        if placement is Placement.shard and key.startswith("new."):
            actual = torch.cat(parts)
        else:
            actual = parts[0] + parts[1]
        compare(actual, expected, f"{name} {key}")


def compare(actual: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    assert actual.shape == expected.shape, what
    if actual.numel():
        scale = max(float(expected.abs().max()), 1e-3)
        assert float((actual - expected).abs().max()) < 1e-5 * scale, what
