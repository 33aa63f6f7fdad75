"""The deepspeed launcher as a program: its command for one machine and for the hosts of a hostfile,
and a start whose success is read from the run's own status.

Traps that shape this file (DeepSpeed 0.19.8): arguments pass through the remote shell unquoted, so
only paths of the resolved configuration travel; pdsh carries almost no variable over, so ours go
through a file that DS_ENV_FILE names; one host in a hostfile is taken for this machine unless
`--force_multi` says otherwise; a launcher whose node process was killed exits 0; on SIGTERM and SIGINT
it kills data workers before their ranks here, and on the hosts, by `pkill -f`, every DeepSpeed job of
this user. So it is sent neither: a stop request is a file in the run's folder, and what has to end at
once is found by its command line (`processes.py`).
"""

import contextlib
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import psutil

import moe_ext
from moe_ext.analysis.run_folder import write_json
from moe_ext.compose import ConfigError
from moe_ext.config_launcher import LauncherConfig
from moe_ext.jobs import processes
from moe_ext.jobs.runs import PlannedRun
from moe_ext.training.ownership import STATUS_FILE, read_status
from moe_ext.training.signals import STOP_FILE, STOPPED_EXIT_CODE

ENVIRONMENT_FILE = "environment"
HOSTFILE_PORT = 29500
GROUP_VARIABLE = "MOE_EXT_GROUP"


@dataclass(frozen=True)
class Host:
    name: str
    slots: int


def read_hostfile(path: Path) -> list[Host]:
    """The hosts of a hostfile, in order.

    Raises:
        ConfigError: no file, a line that is not `name slots=N`, a host twice, or no host at all.
    """
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise ConfigError(f"launcher.hostfile={path}: {error.strerror}") from error
    hosts = []
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        count = words[1].removeprefix("slots=") if len(words) == 2 else ""
        if not (count.isdigit() and int(count) > 0 and words[1].startswith("slots=")):
            raise ConfigError(
                f"launcher.hostfile={path}, line {number}: {line.strip()!r} is not `name slots=N`"
            )
        hosts.append(Host(words[0], int(count)))
    twice = [name for name, count in Counter(host.name for host in hosts).items() if count > 1]
    if twice or not hosts:
        reason = f"names {twice[0]} twice" if twice else "names no host"
        raise ConfigError(f"launcher.hostfile={path} {reason}")
    return hosts


def command(run: PlannedRun, num_ranks: int, port: int) -> list[str]:
    """The command that starts all ranks: on this machine, or on the hosts of the hostfile."""
    launcher = run.config.launcher
    words = [_program()]
    if launcher.hostfile:
        words += ["--hostfile", str(Path(launcher.hostfile).absolute())]
        if launcher.ssh:
            words += ["--force_multi"]
        else:
            words += ["--no_ssh", "--node_rank", str(launcher.node_rank)]
        if launcher.master_addr:
            words += ["--master_addr", launcher.master_addr]
    else:
        words += ["--num_accelerators", str(num_ranks)]
    words += ["--master_port", str(port)]
    return [*words, "--module", launcher.module, "--config-file", str(run.resolved)]


def port_of(launcher: LauncherConfig) -> int:
    """The configured port; without one a free port here, or the agreed one across hosts."""
    if launcher.master_port:
        return launcher.master_port
    if launcher.hostfile:
        return HOSTFILE_PORT
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def variables_of(launcher: LauncherConfig, group: str = "") -> dict[str, str]:
    """The variables of every rank; `group` joins a sweep's runs in W&B."""
    return dict(launcher.environment) | ({GROUP_VARIABLE: group} if group else {})


def environment_text(variables: dict[str, str]) -> str:
    """Content of the file that DS_ENV_FILE names: `NAME=value` lines, no empty line (deepspeed crashes).

    deepspeed puts the values between double quotes on a remote shell's command line, and pdsh replaces
    `%h` and the like in it: what either would expand is escaped.
    """
    special = {character: f"\\{character}" for character in '\\"$`'} | {"%": "%%"}
    table = str.maketrans(special)
    return "".join(f"{name}={value.translate(table)}\n" for name, value in variables.items())


def start(run: PlannedRun, words: list[str], group: str = "") -> int:
    """Run the command to its end; 0 only if the run itself says that it is finished.

    SIGTERM, SIGINT or SIGUSR2 to this process asks the ranks to publish and stop; the result is then
    STOPPED_EXIT_CODE. A second one ends them at once.

    Raises:
        ConfigError: pdsh is missing.
    """
    launcher = run.config.launcher
    if "--force_multi" in words and shutil.which("pdsh") is None:
        raise ConfigError(
            "launcher=hostfile starts the hosts through pdsh, which is not here: apt-get install pdsh, or "
            "launcher.ssh=false and the command on every host"
        )
    environment_file = run.launch_dir / ENVIRONMENT_FILE
    variables = variables_of(launcher, group)
    environment_file.write_text(environment_text(variables))
    environment = os.environ | variables | {"DS_ENV_FILE": str(environment_file)}
    # A group of its own: a terminal's Ctrl-C reaches this process alone, which passes it on once.
    process = subprocess.Popen(words, env=environment, start_new_session=True)
    stop_file, asked = run.run_dir / STOP_FILE, False

    def pass_on(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            print(end_processes(run.resolved, launcher), file=sys.stderr, flush=True)
            return
        asked = True
        stop_file.touch()
        say = "asking the ranks to publish and stop; once more ends them at once"
        print(say, file=sys.stderr, flush=True)

    previous = {
        n: signal.signal(n, pass_on) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
    }
    try:
        with _noted(run.launch_dir):
            code = process.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        stop_file.unlink(missing_ok=True)  # of a run that ended before it could answer
    return verdict(run.run_dir, code, since_s=environment_file.stat().st_mtime)


@contextlib.contextmanager
def _noted(launch_dir: Path) -> Iterator[None]:
    """Inside, the folder says that this process, on this host, is running the run."""
    file, me = _note(launch_dir), psutil.Process()
    write_json(file, {"pid": me.pid, "created_s": me.create_time()})
    try:
        yield
    finally:
        file.unlink(missing_ok=True)


def _note(launch_dir: Path) -> Path:
    return launch_dir / f"launcher.{socket.gethostname()}.json"


def running_launcher(run_dir: Path) -> int:
    """Process id of the `moe-ext launch` on this host that has the run under way; 0 when there is none."""
    try:
        note = json.loads(_note(run_dir / "launch").read_text())
        process = psutil.Process(note["pid"])
        return process.pid if process.create_time() == note["created_s"] else 0
    except (OSError, psutil.NoSuchProcess):
        return 0


def end_processes(resolved: Path, launcher: LauncherConfig) -> str:
    """End all processes of a run at once, on all its hosts; what each host says."""
    said = []
    if launcher.hostfile and launcher.ssh:
        hosts = ",".join(host.name for host in read_hostfile(Path(launcher.hostfile)))
        python_path = Path(moe_ext.__file__).parents[1]
        there = [sys.executable, "-m", "moe_ext.jobs.processes", str(resolved)]
        there = ["env", f"PYTHONPATH={python_path}", *there]
        words = ["pdsh", "-S", "-R", "ssh", "-w", hosts, shlex.join(there)]
        done = subprocess.run(words, capture_output=True, text=True)
        said = [*done.stdout.splitlines(), *done.stderr.splitlines()]
    # The launcher last: while it lives, it sees its hosts end.
    said.append(f"here: ended {processes.end(resolved)} process(es)")
    return "\n".join(said)


def verdict(run_dir: Path, launcher_code: int, since_s: float) -> int:
    """Exit code of a run from what it said of itself after the given file time.

    A launcher's 0 alone proves nothing, and neither does what an earlier start said.
    """
    file = run_dir / STATUS_FILE
    status = read_status(run_dir) if file.exists() and file.stat().st_mtime >= since_s else None
    if status is not None and status.state == "finished" and launcher_code == 0:
        return 0
    if status is not None and status.state == "stopped":
        print(f"stopped on request in {status.stage}, step {status.step}; start it again to go on")
        return STOPPED_EXIT_CODE
    said = "nothing" if status is None else status.error or status.state
    print(
        f"the launcher ended with code {launcher_code} and the run is not finished; {run_dir} says: {said}",
        file=sys.stderr,
    )
    return launcher_code if launcher_code > 0 else 1


def _program() -> str:
    """The deepspeed command beside the running interpreter, else the one on PATH."""
    beside = Path(sys.executable).with_name("deepspeed")
    return str(beside) if beside.exists() else "deepspeed"
