"""One extended layer with known weights, and an honest per-token loop that computes the same."""

import math
from contextlib import contextmanager

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from moe_ext.config import CalibrationKind, Placement, Scope
from moe_ext.model.context import ContextHolder, RoutingContext
from moe_ext.model.experts import Bank, ExpertShape, FrozenBank, NewBank
from moe_ext.model.moe import ExtendedMoE
from moe_ext.model.placement import cold_experts, owners
from moe_ext.model.routing import Router, RoutingRule
from moe_ext.model.row_plan import RowPlan, plan_rows
from moe_ext.model.rows import Calibration, NewRows

DIM, WIDE = 12, 20


@contextmanager
def counted_bytes(peer: int):
    """A list that grows by the bytes that this rank hands to rank `peer` of two in every exchange."""
    travelled: list[int] = []
    exchange = dist.all_to_all_single

    def spy(out, rows, *splits, **options):
        sent = splits[1] if len(splits) > 1 else [rows.numel() // 2] * 2
        width = rows[:1].numel() if len(splits) > 1 else 1
        travelled.append(sent[peer] * width * rows.element_size())
        return exchange(out, rows, *splits, **options)

    dist.all_to_all_single = spy
    try:
        yield travelled
    finally:
        dist.all_to_all_single = exchange


class Weights:
    """All weights of a layer on one rank, fp32, by seed."""

    def __init__(self, num_frozen: int, num_new: int, seed: int = 0, bias: bool = False):
        generator = torch.Generator().manual_seed(seed)

        def draw(*size: int, std: float = 0.4) -> Tensor:
            return std * torch.randn(*size, generator=generator)

        total = num_frozen + num_new
        self.num_frozen, self.num_new, self.bias = num_frozen, num_new, bias
        self.rows, self.row_bias = draw(total, DIM, std=0.7), draw(num_new, std=0.1)
        self.gate_up, self.down = draw(total, 2 * WIDE, DIM), draw(total, DIM, WIDE)
        self.gate_up_bias, self.down_bias = draw(total, 2 * WIDE), draw(total, DIM)
        self.w1, self.w2 = draw(total, 2 * total - 2, std=0.1), draw(2 * total - 2, total, std=0.5)


def build(
    weights: Weights,
    rule: RoutingRule,
    *,
    activation: str = "silu",
    scope: Scope = Scope.preserve,
    calibration: bool = True,
    shared_with: list[int] | None = None,
    placement: Placement = Placement.replicate,
    group=None,
    rank: int = 0,
    world: int = 1,
    hot: tuple[int, ...] = (),
) -> ExtendedMoE:
    """The layer of `weights` as this rank holds it; no new bank when `num_new` is 0."""
    num_frozen, num_new = weights.num_frozen, weights.num_new
    shape = ExpertShape(DIM, WIDE, activation, bias=weights.bias)
    names = ("gate_up", "down") + (("gate_up_bias", "down_bias") if weights.bias else ())
    cold, on_all = cold_experts(num_frozen, world, Placement.shard, hot)

    def frozen_bank(held: list[int], number: int, where: Placement) -> FrozenBank:
        bank = FrozenBank(shape, held, number, where, dtype=torch.float32)
        for name in names:
            getattr(bank, name).copy_(getattr(weights, name)[held])
        return bank

    held = [cold[e] for e in owners(len(cold), world, Placement.shard)[rank]]
    frozen = frozen_bank(held, len(cold), Placement.shard)
    replicas = frozen_bank(on_all, len(on_all), Placement.replicate) if on_all else None
    router = Router(rule, num_frozen, DIM, dtype=torch.float32)
    router.frozen_weight.copy_(weights.rows[:num_frozen])
    layer = ExtendedMoE(0, router, frozen, None, ContextHolder(), ep_group=group, hot=replicas)
    if num_new:
        held = owners(num_new, world, placement)[rank]
        bank = NewBank(shape, held, num_new, placement, dtype=torch.float32)
        for name in names:
            rows = getattr(weights, name)[[num_frozen + e for e in held]]
            getattr(bank, name).data.copy_(rows)
        calibrate = None
        if calibration:
            total = num_frozen + num_new
            calibrate = Calibration(CalibrationKind.mlp_add, total, dtype=torch.float32, seed=0)
            calibrate.w1.data.copy_(weights.w1)
            calibrate.w2.data.copy_(weights.w2)
        rows = NewRows(
            weights.rows[num_frozen:].clone(),
            weights.row_bias.clone(),
            scope,
            (1,),
            calibrate,
            shared_with,
        )
        layer.add_bank("vision", bank, rows)
    return layer


def rows_of(bank: Bank, local_TS: Tensor, live_T: Tensor | None = None) -> RowPlan:
    """The bank's rows, its experts counted from 0."""
    return plan_rows(local_TS, [(0, len(bank.expert_ids))], live_T)[0]


def allowed(modality: list[int], segment: list[int], position: int, scope: Scope) -> bool:
    """Whether the token at `position` of one sequence may choose new experts, by looking back."""
    if scope is Scope.joint:
        return True
    if scope is Scope.modality:
        return modality[position] == 1
    same = [p for p in range(position + 1) if segment[p] == segment[position]]
    return any(modality[p] == 1 for p in same)


def _scores(rule: RoutingRule, logits: Tensor) -> Tensor:
    return logits.sigmoid() if rule.score == "sigmoid" else logits.softmax(-1)


def loop(
    weights: Weights,
    rule: RoutingRule,
    context: RoutingContext,
    hidden_BSD: Tensor,
    *,
    activation: str = "silu",
    scope: Scope = Scope.preserve,
    calibration: bool = True,
) -> Tensor:
    """The layer's output, one token at a time, in plain PyTorch with autograd through everything."""
    num_frozen = weights.num_frozen
    out = []
    for b in range(hidden_BSD.shape[0]):
        modality = context.modality_BS[b].tolist()
        segment = context.segment_BS[b].tolist()
        for s in range(hidden_BSD.shape[1]):
            x = hidden_BSD[b, s]
            if segment[s] == 0:
                out.append(torch.zeros(DIM))
                continue
            extended = weights.num_new > 0 and allowed(modality, segment, s, scope)
            width = weights.rows.shape[0] if extended else num_frozen
            logits = weights.rows[:width] @ x
            if extended:
                logits = logits + F.pad(weights.row_bias, (num_frozen, 0))
            prob = _scores(rule, logits)
            chosen = prob.topk(rule.top_k).indices.tolist()
            calibrated = prob
            if extended and calibration:
                calibrated = prob + weights.w1 @ F.gelu(weights.w2 @ prob)
            weight = torch.stack([calibrated[e] for e in chosen])
            if rule.renormalise:
                floor = 0.5 * sum(prob[e] for e in chosen)
                weight = weight / torch.maximum(weight.sum(), floor)
            y = torch.zeros(DIM)
            for w, e in zip(weight, chosen, strict=True):
                h = weights.gate_up[e] @ x
                if weights.bias:
                    h = h + weights.gate_up_bias[e]
                gate, up = h[:WIDE], h[WIDE:]
                if activation == "silu":
                    a = gate / (1 + torch.exp(-gate)) * up
                elif activation == "gelu":
                    a = 0.5 * gate * (1 + torch.erf(gate / math.sqrt(2))) * up
                else:
                    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
                    a = gate * torch.sigmoid(1.702 * gate) * (up + 1)
                f = weights.down[e] @ a
                if weights.bias:
                    f = f + weights.down_bias[e]
                y = y + w * rule.scale * f
            out.append(y)
    return torch.stack(out).view_as(hidden_BSD)


def sequences(num: int, length: int, seed: int, images: bool = True) -> RoutingContext:
    """Sequences with an image run here and there, two packed segments, and right padding."""
    generator = torch.Generator().manual_seed(seed)
    modality = torch.zeros(num, length, dtype=torch.int64)
    segment = torch.ones(num, length, dtype=torch.int64)
    for row in range(num):
        first = int(torch.randint(1, length - 3, (1,), generator=generator))
        if images and row % 3 != 1:
            modality[row, first : first + 2] = 1
        if row % 2 == 0:
            segment[row, length // 2 :] = 2
        segment[row, length - row % 3 :] = 0
        modality[row, length - row % 3 :] = 0
    return RoutingContext(modality, segment)
