"""`moe-ext watch` says what the files of a run say, whatever state the run is in."""

import json
import os
import pty
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from moe_ext.jobs.watch import ASCII_BARS, Watched, duration, frame, main, sparkline
from moe_ext.training.ownership import claim
from moe_ext.training.tracking import JsonLines

CONFIG = {
    "chain": ["align", "extend", "tune"],
    "stages": {"align": {"steps": 4}, "extend": {"steps": 0}, "tune": {"steps": 40}},
}


def record(step: int, stage: str = "tune", nll: float = 2.0) -> dict:
    return {
        "event": "step",
        "stage": stage,
        "step": step,
        "time_s": 3.0 * step,
        "loss": {"nll": nll, "balance": 1.1},
        "grad_norm": 1.5,
        "grad_norm_by_part": {"connector": 1.25, "new_experts": 0.375},
        "learning_rate": 2e-4,
        "tokens_per_s": 12345.6,
        "data_wait_s": 0.25,
        "expert_load": {"1": 1.5},
        "text": {"load": {"1": 1.5, "4": 2.5}, "entropy": {"1": 0.75}, "new_share": {"1": 0.1}},
        "image": {"load": {"1": 3.25}, "entropy": {"1": 0.5}, "new_share": {"1": 0.9}},
        "new_share": {"text": 0.031, "image": 0.625},
    }


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that is in step 20 of 40 of its last stage, published at 15."""
    folder = tmp_path / "demo"
    owner = claim(folder)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    lines = JsonLines(folder / "metrics.jsonl")
    lines.write({"event": "stage", "stage": "align", "minutes": 1.25})
    for step in range(1, 21):
        lines.write(record(step, nll=4.0 - step / 10))
    lines.close()
    checkpoint = folder / "stages" / "tune" / "checkpoints" / "step-0000015"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{}")
    owner.write_status("running", "tune", 15)
    return folder


def shown(folder: Path, width: int = 110, bars: str = ASCII_BARS) -> str:
    watched = Watched(folder)
    watched.read()
    console = Console(width=width, record=True, file=open(os.devnull, "w"))
    console.print(frame(watched, width, bars))
    return console.export_text()


def test_a_running_run_shows_all_that_matters(run: Path) -> None:
    text = shown(run)
    for part in (
        "running",
        "align 1.2 m",
        "20/40",
        "50%",
        "1:00 left",  # 20 steps of 3 s
        "loss nll",
        "loss balance",
        "0.0002",
        "12,346",
        "0.25 s",
        "connector",
        "0.375",
        "max 3.25",
        "min 0.50",
        "3.1%",
        "62.5%",
        "tune/step-0000015",
    ):
        assert part in text, part
    assert "error" not in text


@pytest.mark.parametrize("width", [60, 80, 120])
def test_it_fits_its_width(run: Path, width: int) -> None:
    assert max(map(len, shown(run, width).splitlines())) <= width


@pytest.mark.parametrize(
    ("state", "code", "says"),
    [
        ("failed", 1, "OutOfMemoryError: 3 GiB"),
        ("finished", 0, "finished"),
        ("stopped", 0, "stopped"),
    ],
)
def test_the_end_of_a_run_is_told(run: Path, state: str, code: int, says: str, capsys) -> None:
    claim(run).write_status(state, "tune", 20, "Traceback\nOutOfMemoryError: 3 GiB" * (code == 1))
    assert main([str(run), "--once"]) == code
    out = capsys.readouterr().out
    assert state in out
    assert says in out


def test_a_run_whose_process_is_gone_is_not_called_running(run: Path) -> None:
    owner = json.loads((run / "owner.json").read_text())
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    (run / "owner.json").write_text(json.dumps(owner | {"pid": child.pid}))
    assert "gone" in shown(run)
    (run / "owner.json").write_text(json.dumps(owner | {"pid": child.pid, "host": "elsewhere"}))
    assert "running" in shown(run)  # nothing is known of another host's processes
    os.utime(run / "metrics.jsonl", (0, time.time() - 300))
    os.utime(run / "status.json", (0, time.time() - 300))
    assert "silent for 5:00" in shown(run)


def test_no_run_is_no_error_but_its_own_code(tmp_path: Path, capsys) -> None:
    assert main([str(tmp_path / "none"), "--once"]) == 2
    assert "has no run yet" in " ".join(capsys.readouterr().out.split())


def test_events_are_shown(run: Path) -> None:
    lines = JsonLines(run / "metrics.jsonl")
    lines.write({"event": "resume", "time": time.time(), "stage": "tune", "step": 15})
    lines.write({"event": "skipped_step", "time": time.time(), "stage": "tune", "step": 16})
    lines.write({"event": "alert", "time": time.time() - 60, "rule": "x", "text": "loss 9 is much"})
    text = shown(run)
    assert "1 resume(s), 1 skipped step(s)" in text
    assert "loss 9 is much (1:00 ago, 1 in all)" in text


def test_reading_goes_on_where_it_ended_and_a_resumed_step_counts_once(run: Path) -> None:
    watched = Watched(run)
    watched.read()
    with open(run / "metrics.jsonl", "a") as file:
        whole = json.dumps(record(16, nll=7.0))
        file.write(whole + "\n" + whole[:20])  # killed at 20, resumed from 15, and still writing
    watched.read()
    assert [r["step"] for r in watched.steps["tune"]] == list(range(1, 17))
    assert watched.steps["tune"][-1]["loss"]["nll"] == 7.0
    with open(run / "metrics.jsonl", "a") as file:
        file.write("\n" + json.dumps(record(17)) + "\n")
    watched.read()
    assert watched.steps["tune"][-1]["step"] == 17


def test_a_sparkline_keeps_the_course_and_its_gaps() -> None:
    assert sparkline([1, 2, 3, 4], 4, "0123") == "0123"
    assert sparkline([1, None, float("nan"), 4], 4, "0123") == "0  3"
    assert sparkline([1, 1, 5, 5, 9, 9], 3, "012") == "012"
    assert sparkline([2, 2], 8, "012") == "00"
    assert sparkline([None], 8) == ""


@pytest.mark.parametrize(("seconds", "text"), [(9, "9 s"), (75, "1:15"), (11220, "3:07:00")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_live_in_a_terminal_it_follows_the_run_to_its_end(run: Path) -> None:
    words = [sys.executable, "-m", "moe_ext.cli", "watch", str(run), "--every", "0.1"]
    leader, follower = pty.openpty()
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | {"PYTHONPATH": str(root), "TERM": "xterm", "COLUMNS": "100"}
    process = subprocess.Popen(
        words, stdin=follower, stdout=follower, stderr=follower, env=environment
    )
    os.close(follower)
    seen = ""
    end = time.monotonic() + 60
    told = False
    while time.monotonic() < end:
        try:
            seen += os.read(leader, 65536).decode(errors="replace")
        except OSError:
            break
        if "20/40" in seen and not told:
            told = True
            lines = JsonLines(run / "metrics.jsonl")
            lines.write(record(40))
            claim(run).write_status("finished", "tune", 40)
    assert process.wait(timeout=10) == 0
    assert "40/40" in seen
    assert "finished" in seen
