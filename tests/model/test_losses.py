"""The balance loss and the z-loss against their definitions, on one rank and added up over ranks."""

import pytest
import torch

from moe_ext.config import Scope
from moe_ext.model.context import RoutingContext
from moe_ext.model.losses import balance_loss, router_kl, selection_counts, z_loss
from moe_ext.model.routing import RoutingRule
from tests.model.layers import DIM, Weights, build, sequences
from tests.model.routers import (
    EXTENSIONS,
    NUM_FROZEN,
    RULES,
    build_router,
    mixed,
    open_rows,
    route,
)

SCORES = pytest.mark.parametrize("score", ["softmax", "sigmoid"])


def shares(score: str, logits: torch.Tensor) -> torch.Tensor:
    """A token's probabilities, or its sigmoid scores divided by their sum."""
    prob = logits.sigmoid() if score == "sigmoid" else logits.softmax(-1)
    return prob / prob.sum()


def record_of(layer, context: RoutingContext, hidden: torch.Tensor):
    layer.holder.context = RoutingContext(context.modality_BS, context.segment_BS, with_losses=True)
    layer(hidden)
    return layer.holder.context.records[0]


def test_even_load_is_one_and_collapse_is_the_number_of_experts():
    even = torch.full((4,), 25.0)
    counts = torch.tensor([50, 50, 50, 50, 100])
    assert balance_loss(even, counts).item() == 1.0
    collapsed = torch.tensor([100.0, 0.0, 0.0, 0.0])
    assert balance_loss(collapsed, torch.tensor([200, 0, 0, 0, 100])).item() == 4.0


@SCORES
def test_ranks_add_up_to_the_definition(score):
    """Padding and tokens whose candidates were restricted are left out; counts are global."""
    rule = RoutingRule(top_k=2, score=score)
    layer = build(Weights(4, 1), rule, scope=Scope.preserve, calibration=False)
    generator = torch.Generator().manual_seed(0)
    contexts = [sequences(3, 9, seed=1), sequences(3, 9, seed=2, images=False)]
    hidden = [torch.randn(3, 9, DIM, generator=generator) for _ in contexts]
    records = [record_of(layer, c, h) for c, h in zip(contexts, hidden, strict=True)]
    assert not records[1].counted_T.any(), "text alone is restricted to the frozen experts"
    total = selection_counts(records[0]) + selection_counts(records[1])
    parts = [balance_loss(r.prob_sum_X, total) for r in records]

    rows = layer.router.rows["vision"]
    share, mean, logsum, tokens = torch.zeros(5), torch.zeros(5), torch.zeros(()), 0
    for context, x in zip(contexts, hidden, strict=True):
        allowed = context.allowed_T(Scope.preserve, (1,)).view(3, 9)
        for b, s in allowed.nonzero().tolist():
            logits = torch.cat([layer.router.frozen_weight, rows.weight]) @ x[b, s]
            logits[4] += rows.bias[0]
            prob = shares(score, logits)
            share[prob.topk(2).indices] += 1
            mean += prob
            logsum += logits.logsumexp(-1) ** 2
            tokens += 1
    expected = 5 * ((share / share.sum()) * (mean / tokens)).sum()
    torch.testing.assert_close(sum(parts), expected)
    torch.testing.assert_close(sum(z_loss(r.z_sum, total[-1]) for r in records), logsum / tokens)


def test_no_counted_token_gives_zero_with_a_graph():
    layer = build(Weights(4, 1), RoutingRule(top_k=2))
    record = record_of(layer, sequences(2, 6, seed=3, images=False), torch.randn(2, 6, DIM))
    loss = balance_loss(record.prob_sum_X, selection_counts(record))
    assert loss.item() == 0.0
    loss.backward()
    assert layer.router.rows["vision"].weight.grad is not None


@SCORES
def test_an_even_router_s_balance_is_one(score):
    weights = Weights(4, 0)
    weights.rows.zero_()
    layer = build(weights, RoutingRule(top_k=2, score=score))
    record = record_of(layer, sequences(3, 9, seed=1), torch.randn(3, 9, DIM))
    loss = balance_loss(record.prob_sum_X, selection_counts(record))
    torch.testing.assert_close(loss, torch.tensor(1.0))


@SCORES
@pytest.mark.parametrize("shared_with", [[], [2, 0]], ids=["rows of their own", "shared slots"])
def test_router_kl_is_the_divergence_from_the_base(score, shared_with):
    rule = RoutingRule(top_k=2, score=score)
    layer = build(Weights(4, 2), rule, scope=Scope.joint, shared_with=shared_with)
    context = sequences(3, 9, seed=1)
    hidden = torch.randn(3, 9, DIM, generator=torch.Generator().manual_seed(0))
    record = record_of(layer, context, hidden)
    counts = selection_counts(record)

    rows, expected = layer.router.rows["vision"], torch.zeros(())
    for b, s in (context.segment_BS != 0).nonzero().tolist():
        logits = torch.cat([layer.router.frozen_weight, rows.weight]) @ hidden[b, s]
        logits = logits + torch.cat([torch.zeros(4), rows.bias])
        base = shares(score, logits[:4])
        slots = list(logits)
        for i, source in enumerate(shared_with):
            slots[source] = torch.log((logits[source].exp() + logits[4 + i].exp()) / 2)
        extended = shares(score, torch.stack(slots[:4] if shared_with else slots))[:4]
        expected = expected + (base * (base / extended).log()).sum()
    loss = router_kl(record, counts[-1])
    torch.testing.assert_close(loss, expected / counts[-1])
    assert loss > 0
    loss.backward()
    assert rows.bias.grad.abs().sum() > 0
    if not shared_with:
        assert (rows.bias.grad > 0).all(), "the pull is downwards"
    assert record_of(build(Weights(4, 0), rule), context, hidden).kl_sum is None


@SCORES
def test_a_clone_that_shares_its_slot_is_no_divergence(score):
    weights = Weights(4, 1)
    weights.rows[4], weights.row_bias[0] = weights.rows[2], 0.0
    rule = RoutingRule(top_k=2, score=score)
    layer = build(weights, rule, scope=Scope.joint, shared_with=[2])
    hidden = torch.randn(3, 9, DIM, generator=torch.Generator().manual_seed(0))
    record = record_of(layer, sequences(3, 9, seed=1), hidden)
    torch.testing.assert_close(record.kl_sum, torch.zeros(()), atol=1e-4, rtol=0)


def _by_the_loop(router, context: RoutingContext, x_BSD: torch.Tensor, width: int):
    """(Balance loss, z-loss, KL from the base) of the tokens that may choose new experts.

    Without an extension all count, and nothing is to be diverged from.
    """
    count, mean = torch.zeros(width), [torch.zeros(()) for _ in range(width)]
    z, kl, tokens = torch.zeros(()), torch.zeros(()), 0
    for b, s in (context.segment_BS != 0).nonzero().tolist():
        found = open_rows(router, context, b, s)
        if router.rows and not found:
            continue
        x, tokens = x_BSD[b, s].float(), tokens + 1
        routed, base = route(router, x, found), route(router, x, [])
        count[routed.chosen] += 1
        total = sum(routed.share.values())  # one, but for scores of their own
        for expert, share in routed.share.items():
            mean[expert] = mean[expert] + share / total
        z = z + torch.stack(list(routed.logit.values())).logsumexp(0).square()
        slots = {e: sum(routed.share[m] for m in members) for e, members in routed.slot.items()}
        of_base = sum(base.share.values())
        for e in range(NUM_FROZEN):
            was, now = base.share[e] / of_base, slots[e] / total
            kl = kl + was * (was / now).log()
    balance = width * (count / count.sum() * torch.stack(mean) / tokens).sum()
    return balance, z / tokens, kl / tokens


@pytest.mark.parametrize("added", EXTENSIONS.values(), ids=EXTENSIONS.keys())
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_of_every_rule_and_extension_they_are_the_loop_s(rule, added):
    """Biases, corrections and groups of the base too; gradients as well as values."""
    router, context = build_router(rule, added), mixed()
    context.with_losses = True
    generator = torch.Generator().manual_seed(1)
    x_BSD = torch.randn(*context.segment_BS.shape, DIM, generator=generator).to(rule.dtype)
    router(x_BSD.view(-1, DIM), context, 0)
    record = context.records[0]
    counts = selection_counts(record)
    ours = [balance_loss(record.prob_sum_X, counts), z_loss(record.z_sum, counts[-1])]
    theirs = _by_the_loop(router, context, x_BSD, NUM_FROZEN + 2 * len(added))
    if not added:
        assert router_kl(record, counts[-1]) is None
        torch.testing.assert_close(ours, list(theirs[:2]))
        return
    ours.append(router_kl(record, counts[-1]))
    for mine, his in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, his, rtol=1e-5, atol=1e-6)
        wanted = [p for n, p in router.named_parameters() if "calibration" not in n]
        got = torch.autograd.grad(mine, wanted, retain_graph=True)
        expected = torch.autograd.grad(his, wanted, retain_graph=True)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_loss_free_balancing_moves_the_choice_of_new_experts_and_nothing_else():
    """Until the new experts are chosen as often as the average expert; weights keep their rule."""
    layer = build(Weights(4, 2), RoutingRule(top_k=2), scope=Scope.joint, calibration=False)
    rows, router = layer.router.rows["vision"], layer.router
    rows.learns_correction, rows.correction = True, torch.zeros(2)
    hidden = torch.randn(30, 9, DIM, generator=torch.Generator().manual_seed(0))
    context = sequences(30, 9, seed=1)
    with torch.no_grad():
        rows.bias.copy_(torch.tensor([3.0, -3.0]))
    shares = []
    for _ in range(400):
        record = record_of(layer, context, hidden)
        count_X = selection_counts(record)[:-1]
        shares.append(count_X[4:] / count_X.float().mean())
        before = rows.correction.clone()
        router.balance_corrections(count_X, 0.005)
        expected = 0.005 * torch.sign(count_X.float().mean() - count_X[4:])
        torch.testing.assert_close(rows.correction - before, expected)
    assert shares[0][0] > 1.5
    assert shares[0][1] < 0.5
    assert ((shares[-1] - 1).abs() < 0.1).all()

    # the weights are the family's: probabilities of the chosen experts, without the correction
    x_TD = hidden.view(-1, DIM)
    routing = router(x_TD, RoutingContext(context.modality_BS, context.segment_BS), 0)
    logits = x_TD @ torch.cat([router.frozen_weight, rows.weight]).T
    prob = (logits + torch.cat([torch.zeros(4), rows.bias])).softmax(-1)
    valid = context.segment_BS.view(-1) != 0
    chosen = prob.gather(1, routing.expert_TS.clamp(min=0))
    chosen = chosen / chosen.sum(1, keepdim=True)
    torch.testing.assert_close(routing.weight_TS[valid], chosen[valid])
