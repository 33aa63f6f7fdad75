"""Tokens to the ranks that hold their experts, and back.

Every token travels at most once to a rank, whatever number of its experts live there, with the
routing weights and the local expert ids of those experts; the rank returns one row, already summed.
The payload of one token to one rank is D elements out, D back, and S * (4 + 2) bytes of weights and
ids. Either way is two autograd functions, one that starts the exchange and one that awaits it; in
backward the second starts the mirrored exchange and the first awaits it. What is computed between
the two (`send` ... `Arriving.wait`, `give_back` ... `Returning.wait`) overlaps with the exchange in
both directions: autograd runs what was created last first.

Shape letters: T tokens of this rank, S slots a token, W ranks of the group, P rows sent (token,
rank pairs), Q rows received; p and q those of live tokens.

Liveness. A backward exchange is a collective: it happens on every rank of the group or hangs. So
each exchange takes an `anchor`, a leaf that requires a gradient and never gets one, which puts its
nodes into the graph of every rank even where that rank's own rows need no gradient (a batch without
an image above a frozen trunk). What is live in a layer is decided before training, the same way on
every rank (`Liveness`), never from one rank's tensors. Which *tokens* are live differs by rank: their
rows travel first, both sides know how many these are, and in backward nothing else travels.
"""

from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor

from moe_ext.model.grouped import sum_by_token
from moe_ext.model.row_plan import NO_EXPERT, Bags


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
    """Rank that every row goes to, ascending; live tokens' rows first, then by token."""
    token_P: Tensor
    """Token of every row sent."""
    num_tokens: int
    group: dist.ProcessGroup
    live: "Route | None" = None
    """The same for live tokens alone; None where all are."""
    live_P: Tensor | None = None
    """(p,) int64: which of the rows sent are live."""
    live_q: Tensor | None = None
    """(q,) int64: which of the rows received are live."""

    @cached_property
    def bags(self) -> Bags:
        """The rows that every token sends, rank by rank."""
        count_T = self.token_P.new_zeros(self.num_tokens)
        count_T.index_add_(0, self.token_P, torch.ones_like(self.token_P))
        return Bags(torch.argsort(self.token_P, stable=True), count_T.cumsum(0) - count_T)

    @cached_property
    def live_Q(self) -> Tensor | None:
        """(Q,) bool: which of the rows received are live; None where all are."""
        if self.live_q is None:
            return None
        live_Q = self.live_q.new_zeros(sum(self.received), dtype=torch.bool)
        return live_Q.index_fill_(0, self.live_q, True)


def plan_route(
    expert_TS: Tensor, owner_TS: Tensor, group: dist.ProcessGroup, live_T: Tensor | None = None
) -> Route:
    """Which tokens go where; exchanges the counts, a collective of `group`.

    Args:
        owner_TS: the rank of the group that holds the slot's expert; negative: nobody's, not sent.
        live_T: this rank's tokens whose gradient matters; None is all.
    """
    world, num_tokens = dist.get_world_size(group), len(expert_TS)
    ranks_W = torch.arange(world, device=expert_TS.device)
    goes_WT = (owner_TS.unsqueeze(0) == ranks_W.view(-1, 1, 1)).any(-1)
    live_WT = goes_WT if live_T is None else goes_WT & live_T
    count_W2 = torch.stack([live_WT.sum(1), goes_WT.sum(1)], dim=1)
    received_W2 = torch.empty_like(count_W2)
    dist.all_to_all_single(received_W2, count_W2, group=group)
    sent_live, sent, received_live, received = torch.cat([count_W2, received_W2], 1).t().tolist()
    # every rank's live rows stand before its others
    parts_W2T = torch.stack([live_WT, goes_WT & ~live_WT], dim=1).flatten(0, 1)
    part_P, token_P = torch.nonzero_static(parts_W2T, size=sum(sent)).unbind(1)
    rank_P = part_P // 2
    route = Route(sent, received, rank_P, token_P, num_tokens, group)
    if (sent_live, received_live) != (sent, received):
        route.live_P, route.live_q = _heads(sent, sent_live), _heads(received, received_live)
        route.live_P, route.live_q = (t.to(token_P.device) for t in (route.live_P, route.live_q))
        rank_p, token_p = rank_P[route.live_P], token_P[route.live_P]
        route.live = Route(sent_live, received_live, rank_p, token_p, num_tokens, group)
    return route


def _heads(lengths: list[int], heads: list[int]) -> Tensor:
    """int64: in blocks of these lengths, one after the other, the first so many entries of each."""
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    return torch.cat([torch.arange(s, s + n) for s, n in zip(starts, heads, strict=True)])


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


@dataclass
class _Exchange:
    """What the two functions of one exchange share: the flights under way, forward or backward."""

    route: Route
    flights: list[_Flight] = field(default_factory=list)

    @property
    def of_live(self) -> Route:
        return self.route.live or self.route

    def start(self, rows: Tensor, sent: list[int], received: list[int]) -> None:
        self.flights.append(_Flight(rows, sent, received, self.route.group))

    def wait(self) -> list[Tensor]:
        """What has arrived, in the order of the starts."""
        arrived = [flight.wait() for flight in self.flights]
        self.flights.clear()
        return arrived


class _Send(torch.autograd.Function):
    """Starts tokens, weights and ids on their way; in backward awaits the gradients.

    The result is empty: it ties this function to `_Arrive` in the graph.
    """

    @staticmethod
    def forward(ctx, x_TD, weight_PS, expert_PS, exchange, anchor):
        ctx.exchange, route = exchange, exchange.route
        exchange.start(x_TD.index_select(0, route.token_P), route.sent, route.received)
        exchange.start(_pack(weight_PS, expert_PS), route.sent, route.received)
        return x_TD.new_empty(0)

    @staticmethod
    def backward(ctx, _):
        route, live = ctx.exchange.route, ctx.exchange.of_live
        grad_weight_pS, *grad_x_pD = ctx.exchange.wait()
        grad_x_TD = sum_by_token(grad_x_pD[0], live.bags) if grad_x_pD else None
        grad_weight_PS = _spread(grad_weight_pS, route.live_P, sum(route.sent))
        return grad_x_TD, grad_weight_PS, None, None, None


class _Arrive(torch.autograd.Function):
    """Tokens, weights and ids at their ranks; in backward starts their gradients on the way back."""

    @staticmethod
    def forward(ctx, sent, exchange, num_slots, live_input):
        ctx.exchange, ctx.live_input = exchange, live_input
        x_QD, packed = exchange.wait()
        weight_QS, expert_QS = _unpack(packed, (num_slots, torch.float32), (num_slots, torch.int16))
        unmarked = (expert_QS,) if live_input else (x_QD, expert_QS)
        ctx.mark_non_differentiable(*unmarked)
        return x_QD, weight_QS, expert_QS

    @staticmethod
    def backward(ctx, grad_x_QD, grad_weight_QS, _):
        live, live_q = ctx.exchange.of_live, ctx.exchange.route.live_q
        for grad in (grad_weight_QS, grad_x_QD) if ctx.live_input else (grad_weight_QS,):
            rows = grad if live_q is None else grad.index_select(0, live_q)
            ctx.exchange.start(rows, live.received, live.sent)
        return grad_weight_QS.new_empty(0), None, None, None


class _GiveBack(torch.autograd.Function):
    """Starts result rows on their way back; in backward awaits their gradients."""

    @staticmethod
    def forward(ctx, y_QD, exchange, anchor):
        ctx.exchange, route = exchange, exchange.route
        exchange.start(y_QD, route.received, route.sent)
        return y_QD.new_empty(0)

    @staticmethod
    def backward(ctx, _):
        route = ctx.exchange.route
        (grad_qD,) = ctx.exchange.wait()
        return _spread(grad_qD, route.live_q, sum(route.received)), None, None


class _Return(torch.autograd.Function):
    """Results of all ranks, summed by token; in backward starts their gradients on the way."""

    @staticmethod
    def forward(ctx, sent, exchange):
        ctx.exchange = exchange
        (y_PD,) = exchange.wait()
        return sum_by_token(y_PD, exchange.route.bags)

    @staticmethod
    def backward(ctx, grad_TD):
        live = ctx.exchange.of_live
        ctx.exchange.start(grad_TD.index_select(0, live.token_P), live.sent, live.received)
        return grad_TD.new_empty(0), None


def _spread(rows: Tensor, where: Tensor | None, number: int) -> Tensor:
    """So many rows, these at their places and zeros elsewhere; with `where` None they are all."""
    if where is None:
        return rows
    return rows.new_zeros(number, *rows.shape[1:]).index_copy_(0, where, rows)


@dataclass
class Arriving:
    """Tokens on their way to this rank."""

    _inputs: tuple

    def wait(self) -> tuple[Tensor, Tensor, Tensor]:
        """x (Q, D), logical expert ids (Q, S), -1 for another rank's, and weights (Q, S)."""
        x_QD, weight_QS, expert_QS = _Arrive.apply(*self._inputs)
        return x_QD, expert_QS.to(torch.int64), weight_QS


@dataclass
class Returning:
    """Results on their way back to this rank."""

    _inputs: tuple

    def wait(self) -> Tensor:
        """(T, D): the results of all ranks for this rank's tokens, summed by token."""
        return _Return.apply(*self._inputs)


def send(
    x_TD: Tensor,
    expert_TS: Tensor,
    weight_TS: Tensor,
    owner_TS: Tensor,
    route: Route,
    liveness: Liveness,
) -> Arriving:
    """Starts the exchange of tokens, ids (logical, below 2^15) and weights (fp32); a collective.

    `liveness`: which inputs need a gradient on any rank; equal on all ranks of the group.
    """
    token_P = route.token_P
    owned_PS = owner_TS[token_P] == route.rank_P.unsqueeze(1)
    expert_PS = torch.where(owned_PS, expert_TS[token_P], NO_EXPERT).to(torch.int16)
    weight_PS = weight_TS[token_P] * owned_PS
    exchange = _Exchange(route)
    anchor = _anchor(x_TD, liveness.input or liveness.weight)
    sent = _Send.apply(x_TD, weight_PS, expert_PS, exchange, anchor)
    return Arriving((sent, exchange, expert_TS.shape[1], liveness.input))


def give_back(y_QD: Tensor, route: Route, liveness: Liveness) -> Returning:
    """Starts the exchange of the results; a collective."""
    exchange = _Exchange(route)
    sent = _GiveBack.apply(y_QD, exchange, _anchor(y_QD, liveness.output))
    return Returning((sent, exchange))


def _anchor(like: Tensor, live: bool) -> Tensor | None:
    """What puts a live exchange into the graph of a rank whose own rows need no gradient."""
    return like.new_zeros(1).requires_grad_() if live and torch.is_grad_enabled() else None
