"""hydra-submitit-launcher on a real Slurm: a sweep of the real training, one job stopped in mid-stage."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moe_ext.training.ownership import read_status
from tests.infra.machine import ROOT, wait_until
from tests.infra.slurm_cluster import NEEDED, SlurmCluster
from tests.training.tiny import make_inputs, overrides

pytestmark = [
    pytest.mark.slow,
    pytest.mark.slurm,
    pytest.mark.timeout(2400),
    *NEEDED,
    pytest.mark.skipif(
        not importlib.util.find_spec("submitit"), reason="submitit is not installed"
    ),
]


def steps(folder: Path) -> list[int]:
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [r["step"] for r in map(json.loads, lines) if r["event"] == "step"]


def test_a_sweep_of_two_is_stopped_requeued_and_finished(tmp_path: Path) -> None:
    make_inputs(tmp_path)
    words = [w for w in overrides(tmp_path, "swept") if not w.startswith("run_dir=")]
    launcher = {
        "max_num_timeout": 5,
        "timeout_min": 30,
        "nodes": 2,
        "tasks_per_node": 1,
        "mem_gb": 2,
        "array_parallelism": 1,
        "signal_delay_s": 60,
    }
    with SlurmCluster(tmp_path / "cluster") as cluster:
        sweep = subprocess.Popen(
            [
                *(sys.executable, "-m", "moe_ext.sweep", "--multirun", *words),
                *("hydra/launcher=submitit_slurm", "chain=[align]", "seed=0,1"),
                *(
                    "stages.align.steps=60",
                    "stages.align.checkpoint_every=30",
                    "parallel.ep_size=2",
                ),
                *(f"hydra.launcher.{key}={value}" for key, value in launcher.items()),
            ],
            env=cluster.environment | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"},
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:

            def folders() -> list[Path]:
                return sorted(path.parent for path in tmp_path.glob("runs/swept-*/metrics.jsonl"))

            wait_until(
                lambda: bool(folders()) and len(steps(folders()[0])) >= 3, 600, "three steps"
            )
            first = folders()[0]
            listing = cluster.run("squeue", "-h", "-t", "running", "-o", "%A").split()
            cluster.run("scancel", "--signal=USR2", f"{listing[0]}.0")
            output, _ = sweep.communicate(timeout=1200)
        finally:
            sweep.kill()
    assert sweep.returncode == 0, output[-3000:]
    assert len(folders()) == 2
    for folder in folders():
        status = read_status(folder)
        assert status is not None
        assert status.state == "finished"
        assert steps(folder) == list(range(1, 61))  # every step once, over both starts
    events = [json.loads(x) for x in (first / "metrics.jsonl").read_text().splitlines()]
    assert len([e for e in events if e["event"] == "resume"]) == 1
