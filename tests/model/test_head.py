"""The frozen output layer in parts against the plain one."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moe_ext.model import head
from moe_ext.model.head import target_nll

Z, D, V = 13, 8, 29


def case(dtype: torch.dtype, bias: bool) -> tuple[torch.Tensor, nn.Linear, torch.Tensor]:
    torch.manual_seed(0)
    layer = nn.Linear(D, V, bias=bias).to(dtype).requires_grad_(False)
    return torch.randn(Z, D).to(dtype), layer, torch.randint(V, (Z,))


@pytest.mark.parametrize("rows", [1, 5, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("bias", "divisor"), [(False, 1.0), (True, 4.0)])
def test_likelihood_and_gradient_are_those_of_kept_logits(monkeypatch, rows, dtype, bias, divisor):
    monkeypatch.setattr(head, "LOGIT_BYTES", rows * 4 * V)
    hidden, layer, target = case(dtype, bias)
    scale = torch.rand(Z) / Z
    found = []
    for plain in (True, False):
        x = hidden.clone().requires_grad_()
        if plain:
            nll = F.cross_entropy((layer(x) / divisor).float(), target, reduction="none")
        else:
            nll = target_nll(x, layer, target, divisor)
        (nll * scale).sum().backward()
        found.append((nll.detach(), x.grad))
    (plain_nll, plain_grad), (nll, grad) = found
    rounding = 1e-6 if dtype is torch.float32 else 2e-2
    torch.testing.assert_close(nll, plain_nll, rtol=1e-5, atol=1e-6)
    assert grad.dtype is dtype
    largest = float(plain_grad.abs().max())
    assert float((grad - plain_grad).abs().max()) <= rounding * largest


def test_no_logits_are_kept():
    hidden, layer, target = case(torch.float32, False)
    kept: list[torch.Size] = []

    def keep(tensor):
        kept.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        target_nll(hidden.requires_grad_(), layer, target)
        assert kept == [(Z, D)]
        kept.clear()
        target_nll(hidden.detach(), layer, target)
        assert not kept, "nothing needs a gradient"


def test_no_targets_and_a_head_that_trains():
    hidden, layer, target = case(torch.float32, False)
    x = hidden.requires_grad_()
    target_nll(x[:0], layer, target[:0]).sum().backward()
    assert not x.grad.any()
    layer.requires_grad_(True)
    target_nll(x, layer, target).sum().backward()
    assert layer.weight.grad.abs().max() > 0
