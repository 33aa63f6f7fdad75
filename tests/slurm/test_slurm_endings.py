"""How a Slurm job ends and whether it comes back: asked to, cancelled, used up, failed, its node lost.

With a stand-in for training, on a real Slurm; each test submits its own jobs.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from moe_ext.jobs import status
from moe_ext.jobs.status import Row, collect
from moe_ext.training.ownership import read_owner
from tests.infra.machine import only_run, wait_until
from tests.infra.slurm_cluster import NEEDED, SlurmCluster
from tests.slurm.test_slurm_jobs import launch, run_names, starts, steps

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300), *NEEDED]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    with SlurmCluster(tmp_path_factory.mktemp("slurm") / "cluster", num_nodes=3) as cluster:
        yield cluster


@pytest.fixture(autouse=True)
def known_cluster(cluster: SlurmCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """`moe-ext jobs`, called in this process, asks this cluster."""
    monkeypatch.setenv("SLURM_CONF", str(cluster.configuration))


def by_name(folder: Path) -> dict[str, Row]:
    return {row.run: row for row in collect(folder / "runs")}


def stepping(run_dir: Path, count: int = 1) -> None:
    """Wait until the run has recorded so many steps."""
    file = run_dir / "metrics.jsonl"
    wait_until(
        lambda: file.exists() and len(file.read_text().splitlines()) >= count, 90, "a first step"
    )


def test_a_task_of_an_array_is_stopped_alone_and_goes_on_when_launched_again(
    cluster: SlurmCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["launcher.array_limit=1", "chain=[align]", "stages.align.steps=40", "seed=0,1,2"]
    (job,) = launch(cluster, tmp_path, *words, TOY_STEP_S="0.1")
    folders = [tmp_path / "runs" / name for name in run_names(tmp_path)]
    stepping(folders[0])
    assert status.main([str(folders[2]), "--stop"]) == 0  # waits: it leaves the queue
    assert f"job {job}_2 left the queue" in capsys.readouterr().out
    assert status.main([str(folders[0]), "--stop"]) == 0  # runs: it publishes and ends
    assert "asked to publish" in capsys.readouterr().out
    ends = cluster.wait(job)
    assert ends == {f"{job}_0": "FAILED", f"{job}_1": "COMPLETED"}
    rows = by_name(tmp_path)
    stopped = rows[folders[0].name]
    assert (stopped.state, stopped.stage, len(starts(folders[0]))) == ("stopped", "align", 1)
    assert (
        stopped.error
        == f"moe-ext: job {job}_0 was asked to stop and stays away; moe-ext launch goes on"
    )
    assert rows[folders[1].name].state == "finished"
    assert (rows[folders[2].name].state, rows[folders[2].name].slurm) == ("", "")  # never began
    (again,) = launch(cluster, tmp_path, *words, TOY_STEP_S="0.01")
    assert set(cluster.wait(again).values()) == {"COMPLETED"}
    for folder in folders:  # every step once, over all starts
        assert steps(folder) == [("align", n) for n in range(1, 41)]


def test_a_job_is_submitted_once_and_cancelled_stays_away(
    cluster: SlurmCluster, tmp_path: Path
) -> None:
    words = ("stages.align.steps=500", "chain=[align]", "launcher.cpus_per_rank=2")
    (job,) = launch(cluster, tmp_path, *words, TOY_STEP_S="0.1")
    run_dir = only_run(tmp_path)
    with pytest.raises(AssertionError, match=rf"it is Slurm's job {job} \("):
        launch(cluster, tmp_path, *words, TOY_STEP_S="0.1")
    stepping(run_dir)
    # Two ranks of two: since 22.05 srun takes no number of processors from the job by itself.
    assert " CPUs=4 " in cluster.run("scontrol", "show", "step", f"{job}.0")
    assert status.main([str(run_dir), "--cancel"]) == 0
    # Its ranks and its script hear SIGTERM and have time to publish; a requeue then would revive it.
    assert cluster.wait(job) == {job: "CANCELLED"}
    (row,) = by_name(tmp_path).values()
    assert row.slurm == "CANCELLED"
    assert row.state in ("stopped", "gone")
    assert len(starts(run_dir)) == 1


def test_a_run_that_used_up_its_requeues_says_so(cluster: SlurmCluster, tmp_path: Path) -> None:
    words = ("launcher.max_requeues=1", "chain=[align]", "stages.align.steps=400")
    (job,) = launch(cluster, tmp_path, *words, TOY_STEP_S="0.1")
    run_dir = only_run(tmp_path)
    for start in (0, 1):
        wait_until(lambda start=start: len(starts(run_dir)) == start + 1, 60, f"start {start}")
        stepping(run_dir, 1 + len(steps(run_dir)) if (run_dir / "metrics.jsonl").exists() else 1)
        cluster.run("scancel", "--signal=USR2", f"{job}.0")
    assert cluster.wait(job) == {job: "FAILED"}
    (row,) = by_name(tmp_path).values()
    assert row.state == "exhausted"
    assert row.error.startswith(
        f"moe-ext: job {job} was requeued 1 times already; launcher.max_req"
    )


def test_a_request_during_the_start_is_not_lost(cluster: SlurmCluster, tmp_path: Path) -> None:
    """SIGUSR2 to the ranks at the very beginning of their step, and again before Python listens."""
    words = ("chain=[align]", "stages.align.steps=10")
    (job,) = launch(cluster, tmp_path, *words, TOY_START_S="2")
    run_dir = only_run(tmp_path)

    def step_exists() -> bool:
        return f"{job}.0" in cluster.run("squeue", "-h", "-s", "-j", job, "-o", "%i").split()

    wait_until(step_exists, 60, "the step")
    cluster.run("scancel", "--signal=USR2", f"{job}.0")
    wait_until(lambda: restarts(cluster, job) == 1, 60, "the first requeue")
    wait_until(lambda: cluster.states(job)[job] == "RUNNING", 60, "the second start")
    for path in run_dir.glob("starting-*"):
        path.unlink()
    wait_until(lambda: len(list(run_dir.glob("starting-*"))) == 2, 60, "Python to start")
    cluster.run("scancel", "--signal=USR2", f"{job}.0")
    assert cluster.wait(job) == {job: "COMPLETED"}
    assert restarts(cluster, job) == 2
    assert steps(run_dir) == [("align", n) for n in range(1, 11)]


def restarts(cluster: SlurmCluster, job: str) -> int:
    text = cluster.run("scontrol", "show", "job", job)
    return int(text.partition("Restarts=")[2].split()[0])


def test_stages_behind_a_failed_one_leave_the_queue(cluster: SlurmCluster, tmp_path: Path) -> None:
    jobs = launch(cluster, tmp_path, "launcher.job_per_stage=true", TOY_FAIL_STAGE="probe")
    align, probe, *later = jobs
    for job in jobs:
        cluster.wait(job)
    states = {job: cluster.states(job)[job] for job in jobs}
    assert states == {align: "COMPLETED", probe: "FAILED"} | dict.fromkeys(later, "CANCELLED")
    (row,) = by_name(tmp_path).values()
    assert (row.job, row.slurm) == (probe, "FAILED, 2 later CANCELLED")
    assert (row.state, row.error) == ("failed", "ValueError: probe was asked to fail")


def test_a_lost_node_is_left_behind_and_its_copy_cannot_write(
    cluster: SlurmCluster, tmp_path: Path
) -> None:
    """The node's daemon dies, its ranks live on: the split brain that a fence is for."""
    words = ("launcher.nodes=1", "launcher.ranks_per_node=2", "chain=[align]")
    (job,) = launch(cluster, tmp_path, *words, "stages.align.steps=150", TOY_STEP_S="0.2")
    run_dir = only_run(tmp_path)
    stepping(run_dir, 3)
    node = cluster.run("squeue", "-h", "-j", job, "-o", "%N").strip()
    old = ranks_of(run_dir)
    first = read_owner(run_dir)
    assert len(old) == 2
    cluster.kill_daemon(node)
    cluster.run("scontrol", "update", f"nodename={node}", "state=down", "reason=lost")
    wait_until(lambda: restarts(cluster, job) == 1, 30, "the requeue")
    stepping(run_dir, len(steps(run_dir)) + 3)  # Slurm has given it up, and it goes on writing
    wait_until(lambda: read_owner(run_dir) != first, 90, "the new copy to take the folder")
    owner = read_owner(run_dir)
    assert owner is not None
    assert (owner["job"], owner["restart"]) == (job, 1)
    # The old copy is refused at its next step; both of its ranks end.
    _, alive = psutil.wait_procs(old, timeout=30)
    assert not alive
    # A third copy, of the first start, that was held up until now: it cannot take the folder back.
    late = os.environ | {"SLURM_JOB_ID": job, "SLURM_RESTART_COUNT": "0"}
    code = (
        "from pathlib import Path; from moe_ext.training.ownership import claim; claim(Path({!r}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code.format(str(run_dir))],
        env=late,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert f"belongs to a newer start of this run (host {owner['host']}" in done.stderr
    assert read_owner(run_dir) == owner
    assert cluster.wait(job) == {job: "COMPLETED"}
    records = [json.loads(x) for x in (run_dir / "metrics.jsonl").read_text().splitlines()]
    # The toy publishes at its end alone, so the new copy began anew; from there on all steps are its own.
    assert [r["step"] for r in records][-150:] == list(range(1, 151))
    cluster.start_daemon(node)


def ranks_of(run_dir: Path) -> list[psutil.Process]:
    """The toy's processes of a run, srun and its scripts apart."""
    found = []
    for process in psutil.process_iter(["cmdline", "name"]):
        line = " ".join(process.info["cmdline"] or [])
        if process.info["name"].startswith("python") and str(run_dir) in line:
            found.append(process)
    return found
