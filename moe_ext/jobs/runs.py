"""Command lines become runs: each with an id, a folder and one resolved YAML file that every rank reads.

The id is the name and a hash of what decides the result, so the same settings always come back to the
same folder, whatever the clock says, and a longer time limit does not start the run anew.
"""

import hashlib
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from moe_ext.compose import ConfigError, expand, load, to_yaml
from moe_ext.config import TrackingConfig, TrainConfig
from moe_ext.config_cluster import ClusterConfig
from moe_ext.config_launcher import LauncherConfig

RESOLVED_FILE = "resolved.yaml"
"""Name of the resolved configuration inside a run's `launch` folder."""


@dataclass(frozen=True)
class PlannedRun:
    """One run that is about to be started. Its paths are absolute."""

    run_id: str
    config: TrainConfig
    overrides: tuple[str, ...]

    @property
    def run_dir(self) -> Path:
        return Path(self.config.run_dir)

    @property
    def launch_dir(self) -> Path:
        """What launching writes: the resolved configuration, scripts, logs and job ids."""
        return self.run_dir / "launch"

    @property
    def resolved(self) -> Path:
        return self.launch_dir / RESOLVED_FILE

    def write(self) -> None:
        """Write the file that the ranks are started from."""
        write_whole(self.resolved, to_yaml(self.config))


def write_whole(path: Path, text: str) -> None:
    """Write by one rename: without ssh, every host writes this file while others read it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
    partial.write_text(text)
    partial.replace(path)


def run_id(config: TrainConfig) -> str:
    """Name and hash: `demo-1f0c9a2b`. Where it runs, starts and is logged does not enter."""
    same = replace(
        config,
        run_dir="",
        cache_dir="",
        tracking=TrackingConfig(),
        launcher=LauncherConfig(),
        cluster=ClusterConfig(),
        parallel=replace(config.parallel, planned="", planned_ranks=0),
    )
    return f"{config.name}-{short_hash(to_yaml(same))}"


def short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def plan_runs(config_dir: Path, overrides: Sequence[str], root: Path) -> list[PlannedRun]:
    """One run for every point of the sweeps in `overrides` and in the experiment's `launcher.sweep`.

    Relative folders of the configuration are taken from `root`.

    Raises:
        ConfigError: the configuration is refused, or two points of the sweep would share a folder.
    """
    points = expand(overrides)
    first = load(config_dir, points[0])
    if first.launcher.sweep:
        points = [[*point, *more] for point in points for more in expand(first.launcher.sweep)]
    runs = [planned(load(config_dir, point), tuple(point), root) for point in points]
    folders = [run.run_dir for run in runs]
    if len(set(folders)) != len(folders):
        raise ConfigError(
            f"run_dir={folders[0]} would be shared by {len(runs)} runs of the sweep; "
            "leave run_dir out (each run gets its own folder), and sweep over values that differ"
        )
    return runs


def sweep_id(runs: Sequence[PlannedRun]) -> str:
    """Name of a sweep's folder and of its W&B group."""
    return f"{runs[0].config.name}-sweep-{short_hash(' '.join(run.run_id for run in runs))}"


def planned(config: TrainConfig, overrides: tuple[str, ...], root: Path) -> PlannedRun:
    """One run in the folder that its settings lead to; relative folders are taken from `root`."""
    identity = run_id(config)
    is_default = config.run_dir == f"runs/{config.name}"
    run_dir = root / (f"runs/{identity}" if is_default else config.run_dir)
    config = replace(config, run_dir=str(run_dir), cache_dir=str(root / config.cache_dir))
    return PlannedRun(identity, config, overrides)
