"""Top-k slots that a frozen expert shares with its clones (`extension.row_init=clone_shared`).

Source and clones compete as one, for one slot and its weight; chosen, all of them compute, each with
its share of the weight. An extension has one clone of a source at most; several extensions may
clone the same one.

Shape letters: T tokens, E frozen experts, X all experts of a layer, K top_k, S slots, M an
expert and its clones, C clones.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_ext.model.row_plan import NO_EXPERT


@dataclass
class SharedSlots:
    """What the router chooses from, and how to divide what it chose."""

    logits_TX: Tensor
    """A slot's logit in its source's column, -inf in its clones'."""
    log_share_TX: Tensor
    """Log of a column's share of its slot; -inf where the token may not choose it."""
    slot_X: Tensor
    """The column of the slot that a column takes: its own, or its source's."""
    clone_C: Tensor
    """The columns that take another's."""

    def divide(self, prob_TX: Tensor, chosen_TK: Tensor) -> tuple[Tensor, Tensor]:
        """(T, X) probabilities, each slot's divided among its experts; (T, S) the clones chosen as
        well, each in a slot of its own that is empty where its source was not chosen."""
        divided_TX = prob_TX.index_select(1, self.slot_X) * self.log_share_TX.exp()
        picked_TC = (chosen_TK.unsqueeze(2) == self.slot_X[self.clone_C]).any(1)
        picked_TC &= ~self.log_share_TX[:, self.clone_C].isneginf()
        clone_TC = torch.where(picked_TC, self.clone_C, NO_EXPERT)
        return divided_TX, torch.cat([chosen_TK, clone_TC], 1)


def merge_shared(logits_TE: Tensor, blocks: list[Tensor], sources: list[list[int]]) -> SharedSlots:
    """A slot's logit is the mean in probability of those in it that the token may choose.

    logsumexp - log(their number): equal rows leave it unchanged, so step 0 is the base's function; a
    row that grows makes the slot likelier.

    Args:
        blocks: each extension's logits, -inf where the token may not choose it.
        sources: the frozen expert of each of its columns; empty for an extension that shares none.
    """
    num_frozen, closed = logits_TE.shape[1], torch.full_like(logits_TE, float("-inf"))
    members = [logits_TE]
    for block, ids in zip(blocks, sources, strict=True):
        if ids:
            members.append(closed.index_copy(1, torch.tensor(ids, device=closed.device), block))
    member_TEM = torch.stack(members, -1)
    number_TE = (~member_TEM.isneginf()).sum(-1)
    log_share_TEM = member_TEM.log_softmax(-1)

    logits, shares = [member_TEM.logsumexp(-1) - number_TE.log()], [log_share_TEM[..., 0]]
    slots, member = list(range(num_frozen)), 0
    for block, ids in zip(blocks, sources, strict=True):
        if ids:
            member += 1
            logits.append(torch.full_like(block, float("-inf")))
            shares.append(log_share_TEM[:, ids, member])
            slots += ids
        else:
            logits.append(block)
            shares.append(torch.zeros_like(block))
            slots += range(len(slots), len(slots) + block.shape[1])
    clones = [column for column, slot in enumerate(slots) if slot != column]
    slot_X, clone_C = (torch.tensor(ids, device=logits_TE.device) for ids in (slots, clones))
    return SharedSlots(torch.cat(logits, 1), torch.cat(shares, 1), slot_X, clone_C)
