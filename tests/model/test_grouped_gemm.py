"""The path of devices with a grouped GEMM, forced on the CPU: what the loop over experts gives."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe_ext.config import Placement
from moe_ext.model import experts
from moe_ext.model.activations import APART_FROM_WIDTH
from moe_ext.model.experts import ExpertShape, FrozenBank, NewBank
from moe_ext.model.row_plan import Bags, RowPlan
from tests.model.layers import rows_of

NUM, DIM, WIDE, TOKENS = 4, 32, 48, 20


def _ids(kind: str) -> Tensor:
    ids = torch.randint(0, NUM, (TOKENS, 2), generator=torch.Generator().manual_seed(0))
    if kind == "an idle expert":
        return ids.masked_fill(ids == 2, -1)
    ids = torch.full_like(ids, -1)
    if kind == "one row":
        ids[3, 0] = 1
    return ids


def _pass(bank: NewBank | FrozenBank, ids_TS: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Output and gradients."""
    stream = torch.Generator().manual_seed(1)
    for tensor in [*bank.parameters(), *bank.buffers()]:
        tensor.data.copy_(0.3 * torch.randn(tensor.shape, generator=stream))
    x = torch.randn(TOKENS, DIM, generator=stream).to(dtype).requires_grad_()
    weight = torch.rand(TOKENS, 2, generator=stream).requires_grad_()
    y = bank(x, weight, rows_of(bank, ids_TS))
    y.backward(torch.randn(y.shape, generator=stream).to(dtype))
    return [y.detach(), x.grad, weight.grad, *(p.grad for p in bank.parameters())]


@pytest.mark.parametrize("kind", ["an idle expert", "one row", "no row"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("activation", "bias"), [("silu", False), ("gelu", True), ("swiglu_clamped", True)]
)
@pytest.mark.parametrize("bank_type", [NewBank, FrozenBank])
def test_groups_give_what_the_loop_gives(monkeypatch, kind, dtype, activation, bias, bank_type):
    calls = 0

    def counted(*args, **kwargs):
        nonlocal calls
        calls += 1
        return grouped_mm(*args, **kwargs)

    grouped_mm = F.grouped_mm
    monkeypatch.setattr(F, "grouped_mm", counted)
    shape = ExpertShape(DIM, WIDE, activation, bias=bias)
    found = []
    for forced in (False, True):
        monkeypatch.setattr(
            experts, "multiplies_groups", lambda like, rows, *_, on=forced: on and rows > 0
        )
        bank = bank_type(shape, list(range(NUM)), NUM, Placement.replicate, dtype=dtype)
        found.append(_pass(bank, _ids(kind), dtype))
    products = 6 if bank_type is NewBank else 4
    assert calls == (0 if kind == "no row" else products)
    tolerance = 1e-5 if dtype is torch.float32 else 1e-2
    for loop, groups in zip(*found, strict=True):
        assert loop.shape == groups.shape and loop.dtype == groups.dtype
        assert (loop - groups).abs().max() <= tolerance * max(float(loop.abs().max()), 1e-3)


def _storages(value: object) -> dict[int, int]:
    """Place -> bytes of the memory behind every tensor that a value leads to."""
    if isinstance(value, Tensor):
        storage = value.untyped_storage()
        return {storage.data_ptr(): storage.nbytes()}
    if isinstance(value, RowPlan | Bags):
        value = vars(value)
    if isinstance(value, dict):
        value = list(value.values())
    if not isinstance(value, list | tuple):
        return {}
    return {place: size for one in value for place, size in _storages(one).items()}


@pytest.mark.parametrize("wide", [WIDE, APART_FROM_WIDTH], ids=["side by side", "apart"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("bank_type", [NewBank, FrozenBank])
def test_a_bank_saves_what_is_stated(bank_type, dtype, wide):
    """`gate_up(x)`, a weight and the order a row; of all else references, no copy."""
    bank = bank_type(
        ExpertShape(DIM, wide), list(range(NUM)), NUM, Placement.replicate, dtype=dtype
    )
    x = torch.randn(TOKENS, DIM, dtype=dtype, requires_grad=True)
    weight, ids_TS = torch.rand(TOKENS, 2, requires_grad=True), _ids("an idle expert")
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        saved.update(_storages(tensor))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y = bank(x, weight, rows_of(bank, ids_TS))
    known = _storages([x, weight, *bank.parameters(), *bank.buffers()])
    rows = int((ids_TS >= 0).sum())
    own = sum(size for place, size in saved.items() if place not in known)
    assert own == rows * (2 * wide * dtype.itemsize + 4)
    by_reference = x.untyped_storage().data_ptr() in saved
    assert by_reference == (bank_type is NewBank)

    # what no hook sees: the plan, whose first column is a view of the order of all slots
    order = 8 * (2 * rows + ids_TS.numel() + TOKENS)
    counts, flags = 8 * NUM, TOKENS
    assert sum(_storages(vars(y.grad_fn)).values()) == order + counts + flags
