"""What a launch will do, in words: ranks, steps, memory a rank, shards a rank.

Only what can be known without starting anything; what cannot be known yet is said to be so.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from moe_ext.config import Placement, StageKind, TrainConfig
from moe_ext.data.configured import builtin_manifest
from moe_ext.jobs.runs import PlannedRun
from moe_ext.plan import plan_of
from moe_ext.planning.candidates import evaluate
from moe_ext.planning.memory import RankMemory
from moe_ext.planning.table import KINDS, size
from moe_ext.training.redact import without_secrets


def describe(run: PlannedRun, num_ranks: int, num_nodes: int) -> str:
    """The plan of one run, one fact a line."""
    config = run.config
    ep_size = config.parallel.ep_size
    rows = [
        ("run", f"{run.run_id} -> {run.run_dir}"),
        (
            "ranks",
            f"{num_ranks} on {num_nodes} node(s): {ep_size} expert parallel x {num_ranks // ep_size} data parallel",
        ),
        *((("planned", config.parallel.planned),) if config.parallel.planned else ()),
        *(("stage", line) for line in _stage_lines(config, num_ranks)),
        ("memory", _memory_line(config, num_ranks)),
        *(("data", line) for line in _data_lines(config, num_ranks)),
    ]
    return "\n".join(f"{name:<8} {text}" for name, text in rows)


def _stage_lines(config: TrainConfig, num_ranks: int) -> Iterator[str]:
    for name in config.chain:
        stage = config.stages[name]
        if stage.kind is StageKind.extend:
            yield f"{name}: surgery, no training"
            continue
        sequences = stage.sequences_per_rank * stage.accumulation * num_ranks
        parts = ", ".join(part.name for part in stage.train)
        yield f"{name}: {stage.steps} steps of {sequences} sequences, trains {parts}"


def _memory_line(config: TrainConfig, num_ranks: int) -> str:
    """The planner's figures for the stage that trains most, of the rank that holds most."""
    try:
        memory = memory_of(config, num_ranks)
    except ValueError as error:
        return f"not known here: {error}"
    kinds = ", ".join(f"{kind} {size(getattr(memory, kind))}" for kind in KINDS)
    return f"{memory.total / 2**30:.2f} GiB of tensors a rank at most, by moe-ext plan ({kinds})"


def memory_of(config: TrainConfig, num_ranks: int) -> RankMemory:
    """Bytes of the rank that holds most, in the placement that is configured.

    Raises:
        ValueError: the base or an encoder is not here to look at, or has no row of its own.
    """
    cluster = replace(config.cluster, nodes=1, ranks_per_node=num_ranks)
    plan = plan_of(replace(config, cluster=cluster), exact=True)
    parallel = config.parallel
    spread = [c.placed for c in plan.candidates if c.placed.frozen is Placement.shard]
    placed = replace(
        max(spread, key=lambda placed: placed.ep_size),  # with the hot experts, where there are any
        ep_size=parallel.ep_size,
        frozen=parallel.frozen_placement,
        new=config.extension.placement,
        zero_stage=max(parallel.zero_stage, 1),
    )
    return evaluate(plan.subject, placed, plan.cluster).memory


def _data_lines(config: TrainConfig, num_ranks: int) -> Iterator[str]:
    data = config.data
    manifests = {name: stream.manifest for name, stream in data.streams.items()}
    if data.builtin:
        manifests[data.builtin] = str(builtin_manifest(data, config.cache_dir))
    for name, manifest in manifests.items():
        if not Path(manifest).is_file():
            why = "is made by the first start" if name == data.builtin else "is not here to look at"
            yield f"{name}: {without_secrets(manifest)} {why}"
            continue
        shards = json.loads(Path(manifest).read_text()).get("shards", [])
        yield f"{name}: {len(shards)} shards, {len(shards) / num_ranks:.1f} a rank"
