"""The image under Slurm without Docker on the nodes: unpacked once, run by Charliecloud as any user may. The
commands are those of docs/docker.md, word for word."""

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from moe_ext.training.ownership import read_status
from tests.infra import docker_engine, slurm_cluster
from tests.infra.docker_engine import DockerEngine
from tests.infra.documents import Checkout, lines_of, tiny_demo
from tests.infra.machine import needs, only_run
from tests.infra.slurm_cluster import SlurmCluster

pytestmark = [
    pytest.mark.slow,
    pytest.mark.docker,
    pytest.mark.timeout(1800),
    *docker_engine.NEEDED,
    *slurm_cluster.NEEDED,
    *needs("ch-run"),
]
SHARED = Path("/shared")
"""What the page calls the file system that the nodes share."""


@pytest.fixture
def checkout() -> Iterator[Checkout]:
    if SHARED.exists():
        pytest.skip(f"{SHARED} exists on this machine and may be somebody's")
    SHARED.mkdir()
    try:
        yield tiny_demo(SHARED)
    finally:
        shutil.rmtree(SHARED)


def test_two_nodes_train_from_the_unpacked_image(
    engine: DockerEngine, built: Callable[[str], str], checkout: Checkout, tmp_path: Path
) -> None:
    image = built("cpu")
    *unpack, launch = lines_of("test_two_nodes_train_from_the_unpacked_image")
    assert len(unpack) == 2
    for line in unpack:
        engine.sh(line)
    for container in engine.docker("ps", "-aq", "--filter", f"ancestor={image}").split():
        engine.docker("rm", container)
    with SlurmCluster(tmp_path / "cluster") as cluster:
        text = checkout.sh(launch, SLURM_CONF=str(cluster.configuration), USER="root")
        job = text.split("submitted ")[1].split(":")[0]
        ended = cluster.wait(job, timeout_s=900)
    run_dir = only_run(checkout.folder)
    log = (run_dir / "launch" / "job.log").read_text()
    assert ended == {job: "COMPLETED"}, log[-4000:]
    status = read_status(run_dir)
    assert status is not None
    assert status.state == "finished"
    script = (run_dir / "launch" / "job.sbatch").read_text()
    assert "/venv/bin/python3" in script and sys.executable not in script
