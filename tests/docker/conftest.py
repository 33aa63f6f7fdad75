"""One engine and one build of the images for all files here.

MOE_EXT_DOCKER_FOLDER names a folder that keeps the engine's images between runs.
"""

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.infra.docker_engine import BASE, DockerEngine
from tests.infra.machine import ROOT


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DockerEngine]:
    kept = os.environ.get("MOE_EXT_DOCKER_FOLDER")
    folder = Path(kept) if kept else tmp_path_factory.mktemp("docker") / "engine"
    with DockerEngine(folder) as engine:
        yield engine
    if not kept:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def images(engine: DockerEngine) -> dict[str, str]:
    """Kind -> image, both built from the working tree; with one torch, whichever this machine has."""
    with engine.torch_index() as index:
        for kind in ("cpu", "cuda"):
            began = time.monotonic()
            log = engine.docker(
                *("build", "--progress", "plain", "--network", "host", "-t", f"moe_ext:{kind}"),
                *("--build-arg", f"BASE={BASE}", "--build-arg", f"TORCH_INDEX={index}"),
                *("-f", str(ROOT / "docker" / f"Dockerfile.{kind}"), str(ROOT)),
            )
            (engine.folder / f"build-{kind}.log").write_text(log)
            size = engine.docker("image", "inspect", "-f", "{{.Size}}", f"moe_ext:{kind}")
            seconds = time.monotonic() - began
            print(f"moe_ext:{kind}: {int(size) / 1e6:.0f} MB, built in {seconds:.0f} s")
    return {kind: f"moe_ext:{kind}" for kind in ("cpu", "cuda")}
