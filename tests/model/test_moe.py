"""The extended layer against an honest per-token loop, output and gradients, on one rank."""

import pytest
import torch

from moe_ext.config import Scope
from moe_ext.model.context import RoutingContext
from moe_ext.model.routing import RoutingRule
from tests.model.layers import DIM, WIDE, Weights, build, loop, sequences

TOLERANCE = 1e-5


def close(actual: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """Within 1e-5 of the largest expected value."""
    scale = max(float(expected.detach().abs().max()), 1e-3)
    worst = float((actual - expected).detach().abs().max()) / scale
    assert worst < TOLERANCE, f"{what}: {worst:.2e} of the largest value"


def forward(layer, context: RoutingContext, hidden: torch.Tensor) -> torch.Tensor:
    layer.holder.context = RoutingContext(context.modality_BS, context.segment_BS)
    return layer(hidden)


RULES = {
    "softmax": RoutingRule(top_k=2),
    "no_renormalisation": RoutingRule(top_k=3, renormalise=False),
    "sigmoid": RoutingRule(top_k=2, score="sigmoid", scale=2.5),
    "topk_softmax": RoutingRule(top_k=3, score="topk_softmax"),
}


@pytest.mark.parametrize("scope", list(Scope))
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_layer_is_the_loop(rule, scope):
    weights = Weights(num_frozen=5, num_new=2)
    context = sequences(4, 9, seed=1)
    hidden = torch.randn(4, 9, DIM, generator=torch.Generator().manual_seed(2))
    layer = build(weights, rule, scope=scope)
    x = hidden.clone().requires_grad_()
    y = forward(layer, context, x)
    probe = torch.randn(y.shape, generator=torch.Generator().manual_seed(3))
    (y * probe).sum().backward()

    names = ("rows", "row_bias", "gate_up", "down", "w1", "w2")
    for name in names:
        getattr(weights, name).requires_grad_()
    x_loop = hidden.clone().requires_grad_()
    expected = loop(weights, rule, context, x_loop, scope=scope)
    (expected * probe).sum().backward()

    close(y, expected, "output")
    close(x.grad, x_loop.grad, "input gradient")
    bank, rows = layer.new["vision"], layer.router.rows["vision"]
    close(bank.gate_up.grad, weights.gate_up.grad[5:], "gate_up")
    close(bank.down.grad, weights.down.grad[5:], "down")
    close(rows.weight.grad, weights.rows.grad[5:], "router rows")
    close(rows.bias.grad, weights.row_bias.grad, "router bias")
    close(rows.calibration.w1.grad, weights.w1.grad, "calibration w1")
    close(rows.calibration.w2.grad, weights.w2.grad, "calibration w2")


@pytest.mark.parametrize(
    ("activation", "bias"), [("gelu", False), ("swiglu_clamped", True), ("silu", True)]
)
def test_activations_and_biases(activation, bias):
    rule, weights = RoutingRule(top_k=2), Weights(num_frozen=4, num_new=1, bias=bias)
    context = sequences(3, 8, seed=4)
    hidden = torch.randn(3, 8, DIM, generator=torch.Generator().manual_seed(5))
    layer = build(weights, rule, activation=activation)
    x, x_loop = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    y = forward(layer, context, x)
    y.square().sum().backward()
    for name in ("gate_up", "down", "gate_up_bias", "down_bias"):
        getattr(weights, name).requires_grad_()
    expected = loop(weights, rule, context, x_loop, activation=activation)
    expected.square().sum().backward()
    close(y, expected, "output")
    close(x.grad, x_loop.grad, "input gradient")
    bank = layer.new["vision"]
    for name in ("gate_up", "down") + (("gate_up_bias", "down_bias") if bias else ()):
        close(getattr(bank, name).grad, getattr(weights, name).grad[4:], name)


def test_text_tokens_keep_the_bits_of_the_base():
    """preserve: a sequence without an image, and the tokens before an image, are the base's."""
    rule = RoutingRule(top_k=2)
    hidden = torch.randn(6, 10, DIM, generator=torch.Generator().manual_seed(6))
    text = RoutingContext(
        torch.zeros(6, 10, dtype=torch.int64), torch.ones(6, 10, dtype=torch.int64)
    )
    base = build(Weights(5, 0), rule)
    extended = build(Weights(5, 3), rule)
    # the same frozen weights in both
    extended.frozen.gate_up.copy_(base.frozen.gate_up)
    extended.frozen.down.copy_(base.frozen.down)
    extended.router.frozen_weight.copy_(base.router.frozen_weight)
    assert torch.equal(forward(base, text, hidden), forward(extended, text, hidden))
    assert not torch.equal(
        forward(base, sequences(6, 10, seed=7), hidden),
        forward(extended, sequences(6, 10, seed=7), hidden),
    ), "image tokens never chose a new expert: the comparison above shows nothing"
    extended.remove_bank("vision")
    mixed = sequences(6, 10, seed=7)
    assert torch.equal(forward(base, mixed, hidden), forward(extended, mixed, hidden))


def test_preserve_looks_back_and_not_ahead():
    modality = torch.tensor([[0, 0, 1, 0, 0, 0, 1, 0], [0, 0, 0, 0, 0, 0, 0, 0]])
    segment = torch.tensor([[1, 1, 1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 1, 1, 1, 1]])
    context = RoutingContext(modality, segment)
    expected = torch.tensor([[0, 0, 1, 1, 0, 0, 1, 0], [0] * 8]).bool()
    assert torch.equal(context.allowed_T(Scope.preserve, (1,)).view(2, 8), expected)
    later = RoutingContext(
        torch.zeros(2, 1, dtype=torch.int64),
        torch.ones(2, 1, dtype=torch.int64),
        seen_B={1: torch.tensor([True, False])},
    )
    assert later.allowed_T(Scope.preserve, (1,)).tolist() == [True, False]


def test_clone_shared_is_the_base_at_step_0():
    rule = RoutingRule(top_k=2)
    weights = Weights(5, 2)
    for name in ("rows", "gate_up", "down"):
        getattr(weights, name)[5:] = getattr(weights, name)[[3, 1]]
    weights.row_bias.zero_()
    weights.w1.zero_()
    context = sequences(4, 9, seed=8)
    hidden = torch.randn(4, 9, DIM, generator=torch.Generator().manual_seed(9))
    layer = build(weights, rule, scope=Scope.joint, shared_with=[3, 1])
    expected = loop(_without_new(weights), rule, context, hidden)
    close(forward(layer, context, hidden), expected, "output")
    record = layer.holder.context.records[0]
    assert (record.expert_TS[:, 2:] >= 5).any(), "no clone shares a slot: nothing was shown"
    plain = build(weights, rule, scope=Scope.joint)
    worst = (forward(plain, context, hidden) - expected).abs().max()
    assert worst > 1e-3, "an exact tie without a shared slot should evict the second expert"


def _without_new(weights: Weights) -> Weights:
    base = Weights(weights.num_frozen, 0)
    for name in ("rows", "gate_up", "down"):
        setattr(base, name, getattr(weights, name)[: weights.num_frozen])
    return base


def test_calibration_cannot_blow_up_the_weights():
    """Probabilities calibrated to a sum of zero or less: the divisor is guarded."""
    rule, weights = RoutingRule(top_k=2), Weights(4, 1)
    layer = build(weights, rule, scope=Scope.joint)
    calibration = layer.router.rows["vision"].calibration
    calibration.w1.data.fill_(-3.0)
    calibration.w2.data.abs_()
    context = sequences(2, 6, seed=1)
    layer.holder.context = context
    hidden = torch.randn(12, DIM, generator=torch.Generator().manual_seed(1))
    routing = layer.router(hidden, context, 0)
    assert torch.isfinite(routing.weight_TS).all()
    change = calibration(torch.full((1, 5), 0.2)).abs().max()
    assert routing.weight_TS.abs().max() <= 2 * (1 + 2 * change) / 0.25


def test_recomputation_keeps_the_choice():
    """Computed again in backward, tokens go where they went, whatever the router would choose now."""
    layer = build(Weights(5, 2), RoutingRule(top_k=2), scope=Scope.joint)
    context = sequences(2, 6, seed=1)
    hidden = torch.randn(12, DIM, generator=torch.Generator().manual_seed(1))
    first = layer.router(hidden, context, 0)
    with layer.holder.replaying(context):
        again = layer.router(hidden + 0.5, context, 0)
    assert torch.equal(first.expert_TS, again.expert_TS)
    assert torch.equal(first.expert_TS, context.records[0].expert_TS)
    fresh = layer.router(hidden + 0.5, context, 0)
    assert not torch.equal(first.expert_TS, fresh.expert_TS)
    assert torch.equal(fresh.expert_TS, context.records[0].expert_TS)


def test_a_frozen_bank_has_no_gradient_and_saves_what_is_stated():
    weights, context = Weights(4, 0), sequences(3, 8, seed=1)
    layer = build(weights, RoutingRule(top_k=2))
    assert not list(layer.parameters())
    saved: list[torch.Tensor] = []
    x = torch.randn(3, 8, DIM, requires_grad=True)
    layer.holder.context = context
    rows = int(context.valid_T.sum()) * 2
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    assert any(t.shape == (rows, 2 * WIDE) for t in saved)
    banks = [layer.frozen.gate_up, layer.frozen.down]
    big = [t for t in saved if t.numel() >= rows * 2 * WIDE]
    own = [t for t in big if not any(t.data_ptr() == b.data_ptr() for b in banks)]
    assert len(own) == 1, "more than gate_up(x) of the rows is saved"
