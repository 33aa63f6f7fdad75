"""Selection counts against a loop, gaps against real clones, and the manifest."""

import json
from collections import Counter

import pytest
import torch
from torch import Tensor

from moe_ext.analysis import gaps, probe, selections
from moe_ext.analysis.heldout import pair_batch
from moe_ext.analysis.reduce import Ranks
from moe_ext.analysis.text import text_batch
from moe_ext.config import ExtensionConfig, RowInit, Scope
from moe_ext.model.context import text_context
from moe_ext.model.extend import add_extension
from moe_ext.model.moe import extended_layers
from moe_ext.model.routing import RoutingRule
from tests.analysis.small import extend, make_build, make_items, make_model, save_base
from tests.model.layers import DIM, Weights, build
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def items(tmp_path_factory):
    return make_items(tmp_path_factory.mktemp("pairs"))


def batches(items):
    build_sample = make_build()
    yield pair_batch(build_sample, items[:5])
    yield pair_batch(build_sample, items[5:])
    generator = torch.Generator().manual_seed(0)
    yield text_batch(torch.randint(3, 250, (2, 11), generator=generator))


def watch_routers(model) -> dict[int, list[tuple]]:
    """Layer -> (input, context, chosen) of every pass."""
    seen: dict[int, list[tuple]] = {layer: [] for layer in extended_layers(model.lm)}
    for index, layer in extended_layers(model.lm).items():
        layer.router.register_forward_hook(
            lambda router, args, out, index=index: seen[index].append(
                (args[0], args[1], out.expert_TS)
            )
        )
    return seen


def kind_of(modality: list[int], segment: list[int], s: int) -> int:
    if modality[s]:
        return selections.IMAGE
    before = any(modality[p] and segment[p] == segment[s] for p in range(s))
    return selections.TEXT_AFTER if before else selections.TEXT_ALONE


def test_counts_are_those_of_a_loop(base, items):
    model = make_model(base)
    extend(model, base)
    seen = watch_routers(model)
    found = selections.count_selections(model, batches(items))
    assert found.layers == [0, 2, 3, 4]  # layer 1 is dense
    assert found.num_new == [1, 0, 1, 0]
    assert found.top_k == 2
    for i, layer in enumerate(found.layers):
        count, tokens = Counter(), Counter()
        for _, context, expert_TS in seen[layer]:
            modality, segment = context.modality_BS.tolist(), context.segment_BS.tolist()
            chosen = iter(expert_TS.tolist())
            for row in range(len(modality)):
                for s in range(len(modality[row])):
                    experts = next(chosen)
                    if segment[row][s]:
                        kind = kind_of(modality[row], segment[row], s)
                        tokens[kind] += 1
                        count.update((kind, expert) for expert in experts)
        width = found.num_frozen[i] + found.num_new[i]
        for kind in range(3):
            assert found.tokens_LG[i, kind] == tokens[kind] > 0
            expected = [count[kind, e] for e in range(width)]
            assert found.count_LGX[i, kind, :width].tolist() == expected
        assert found.count_LGX[i, :, width:].sum() == 0
    assert found.count_LGX[[0, 2], selections.TEXT_ALONE, 6].sum() == 0  # preserve
    assert found.count_LGX[[0, 2], selections.IMAGE, 6].sum() > 0


def test_affected_tokens_lack_an_expert_of_the_base(base, items):
    model = make_model(base)
    extend(model, base)
    found = selections.count_selections(model, batches(items))
    plain = make_model(base)
    assert selections.count_selections(plain, batches(items)).affected_LG.sum() == 0
    # layer 0 sees the same inputs in both models, so a token is affected iff it chose the new expert
    chose_new = found.count_LGX[0, :, found.num_frozen[0]]
    assert torch.equal(found.affected_LG[0], chose_new)


def test_shift_is_the_std_of_the_change_and_the_top_half_is_chosen():
    def of(*rows):
        counts = torch.tensor(rows).unsqueeze(1).expand(-1, 3, -1).contiguous()
        tokens = torch.ones(len(rows), 3, dtype=torch.int64)
        return selections.Selections([1, 4, 7], [2] * 3, [0] * 3, counts, tokens, tokens)

    before, after = of([10, 10], [30, 10], [5, 15]), of([15, 5], [3, 1], [10, 10])
    assert probe.selection_shift(before, after) == pytest.approx([0.25, 0.0, 0.25])
    assert probe.choose_layers([1, 4, 7], [0.25, 0.0, 0.25], 0.5) == [1]
    assert probe.choose_layers([1, 4, 7], [0.1, 0.3, 0.2], 0.7) == [4, 7]
    assert probe.choose_layers([1, 4, 7], [0.1, 0.3, 0.2], 0.01) == [4]
    assert probe.choose_layers(list(range(10)), [0.0] * 10, 0.3) == [0, 1, 2]


RULES = {
    "softmax": RoutingRule(top_k=2),
    "topk_softmax": RoutingRule(top_k=3, score="topk_softmax"),
    "sigmoid": RoutingRule(top_k=2, score="sigmoid"),
    "groups": RoutingRule(top_k=2, num_groups=3, groups_kept=2),
}


@pytest.mark.parametrize("name", [*RULES, "corrected"])
@pytest.mark.parametrize("bias", [-0.6, -0.05, 0.4])
def test_a_clone_is_chosen_where_its_bias_exceeds_the_gap(name, bias):
    rule = RULES.get(name) or RoutingRule(top_k=2, score="sigmoid")
    source = 4
    weights = Weights(6, 1, seed=2)
    weights.rows[6] = weights.rows[source]
    weights.row_bias[0] = bias
    layer = build(weights, rule, scope=Scope.joint, calibration=False)
    alone = build(Weights(6, 0, seed=2), rule)
    for other in (layer, alone):
        other.router.frozen_weight.copy_(weights.rows[:6])
        if name == "corrected":
            other.router.correction_bias = torch.linspace(-0.2, 0.3, 6)
            for rows in other.router.rows.values():
                rows.correction = other.router.correction_bias[[source]]
    x = torch.randn(400, DIM, generator=torch.Generator().manual_seed(1))
    context = text_context(1, 400, x.device)
    base_TK = alone.router(x, text_context(1, 400, x.device), 0).expert_TS
    needed = gaps.logit_gaps(alone.router, x @ weights.rows[:6].t(), base_TK)
    chosen_TK = layer.router(x, context, 0).expert_TS
    enters = (chosen_TK == 6).any(1)
    assert torch.equal(enters, needed.gap_TE[:, source] < bias)
    assert 0.01 < enters.double().mean() < 0.95
    for token in enters.nonzero().squeeze(1).tolist():
        lost = set(base_TK[token].tolist()) - set(chosen_TK[token].tolist())
        assert lost == {int(needed.last_T[token])}


def test_bias_is_the_quantile():
    generator = torch.Generator().manual_seed(0)
    for share in (0.0, 0.1, 0.25, 0.999, 1.0):
        gap: Tensor = torch.randn(1000, generator=generator)
        bias = gaps.bias_for(gap, share)
        entering = int((gap.double() < bias).sum())
        assert entering == round(1000 * share)
    tied = torch.tensor([-2.0, -0.5, 0.0, 0.0, 0.0, 1.0])
    assert gaps.bias_for(tied, 0.5) == -0.25  # all three ties or none
    assert gaps.bias_for(tied, 5 / 6) == 0.5
    assert gaps.bias_for(torch.tensor([-0.01, 0.0, 0.0, 0.0]), 0.5) == -gaps.TIE_MARGIN
    assert gaps.bias_for(torch.tensor([3.0, 4.0]), 0.0) == 2.0


def test_manifest_predicts_what_the_extension_then_does(base, items, tmp_path):
    model = make_model(base)
    build_sample = make_build()
    image_batches = [pair_batch(build_sample, items)]
    before = gaps.measure(model, image_batches, modality=1)
    for layer in extended_layers(model.lm).values():
        layer.router.add_delta()
        noise = torch.randn(
            layer.router.delta.shape, generator=torch.Generator().manual_seed(layer.layer_index)
        )
        layer.router.delta.data += 0.4 * noise
    after = gaps.measure(model, image_batches)
    for layer in extended_layers(model.lm).values():
        layer.router.drop_delta()
    manifest = probe.make_manifest(
        before, after, extension="vision", base_sha256="ab", modality=1, samples=len(items),
        layer_share=0.5, num_new=1, affected_share=0.25,
    )  # fmt: skip
    probe.save_manifest(manifest, tmp_path / "probe.json")
    assert json.loads((tmp_path / "probe.json").read_text()) == manifest
    chosen = [row["layer"] for row in manifest["layers"] if row["chosen"]]
    assert len(chosen) == 2
    worst_chosen = min(row["shift"] for row in manifest["layers"] if row["chosen"])
    assert all(row["shift"] <= worst_chosen for row in manifest["layers"] if not row["chosen"])
    for row in manifest["layers"]:
        counts = row["count_after"]["image tokens"]
        assert counts[row["source_after"]] == max(counts)
        assert sum(counts) == 2 * 4 * len(items)

    plans = probe.load_plans(tmp_path / "probe.json", "ab")
    assert [plan.layer for plan in plans] == chosen
    with pytest.raises(ValueError, match="made from base ab.*run the probe"):
        probe.load_plans(tmp_path / "probe.json", "cd")
    settings = ExtensionConfig(row_init=RowInit.clone)
    add_extension(model.lm, str(base), "vision", plans, settings)
    found = selections.count_selections(model, image_batches)
    i, step0 = found.layers.index(chosen[0]), manifest["plans"][0]["step0"]
    # the first extended layer sees the inputs that were measured, so the prediction is exact there
    tokens = int(found.tokens_LG[i, selections.IMAGE])
    assert int(found.affected_LG[i, selections.IMAGE]) == round(step0["affected_share"] * tokens)
    assert float(found.share(selections.IMAGE)[i][6]) == pytest.approx(step0["new_share"])
    assert 0 < step0["affected_share"] <= 0.25
    assert step0["evicted_share"] <= step0["affected_share"]


def test_mean_router_input_of_the_modality(base, items):
    model = make_model(base)
    seen = watch_routers(model)
    measured = gaps.measure(model, batches(items), modality=1)
    for layer, passes in seen.items():
        rows = torch.cat([x[context.modality_BS.reshape(-1) == 1] for x, context, _ in passes])
        torch.testing.assert_close(measured.mean_input[layer], rows.mean(0))


def test_impossible_requests_are_named(base, items):
    model = make_model(base)
    measured = gaps.measure(model, [pair_batch(make_build(), items)], modality=1)
    common = {
        "extension": "vision", "base_sha256": "", "modality": 1, "samples": 9,
        "layer_share": 0.5, "affected_share": 0.25,
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"extension.layers names \[1\].*\[0, 2, 3, 4\]"):
        probe.make_manifest(measured, measured, num_new=1, layers=[1], **common)
    with pytest.raises(ValueError, match="extension.num_new_experts=7"):
        probe.make_manifest(measured, measured, num_new=7, **common)
    manifest = probe.make_manifest(measured, measured, num_new=2, layers=[3], **common)
    (plan,) = manifest["plans"]
    counts = measured.selections.count_LGX[2, selections.IMAGE, :6]
    assert sorted(counts[plan["sources"]].tolist()) == sorted(counts.tolist())[-2:]
    assert plan["step0"]["affected_share"] <= 0.25
    named = {"num_new": 2, "layers": [3], "source_expert": 5}
    (plan,) = probe.make_manifest(measured, measured, **named, **common)["plans"]
    assert plan["sources"] == [5, 5]
    with pytest.raises(ValueError, match="extension.source_expert=6.*numbered from 0"):
        probe.make_manifest(measured, measured, num_new=1, source_expert=6, **common)
    for wrong, message in (({1: [0]}, r"sources names \[1\]"), ({2: [0] * 7}, "sources=7 exceeds the 6"),
                           ({2: [0, 6]}, "sources=6 is no expert of layer 2")):  # fmt: skip
        with pytest.raises(ValueError, match=f"extension.{message}"):
            probe.make_manifest(measured, measured, num_new=1, named=wrong, **common)


def test_layers_have_their_own_numbers_and_sources(base, items):
    model = make_model(base)
    measured = gaps.measure(model, [pair_batch(make_build(), items)], modality=1)
    counts = measured.selections.count_LGX[2, selections.IMAGE, :6].tolist()
    ranked = sorted(range(6), key=lambda e: (-counts[e], e))
    second, third = [e for e in ranked if e != 4][:2]
    manifest = probe.make_manifest(
        measured, measured, extension="vision", base_sha256="", modality=1, samples=9, layer_share=0.5,
        num_new=1, affected_share=0.25, named={3: [-1, 4, -1], 0: [5]},
    )  # fmt: skip
    assert [plan["layer"] for plan in manifest["plans"]] == [0, 3]
    assert [plan["sources"] for plan in manifest["plans"]] == [[5], [second, 4, third]]
    assert [plan["num_new"] for plan in manifest["plans"]] == [1, 3]
    assert all(len(plan["bias"]) == plan["num_new"] for plan in manifest["plans"])
    assert [row["chosen"] for row in manifest["layers"]] == [True, False, True, False]


def probe_manifest(base, items, rank: int = 0, size: int = 1, together: int = 3):
    """The manifest from this rank's share of the batches; the "after" has shifted routers."""
    import torch.distributed as dist

    group = dist.group.WORLD if size > 1 else None
    model = make_model(base, ep_rank=rank, ep_size=size, ep_group=group)
    build_sample, ranks = make_build(), Ranks(rank, size)
    groups = [items[i : i + together] for i in range(0, len(items), together)][rank::size]
    own = [pair_batch(build_sample, group) for group in groups]
    before = gaps.measure(model, own, modality=1, ranks=ranks)
    for layer in extended_layers(model.lm).values():
        generator = torch.Generator().manual_seed(layer.layer_index)
        layer.router.add_delta()
        layer.router.delta.data += 0.4 * torch.randn(layer.router.delta.shape, generator=generator)
    after = gaps.measure(model, own, ranks=ranks)
    manifest = probe.make_manifest(
        before, after, extension="vision", base_sha256="ab", modality=1, samples=len(items),
        layer_share=0.7, num_new=2, affected_share=0.4, ranks=ranks,
    )  # fmt: skip
    return manifest, before.mean_input


def probe_on_rank(base, items):
    import torch.distributed as dist

    return probe_manifest(base, items, dist.get_rank(), dist.get_world_size())


def test_two_ranks_find_what_one_finds(base, tmp_path):
    items = make_items(tmp_path, 12)
    one, mean_input = probe_manifest(base, items)
    (two, other_mean), (other, _) = run_ranks(probe_on_rank, 2, base, items)
    assert two == other
    assert two["layers"] == one["layers"]
    for ours, theirs in zip(two["plans"], one["plans"], strict=True):
        assert ours["bias"] == pytest.approx(theirs["bias"], abs=1e-5)
        assert ours["step0"] == theirs["step0"]
        assert ours["sources"] == theirs["sources"]
    for layer, mean in mean_input.items():
        torch.testing.assert_close(other_mean[layer], mean)


def test_the_most_selected_are_counted_over_all_kinds_of_token(tmp_path):
    layers = [
        {"layer": 3, "count_before": {"image": [5, 0, 1, 9], "text": [5, 1, 1, 0]}},
        {"layer": 7, "count_before": {"image": [0, 2, 2, 0], "text": [2, 0, 0, 0]}},
    ]
    path = tmp_path / "probe.json"
    path.write_text(json.dumps({"layers": layers}))
    assert probe.most_selected(path, 2) == {3: [0, 3], 7: [0, 1]}  # ties to the lower id
    assert probe.most_selected(path, 9) == {3: [0, 2, 3], 7: [0, 1, 2]}  # never all of them
