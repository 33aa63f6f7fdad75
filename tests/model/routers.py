"""Routers of every rule with random rows, and an honest loop over tokens that computes the same."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_ext.config import CalibrationKind, Scope
from moe_ext.model.context import RoutingContext
from moe_ext.model.routing import Router, RoutingRule
from moe_ext.model.rows import Calibration, NewRows
from tests.model.layers import DIM, allowed, sequences

NUM_FROZEN = 6


@dataclass
class Rule:
    """A family's rule, and what its router has beside rows."""

    rule: RoutingRule
    bias: bool = False
    correction: bool = False
    dtype: torch.dtype = torch.float32
    """Of the hidden states; rows are fp32."""


def _grouped(**more) -> RoutingRule:
    return RoutingRule(2, num_groups=3, groups_kept=2, **more)


RULES = {
    "softmax": Rule(RoutingRule(2)),
    "softmax, as it is": Rule(RoutingRule(3, renormalise=False)),
    "DeepSeek-V2": Rule(_grouped(renormalise=False, scale=1.5, masked_score=0.0)),
    "sigmoid": Rule(RoutingRule(2, score="sigmoid")),
    "DeepSeek-V3": Rule(
        _grouped(score="sigmoid", group_score="top2_sum", scale=2.5, eps=1e-20), correction=True
    ),
    "GPT-OSS": Rule(RoutingRule(3, score="topk_softmax"), bias=True),
    "Ernie": Rule(RoutingRule(2, fp32_logits=True), correction=True, dtype=torch.bfloat16),
}


@dataclass
class Added:
    """One extension: two new experts."""

    modality: int = 1
    scope: Scope = Scope.joint
    calibration: CalibrationKind = CalibrationKind.none
    shares: tuple[int, ...] = ()
    """The frozen experts whose slots it shares."""
    correction: bool = False


_MODALITY, _SHARED = {"scope": Scope.modality}, {"shares": (3, 1)}
EXTENSIONS = {
    "none": [],
    "one": [Added()],
    "vector_add": [Added(calibration=CalibrationKind.vector_add)],
    "mlp_add": [Added(calibration=CalibrationKind.mlp_add)],
    "corrected": [Added(correction=True)],
    "clones": [Added(**_SHARED)],
    "calibrated clones": [Added(calibration=CalibrationKind.mlp_add, **_SHARED)],
    "two, each its modality": [Added(1, **_MODALITY), Added(2, correction=True, **_MODALITY)],
    "two calibrated": [
        Added(1, calibration=CalibrationKind.mlp_add),
        Added(2, Scope.modality, calibration=CalibrationKind.vector_add),
    ],
    "two that all may choose": [Added(1), Added(2, Scope.preserve, correction=True)],
    "clones of one source, each its modality": [
        Added(1, **_MODALITY, **_SHARED), Added(2, **_MODALITY, shares=(2, 3)),
    ],
    "clones of one source": [Added(1, **_SHARED), Added(2, shares=(3, 0)), Added(3)],
}  # fmt: skip


def build_router(rule: Rule, added: list[Added]) -> Router:
    """A router of random rows."""
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int, std: float = 0.5) -> Tensor:
        return std * torch.randn(*size, generator=generator)

    router = Router(rule.rule, NUM_FROZEN, DIM, dtype=torch.float32, bias=rule.bias,
                    correction_bias=rule.correction)  # fmt: skip
    router.frozen_weight.copy_(draw(NUM_FROZEN, DIM))
    if router.frozen_bias is not None:
        router.frozen_bias.copy_(draw(NUM_FROZEN))
    if router.correction_bias is not None:
        # scores as of a trained base: all are moved up, so that nothing is still more than a score
        router.correction_bias.copy_(1.0 + draw(NUM_FROZEN, std=0.1))
    for number, extension in enumerate(added):
        calibration = None
        if extension.calibration is not CalibrationKind.none:
            kind, width = extension.calibration, NUM_FROZEN + 2
            calibration = Calibration(kind, width, dtype=torch.float32, seed=number)
            for parameter in calibration.parameters():
                parameter.data.copy_(draw(*parameter.shape, std=0.05))
        corrects = rule.correction or extension.correction
        router.rows[f"extension{number}"] = NewRows(
            draw(2, DIM),
            draw(2, std=0.2),
            extension.scope,
            (extension.modality,),
            calibration,
            list(extension.shares),
            (1.0 if rule.correction else 0.2) + draw(2, std=0.1) if corrects else None,
        )
    return router


def mixed() -> RoutingContext:
    """Images, sounds, packed segments and padding."""
    context = sequences(4, 10, seed=3)
    modality = context.modality_BS.clone()
    modality[1, 2:4] = 2
    modality[3, 5:8] = 2
    return RoutingContext(modality * (context.segment_BS > 0), context.segment_BS)


def _scores(rule: RoutingRule, logits: dict[int, Tensor]) -> dict[int, Tensor]:
    """Probabilities of the slots, or scores: what the weights are made of."""
    if rule.score == "sigmoid":
        return {e: 1 / (1 + torch.exp(-logit)) for e, logit in logits.items()}
    total = sum(torch.exp(logit) for logit in logits.values())
    return {e: torch.exp(logit) / total for e, logit in logits.items()}


def _kept_groups(rule: RoutingRule, choice: list[float]) -> set[int]:
    """Frozen experts that may be chosen."""
    size = NUM_FROZEN // rule.num_groups
    groups = [list(range(g * size, (g + 1) * size)) for g in range(rule.num_groups)]
    number = 1 if rule.group_score == "max" else 2
    value = [sum(sorted((choice[e] for e in group), reverse=True)[:number]) for group in groups]
    best = sorted(range(rule.num_groups), key=lambda g: -value[g])[: rule.groups_kept]
    return {e for g in best for e in groups[g]}


@dataclass
class Routed:
    """One token, by the loop."""

    logit: dict[int, Tensor]
    """Frozen expert, or new one in a slot of its own -> the logit of its slot."""
    share: dict[int, Tensor]
    """Expert -> its probability or score, a slot's divided among those that share it."""
    chosen: list[int]
    slot: dict[int, list[int]]
    """A slot's expert -> those that share it."""


def route(router: Router, x: Tensor, open_rows: list[tuple[int, NewRows]]) -> Routed:
    """What the router makes of one token that may choose the experts of `open_rows` (first id, rows)."""
    rule = router.rule
    logit = {e: router.frozen_weight[e] @ x for e in range(NUM_FROZEN)}
    if router.frozen_bias is not None:
        logit = {e: value + router.frozen_bias[e] for e, value in logit.items()}
    correction = dict.fromkeys(range(NUM_FROZEN), 0.0)
    if router.correction_bias is not None:
        correction = {e: float(router.correction_bias[e]) for e in range(NUM_FROZEN)}
    slot = {e: [e] for e in range(NUM_FROZEN)}
    for first, rows in open_rows:
        for i in range(2):
            logit[first + i] = rows.weight[i] @ x + rows.bias[i]
            slot.setdefault(rows.shared_with[i] if rows.shared_with else first + i, [])
            slot[rows.shared_with[i] if rows.shared_with else first + i].append(first + i)
            correction[first + i] = 0.0 if rows.correction is None else float(rows.correction[i])
    together = {
        e: torch.log(sum(torch.exp(logit[m]) for m in members) / len(members))
        for e, members in slot.items()
    }
    score = _scores(rule, together)
    choice = together if rule.score == "topk_softmax" else score
    choice = {e: value.item() + correction[e] for e, value in choice.items()}
    kept = _kept_groups(rule, [choice[e] for e in range(NUM_FROZEN)])
    candidates = [e for e in choice if e >= NUM_FROZEN or e in kept]
    chosen = sorted(candidates, key=lambda e: -choice[e])[: rule.top_k]
    share = {
        m: score[e] * torch.exp(logit[m]) / sum(torch.exp(logit[n]) for n in members)
        for e, members in slot.items()
        for m in members
    }
    return Routed(together, share, [m for e in chosen for m in slot[e]], slot)


def weights(router: Router, x: Tensor, open_rows: list[tuple[int, NewRows]]) -> dict[int, Tensor]:
    """Expert -> its weight, of such a token."""
    rule, routed = router.rule, route(router, x, open_rows)
    share, calibrated = routed.share, dict(routed.share)
    for first, rows in open_rows:
        if rows.calibration is None:
            continue
        own = [*range(NUM_FROZEN), first, first + 1]
        seen = torch.stack([share[e] for e in own])
        if rule.score != "sigmoid":  # among the columns that it was trained with
            seen = seen / seen.sum()
        calibration = rows.calibration
        if calibration.kind is CalibrationKind.vector_add:
            change = calibration.vector
        else:
            hidden = calibration.w2 @ seen
            hidden = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
            change = calibration.w1 @ hidden
        for e, value in zip(own, change, strict=True):
            calibrated[e] = calibrated[e] + value
    weight = {m: calibrated[m] for m in routed.chosen}
    if rule.renormalise or rule.score == "topk_softmax":
        floor = 0.5 * sum(share[m] for m in routed.chosen)
        total = torch.maximum(sum(weight.values()), floor)
        weight = {m: value / total for m, value in weight.items()}
    return {m: value * rule.scale for m, value in weight.items()}


def open_rows(router: Router, context: RoutingContext, b: int, s: int) -> list:
    """(First id, rows) of the extensions that a token may choose."""
    segment, found = context.segment_BS[b].tolist(), []
    for number, rows in enumerate(router.rows.values()):
        own = [int(m in rows.modalities) for m in context.modality_BS[b].tolist()]
        if allowed(own, segment, s, rows.scope):
            found.append((NUM_FROZEN + 2 * number, rows))
    return found
