"""A run, or a sweep's runs as one array, becomes an sbatch script; submitting it; asking for states.

The script is `launchers/slurm.sbatch` with its `@name`s filled in. Nothing is decided on the cluster:
every rank starts from a resolved YAML file, and the script's `tasks` file lists one a line.
"""

import json
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from string import Template

from moe_ext.analysis.run_folder import write_json
from moe_ext.compose import ConfigError, to_yaml
from moe_ext.config_launcher import LauncherConfig
from moe_ext.jobs.deepspeed_launcher import variables_of
from moe_ext.jobs.runs import PlannedRun, write_whole
from moe_ext.training.signals import STOP_FILE

JOBS_FILE = "jobs.json"
"""In a `launch` folder: what was submitted."""

OVER = frozenset(
    {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY"}
    | {"PREEMPTED", "REVOKED", "TIMEOUT"}
)
"""Slurm's words for a job that has ended."""


class ScriptTemplate(Template):
    """`@name` is filled in and `@@` is one `@`: `$` stays the shell's."""

    delimiter = "@"


def launchers_dir() -> Path:
    """The folder of the scripts: beside the package in a checkout, else where pip put it."""
    beside = Path(__file__).resolve().parents[2] / "launchers"
    return beside if beside.is_dir() else Path(sys.prefix) / "share" / "moe_ext" / "launchers"


def script_text(
    runs: Sequence[PlannedRun],
    folder: Path,
    ranks_per_node: int,
    group: str = "",
    name: str = "job",
) -> str:
    """The sbatch script of one job (one run) or of an array (several); `folder` holds its files."""
    launcher = runs[0].config.launcher
    directives = [f"--{key}={value}" for key, value in _options(launcher) if value]
    if len(runs) > 1:
        limit = f"%{launcher.array_limit}" if launcher.array_limit else ""
        directives.append(f"--array=0-{len(runs) - 1}{limit}")
    directives += launcher.directives
    variables = variables_of(launcher, group)
    python = launcher.python or sys.executable
    command = [*launcher.wrapper, python, "-u", "-m", launcher.module]
    return ScriptTemplate((launchers_dir() / "slurm.sbatch").read_text()).substitute(
        name=group or runs[0].run_id,
        nodes=launcher.nodes,
        ranks_per_node=ranks_per_node,
        cpus_per_rank=launcher.cpus_per_rank,
        time_limit=launcher.time_limit,
        stop_lead_s=launcher.stop_lead_s,
        max_requeues=launcher.max_requeues,
        stop_file=STOP_FILE,
        log=str(folder / ("task-%a.log" if len(runs) > 1 else "job.log")),
        directory=str(Path.cwd()),
        directives="\n".join(f"#SBATCH {option}" for option in directives),
        tasks=shlex.quote(str(folder / f"{name}.tasks")),
        master_addr=shlex.quote(launcher.master_addr),
        master_port=launcher.master_port,
        exports="\n".join(
            f"export {name}={shlex.quote(value)}" for name, value in variables.items()
        ),
        setup="\n".join(launcher.setup),
        rank_script=shlex.quote(str(launchers_dir() / "rank.sh")),
        command=shlex.join(command),
    )


def _options(launcher: LauncherConfig) -> list[tuple[str, str | int]]:
    return [
        ("partition", launcher.partition),
        ("account", launcher.account),
        ("gpus-per-node", launcher.gpus_per_node),
        ("mem", launcher.memory_per_node),
    ]


def stage_runs(run: PlannedRun) -> list[PlannedRun]:
    """One run a stage of the chain, each with the chain up to there: finished stages are not redone."""
    chain = run.config.chain
    return [
        replace(run, config=replace(run.config, chain=chain[: i + 1])) for i in range(len(chain))
    ]


def task_files(runs: Sequence[PlannedRun], name: str) -> list[Path]:
    """The resolved YAML of each run, in order of task: what the script's `tasks` file lists."""
    return [run.resolved.with_stem(name) if name != "job" else run.resolved for run in runs]


def write_job(
    runs: Sequence[PlannedRun],
    folder: Path,
    ranks_per_node: int,
    group: str = "",
    name: str = "job",
) -> Path:
    """Write the script, the tasks and every run's resolved YAML; returns the script's path."""
    folder.mkdir(parents=True, exist_ok=True)
    files = task_files(runs, name)
    for run, file in zip(runs, files, strict=True):
        write_whole(file, to_yaml(run.config))
    (folder / f"{name}.tasks").write_text("".join(f"{file}\n" for file in files))
    script = folder / f"{name}.sbatch"
    script.write_text(script_text(runs, folder, ranks_per_node, group, name))
    return script


def submission(script: Path, after: str = "") -> list[str]:
    """The command that submits a script; `after` is the job whose success it waits for."""
    waits = [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"] if after else []
    return ["sbatch", "--parsable", *waits, str(script)]


def submit(script: Path, after: str = "") -> str:
    """Job id of the submitted script; with `after`, it waits until that job has succeeded.

    Should that fail, Slurm cancels this one: by default it would stay pending for ever.

    Raises:
        ConfigError: sbatch is missing or refuses; the message is sbatch's own.
    """
    try:
        done = subprocess.run(submission(script, after), capture_output=True, text=True)
    except FileNotFoundError as error:
        raise ConfigError(
            "launcher=slurm: sbatch is not on this machine; run it on a login node"
        ) from error
    if done.returncode != 0:
        raise ConfigError(f"sbatch refused {script}: {' '.join(done.stderr.split())}")
    return done.stdout.strip().split(";")[0]


def remember(folder: Path, jobs: Sequence[str], runs: Sequence[PlannedRun], log: str) -> None:
    """Write what was submitted, for `moe-ext jobs`."""
    tasks = [
        {"run_id": r.run_id, "run_dir": str(r.run_dir), "overrides": list(r.overrides)}
        for r in runs
    ]
    write_json(folder / JOBS_FILE, {"jobs": list(jobs), "tasks": tasks, "log": log})


@dataclass(frozen=True)
class Submitted:
    """A run as Slurm has it."""

    states: dict[str, str]
    """Its job, its task of an array (`12_3`), or its jobs of a chain in order -> Slurm's word for each,
    with the reason why it waits; empty after Slurm forgot it."""
    log: Path

    @property
    def known(self) -> bool:
        """Whether Slurm still knows any of them."""
        return any(self.states.values())

    @property
    def alive(self) -> list[str]:
        """Jobs that run or wait."""
        return [job for job, state in self.states.items() if state and not is_over(state)]

    @property
    def current(self) -> str:
        """The job that matters: the first that has not succeeded, else the last."""
        jobs = [job for job, state in self.states.items() if state not in ("", "COMPLETED")]
        return (jobs or list(self.states))[-1 if not jobs else 0]

    @property
    def word(self) -> str:
        """Slurm's word for the current job, and for what waits behind it."""
        later = list(self.states)[list(self.states).index(self.current) + 1 :]
        word = self.states[self.current]
        behind = Counter(self.states[job].split()[0] for job in later if self.states[job])
        return ", ".join([word, *(f"{count} later {state}" for state, count in behind.items())])


def is_over(state: str) -> bool:
    """Whether a job in this state will not come back by itself."""
    return state.split()[0] in OVER


def submitted_below(folder: Path) -> dict[Path, Submitted]:
    """Run folder -> its newest submission, of all runs at or below a folder."""
    folder = folder.absolute()
    files = {*folder.glob(f"**/{JOBS_FILE}"), *folder.parent.glob(f"*/launch/{JOBS_FILE}")}
    known: dict[Path, tuple[list[str], Path]] = {}
    for path in sorted(files, key=lambda path: path.stat().st_mtime):
        submission = json.loads(path.read_text())
        tasks, jobs = submission["tasks"], submission["jobs"]
        # A task of an array belongs to its own run and to the sweep in whose folder the array is noted.
        whole = folder in path.parents
        for index, task in enumerate(tasks):
            run_dir = Path(task["run_dir"])
            if whole or run_dir == folder or folder in run_dir.parents:
                own = [f"{jobs[-1]}_{index}"] if len(tasks) > 1 else jobs
                known[run_dir] = own, Path(submission["log"].format(task=index))
    found = states({job.partition("_")[0] for jobs, _ in known.values() for job in jobs})
    return {
        run_dir: Submitted({job: found.get(job, "") for job in jobs}, log)
        for run_dir, (jobs, log) in known.items()
    }


def states(jobs: Iterable[str]) -> dict[str, str]:
    """Slurm's state by task (`12_3`, or `12` without an array), from the queue, else from accounting.

    Empty where neither knows a job or there is no Slurm.
    """
    wanted = ",".join(sorted(jobs))
    found: dict[str, str] = {}
    if not wanted:
        return found
    listing = _output(["squeue", "-h", "-r", "-t", "all", "-j", wanted, "-o", "%i %T %r"])
    for line in listing.splitlines():
        task, state, reason = line.split(maxsplit=2)
        found[task] = state if state != "PENDING" or reason == "None" else f"{state} ({reason})"
    listing = _output(["sacct", "-n", "-P", "-X", "-j", wanted, "-o", "JobID,State"])
    for line in listing.splitlines():
        task, _, state = line.partition("|")
        found.setdefault(task, state.split()[0] if state else "")
    return found


def cancel(jobs: Sequence[str]) -> str:
    """Cancel jobs or tasks at once; scancel's complaint, empty when it had none."""
    done = subprocess.run(["scancel", *jobs], capture_output=True, text=True)
    return " ".join(done.stderr.split())


def _output(words: list[str]) -> str:
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=30)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""
