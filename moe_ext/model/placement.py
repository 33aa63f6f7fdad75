"""Logical expert ids -> the ranks of the expert-parallel group that hold them."""

from moe_ext.config import Placement


def owners(num_experts: int, ep_size: int, placement: Placement) -> list[list[int]]:
    """Logical ids that each rank of the group holds, rank by rank, each list in ascending order.

    `shard` gives every rank one contiguous run, the first `num_experts % ep_size` ranks one expert
    more; a rank may hold none. `replicate` gives every rank all of them.
    """
    if placement is Placement.replicate:
        return [list(range(num_experts)) for _ in range(ep_size)]
    smaller, larger = divmod(num_experts, ep_size)
    held, first = [], 0
    for rank in range(ep_size):
        count = smaller + (rank < larger)
        held.append(list(range(first, first + count)))
        first += count
    return held
