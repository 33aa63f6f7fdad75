"""The router against an honest loop over tokens: every rule, and what extensions do to it."""

import pytest
import torch
from torch import Tensor

from moe_ext.config import CalibrationKind, Scope
from tests.model.layers import DIM
from tests.model.routers import (
    EXTENSIONS,
    NUM_FROZEN,
    RULES,
    Added,
    build_router,
    mixed,
    open_rows,
    weights,
)


@pytest.mark.parametrize("added", EXTENSIONS.values(), ids=EXTENSIONS.keys())
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_the_router_is_the_loop(rule, added):
    router, context = build_router(rule, added), mixed()
    generator = torch.Generator().manual_seed(1)
    x_BSD = torch.randn(*context.segment_BS.shape, DIM, generator=generator).to(rule.dtype)
    probe = torch.randn(40, NUM_FROZEN + 2 * len(added), generator=generator)
    routing = router(x_BSD.view(-1, DIM), context, 0)
    used = routing.expert_TS >= 0
    got = torch.zeros(probe.shape).scatter_add(
        1, routing.expert_TS.clamp(min=0), routing.weight_TS * used
    )

    lines, experts = [], []
    for b, s in torch.ones_like(context.segment_BS).nonzero().tolist():
        weight: dict[int, Tensor] = {}
        if context.segment_BS[b, s]:
            weight = weights(router, x_BSD[b, s].float(), open_rows(router, context, b, s))
        experts.append(sorted(weight))
        line = [weight.get(e, torch.zeros(())) for e in range(probe.shape[1])]
        lines.append(torch.stack(line))
    assert experts == [sorted(e for e in row if e >= 0) for row in routing.expert_TS.tolist()]
    expected = torch.stack(lines)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    if not added:
        return
    assert any(e >= NUM_FROZEN for row in experts for e in row), "no new expert: nothing was shown"
    parameters = list(router.parameters())
    ours = torch.autograd.grad((got * probe).sum(), parameters, allow_unused=True)
    theirs = torch.autograd.grad((expected * probe).sum(), parameters, allow_unused=True)
    for mine, his in zip(ours, theirs, strict=True):
        mine, his = (torch.zeros(()) if g is None else g for g in (mine, his))
        torch.testing.assert_close(mine, his.expand_as(mine), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scope", list(Scope))
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_what_the_base_would_choose_is_kept_on_request_and_changes_nothing(rule, scope):
    router = build_router(rule, [Added(scope=scope, calibration=CalibrationKind.mlp_add)])
    plain, asked = mixed(), mixed()
    asked.keeps_base_choice = True
    x_TD = torch.randn(plain.segment_BS.numel(), DIM).to(rule.dtype)
    without, with_choice = router(x_TD, plain, 0), router(x_TD, asked, 0)
    assert torch.equal(without.expert_TS, with_choice.expert_TS)
    assert torch.equal(without.weight_TS, with_choice.weight_TS)
    assert (plain.records[0].base_expert_TK is None) == (scope is Scope.joint)
    base, alone = build_router(rule, []), mixed()
    base(x_TD, alone, 0)
    assert torch.equal(asked.records[0].base_expert_TK, alone.records[0].base_expert_TK)
