"""Twenty preemptions of a real run, seen by W&B: one run, every step once and in order, under the id that the
checkpoints carry."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from moe_ext.training.signals import STOPPED_EXIT_CODE
from tests.infra.documents import Checkout, tiny_demo
from tests.infra.machine import wait_until
from tests.infra.wandb_records import history_of
from tests.training.test_wandb import steps_in

pytest.importorskip("wandb")
PREEMPTIONS = 20
STEPS = 600
"""Of the one stage: more than pass before the last request to stop is heard."""


def start(checkout: Checkout) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "moe_ext.train", "experiment=demo", "chain=[align]"],
        cwd=checkout.folder,
        env=checkout.environment | {"HOME": str(checkout.folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def newest_checkpoint(run_dir: Path) -> dict:
    (newest, *_) = sorted(run_dir.glob("stages/align/checkpoints/step-*/manifest.json"))[::-1]
    return json.loads(newest.read_text())


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_one_run_without_a_step_backwards(tmp_path: Path) -> None:
    checkout = tiny_demo(
        tmp_path, f"stages.align.steps={STEPS}", "stages.align.checkpoint_every=50"
    )
    run_dir = checkout.folder / "runs" / "demo"
    identity = ""
    for number in range(PREEMPTIONS):
        known = len(steps_in(run_dir)) if number else 0
        process = start(checkout)
        lines = run_dir / "metrics.jsonl"
        wait_until(
            lambda known=known, lines=lines: lines.exists() and len(steps_in(run_dir)) > known,
            240,
            "a new step",
        )
        process.send_signal(signal.SIGUSR2)
        output, _ = process.communicate(timeout=240)
        assert process.returncode == STOPPED_EXIT_CODE, output[-3000:]
        held = newest_checkpoint(run_dir)["state"]["tracking"]["wandb_id"]
        assert held == (run_dir / "wandb_id").read_text()
        assert held == (identity or held)
        identity = held
        if number == PREEMPTIONS // 2:
            (run_dir / "wandb_id").unlink()  # the checkpoints alone were carried to another place
    output, _ = start(checkout).communicate(timeout=600)
    assert steps_in(run_dir)[-1] == STEPS, output[-3000:]
    (folder,) = (run_dir / "wandb").glob(f"offline-run-*-{identity}-align")
    assert [row["_step"] for row in history_of(folder)] == list(range(1, STEPS + 1))
