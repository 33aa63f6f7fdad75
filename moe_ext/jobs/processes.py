"""The processes of a run on this host, found by the file that they were started from.

    python -m moe_ext.jobs.processes RESOLVED

ends them at once, and is what `moe-ext jobs --cancel` runs on every host of a hostfile. deepspeed's own
way, `pkill -f` for its launcher, would end every job of this user and interpreter there.
"""

import contextlib
import socket
import sys
from pathlib import Path

import psutil

from moe_ext.training.ownership import read_owner, read_status


def of_run(resolved: Path) -> list[psutil.Process]:
    """Launcher, ranks and what they started here: everything below a command line that says
    `--config-file RESOLVED`."""
    wanted = ["--config-file", str(resolved)]
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if any(words[i : i + 2] == wanted for i in range(len(words))):
            with contextlib.suppress(psutil.Error):
                found |= {p.pid: p for p in (process, *process.children(recursive=True))}
    return list(found.values())


def end(resolved: Path) -> int:
    """SIGKILL to all of them; how many there were."""
    processes = of_run(resolved)
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(processes, timeout=5)
    return len(processes)


def is_gone(run_dir: Path) -> bool:
    """Whether rank 0 ran on this host and has ended without saying how."""
    status, owner = read_status(run_dir), read_owner(run_dir)
    if status is None or status.state != "running" or owner is None:
        return False
    return owner["host"] == socket.gethostname() and not psutil.pid_exists(owner["pid"])


if __name__ == "__main__":
    count = end(Path(sys.argv[1]))
    print(f"{socket.gethostname()}: ended {count} process(es)")
