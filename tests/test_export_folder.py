"""An exported folder computes and writes what the live model does, where nothing of ours is installed."""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn
from transformers import AutoModelForCausalLM

from moe_ext import cli
from moe_ext.batch import Batch
from moe_ext.config import CalibrationKind, EncoderConfig, ExpertType, ExtensionConfig, Scope
from moe_ext.export import save_extension
from moe_ext.export_folder import bundled_code, export_folder
from moe_ext.model import families
from moe_ext.model.connectors import Connector
from moe_ext.model.encoders import build_encoder
from moe_ext.model.extend import (
    LayerPlan,
    add_extension,
    extended_layers,
    extension_state,
    load_base,
)
from moe_ext.model.multimodal import MultimodalMoE
from tests.data.inputs import make_tokenizer
from tests.model.tiny import TINY, save_tiny
from tests.training.tiny import make_inputs

PATCHES, LENGTH = 4, 12
PAGE = Path(__file__).parents[1] / "docs" / "families.md"
READER = Path(__file__).with_name("export_reader.py")
LOW_RANK = {"expert_type": ExpertType.lora, "lora_rank": 2}
NAMED = {
    "deepseek_v2": {},
    "deepseek_v3": LOW_RANK,
    "gpt_oss": {"calibration": CalibrationKind.none},
    "granitemoe": {},
    "mixtral": LOW_RANK,
    "olmoe": {},
    "qwen2_moe": {},
    "qwen3_moe": {},
}
"""The families that people know, and what the extension of each is like; the others' are plain."""

OTHERS = sorted(TINY.keys() - NAMED)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    make_inputs(folder)  # the tower
    for family in NAMED:
        _save_base(folder / family)
    return folder


def _save_base(place: Path) -> None:
    """The tiny model of the family that the folder is named after, with a tokenizer."""
    tokenizer = make_tokenizer()
    save_tiny(place, place.name, vocab_size=len(tokenizer) + 5)
    tokenizer.save_pretrained(place)


def _live(folder: Path, family: str, even: bool = False) -> tuple[MultimodalMoE, EncoderConfig]:
    """A model with new experts that matter in every sparse layer: two, or one and two in turn."""
    lm = load_base(folder / family, dtype=torch.float32)
    settings = ExtensionConfig(**{"scope": Scope.preserve, **NAMED.get(family, {})})
    layers = list(extended_layers(lm))
    sources = [[0, 2] if even or i % 2 else [0] for i, _ in enumerate(layers)]
    plans = [LayerPlan(layer, len(s), s) for layer, s in zip(layers, sources, strict=True)]
    add_extension(lm, str(folder / family), "vision", plans, settings)
    stream = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for value in extension_state(lm).values():
            value.add_(torch.randn(value.shape, generator=stream), alpha=0.1)
    encoder = EncoderConfig(
        name="hf_vision", path=str(folder / "tower"), image_size=16, tokens_per_item=PATCHES
    )
    tower = build_encoder(encoder.name, encoder.path, 16, PATCHES, encoder.feature_layer)
    connectors = nn.ModuleDict({"image": Connector(tower.feature_dim, 24, lm.config.hidden_size)})
    return MultimodalMoE(lm, {1: tower}, connectors).eval(), encoder


def _batch(images: bool, left: bool, width: int) -> Batch:
    """Three rows of 12, 9 and 12 tokens, padded on one side; an image in the first two."""
    stream = torch.Generator().manual_seed(3)
    ids = torch.randint(4, width, (3, LENGTH), generator=stream)
    segment, kinds = torch.ones_like(ids), torch.zeros_like(ids)
    pad = slice(0, 3) if left else slice(9, 12)
    segment[1, pad] = 0
    if images:
        kinds[0, 2 : 2 + PATCHES] = 1
        kinds[1, 4 : 4 + PATCHES] = 1
    position = (segment.cumsum(1) - 1).clamp(min=0)
    pixels = torch.randn(2 * images, 3, 16, 16, generator=stream)
    return Batch(ids, ids, kinds, segment, position, {1: pixels} if images else {})


def _right_padded(batch: Batch) -> Batch:
    """The same rows with their padding at the end, as our own batches have it."""
    pads = (batch.segment_ids == 0).sum(1).tolist()
    names = ("input_ids", "labels", "modality_ids", "segment_ids", "position_ids")
    rows = {n: [r.roll(-p) for r, p in zip(getattr(batch, n), pads, strict=True)] for n in names}
    return Batch(**{n: torch.stack(r) for n, r in rows.items()}, media=batch.media)


def _asked(batch: Batch) -> dict[str, torch.Tensor]:
    asked = {"input_ids": batch.input_ids, "attention_mask": batch.segment_ids}
    if batch.media:
        asked |= {"modality_ids": batch.modality_ids, "pixel_values": batch.media[1]}
    return asked


@torch.no_grad()
def _logits(model: MultimodalMoE, batch: Batch) -> torch.Tensor:
    """(B, S, V) of the live model, by the path that training and evaluation take."""
    every = Batch(**{**vars(batch), "labels": batch.input_ids.clone()})
    hidden: list[torch.Tensor] = []
    hook = model.lm.model.norm.register_forward_hook(lambda *args: hidden.append(args[2]))
    model(every)
    hook.remove()
    return model.logits(hidden[0])


@dataclass
class Exported:
    """A live model, what its exported folder was asked, and what it answered elsewhere."""

    model: MultimodalMoE
    passes: dict[str, Batch]
    """Right-padded batches."""
    prompts: dict[str, Batch]
    """Left-padded ones."""
    answer: dict


@pytest.fixture(scope="module")
def exported(folder, tmp_path_factory) -> Callable[[str], Exported]:
    """Family -> what became of it; all that are known, or all others, are made and read at once."""
    made: dict[str, Exported] = {}

    def of(family: str) -> Exported:
        if family in OTHERS and family not in made:
            for other in OTHERS:
                _save_base(folder / other)
            made.update(_exported(folder, OTHERS, tmp_path_factory))
        elif family not in made:
            made.update(_exported(folder, list(NAMED), tmp_path_factory))
        return made[family]

    return of


def _exported(folder: Path, families: list[str], tmp_path_factory) -> dict[str, Exported]:
    """Read by one process: to start it takes longer than all the rest."""
    places, made = {}, {}
    for family in families:
        place = places[family] = tmp_path_factory.mktemp(family)
        model, encoder = _live(folder, family)
        save_extension(model.lm, place / "extension", connectors=model.connectors)
        encoders = {"image": encoder}
        export_folder(folder / family, place / "extension", place / "folder", encoders=encoders)
        width, cases = model.lm.config.vocab_size - 5, {"text": False, "images": True}
        passes = {name: _batch(images, False, width) for name, images in cases.items()}
        prompts = {name: _batch(images, True, width) for name, images in cases.items()}
        given = {
            "passes": {name: _asked(batch) for name, batch in passes.items()},
            "prompts": {name: _asked(batch) for name, batch in prompts.items()},
            "text": "A picture of",
        }
        if family == "qwen2_moe":  # the page's example runs where nothing of ours is, too
            _, given["page"] = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
        torch.save(given, place / "asked.pt")
        made[family] = Exported(model, passes, prompts, {})
    outside = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-I", READER, *places.values()],
        cwd=tmp_path_factory.mktemp("elsewhere"),
        env=outside | {"HF_MODULES_CACHE": str(tmp_path_factory.mktemp("modules"))},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for family, place in places.items():
        made[family].answer = torch.load(place / "answers.pt", weights_only=False)
    return made


@pytest.mark.parametrize(
    "family", [*NAMED, *(pytest.param(other, marks=pytest.mark.slow) for other in OTHERS)]
)
def test_without_our_package_it_computes_and_writes_the_same(folder, exported, family):
    made = exported(family)
    model, answer, passes, prompts = made.model, made.answer, made.passes, made.prompts
    assert answer["ours"] == []
    assert answer["class"] == "MoeExt" + type(model.lm).__name__
    assert not answer["trains"]
    for name, batch in passes.items():
        real = batch.segment_ids != 0
        ours, theirs = _logits(model, batch)[real], answer["logits"][name][real]
        assert (ours - theirs).abs().max() < 1e-5 * ours.abs().max()
    plain = AutoModelForCausalLM.from_pretrained(folder / family, dtype=torch.float32)
    with torch.no_grad():
        of_base = plain(**_asked(passes["text"])).logits
    real = passes["text"].segment_ids != 0
    torch.testing.assert_close(answer["logits"]["text"][real], of_base[real], rtol=1e-4, atol=1e-4)
    stop = model.lm.generation_config.eos_token_id
    for name, batch in prompts.items():
        written = model.generate(_right_padded(batch), 8, {stop})
        assert any(written)
        for cached in (True, False):
            for row, ours in zip(answer["written", cached][name], written, strict=True):
                theirs = row[LENGTH:].tolist()
                assert theirs[: len(ours)] == ours
                assert len(ours) == 8 or theirs[len(ours)] == stop

    # a picture by the reader's own means is what the live model's preprocessing makes of it
    pixels = model.encoders[1].preprocess(Image.new("RGB", (9, 5), "red"))
    inputs = answer["inputs"]
    ids, kinds = inputs["input_ids"], inputs["modality_ids"]
    assert int((kinds == 1).sum()) == PATCHES
    assert torch.equal(inputs["pixel_values"][0], pixels)
    ones = torch.ones_like(ids)
    batch = Batch(ids, ids, kinds, ones, ones.cumsum(1) - 1, {1: inputs["pixel_values"]})
    torch.testing.assert_close(answer["from an image"], _logits(model, batch), rtol=1e-5, atol=1e-5)


def _hashes(folder: Path) -> dict[str, str]:
    files = (file for file in folder.iterdir() if not file.name.startswith("."))
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_taking_the_extension_out_leaves_the_base_byte_for_byte(folder, tmp_path):
    model, _ = _live(folder, "mixtral")
    save_extension(model.lm, tmp_path / "extension")
    for link in (False, True):
        out = export_folder(
            folder / "mixtral", tmp_path / "extension", tmp_path / f"{link}", link=link
        )
        assert _hashes(out / "base") == _hashes(folder / "mixtral")
        assert _hashes(out / "extension") == _hashes(tmp_path / "extension")
        assert (
            os.path.samefile(out / "base" / "config.json", folder / "mixtral" / "config.json")
            is link
        )


def test_the_command_writes_each_form(folder, tmp_path, capsys):
    model, _ = _live(folder, "mixtral", even=True)
    extension = save_extension(model.lm, tmp_path / "extension", connectors=model.connectors)
    base = ["--base", str(folder / "mixtral")]

    def export(name: str, *words: str) -> Path:
        assert cli.main(["export", str(extension), str(tmp_path / name), *words]) == 0
        return tmp_path / name

    assert _hashes(export("alone", "--form", "extension")) == _hashes(extension)
    whole = export("whole", *base)
    assert "images are left out: no encoder is known" in capsys.readouterr().out
    assert json.loads((whole / "config.json").read_text())["moe_ext"] == {
        "dtype": "float32",
        "encoders": {},
    }
    one = export("one", "--form", "checkpoint", "--approximate", *base)
    assert "calibration in layer 0" in capsys.readouterr().out
    assert AutoModelForCausalLM.from_pretrained(one).config.num_local_experts == 7

    def refused(message: str, *words: str) -> None:
        with pytest.raises(SystemExit) as stopped:
            cli.main(["export", *words])
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err

    refused("exists already", str(extension), str(whole), *base)
    refused("name the folder of its base with --base", str(extension), str(tmp_path / "new"))
    refused("is no extension", str(folder / "tower" / "none"), str(tmp_path / "new"))
    refused("scope=preserve", str(extension), str(tmp_path / "new"), "--form", "checkpoint", *base)


def test_the_row_on_the_page_is_mixtral_s():
    row, _ = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    assert eval("{" + row + "}", dict(vars(families))) == {"mixtral": families.FAMILIES["mixtral"]}


def test_the_code_in_the_folder_needs_nothing_but_its_own_files():
    code = bundled_code()
    assert "modeling_moe_ext" in code
    assert "moe_ext_model_routing" in code
    for name, source in code.items():
        compile(source, name, "exec")
        assert "from moe_ext" not in source
        assert "import moe_ext" not in source
        for library in ("hydra", "omegaconf", "deepspeed"):
            assert f"import {library}" not in source
            assert f"from {library}" not in source
