"""What a whole run leaves in its views (`finished_demo`: W&B offline and TensorBoard), read back by their
own readers. The panels of the dashboard are compared with it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from moe_ext.jobs import dashboard, watch
from tests.infra.documents import Checkout
from tests.infra.wandb_records import records_of

pytest.importorskip("wandb")


def read_wandb(folder: Path) -> dict[str, Any]:
    """The records of an offline run: its facts, its history rows, and what became its summary."""
    found: dict[str, Any] = {"history": [], "summary": {}}
    for record in records_of(folder):
        if record["type"] == "history":
            found["history"].append(record["history"]["item"])
        elif record["type"] == "summary":
            found["summary"] |= record["summary"]["update"]
        else:
            found.setdefault(record["type"], []).append(record[record["type"]])
    return found


@pytest.fixture(scope="module")
def run_dir(finished_demo: Checkout) -> Path:
    return finished_demo.folder / "runs" / "demo"


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


# Value that panels draw -> what it can be at least and at most in a tiny run of 8 experts a layer at most.
RANGES = {
    r"^loss/nll$": (0.1, 20.0),
    r"^loss/balance$": (0.99, 8.0),
    r"^loss/router_kl$": (0.0, 5.0),
    r"^(text|image)/load/\d+$": (1.0, 8.0),
    r"^(text|image)/entropy/\d+$": (0.0, 1.0 + 1e-6),
    r"^(text|image)/new_share/\d+$": (0.0, 1.0),
    r"^new_share/(text|image)$": (0.0, 1.0),
    r"^new_expert_share/\d+/\d+$": (0.0, 1.0),
    r"^grad_norm$": (1e-6, 1e4),
    r"^grad_norm_by_part/": (0.0, 1e4),
    r"^tokens_per_s$": (1.0, 1e7),
    r"^step_s$": (1e-4, 600.0),
    r"^data_wait_s$": (0.0, 600.0),
    r"^real_token_share$": (0.01, 1.0),
}


def test_what_the_panels_draw_is_plausible_in_every_step(stages: dict) -> None:
    for row in stages["tune"]["history"]:
        for pattern, (least, most) in RANGES.items():
            values = [value for key, value in row.items() if re.search(pattern, key)]
            assert values, pattern
            assert all(least <= value <= most for value in values), (pattern, values)
        parts = [v for key, v in row.items() if key.startswith("grad_norm_by_part/")]
        assert len(parts) == 4  # experts, rows, calibration, connector
        assert sum(part**2 for part in parts) == pytest.approx(row["grad_norm"] ** 2, rel=1e-3)
        assert row["data_wait_s"] <= row["step_s"]
    images = [row["new_share/image"] for row in stages["tune"]["history"]]
    assert max(images) > 0.0  # some image token does choose a new expert


def test_the_record_s_and_the_console_s_alerts_are_there(run_dir: Path, stages: dict) -> None:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    alerts = [r for r in map(json.loads, lines) if r["event"] == "alert"]
    # the loss and the gradient cannot fall in every step; a dead expert: tests/training/test_wandb.py
    assert {alert["rule"] for alert in alerts} == {
        "loss_spike",
        "gradient_spike",
        "slow_loader",
        "stalled",
    }
    sent = [record for name in stages for record in stages[name].get("alert", [])]
    # a stall is told by a thread of its own: two alerts may change places
    assert sorted(record["text"] for record in sent) == sorted(alert["text"] for alert in alerts)


def test_every_checkpoint_is_in_the_record(run_dir: Path) -> None:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    events = [r for r in map(json.loads, lines) if r["event"] == "checkpoint"]
    assert [e["step"] for e in events if e["stage"] == "tune"] == list(range(2, 13, 2))
    assert {e["stage"] for e in events} == {"align", "probe", "tune"}
    assert all(event["stall_s"] > 0 and event["write_s"] > 0 for event in events)
    assert all(event["bytes"] > 0 for event in events)


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
    assert [a["name"] for a in artifacts] == ["demo-extension"]
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


def test_a_finished_run_can_be_watched(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(run_dir.parent)
    assert watch.main([run_dir.name, "--once"]) == 0
    text = capsys.readouterr().out
    for part in ("finished", "13/13", "loss nll", "new_experts", "tune/result", "report.html"):
        assert part in text, part
