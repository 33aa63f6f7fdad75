"""Hot frozen experts on every rank: the same numbers, and fewer bytes on the wire."""

import pytest
import torch
import torch.distributed as dist

from moe_ext.config import Placement, Scope
from moe_ext.model.placement import cold_experts
from moe_ext.model.routing import RoutingRule
from tests.model.layers import DIM, Weights, build, counted_bytes, sequences
from tests.ranks import run_ranks

RULE, NUM_FROZEN, NUM_NEW, LENGTH = RoutingRule(top_k=3), 7, 2, 40
HOT = ((), (2,), (0, 3, 6), (0, 1, 2, 3, 4, 6))


def passes(placement_name: str) -> list[dict]:
    """Output, gradients and bytes to the peer, for every choice of hot experts."""
    rank, group = dist.get_rank(), dist.group.WORLD
    results = []
    for hot in HOT:
        layer = build(
            Weights(NUM_FROZEN, NUM_NEW), RULE, scope=Scope.joint,
            placement=Placement(placement_name), group=group, rank=rank, world=2, hot=hot,
        )  # fmt: skip
        layer.holder.context = sequences(4, LENGTH, seed=rank)
        generator = torch.Generator().manual_seed(rank)
        hidden, grad = torch.randn(2, 4, LENGTH, DIM, generator=generator).unbind(0)
        x = hidden.requires_grad_()
        with counted_bytes(peer=1 - rank) as travelled:
            y = layer(x)
            y.backward(grad)
        found = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
        held = sum(len(bank.expert_ids) for bank in layer.frozen_banks)
        found |= {"output": y.detach(), "input": x.grad}
        results.append({"tensors": found, "bytes": sum(travelled), "held": held})
    return results


@pytest.mark.parametrize("placement", ["replicate", "shard"])
def test_the_same_numbers_over_fewer_bytes(placement):
    for plain, *hot in run_ranks(passes, 2, placement):
        for result in hot:
            assert result["tensors"].keys() == plain["tensors"].keys()
            for name, expected in plain["tensors"].items():
                scale = max(float(expected.abs().max()), 1e-3)
                error = float((result["tensors"][name] - expected).abs().max())
                assert error < 1e-5 * scale, name
        travelled = [result["bytes"] for result in (plain, *hot)]
        assert travelled == sorted(travelled, reverse=True)
        if placement == "replicate":
            assert travelled[-1] < 0.5 * travelled[0], travelled
        held = [result["held"] for result in (plain, *hot)]
        assert held in ([4, 4, 5, 7], [3, 4, 5, 6]), held


def test_only_possible_lists_are_taken():
    assert cold_experts(5, 2, Placement.shard, [3, 1]) == ([0, 2, 4], [1, 3])
    assert cold_experts(5, 1, Placement.shard, [3]) == ([0, 1, 2, 3, 4], [])
    assert cold_experts(5, 2, Placement.replicate, [3]) == ([0, 1, 2, 3, 4], [])
    for wrong in ([5], [-1], [1, 1], [0, 1, 2, 3, 4]):
        with pytest.raises(ValueError, match="parallel.hot_lists"):
            cold_experts(5, 2, Placement.shard, wrong)
