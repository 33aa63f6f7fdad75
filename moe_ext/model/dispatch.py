"""Tokens to the ranks that hold their experts, and back.

Every token travels at most once to a rank, whatever number of its experts live there, with the
routing weights and the local expert ids of those experts; the rank returns one row, already summed.
The payload of one token to one rank is D elements out, D back, and S * (4 + 2) bytes of weights and
ids. Both exchanges are one autograd function each, with the mirrored exchange as their backward.

Shape letters: T tokens of this rank, S slots a token, W ranks of the group, P rows sent (token,
rank pairs), Q rows received.

Liveness. A backward exchange is a collective: it happens on every rank of the group or hangs. So
each exchange takes an `anchor`, a leaf that requires a gradient and never gets one, which puts its
node into the graph of every rank even where that rank's own rows need no gradient (a batch without
an image above a frozen trunk). What is live in a layer is decided before training, the same way on
every rank (`Liveness`), never from one rank's tensors.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from moe_ext.model.experts import NO_EXPERT, sum_by_token


@dataclass
class Liveness:
    """What a gradient flows to in a layer, on any rank: decided before training, never by a rank."""

    input: bool = True
    """Something below the layer trains."""
    weight: bool = True
    """Something below or in the layer's router trains."""


@dataclass
class _Route:
    """Rows that this rank sends and receives."""

    sent: list[int]
    """Rows a rank of the group."""
    received: list[int]
    token_P: Tensor
    """Token of every row sent."""
    row_TW: Tensor
    """Row that a token sends to a rank; P where it sends none."""
    group: dist.ProcessGroup


def _exchange(rows: Tensor, sent: list[int], received: list[int], group, spare: int = 0) -> Tensor:
    """The rows that the others sent here, and `spare` rows of zeros."""
    out = rows.new_empty(sum(received) + spare, *rows.shape[1:])
    out[sum(received) :] = 0
    into = out[: sum(received)]
    dist.all_to_all_single(into, rows.contiguous(), received, sent, group=group)
    return out


def _pack(*columns: Tensor) -> Tensor:
    """(rows, bytes) uint8: the columns' bytes side by side, so that one exchange carries them all.

    Wider elements come first: a column's first byte is then a multiple of its element size, which
    `_unpack` needs when there is a single row.
    """
    return torch.cat([column.contiguous().view(torch.uint8) for column in columns], dim=1)


def _unpack(packed: Tensor, *columns: tuple[int, torch.dtype]) -> list[Tensor]:
    """The columns of `_pack`, each given by its width in elements and its dtype."""
    out, start = [], 0
    for width, dtype in columns:
        end = start + width * dtype.itemsize
        out.append(packed[:, start:end].contiguous().view(dtype))
        start = end
    return out


class _Send(torch.autograd.Function):
    """Tokens, weights and ids to their ranks; the gradients of tokens and weights come back."""

    @staticmethod
    def forward(ctx, x_TD, weight_PS, expert_PS, route, live_input, anchor):
        ctx.route, ctx.live_input = route, live_input
        ctx.rows = (x_TD.shape[1], x_TD.dtype)
        ctx.weights = (weight_PS.shape[1], weight_PS.dtype)
        x_PD = x_TD.index_select(0, route.token_P)
        packed = _exchange(
            _pack(weight_PS, x_PD, expert_PS), route.sent, route.received, route.group
        )
        weight_QS, x_QD, expert_QS = _unpack(
            packed, ctx.weights, ctx.rows, (weight_PS.shape[1], torch.int16)
        )
        unmarked = (expert_QS,) if live_input else (x_QD, expert_QS)
        ctx.mark_non_differentiable(*unmarked)
        return x_QD, weight_QS, expert_QS

    @staticmethod
    def backward(ctx, grad_x_QD, grad_weight_QS, _):
        route = ctx.route
        columns = [grad_weight_QS, grad_x_QD] if ctx.live_input else [grad_weight_QS]
        packed = _exchange(_pack(*columns), route.received, route.sent, route.group, spare=1)
        if not ctx.live_input:
            (grad_weight_PS,) = _unpack(packed, ctx.weights)
            return None, grad_weight_PS[:-1], None, None, None, None
        grad_weight_PS, grad_x_PD = _unpack(packed, ctx.weights, ctx.rows)
        grad_x_TD = sum_by_token(grad_x_PD, route.row_TW)
        return grad_x_TD, grad_weight_PS[:-1], None, None, None, None


class _Return(torch.autograd.Function):
    """Result rows to the ranks that asked for them, summed by token."""

    @staticmethod
    def forward(ctx, y_QD, route, anchor):
        ctx.route = route
        y_PD = _exchange(y_QD, route.received, route.sent, route.group, spare=1)
        return sum_by_token(y_PD, route.row_TW)

    @staticmethod
    def backward(ctx, grad_TD):
        route = ctx.route
        grad_PD = grad_TD.index_select(0, route.token_P)
        return _exchange(grad_PD, route.sent, route.received, route.group), None, None


Compute = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x (Q, D), logical expert ids (Q, S), weights (Q, S)) -> (Q, D)."""


def dispatch(
    x_TD: Tensor,
    expert_TS: Tensor,
    weight_TS: Tensor,
    owner_TS: Tensor,
    compute: Compute,
    group: dist.ProcessGroup,
    liveness: Liveness,
) -> Tensor:
    """(T, D): `compute` over the experts of all ranks, summed by token. A collective of `group`.

    Args:
        expert_TS: logical ids, below 2^15.
        owner_TS: rank of the group that holds the slot's expert; negative: nobody's, not sent.
        liveness: which inputs need a gradient on any rank; equal on all ranks of the group.
    """
    world = dist.get_world_size(group)
    ranks_W = torch.arange(world, device=x_TD.device)
    goes_WT = (owner_TS.unsqueeze(0) == ranks_W.view(-1, 1, 1)).any(-1)
    rank_P, token_P = goes_WT.nonzero(as_tuple=True)  # ordered by rank, then token
    row_WT = torch.full_like(goes_WT, token_P.numel(), dtype=torch.int64)
    row_WT[rank_P, token_P] = torch.arange(token_P.numel(), device=x_TD.device)
    row_TW = row_WT.t().contiguous()

    sent_W = goes_WT.sum(1)
    received_W = torch.empty_like(sent_W)
    dist.all_to_all_single(received_W, sent_W, group=group)
    sent, received = torch.stack([sent_W, received_W]).tolist()
    route = _Route(sent, received, token_P, row_TW, group)

    owned_PS = owner_TS[token_P] == rank_P.unsqueeze(1)
    expert_PS = torch.where(owned_PS, expert_TS[token_P], NO_EXPERT).to(torch.int16)
    weight_PS = weight_TS[token_P] * owned_PS
    anchor = None
    if torch.is_grad_enabled() and (liveness.input or liveness.weight):
        anchor = x_TD.new_zeros(1).requires_grad_()
    x_QD, weight_QS, expert_QS = _Send.apply(
        x_TD, weight_PS, expert_PS, route, liveness.input, anchor
    )
    y_QD = compute(x_QD, expert_QS.to(torch.int64), weight_QS)
    return _Return.apply(y_QD, route, anchor)
