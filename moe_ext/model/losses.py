"""Losses built once after the forward pass from what the layers recorded.

A record's counts and probability sums are this rank's, of one micro-batch; the balance loss needs
the counts of all ranks. `selection_counts` makes the tensor to add up over ranks, and
`balance_loss` takes the sum: this file knows no process group.
"""

import torch
from torch import Tensor

from moe_ext.model.context import LayerRecord


def selection_counts(record: LayerRecord) -> Tensor:
    """(X + 1,) int64: how often each expert was chosen by the counted tokens, then their number."""
    assert record.counted_T is not None, "the pass did not record losses"
    (count_X,) = record.counts_by_kind(record.counted_T.long() - 1, 1)
    return torch.cat([count_X, record.counted_T.sum().view(1)])


def balance_loss(prob_sum_X: Tensor, global_counts: Tensor) -> Tensor:
    """Scalar, 1.0 when the load is even (Switch Transformer, eq. 4-6): X * sum(f * P).

    Args:
        prob_sum_X: sum of the router's probabilities over this rank's counted tokens, with graph; of
            sigmoid routers their scores divided by the token's sum (DeepSeek-V3).
        global_counts: `selection_counts` added up over all ranks. f is a share of all choices and
            sums to one, whatever top_k is.

    The ranks' results add up to the global loss. Zero where no token counts.
    """
    chosen_X, num_tokens = global_counts[:-1].float(), global_counts[-1].clamp(min=1).float()
    share_X = chosen_X / chosen_X.sum().clamp(min=1.0)
    return prob_sum_X.numel() * (share_X * prob_sum_X).sum() / num_tokens


def z_loss(z_sum: Tensor, global_tokens: Tensor) -> Tensor:
    """Scalar: mean squared log-sum-exp of the router's logits (ST-MoE, eq. 5), as a rank's share."""
    return z_sum / global_tokens.clamp(min=1).float()


def router_kl(record: LayerRecord, global_tokens: Tensor) -> Tensor | None:
    """Scalar: mean KL(base's routing || extended routing) in nats, as a rank's share (SMAR).

    It holds the routing of tokens that may choose new experts near the base's. Of probabilities, or of
    sigmoid scores' shares, before calibration, which changes weights and no choice; experts that share
    a slot count as one. None in a layer without new experts.
    """
    if record.kl_sum is None:
        return None
    return record.kl_sum / global_tokens.clamp(min=1).float()
