"""The image under Slurm without Docker on the nodes: unpacked once, run by Charliecloud as any user may."""

import subprocess
import sys
from pathlib import Path

import pytest

from moe_ext.training.ownership import read_status
from tests.infra import docker_engine, slurm_cluster
from tests.infra.docker_engine import DockerEngine
from tests.infra.machine import ROOT, needs
from tests.infra.slurm_cluster import SlurmCluster
from tests.training.tiny import make_inputs, overrides

pytestmark = [
    pytest.mark.docker,
    pytest.mark.timeout(1800),
    *docker_engine.NEEDED,
    *slurm_cluster.NEEDED,
    *needs("ch-run"),
]


def unpack(engine: DockerEngine, image: str, folder: Path) -> None:
    """The commands of docs/docker.md: what `docker export` gives is all that Charliecloud needs."""
    folder.mkdir(parents=True)
    container = engine.docker("create", image).strip()
    script = f'/usr/bin/docker export {container} | tar -x -C "{folder}" --exclude="dev/*"'
    engine.run("bash", "-o", "pipefail", "-c", script)
    engine.docker("rm", container)


def test_two_nodes_train_from_the_unpacked_image(
    engine: DockerEngine, images: dict[str, str], tmp_path: Path
) -> None:
    image = tmp_path / "image"
    unpack(engine, images["cpu"], image)
    make_inputs(tmp_path)
    words = overrides(
        tmp_path,
        "run",
        *("launcher=slurm", "launcher.nodes=2", "launcher.time_limit=30", "parallel.ep_size=2"),
        f"launcher.wrapper=[ch-run,-b,{tmp_path},{image},--]",
        "launcher.python=/venv/bin/python3",
    )
    with SlurmCluster(tmp_path / "cluster") as cluster:
        done = subprocess.run(
            [sys.executable, "-m", "moe_ext.launch", *words],
            env=cluster.environment | {"PYTHONPATH": str(ROOT), "USER": "root"},
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        job = done.stdout.split("submitted ")[1].split(":")[0]
        ended = cluster.wait(job, timeout_s=900)
        log = (tmp_path / "run" / "launch" / "job.log").read_text()
    assert ended == {job: "COMPLETED"}, log[-4000:]
    status = read_status(tmp_path / "run")
    assert status is not None
    assert status.state == "finished"
    assert "/venv/" in (tmp_path / "run" / "launch" / "job.sbatch").read_text()
