"""`moe-ext launch`: compose once, check what can be checked here, write it down, start the ranks.

Each rank reads the resolved YAML file of its run, so overrides pass no shell and no ssh, and all ranks
mean the same.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from moe_ext.compose import CONF_DIR, ConfigError
from moe_ext.config_check import check_world
from moe_ext.config_launcher import LauncherConfig, LauncherKind
from moe_ext.jobs import deepspeed_launcher, slurm
from moe_ext.jobs.plan import describe
from moe_ext.jobs.runs import PlannedRun, plan_runs, sweep_id
from moe_ext.jobs.stopping import check_free
from moe_ext.preflight import check_files
from moe_ext.training.signals import STOP_FILE


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="moe-ext launch",
        description="Start a run, or a sweep of runs, on this machine, on the hosts of a hostfile or on Slurm. "
        "Started again with the same settings, a run goes on where it stopped.",
        epilog="Overrides are Hydra's. Examples: `launcher=local launcher.ranks_per_node=2 experiment=demo "
        "parallel.ep_size=2`; `launcher=hostfile launcher.hostfile=hosts.txt`; `launcher=slurm launcher.nodes=2 "
        "launcher.gpus_per_node=8 seed=0,1,2` (an array of three jobs). Settings: conf/launcher, "
        "moe_ext/config_launcher.py.",
    )
    result.add_argument(
        "--dry-run",
        action="store_true",
        help="print the plan and exactly what would run; write nothing",
    )
    result.add_argument("--config-dir", type=Path, default=CONF_DIR, help="another conf/ folder")
    result.add_argument(
        "-m", "--multirun", action="store_true",
        help="as Hydra's: lists of values make a sweep; they do so without it, too",
    )  # fmt: skip
    result.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 finished (slurm: submitted), 75 stopped on request, 2 refused, else failed."""
    options = parser().parse_intermixed_args(argv)
    try:
        runs = plan_runs(options.config_dir, options.overrides, Path.cwd())
        launcher = runs[0].config.launcher
        nodes, ranks_per_node = _size(launcher)
        for run in runs:
            check_world(run.config, nodes * ranks_per_node, ranks_per_node)
            if not launcher.wrapper:  # a container's paths are not this machine's
                check_files(run.config)
            if not options.dry_run:
                check_free(run)
        for run in runs:
            print(describe(run, nodes * ranks_per_node, nodes), end="\n\n")
        if launcher.kind is LauncherKind.slurm:
            return _slurm(runs, ranks_per_node, options.dry_run)
        return _deepspeed(runs, nodes * ranks_per_node, options.dry_run)
    except (ConfigError, ValueError) as error:
        print(f"moe-ext launch: {error}", file=sys.stderr)
        return 2


def _size(launcher: LauncherConfig) -> tuple[int, int]:
    """(nodes, ranks on each of them)."""
    if launcher.kind is LauncherKind.hostfile:
        hosts = deepspeed_launcher.read_hostfile(Path(launcher.hostfile))
        slots = {host.slots for host in hosts}
        if len(slots) > 1:
            raise ConfigError(
                f"launcher.hostfile={launcher.hostfile} gives hosts different slots {sorted(slots)}; "
                "expert parallel groups need the same number everywhere"
            )
        return len(hosts), slots.pop()
    if launcher.kind is LauncherKind.slurm:
        return launcher.nodes, launcher.ranks_per_node or launcher.gpus_per_node or 1
    if launcher.nodes != 1:
        raise ConfigError(
            f"launcher.nodes={launcher.nodes} with launcher=local: use launcher=hostfile or launcher=slurm"
        )
    return 1, launcher.ranks_per_node or torch.cuda.device_count() or 1


def _deepspeed(runs: Sequence[PlannedRun], num_ranks: int, dry_run: bool) -> int:
    """Run after run; the first that fails or is stopped ends the sweep, and its code is the result."""
    group = sweep_id(runs) if len(runs) > 1 else ""
    for run in runs:
        launcher = run.config.launcher
        words = deepspeed_launcher.command(run, num_ranks, deepspeed_launcher.port_of(launcher))
        if launcher.hostfile:
            hosts = deepspeed_launcher.read_hostfile(Path(launcher.hostfile))
            print("hosts   ", *(f"{host.name} slots={host.slots}" for host in hosts))
        print(shlex.join(words))
        for name, value in deepspeed_launcher.variables_of(launcher, group).items():
            print(f"  with {name}={value}")
        if dry_run:
            continue
        run.write()
        (run.run_dir / STOP_FILE).unlink(missing_ok=True)  # an earlier start's
        sys.stdout.flush()
        if code := deepspeed_launcher.start(run, words, group):
            return code
    return 0


def _slurm(runs: Sequence[PlannedRun], ranks_per_node: int, dry_run: bool) -> int:
    """One job, one array, or one job a stage; prints the ids."""
    is_sweep = len(runs) > 1
    group = sweep_id(runs) if is_sweep else ""
    folder = runs[0].launch_dir if not is_sweep else runs[0].run_dir.parent / group / "launch"
    launcher = runs[0].config.launcher
    if launcher.job_per_stage and is_sweep:
        raise ConfigError("launcher.job_per_stage=true with a sweep: choose one of the two")
    jobs = {"job": list(runs)}
    if launcher.job_per_stage:
        jobs = {f"stage-{run.config.chain[-1]}": [run] for run in slurm.stage_runs(runs[0])}
    if dry_run:
        after = ""
        for name, members in jobs.items():
            script = folder / f"{name}.sbatch"
            print(f"# {script}")
            print(slurm.script_text(members, folder, ranks_per_node, group, name))
            print(f"# {script.with_suffix('.tasks')}")
            print(*slurm.task_files(members, name), sep="\n", end="\n\n")
            print(shlex.join(slurm.submission(script, after)), end="\n\n")
            after = f"ID_OF_{name}"
        return 0
    for run in runs:
        (run.run_dir / STOP_FILE).unlink(missing_ok=True)  # an earlier start's
    log = str(folder / ("task-{task}.log" if is_sweep else "job.log"))
    submitted: list[str] = []
    for name, members in jobs.items():
        script = slurm.write_job(members, folder, ranks_per_node, group, name)
        submitted.append(slurm.submit(script, after=submitted[-1] if submitted else ""))
        slurm.remember(folder, submitted, runs, log)
        print(f"submitted {submitted[-1]}: {script}")
    print(f"log      {log.format(task='N')}")
    print(f"look     moe-ext jobs {folder.parent}")
    print(f"end      moe-ext jobs --stop {folder.parent}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
