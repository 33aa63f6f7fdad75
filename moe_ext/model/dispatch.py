"""Tokens to the ranks that hold their experts, and back.

Every token travels at most once to a rank, whatever number of its experts live there, with the
routing weights and the local expert ids of those experts; the rank returns one row, already summed.
The payload of one token to one rank is D elements out, D back, and S * (4 + 2) bytes of weights and
ids. Both exchanges are one autograd function each, with the mirrored exchange as their backward.
The first one is started early (`send`) and awaited late (`Arriving.wait`): what needs no travelling
is computed in between.

Shape letters: T tokens of this rank, S slots a token, W ranks of the group, P rows sent (token,
rank pairs), Q rows received.

Liveness. A backward exchange is a collective: it happens on every rank of the group or hangs. So
each exchange takes an `anchor`, a leaf that requires a gradient and never gets one, which puts its
node into the graph of every rank even where that rank's own rows need no gradient (a batch without
an image above a frozen trunk). What is live in a layer is decided before training, the same way on
every rank (`Liveness`), never from one rank's tensors.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from moe_ext.model.experts import NO_EXPERT
from moe_ext.model.grouped import Bags, sum_by_token


@dataclass
class Liveness:
    """What a gradient flows to in a layer, on any rank: decided before training, never by a rank."""

    input: bool = True
    """Something below the layer trains."""
    weight: bool = True
    """Something below or in the layer's router trains."""
    output: bool = True
    """One of the above, or an expert trains that tokens travel to."""


@dataclass
class Route:
    """Rows that this rank sends and receives."""

    sent: list[int]
    """Rows a rank of the group."""
    received: list[int]
    rank_P: Tensor
    """Rank that every row goes to, ascending."""
    token_P: Tensor
    """Token of every row sent."""
    bags: Bags
    """The rows that every token sends, rank by rank."""
    group: dist.ProcessGroup


def plan_route(expert_TS: Tensor, owner_TS: Tensor, group: dist.ProcessGroup) -> Route:
    """Which tokens go where; exchanges the counts, a collective of `group`.

    `owner_TS` is the rank of the group that holds the slot's expert; negative: nobody's, not sent.
    """
    world = dist.get_world_size(group)
    ranks_W = torch.arange(world, device=expert_TS.device)
    goes_WT = (owner_TS.unsqueeze(0) == ranks_W.view(-1, 1, 1)).any(-1)
    rank_P, token_P = goes_WT.nonzero(as_tuple=True)  # ordered by rank, then token
    count_T = goes_WT.sum(0)
    bags = Bags(torch.argsort(token_P, stable=True), count_T.cumsum(0) - count_T)
    sent_W = goes_WT.sum(1)
    received_W = torch.empty_like(sent_W)
    dist.all_to_all_single(received_W, sent_W, group=group)
    sent, received = torch.stack([sent_W, received_W]).tolist()
    return Route(sent, received, rank_P, token_P, bags, group)


class _Flight:
    """An exchange under way: `wait` gives the rows that the others sent here."""

    def __init__(self, rows: Tensor, sent: list[int], received: list[int], group):
        self.sending = rows.contiguous()  # alive until it has gone
        self.out = rows.new_empty(sum(received), *rows.shape[1:])
        self.work = dist.all_to_all_single(
            self.out, self.sending, received, sent, group=group, async_op=True
        )

    def wait(self) -> Tensor:
        self.work.wait()
        return self.out


def _pack(*columns: Tensor) -> Tensor:
    """(rows, bytes) uint8: the columns' bytes side by side, so that one exchange carries them all.

    Wider elements come first: a column's first byte is then a multiple of its element size, which
    `_unpack` needs when there is a single row.
    """

    def bytes_of(column: Tensor) -> Tensor:
        # flat first: a tensor of one column may have any stride, and bytes are read off neighbours
        width = column.shape[1] * column.element_size()
        return column.reshape(-1).view(torch.uint8).view(column.shape[0], width)

    return torch.cat([bytes_of(column) for column in columns], dim=1)


def _unpack(packed: Tensor, *columns: tuple[int, torch.dtype]) -> list[Tensor]:
    """The columns of `_pack`, each given by its width in elements and its dtype."""
    out, start = [], 0
    for width, dtype in columns:
        end = start + width * dtype.itemsize
        flat = packed[:, start:end].reshape(-1)  # of a single row: no copy, any stride
        out.append(flat.view(dtype).view(packed.shape[0], width))
        start = end
    return out


class _Arrive(torch.autograd.Function):
    """Tokens, weights and ids at their ranks; the gradients of tokens and weights go back.

    The forward exchange is under way (`flight`); its inputs are here for their gradients.
    """

    @staticmethod
    def forward(ctx, x_TD, weight_PS, flight, route, live_input, anchor):
        ctx.route, ctx.live_input = route, live_input
        ctx.rows = (x_TD.shape[1], x_TD.dtype)
        ctx.weights = (weight_PS.shape[1], weight_PS.dtype)
        weight_QS, x_QD, expert_QS = _unpack(
            flight.wait(), ctx.weights, ctx.rows, (weight_PS.shape[1], torch.int16)
        )
        unmarked = (expert_QS,) if live_input else (x_QD, expert_QS)
        ctx.mark_non_differentiable(*unmarked)
        return x_QD, weight_QS, expert_QS

    @staticmethod
    def backward(ctx, grad_x_QD, grad_weight_QS, _):
        route = ctx.route
        columns = [grad_weight_QS, grad_x_QD] if ctx.live_input else [grad_weight_QS]
        packed = _Flight(_pack(*columns), route.received, route.sent, route.group).wait()
        if not ctx.live_input:
            (grad_weight_PS,) = _unpack(packed, ctx.weights)
            return None, grad_weight_PS, None, None, None, None
        grad_weight_PS, grad_x_PD = _unpack(packed, ctx.weights, ctx.rows)
        return sum_by_token(grad_x_PD, route.bags), grad_weight_PS, None, None, None, None


class _GiveBack(torch.autograd.Function):
    """Result rows to the ranks that asked for them, summed by token."""

    @staticmethod
    def forward(ctx, y_QD, route, anchor):
        ctx.route = route
        y_PD = _Flight(y_QD, route.received, route.sent, route.group).wait()
        return sum_by_token(y_PD, route.bags)

    @staticmethod
    def backward(ctx, grad_TD):
        route = ctx.route
        grad_PD = grad_TD.index_select(0, route.token_P)
        return _Flight(grad_PD, route.sent, route.received, route.group).wait(), None, None


@dataclass
class Arriving:
    """Tokens on their way to this rank."""

    _inputs: tuple

    def wait(self) -> tuple[Tensor, Tensor, Tensor]:
        """x (Q, D), logical expert ids (Q, S), -1 for another rank's, and weights (Q, S)."""
        x_QD, weight_QS, expert_QS = _Arrive.apply(*self._inputs)
        return x_QD, expert_QS.to(torch.int64), weight_QS


def send(
    x_TD: Tensor,
    expert_TS: Tensor,
    weight_TS: Tensor,
    owner_TS: Tensor,
    route: Route,
    liveness: Liveness,
) -> Arriving:
    """Starts the exchange of tokens, ids (logical, below 2^15) and weights; a collective.

    `liveness`: which inputs need a gradient on any rank; equal on all ranks of the group.
    """
    token_P = route.token_P
    owned_PS = owner_TS[token_P] == route.rank_P.unsqueeze(1)
    expert_PS = torch.where(owned_PS, expert_TS[token_P], NO_EXPERT).to(torch.int16)
    weight_PS = weight_TS[token_P] * owned_PS
    packed = _pack(weight_PS.detach(), x_TD.detach().index_select(0, token_P), expert_PS)
    flight = _Flight(packed, route.sent, route.received, route.group)
    anchor = _anchor(x_TD, liveness.input or liveness.weight)
    return Arriving((x_TD, weight_PS, flight, route, liveness.input, anchor))


def give_back(y_QD: Tensor, route: Route, liveness: Liveness) -> Tensor:
    """(T, D): the results of all ranks for this rank's tokens, summed by token; a collective."""
    return _GiveBack.apply(y_QD, route, _anchor(y_QD, liveness.output))


def _anchor(like: Tensor, live: bool) -> Tensor | None:
    """What puts a live exchange into the graph of a rank whose own rows need no gradient."""
    return like.new_zeros(1).requires_grad_() if live and torch.is_grad_enabled() else None
