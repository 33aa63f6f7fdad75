"""What a CUDA device computes against the CPU: run with `pytest -m gpu tests/gpu` where there is one."""

import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from moe_ext.config import Placement, Scope
from moe_ext.model.context import RoutingContext
from moe_ext.model.experts import ExpertShape, FrozenBank, NewBank
from moe_ext.model.head import target_nll
from moe_ext.model.routing import RoutingRule
from moe_ext.training.checkpoint import Piece, Published, Snapshot
from moe_ext.training.publishing import Publisher
from tests.model.layers import DIM, Weights, build, rows_of, sequences
from tests.training.tiny import make_inputs, overrides

pytestmark = pytest.mark.gpu

NUM, WIDE = 5, 64


def bank_pass(bank_type, device: str, ids_TS: torch.Tensor, dtype: torch.dtype) -> list:
    """Output and gradients of one bank, on the CPU."""
    stream = torch.Generator().manual_seed(1)
    bank = bank_type(ExpertShape(64, WIDE), list(range(NUM)), NUM, Placement.replicate, dtype=dtype)
    for tensor in [*bank.parameters(), *bank.buffers()]:
        tensor.data.copy_(0.3 * torch.randn(tensor.shape, generator=stream))
    x = torch.randn(len(ids_TS), 64, generator=stream).to(dtype)
    weight, grad = (
        torch.rand(ids_TS.shape, generator=stream),
        torch.randn(x.shape, generator=stream),
    )
    bank, ids_TS, grad = bank.to(device), ids_TS.to(device), grad.to(device, dtype)
    x, weight = x.to(device).requires_grad_(), weight.to(device).requires_grad_()
    y = bank(x, weight, rows_of(bank, ids_TS))
    y.backward(grad)
    return [t.detach().float().cpu() for t in (y, x.grad, weight.grad)] + [
        p.grad.float().cpu() for p in bank.parameters()
    ]


@pytest.mark.parametrize("bank_type", [NewBank, FrozenBank])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", ["all", "an idle expert", "one", "none"])
def test_a_bank_is_the_cpus(monkeypatch, bank_type, dtype, rows):
    """bf16 through the grouped GEMM, fp32 expert by expert."""
    ids = torch.randint(0, NUM, (300, 2), generator=torch.Generator().manual_seed(0))
    if rows == "an idle expert":
        ids = ids.masked_fill(ids == 2, -1)
    elif rows != "all":
        ids = torch.full_like(ids, -1)
        ids[7, 0] = 3 if rows == "one" else -1
    calls = []
    grouped_mm = F.grouped_mm
    monkeypatch.setattr(F, "grouped_mm", lambda *a, **k: calls.append(1) or grouped_mm(*a, **k))
    there = bank_pass(bank_type, "cuda", ids, dtype)
    assert bool(calls) == (dtype is torch.bfloat16 and rows != "none")
    here = bank_pass(bank_type, "cpu", ids, torch.float32)
    tolerance = 1e-4 if dtype is torch.float32 else 3e-2
    for gpu, cpu in zip(there, here, strict=True):
        assert torch.isfinite(gpu).all()
        assert (gpu - cpu).abs().max() <= tolerance * max(float(cpu.abs().max()), 1e-3)


@pytest.mark.parametrize("scope", list(Scope))
def test_the_layer_is_the_cpus(scope):
    found = []
    for device in ("cpu", "cuda"):
        layer = build(Weights(5, 2), RoutingRule(2), scope=scope).to(device)
        context = sequences(4, 9, seed=1)
        context = RoutingContext(context.modality_BS.to(device), context.segment_BS.to(device))
        context.live_T = context.allowed_T(Scope.preserve, (1,))
        layer.holder.context = context
        x = torch.randn(4, 9, DIM, generator=torch.Generator().manual_seed(2))
        x = x.to(device).requires_grad_()
        y = layer(x)
        (y.square() * context.live_T.view(4, 9, 1)).sum().backward()
        grads = [x.grad, *(p.grad for p in layer.parameters())]
        found.append([t.detach().cpu() for t in (y, *grads)])
    for cpu, gpu in zip(*found, strict=True):
        assert (cpu - gpu).abs().max() <= 1e-4 * max(float(cpu.abs().max()), 1e-3)


def test_the_frozen_head_is_the_cpus(monkeypatch):
    hidden, weight = torch.randn(50, 32), torch.randn(1000, 32)
    target = torch.randint(1000, (50,))
    monkeypatch.setattr("moe_ext.model.head.LOGIT_BYTES", 20 * 4 * 1000)
    found = []
    for device in ("cpu", "cuda"):
        head = torch.nn.Linear(32, 1000, bias=False)
        head.weight.data.copy_(weight)
        head = head.to(device).requires_grad_(False)
        x = hidden.to(device).requires_grad_()
        nll = target_nll(x, head, target.to(device))
        nll.sum().backward()
        found.append((nll.detach().cpu(), x.grad.cpu()))
    for cpu, gpu in zip(*found, strict=True):
        torch.testing.assert_close(gpu, cpu, rtol=1e-3, atol=1e-3)


def test_a_checkpoint_is_copied_while_the_state_changes(tmp_path):
    """Publisher copies into pinned memory; what the optimizer does afterwards is not in the file."""
    state = torch.ones(1 << 20, device="cuda")
    piece = Piece("a", (1 << 20,), 0, {"weight": state})
    publisher = Publisher(device="cuda")
    publisher.start(tmp_path, "step-1", Snapshot([piece], {}))
    state.zero_()
    publisher.wait()
    assert Published(tmp_path / "step-1").tensor("a").eq(1).all()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_whole_run(tmp_path, precision):
    """Four stages on one GPU, text unchanged to the bit; workers' batches are pinned."""
    make_inputs(tmp_path)
    words = [f"parallel.precision={precision}", "data.num_workers=2"]
    command = [sys.executable, "-m", "moe_ext.train", *overrides(tmp_path, precision, *words)]
    subprocess.run(command, check=True, timeout=600)
    summary = json.loads((tmp_path / precision / "summary.json").read_text())
    assert summary["text"]["unchanged"] is True
