"""The plan of a bank's rows: which (token, expert) pairs it computes, sorted by expert.

Shape letters: T tokens, S slots a token, R rows = chosen (token, expert) pairs, sorted by expert,
E experts of the bank held here, O a matrix's output width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

NO_EXPERT = -1
"""Id of an empty slot."""

CACHED_BYTES = 4 << 20
"""On a CPU rows are worked on in parts of about this size, which its caches hold."""


@dataclass
class Bags:
    """Which rows every token sums: the rows of token t are `row[start[t] : start[t + 1]]`."""

    row: Tensor
    """int64."""
    start: Tensor
    """(T,) int64."""

    def of(self, token_U: Tensor | None) -> "Bags":
        """The bags of some tokens, in order, when all others are empty; None keeps all."""
        return self if token_U is None else Bags(self.row, self.start.index_select(0, token_U))


@dataclass
class Part:
    """Some neighbouring experts, and their rows."""

    rows: slice
    experts: slice
    counts: Tensor
    """(experts,) int64: rows of every expert."""
    count_list: list[int] | None
    """The same on the host; None where the device multiplies groups by itself."""

    def spread(self, vector_EO: Tensor) -> Tensor:
        """(rows, O): for every row the vector of its expert; `vector_EO` has the whole bank's."""
        number = self.rows.stop - self.rows.start
        return vector_EO[self.experts].repeat_interleave(self.counts, dim=0, output_size=number)


@dataclass
class RowPlan:
    """Which rows a bank computes, sorted by expert; equal experts keep token order."""

    row_slot: Tensor
    """(R,) int64: flat position in (T, S) of every row."""
    row_token: Tensor
    """(R,) int64."""
    counts: Tensor
    """(E,) int64: rows of every expert."""
    count_list: list[int]
    """The same on the host."""
    has_T: Tensor
    """(T,) bool: the token has rows."""
    num_tokens: int
    """Tokens that have rows."""
    live: "RowPlan | None" = None
    """The same for live tokens alone; None where all are."""
    live_T: Tensor | None = None

    @cached_property
    def live_row_r(self) -> Tensor:
        """(r,) int64: which rows are those of `live`, ascending."""
        assert self.live is not None and self.live_T is not None
        live_R = self.live_T.index_select(0, self.row_token)
        return torch.nonzero_static(live_R, size=self.live.row_slot.numel()).squeeze(1)

    @cached_property
    def token_U(self) -> Tensor:
        """(U,) int64: the tokens that have rows, ascending."""
        return torch.nonzero_static(self.has_T, size=self.num_tokens).squeeze(1)

    @cached_property
    def bags(self) -> Bags:
        """The rows of every token, slot by slot."""
        count_T = torch.zeros_like(self.has_T, dtype=torch.int64)
        count_T.index_add_(0, self.row_token, torch.ones_like(self.row_token))
        return Bags(torch.argsort(self.row_slot), count_T.cumsum(0) - count_T)

    def place(self, token_r: Tensor) -> Tensor:
        """Where tokens that have rows stand in `token_U`."""
        return (self.has_T.cumsum(0) - 1).index_select(0, token_r)

    def part(self, loops: bool) -> Part:
        """All rows; `loops`: expert by expert, else the device multiplies groups by itself."""
        everything = slice(0, self.row_slot.numel())
        counts = self.count_list if loops else None
        return Part(everything, slice(0, len(self.counts)), self.counts, counts)

    def parts(self, row_bytes: int) -> list[Part]:
        """Neighbouring experts whose rows, of `row_bytes` each, fit the processor's caches."""
        if not self.count_list:
            return [self.part(loops=True)]
        counts, most = self.count_list, max(1, CACHED_BYTES // row_bytes)
        parts, first_row, first = [], 0, 0
        num_rows = 0
        for expert, count in enumerate(counts):
            num_rows += count
            last = expert + 1 == len(counts)
            if last or num_rows + counts[expert + 1] > most:
                rows, experts = slice(first_row, first_row + num_rows), slice(first, expert + 1)
                parts.append(Part(rows, experts, self.counts[experts], counts[experts]))
                first_row, first, num_rows = first_row + num_rows, expert + 1, 0
        return parts


def plan_rows(
    expert_TS: Tensor, runs: Sequence[tuple[int, int]], live_T: Tensor | None = None
) -> list[RowPlan]:
    """The rows of some banks: a plan for each run of ids (first id, number of ids) in `runs`.

    Ids outside all runs are somebody else's. All plans together wait for the device once.

    Args:
        live_T: tokens whose gradient matters; None is all.
    """
    num_slots, device = expert_TS.shape[1], expert_TS.device
    # stable sort: rows of one expert keep token order, or resume is not bit-exact
    sorted_id, order = torch.sort(expert_TS.reshape(-1), stable=True)
    ids = [torch.arange(first, first + number, device=device) for first, number in runs]
    first_E = torch.searchsorted(sorted_id, torch.cat(ids))
    counts_E = torch.searchsorted(sorted_id, torch.cat(ids), right=True) - first_E
    has_BT = torch.stack(
        [((expert_TS >= first) & (expert_TS < first + n)).any(1) for first, n in runs]
    )
    known = torch.cat([first_E, counts_E, has_BT.sum(1)]).tolist()
    lengths = [number for _, number in runs]
    total, plans, done = sum(lengths), [], 0
    for bank, number in enumerate(lengths):
        mine = slice(done, done + number)
        done += number
        count_list = known[total:][mine]
        begin = known[mine.start] if number else 0
        row_slot = order[begin : begin + sum(count_list)]
        plans.append(
            RowPlan(
                row_slot,
                row_slot // num_slots,
                counts_E[mine],
                count_list,
                has_BT[bank],
                known[2 * total + bank],
            )
        )
    if live_T is not None:
        closed_TS = expert_TS.masked_fill(~live_T.unsqueeze(1), NO_EXPERT)
        for plan, live in zip(plans, plan_rows(closed_TS, runs), strict=True):
            plan.live, plan.live_T = live, live_T
    return plans
