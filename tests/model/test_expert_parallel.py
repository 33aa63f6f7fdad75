"""Several ranks give what one rank gives: output and every gradient, for both placements."""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from moe_ext.config import Placement, Scope
from moe_ext.model.context import RoutingContext
from moe_ext.model.dispatch import Liveness
from moe_ext.model.routing import RoutingRule
from tests.model.layers import DIM, WIDE, Weights, build, sequences
from tests.ranks import run_ranks

LENGTH = 8


@dataclass
class Case:
    """One layer, and what each rank's batch is."""

    sequences: tuple[int, ...]
    """Of every rank."""
    images: tuple[bool, ...] = (True, True, True)
    """Whether a rank has any."""
    scope: Scope = Scope.joint
    num_frozen: int = 5
    num_new: int = 2
    top_k: int = 2
    hot: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    """Ranks that have nothing but padding."""
    some_live: bool = False
    """The ranks know which tokens stand before everything trainable."""


# 5 frozen experts, and 7 in all, on two ranks: neither divides
TWO_RANKS = {
    "both": Case((3, 3), scope=Scope.preserve),
    "no_image_on_rank_1": Case((3, 3), (True, False), Scope.preserve),
    "no_new_expert_on_rank_1": Case((2, 4), (True, False), Scope.modality),
    "nothing_on_rank_1": Case((3, 0)),
    "padding_only_on_rank_0": Case((2, 3), padding=(0,)),
    "top_1": Case((3, 3), top_k=1),
    "top_1_nothing_on_rank_1": Case((3, 0), top_k=1),
    "some_live": Case((3, 4), scope=Scope.preserve, some_live=True),
    "none_live_on_rank_1": Case((3, 3), (True, False), Scope.modality, some_live=True),
}
THREE_RANKS = {
    "fewer_new_experts_than_ranks": Case((3, 0, 2), num_new=2),
    "one_new_expert": Case((2, 2, 2), (True, False, True), Scope.preserve, num_new=1),
    "fewer_frozen_experts_than_ranks": Case((2, 3, 2), num_frozen=2, num_new=1, top_k=1),
    "hot": Case((3, 2, 3), num_frozen=7, num_new=4, top_k=3, hot=(0, 6), padding=(1,)),
    "one_cold": Case((2, 2, 2), num_frozen=4, num_new=2, hot=(0, 1, 3)),
    "some_live": Case(
        (2, 3, 1), (True, False, True), Scope.preserve, top_k=3, hot=(2,), some_live=True
    ),
}


def inputs(case: Case, rank: int) -> tuple[RoutingContext, torch.Tensor, torch.Tensor]:
    """The context, hidden states and output gradient of one rank."""
    count = case.sequences[rank]
    context = sequences(max(count, 1), LENGTH, seed=10 + rank, images=case.images[rank])
    if rank in case.padding:
        context.segment_BS.zero_()
    context = RoutingContext(context.modality_BS[:count], context.segment_BS[:count])
    generator = torch.Generator().manual_seed(20 + rank)
    hidden, grad = torch.randn(2, count, LENGTH, DIM, generator=generator).unbind(0)
    return context, hidden, grad


def layer_of(case: Case, placement: Placement = Placement.replicate, alone: bool = True):
    """The layer as this rank holds it, or whole."""
    here = {} if alone else {"rank": dist.get_rank(), "world": dist.get_world_size(),
                             "group": dist.group.WORLD, "hot": case.hot}  # fmt: skip
    # one chosen score divided by itself would be 1, and the router without a gradient
    rule = RoutingRule(case.top_k, renormalise=case.top_k > 1)
    weights = Weights(case.num_frozen, case.num_new)
    return build(weights, rule, scope=case.scope, placement=placement, **here)


def live_tokens(case: Case, rank: int) -> torch.Tensor:
    """(T,) bool: the tokens of a rank from the first image of their sample on."""
    return inputs(case, rank)[0].allowed_T(Scope.preserve, (1,))


def passed(layer, case: Case, rank: int, some_live: bool = False) -> dict[str, torch.Tensor]:
    """Output and gradients, the parameters' added to those of passes before."""
    layer.holder.context, hidden, grad = inputs(case, rank)
    if some_live:
        layer.holder.context.live_T = live_tokens(case, rank)
    x = hidden.requires_grad_()
    y = layer(x)
    y.backward(grad)
    found = {n: p.grad.clone() for n, p in layer.named_parameters() if p.grad is not None}
    return found | {"input": x.grad.clone(), "output": y.detach()}


def run_one(case: Case) -> list[dict[str, torch.Tensor]]:
    """All ranks' batches on one rank without a group, gradients added up."""
    layer = layer_of(case)
    return [passed(layer, case, rank) for rank in range(len(case.sequences))]


def run_cases(cases: dict[str, Case]) -> dict[tuple[str, Placement], dict[str, torch.Tensor]]:
    """One of several ranks: every case in both placements."""
    rank = dist.get_rank()
    return {
        (name, placement): passed(
            layer_of(case, placement, alone=False), case, rank, case.some_live
        )
        for name, case in cases.items()
        for placement in Placement
    }


def check(ranks: list[dict], cases: dict[str, Case]) -> None:
    for name, case in cases.items():
        alone = run_one(case)
        for placement in Placement:
            what = f"{name} {placement.value}"
            theirs = [found[name, placement] for found in ranks]
            for rank, found in enumerate(theirs):
                compare(found["output"], alone[rank]["output"], f"{what} output rank {rank}")
                counts = slice(None)
                if case.some_live:
                    counts = live_tokens(case, rank)
                    assert not found["input"].flatten(0, 1)[~counts].any(), f"{what} rank {rank}"
                given, expected = (of["input"].flatten(0, 1)[counts] for of in (found, alone[rank]))
                compare(given, expected, f"{what} input rank {rank}")
            compare_parameters(theirs, alone[-1], what, placement)


def compare_parameters(ranks, alone, name: str, placement: Placement) -> None:
    """Summed over ranks; a sharded expert's gradient is whole on its owner and never reduced."""
    for key, expected in alone.items():
        if key in ("input", "output"):
            continue
        parts = [found[key] for found in ranks if key in found]
        sharded = placement is Placement.shard and key.startswith("new.")
        compare(torch.cat(parts) if sharded else sum(parts), expected, f"{name} {key}")


def compare(actual: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    assert actual.shape == expected.shape, what
    if actual.numel():
        scale = max(float(expected.abs().max()), 1e-3)
        assert float((actual - expected).abs().max()) < 1e-5 * scale, what


def run_rank() -> dict:
    """One of two ranks: every case, and layers of which only a part is live."""
    rank, case = dist.get_rank(), TWO_RANKS["both"]
    results = run_cases(TWO_RANKS)
    for placement in Placement:
        # the frozen trunk: rank 1's input needs no gradient, rank 0's does; nothing may hang
        layer = layer_of(case, placement, alone=False)
        layer.holder.context, hidden, grad = inputs(TWO_RANKS["no_image_on_rank_1"], rank)
        x = hidden.requires_grad_(rank == 0)
        layer(x).backward(grad)
        # not live below: the router and the experts train, no gradient of the input travels
        layer.zero_grad()
        layer.liveness = Liveness(input=False, weight=True)
        layer.holder.context, hidden, grad = inputs(case, rank)
        layer(hidden).backward(grad)
        grads = {name: p.grad.clone() for name, p in layer.named_parameters()}
        results["not_live_below", placement] = grads
        # nothing live: no backward at all
        layer.requires_grad_(False)
        layer.liveness = Liveness(input=False, weight=False, output=False)
        layer.holder.context, hidden, grad = inputs(case, rank)
        assert not layer(hidden).requires_grad
    return results


def test_two_ranks_are_one():
    ranks = run_ranks(run_rank, 2)
    check(ranks, TWO_RANKS)
    alone = run_one(TWO_RANKS["both"])[-1]
    for placement in Placement:
        theirs = [found["not_live_below", placement] for found in ranks]
        compare_parameters(theirs, alone, "not live", placement)


def test_three_ranks_are_one():
    check(run_ranks(run_cases, 3, THREE_RANKS), THREE_RANKS)


def test_one_rank_computes_the_gradient_of_live_tokens_only():
    """Nothing of what trains changes; of the others not even what backward needs is kept."""
    case = TWO_RANKS["some_live"]
    live_T = live_tokens(case, 0)
    num_live, num_rows = int(live_T.sum()), int(inputs(case, 0)[0].valid_T.sum()) * case.top_k
    assert 0 < num_live * case.top_k < num_rows
    kept: dict[bool, set[int]] = {}
    found = {}
    for some_live in (False, True):
        layer, kept[some_live] = layer_of(case), set()

        def keep(tensor, rows=kept[some_live]):
            if tensor.shape[-1:] == (2 * WIDE,):
                rows.add(len(tensor))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            found[some_live] = passed(layer, case, 0, some_live)
    new_rows = kept[False] & kept[True]
    assert kept[False] - new_rows and kept[True] - new_rows
    (all_rows,), (live_rows,) = kept[False] - new_rows, kept[True] - new_rows
    (of_new,) = new_rows
    assert all_rows + of_new == num_rows and live_rows + of_new == num_live * case.top_k
    for key, expected in found[False].items():
        if key == "input":
            assert not found[True][key].flatten(0, 1)[~live_T].any()
            compare(found[True][key].flatten(0, 1)[live_T], expected.flatten(0, 1)[live_T], key)
        else:
            compare(found[True][key], expected, key)
