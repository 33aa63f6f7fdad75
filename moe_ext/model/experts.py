"""Grouped computation of one bank of experts, with its own backward.

Shape letters: T tokens, S slots a token (top_k, and one more for every expert that shares a slot),
R rows = chosen (token, expert) pairs of this bank, sorted by expert, E experts of the bank held
here, D hidden width, I intermediate width.

An expert is a gated MLP: `weight * down(act(gate_up(x)))`. The routing weight multiplies where rows
are summed by token, the output here and the input's gradient in backward, and costs no pass of its
own; its gradient is taken at the activation and needs no expert output.
Saved for backward: `gate_up(x)` (R, 2I), the routing weights (R) and the row order (3 R + T int64,
R of them a view of all slots' order, which the banks of a layer share; a flag a token, a count an
expert); of a trainable bank also the reference to `x` (T, D). Nothing else; no copy of expert
weights is ever made, and a frozen bank has no weight gradient.

Without a grouped GEMM (CPUs) a pass takes some experts at a time, as many as the caches hold: the
gathered rows, the activations and their gradients are used again before they leave the cache, and
never exist for all rows at once.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moe_ext.config import Placement
from moe_ext.model.activations import (
    ExpertShape,
    activate_backward,
    activated,
    gate_and_up,
    inner_products,
    is_apart,
)
from moe_ext.model.grouped import (
    grouped_linear,
    grouped_linear_backward_input,
    grouped_linear_backward_weight,
    multiplies_groups,
    sum_by_expert,
    sum_by_token,
)
from moe_ext.model.packed import Packed, Rounding, packed_shapes
from moe_ext.model.row_plan import Part, RowPlan


def _linear_gate_up(
    x_rD: Tensor, weight: Tensor | Packed, part: Part, out: Tensor | None, apart: bool
):
    """(r, 2I): the part's `h`."""
    if not apart:
        return grouped_linear(x_rD, weight, part, out)
    h_r2I = x_rD.new_empty(len(x_rD), weight.shape[1]) if out is None else out
    for half, its_weight in zip(gate_and_up(h_r2I, True), weight.chunk(2, dim=1), strict=True):
        grouped_linear(x_rD, its_weight, part, half)
    return h_r2I


def _linear_gate_up_backward(
    grad_r2I: Tensor, weight: Tensor | Packed, part: Part, out: Tensor | None, apart: bool
) -> Tensor:
    """(r, D): gradient of the part's rows."""
    if not apart:
        return grouped_linear_backward_input(grad_r2I, weight, part, out)
    grad_gate, grad_up = gate_and_up(grad_r2I, True)
    of_gate, of_up = weight.chunk(2, dim=1)
    grad_x_rD = grouped_linear_backward_input(grad_gate, of_gate, part, out)
    return grouped_linear_backward_input(grad_up, of_up, part, grad_x_rD, add=True)


class _BankFunction(torch.autograd.Function):
    """Gather rows, two grouped GEMMs, sum by token. See the module's docstring."""

    @staticmethod
    def forward(ctx, x_TD, weight_TS, gate_up, down, gate_up_bias, down_bias, plan, shape, some):
        weight_R = weight_TS.reshape(-1).index_select(0, plan.row_slot)
        packed = (gate_up, down) if isinstance(gate_up, Packed) else None
        parts = _parts(plan, x_TD, shape, packed is not None)
        h_R2I, out_RD = _buffers(parts, x_TD, 2 * shape.intermediate_dim, shape.hidden_dim)
        for part in parts:
            rows, apart = part.rows, is_apart(part, shape)
            x_rD = x_TD.index_select(0, plan.row_token[rows])
            h_r2I = _linear_gate_up(x_rD, gate_up, part, _rows(h_R2I, rows), apart)
            if gate_up_bias is not None:
                h_r2I += part.spread(gate_up_bias)
            act_rI = activated(h_r2I, shape, apart)
            out_rD = grouped_linear(act_rI, down, part, _rows(out_RD, rows))
            if down_bias is not None:
                out_rD += part.spread(down_bias)
            if len(parts) == 1:
                h_R2I, out_RD = h_r2I, out_rD
        y_UD = sum_by_token(out_RD, plan.bags.of(plan.token_U if some else None), weight_R)
        trains = gate_up.requires_grad
        ctx.forward_plan, ctx.plan, ctx.shape, ctx.some = plan, plan, shape, some
        ctx.weight_shape = weight_TS.shape
        if plan.live is not None and not trains and any(ctx.needs_input_grad):
            ctx.plan = plan.live
            h_R2I, weight_R = (t.index_select(0, plan.live_row_r) for t in (h_R2I, weight_R))
        ctx.packed, weights = packed, (None, None) if packed else (gate_up, down)
        ctx.save_for_backward(
            x_TD if trains else None, h_R2I, weight_R, *weights, gate_up_bias, down_bias
        )
        return y_UD

    @staticmethod
    def backward(ctx, grad_UD):
        x_TD, h_R2I, weight_R, gate_up, down, gate_up_bias, down_bias = ctx.saved_tensors
        gate_up, down = ctx.packed or (gate_up, down)
        plan, shape = ctx.plan, ctx.shape
        x_live, weight_live, bank_live = ctx.needs_input_grad[:3]
        parts = _parts(plan, grad_UD, shape, ctx.packed is not None)
        row_place = ctx.forward_plan.place(plan.row_token) if ctx.some else plan.row_token
        grad_bank: list[Tensor | None] = [None] * 4
        if bank_live:
            grad_bank = _allocated((gate_up, down, gate_up_bias, down_bias), parts)
        (grad_x_RD,) = _buffers(parts, grad_UD, shape.hidden_dim)
        grad_weight_R = torch.empty_like(weight_R)
        inner = weight_R.dtype if weight_live else None
        for part in parts:
            rows, apart = part.rows, is_apart(part, shape)
            grad_rD = grad_UD.index_select(0, row_place[rows])  # of the rows before their weights
            grad_rI = grouped_linear_backward_input(grad_rD, down, part, None)
            grads = activate_backward(h_R2I[rows], grad_rI, shape, inner, bank_live, apart)
            if weight_live:
                grad_weight_R[rows] = grads.inner_R
                if down_bias is not None:
                    grad_weight_R[rows] += inner_products(grad_rD, part.spread(down_bias), inner)
            if x_live:
                into = _rows(grad_x_RD, rows)
                grad_x_rD = _linear_gate_up_backward(grads.h_R2I, gate_up, part, into, apart)
                grad_x_RD = grad_x_rD if len(parts) == 1 else grad_x_RD
            if bank_live:
                scale_r1 = weight_R[rows].to(grad_rD.dtype).unsqueeze(1)
                x_rD = x_TD.index_select(0, plan.row_token[rows])
                _bank_gradients(grad_bank, grads, grad_rD, x_rD, scale_r1, part, apart)
        grad_weight_TS = None
        if weight_live:
            flat = grad_weight_R.new_zeros(ctx.weight_shape.numel())
            flat.index_copy_(0, plan.row_slot, grad_weight_R)
            grad_weight_TS = flat.view(ctx.weight_shape)
        grad_x_TD = sum_by_token(grad_x_RD, plan.bags, weight_R) if x_live else None
        return grad_x_TD, grad_weight_TS, *grad_bank, None, None, None


def _allocated(tensors: tuple[Tensor | None, ...], parts: list[Part]) -> list[Tensor | None]:
    """What the weights' gradients are written to; a grouped GEMM brings the matrices' own."""
    grouped = parts[0].count_list is None
    return [
        None if t is None or (grouped and t.dim() == 3) else torch.empty_like(t) for t in tensors
    ]


def _bank_gradients(grad_bank, grads, grad_rD, x_rD, scale_r1, part: Part, apart: bool) -> None:
    """Writes the part's weight and bias gradients; overwrites `x_rD` and `grad_rD`."""
    gate_up, down, gate_up_bias, down_bias = grad_bank
    x_rD.mul_(scale_r1)
    grad_rD.mul_(scale_r1)
    if apart:
        assert gate_up is not None
        halves = zip(gate_and_up(grads.h_R2I, True), gate_up.chunk(2, dim=1), strict=True)
        for half, its_gradient in halves:
            grouped_linear_backward_weight(half, x_rD, part, its_gradient)
    else:
        grad_bank[0] = grouped_linear_backward_weight(grads.h_R2I, x_rD, part, gate_up)
    grad_bank[1] = grouped_linear_backward_weight(grad_rD, grads.act_RI, part, down)
    if gate_up_bias is not None:
        sum_by_expert(grads.h_R2I * scale_r1, part, gate_up_bias)
        sum_by_expert(grad_rD, part, down_bias)


def _parts(plan: RowPlan, like: Tensor, shape: ExpertShape, packed: bool) -> list[Part]:
    """The rows in parts that fit a processor's caches; all at once on other devices."""
    widths = (shape.hidden_dim, shape.intermediate_dim)
    if not packed and multiplies_groups(like, plan.row_slot.numel(), *widths):
        return [plan.part(loops=False)]
    if like.device.type == "cpu":
        return plan.parts(2 * shape.intermediate_dim * like.element_size())
    return [plan.part(loops=True)]


def _buffers(parts: list[Part], like: Tensor, *widths: int) -> list[Tensor | None]:
    """(R, width) each, to be filled part by part; None where the only part's result is the whole."""
    if len(parts) == 1:
        return [None for _ in widths]
    num_rows = parts[-1].rows.stop
    return [like.new_empty(num_rows, width) for width in widths]


def _rows(buffer: Tensor | None, rows: slice) -> Tensor | None:
    return None if buffer is None else buffer[rows]


class Bank(nn.Module):
    """Experts of one layer that share one fate, and where they live.

    `gate_up` is (E, 2I, D), gate rows first, `down` (E, D, I), biases (E, 2I) and (E, D); E counts
    the experts held here, `expert_ids` names them in order, `num_experts` is the whole bank's size
    over the expert-parallel group.
    """

    gate_up: Tensor
    down: Tensor
    gate_up_bias: Tensor | None
    down_bias: Tensor | None

    def __init__(
        self,
        shape: ExpertShape,
        expert_ids: list[int],
        num_experts: int,
        placement: Placement,
    ):
        super().__init__()
        self.shape, self.expert_ids = shape, expert_ids
        self.num_experts, self.placement = num_experts, placement
        self.first_held = expert_ids[0] if expert_ids else 0
        """Logical id, in the layer, of the first expert held here; the layer sets it."""
        self.sources: list[int] = []
        """The frozen expert that each of a new bank's experts started from."""

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor of the bank, for the experts held here."""
        held, shape = len(self.expert_ids), self.shape
        dim, wide = shape.hidden_dim, shape.intermediate_dim
        tensors: dict[str, tuple[int, ...]] = {
            "gate_up": (held, 2 * wide, dim),
            "down": (held, dim, wide),
        }
        if shape.bias:
            tensors |= {"gate_up_bias": (held, 2 * wide), "down_bias": (held, dim)}
        return tensors

    def _hold(self, trains: bool, create: Callable[..., Tensor], **where: Any) -> None:
        """Allocate the bank's tensors: as parameters where they train, as buffers where not."""
        shapes = self.tensor_shapes()
        for name in ("gate_up", "down", "gate_up_bias", "down_bias"):
            tensor = create(shapes[name], **where) if name in shapes else None
            if trains:
                self.register_parameter(name, None if tensor is None else nn.Parameter(tensor))
            else:
                self.register_buffer(name, tensor, persistent=False)

    def forward(self, x_TD: Tensor, weight_TS: Tensor, plan: RowPlan, some: bool = False) -> Tensor:
        """(T, D): the weighted sum of the outputs of the experts held here, by token.

        With `some` only the rows of the tokens that chose any of them, (U, D), in order.
        Without any row the result is zero and still depends on both inputs and on every trainable
        tensor: a rank whose tokens choose no expert, or that holds none, takes part in the exchange
        and in the gradient reduction like all others.
        """
        tensors = (self.gate_up, self.down, self.gate_up_bias, self.down_bias)
        return _BankFunction.apply(x_TD, weight_TS, *tensors, plan, self.shape, some)


class FrozenBank(Bank):
    """Pretrained experts: buffers, so neither an optimizer nor DeepSpeed's broadcast sees them."""

    def __init__(self, shape, expert_ids, num_experts, placement, *, dtype, device="cpu"):
        super().__init__(shape, expert_ids, num_experts, placement)
        self._hold(False, torch.empty, dtype=dtype, device=device)


class PackedBank(FrozenBank):
    """Pretrained experts in 8 or 4 bits; `gate_up` and `down` are `Packed`, biases stay plain."""

    def __init__(
        self, shape, expert_ids, num_experts, placement, *, dtype, device="cpu", bits: int = 8,
        nf4: bool = False,
    ):  # fmt: skip
        Bank.__init__(self, shape, expert_ids, num_experts, placement)
        self.bits, self.nf4, self.rounding = bits, nf4, Rounding()
        for name in ("gate_up_bias", "down_bias"):
            size = self.tensor_shapes().get(name)
            bias = None if size is None else torch.empty(size, dtype=dtype, device=device)
            self.register_buffer(name, bias, persistent=False)
        for name in ("gate_up", "down"):
            for part, (size, kind) in packed_shapes(self.tensor_shapes()[name], bits, nf4).items():
                tensor = torch.empty(size, dtype=kind, device=device)
                self.register_buffer(f"{name}_{part}", tensor, persistent=False)

    @property
    def gate_up(self) -> Packed:  # type: ignore[override]
        return Packed(self.gate_up_codes, self.gate_up_scale)  # type: ignore[arg-type]

    @property
    def down(self) -> Packed:  # type: ignore[override]
        return Packed(self.down_codes, self.down_scale)  # type: ignore[arg-type]


class NewBank(Bank):
    """Trainable experts."""

    def __init__(self, shape, expert_ids, num_experts, placement, *, dtype, device="cpu"):
        super().__init__(shape, expert_ids, num_experts, placement)
        self._hold(True, torch.zeros, dtype=dtype, device=device)
