"""Logical expert ids -> the ranks of the expert-parallel group that hold them.

Hot experts of a sharded bank are held by every rank of the group: no token travels for them. The others
("cold") are spread as if the hot ones were not there.
"""

from collections.abc import Sequence

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


def cold_experts(
    num_experts: int, ep_size: int, placement: Placement, hot: Sequence[int] = ()
) -> tuple[list[int], list[int]]:
    """(cold, hot) logical ids of a frozen bank, ascending; nothing is hot where nothing travels.

    Raises:
        ValueError: a hot id is no expert or named twice, or nothing is left to be spread.
    """
    if not hot or ep_size == 1 or placement is Placement.replicate:
        return list(range(num_experts)), []
    wrong = sorted(expert for expert in hot if not 0 <= expert < num_experts)
    if wrong or len(set(hot)) < len(hot) or len(hot) >= num_experts:
        raise ValueError(
            f"parallel.hot_lists={list(hot)} must be different experts of the layer's {num_experts}, "
            "fewer than all of them (all: parallel.frozen_placement=replicate)"
        )
    return [expert for expert in range(num_experts) if expert not in hot], sorted(hot)
