"""Grouped computation of one bank of experts, with its own backward.

Shape letters: T tokens, S slots a token (top_k, and one more for every expert that shares a slot),
R rows = chosen (token, expert) pairs of this bank, sorted by expert, E experts of the bank held
here, D hidden width, I intermediate width.

An expert is a gated MLP: `down(weight * act(gate_up(x)))`. The routing weight multiplies the
activation, which is I wide, and not the output: the weight's gradient then needs no expert output.
Saved for backward: `gate_up(x)` (R, 2I), the routing weights (R) and the row order (R int64 twice);
of a trainable bank also the reference to `x` (T, D). Nothing else; no copy of expert weights is
ever made, and a frozen bank has no weight gradient.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_ext.config import Placement

NO_EXPERT = -1
"""Id of an empty slot."""


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


def activate_backward(h_R2I: Tensor, grad_RI: Tensor, shape: ExpertShape) -> Tensor:
    """(R, 2I): gradient of `activate` with respect to `h`."""
    if shape.activation == "silu":
        gate, up = h_R2I.chunk(2, dim=-1)
        out = torch.empty_like(h_R2I)
        grad_gate, grad_up = out.chunk(2, dim=-1)
        torch.mul(grad_RI, F.silu(gate), out=grad_up)
        grad_gate.copy_(torch.ops.aten.silu_backward(grad_RI * up, gate))
        return out
    with torch.enable_grad():
        h = h_R2I.detach().requires_grad_()
        (grad,) = torch.autograd.grad(activate(h, shape), h, grad_RI)
    return grad


@dataclass
class RowPlan:
    """Which rows a bank computes, sorted by expert."""

    row_slot: Tensor
    """(R,) int64: flat position in (T, S) of every row."""
    row_token: Tensor
    """(R,) int64."""
    row_of_slot: Tensor
    """(T, S) int64: the row of every slot, R where the slot is not this bank's."""
    counts: Tensor
    """(E,) int64: rows of every expert."""


def plan_rows(local_TS: Tensor, num_experts: int) -> RowPlan:
    """Rows of the slots whose id lies in [0, num_experts); all other ids are somebody else's."""
    num_slots = local_TS.shape[1]
    flat = local_TS.reshape(-1)
    mine = (flat >= 0) & (flat < num_experts)
    slots = mine.nonzero().squeeze(1)
    # stable sort: rows of one expert keep token order, or resume is not bit-exact
    order = torch.argsort(flat[slots], stable=True)
    row_slot = slots[order]
    rows = torch.arange(row_slot.numel(), device=flat.device)
    row_of_slot = torch.full_like(flat, row_slot.numel()).scatter_(0, row_slot, rows)
    counts = torch.bincount(flat[row_slot], minlength=num_experts)
    return RowPlan(row_slot, row_slot // num_slots, row_of_slot.view_as(local_TS), counts)


def _grouped_mm_runs(rows: Tensor, *widths: int) -> bool:
    """Whether the device's grouped GEMM takes these operands; a loop over experts does all others."""
    aligned = all(width * rows.element_size() % 16 == 0 for width in widths)
    return rows.is_cuda and rows.dtype == torch.bfloat16 and aligned and rows.shape[0] > 0


def grouped_linear(rows: Tensor, weight_EOI: Tensor, counts: Tensor, spare: int = 0) -> Tensor:
    """(R + spare, O): every expert's rows times its own matrix, rows[e] @ weight[e].T, and zeros."""
    return _grouped_mm(rows, weight_EOI.transpose(1, 2), counts, spare)


def grouped_linear_backward_input(
    grad: Tensor, weight_EOI: Tensor, counts: Tensor, spare: int = 0
) -> Tensor:
    """(R + spare, I): gradient of `grouped_linear` for its rows, grad[e] @ weight[e], and zeros."""
    return _grouped_mm(grad, weight_EOI, counts, spare)


def _grouped_mm(rows: Tensor, matrix_EIO: Tensor, counts: Tensor, spare: int) -> Tensor:
    num_in, num_out = matrix_EIO.shape[1:]
    if _grouped_mm_runs(rows, num_in, num_out):
        out = F.grouped_mm(rows, matrix_EIO, offs=counts.cumsum(0).to(torch.int32))
        return F.pad(out, (0, 0, 0, spare)) if spare else out
    out = rows.new_empty(rows.shape[0] + spare, num_out)
    out[rows.shape[0] :] = 0
    start = 0
    for expert, count in enumerate(counts.tolist()):
        if count:
            part = slice(start, start + count)
            torch.mm(rows[part], matrix_EIO[expert], out=out[part])
            start += count
    return out


def grouped_linear_backward_weight(grad: Tensor, rows: Tensor, counts: Tensor) -> Tensor:
    """(E, O, I): gradient of `grouped_linear` with respect to the weight; zero for an idle expert."""
    num_out, num_in = grad.shape[1], rows.shape[1]
    if _grouped_mm_runs(rows, num_out, num_in):
        return F.grouped_mm(grad.t(), rows, offs=counts.cumsum(0).to(torch.int32))
    out = rows.new_zeros(counts.numel(), num_out, num_in)
    start = 0
    for expert, count in enumerate(counts.tolist()):
        if count:
            part = slice(start, start + count)
            torch.mm(grad[part].t(), rows[part], out=out[expert])
            start += count
    return out


def sum_by_token(rows: Tensor, row_of_slot: Tensor) -> Tensor:
    """(T, D): the sum of every token's rows, slot by slot; a gather, so the same on every device.

    `rows` has R + 1 rows, the last one zero: it stands for the slots that are not this bank's.
    """
    out = rows.index_select(0, row_of_slot[:, 0])
    for slot in range(1, row_of_slot.shape[1]):
        out += rows.index_select(0, row_of_slot[:, slot])
    return out


def _sum_bias_rows(grad: Tensor, counts: Tensor) -> Tensor:
    """(E, O): the sum of every expert's rows."""
    experts = torch.repeat_interleave(torch.arange(counts.numel(), device=grad.device), counts)
    return grad.new_zeros(counts.numel(), grad.shape[1]).index_add_(0, experts, grad)


class _BankFunction(torch.autograd.Function):
    """Gather rows, two grouped GEMMs, sum by token. See the module's docstring."""

    @staticmethod
    def forward(ctx, x_TD, weight_TS, gate_up, down, gate_up_bias, down_bias, plan, shape):
        x_RD = x_TD.index_select(0, plan.row_token)
        h_R2I = grouped_linear(x_RD, gate_up, plan.counts)
        weight_R = weight_TS.reshape(-1).index_select(0, plan.row_slot)
        if gate_up_bias is not None:
            h_R2I += gate_up_bias.repeat_interleave(plan.counts, dim=0)
        scaled_RI = activate(h_R2I, shape).mul_(weight_R.to(h_R2I.dtype).unsqueeze(1))
        out_RD = grouped_linear(scaled_RI, down, plan.counts, spare=1)
        if down_bias is not None:
            rows_bias = down_bias.repeat_interleave(plan.counts, dim=0)
            out_RD[:-1] += rows_bias * weight_R.to(out_RD.dtype).unsqueeze(1)
        ctx.plan, ctx.shape = plan, shape
        trains = gate_up.requires_grad
        ctx.save_for_backward(
            x_TD if trains else None, h_R2I, weight_R, gate_up, down, gate_up_bias, down_bias
        )
        return sum_by_token(out_RD, plan.row_of_slot)

    @staticmethod
    def backward(ctx, grad_TD):
        x_TD, h_R2I, weight_R, gate_up, down, gate_up_bias, down_bias = ctx.saved_tensors
        plan, shape = ctx.plan, ctx.shape
        x_live, weight_live, bank_live = ctx.needs_input_grad[:3]
        grad_RD = grad_TD.index_select(0, plan.row_token)
        grad_scaled_RI = grouped_linear_backward_input(grad_RD, down, plan.counts)

        act_RI = activate(h_R2I, shape) if weight_live or bank_live else None
        grad_weight_TS = None
        if weight_live:
            grad_weight_R = (grad_scaled_RI * act_RI).sum(-1, dtype=weight_R.dtype)
            if down_bias is not None:
                rows_bias = down_bias.repeat_interleave(plan.counts, dim=0)
                grad_weight_R += (grad_RD * rows_bias).sum(-1, dtype=weight_R.dtype)
            flat = grad_weight_R.new_zeros(plan.row_of_slot.numel())
            grad_weight_TS = flat.index_copy_(0, plan.row_slot, grad_weight_R)
            grad_weight_TS = grad_weight_TS.view_as(plan.row_of_slot)

        scale_R1 = weight_R.to(h_R2I.dtype).unsqueeze(1)
        grad_gate_up = grad_down = grad_gate_up_bias = grad_down_bias = grad_x_TD = None
        if bank_live:
            grad_down = grouped_linear_backward_weight(grad_RD, act_RI.mul_(scale_R1), plan.counts)
            if down_bias is not None:
                grad_down_bias = _sum_bias_rows(grad_RD * scale_R1, plan.counts)
        if bank_live or x_live:
            grad_h_R2I = activate_backward(h_R2I, grad_scaled_RI.mul_(scale_R1), shape)
        if bank_live:
            x_RD = x_TD.index_select(0, plan.row_token)
            grad_gate_up = grouped_linear_backward_weight(grad_h_R2I, x_RD, plan.counts)
            if gate_up_bias is not None:
                grad_gate_up_bias = _sum_bias_rows(grad_h_R2I, plan.counts)
        if x_live:
            grad_x_RD = grouped_linear_backward_input(grad_h_R2I, gate_up, plan.counts, spare=1)
            grad_x_TD = sum_by_token(grad_x_RD, plan.row_of_slot)
        grads = (grad_gate_up, grad_down, grad_gate_up_bias, grad_down_bias)
        return grad_x_TD, grad_weight_TS, *grads, None, None


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

    def forward(self, x_TD: Tensor, local_TS: Tensor, weight_TS: Tensor) -> Tensor:
        """(T, D): the weighted sum of the outputs of the experts held here.

        Ids in `local_TS` count the experts held here from 0; any id outside is skipped. With no
        row at all the result is zero and still depends on every trainable tensor: a rank whose
        tokens choose no expert takes part in the gradient reduction like all others.
        """
        if not self.expert_ids:
            return torch.zeros_like(x_TD)
        plan = plan_rows(local_TS, len(self.expert_ids))
        biases = (self.gate_up_bias, self.down_bias)
        return _BankFunction.apply(
            x_TD, weight_TS, self.gate_up, self.down, *biases, plan, self.shape
        )


class FrozenBank(Bank):
    """Pretrained experts: buffers, so neither an optimizer nor DeepSpeed's broadcast sees them."""

    def __init__(self, shape, expert_ids, num_experts, placement, *, dtype, device="cpu"):
        super().__init__(shape, expert_ids, num_experts, placement)
        shapes = self.tensor_shapes()
        for name in ("gate_up", "down", "gate_up_bias", "down_bias"):
            tensor = None
            if name in shapes:
                tensor = torch.empty(shapes[name], dtype=dtype, device=device)
            self.register_buffer(name, tensor, persistent=False)


class NewBank(Bank):
    """Trainable experts."""

    def __init__(self, shape, expert_ids, num_experts, placement, *, dtype, device="cpu"):
        super().__init__(shape, expert_ids, num_experts, placement)
        shapes = self.tensor_shapes()
        for name in ("gate_up", "down", "gate_up_bias", "down_bias"):
            parameter = None
            if name in shapes:
                parameter = nn.Parameter(torch.zeros(shapes[name], dtype=dtype, device=device))
            self.register_parameter(name, parameter)
