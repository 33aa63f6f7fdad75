"""New experts that are a low-rank difference to a pretrained one (Uni-MoE, stage 3).

Shape letters: n experts held here, r rank, R rows sorted by expert, D hidden width, I intermediate
width, T tokens, S slots a token.

Expert e computes with `W_source + (alpha / r) B_e A_e` in the place of each of its three matrices. The
source's matrices are a frozen copy in buffers, so that an expert needs nothing of the rank that holds
its source; what trains, travels and is saved is A and B. B starts at zero: the expert is its source.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_ext.config import Placement
from moe_ext.model.activations import ExpertShape, activate
from moe_ext.model.experts import Bank
from moe_ext.model.grouped import sum_by_token
from moe_ext.model.row_plan import RowPlan


class LoraBank(Bank):
    """Experts `source + low-rank difference`; see the module's docstring.

    Parameters: `gate_up_a` (n, 2, r, D) and `gate_up_b` (n, 2, I, r), gate first; `down_a` (n, r, I)
    and `down_b` (n, D, r).
    """

    def __init__(
        self,
        shape: ExpertShape,
        expert_ids: list[int],
        num_experts: int,
        placement: Placement,
        *,
        rank: int,
        alpha: float,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ):
        super().__init__(shape, expert_ids, num_experts, placement)
        self.rank, self.alpha = rank, alpha
        self._hold(False, torch.zeros, dtype=dtype, device=device)
        held, dim, wide = len(expert_ids), shape.hidden_dim, shape.intermediate_dim

        def zeros(*size: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(held, *size, dtype=dtype, device=device))

        self.gate_up_a, self.gate_up_b = zeros(2, rank, dim), zeros(2, wide, rank)
        self.down_a, self.down_b = zeros(rank, wide), zeros(dim, rank)

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @torch.no_grad()
    def start(self, slot: int, stream: torch.Generator) -> None:
        """Draw A of entry `slot` with variance 1 / width, B stays zero."""
        for a in (self.gate_up_a[slot], self.down_a[slot]):
            a.copy_(torch.randn(a.shape, generator=stream) * a.shape[-1] ** -0.5)

    def forward(self, x_TD: Tensor, weight_TS: Tensor, plan: RowPlan, some: bool = False) -> Tensor:
        """As `Bank.forward`. Autograd sees the source as data: no weight gradient."""
        x_RD = x_TD.index_select(0, plan.row_token)
        weight_R = weight_TS.reshape(-1).index_select(0, plan.row_slot)
        counts = plan.count_list
        # unbind: an index into a trainable stack in a loop has a backward quadratic in n
        matrices = [t.unbind(0) for t in (self.gate_up_a, self.gate_up_b, self.down_a, self.down_b)]
        out = [x_RD[:0] * weight_R[:0].to(x_RD.dtype).unsqueeze(1)]  # in the graph without experts
        # an expert without rows stays in the graph with zero rows
        for slot, (x, weight) in enumerate(
            zip(x_RD.split(counts), weight_R.split(counts), strict=True)
        ):
            out.append(self._expert(slot, x, weight, *(matrix[slot] for matrix in matrices)))
        return sum_by_token(torch.cat(out), plan.bags.of(plan.token_U if some else None))

    def _expert(
        self,
        slot: int,
        x_RD: Tensor,
        weight_R: Tensor,
        gate_up_a: Tensor,
        gate_up_b: Tensor,
        down_a: Tensor,
        down_b: Tensor,
    ) -> Tensor:
        gate_up_bias = None if self.gate_up_bias is None else self.gate_up_bias[slot]
        down_bias = None if self.down_bias is None else self.down_bias[slot]
        low = [F.linear(F.linear(x_RD, a), b) for a, b in zip(gate_up_a, gate_up_b, strict=True)]
        h = F.linear(x_RD, self.gate_up[slot], gate_up_bias) + self.scale * torch.cat(low, -1)
        act = activate(h, self.shape)
        out = F.linear(act, self.down[slot], down_bias)
        out = out + self.scale * F.linear(F.linear(act, down_a), down_b)
        return out * weight_R.to(out.dtype).unsqueeze(1)

    @torch.no_grad()
    def merged(self, slot: int) -> tuple[Tensor, Tensor]:
        """`gate_up` (2I, D) and `down` (D, I) of entry `slot` with the difference added, fp32."""
        gate_up_b, gate_up_a = self.gate_up_b[slot].float(), self.gate_up_a[slot].float()
        difference = (gate_up_b @ gate_up_a).flatten(0, 1)
        gate_up = self.gate_up[slot].float() + self.scale * difference
        difference = self.down_b[slot].float() @ self.down_a[slot].float()
        return gate_up, self.down[slot].float() + self.scale * difference
