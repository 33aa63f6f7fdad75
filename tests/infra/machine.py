"""What every test with real programs shares: where they are found, when it is skipped, waiting, and
the start of a run by `moe-ext launch` with the stand-in for training (`toy_run`)."""

import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PATH = os.environ["PATH"] + ":/usr/sbin:/sbin"


def needs(*programs: str) -> list[pytest.MarkDecorator]:
    """Marks that skip a file unless root runs it and all the programs are installed."""
    missing = [name for name in programs if not shutil.which(name, path=PATH)]
    return [
        pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
        pytest.mark.skipif(bool(missing), reason=f"not here: {missing}"),
    ]


def wait_until(condition: Callable[[], bool], timeout_s: float, what: str) -> None:
    """Poll until the condition holds; AssertionError naming `what` after `timeout_s`."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"waited {timeout_s} s for {what}"
        time.sleep(0.2)


def launch_words(launcher: str, *overrides: str, **variables: str) -> list[str]:
    """The command line of `moe-ext launch`: two ranks of the stand-in, three steps a stage.

    `variables` are what the launcher has to carry to every rank's environment.
    """
    return [
        *(sys.executable, "-m", "moe_ext.launch", "experiment=demo", f"launcher={launcher}"),
        *("launcher.module=tests.infra.toy_run", "parallel.ep_size=2"),
        *(f"stages.{stage}.steps=3" for stage in ("align", "probe", "tune")),
        *(f"+launcher.environment.{name}={value}" for name, value in variables.items()),
        *overrides,
    ]


def only_run(folder: Path) -> Path:
    """The one run that was launched from a folder."""
    (run_dir,) = (path.parent for path in folder.glob("runs/*/launch"))
    return run_dir
