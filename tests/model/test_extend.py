"""Extensions: added, trained, saved, loaded, removed; side by side; and what the base keeps."""

import hashlib

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from moe_ext.config import CalibrationKind, ExpertInit, ExtensionConfig, Placement, RowInit, Scope
from moe_ext.model.context import RoutingContext
from moe_ext.model.extend import (
    LayerPlan,
    add_extension,
    announce,
    attach_extension,
    extended_layers,
    extension_state,
    load_base,
    load_extension_state,
    remove_extension,
)
from moe_ext.model.state import extension_keys
from tests.model.tiny import TINY, save_tiny

IMAGE = 1


@pytest.fixture(scope="module", params=sorted(TINY))
def any_base(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    save_tiny(folder, request.param)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen2_moe")
    save_tiny(folder, "qwen2_moe")
    return folder


def _settings(**changes) -> ExtensionConfig:
    return ExtensionConfig(**{"name": "vision", "scope": Scope.joint, **changes})


def _plans(lm, num_new: int = 2, **changes) -> list[LayerPlan]:
    return [
        LayerPlan(layer, num_new, [1, 3][:num_new], [0.5, 0.25][:num_new])
        for layer in extended_layers(lm)
    ]


def _tokens(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 128, (4, 13), generator=generator)


def _logits(lm, modality: Tensor | None = None) -> Tensor:
    ids = _tokens()
    modality = torch.zeros_like(ids) if modality is None else modality
    lm.context_holder.context = RoutingContext(modality, torch.ones_like(ids))
    with torch.no_grad():
        return lm(ids).logits


def _sha256(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _everything(lm) -> str:
    """Hash of every parameter and buffer, by name."""
    named = sorted([*lm.named_parameters(), *lm.named_buffers()])
    names = "".join(name for name, _ in named)
    return names + _sha256(*[tensor.detach() for _, tensor in named])


def _train(lm, seed: int = 0, steps: int = 3) -> None:
    """A few steps on random text through plain torch."""
    parameters = [p for p in lm.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    ids = _tokens(seed)
    for _ in range(steps):
        zeros = torch.zeros_like(ids)
        lm.context_holder.context = RoutingContext(zeros, torch.ones_like(ids))
        logits = lm(ids).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_every_family_extends_trains_saves_loads_and_returns_to_its_base(any_base):
    lm = load_base(any_base, dtype=torch.float32)
    before, base_logits = _everything(lm), _logits(lm)
    frozen = {name for name, _ in [*lm.named_parameters(), *lm.named_buffers()]}
    add_extension(lm, any_base, "vision", _plans(lm), _settings())
    start = {key: value.clone() for key, value in extension_state(lm).items()}

    _train(lm)

    state = {key: value.clone() for key, value in extension_state(lm).items()}
    assert {k for k in state if torch.equal(state[k], start[k])} == set()
    trained = _logits(lm)
    assert not torch.equal(trained, base_logits)

    again = load_base(any_base, dtype=torch.float32)
    attach_extension(again, "vision", _plans(again), _settings())
    load_extension_state(again, state)
    assert torch.equal(_logits(again), trained)

    remove_extension(lm, "vision")
    assert {name for name, _ in [*lm.named_parameters(), *lm.named_buffers()]} == frozen
    assert _everything(lm) == before
    assert torch.equal(_logits(lm), base_logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_copy_is_its_source_and_a_clone_its_row(any_base, dtype):
    """Bit by bit, also where a bf16 model keeps its router in fp32 (Ernie)."""
    lm = load_base(any_base, dtype=dtype)
    add_extension(lm, any_base, "vision", _plans(lm), _settings())
    for block in extended_layers(lm).values():
        bank, rows, router = block.new["vision"], block.router.rows["vision"], block.router
        for part in ("gate_up", "down", "gate_up_bias", "down_bias"):
            source = getattr(block.frozen, part)
            if source is not None:
                assert torch.equal(getattr(bank, part), source[[1, 3]])
        assert torch.equal(rows.weight, router.frozen_weight[[1, 3]])
        own = torch.tensor([0.5, 0.25])
        if router.frozen_bias is not None:
            own = own + router.frozen_bias[[1, 3]].float()
        assert torch.equal(rows.bias, own.to(rows.bias.dtype))


def test_two_extensions_trained_apart_load_together(base):
    states = {}
    for seed, name in enumerate(("vision", "sound")):
        lm = load_base(base, dtype=torch.float32)
        settings = _settings(scope=Scope.modality)
        add_extension(lm, base, name, _plans(lm), settings, modalities=(1 + seed,), seed=seed)
        for block in extended_layers(lm).values():
            torch.nn.init.normal_(block.router.rows[name].bias, mean=2.0)
            torch.nn.init.normal_(block.new[name].down)
        states[name] = {key: value.clone() for key, value in extension_state(lm).items()}
        states[f"{name} alone"] = {m: _logits(lm, torch.full((4, 13), m)) for m in (0, 1, 2)}

    both = load_base(base, dtype=torch.float32)
    for seed, name in enumerate(("vision", "sound")):
        settings = _settings(scope=Scope.modality)
        attach_extension(both, name, _plans(both), settings, modalities=(1 + seed,))
    load_extension_state(both, states["vision"] | states["sound"])

    # Every token may choose one extension's experts or none: beside the other, each does what it did.
    text, image, sound = (_logits(both, torch.full((4, 13), m)) for m in (0, 1, 2))
    assert torch.equal(text, states["vision alone"][0])
    torch.testing.assert_close(image, states["vision alone"][1], rtol=0, atol=1e-5)
    torch.testing.assert_close(sound, states["sound alone"][2], rtol=0, atol=1e-5)
    assert (image - text).abs().max() > 0.1
    assert (sound - image).abs().max() > 0.1

    remove_extension(both, "vision")
    torch.testing.assert_close(
        _logits(both, torch.full((4, 13), 2)), states["sound alone"][2], rtol=0, atol=1e-5
    )
    assert extension_state(both).keys() == states["sound"].keys()


@pytest.mark.parametrize("calibration", [CalibrationKind.none, CalibrationKind.mlp_add])
def test_clone_shared_computes_the_base_at_step_0(any_base, calibration):
    """One extension, and a second one with a clone of the same source."""
    lm = load_base(any_base, dtype=torch.float32)
    expected = _logits(lm)
    settings = _settings(row_init=RowInit.clone_shared, calibration=calibration)
    for name, sources in (("vision", [1, 3]), ("sound", [3, 2])):
        # a bias would shift the clone's share of the slot
        plans = [LayerPlan(layer, 2, sources) for layer in extended_layers(lm)]
        add_extension(lm, any_base, name, plans, settings, seed=3)
        worst = (_logits(lm) - expected).abs().max()
        assert worst < 1e-5 * expected.abs().max(), name
        records = lm.context_holder.context.records.values()
        assert any((record.expert_TS[:, -1] >= 0).any() for record in records), "no clone shares"


def test_a_clone_competes_like_its_source_where_the_base_corrects_the_choice(tmp_path):
    """DeepSeek-V3: with equal rows and no bias, a chosen source is followed by its clone."""
    save_tiny(tmp_path, "deepseek_v3", n_group=1, topk_group=1)
    lm = load_base(tmp_path, dtype=torch.float32)
    plans = [LayerPlan(layer, 1, [3]) for layer in extended_layers(lm)]
    add_extension(lm, tmp_path, "vision", plans, _settings(calibration=CalibrationKind.none))
    _logits(lm)
    for layer, record in lm.context_holder.context.records.items():
        chosen = record.expert_TS
        has_source, has_clone = (chosen == 3).any(1), (chosen == 8).any(1)
        assert extended_layers(lm)[layer].router.correction_bias[3] != 0
        assert has_clone.any()
        # a tie: only the last slot can hold one of the pair without the other
        alone = has_source ^ has_clone
        assert alone.float().mean() < 0.2
        last = chosen[alone, -1]
        assert ((last == 3) | (last == 8)).all()


def test_drop_upcycling_draws_whole_neurons_anew(base):
    lm = load_base(base, dtype=torch.float32)
    settings = _settings(expert_init=ExpertInit.drop_upcycle, drop_ratio=0.25)
    add_extension(lm, base, "vision", _plans(lm), settings)
    for block in extended_layers(lm).values():
        wide = block.frozen.shape.intermediate_dim
        for slot, source in enumerate([1, 3]):
            new, old = block.new["vision"].gate_up[slot], block.frozen.gate_up[source]
            changed = (new != old).all(1).view(2, wide)
            assert torch.equal(changed[0], changed[1])
            assert changed[0].sum() == wide // 4
            assert torch.equal(new[~changed.flatten()], old[~changed.flatten()])
            down, old_down = block.new["vision"].down[slot], block.frozen.down[source]
            assert torch.equal((down != old_down).all(0), changed[0])
            assert torch.equal(down[:, ~changed[0]], old_down[:, ~changed[0]])


@pytest.mark.parametrize("scale", [0.1, 0.5])
def test_random_experts_are_small_and_differ_everywhere(base, scale):
    lm = load_base(base, dtype=torch.float32)
    settings = _settings(expert_init=ExpertInit.random, random_scale=scale)
    add_extension(lm, base, "vision", _plans(lm), settings)
    for block in extended_layers(lm).values():
        for name in ("gate_up", "down"):
            new = getattr(block.new["vision"], name)
            sources = getattr(block.frozen, name)[[1, 3]]
            assert (new != sources).all()
            assert (new[0] != new[1]).all()
            assert float(new.detach().std() / sources.std()) == pytest.approx(scale, rel=0.1)


@pytest.mark.parametrize("init", [RowInit.zero, RowInit.mean, RowInit.domain])
def test_other_rows(base, init):
    lm = load_base(base, dtype=torch.float32)
    domain = {layer: torch.arange(32.0) for layer in extended_layers(lm)}
    add_extension(lm, base, "vision", _plans(lm), _settings(row_init=init), modality_rows=domain)
    for block in extended_layers(lm).values():
        frozen, row = block.router.frozen_weight, block.router.rows["vision"].weight[1]
        expected = {
            RowInit.zero: torch.zeros(32),
            RowInit.mean: frozen.mean(0),
            RowInit.domain: torch.arange(32.0)
            / torch.arange(32.0).norm()
            * frozen.norm(dim=1).mean(),
        }[init]
        torch.testing.assert_close(row.detach(), expected)


@pytest.mark.parametrize("placement", list(Placement))
def test_what_is_drawn_does_not_depend_on_the_placement(base, placement):
    """Two ranks hold together what one rank holds, tensor for tensor."""
    settings = _settings(expert_init=ExpertInit.drop_upcycle, placement=placement)
    whole = load_base(base, dtype=torch.float32)
    add_extension(whole, base, "vision", _plans(whole), settings, seed=5)
    together = {}
    for rank in (0, 1):
        lm = load_base(base, dtype=torch.float32, ep_rank=rank, ep_size=2)
        held = [block.frozen.expert_ids for block in extended_layers(lm).values()]
        assert held == [[0, 1, 2] if rank == 0 else [3, 4, 5]] * 2
        add_extension(lm, base, "vision", _plans(lm), settings, seed=5)
        state = extension_state(lm)
        experts = [key for key in state if ".experts." in key]
        assert len(experts) == (4 if placement is Placement.shard else 8)
        assert extension_keys(lm) == extension_keys(whole)
        together |= state
    expected = extension_state(whole)
    assert together.keys() == expected.keys()
    assert all(torch.equal(together[key], expected[key]) for key in expected)


def test_the_announcement_counts_every_logical_parameter_once(base):
    counts = []
    for ep_size in (1, 2):
        lm = load_base(base, dtype=torch.float32, ep_size=ep_size)
        frozen = int(announce(lm).split()[3].replace(",", ""))
        settings = _settings(calibration=CalibrationKind.none, placement=Placement.shard)
        add_extension(lm, base, "vision", _plans(lm), settings)
        words = announce(lm).splitlines()[0].split()
        counts.append((frozen, int(words[1].replace(",", "")), int(words[3].replace(",", ""))))
    theirs = AutoModelForCausalLM.from_pretrained(base).num_parameters()
    new = 2 * 2 * (3 * 32 * 16 + 32 + 1)
    assert counts == [(theirs, new, theirs + new)] * 2


def _add(lm, base, plans, **changes):
    add_extension(lm, base, changes.pop("name", "vision"), plans, _settings(**changes))


@pytest.mark.parametrize(
    ("plan", "changes", "message"),
    [
        (LayerPlan(1, 1, [0]), {}, "no sparse layer.*choose among \\[0, 2\\]"),
        (LayerPlan(0, 1, [6]), {}, "sources \\[6\\] are no frozen experts.*0 to 5"),
        (LayerPlan(0, 2, [1]), {}, "2 new experts, but the plan names 1 sources"),
        (LayerPlan(0, 1, [0]), {"name": "a.b"}, "without dots"),
        (LayerPlan(0, 1, [0]), {"row_init": RowInit.domain}, "run a probe stage"),
    ],
)
def test_impossible_plans_are_refused_before_a_layer_is_touched(base, plan, changes, message):
    lm = load_base(base, dtype=torch.float32)
    with pytest.raises(ValueError, match=message):
        _add(lm, base, [LayerPlan(2, 1, [0]), plan], **changes)
    assert all(block.num_new == 0 for block in extended_layers(lm).values())


def test_names_and_states_that_do_not_fit_are_refused(base):
    lm = load_base(base, dtype=torch.float32)
    _add(lm, base, _plans(lm))
    with pytest.raises(ValueError, match="already present in layer 0"):
        _add(lm, base, _plans(lm))
    with pytest.raises(ValueError, match="sound is in no layer; present are vision"):
        remove_extension(lm, "sound")
    state = {key: value.clone() for key, value in extension_state(lm).items()}
    missing = state.pop("layers.2.vision.rows.bias")
    with pytest.raises(ValueError, match="1 tensors are missing .layers.2.vision.rows.bias"):
        load_extension_state(lm, state)
    state |= {"layers.2.vision.rows.bias": missing, "layers.1.vision.rows.bias": missing}
    with pytest.raises(ValueError, match="1 are unknown .layers.1.vision.rows.bias"):
        load_extension_state(lm, state)
