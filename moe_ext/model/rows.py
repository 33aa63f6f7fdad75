"""What an extension adds to a router: its rows, their biases, and a calibration.

Shape letters: T tokens, N new experts of one extension, X all experts of a layer, D hidden width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_ext.config import CalibrationKind, Scope


class Calibration(nn.Module):
    """A learnt correction of the probabilities, zero at the start (MoExtend's code, `WeightScale`).

    `mlp_add`: p + W1 GELU(W2 p) with a hidden width of 2 (E + N) - 2, the published 9 -> 16 -> 9;
    W2 ~ N(0, 0.02), W1 = 0. `vector_add`: p + v.
    """

    def __init__(self, kind: CalibrationKind, num_experts: int, *, dtype, device="cpu", seed: int):
        super().__init__()
        self.kind = kind
        if kind is CalibrationKind.vector_add:
            self.vector = nn.Parameter(torch.zeros(num_experts, dtype=dtype, device=device))
        else:
            hidden = max(2 * num_experts - 2, 2)
            generator = torch.Generator().manual_seed(seed)
            w2 = 0.02 * torch.randn(hidden, num_experts, generator=generator)
            self.w2 = nn.Parameter(w2.to(device, dtype))
            self.w1 = nn.Parameter(torch.zeros(num_experts, hidden, dtype=dtype, device=device))

    def forward(self, prob_TX: Tensor) -> Tensor:
        """(T, X): what is added to the probabilities, fp32."""
        if self.kind is CalibrationKind.vector_add:
            return self.vector.float().expand_as(prob_TX)
        return F.linear(F.gelu(F.linear(prob_TX, self.w2.float())), self.w1.float())


class NewRows(nn.Module):
    """Router rows of one extension in one layer, with a scalar bias a row.

    `shared_with[i]` is the frozen expert with which new expert i shares one top-k slot and its
    weight, or -1 (row initialisation `clone_shared`). `correction_N` (fp32) is added to the new
    experts' scores when experts are chosen and not when they are weighted: DeepSeek-V3's correction
    bias, and what loss-free balancing moves (`learns_correction`); None is zero.
    """

    correction: Tensor | None

    def __init__(
        self,
        weight_ND: Tensor,
        bias_N: Tensor,
        scope: Scope,
        modalities: tuple[int, ...],
        calibration: Calibration | None = None,
        shared_with: list[int] | None = None,
        correction_N: Tensor | None = None,
        learns_correction: bool = False,
    ):
        super().__init__()
        self.learns_correction = learns_correction
        self.weight, self.bias = nn.Parameter(weight_ND), nn.Parameter(bias_N)
        self.scope, self.modalities, self.calibration = scope, modalities, calibration
        self.shared_with = shared_with or []
        self.register_buffer("correction", correction_N, persistent=False)
        if len(set(self.shared_with)) < len(self.shared_with):
            raise ValueError(
                f"extension.row_init=clone_shared got sources {self.shared_with} in one layer; a source "
                "shares its slot with one clone of an extension: name different sources or use clone"
            )

    def logits(self, x_TD: Tensor) -> Tensor:
        """(T, N) fp32, multiplied in the dtype of `x_TD`."""
        return F.linear(x_TD, self.weight.to(x_TD.dtype)).float() + self.bias.float()
