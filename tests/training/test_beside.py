"""`beside.<word>=folder`: runs of the tiny chain on two ranks train one extension beside a finished one.

"vision" is trained first, alone. Then "sound" with an encoder of its own, stopped and resumed; "task", a
second extension for the same modality; "bare", which has no encoder of vision's.
"""

import json
import os
import shlex
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from moe_ext import train
from moe_ext.compose import CONF_DIR, load
from moe_ext.export import read_manifest
from moe_ext.export_command import export
from moe_ext.model.extend import extended_layers, extension_state
from moe_ext.preflight import check_files
from moe_ext.training import stages
from moe_ext.training.checkpoint import Published
from moe_ext.training.engine import Engine
from moe_ext.training.signals import STOPPED_EXIT_CODE
from moe_ext.training.topology import Ranks
from tests.infra.documents import lines_of
from tests.model.tiny import save_tiny
from tests.ranks import run_ranks
from tests.training.tiny import make_inputs, overrides

SHORT = (
    "parallel.ep_size=2", "stages.align.steps=2", "stages.probe.steps=1", "stages.tune.steps=4",
    "evaluation.candidates=2", "evaluation.captions=1", "stages.probe.statistics_samples=8",
)  # fmt: skip
SECOND = "+beside.second={folder}/sound"


def sound_encoder(folder: Path, *more: str) -> tuple[str, ...]:
    return (
        "+encoder@encoder.sound=clip", f"encoder.sound.path={folder}/tower",
        "encoder.sound.image_size=16", "encoder.sound.tokens_per_item=4", *more,
    )  # fmt: skip


def words_of_the_page() -> list[str]:
    (line,) = lines_of("runs")
    return shlex.split(line)[2:]


def settings(folder: Path, name: str) -> list[str]:
    own = {
        "vision": ("extension.layer_share=1.0",),
        "sound": sound_encoder(folder, "extension.placement=shard", "extension.num_new_experts=3"),
        # the page's command, word for word, and what makes both extensions' experts be chosen
        "task": (*words_of_the_page(), "+beside_bias.vision=2.5", "extension.affected_share=0.5"),
        "bare": sound_encoder(
            folder, "chain=[extend,tune]", "extension.layers=[2]", "extension.scope=modality",
            "connector.closed_form_samples=0", "stages.tune.steps=1",
        ),
    }[name]  # fmt: skip
    beside = (f"+beside.vision={folder}/vision",) if name in ("sound", "bare") else ()
    named = () if name == "task" else (f"extension.name={name}",)
    given = overrides(folder, name, *SHORT, *named, *beside, *own)
    if name == "bare":
        given = [item for item in given if "encoder.image" not in item]
        given.append("~encoder@encoder.image")
    return given


def run(folder: Path, name: str, *more: str) -> int:
    rank, world = dist.get_rank(), dist.get_world_size()
    config = load(CONF_DIR, [*settings(folder, name), *more])
    return train.run(config, Ranks(rank, world, rank, world))


def compare_at_every_end(folder: Path) -> None:
    """From now on a stage ends with vision's tensors bit for bit as its folder has them."""
    finish = stages.finish

    def compared(run, name, model, *args, **kwargs):
        if run.others:
            stored = load_file(folder / "vision/extension/extension.safetensors")
            bias = run.config.beside_bias.get("vision", 0.0)
            live = extension_state(model.lm, ["vision"])
            if "image" in model.connectors:
                state = model.connectors["image"].state_dict()
                live |= {f"connectors.image.{key}": value for key, value in state.items()}
            assert len(live) > 10
            for key, value in live.items():
                wanted = stored[key] + bias if key.endswith("rows.bias") else stored[key]
                assert torch.equal(value, wanted), (run.config.name, name, key)
            rows = extended_layers(model.lm)[2].router.rows
            ids = {extension: rows[extension].modalities for extension in rows}
            wanted = {"sound": ((1,), (2,)), "task": ((1,), (1,)), "bare": ((2,), (1,))}
            of_vision, of_own = wanted[run.config.name]
            assert ids["vision"] == of_vision
            assert ids.get(run.config.name, of_own) == of_own
        return finish(run, name, model, *args, **kwargs)

    stages.finish = compared


def runs(folder: Path) -> dict[str, int]:
    os.chdir(folder)  # where runs/vision is, as the page names it
    codes = {"vision": run(folder, "vision")}
    compare_at_every_end(folder)
    step = Engine.step

    def ask_in_tune(self, learning_rate, **how):
        if self.settings.accumulation == 2 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, learning_rate, **how)

    Engine.step = ask_in_tune
    codes["stopped"] = run(folder, "sound")
    Engine.step = step
    for name in ("sound", "task", "bare"):
        codes[name] = run(folder, name)
    codes["changed"] = run(folder, "task", "beside_bias.vision=-1.0")
    return codes


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("beside")
    make_inputs(folder)
    (folder / "runs").symlink_to(folder)
    return folder, run_ranks(runs, 2, folder)[0]


def evaluation(folder: Path, name: str) -> dict:
    return json.loads((folder / name / "evaluation.json").read_text())


def test_every_run_ends_as_it_should(finished):
    folder, codes = finished
    assert codes.pop("stopped") == STOPPED_EXIT_CODE
    assert codes.pop("changed") == 1
    assert set(codes.values()) == {0}
    assert "beside" in json.loads((folder / "task" / "status.json").read_text())["error"]
    events = [json.loads(x) for x in (folder / "sound/metrics.jsonl").read_text().splitlines()]
    assert [e["step"] for e in events if e["event"] == "resume"] == [2]
    tuned = [e["step"] for e in events if e["event"] == "step" and e["stage"] == "tune"]
    assert tuned == [1, 2, 3, 4]
    assert {len(s) for e in events for s in e.get("new_expert_share", {}).values()} == {3}


@pytest.mark.parametrize("name", ["sound", "task"])
def test_text_is_the_bases_bit_for_bit(finished, name):
    folder, _ = finished
    base = evaluation(folder, "vision")["text_before"]["logits_sha256"]
    parts = evaluation(folder, name)
    hashes = {parts[key]["logits_sha256"] for key in ("text_before", "text_after")}
    assert hashes == {base}


@pytest.mark.parametrize(
    ("name", "connectors"), [("sound", ["sound"]), ("task", ["image"]), ("bare", ["sound"])]
)
def test_results_and_extension_are_the_runs_own(finished, name, connectors):
    folder, _ = finished
    result = Published(folder / name / "stages" / "tune" / "result")
    owners = {key.split(".")[2] for key in result.tensors if key.startswith("layers.")}
    assert owners == {name}
    held = {key.split(".")[1] for key in result.tensors if key.startswith("connectors.")}
    assert held == ({"sound"} if connectors == ["sound"] else set())
    manifest = read_manifest(folder / name / "extension")
    assert list(manifest["extensions"]) == [name]
    assert manifest["extensions"][name]["modalities"] == [1]
    assert manifest["connectors"] == connectors
    assert list(manifest["notes"]["beside"]) == ["vision"]


def test_a_second_task_keeps_the_connector_and_shares_the_tokens(finished):
    folder, _ = finished
    theirs, ours = (
        load_file(folder / name / "extension/extension.safetensors") for name in ("vision", "task")
    )
    connector = [key for key in theirs if key.startswith("connectors.")]
    assert connector
    assert all(torch.equal(theirs[key], ours[key]) for key in connector)
    layers = evaluation(folder, "task")["experts"]["trained"]["layers"]
    (both,) = [layer["count"] for layer in layers if layer["num_new"] == 2]
    assert all(sum(kind[column] for kind in both.values()) > 0 for column in (-2, -1))
    assert both["text alone"][-2:] == [0, 0]


def test_the_folder_for_transformers_holds_the_runs_own(finished, tmp_path):
    folder, _ = finished
    export(folder / "sound", tmp_path / "out", "folder")
    assert [path.name for path in (tmp_path / "out/encoders").iterdir()] == ["sound"]


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("task", ["beside.vision=/nowhere"], "beside.vision=/nowhere: .* has no manifest.json"),
        ("task", ["extension.name=vision"], "extension vision, which extension.name names too"),
        ("task", ["base.path={folder}/other"], "but base.path=.* has other tensors"),
        ("task", ["+beside.second={folder}/vision"], "which beside.vision names too"),
        (
            "bare",
            [SECOND, "+beside.third={folder}/bare", "extension.name=new"],
            "both hold a connector",
        ),
        ("task", ["stages.tune.train=[connector]"], "stages.tune.train holds connector, but"),
        ("task", ["+beside_bias.second=1"], "beside_bias.second has no extension to go with"),
        ("task", ["encoder.image.path={folder}/wide"], "for 16 features, encoder.image gives 32"),
    ],
)
def test_what_cannot_stand_beside_is_refused_in_one_line(
    finished, monkeypatch, name, more, message
):
    folder, _ = finished
    monkeypatch.chdir(folder)
    if not (folder / "other").exists():
        save_tiny(folder / "other", "qwen2_moe")
        make_wide_tower(folder)
    given = [*settings(folder, name), *(item.format(folder=folder) for item in more)]
    with pytest.raises(ValueError, match=message) as raised:
        check_files(load(CONF_DIR, given))
    assert "\n" not in str(raised.value)


def test_two_may_stand_beside(finished, monkeypatch):
    folder, _ = finished
    monkeypatch.chdir(folder)
    check_files(load(CONF_DIR, [*settings(folder, "task"), SECOND.format(folder=folder)]))


def make_wide_tower(folder: Path) -> None:
    config = json.loads((folder / "tower/config.json").read_text()) | {"hidden_size": 32}
    (folder / "wide").mkdir()
    (folder / "wide/config.json").write_text(json.dumps(config))
