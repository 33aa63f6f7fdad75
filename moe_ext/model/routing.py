"""Which experts a token gets, and with what weight: the family's own rule, extended.

Shape letters: T tokens, E frozen experts, N new experts of one extension, X = E + all new experts,
K = top_k, S slots = K + one for every new expert that shares its source's slot.

Frozen rows are multiplied by a GEMM of their own, and a token that may not choose new experts is
routed by the frozen logits alone, so that its routing is the base's bit by bit: a wider product or
a wider softmax would round otherwise.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_ext.model.context import LayerRecord, RoutingContext
from moe_ext.model.row_plan import NO_EXPERT
from moe_ext.model.shared_slots import merge_shared


@dataclass
class RoutingRule:
    """A family's routing in numbers."""

    top_k: int
    score: str = "softmax"
    """`softmax` and `sigmoid` over all experts; `topk_softmax`: softmax over the chosen logits."""
    renormalise: bool = True
    """Divide the chosen scores by their sum."""
    scale: float = 1.0
    eps: float = 0.0
    """Added to the sum that renormalises."""
    num_groups: int = 1
    groups_kept: int = 1
    """Only experts of the best groups may be chosen (DeepSeek-V2 and V3)."""
    group_score: str = "max"
    """`max` or `top2_sum` of the choice scores of a group's experts."""
    masked_score: float = float("-inf")
    """Choice score of the experts of the other groups."""
    fp32_logits: bool = False
    """Multiply all rows, new ones too, in fp32 rather than in the model's dtype."""


@dataclass
class Routing:
    """The router's decision: ids and weights of every token's slots."""

    expert_TS: Tensor
    weight_TS: Tensor
    """fp32; zero in an empty slot."""


class Router(nn.Module):
    """The base's rule over frozen rows and the rows of every extension."""

    frozen_weight: Tensor
    frozen_bias: Tensor | None
    correction_bias: Tensor | None

    def __init__(self, rule: RoutingRule, num_experts: int, hidden_dim: int, *, dtype, device="cpu",
                 bias: bool = False, correction_bias: bool = False):  # fmt: skip
        super().__init__()
        self.rule, self.num_frozen = rule, num_experts

        def buffer(name: str, wanted: bool, *size: int, dtype=dtype) -> None:
            tensor = torch.zeros(*size, dtype=dtype, device=device) if wanted else None
            self.register_buffer(name, tensor, persistent=False)

        buffer("frozen_weight", True, num_experts, hidden_dim)
        buffer("frozen_bias", bias, num_experts)
        buffer("correction_bias", correction_bias, num_experts, dtype=torch.float32)
        self.register_parameter("delta", None)
        self.rows = nn.ModuleDict()

    def add_delta(self) -> None:
        """A trainable difference to every frozen row, zero now: what the probe trains."""
        self.delta = nn.Parameter(torch.zeros_like(self.frozen_weight))

    def drop_delta(self) -> None:
        self.delta = None

    def forward(self, x_TD: Tensor, context: RoutingContext, layer_index: int) -> Routing:
        """Ids and weights of every slot; leaves a record in the context.

        In a recomputation inside backward the ids are taken from the first pass's record, since a
        near tie may choose otherwise the second time.

        Raises:
            ValueError: the context is of another pass, by its number of tokens.
        """
        if context.segment_BS.numel() != x_TD.shape[0]:
            raise ValueError(
                f"layer {layer_index} got {x_TD.shape[0]} tokens, but the routing context is of "
                f"{' x '.join(map(str, context.segment_BS.shape))}: it belongs to another pass; set "
                "this one's by `with lm.context_holder.during(context)`, or none for plain text"
            )
        earlier = context.records[layer_index] if context.replays else None
        if self.rule.fp32_logits:
            x_TD = x_TD.float()
        logits_TE = self._frozen_logits(x_TD)
        valid_T = context.valid_T
        if not self.rows:
            prob_TE = _probabilities(self.rule, logits_TE)
            chosen_TK = earlier.base_expert_TK if earlier else self._choose(prob_TE, logits_TE)
            weight_TK = _base_weights(self.rule, prob_TE, logits_TE, chosen_TK)
            expert_TS = chosen_TK.masked_fill(~valid_T.unsqueeze(1), NO_EXPERT)
            record = LayerRecord(expert_TS, self.num_frozen, base_expert_TK=chosen_TK)
            self._record_losses(record, prob_TE, logits_TE, None, valid_T, context)
            if earlier is None:
                context.records[layer_index] = record
            return Routing(expert_TS, weight_TK.masked_fill(~valid_T.unsqueeze(1), 0.0))
        return self._extended(x_TD, logits_TE, context, layer_index, earlier)

    def _frozen_logits(self, x_TD: Tensor) -> Tensor:
        """(T, E) fp32."""
        logits_TE = F.linear(x_TD, self.frozen_weight.to(x_TD.dtype), self.frozen_bias).float()
        if self.delta is not None:
            logits_TE = logits_TE + F.linear(x_TD, self.delta.to(x_TD.dtype)).float()
        return logits_TE

    def _choose(self, prob_TX: Tensor, logits_TX: Tensor) -> Tensor:
        """(T, K) ids by the family's rule; columns past E are new experts, in no group."""
        rule, num_frozen = self.rule, self.num_frozen
        choice_TX = logits_TX if rule.score == "topk_softmax" else prob_TX
        choice_TX = choice_TX.detach()
        corrected = self.correction_bias is not None
        corrected |= choice_TX.shape[1] > num_frozen and any(
            rows.correction is not None for rows in self.rows.values()
        )
        if corrected:
            choice_TX = choice_TX + self._correction(choice_TX)
        if choice_TX.shape[1] > num_frozen:
            # closed to the token, or without a slot of its own: no correction may open it
            choice_TX = choice_TX.masked_fill(logits_TX.isneginf(), float("-inf"))
        if rule.num_groups > 1:
            frozen_TE, new_TN = choice_TX.split([num_frozen, choice_TX.shape[1] - num_frozen], 1)
            grouped = frozen_TE.reshape(frozen_TE.shape[0], rule.num_groups, -1)
            if rule.group_score == "max":
                score_TG = grouped.amax(-1)
            else:
                score_TG = grouped.topk(2, dim=-1).values.sum(-1)
            kept = score_TG.topk(rule.groups_kept, dim=-1).indices
            keeps_TG = torch.zeros_like(score_TG, dtype=torch.bool).scatter_(1, kept, True)
            frozen_TE = torch.where(keeps_TG.unsqueeze(-1), grouped, rule.masked_score).flatten(1)
            choice_TX = torch.cat([frozen_TE, new_TN], 1)
        return choice_TX.topk(rule.top_k, dim=-1).indices

    def _correction(self, choice_TX: Tensor) -> Tensor:
        """(E,) or (X,) fp32, as wide as the scores: what the choice adds to them."""
        own = self.correction_bias
        parts = [choice_TX.new_zeros(self.num_frozen) if own is None else own]
        if choice_TX.shape[1] > self.num_frozen:
            for rows in self.rows.values():
                zeros = choice_TX.new_zeros(rows.weight.shape[0])
                parts.append(zeros if rows.correction is None else rows.correction)
        return torch.cat(parts)

    @torch.no_grad()
    def balance_corrections(
        self, count_X: Tensor, rate: float, extension: str | None = None
    ) -> None:
        """Loss-free balancing (arXiv 2408.15664) of the new experts only: one step of size `rate`.

        Args:
            count_X: how often the counted tokens of all ranks chose each expert in this step.
            extension: the only one that may move; None: all.
        """
        mean, first = count_X.float().mean(), self.num_frozen
        for name, rows in self.rows.items():
            own = count_X[first : first + rows.weight.shape[0]].float()
            first += rows.weight.shape[0]
            moves = rows.learns_correction and extension in (None, name)
            if moves and count_X.sum() > 0:
                rows.correction += rate * torch.sign(mean - own)

    def _extended(self, x_TD, logits_TE, context, layer_index, earlier) -> Routing:
        """Base routing for tokens that may choose no new expert, extended routing for the others."""
        rule, valid_T = self.rule, context.valid_T
        blocks, extended_T = [], torch.zeros_like(valid_T)
        for rows in self.rows.values():
            allowed_T = context.allowed_T(rows.scope, rows.modalities)
            extended_T = extended_T | allowed_T
            blocks.append(rows.logits(x_TD).masked_fill(~allowed_T.unsqueeze(1), float("-inf")))
        sources = [rows.shared_with for rows in self.rows.values()]
        shared = merge_shared(logits_TE, blocks, sources) if any(sources) else None
        routed_TX = torch.cat([logits_TE, *blocks], 1) if shared is None else shared.logits_TX
        prob_TX = _probabilities(rule, routed_TX)
        expert_TS = self._choose(prob_TX, routed_TX)
        if shared is not None:
            prob_TX, expert_TS = shared.divide(prob_TX, expert_TS)
        calibrated_TX = self._calibrate(prob_TX, context)

        base_TK = base_weight_TS = None
        scopes = [rows.scope for rows in self.rows.values()]
        if context.keeps_base_choice or not context.all_allowed(extended_T, scopes):
            prob_TE = _probabilities(rule, logits_TE)
            base_TK = earlier.base_expert_TK if earlier else self._choose(prob_TE, logits_TE)
            pad_S = expert_TS.shape[1] - base_TK.shape[1]
            base_weight_TS = F.pad(_base_weights(rule, prob_TE, logits_TE, base_TK), (0, pad_S))
            base_TS = F.pad(base_TK, (0, pad_S), value=NO_EXPERT)
            expert_TS = torch.where(extended_T.unsqueeze(1), expert_TS, base_TS)
        expert_TS = expert_TS.masked_fill(~valid_T.unsqueeze(1), NO_EXPERT)
        if earlier is not None:
            expert_TS = earlier.expert_TS
        record = LayerRecord(expert_TS, routed_TX.shape[1], base_expert_TK=base_TK)
        counted_T = extended_T & valid_T
        # routed_TX: a clone that shares its source's slot is no divergence at step 0
        self._record_losses(record, prob_TX, routed_TX, logits_TE, counted_T, context)
        if earlier is None:
            context.records[layer_index] = record

        weight_TS = _weights(rule, prob_TX, calibrated_TX, expert_TS)
        if base_weight_TS is not None:
            weight_TS = torch.where(extended_T.unsqueeze(1), weight_TS, base_weight_TS)
        return Routing(expert_TS, weight_TS.masked_fill(expert_TS < 0, 0.0))

    def _calibrate(self, prob_TX: Tensor, context: RoutingContext) -> Tensor:
        """(T, X): each extension corrects the columns that it was trained with: frozen and its own.

        The probabilities it sees are those of these columns alone, so that an extension loaded
        beside another one sees what it saw in training.
        """
        total_TX, first = prob_TX, self.num_frozen
        for rows in self.rows.values():
            width = rows.weight.shape[0]
            if rows.calibration is not None:
                own = slice(first, first + width)
                seen = torch.cat([prob_TX[:, : self.num_frozen], prob_TX[:, own]], 1)
                if len(self.rows) > 1 and self.rule.score != "sigmoid":
                    seen = seen / seen.sum(1, keepdim=True).clamp_min(1e-20)
                allowed_T = context.allowed_T(rows.scope, rows.modalities)
                change = rows.calibration(seen) * allowed_T.unsqueeze(1)
                frozen, new = change.split([self.num_frozen, width], 1)
                right = prob_TX.shape[1] - first - width
                left = first - self.num_frozen
                total_TX = total_TX + torch.cat([frozen, F.pad(new, (left, right))], 1)
            first += width
        return total_TX

    def _record_losses(self, record, prob_TX, logits_TX, base_TE, counted_T, context) -> None:
        """What the losses need. A recomputation repeats it: it must save the same tensors."""
        if not context.with_losses:
            return
        record.counted_T = counted_T
        prob_TX, logits_TX = prob_TX[counted_T], logits_TX[counted_T]
        if self.rule.score == "sigmoid":  # scores of their own: shares of a token's (DeepSeek-V3)
            prob_TX = prob_TX / prob_TX.sum(1, keepdim=True)
        record.prob_sum_X = prob_TX.sum(0)
        record.z_sum = logits_TX.logsumexp(-1).square().sum()
        if base_TE is not None:
            base_TE = _log_shares(self.rule, base_TE[counted_T])
            extended_TE = _log_shares(self.rule, logits_TX)[:, : self.num_frozen]
            record.kl_sum = (base_TE.exp() * (base_TE - extended_TE)).sum()


def _probabilities(rule: RoutingRule, logits_TX: Tensor) -> Tensor:
    return logits_TX.sigmoid() if rule.score == "sigmoid" else logits_TX.softmax(-1)


def _log_shares(rule: RoutingRule, logits_TX: Tensor) -> Tensor:
    """Logarithms of each expert's share of a token's scores; shares sum to one."""
    return (F.logsigmoid(logits_TX) if rule.score == "sigmoid" else logits_TX).log_softmax(-1)


def _base_weights(rule: RoutingRule, prob_TE: Tensor, logits_TE: Tensor, expert_TK: Tensor):
    """(T, K) fp32 weights of experts that the frozen rows chose, as transformers rounds them."""
    if rule.score == "topk_softmax":
        return logits_TE.gather(1, expert_TK).softmax(-1) * rule.scale
    return _weights(rule, prob_TE, prob_TE, expert_TK)


def _weights(rule: RoutingRule, prob_TX: Tensor, calibrated_TX: Tensor, expert_TS: Tensor):
    """(T, S) fp32 weights of the chosen experts.

    Calibration can push a sum to zero or below. The divisor is therefore never less than half of
    the uncalibrated sum: the identity while calibration is small, at most doubling after.
    """
    slot_TS = expert_TS.clamp(min=0)
    empty_TS = expert_TS < 0
    weight_TS = calibrated_TX.gather(1, slot_TS).masked_fill(empty_TS, 0.0)
    if rule.renormalise or rule.score == "topk_softmax":
        chosen_TS = prob_TX.gather(1, slot_TS).masked_fill(empty_TS, 0.0)
        floor = 0.5 * chosen_TS.sum(1, keepdim=True)
        total = torch.maximum(weight_TS.sum(1, keepdim=True), floor)
        weight_TS = weight_TS / (total + rule.eps).clamp_min(1e-20)
    return weight_TS * rule.scale
