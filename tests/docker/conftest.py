"""One engine and one build of the images for all files here.

MOE_EXT_DOCKER_FOLDER names a folder that keeps the engine's images between runs.
"""

import functools
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.infra.docker_engine import DockerEngine
from tests.infra.documents import lines_of

MOST_BYTES = 1_900_000_000
"""Of the CPU image with a torch for CPUs; docs/docker.md says 1.7 GB."""


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DockerEngine]:
    kept = os.environ.get("MOE_EXT_DOCKER_FOLDER")
    folder = Path(kept) if kept else tmp_path_factory.mktemp("docker") / "engine"
    with DockerEngine(folder) as engine:
        yield engine
    if not kept:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def built(engine: DockerEngine) -> Callable[[str], str]:
    """Kind -> image, built when it is first asked for, by the page's command, from the working tree; both
    kinds with one torch, whichever this machine has."""

    @functools.cache
    def build(kind: str) -> str:
        (line,) = (line for line in lines_of("built") if f"Dockerfile.{kind}" in line)
        began = time.monotonic()
        with engine.torch_index() as index:
            log = engine.sh(line, TORCH_INDEX=index)
        (engine.folder / f"build-{kind}.log").write_text(log)
        size = engine.docker("image", "inspect", "-f", "{{.Size}}", f"moe_ext:{kind}")
        if kind == "cpu" and torch.version.cuda is None:
            assert int(size) <= MOST_BYTES, f"{int(size):,} bytes"
        seconds = time.monotonic() - began
        print(f"moe_ext:{kind}: {int(size) / 1e6:.0f} MB, built in {seconds:.0f} s")
        return f"moe_ext:{kind}"

    return build
