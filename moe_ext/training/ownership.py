"""Who may write into a run's folder, and how the run stands, for programs and people outside.

`status.json` says how a run stands: launchers trust it and not an exit code alone (a launcher whose
node process was killed exits 0). `owner.json` names the start that owns the folder. A job that a
scheduler believes dead and starts again elsewhere may still be running: the newest start takes the
folder over, and the older copy is refused at its next publication (`Claim.check`, called right before
the rename that publishes).

Written by rank 0 alone, each by one rename.
"""

import contextlib
import json
import os
import socket
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path

from moe_ext.analysis.run_folder import write_json

OWNER_FILE = "owner.json"
STATUS_FILE = "status.json"


class StaleRunError(RuntimeError):
    """A newer start of the same run owns the folder; this copy must not write."""


@dataclass
class Status:
    """How a run stands."""

    state: str
    """`running`, `stopped` (on request, published, resumable), `finished` or `failed`."""
    stage: str = ""
    step: int = 0
    """Step inside the stage."""
    error: str = ""
    """failed: the last line of the traceback."""
    time_s: float = 0.0
    """Seconds since the epoch when it was written."""


def read_status(run_dir: Path) -> Status | None:
    """The last status written, or None before the first."""
    try:
        return Status(**json.loads((run_dir / STATUS_FILE).read_text()))
    except FileNotFoundError:
        return None


@dataclass(frozen=True)
class Claim:
    """This start's right to write into a run's folder."""

    run_dir: Path
    token: str

    def write_status(self, state: str, stage: str = "", step: int = 0, error: str = "") -> None:
        """Say how the run stands; of `error`, a traceback, the last line is kept.

        A copy that no longer owns the folder writes nothing: what it met is not how the run stands.
        """
        lines = error.strip().splitlines()
        status = Status(state, stage, step, lines[-1] if lines else "", time.time())
        with contextlib.suppress(StaleRunError):
            self.check()
            write_json(self.run_dir / STATUS_FILE, asdict(status))

    def check(self) -> None:
        """Return only while this start owns the folder.

        Raises:
            StaleRunError: a newer start took it over; the message says which.
        """
        try:
            owner = json.loads((self.run_dir / OWNER_FILE).read_text())
        except FileNotFoundError:
            raise StaleRunError(
                f"{self.run_dir / OWNER_FILE} is gone: the folder was removed or replaced under this run"
            ) from None
        if owner["token"] != self.token:
            raise StaleRunError(
                f"{self.run_dir} belongs to a newer start of this run (host {owner['host']}, process "
                f"{owner['pid']}, job {owner['job'] or 'none'}); this copy stops without writing"
            )


def claim(run_dir: Path) -> Claim:
    """Take the folder over from whatever start had it (rank 0, before the first collective)."""
    run_dir.mkdir(parents=True, exist_ok=True)
    token = uuid.uuid4().hex
    job = os.environ.get("SLURM_JOB_ID", "")
    if job:
        job += f" restart {os.environ.get('SLURM_RESTART_COUNT', '0')}"
    owner = {"token": token, "host": socket.gethostname(), "pid": os.getpid(), "job": job}
    write_json(run_dir / OWNER_FILE, owner)
    return Claim(run_dir, token)
