"""What a launch will do, in words: ranks, steps, memory of the frozen base, shards a rank.

Only what can be known without starting anything; what cannot be known yet is said to be so.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from moe_ext.config import Placement, StageKind, TrainConfig
from moe_ext.jobs.runs import PlannedRun
from moe_ext.model.files import Checkpoint
from moe_ext.model.placement import owners


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
        ("memory", _memory_line(config)),
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


def _memory_line(config: TrainConfig) -> str:
    if not config.base.path:
        return "known once the base is upcycled"
    shared, experts, num_experts = checkpoint_bytes(Path(config.base.path))
    share = largest_share(num_experts, config.parallel.ep_size, config.parallel.frozen_placement)
    rank = shared + share * experts
    return (
        f"frozen base {rank / 2**30:.2f} GiB a rank as stored "
        f"({(shared + experts) / 2**30:.2f} GiB in all, {num_experts} experts a layer)"
    )


def largest_share(num_experts: int, ep_size: int, placement: Placement) -> float:
    """Part of a layer's experts on the rank that holds most of them."""
    if not num_experts:
        return 1.0
    return max(map(len, owners(num_experts, ep_size, placement))) / num_experts


def checkpoint_bytes(folder: Path) -> tuple[int, int, int]:
    """(bytes outside the experts, bytes of the experts, experts a layer) from the files' headers alone."""
    shared = experts = num_experts = 0
    for file in Checkpoint(folder).files:
        with open(file, "rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        for key, entry in header.items():
            if key == "__metadata__":
                continue
            first, last = entry["data_offsets"]
            found = re.search(r"\.experts\.(?:(\d+)\.)?", key)
            if found is None:
                shared += last - first
                continue
            experts += last - first
            rows = int(found[1]) + 1 if found[1] else entry["shape"][0]
            num_experts = max(num_experts, rows)
    return shared, experts, num_experts


def _data_lines(config: TrainConfig, num_ranks: int) -> Iterator[str]:
    if config.data.builtin:
        yield f"built-in {config.data.builtin}, shards made once in {config.cache_dir}"
    for name, stream in config.data.streams.items():
        path = Path(stream.manifest)
        if not path.is_file():
            yield f"{name}: {stream.manifest} is not here to look at"
            continue
        shards = json.loads(path.read_text()).get("shards", [])
        yield f"{name}: {len(shards)} shards, {len(shards) / num_ranks:.1f} a rank"
