"""What trains, under which names; frozen tensors are watched; other settings are refused."""

import re
import types

import pytest
import torch
from torch import nn

from moe_ext.config import ExtensionConfig, Trainable
from moe_ext.model.connectors import Connector
from moe_ext.model.extend import LayerPlan, add_extension, extended_layers, extension_state
from moe_ext.model.load import load_base
from moe_ext.model.multimodal import MultimodalMoE
from moe_ext.training.audit_checks import what_trains
from moe_ext.training.parts import FrozenWatch, choose, parts_of, statics_of
from moe_ext.training.run import check_identity
from tests.model.tiny import save_tiny

BANKS = ("new_experts", "new_rows", "calibration")


@pytest.fixture
def model(tmp_path):
    save_tiny(tmp_path, "qwen2_moe")
    lm = load_base(tmp_path, dtype=torch.float32)
    plans = [LayerPlan(0, 2, [1, 3], [0.0, 0.0]), LayerPlan(2, 1, [0], [0.0])]
    add_extension(lm, str(tmp_path), "vision", plans, ExtensionConfig())
    connectors = nn.ModuleDict({"image": Connector(6, 8, lm.config.hidden_size)})
    return MultimodalMoE(lm, {1: nn.Linear(3, 6)}, connectors)


def test_names_and_values_are_those_of_the_saved_extension(model):
    state = extension_state(model.lm)
    found = {}
    for part in parts_of(model):
        flat = part.parameter.detach().view(-1)
        for logical in part.logical():
            piece = flat[logical.offset : logical.offset + logical.numel]
            found[logical.name] = piece.view(logical.shape)
    layers = {name: value for name, value in found.items() if name.startswith("layers.")}
    assert layers.keys() == state.keys()
    assert all(torch.equal(layers[name], state[name]) for name in state)
    connectors = {n.removeprefix("connectors.") for n in found if n.startswith("connectors.")}
    assert connectors == {name for name, _ in model.connectors.named_parameters()}
    assert set(statics_of(model)) == {"connectors.image.mean", "connectors.image.scale"}


def test_only_what_is_listed_trains(model):
    chosen = choose(model, [Trainable.new_rows, Trainable.connector])
    trains = {id(p) for p in model.parameters() if p.requires_grad}
    assert trains == {id(part.parameter) for part in chosen}
    assert {part.trainable for part in chosen} == {Trainable.new_rows, Trainable.connector}
    with pytest.raises(ValueError, match="trains router_delta, but this model has no such"):
        choose(model, [Trainable.router_delta])
    for layer in extended_layers(model.lm).values():
        layer.router.add_delta()
    assert len(choose(model, [Trainable.router_delta])) == 2


def test_only_the_named_extension_trains(model, tmp_path):
    """The other one keeps its experts, rows and calibration, and its modality its connector."""
    sound = ExtensionConfig(name="sound", loss_free_rate=0.1)
    add_extension(model.lm, str(tmp_path), "sound", [LayerPlan(0, 1, [2])], sound, modalities=(2,))
    model.connectors["noise"] = Connector(6, 8, model.lm.config.hidden_size)
    model.modality_of["noise"] = 2
    kinds = [Trainable[name] for name in (*BANKS, "connector")]

    def trained(extension: str | None) -> set[str]:
        choose(model, kinds, extension)
        names = {n for n, p in model.named_parameters() if p.requires_grad}
        assert what_trains(model, kinds, extension) == [] or extension is None
        return {re.search(r"connectors.(\w+)|(?:new|rows).(\w+)", n)[0] for n in names}

    vision = {"connectors.image", "new.vision", "rows.vision"}
    assert trained("sound") == {"connectors.noise", "new.sound", "rows.sound"}
    assert trained("vision") == vision
    assert trained(None) == vision | {"connectors.noise", "new.sound", "rows.sound"}
    found = what_trains(model, kinds, "vision")
    assert any("new.sound.down trains, but it is not extension.name=vision's" in f for f in found)
    assert any("connectors.noise.out_weight trains, but it is not" in f for f in found)
    with pytest.raises(ValueError, match="no such parameter yet that is extension.name=other's"):
        choose(model, kinds, "other")


def test_only_the_named_extension_s_choice_is_balanced(model, tmp_path):
    sound = ExtensionConfig(name="sound", loss_free_rate=0.1)
    add_extension(model.lm, str(tmp_path), "sound", [LayerPlan(0, 1, [2])], sound)
    router = extended_layers(model.lm)[0].router
    watch = FrozenWatch(model, [], "vision")
    router.balance_corrections(torch.arange(9), 0.1, "vision")
    assert watch.changed(1.0) == []
    router.balance_corrections(torch.arange(9), 0.1, "sound")
    (line,) = watch.changed(1.0)
    assert "rows.sound.correction changed" in line
    watched = {name for name, _ in FrozenWatch(model, [], "sound").tensors}
    assert not any(name.endswith("rows.sound.correction") for name in watched)


PATH_OF = {
    "weight": "layers.1.self_attn.o_proj.weight",
    "expert": "layers.0.mlp.frozen.down",
    "router": "layers.0.mlp.router.frozen_weight",
    "encoder": "encoders.1.weight",
    "embedding": "embed_tokens.weight",
}


@pytest.mark.parametrize("where", sorted(PATH_OF))
def test_a_frozen_tensor_that_changes_is_named(model, where):
    chosen = choose(model, [Trainable[name] for name in (*BANKS, "connector")])
    watch = FrozenWatch(model, chosen)
    assert watch.changed(1.0) == []
    for part in chosen:
        part.parameter.data.add_(1.0)
    assert watch.changed(1.0) == []  # what trains may move
    block = extended_layers(model.lm)[0]
    tensor = {
        "weight": model.lm.model.layers[1].self_attn.o_proj.weight,
        "expert": block.frozen.down,
        "router": block.router.frozen_weight,
        "encoder": model.encoders[1].weight,
        "embedding": model.lm.get_input_embeddings().weight,
    }[where]
    flat = tensor.data.view(-1)
    flat[7] = torch.nextafter(flat[7], torch.tensor(torch.inf))  # one bit of one element
    (line,) = watch.changed(1.0)
    assert PATH_OF[where] in line
    assert "changed during training" in line


def test_the_rolling_sample_comes_round(model):
    watch = FrozenWatch(model, [])
    model.lm.model.norm.weight.data[0] += 1

    found = [line for _ in range(8) for line in watch.changed(1 / 8)]
    assert len(found) == 1
    assert "model.norm.weight" in found[0]


def test_a_frozen_gradient_is_noticed(model):
    watch = FrozenWatch(model, [])
    weight = model.lm.model.norm.weight
    weight.grad = torch.zeros_like(weight)
    (line,) = watch.changed(1.0)
    assert "model.norm.weight received a gradient" in line


def batch(sequences, accumulation, ranks):
    return {"sequences_per_rank": sequences, "accumulation": accumulation, "ranks": ranks}


@pytest.mark.parametrize(
    ("now", "outcome"),
    [
        (batch(2, 1, 2), "silent"),
        (batch(1, 2, 2), "silent"),
        (batch(1, 1, 4), "silent"),
        (batch(4, 1, 1), "silent"),
        (batch(2, 1, 4), "said"),
        (batch(2, 1, 1), "said"),
        (batch(2, 2, 2), "refused"),
        (batch(1, 1, 2), "refused"),
        (batch(1, 1, 1), "refused"),
    ],
)
def test_a_step_keeps_its_sequences_on_other_ranks_or_each_rank_its_own(tmp_path, now, outcome):
    said = []
    run = types.SimpleNamespace(
        identity=lambda name: {"seed": 1, "batch": now},
        folder=tmp_path,
        tracker=types.SimpleNamespace(say=said.append),
    )
    state = {"identity": {"seed": 1, "batch": batch(2, 1, 2)}}
    source = types.SimpleNamespace(state=state, folder=tmp_path / "result")
    if outcome == "refused":
        with pytest.raises(ValueError, match="so that a step has 4 again"):
            check_identity(run, "tune", source)
    else:
        check_identity(run, "tune", source)
    assert bool(said) == (outcome == "said")


def test_a_result_of_other_settings_is_refused(tmp_path):
    ours = {"stage": {"steps": 5}, "seed": 1, "optim": {"clip_norm": 1.0}, "batch": batch(2, 1, 2)}
    run = types.SimpleNamespace(identity=lambda name: ours, folder=tmp_path)

    def source(theirs):
        return types.SimpleNamespace(state={"identity": theirs}, folder=tmp_path / "result")

    check_identity(run, "tune", source(dict(ours)))
    # how a shard is fetched changes no result, whenever that was decided
    check_identity(run, "tune", source({**ours, "optim": {"clip_norm": 1.0, "fetch_tries": 9}}))
    # which steps are skipped may be decided anew: that is the remedy when a run ended over it
    check_identity(run, "tune", source({**ours, "stage": {"steps": 5, "max_bad_steps": 10}}))
    # nor does a setting that there was not yet, where it is what it was before
    check_identity(run, "tune", source({**ours, "optim": {}}))
    for theirs, key in (
        ({**ours, "stage": {}}, "stages.tune.steps"),
        ({**ours, "stage": {"steps": 6}}, "stages.tune.steps"),
        ({**ours, "optim": {"clip_norm": 2.0}}, "optim.clip_norm"),
        ({**ours, "seed": 2}, "seed"),
    ):
        with pytest.raises(ValueError, match=f"{key} differs"):
            check_identity(run, "tune", source(theirs))
