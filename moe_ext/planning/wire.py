"""Bytes that a token's exchange puts on the wire, and how many ranks a token has to visit.

Shape letters: K top_k, E routed experts, W ranks of an expert-parallel group, D hidden width, S slots.

A token travels once to a rank, whatever number of its experts live there (`model/dispatch.py`). What
is expected is exact for a router that chooses every set of K experts equally often (DeepSeek: every
set of groups, then every set of K experts in them); a skewed router visits fewer ranks.
"""

from dataclasses import dataclass
from functools import cache
from math import comb

from moe_ext.config import Placement
from moe_ext.model.dispatch import Liveness
from moe_ext.model.placement import owners

WEIGHT_BYTES, ID_BYTES, COUNT_BYTES = 4, 2, 16
"""Of a routing weight (fp32), an expert id (int16) and a rank's numbers of rows and live rows (int64)."""


@dataclass(frozen=True)
class Traffic:
    """The exchange of one sparse layer in one micro-batch.

    Every (token, other rank) pair is a row. `forward` is the payload of a row there and back, over both
    ranks; `backward` that of the gradients of a row whose token is live. `collectives_*` are what every
    rank of the group takes part in.
    """

    layer: int
    forward: int
    backward: int
    visits: float
    """Rows a token: the other ranks that it is expected to go to."""
    counts: int
    """Bytes of the numbers of rows, that a rank sends to all others."""
    collectives_forward: int
    collectives_backward: int

    @property
    def collectives(self) -> int:
        return self.collectives_forward + self.collectives_backward

    @property
    def bytes_a_token(self) -> float:
        """Of a live token, expected."""
        return self.visits * (self.forward + self.backward)


def layer_traffic(
    layer: int,
    hidden_dim: int,
    element_bytes: int,
    slots: int,
    ep_size: int,
    visits: float,
    liveness: Liveness,
    again: bool = False,
) -> Traffic:
    """What a layer exchanges; `again` with activation checkpointing, which repeats its forward pass.

    Forward, counts go first; then D elements, and S weights and ids; D elements come back. In
    backward the gradient of the result goes, those of weights and of the token's elements come back, as
    far as something trains that they reach.
    """
    elements, times = hidden_dim * element_bytes, 2 if again else 1
    starts = liveness.input or liveness.weight
    backward = [elements] * liveness.output + [slots * WEIGHT_BYTES] * starts
    backward += [elements] * liveness.input
    return Traffic(
        layer=layer,
        forward=times * (2 * elements + slots * (WEIGHT_BYTES + ID_BYTES)),
        backward=sum(backward),
        visits=visits,
        counts=times * COUNT_BYTES * (ep_size - 1),
        collectives_forward=times * 4,
        collectives_backward=len(backward),
    )


def missed(
    num_experts: int, chosen: int, held: range | list[int], groups: int = 1, kept: int = 1
) -> float:
    """Probability that a token that chooses `chosen` of the experts chooses none of those held."""
    if groups == 1:
        return _none_of(num_experts, len(held), chosen)
    size = num_experts // groups
    in_group = [sum(e // size == group for e in held) for group in range(groups)]
    # how many sets of `kept` groups have m of the held experts among them
    ways = {(0, 0): 1}
    for count in in_group:
        grown = dict(ways)
        for (taken, m), number in ways.items():
            if taken < kept:
                key = (taken + 1, m + count)
                grown[key] = grown.get(key, 0) + number
        ways = grown
    sets = comb(groups, kept)
    return sum(
        number / sets * _none_of(kept * size, m, chosen)
        for (taken, m), number in ways.items()
        if taken == kept
    )


def _none_of(total: int, held: int, chosen: int) -> float:
    """C(total - held, chosen) / C(total, chosen)."""
    return comb(total - held, chosen) / comb(total, chosen) if chosen <= total else 0.0


@cache
def remote_ranks(
    num_experts: int,
    top_k: int,
    ep_size: int,
    *,
    num_hot: int = 0,
    num_new: int = 0,
    new_placement: Placement = Placement.replicate,
    new_share: float = 0.0,
    frozen_placement: Placement = Placement.shard,
    groups: int = 1,
    kept: int = 1,
) -> float:
    """Expected number of other ranks of the group that a token's row goes to.

    Hot experts (taken to be the first ones) and replicated banks are on every rank: no token travels
    for them. `new_share` is the share of a token's slots that choose new experts, each by itself.
    """
    cold: list[list[int]] = [[] for _ in range(ep_size)]
    if frozen_placement is Placement.shard and ep_size > 1:
        held = owners(num_experts - num_hot, ep_size, Placement.shard)
        cold = [[num_hot + e for e in ids] for ids in held]
    new: list[list[int]] = [[] for _ in range(ep_size)]
    if num_new and new_placement is Placement.shard and ep_size > 1:
        new = owners(num_new, ep_size, Placement.shard)
    share = new_share if num_new else 0.0
    visited = 0.0
    for frozen_ids, new_ids in zip(cold, new, strict=True):
        for frozen_slots in range(top_k + 1):
            new_slots = top_k - frozen_slots
            chance = comb(top_k, new_slots) * share**new_slots * (1 - share) ** frozen_slots
            if chance == 0.0:
                continue
            miss = missed(num_experts, frozen_slots, frozen_ids, groups, kept)
            if new_ids:
                miss *= _none_of(num_new, len(new_ids), min(new_slots, num_new))
            visited += chance * (1 - miss)
    return visited * (ep_size - 1) / ep_size  # its own rank is equally often any of them
