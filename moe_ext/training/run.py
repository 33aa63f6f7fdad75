"""One start of a run: what its stages share, what makes its results comparable, what it reports."""

import math
import resource
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moe_ext.analysis.reduce import Ranks as AnalysisRanks
from moe_ext.config import (
    BaseConfig,
    ConnectorConfig,
    DataConfig,
    ExtensionConfig,
    OptimConfig,
    StageConfig,
    TrainConfig,
)
from moe_ext.training.build import Prepared
from moe_ext.training.checkpoint import Published, Snapshot, published
from moe_ext.training.ownership import Claim
from moe_ext.training.publishing import Publisher
from moe_ext.training.signals import StopFlag, StopRequested
from moe_ext.training.topology import Topology
from moe_ext.training.tracking import Tracker

FREE = (
    "num_workers", "bad_sample_budget", "placement", "verify_local",
    "shard_cache", "shard_cache_bytes", "shards_ahead", "fetch_timeout_s", "fetch_tries",
)  # fmt: skip
"""Settings that change nothing about a result, wherever they stand."""

BATCH = ("sequences_per_rank", "accumulation")
RULES = ("spike_sigmas", "spike_window", "max_bad_steps")
"""Of a stage: which steps are skipped and when that ends it. The remedy for an end is another value."""
FREE_OF_STAGE = ("checkpoint_every", *RULES, *BATCH)
"""Of a stage: with another number of ranks, others of BATCH give the same steps (`check_batch`)."""

KINDS: dict[str, type] = {
    "stage": StageConfig, "base": BaseConfig, "connector": ConnectorConfig,
    "extension": ExtensionConfig, "data": DataConfig, "optim": OptimConfig,
}  # fmt: skip
"""Part of an identity -> the class of its settings."""


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
    publisher: Publisher = field(init=False)

    def __post_init__(self) -> None:
        t = self.topology
        self.publisher = Publisher(
            t.rank,
            t.world_size,
            token=self.claim.token,
            owning=self.claim.held,
            device=t.device,
        )

    @property
    def folder(self) -> Path:
        return Path(self.config.run_dir)

    @property
    def modality(self) -> int:
        """Id of the modality that the run's samples bring."""
        return self.prepared.own_modalities[0]

    @property
    def others(self) -> frozenset[str]:
        """Extensions in the model that are not the run's own."""
        return self.prepared.beside.names

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

    def publish(self, folder: Path, name: str, snapshot: Snapshot) -> None:
        """Publish and wait for it. A collective."""
        self.publisher.start(folder, name, snapshot, copy=False)
        self.publisher.wait()
        self.publisher.release()

    def check_owner(self) -> None:
        """Before rank 0 writes into the run's folder.

        Raises:
            StaleRunError: on rank 0, when a newer start has the folder.
        """
        if self.topology.rank == 0:
            self.claim.check()

    def leave_if_asked(self) -> None:
        """Between pieces of work that are not training steps. A collective.

        Raises:
            StopRequested: some rank was asked to stop, on all ranks.
            StaleRunError: on rank 0, when a newer start has the folder.
        """
        self.check_owner()
        if self.stop.agreed(device=str(self.topology.device)):
            self.publisher.wait()
            raise StopRequested

    def identity(self, name: str) -> dict[str, Any]:
        """The settings that decide a stage's result; a published one must have been made with them."""
        whole = to_plain(asdict(self.config))
        stage = {k: v for k, v in whole["stages"][name].items() if k not in FREE_OF_STAGE}
        parts = ("seed", "base", "encoder", "connector", "extension", "data", "optim")
        batch = {key: whole["stages"][name][key] for key in BATCH}
        batch["ranks"] = self.topology.world_size
        beside = {"beside": self.prepared.beside.identity} if self.others else {}
        return {"stage": stage, "batch": batch, **beside} | {
            part: without_free(whole[part]) for part in parts
        }


def without_free(part: Any) -> Any:
    """A part of the settings without those that change nothing."""
    free = (*FREE, *RULES)  # the rules stand in what earlier versions published
    return {k: v for k, v in part.items() if k not in free} if isinstance(part, dict) else part


def check_identity(run: Run, name: str, source: Published) -> None:
    """Refuse to go on from something that other settings made.

    Raises:
        ValueError: naming the first setting that differs.
    """
    theirs = {part: without_free(value) for part, value in source.state["identity"].items()}
    ours = dict(run.identity(name))
    for part in KINDS.keys() & ours.keys():
        # a setting that came later was at its default, which does what there was before it
        defaults = to_plain(asdict(KINDS[part]()))
        theirs[part] = {key: defaults[key] for key in ours[part]} | theirs[part]
    check_batch(run, name, source, theirs.pop("batch"), ours.pop("batch"))
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


def check_batch(
    run: Run, name: str, source: Published, before: dict[str, int], now: dict[str, int]
) -> None:
    """On another number of ranks a step may keep its sequences, or each rank its own; nothing else.

    Raises:
        ValueError: a setting of the batch differs, and not because of the ranks.
    """
    was, is_ = math.prod(before.values()), math.prod(now.values())
    if was == is_:
        return
    differs = [key for key in BATCH if before[key] != now[key]]
    if differs or before["ranks"] == now["ranks"]:
        key = differs[0]
        raise ValueError(
            f"{source.folder} was made with other settings (stages.{name}.{key}={before[key]} on "
            f"{before['ranks']} ranks, {was} sequences a step; now {is_}): choose "
            f"stages.{name}.sequences_per_rank and accumulation so that a step has {was} again, use "
            f"another name or run_dir, or remove {run.folder}"
        )
    run.tracker.say(
        f"[{name}] a step has {is_} sequences on {now['ranks']} ranks, it had {was} on "
        f"{before['ranks']}; stages.{name}.accumulation or sequences_per_rank keep it"
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
        run.claim.write_status(state, stage, step, error, requeue=not run.stop.for_good)
