"""Extensions as folders: saved and loaded back, and exported to the base's own architecture."""

import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from moe_ext.config import CalibrationKind, ExpertType, ExtensionConfig, Placement, RowInit, Scope
from moe_ext.export import load_extension, read_manifest, save_extension
from moe_ext.export_hf import export_uniform
from moe_ext.model.connectors import Connector
from moe_ext.model.context import RoutingContext
from moe_ext.model.extend import (
    LayerPlan,
    add_extension,
    extended_layers,
    extension_state,
    load_base,
    remove_extension,
)
from moe_ext.model.rows import NewRows
from tests.model.tiny import TINY, save_tiny


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """model_type -> folder of its tiny model, made when asked for."""
    made = {}

    def base(model_type: str):
        if model_type not in made:
            made[model_type] = tmp_path_factory.mktemp(model_type)
            save_tiny(made[model_type], model_type)
        return made[model_type]

    return base


def _extended(folder, counts: dict[int, int] | None = None, noise: float = 0.1, **changes):
    """A base with trained-looking new experts, `counts[layer]` a layer or 2 in every sparse one."""
    lm = load_base(folder, dtype=torch.float32)
    counts = counts or dict.fromkeys(extended_layers(lm), 2)
    plans = [LayerPlan(layer, num, list(range(num))) for layer, num in counts.items()]
    settings = ExtensionConfig(**{"name": "vision", "scope": Scope.joint, **changes})
    add_extension(lm, folder, settings.name, plans, settings)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in extension_state(lm).values():
            value.add_(torch.randn(value.shape, generator=generator), alpha=noise)
    return lm


def _logits(lm, modality: int = 0) -> torch.Tensor:
    ids = torch.randint(3, 128, (3, 12), generator=torch.Generator().manual_seed(0))
    modality_ids = torch.full_like(ids, modality)
    if hasattr(lm, "context_holder"):
        lm.context_holder.context = RoutingContext(modality_ids, torch.ones_like(ids))
    with torch.no_grad():
        return lm(ids).logits


def _new_rows(lm) -> list[NewRows]:
    return [rows for b in extended_layers(lm).values() for rows in b.router.rows.values()]


@pytest.mark.parametrize("expert_type", list(ExpertType))
@pytest.mark.parametrize("model_type", sorted(TINY))
def test_a_saved_extension_loads_into_the_base_as_the_live_model(
    bases, model_type, expert_type, tmp_path
):
    base = bases(model_type)
    lm = _extended(base, scope=Scope.preserve, expert_type=expert_type, lora_rank=3)
    folder = save_extension(lm, tmp_path / "extension", notes={"steps": 3})

    again = load_base(base, dtype=torch.float32)
    manifest = load_extension(again, folder)

    assert manifest["notes"] == {"steps": 3}
    for modality in (0, 1):
        assert torch.equal(_logits(again, modality), _logits(lm, modality))
    assert not torch.equal(_logits(lm, 1), _logits(lm, 0))
    assert not any(p.requires_grad for p in again.parameters())
    assert sorted(p.name for p in folder.iterdir()) == ["extension.safetensors", "manifest.json"]


def test_layers_and_settings_may_differ_and_extensions_share_a_folder(bases, tmp_path):
    base = bases("mixtral")
    lm = _extended(base, {0: 1, 2: 3}, calibration=CalibrationKind.vector_add, scope=Scope.modality)
    settings = ExtensionConfig(
        name="sound", scope=Scope.preserve, row_init=RowInit.clone_shared, num_new_experts=2
    )
    add_extension(lm, base, "sound", [LayerPlan(1, 2, [4, 2])], settings, modalities=(2, 3))
    folder = save_extension(lm, tmp_path / "both")
    again = load_base(base, dtype=torch.float32)
    load_extension(again, folder, placement=Placement.shard)
    for modality in (0, 1, 2, 3):
        assert torch.equal(_logits(again, modality), _logits(lm, modality))
    assert [b.num_new for b in extended_layers(again).values()] == [1, 2, 3]

    remove_extension(lm, "sound")
    assert not torch.equal(_logits(lm, 1), _logits(lm, 0))


def test_loss_free_corrections_are_saved_and_loaded(bases, tmp_path):
    for model_type in ("mixtral", "ernie4_5_moe"):
        base = bases(model_type)
        lm = _extended(base, loss_free_rate=0.1)
        for rows in _new_rows(lm):
            rows.correction += torch.tensor([0.3, -0.2])
        folder = save_extension(lm, tmp_path / model_type)
        again = load_base(base, dtype=torch.float32)
        load_extension(again, folder)
        assert torch.equal(_logits(again), _logits(lm))
        for ours, theirs in zip(_new_rows(again), _new_rows(lm), strict=True):
            assert torch.equal(ours.correction, theirs.correction)
        assert all(rows.learns_correction for rows in _new_rows(again))


def test_connectors_travel_with_the_extension(bases, tmp_path):
    def connectors(seed: int) -> nn.ModuleDict:
        return nn.ModuleDict({"image": Connector(5, 7, 32, seed=seed)})

    lm = _extended(bases("olmoe"))
    saved = connectors(1)
    saved["image"].mean += 0.5
    folder = save_extension(lm, tmp_path / "extension", connectors=saved)
    loaded = connectors(2)
    load_extension(load_base(bases("olmoe"), dtype=torch.float32), folder, connectors=loaded)
    for key, value in saved.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)
    with pytest.raises(ValueError, match="holds connectors .'image'., the model has .'sound'."):
        load_extension(
            load_base(bases("olmoe"), dtype=torch.float32),
            folder,
            connectors=nn.ModuleDict({"sound": Connector(5, 7, 32)}),
        )


def test_runs_that_call_their_modality_1_stand_side_by_side(bases, tmp_path):
    """By their connectors' names, or by ids; a bias holds one of them back."""
    base = bases("mixtral")

    def connectors(*names: str) -> nn.ModuleDict:
        return nn.ModuleDict({name: Connector(5, 7, 32, seed=len(name)) for name in names})

    alone = {}
    for name, modality in (("vision", "image"), ("sound", "noise")):
        lm = _extended(base, name=name, scope=Scope.modality)
        alone[name] = _logits(lm, 1)
        save_extension(lm, tmp_path / name, connectors=connectors(modality))
    both, loaded = load_base(base, dtype=torch.float32), connectors("image", "noise")
    for name in alone:
        load_extension(both, tmp_path / name, connectors=loaded)
    ids = {n: rows.modalities for n, rows in extended_layers(both)[0].router.rows.items()}
    assert ids == {"vision": (1,), "sound": (2,)}
    for name, modality in (("vision", 1), ("sound", 2)):
        torch.testing.assert_close(_logits(both, modality), alone[name], rtol=0, atol=1e-5)

    save_extension(both, tmp_path / "both", connectors=loaded)
    again = load_base(base, dtype=torch.float32)
    load_extension(again, tmp_path / "both", connectors=connectors("noise", "other", "image"))
    ids = {n: rows.modalities for n, rows in extended_layers(again)[0].router.rows.items()}
    assert ids == {"vision": (3,), "sound": (1,)}

    held_back = load_base(base, dtype=torch.float32)
    load_extension(held_back, tmp_path / "vision", modality_ids={1: 2}, row_bias=-0.75)
    for ours, theirs in zip(_new_rows(held_back), _new_rows(both)[::2], strict=True):
        assert ours.modalities == (2,)
        torch.testing.assert_close(ours.bias, theirs.bias - 0.75)
    for wrong in ({3: 2}, {1: 0}):
        with pytest.raises(
            ValueError, match="must give ids of the folder .\\[1\\]. ids of this model"
        ):
            load_extension(load_base(base, dtype=torch.float32), tmp_path / "vision",
                           modality_ids=wrong)  # fmt: skip


def test_the_page_s_example_runs_as_it_stands(tmp_path, monkeypatch):
    """Two extensions on one base, from Python (docs/extension.md)."""
    page = Path(__file__).parents[1] / "docs" / "extension.md"
    (code,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.S)
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "base", "mixtral")
    for name, modality in (("vision", "image"), ("sound", "sound")):
        connector = nn.ModuleDict({modality: Connector(5, 1536, 32)})
        save_extension(_extended("base", name=name), f"runs/{name}/extension", connectors=connector)
    encoders = {f"{kind}_encoder": nn.Module() for kind in ("image", "sound")}
    for encoder in encoders.values():
        encoder.feature_dim = 5
    names = dict(encoders)
    exec(code, names)
    assert read_manifest("both")["connectors"] == ["image", "sound"]
    assert read_manifest("both")["extensions"].keys() == {"vision", "sound"}
    assert list(extended_layers(names["lm"])[0].new) == ["vision"]


def test_loading_leaves_what_trains_as_it_is(bases, tmp_path):
    base = bases("mixtral")
    save_extension(_extended(base), tmp_path / "vision")
    lm = _extended(base, name="sound")
    load_extension(lm, tmp_path / "vision")
    for block in extended_layers(lm).values():
        assert all(p.requires_grad for p in block.new["sound"].parameters())
        assert not any(p.requires_grad for p in block.new["vision"].parameters())
        assert not any(p.requires_grad for p in block.router.rows["vision"].parameters())


def test_a_folder_that_does_not_fit_is_refused(bases, tmp_path):
    lm = _extended(bases("mixtral"))
    folder = save_extension(lm, tmp_path / "extension")
    with pytest.raises(ValueError, match="exists already"):
        save_extension(lm, folder)
    with pytest.raises(ValueError, match=r"extends the base .* has other tensors"):
        load_extension(load_base(bases("olmoe"), dtype=torch.float32), folder)
    with pytest.raises(ValueError, match="vision is in the model already"):
        load_extension(lm, folder)
    with pytest.raises(ValueError, match="nothing to save"):
        save_extension(load_base(bases("mixtral"), dtype=torch.float32), tmp_path / "none")

    fresh = load_base(bases("mixtral"), dtype=torch.float32)
    tensors = folder / "extension.safetensors"
    content = bytearray(tensors.read_bytes())
    content[-1] ^= 1
    tensors.write_bytes(bytes(content))
    with pytest.raises(ValueError, match="damaged"):
        load_extension(fresh, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"format": 9}))
    with pytest.raises(ValueError, match="format 9"):
        load_extension(fresh, folder)


def test_sharded_experts_of_other_ranks_are_not_forgotten(bases, tmp_path):
    lm = load_base(bases("mixtral"), dtype=torch.float32, ep_rank=0, ep_size=2)
    settings = ExtensionConfig(scope=Scope.joint, placement=Placement.shard)
    add_extension(lm, bases("mixtral"), "vision", [LayerPlan(1, 2, [0, 1])], settings)
    with pytest.raises(ValueError, match="2 tensors of the extension are on other ranks"):
        save_extension(lm, tmp_path / "extension")
    assert not (tmp_path / "extension").exists()


def _exact(folder, counts=None, **changes):
    """An extension that the architecture itself can express."""
    lm = _extended(folder, counts, calibration=CalibrationKind.none, **changes)
    for rows in _new_rows(lm):
        if next(iter(extended_layers(lm).values())).router.frozen_bias is None:
            rows.bias.data.zero_()
    return lm


ONE_GROUP = {"n_group": 1, "topk_group": 1}
GROUPED = {
    "deepseek_v2": {"topk_method": "greedy", **ONE_GROUP},
    **dict.fromkeys(
        ["deepseek_v3", "deepseek_v32", "dots1", "glm4_moe", "glm4_moe_lite"], ONE_GROUP
    ),
}
"""Families whose tiny configurations route by groups, and what turns these off."""


@pytest.fixture(scope="module")
def ungrouped(bases, tmp_path_factory):
    """model_type -> folder of its tiny model without groups of experts, made when asked for."""
    made = {}

    def base(model_type: str):
        if model_type not in GROUPED:
            return bases(model_type)
        if model_type not in made:
            made[model_type] = tmp_path_factory.mktemp(model_type)
            save_tiny(made[model_type], model_type, **GROUPED[model_type])
        return made[model_type]

    return base


@pytest.mark.parametrize("model_type", sorted(TINY))
def test_transformers_computes_what_the_live_model_does(ungrouped, model_type, tmp_path):
    lm = _exact(ungrouped(model_type))
    assert export_uniform(lm, tmp_path / "hf") == []
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    expected = _logits(lm)
    assert (_logits(theirs) - expected).abs().max() < 1e-5 * expected.abs().max()
    plain = AutoModelForCausalLM.from_pretrained(ungrouped(model_type), dtype=torch.float32)
    assert (_logits(plain) - expected).abs().max() > 1e-3 * expected.abs().max()


@pytest.mark.parametrize("model_type", ["qwen2_moe", "gpt_oss"])
def test_low_rank_experts_are_merged(bases, model_type, tmp_path):
    lm = _exact(bases(model_type), expert_type=ExpertType.lora, lora_rank=2)
    assert export_uniform(lm, tmp_path / "hf") == []
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    expected = _logits(lm)
    assert (_logits(theirs) - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("model_type", ["gpt_oss", "deepseek_v3"])
def test_layers_with_fewer_experts_are_padded_where_the_router_has_a_bias(
    ungrouped, model_type, tmp_path
):
    base = ungrouped(model_type)
    sparse = list(extended_layers(load_base(base, dtype=torch.float32)))
    lm = _exact(base, {sparse[0]: 2, sparse[1]: 1})
    export_uniform(lm, tmp_path / "hf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    expected = _logits(lm)
    assert (_logits(theirs) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_what_an_architecture_cannot_say_is_refused_with_the_reason(bases, tmp_path):
    def refused(lm, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            export_uniform(lm, tmp_path / "hf")
        assert not (tmp_path / "hf").exists()

    base = bases("mixtral")
    refused(_exact(base, {0: 2, 1: 1}), "different numbers of new experts .*0: 2, 1: 1, 2: 0")
    refused(_exact(bases("ernie4_5_moe"), {1: 1}), "different numbers of new experts")
    for model_type in GROUPED:
        refused(_exact(bases(model_type)), "groups of equal size")
    refused(load_base(base, dtype=torch.float32), "no extension")
    lm = _extended(base, row_init=RowInit.clone_shared, calibration=CalibrationKind.none)
    refused(lm, "clone_shared")
    lm = _extended(base, scope=Scope.preserve)
    refused(lm, "scope=preserve.*row biases in layer 0.*calibration in layer 2")

    left_out = export_uniform(lm, tmp_path / "hf", approximate=True)
    assert len(left_out) == 7
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hf").config.num_local_experts == 7
