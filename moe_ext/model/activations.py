"""The gated activation of an expert, and its gradient.

Shape letters: R rows (r of one part), I intermediate width.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_ext.model.row_plan import Part


@dataclass
class ExpertShape:
    """Sizes and activation of a family's routed experts."""

    hidden_dim: int
    intermediate_dim: int
    activation: str = "silu"
    """`silu`, `gelu`, `gelu_tanh`, `relu`, or `swiglu_clamped` (GPT-OSS)."""
    bias: bool = False
    alpha: float = 1.702
    limit: float = 7.0


def _swiglu_clamped(gate: Tensor, up: Tensor, shape: ExpertShape) -> Tensor:
    gate = gate.clamp(max=shape.limit)
    up = up.clamp(min=-shape.limit, max=shape.limit)
    return gate * torch.sigmoid(gate * shape.alpha) * (up + 1)


ACTIVATIONS: dict[str, Callable[[Tensor, Tensor, ExpertShape], Tensor]] = {
    "silu": lambda gate, up, _: F.silu(gate) * up,
    "gelu": lambda gate, up, _: F.gelu(gate) * up,
    "gelu_tanh": lambda gate, up, _: F.gelu(gate, approximate="tanh") * up,
    "relu": lambda gate, up, _: F.relu(gate) * up,
    "swiglu_clamped": _swiglu_clamped,
}


def activate(h_R2I: Tensor, shape: ExpertShape) -> Tensor:
    """(R, I): the gated activation of gate rows and up rows, stacked along the last dimension."""
    gate, up = h_R2I.chunk(2, dim=-1)
    return ACTIVATIONS[shape.activation](gate, up, shape)


APART_FROM_WIDTH = 1024
"""Intermediate width from which gate and up rows are multiplied one after the other on a CPU: their
activations are then contiguous (1.5 to 2 times as fast), and products of that width lose nothing."""


def is_apart(part: Part, shape: ExpertShape) -> bool:
    """Whether a part's `h` has all gate rows, then all up rows, and not every row's two side by side."""
    wide = shape.intermediate_dim >= APART_FROM_WIDTH
    return wide and shape.activation == "silu" and not shape.bias and part.count_list is not None


def gate_and_up(h_r2I: Tensor, apart: bool) -> tuple[Tensor, Tensor]:
    """Two (r, I) views of a part's `h`."""
    if not apart:
        gate, up = h_r2I.chunk(2, dim=-1)
        return gate, up
    num_rows, double = h_r2I.shape
    gate, up = h_r2I.view(2, num_rows, double // 2).unbind(0)
    return gate, up


def activated(h_R2I: Tensor, shape: ExpertShape, apart: bool) -> Tensor:
    """`activate`, without a graph."""
    if shape.activation == "silu":
        gate, up = gate_and_up(h_R2I, apart)
        return F.silu(gate).mul_(up)
    return activate(h_R2I, shape)


@dataclass
class ActivationGradients:
    """What `activate_backward` gives back."""

    h_R2I: Tensor
    inner_R: Tensor | None
    """The product of gradient and activation, summed over a row: the routing weights' gradient."""
    act_RI: Tensor | None
    """The activation itself, computed again."""


def activate_backward(
    h_R2I: Tensor,
    grad_RI: Tensor,
    shape: ExpertShape,
    inner: torch.dtype | None,
    keep: bool,
    apart: bool,
) -> ActivationGradients:
    """Gradient of `activate`. Overwrites `grad_RI`.

    `inner`: also the inner products, in this dtype. `keep`: also the value.
    """
    if shape.activation != "silu":
        with torch.enable_grad():
            h = h_R2I.detach().requires_grad_()
            act_RI = activate(h, shape)
            (grad_h,) = torch.autograd.grad(act_RI, h, grad_RI)
        act_RI = act_RI.detach()
        return ActivationGradients(grad_h, inner_products(grad_RI, act_RI, inner), act_RI)
    gate, up = gate_and_up(h_R2I, apart)
    out = torch.empty_like(h_R2I)
    grad_gate, grad_up = gate_and_up(out, apart)
    act_RI = F.silu(gate)
    torch.mul(act_RI, grad_RI, out=grad_up)
    inner_R = inner_products(grad_up, up, inner)
    grad_RI.mul_(up)
    torch.ops.aten.silu_backward.grad_input(grad_RI, gate, grad_input=grad_gate)
    return ActivationGradients(out, inner_R, act_RI.mul_(up) if keep else None)


def inner_products(a_RI: Tensor, b_RI: Tensor, dtype: torch.dtype | None) -> Tensor | None:
    """(R,) sums of products; products of bf16 are rounded, their sum is not."""
    return None if dtype is None else (a_RI * b_RI).sum(-1, dtype=dtype)
