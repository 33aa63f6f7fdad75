"""The commands of docs/slurm.md, word for word, on a Slurm of two nodes that have eight GPUs by name."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from moe_ext.training.ownership import read_status
from tests.infra.bare_rank import ranks_of
from tests.infra.documents import Checkout, lines_of, make_checkout, tiny_demo
from tests.infra.slurm_cluster import NEEDED, SlurmCluster

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600), *NEEDED]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    folder = tmp_path_factory.mktemp("slurm") / "cluster"
    with SlurmCluster(folder, cpus=8, gpus=8) as cluster:
        yield cluster


def in_slurm(cluster: SlurmCluster) -> dict[str, str]:
    return {"SLURM_CONF": str(cluster.configuration)}


def runs_of(checkout: Checkout) -> list[Path]:
    return sorted(file.parent for file in checkout.folder.glob("runs/*/status.json"))


def test_jobs_of_the_page(cluster: SlurmCluster, tmp_path: Path) -> None:
    """Jobs, ranks and groups are as the words say; `moe-ext jobs` shows every run's end."""
    checkout = make_checkout(
        tmp_path / "checkout", "name=demo", "launcher.module=tests.infra.bare_rank"
    )
    lines = lines_of("test_jobs_of_the_page")
    assert len(lines) >= 3
    for line in lines:
        is_sweep, is_chain = "seed=0,1,2" in line, "job_per_stage" in line
        text = checkout.sh(line, **in_slurm(cluster))
        jobs = re.findall(r"^submitted (\d+):", text, re.M)
        assert len(jobs) == (4 if is_chain else 1)
        for job in jobs:
            states = cluster.wait(job, timeout_s=180)
            assert set(states.values()) == {"COMPLETED"}, (line, states)
            assert len(states) == (6 if is_sweep else 1)
        runs = runs_of(checkout)
        assert len(runs) == (6 if is_sweep else 1)
        nodes = ["node1"] * 8 + ["node2"] * 8 if "launcher.nodes=2" in line else None
        for run in runs:
            ranks = ranks_of(run)
            assert [rank["RANK"] for rank in ranks] == [
                str(i) for i in range(len(nodes or [0] * 8))
            ]
            assert nodes is None or [rank["node"] for rank in ranks] == nodes
            status = read_status(run)
            assert status is not None
            assert (status.state, status.stage) == ("finished", "tune")
        groups = {rank["group"] for run in runs for rank in ranks_of(run)}
        assert len(groups) == 1
        assert groups.pop().startswith("demo-sweep-") == is_sweep
        listing = checkout.sh("moe-ext jobs runs", **in_slurm(cluster))
        assert all(run.name in listing for run in runs)
        assert listing.count("finished") >= len(runs)
        shutil.rmtree(checkout.folder / "runs")


@pytest.mark.slow
def test_a_sweep_of_hydras_own(cluster: SlurmCluster, tmp_path: Path) -> None:
    """Of the real training, tiny: three jobs of two ranks."""
    pytest.importorskip("submitit", reason="the extra slurm is not installed")
    checkout = tiny_demo(tmp_path)
    (line,) = lines_of("test_a_sweep_of_hydras_own")
    checkout.sh(line, timeout_s=500, **in_slurm(cluster))
    runs = runs_of(checkout)
    assert len(runs) == 3
    assert all(read_status(run).state == "finished" for run in runs)
