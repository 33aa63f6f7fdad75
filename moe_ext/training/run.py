"""One start of a run: what its stages share, what makes its results comparable, what it reports."""

import resource
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moe_ext.analysis.reduce import Ranks as AnalysisRanks
from moe_ext.config import TrainConfig
from moe_ext.training.build import Prepared
from moe_ext.training.checkpoint import Published, Snapshot, publish, published
from moe_ext.training.ownership import Claim
from moe_ext.training.signals import StopFlag
from moe_ext.training.topology import Topology
from moe_ext.training.tracking import Tracker

FREE = (
    "num_workers", "bad_sample_budget", "verify_local",
    "shard_cache", "shard_cache_bytes", "shards_ahead", "fetch_timeout_s", "fetch_tries",
)  # fmt: skip
"""Settings that change nothing about a result."""


@dataclass
class Run:
    """One start of a run: what the stages share."""

    config: TrainConfig
    topology: Topology
    prepared: Prepared
    tracker: Tracker
    claim: Claim
    """This start's right to write into the folder."""
    stop: StopFlag

    @property
    def folder(self) -> Path:
        return Path(self.config.run_dir)

    @property
    def ranks(self) -> AnalysisRanks:
        t = self.topology
        return AnalysisRanks(t.rank, t.world_size, t.device)

    def stage_folder(self, name: str) -> Path:
        return self.folder / "stages" / name

    def result(self, name: str) -> Path | None:
        """The published result of a stage, or None."""
        found = [p for p in published(self.stage_folder(name)) if p.name == "result"]
        return found[0] if found else None

    def publish(self, folder: Path, name: str, snapshot: Snapshot, keep: int | None = None) -> Path:
        t = self.topology
        return publish(folder, name, snapshot, t.rank, t.world_size, keep, self.claim.check)

    def identity(self, name: str) -> dict[str, Any]:
        """The settings that decide a stage's result; a published one must have been made with them."""
        whole = to_plain(asdict(self.config))
        stage = {k: v for k, v in whole["stages"][name].items() if k != "checkpoint_every"}
        parts = ("seed", "base", "encoder", "connector", "extension", "data", "optim")
        return {"stage": stage} | {part: without_free(whole[part]) for part in parts}


def without_free(part: Any) -> Any:
    """A part of the settings without those that change nothing."""
    return {k: v for k, v in part.items() if k not in FREE} if isinstance(part, dict) else part


def check_identity(run: Run, name: str, source: Published) -> None:
    """Refuse to go on from something that other settings made.

    Raises:
        ValueError: naming the first setting that differs.
    """
    theirs = {part: without_free(value) for part, value in source.state["identity"].items()}
    ours = run.identity(name)
    if theirs == ours:
        return
    keys = [
        f"{part}.{key}"
        for part in ours
        if isinstance(ours[part], dict)
        for key in ours[part]
        if theirs.get(part, {}).get(key) != ours[part][key]
    ] or [part for part in ours if theirs.get(part) != ours[part]]
    key = keys[0].replace("stage.", f"stages.{name}.", 1) if keys else "a setting"
    raise ValueError(
        f"{source.folder} was made with other settings ({key} differs); use another name or run_dir, "
        f"restore the setting, or remove {run.folder}"
    )


def to_plain(value: Any) -> Any:
    """Enums by name, so that a JSON file reads back equal."""
    if isinstance(value, dict):
        return {str(k): to_plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(v) for v in value]
    return value.name if hasattr(value, "name") and not isinstance(value, str) else value


def peak_memory(topology: Topology) -> list[int]:
    """Bytes, one number a rank: of the GPU, or of the process. A collective."""
    if topology.device.type == "cuda":
        own = torch.cuda.max_memory_allocated(topology.device)
    else:
        own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
            1 if sys.platform == "darwin" else 1024
        )
    all_: list[Any] = [own] * topology.world_size
    if topology.world_size > 1:
        dist.all_gather_object(all_, own)
    return all_


def status(run: Run, state: str, stage: str = "", step: int = 0, error: str = "") -> None:
    if run.topology.rank == 0:
        run.claim.write_status(state, stage, step, error)
