"""The real training, tiny, as Slurm jobs: stopped in mid-stage, requeued, and bit for bit the same."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from moe_ext.training.ownership import read_status
from tests.infra.machine import ROOT, wait_until
from tests.infra.slurm_cluster import NEEDED, SlurmCluster
from tests.training.tiny import make_inputs, overrides

pytestmark = [pytest.mark.slow, pytest.mark.slurm, pytest.mark.timeout(2400), *NEEDED]


def submit(cluster: SlurmCluster, folder: Path, name: str) -> str:
    """Job id of a run with two ranks on two nodes and a data worker each."""
    words = overrides(
        folder,
        name,
        *("stages.align.steps=60", "stages.align.checkpoint_every=30", "data.num_workers=1"),
        *("parallel.ep_size=2", "launcher=slurm", "launcher.nodes=2", "launcher.time_limit=30"),
        f"+launcher.environment.PYTHONPATH={ROOT}",
    )
    words.remove("data.num_workers=0")
    done = subprocess.run(
        [sys.executable, "-m", "moe_ext.launch", *words],
        env=cluster.environment | {"PYTHONPATH": str(ROOT)},
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split("submitted ")[1].split(":")[0]


def records(folder: Path, name: str) -> list[dict]:
    path = folder / name / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def losses(folder: Path, name: str) -> dict[tuple[str, int], tuple]:
    """(stage, step) -> loss and gradient norm; of a step that ran twice, the later."""
    return {
        (r["stage"], r["step"]): (r["loss"], r["grad_norm"])
        for r in records(folder, name)
        if r["event"] == "step"
    }


def test_a_requeued_job_ends_with_the_same_losses(tmp_path: Path) -> None:
    make_inputs(tmp_path)
    with SlurmCluster(tmp_path / "cluster") as cluster:
        job = submit(cluster, tmp_path, "stopped")
        wait_until(lambda: len(losses(tmp_path, "stopped")) >= 3, 600, "three steps")
        cluster.run("scancel", "--signal=USR2", f"{job}.0")
        wait_until(lambda: cluster.states(job)[job] != "RUNNING", 300, "the job to leave")
        stopped_at = len(losses(tmp_path, "stopped"))
        assert stopped_at < 60
        straight = submit(cluster, tmp_path, "straight")
        log = tmp_path / "stopped" / "launch" / "job.log"
        assert cluster.wait(job, timeout_s=600) == {job: "COMPLETED"}, log.read_text()[-3000:]
        assert cluster.wait(straight, timeout_s=600) == {straight: "COMPLETED"}
    resumed = [r for r in records(tmp_path, "stopped") if r["event"] == "resume"]
    assert [(r["stage"], r["step"]) for r in resumed] == [("align", stopped_at)]
    status = read_status(tmp_path / "stopped")
    assert status is not None
    assert status.state == "finished"
    assert len(losses(tmp_path, "straight")) == 60 + 3 + 13
    assert losses(tmp_path, "stopped") == losses(tmp_path, "straight")
