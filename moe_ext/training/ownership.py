"""Who may write into a run's folder, and how the run stands, for programs and people outside.

`status.json` says how a run stands: launchers trust it and not an exit code alone (a launcher whose
node process was killed exits 0). `owner.json` names the start that owns the folder. A job that a
scheduler believes dead and starts again elsewhere may still be running: the newest start takes the
folder over, and the older copy is refused wherever it wants to write (`Claim.check`, `Claim.held`);
for lines of metrics.jsonl within five seconds (`tracking.py`). Of one Slurm job the newest start is the
one with the highest restart count, in whatever order they arrive; else it is the last that came.

A lock makes "still mine?" and the write that depends on it one thing for all processes, on all hosts
of a shared file system. Where the file system has no locks, the two are microseconds apart.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moe_ext.analysis.run_folder import write_json

OWNER_FILE = "owner.json"
STATUS_FILE = "status.json"
LOCK_FILE = ".owner.lock"
LOCK_WAIT_S = 60.0
POLL_S = 0.02
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


class StaleRunError(RuntimeError):
    """A newer start of the same run owns the folder; this copy must not write."""


@dataclass
class Status:
    """How a run stands."""

    state: str
    """`running`, `stopped` (on request, published, resumable), `finished` or `failed`. From outside:
    `cancelled` (`moe-ext jobs --cancel`), and `exhausted`, which the Slurm script makes of `stopped` when
    launcher.max_requeues keeps the job away."""
    stage: str = ""
    step: int = 0
    """Step inside the stage."""
    error: str = ""
    """failed: the last line of the traceback."""
    time_s: float = 0.0
    """Seconds since the epoch when it was written."""
    requeue: bool = True
    """stopped: whether a scheduler may start it again by itself; a person who asked for the stop may."""


def read_status(run_dir: Path) -> Status | None:
    """The last status written, or None before the first."""
    try:
        return Status(**json.loads((run_dir / STATUS_FILE).read_text()))
    except FileNotFoundError:
        return None


def read_owner(run_dir: Path) -> dict[str, Any] | None:
    """Who owns the folder: `token`, `host`, `pid`, `job`, `restart`; None before the first start."""
    try:
        return json.loads((run_dir / OWNER_FILE).read_text())
    except FileNotFoundError:
        return None


@dataclass(frozen=True)
class Claim:
    """This start's right to write into a run's folder."""

    run_dir: Path
    token: str

    def write_status(
        self, state: str, stage: str = "", step: int = 0, error: str = "", requeue: bool = True
    ) -> None:
        """Say how the run stands; of `error`, a traceback, the last line is kept.

        A copy that no longer owns the folder writes nothing: what it met is not how the run stands.
        """
        lines = error.strip().splitlines()
        last = lines[-1] if lines else ""
        with contextlib.suppress(StaleRunError), self.held():
            _write_status(self.run_dir, Status(state, stage, step, last, time.time(), requeue))

    def check(self) -> None:
        """Return only while this start owns the folder.

        Raises:
            StaleRunError: a newer start took it over; the message says which.
        """
        owner = read_owner(self.run_dir)
        if owner is None:
            raise StaleRunError(
                f"{self.run_dir / OWNER_FILE} is gone: the folder was removed or replaced under this run"
            )
        if owner["token"] != self.token:
            raise StaleRunError(_refusal(self.run_dir, owner))

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Inside, this start owns the folder and no other can take it over; be brief.

        Raises:
            StaleRunError: a newer start took it over.
        """
        self.check()  # without a lock, and without making one in a folder that is gone
        with _locked(self.run_dir):
            self.check()
            yield


def claim(run_dir: Path) -> Claim:
    """Take the folder over from whatever start had it (rank 0, before the first collective).

    Raises:
        StaleRunError: this is a copy of a Slurm job from before a requeue, come late.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    token, job = uuid.uuid4().hex, os.environ.get("SLURM_JOB_ID", "")
    restart = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    with _locked(run_dir):
        known = read_owner(run_dir)
        if known and job and known["job"] == job and known.get("restart", 0) > restart:
            raise StaleRunError(_refusal(run_dir, known))
        # The status first: once the owner's name stands there, what the status says is its own word.
        _write_status(run_dir, Status("running", time_s=time.time()))
        owner = {"token": token, "host": socket.gethostname(), "pid": os.getpid()}
        write_json(run_dir / OWNER_FILE, owner | {"job": job, "restart": restart})
    return Claim(run_dir, token)


def joined(run_dir: Path) -> Claim:
    """The right of whoever owns the folder, for a command that works beside or after its run."""
    owner = read_owner(run_dir)
    return Claim(run_dir, owner["token"] if owner else "")


def _write_status(run_dir: Path, status: Status) -> None:
    write_json(run_dir / STATUS_FILE, asdict(status))


def _refusal(run_dir: Path, owner: dict[str, Any]) -> str:
    job = f"{owner['job']} restart {owner.get('restart', 0)}" if owner["job"] else "none"
    return (
        f"{run_dir} belongs to a newer start of this run (host {owner['host']}, process "
        f"{owner['pid']}, job {job}); this copy stops without writing"
    )


@contextlib.contextmanager
def _locked(run_dir: Path) -> Iterator[None]:
    """One process at a time, on all hosts that see the folder.

    Raises:
        TimeoutError: somebody has held the lock for LOCK_WAIT_S; it is held for milliseconds.
    """
    path = run_dir / LOCK_FILE
    with open(path, "a") as file:  # for writing: NFS makes no exclusive lock of less
        end = time.monotonic() + LOCK_WAIT_S
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno in NO_LOCKS:
                    break
                if error.errno not in (errno.EAGAIN, errno.EACCES):
                    raise
            if time.monotonic() > end:
                raise TimeoutError(
                    f"{path} has been locked for {LOCK_WAIT_S:.0f} s by a process that is stopped or cut off in "
                    f"the middle of a write; end it (owner.json names its host and process), then start again"
                )
            time.sleep(POLL_S)
        yield
