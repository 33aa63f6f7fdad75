"""What travels between two ranks is the analytic minimum, and nothing travels twice."""

import torch
import torch.distributed as dist

from moe_ext.config import Placement, Scope
from moe_ext.model.routing import RoutingRule
from tests.model.layers import DIM, Weights, build, counted_bytes, sequences
from tests.ranks import run_ranks

RULE = RoutingRule(top_k=3)
NUM_FROZEN, LENGTH = 6, 40


def exchanged(placement_name: str) -> dict[str, int]:
    """Bytes that one rank hands to its peer in a forward and backward pass, and what they must be."""
    rank, group = dist.get_rank(), dist.group.WORLD
    layer = build(
        Weights(NUM_FROZEN, 2), RULE, scope=Scope.joint, placement=Placement(placement_name),
        group=group, rank=rank, world=2,
    )  # fmt: skip
    context = sequences(4, LENGTH, seed=rank)
    layer.holder.context = context
    hidden = torch.randn(4, LENGTH, DIM, generator=torch.Generator().manual_seed(rank))
    with counted_bytes(peer=1 - rank) as travelled:
        y = layer(hidden.requires_grad_())
        y.sum().backward()
    expert_TS = context.records[0].expert_TS
    owner_TS = layer.owner_of[expert_TS.clamp(min=0)].masked_fill(expert_TS < 0, -1)
    goes = int((owner_TS == 1 - rank).any(1).sum())  # tokens that need the other rank
    comes = torch.tensor(goes)
    both = [torch.zeros((), dtype=comes.dtype) for _ in range(2)]
    dist.all_gather(both, comes)
    comes = int(both[1 - rank])
    row, slots = 4 * DIM, 4 * RULE.top_k
    minimum = goes * row + comes * row  # tokens there, results back
    minimum += comes * row + goes * row  # their gradients
    minimum += (goes + comes) * slots  # weights, and their gradients
    ids_and_counts = goes * 2 * RULE.top_k + 2 * 8  # rows, and live ones
    return {"travelled": sum(travelled), "minimum": minimum + ids_and_counts, "rows": goes}


def test_payload_is_the_minimum():
    for placement in ("replicate", "shard"):
        for found in run_ranks(exchanged, 2, placement):
            assert found["rows"] > 20
            assert found["travelled"] == found["minimum"], found
