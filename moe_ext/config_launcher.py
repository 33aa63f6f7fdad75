"""How `moe-ext launch` starts the ranks: its settings, their meaning and their rules.

Nothing here changes a result, so nothing here is part of a run's identity (`jobs/runs.py`).
"""

import re
from dataclasses import dataclass, field
from enum import Enum


class LauncherKind(Enum):
    local = "local"
    """The deepspeed launcher on this machine."""
    hostfile = "hostfile"
    """The deepspeed launcher on the hosts of a hostfile."""
    slurm = "slurm"
    """One Slurm job, or one array of jobs for a sweep."""


@dataclass
class LauncherConfig:
    kind: LauncherKind = LauncherKind.local
    nodes: int = 1
    """slurm: nodes of a job. A hostfile counts its own."""
    ranks_per_node: int = 0
    """Ranks on each node; 0: one a GPU of this machine (slurm: `gpus_per_node`), one without GPUs. A
    hostfile's slots count instead."""
    master_addr: str = ""
    """Where the ranks meet; empty: this machine, the first host, or the job's first node."""
    master_port: int = 0
    """0: local a free port, hostfile 29500, slurm one made from the job's id."""
    module: str = "moe_ext.train"
    """What every rank runs, as `python -m MODULE --config-file RESOLVED`."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables for every rank. pdsh carries almost none of the caller's over to the hosts, so what
    the ranks need on a hostfile (GLOO_SOCKET_IFNAME, NCCL_*, OMP_NUM_THREADS) belongs here."""

    hostfile: str = ""
    """hostfile: lines of `name slots=N`."""
    ssh: bool = True
    """hostfile: start all hosts from here through pdsh. false: run the command on every host, each with
    its `launcher.node_rank`."""
    node_rank: int = -1

    partition: str = ""
    account: str = ""
    time_limit: str = "04:00:00"
    """slurm: of one job; a run that needs longer publishes, is requeued and goes on."""
    gpus_per_node: int = 0
    cpus_per_rank: int = 1
    memory_per_node: str = ""
    """slurm: such as 200G; empty: the partition's default."""
    directives: list[str] = field(default_factory=list)
    """slurm: further options of sbatch, such as --constraint=a100."""
    setup: list[str] = field(default_factory=list)
    """slurm: shell lines before the ranks start, such as `module load cuda`."""
    wrapper: list[str] = field(default_factory=list)
    """slurm: words in front of every rank's command, such as [ch-run, /images/moe_ext, --]."""
    python: str = ""
    """slurm: the interpreter of the ranks; empty: the one that launches. A container has its own:
    /venv/bin/python3 in the images of docker/."""
    stop_lead_s: int = 120
    """slurm: seconds before the time limit at which the ranks are told to publish and leave. Slurm
    looks at limits every half minute, so allow for that, a step and the writing."""
    max_requeues: int = 100
    """slurm: a job that was requeued so often stays away."""
    sweep: list[str] = field(default_factory=list)
    """Sweeps that belong to an experiment, as on the command line: ["seed=0,1,2"]."""
    array_limit: int = 0
    """slurm: tasks of a sweep that run at a time; 0: all."""
    job_per_stage: bool = False
    """slurm: one job a stage, each waiting for the one before, instead of one for the chain."""


SECRET_NAME = re.compile(r"(?i)(^|_)(KEY(_ID)?|TOKEN|SECRET|PASS(WORD|WD)?|CREDENTIALS?)$")
SECRET_VALUE = re.compile(r"://[^/@\s]*:[^/@\s]*@")
"""A name and a password in a URL."""


def _secret(key: str) -> str:
    return (
        f"{key} looks like a secret, and the resolved configuration is written to disk; let the hosts have it "
        "in their own environment (for W&B: `wandb login` there)"
    )


def check_launcher(launcher: LauncherConfig) -> None:
    """Raise ValueError for the first rule that the settings break."""
    for key, least in {
        "nodes": 1,
        "ranks_per_node": 0,
        "gpus_per_node": 0,
        "cpus_per_rank": 1,
        "stop_lead_s": 0,
        "max_requeues": 0,
        "array_limit": 0,
    }.items():
        if getattr(launcher, key) < least:
            raise ValueError(f"launcher.{key}={getattr(launcher, key)} must be at least {least}")
    if not 0 <= launcher.master_port < 65536:
        raise ValueError(f"launcher.master_port={launcher.master_port} is no port (0 chooses one)")
    if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", launcher.module):
        raise ValueError(
            f"launcher.module={launcher.module!r} is no dotted module name, such as moe_ext.train"
        )
    for name, value in launcher.environment.items():
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) or "\n" in value:
            raise ValueError(
                f"launcher.environment.{name} is no variable of one line; use letters, digits and '_'"
            )
        if SECRET_NAME.search(name) or SECRET_VALUE.search(value):
            raise ValueError(_secret(f"launcher.environment.{name}"))
    for key in ("setup", "directives", "wrapper"):
        for number, text in enumerate(getattr(launcher, key)):
            assigned = re.findall(r"([A-Za-z_]\w*)=(?!\s|$)", text)
            if any(map(SECRET_NAME.search, assigned)) or SECRET_VALUE.search(text):
                raise ValueError(_secret(f"launcher.{key}[{number}]"))
    if launcher.kind is LauncherKind.hostfile:
        if not launcher.hostfile:
            raise ValueError("launcher.hostfile is empty; give the file with lines `name slots=N`")
        if not launcher.ssh and (launcher.node_rank < 0 or not launcher.master_addr):
            raise ValueError(
                f"launcher.ssh=false needs launcher.node_rank (now {launcher.node_rank}; 0 on the first host, "
                f"1 on the second, ...) and launcher.master_addr (now {launcher.master_addr!r}, the first host)"
            )
    if launcher.kind is LauncherKind.slurm:
        if not re.fullmatch(r"(\d+-)?\d+(:\d\d){0,2}", launcher.time_limit):
            raise ValueError(
                f"launcher.time_limit={launcher.time_limit!r} is none of Slurm's forms, such as 04:00:00 or 2-00:00:00"
            )
        for option in launcher.directives:
            if not option.startswith("-") or "\n" in option:
                raise ValueError(
                    f"launcher.directives: {option!r} is no option of sbatch, such as --constraint=a100"
                )
