"""A disk that fills up, a folder that becomes read-only, a limit of file sizes: what was published
before stays whole, all ranks end with the reason and a remedy, and the run goes on afterwards."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from moe_ext.training.checkpoint import Published, published
from moe_ext.training.ownership import read_status
from tests.chaos.harness import Chaos, Start, compare
from tests.chaos.points import Kill


def can_mount() -> bool:
    """Whether this process may mount: root, and not in a container without the right to."""
    if os.geteuid() != 0:
        return False
    probe = subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "none", "/mnt"])
    return probe.returncode == 0


needs_mount = pytest.mark.skipif(not can_mount(), reason="needs root and mount")


@contextlib.contextmanager
def mounted(target: Path, *options: str) -> Iterator[None]:
    target.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", *options, str(target)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(target)], check=True)


def fails_and_goes_on(chaos: Chaos, name: str, kill: Kill, mend: list[str]) -> str:
    """Run into the fault, look at what is left, mend it, go on to the end; the error of the run."""
    start: Start = chaos.start(name, kill, code=1)
    assert start.passed  # the fault did happen
    checkpoints = chaos.folder / name / "stages" / "align" / "checkpoints"
    assert [p.name for p in published(checkpoints)] == ["step-0000002"]
    Published(checkpoints / "step-0000002").verify()
    logs = chaos.logs(name)
    for rank in (0, 1):  # every rank says the same
        assert f"[rank {rank}] moe_ext.training.checkpoint.CheckpointError" in logs
    subprocess.run(mend, check=True)
    chaos.start(name)
    found = chaos.evidence(name)
    assert found["resumed"] == [("align", 2)]
    compare(found, chaos.reference)
    return logs


@needs_mount
def test_a_full_disk(chaos: Chaos) -> None:
    run_dir = chaos.folder / "full"
    with mounted(run_dir, "-t", "tmpfs", "-o", "size=64m", "none"):
        fill = f"dd if=/dev/zero of={run_dir}/ballast bs=64k 2>/dev/null; dd if=/dev/zero bs=1 of={run_dir}/rest"
        kill = Kill("after rename", 0, command=f"({fill}) 2>/dev/null || true")
        logs = fails_and_goes_on(
            chaos, "full", kill, ["sh", "-c", f"rm {run_dir}/ballast {run_dir}/rest"]
        )
        status = read_status(run_dir)
    assert "No space left on device" in logs
    assert "make room there" in logs
    assert status is not None
    assert status.state == "finished"


@needs_mount
def test_a_folder_that_becomes_read_only(chaos: Chaos) -> None:
    stage = chaos.folder / "read-only" / "stages" / "align"
    stage.mkdir(parents=True)
    with mounted(stage, "--bind", str(stage)):
        kill = Kill("after rename", 0, command=f"mount -o remount,bind,ro {stage}")
        mend = ["mount", "-o", "remount,bind,rw", str(stage)]
        logs = fails_and_goes_on(chaos, "read-only", kill, mend)
    assert "Read-only file system" in logs
    assert "make it writable" in logs
