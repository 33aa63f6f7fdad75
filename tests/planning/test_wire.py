"""Planned bytes on the wire beside counted ones, and expected visits beside enumerated ones."""

from itertools import combinations

import pytest
import torch
import torch.distributed as dist

from moe_ext.config import Placement
from moe_ext.model.dispatch import Liveness
from moe_ext.model.placement import cold_experts, owners
from moe_ext.model.routing import RoutingRule
from moe_ext.planning.wire import layer_traffic, missed, remote_ranks
from tests.model.layers import DIM, Weights, build, counted_bytes
from tests.ranks import run_ranks

NUM_FROZEN, TOP_K = 6, 3
CASES = [(hot, *live) for hot in ((), (1, 4)) for live in ((True, True), (False, True))]


def exchanged(_: str) -> list[int]:
    """Bytes to the peer in a forward and backward pass over every set of TOP_K experts."""
    rank, group = dist.get_rank(), dist.group.WORLD
    sets = torch.tensor(list(combinations(range(NUM_FROZEN), TOP_K)))
    found = []
    for hot, live_input, live in CASES:
        layer = build(
            Weights(NUM_FROZEN, 0), RoutingRule(TOP_K), group=group, rank=rank, world=2, hot=hot
        )
        layer.liveness = Liveness(live_input, live)
        x = torch.randn(len(sets), DIM).requires_grad_(live_input)
        weight = torch.rand(len(sets), TOP_K).requires_grad_()
        with counted_bytes(peer=1 - rank) as travelled:
            layer._experts(x, sets, weight).sum().backward()
        found.append(sum(travelled))
    return found


def in_backward(_: str) -> list[int]:
    """Bytes to the peer in backward: all tokens live, every other one, none of rank 1's."""
    rank, group, found = dist.get_rank(), dist.group.WORLD, []
    sets = torch.tensor(list(combinations(range(NUM_FROZEN), TOP_K)))
    for live in (None, [True, False], [rank == 0] * 2):
        layer = build(Weights(NUM_FROZEN, 0), RoutingRule(TOP_K), group=group, rank=rank, world=2)
        x = torch.randn(len(sets), DIM).requires_grad_()
        weight = torch.rand(len(sets), TOP_K).requires_grad_()
        live_T = None if live is None else torch.tensor(live * (len(sets) // 2))
        y = layer._experts(x, sets, weight, live_T)
        with counted_bytes(peer=1 - rank) as travelled:
            y.sum().backward()
        found.append(sum(travelled))
    return found


def test_only_live_tokens_travel_in_backward():
    sets = list(combinations(range(NUM_FROZEN), TOP_K))
    held = [range(3), range(3, 6)]
    to = [[bool(set(s) & set(held[peer])) for s in sets] for peer in (1, 0)]  # of rank 0, of rank 1
    gradient = DIM * 4  # of a result, on its way to the rank that made it
    answer = DIM * 4 + TOP_K * 4  # of token and weights, on their way back
    ranks = run_ranks(in_backward, 2, "")
    for case, live in enumerate(
        ([[True] * len(sets)] * 2, [[True, False] * (len(sets) // 2)] * 2, [[True] * len(sets), []])
    ):
        rows = [sum(a and b for a, b in zip(to[r], live[r], strict=False)) for r in (0, 1)]
        for rank, found in enumerate(ranks):
            assert found[case] == rows[rank] * gradient + rows[1 - rank] * answer, (case, rank)


def test_bytes_a_token_are_exact():
    """Hot experts are the first ones in the formula: which they are does not matter to a sum over
    all sets."""
    tokens = len(list(combinations(range(NUM_FROZEN), TOP_K)))
    ranks = run_ranks(exchanged, 2, "")
    for index, (hot, live_input, live) in enumerate(CASES):
        both = sum(found[index] for found in ranks)
        visits = remote_ranks(NUM_FROZEN, TOP_K, 2, num_hot=len(hot))
        planned = layer_traffic(0, DIM, 4, TOP_K, 2, visits, Liveness(live_input, live))
        assert both == pytest.approx(
            2 * (tokens * planned.bytes_a_token + planned.counts), abs=1e-6
        )


@pytest.mark.parametrize(("num_experts", "top_k", "ep_size", "hot"), [
    (6, 3, 2, ()), (7, 2, 3, ()), (8, 2, 4, (0, 1)), (9, 4, 2, (0,)), (5, 5, 4, ()),
])  # fmt: skip
def test_expected_visits_are_the_mean_over_all_sets(num_experts, top_k, ep_size, hot):
    cold, _ = cold_experts(num_experts, ep_size, Placement.shard, hot)
    held = [{cold[e] for e in ids} for ids in owners(len(cold), ep_size, Placement.shard)]
    sets = list(combinations(range(num_experts), top_k))
    visits = sum(
        len([1 for rank, ids in enumerate(held) if rank != own and ids & set(chosen)])
        for chosen in sets
        for own in range(ep_size)
    ) / (len(sets) * ep_size)
    found = remote_ranks(num_experts, top_k, ep_size, num_hot=len(hot))
    assert found == pytest.approx(visits, rel=1e-12)


def test_groups_limit_where_a_token_goes():
    """12 experts in 4 groups, of which 2 are kept, 3 chosen: every way, one by one."""
    held, hits, total = {2, 3, 4}, 0, 0
    for kept in combinations(range(4), 2):
        inside = [e for e in range(12) if e // 3 in kept]
        for chosen in combinations(inside, 3):
            total += 1
            hits += not held & set(chosen)
    assert missed(12, 3, sorted(held), 4, 2) == pytest.approx(hits / total, rel=1e-12)


def test_sharded_new_experts_are_visited_too():
    """Two experts of each kind on two ranks, one slot: half of either kind is remote."""
    for share in (0.0, 0.3, 1.0):
        found = remote_ranks(2, 1, 2, num_new=2, new_placement=Placement.shard, new_share=share)
        assert found == pytest.approx(0.5)
        stays = remote_ranks(2, 1, 2, num_new=2, new_share=share)
        assert stays == pytest.approx(0.5 * (1 - share))
    assert remote_ranks(8, 2, 1) == 0.0
    assert remote_ranks(8, 2, 4, frozen_placement=Placement.replicate) == 0.0
