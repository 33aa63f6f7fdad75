"""`moe-ext launch launcher=slurm` on a real Slurm of two nodes, with a stand-in for training.

Started once for the file; each test submits its own jobs.
"""

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from moe_ext.jobs.status import Row, collect
from tests.infra.machine import ROOT, launch_words, only_run, wait_until
from tests.infra.slurm_cluster import NEEDED, SlurmCluster

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300), *NEEDED]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    with SlurmCluster(tmp_path_factory.mktemp("slurm") / "cluster") as cluster:
        yield cluster


def launch(cluster: SlurmCluster, folder: Path, *overrides: str, **variables: str) -> list[str]:
    """Ids of the submitted jobs, of two ranks on two nodes each."""
    two_nodes = ("launcher.nodes=2", "launcher.time_limit=5")
    variables["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        launch_words("slurm", *two_nodes, *overrides, **variables),
        env=cluster.environment | {"PYTHONPATH": str(ROOT)},
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return re.findall(r"^submitted (\d+):", done.stdout, re.M)


def starts(run_dir: Path) -> list[list[dict]]:
    """What each rank of each start saw: [start][rank]."""
    found: dict[int, list[dict]] = {}
    for path in sorted(run_dir.glob("rank-*.start-*.json")):
        found.setdefault(int(path.stem.split("-")[-1]), []).append(json.loads(path.read_text()))
    return [found[start] for start in sorted(found)]


def steps(run_dir: Path) -> list[tuple[str, int]]:
    """(stage, step) in the order in which they ran."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [(record["stage"], record["step"]) for record in map(json.loads, lines)]


def rows(cluster: SlurmCluster, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[Row]:
    monkeypatch.setenv("SLURM_CONF", str(cluster.configuration))
    return collect(folder / "runs")


def test_ranks_get_their_numbers_and_the_chain_runs(
    cluster: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (job,) = launch(cluster, tmp_path, TOY_VARIABLE="'two words'")
    assert cluster.wait(job) == {job: "COMPLETED"}
    run_dir = only_run(tmp_path)
    (ranks,) = starts(run_dir)
    assert [(r["RANK"], r["WORLD_SIZE"], r["LOCAL_RANK"]) for r in ranks] == [
        ("0", "2", "0"),
        ("1", "2", "0"),
    ]
    assert {(r["MASTER_ADDR"], r["toy"], r["group"]) for r in ranks} == {
        ("127.0.0.1", "two words", "")
    }
    assert steps(run_dir) == [(s, n) for s in ("align", "probe", "tune") for n in (1, 2, 3)]
    (row,) = rows(cluster, tmp_path, monkeypatch)
    assert (row.state, row.stage, row.step, row.loss, row.error) == (
        "finished",
        "tune",
        "3",
        "0.3333",
        "",
    )


def test_an_array_requeues_exactly_the_stopped_task_and_shows_the_failed_one(
    cluster: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (job,) = launch(
        cluster,
        tmp_path,
        "seed=0,1,2",
        "launcher.array_limit=1",
        "stages.align.steps=40",
        TOY_STEP_S="0.1",
        TOY_FAIL_SEED="1",
    )
    folders = [tmp_path / "runs" / name for name in run_names(tmp_path)]
    wait_until(lambda: (folders[0] / "metrics.jsonl").exists(), 60, "the first task to step")
    assert set(cluster.states(job).values()) == {"RUNNING", "PENDING"}  # the limit of one
    # The step by the task's own id: a signal for "job_0" is sent again until an answer pleases scancel.
    own_id = cluster.run("squeue", "-h", "-t", "running", "-j", job, "-o", "%A").strip()
    cluster.run("scancel", "--signal=USR2", f"{own_id}.0")
    states = cluster.wait(job)
    assert states == {f"{job}_0": "COMPLETED", f"{job}_1": "FAILED", f"{job}_2": "COMPLETED"}
    assert [len(starts(folder)) for folder in folders] == [2, 1, 1]
    # Every step once: stopped after a step, published, went on at the next.
    expected = [("align", n) for n in range(1, 41)]
    expected += [(stage, n) for stage in ("probe", "tune") for n in (1, 2, 3)]
    assert steps(folders[0]) == expected
    groups = {rank["group"] for folder in folders for ranks in starts(folder) for rank in ranks}
    assert len(groups) == 1
    assert groups.pop().startswith("demo-sweep-")
    found = {row.run: row for row in rows(cluster, tmp_path, monkeypatch)}
    failed = found[folders[1].name]
    assert (failed.job, failed.state) == (f"{job}_1", "failed")
    assert failed.error == "ValueError: seed=1 was asked to fail"
    assert found[folders[0].name].state == found[folders[2].name].state == "finished"


def run_names(folder: Path) -> list[str]:
    """Names of the run folders of the only sweep, in order of task."""
    (tasks,) = folder.glob("runs/*-sweep-*/launch/job.tasks")
    return [Path(line).parents[1].name for line in tasks.read_text().splitlines()]


def test_a_time_limit_publishes_requeues_and_goes_on(cluster: SlurmCluster, tmp_path: Path) -> None:
    (job,) = launch(
        cluster,
        tmp_path,
        *("launcher.time_limit=1", "launcher.stop_lead_s=50", "chain=[align]"),
        "stages.align.steps=90",
        TOY_STEP_S="0.5",
    )
    assert cluster.wait(job, timeout_s=200) == {job: "COMPLETED"}
    run_dir = only_run(tmp_path)
    assert len(starts(run_dir)) >= 2
    assert steps(run_dir) == [("align", n) for n in range(1, 91)]


def test_a_preempted_job_publishes_makes_room_and_comes_back(
    cluster: SlurmCluster, tmp_path: Path
) -> None:
    (job,) = launch(cluster, tmp_path, "chain=[align]", "stages.align.steps=60", TOY_STEP_S="0.2")
    run_dir = only_run(tmp_path)
    wait_until(lambda: (run_dir / "metrics.jsonl").exists(), 60, "the first step")
    urgent = cluster.run(
        *(
            "sbatch",
            "--parsable",
            "-p",
            "urgent",
            "-N2",
            "--exclusive",
            "-o",
            str(tmp_path / "urgent.log"),
        ),
        "--wrap=sleep 1",
    ).strip()
    assert cluster.wait(urgent) == {urgent: "COMPLETED"}
    assert cluster.wait(job) == {job: "COMPLETED"}
    assert len(starts(run_dir)) == 2
    assert steps(run_dir) == [("align", n) for n in range(1, 61)]


def test_a_job_a_stage_waits_for_the_stage_before(cluster: SlurmCluster, tmp_path: Path) -> None:
    jobs = launch(cluster, tmp_path, "launcher.job_per_stage=true")
    assert len(jobs) == 4  # align, probe, extend, tune
    for job in jobs:
        assert cluster.wait(job) == {job: "COMPLETED"}
    run_dir = only_run(tmp_path)
    assert steps(run_dir) == [(s, n) for s in ("align", "probe", "tune") for n in (1, 2, 3)]
    assert len(starts(run_dir)) == 4
