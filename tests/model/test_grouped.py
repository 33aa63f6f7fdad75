"""Rows sorted by expert against plain loops, in one part and in many."""

import pytest
import torch

from moe_ext.config import Placement
from moe_ext.model import activations, row_plan
from moe_ext.model.experts import ExpertShape, NewBank
from moe_ext.model.grouped import sum_by_token
from moe_ext.model.row_plan import Bags, plan_rows
from tests.model.layers import rows_of

IDS_TS = torch.tensor([[2, -1, 0], [7, 2, 5], [0, 1, 2], [9, -1, 4], [2, 0, 1]])
"""Ids 0..2 are this bank's."""


def test_plan_sorts_by_expert_and_keeps_token_order():
    (plan,) = plan_rows(IDS_TS, [(0, 3)])
    flat = IDS_TS.flatten()
    wanted = [slot for e in range(3) for slot in range(15) if flat[slot] == e]
    assert plan.row_slot.tolist() == wanted
    assert plan.row_token.tolist() == [slot // 3 for slot in wanted]
    assert plan.count_list == [3, 2, 4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_by_token(dtype):
    (plan,) = plan_rows(IDS_TS, [(0, 3)])
    rows = torch.randn(9, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight = torch.rand(9, generator=torch.Generator().manual_seed(1))
    for scale in (None, weight):
        got = sum_by_token(rows, plan.bags, scale)
        for token in range(5):
            mine = (plan.row_token == token).nonzero().flatten()
            factor = torch.ones(9) if scale is None else scale.to(dtype).float()
            expected = (rows[mine].float() * factor[mine, None]).sum(0)
            assert torch.allclose(got[token].float(), expected, rtol=1e-2, atol=1e-6)
    chosen = torch.tensor([0, 1, 2, 4])  # token 3 chose none of this bank's
    some = sum_by_token(rows, plan.bags.of(chosen), weight)
    assert torch.equal(some, sum_by_token(rows, plan.bags, weight)[chosen])
    assert torch.equal(plan.token_U, chosen)
    assert plan.place(plan.row_token).tolist() == [[0, 1, 2, None, 3][t] for t in plan.row_token]


def test_no_rows_stay_in_the_graph():
    rows = torch.zeros(0, 8, requires_grad=True)
    bags = Bags(torch.zeros(0, dtype=torch.int64), torch.zeros(4, dtype=torch.int64))
    out = sum_by_token(rows, bags)
    assert out.shape == (4, 8) and out.abs().sum() == 0
    out.sum().backward()
    assert rows.grad is not None


def test_parts_cover_all_rows_and_fit(monkeypatch):
    (plan,) = plan_rows(IDS_TS, [(0, 3)])
    for rows_in_cache, runs in ((1, [1, 1, 1]), (5, [2, 1]), (6, [2, 1]), (100, [3])):
        monkeypatch.setattr(row_plan, "CACHED_BYTES", rows_in_cache * 10)
        parts = plan.parts(row_bytes=10)
        assert [p.experts.stop - p.experts.start for p in parts] == runs
        assert [p.rows.start for p in parts] == [0] + [p.rows.stop for p in parts[:-1]]
        assert parts[-1].rows.stop == 9
        assert [c for p in parts for c in p.count_list] == plan.count_list
    everything = plan.part(loops=False)
    assert everything.count_list is None and everything.rows == slice(0, 9)


@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_many_parts_give_what_one_gives(monkeypatch, activation):
    stream = torch.Generator().manual_seed(2)
    bank = NewBank(
        ExpertShape(8, 12, activation, bias=True), [0, 1, 2], 3, Placement.replicate,
        dtype=torch.float64,
    )  # fmt: skip
    for parameter in bank.parameters():
        parameter.data = torch.randn(parameter.shape, generator=stream, dtype=torch.float64)
    x, weight = (torch.randn(5, n, generator=stream, dtype=torch.float64) for n in (8, 3))
    found = []
    for cached in (1 << 20, 1):
        monkeypatch.setattr(row_plan, "CACHED_BYTES", cached)
        bank.zero_grad()
        inputs = [t.clone().requires_grad_() for t in (x, weight)]
        out = bank(*inputs, rows_of(bank, IDS_TS))
        out.square().sum().backward()
        found.append([out, *(t.grad for t in inputs), *(p.grad for p in bank.parameters())])
    for one, many in zip(*found, strict=True):
        torch.testing.assert_close(one, many, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cached", [1, 1 << 20])
def test_gate_and_up_apart_give_what_side_by_side_gives(monkeypatch, cached):
    stream = torch.Generator().manual_seed(3)
    bank = NewBank(ExpertShape(8, 12), [0, 1, 2], 3, Placement.replicate, dtype=torch.float64)
    for parameter in bank.parameters():
        parameter.data = torch.randn(parameter.shape, generator=stream, dtype=torch.float64)
    x, weight = (torch.randn(5, n, generator=stream, dtype=torch.float64) for n in (8, 3))
    monkeypatch.setattr(row_plan, "CACHED_BYTES", cached)
    found = []
    ids_TS = IDS_TS.masked_fill(IDS_TS == 1, -1)  # an expert without rows
    for width in (1 << 20, 1):
        monkeypatch.setattr(activations, "APART_FROM_WIDTH", width)
        bank.zero_grad()
        inputs = [t.clone().requires_grad_() for t in (x, weight)]
        out = bank(*inputs, rows_of(bank, ids_TS))
        out.square().sum().backward()
        found.append([out, *(t.grad for t in inputs), *(p.grad for p in bank.parameters())])
    for side_by_side, apart in zip(*found, strict=True):
        torch.testing.assert_close(side_by_side, apart, rtol=1e-12, atol=1e-12)
