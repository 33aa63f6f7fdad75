"""Negative log-likelihoods of targets under a frozen output layer; all logits never exist at once.

The layer's weights need no gradient, so the gradient of a row's likelihood for its hidden state is
known as soon as its logits are: forward takes some rows at a time, keeps that gradient (Z, D), and
lets the logits go. The products are those of logits kept for backward; the memory is not.

Shape letters: Z target positions, z those of one part, D hidden width, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LOGIT_BYTES = 256 << 20
"""Of fp32 logits in one part, at most (one row where a row is larger)."""


def target_nll(
    hidden_ZD: Tensor, head: nn.Linear, target_Z: Tensor, divisor: float = 1.0
) -> Tensor:
    """(Z,) fp32: -log softmax(head(hidden) / divisor) at every row's target, in nats."""
    if any(p.requires_grad for p in head.parameters()):
        logits_ZV = (head(hidden_ZD) / divisor).float()
        return F.cross_entropy(logits_ZV, target_Z, reduction="none")
    return _FrozenHead.apply(hidden_ZD, head.weight, head.bias, target_Z, divisor)


class _FrozenHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ZD, weight_VD, bias_V, target_Z, divisor):
        live = ctx.needs_input_grad[0]
        nll_Z = hidden_ZD.new_empty(len(target_Z), dtype=torch.float32)
        grad_ZD = torch.empty_like(hidden_ZD) if live else None
        step = max(1, LOGIT_BYTES // (4 * len(weight_VD)))
        for first in range(0, len(target_Z), step):
            part = slice(first, first + step)
            target_z1 = target_Z[part].unsqueeze(1)
            logits_zV = F.linear(hidden_ZD[part], weight_VD, bias_V)
            logits_zV = logits_zV if divisor == 1.0 else logits_zV / divisor
            log_prob_zV = F.log_softmax(logits_zV.float(), dim=1)
            nll_Z[part] = -log_prob_zV.gather(1, target_z1).squeeze(1)
            if live:
                grad_zV = log_prob_zV.exp_()
                grad_zV.scatter_add_(1, target_z1, grad_zV.new_full(target_z1.shape, -1.0))
                grad_zV = grad_zV if divisor == 1.0 else grad_zV.div_(divisor)
                torch.mm(grad_zV.to(weight_VD.dtype), weight_VD, out=grad_ZD[part])
        ctx.save_for_backward(grad_ZD)
        return nll_Z

    @staticmethod
    def backward(ctx, grad_Z):
        (grad_ZD,) = ctx.saved_tensors
        return (grad_ZD * grad_Z.unsqueeze(1)).to(grad_ZD.dtype), None, None, None, None
