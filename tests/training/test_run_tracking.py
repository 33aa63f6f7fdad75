"""What a whole run leaves in its views: one start of a tiny run with W&B offline and TensorBoard, read
back by their own readers. The panels of the dashboard are compared with it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moe_ext.jobs import dashboard, watch
from tests.infra.slurm_cluster import free_ports
from tests.training.tiny import make_inputs, overrides

pytest.importorskip("wandb")
ROOT = Path(__file__).resolve().parents[2]


def read_wandb(folder: Path) -> dict[str, Any]:
    """The records of an offline run: its facts, its history rows, and what became its summary."""
    words = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    found: dict[str, Any] = {"history": [], "summary": {}, "text": done.stdout}
    for record in map(json.loads, done.stdout.splitlines()):
        if record["type"] == "history":
            found["history"].append(record["history"]["item"])
        elif record["type"] == "summary":
            found["summary"] |= record["summary"]["update"]
        else:
            found.setdefault(record["type"], []).append(record[record["type"]])
    return found


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    make_inputs(folder)
    has_tensorboard = "true" if _has_tensorboard() else "false"
    words = overrides(
        folder,
        "tiny",
        "tracking=wandb",
        "tracking.wandb_project=project",
        f"tracking.tensorboard={has_tensorboard}",
        "tracking.alerts.window=2",
        "tracking.alerts.loss_spike=1.0001",
        "stages.tune.router_kl_coefficient=0.01",
    )
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    variables = {"PYTHONPATH": path, "WANDB_MODE": "offline", "HOME": str(folder)}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "1"]
    torchrun += ["--master-port", str(free_ports(1)[0])]
    done = subprocess.run(
        [*torchrun, "-m", "moe_ext.train", *words],
        env=os.environ | variables | {"MOE_EXT_GROUP": "sweep-7"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder / "tiny"


def _has_tensorboard() -> bool:
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        return False
    return True


@pytest.fixture(scope="module")
def stages(run_dir: Path) -> dict[str, dict[str, Any]]:
    """Job type -> what its W&B run recorded."""
    found = {}
    for folder in sorted((run_dir / "wandb").glob("offline-run-*")):
        record = read_wandb(folder)
        found[record["run"][0]["job_type"]] = record
    return found


def steps(run_dir: Path, stage: str) -> list[dict[str, Any]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["event"] == "step" and r["stage"] == stage]


def test_a_stage_is_a_run_and_all_are_one_group(run_dir: Path, stages: dict) -> None:
    assert set(stages) == {"align", "probe", "tune", "evaluate"}
    about = {name: record["run"][0] for name, record in stages.items()}
    assert {a["run_group"] for a in about.values()} == {"sweep-7"}
    assert {a["project"] for a in about.values()} == {"project"}
    identity = (run_dir / "wandb_id").read_text()
    assert {a["run_id"] for a in about.values()} == {f"{identity}-{name}" for name in stages}


def test_steps_run_on_over_the_stages_and_are_those_of_the_record(
    run_dir: Path, stages: dict
) -> None:
    seen = []
    for name in ("align", "probe", "tune"):
        rows = stages[name]["history"]
        assert [row["_step"] for row in rows] == [r["global_step"] for r in steps(run_dir, name)]
        last = steps(run_dir, name)[-1]
        assert rows[-1]["loss/nll"] == pytest.approx(last["loss"]["nll"])
        seen += [row["_step"] for row in rows]
    assert seen == list(range(1, len(seen) + 1))


def test_every_value_that_a_panel_names_is_logged(stages: dict) -> None:
    logged = {
        "step": {key for row in stages["tune"]["history"] for key in row},
        "summary": set(stages["evaluate"]["summary"]),
        "table": {key.split(".")[0] for row in stages["evaluate"]["history"] for key in row},
    }
    for kind, pattern in dashboard.named_values():
        assert any(re.search(pattern, key) for key in logged[kind]), f"{kind}: {pattern}"


def test_the_checkpoint_s_and_the_console_s_alerts_are_there(run_dir: Path, stages: dict) -> None:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    alerts = [r for r in map(json.loads, lines) if r["event"] == "alert"]
    assert alerts  # the loss cannot fall in every step
    sent = [record["text"] for name in stages for record in stages[name].get("alert", [])]
    assert sent == [alert["text"] for alert in alerts]


def test_the_resolved_configuration_is_there(stages: dict) -> None:
    for record in stages.values():
        config = json.dumps(record.get("config", []) + record["run"])
        assert "sequences_per_rank" in config


def test_images_with_captions_and_the_extension_are_there(run_dir: Path, stages: dict) -> None:
    record = stages["evaluate"]
    (folder,) = (run_dir / "wandb").glob("offline-run-*-evaluate")
    gallery = json.loads((run_dir / "evaluation.json").read_text())["gallery"]
    (table,) = folder.glob("files/media/table/gallery*.table.json")
    content = json.loads(table.read_text())
    assert content["columns"][:3] == ["image", "truth", "written"]
    assert [row[1] for row in content["data"]] == [item["truth"] for item in gallery]
    contents = [c for a in record["artifact"] for c in a["manifest"]["contents"]]
    images = [Path(c["local_path"]) for c in contents if c["path"].endswith(".png")]
    assert len(images) == len(gallery)
    for image in images:  # kept where the run is, for a later `wandb sync`
        assert image.is_relative_to(run_dir)
        assert image.stat().st_size > 0
    artifacts = [a for a in record["artifact"] if a["type"] == "extension"]
    assert [a["name"] for a in artifacts] == ["tiny-extension"]
    for name in ("manifest.json", "extension.safetensors"):
        assert name in json.dumps(artifacts[0])


def test_tensorboard_reads_the_same_values(run_dir: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(run_dir / "tensorboard" / "tune"))
    events.Reload()
    found = [(e.step, e.value) for e in events.Scalars("loss/nll")]
    assert found == [
        (r["global_step"], pytest.approx(r["loss"]["nll"])) for r in steps(run_dir, "tune")
    ]
    shown = accumulator.EventAccumulator(str(run_dir / "tensorboard" / "evaluate"))
    shown.Reload()
    assert [tag for tag in shown.Tags()["images"] if tag.startswith("gallery/")]


def test_the_specification_of_the_dashboard_is_complete() -> None:
    pytest.importorskip("wandb_workspaces", reason="the extra dashboards is not installed")
    model = dashboard.workspace("team", "project")._to_model()
    text = model.model_dump_json(by_alias=True)
    sections = json.loads(text)["spec"]["section"]["panelBankConfig"]["sections"]
    assert [section["name"] for section in sections][: len(dashboard.SECTIONS)] == list(
        dashboard.SECTIONS
    )
    for kind, pattern in dashboard.named_values():
        plain = pattern if "\\" in pattern or pattern.endswith("/") else pattern.strip("^$")
        assert json.dumps(plain)[1:-1] in text, (kind, pattern)


def test_a_finished_run_can_be_watched(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert watch.main([str(run_dir), "--once"]) == 0
    text = capsys.readouterr().out
    for part in ("finished", "13/13", "loss nll", "new_experts", "tune/result", "report.html"):
        assert part in text, part
