"""What a bank's forward and backward pass allocate and multiply: no copy of its weights, nothing quadratic."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moe_ext.config import Placement
from moe_ext.model import activations, experts, row_plan
from moe_ext.model.experts import Bank, ExpertShape, FrozenBank, NewBank
from tests.model.layers import rows_of

DIM, WIDE, TOKENS, SLOTS = 32, 48, 32, 2
FEW, MANY = 8, 64
FACTORS = {"mm": 0, "grouped_mm": 0, "addmm": 1}
"""Products -> where, among an operation's tensors, the two that it multiplies begin."""


class Work(TorchDispatchMode):
    """Notes what operations allocate, views and results in place left out, and what they multiply."""

    def __init__(self) -> None:
        super().__init__()
        self.allocated: list[int] = []
        """Bytes of every new storage, in order."""
        self.products = 0
        """Multiply-adds."""
        # by place; held, so that no later one gets the same. Of a tensor that is held autograd makes a copy
        self._known: dict[int, torch.UntypedStorage] = {}

    def _is_new(self, tensor: Tensor) -> bool:
        storage = tensor.untyped_storage()
        known = storage.data_ptr() in self._known or storage.nbytes() == 0
        self._known.setdefault(storage.data_ptr(), storage)
        return not known

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        for tensor in given:
            self._is_new(tensor)
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and self._is_new(tensor):
                self.allocated.append(tensor.untyped_storage().nbytes())
        name = func.overloadpacket.__name__.strip("_")
        if name in FACTORS:
            left, right = given[FACTORS[name] :][:2]
            self.products += left.numel() * right.shape[-1]
        return result


def _filled(bank_type: type[Bank], num: int, shape: ExpertShape) -> Bank:
    bank = bank_type(shape, list(range(num)), num, Placement.replicate, dtype=torch.float32)
    for tensor in [*bank.parameters(), *bank.buffers()]:
        tensor.data.uniform_(-0.3, 0.3, generator=torch.Generator().manual_seed(0))
    return bank


def _inputs(num: int) -> tuple[Tensor, Tensor, Tensor]:
    """(T, D), routing weights and ids (T, S) of `num` experts: equally many rows whatever it is."""
    stream = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, DIM, generator=stream, requires_grad=True)
    weight = torch.rand(TOKENS, SLOTS, generator=stream, requires_grad=True)
    return x, weight, torch.randint(0, num, (TOKENS, SLOTS), generator=stream)


@pytest.mark.parametrize("path", ["loop", "one expert a part", "apart", "biases", "grouped"])
@pytest.mark.parametrize("bank_type", [NewBank, FrozenBank])
def test_only_a_gradient_is_as_large_as_the_weights(monkeypatch, bank_type, path):
    """All else is of the rows, and of an expert not more than some vectors: linear in their number."""
    if path == "one expert a part":
        monkeypatch.setattr(row_plan, "CACHED_BYTES", 1)
    if path == "apart":
        monkeypatch.setattr(activations, "APART_FROM_WIDTH", 1)
    if path == "grouped":
        monkeypatch.setattr(experts, "multiplies_groups", lambda *_: True)
    has_biases = path == "biases"
    shape = ExpertShape(DIM, WIDE, "swiglu_clamped" if has_biases else "silu", bias=has_biases)
    others = {}
    for num in (FEW, MANY):
        bank, (x, weight, ids_TS) = _filled(bank_type, num, shape), _inputs(num)
        with Work() as work:
            bank(x, weight, rows_of(bank, ids_TS)).backward(torch.ones(TOKENS, DIM))
        gradients = [p.grad.nbytes for p in bank.parameters()]
        large = [size for size in work.allocated if size >= bank.down.nbytes]
        assert sorted(large) == sorted(size for size in gradients if size >= bank.down.nbytes)
        assert len(large) == (2 if bank_type is NewBank else 0)
        others[num] = sum(work.allocated) - sum(gradients)
        passes = 3 if bank_type is NewBank else 2
        assert work.products == passes * TOKENS * SLOTS * 3 * DIM * WIDE
    growth = (others[MANY] - others[FEW]) / (MANY - FEW)
    assert growth < 2 * 4 * (2 * WIDE + DIM), "of an expert"


def test_slices_of_a_fused_bank_would_be_seen():
    """The way that is not taken: every slice's gradient is as large as the whole bank."""
    total = {}
    for num in (FEW, MANY):
        bank, (x, _, ids_TS) = _filled(NewBank, num, ExpertShape(DIM, WIDE)), _inputs(num)
        with Work() as work:
            for expert in range(num):
                rows = x[(ids_TS == expert).any(1)]
                gate, up = (rows @ bank.gate_up[expert].T).chunk(2, dim=-1)
                y = (torch.nn.functional.silu(gate) * up) @ bank.down[expert].T
                y.sum().backward()
        assert sum(size >= bank.down.nbytes for size in work.allocated) >= 2 * num
        total[num] = sum(work.allocated)
    assert total[MANY] > 5 * MANY / FEW * total[FEW]
