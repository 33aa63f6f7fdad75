"""`moe-ext bench checkpoint`: how long a checkpoint stops training.

A step is a fixed product of matrices; every few steps the state of so many trained parameters (fp32
weights and two moments) is published. `waits` is the call that returns when the checkpoint is on disk,
`beside` the one that training uses: it returns after the copy, and a thread writes. `copy` is the
least that any way needs: the same bytes copied into memory that is there already. On a GPU the state
lies there and is copied into pinned memory.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_ext.benchmarks.report import environment
from moe_ext.training.checkpoint import KINDS, Piece, Snapshot
from moe_ext.training.publishing import Publisher, publish

TENSORS = 24
"""Logical tensors that the parameters are divided into, as a few layers' experts are."""
STEPS_BETWEEN = 12


def state_of(parameters: int, device: torch.device) -> Snapshot:
    """A snapshot of so many parameters with their moments."""
    each = parameters // TENSORS
    pieces = [
        Piece(
            f"layers.{i}.w", (each,), 0, {kind: torch.randn(each, device=device) for kind in KINDS}
        )
        for i in range(TENSORS)
    ]
    return Snapshot(pieces, {"step": 0}, rank_tensors={"rng": torch.get_rng_state()})


def measure(
    snapshot: Snapshot, folder: Path, device: torch.device, checkpoints: int
) -> dict[str, Any]:
    """Seconds of a stall by way, of a step alone and of a step while a thread writes."""
    matrix_DD = torch.randn(768, 768, device=device)
    publisher = Publisher(device=device)

    def step() -> None:
        x_DD = matrix_DD
        for _ in range(6):
            x_DD = (matrix_DD @ x_DD).clamp(-1, 1)
        if device.type == "cuda":
            torch.cuda.synchronize()

    def timed(work: Callable[[], Any]) -> float:
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    def beside(number: int) -> None:
        publisher.advance(publisher.vote)
        publisher.start(folder, f"step-{number:03d}", snapshot, keep=2)

    seconds: dict[str, list[float]] = {
        name: [] for name in ("step", "waits", "beside", "step_beside", "write", "copy")
    }
    copies = [t.cpu().clone() for piece in snapshot.pieces for t in piece.tensors.values()]
    for number in range(checkpoints + 1):  # the first touches memory: not counted
        alone = [timed(step) for _ in range(STEPS_BETWEEN)]
        waits = timed(lambda: publish(folder, "waits", snapshot, keep=2))  # noqa: B023
        copy = timed(lambda: _copy(snapshot, copies))
        began = time.perf_counter()
        stall = timed(lambda: beside(number))  # noqa: B023
        disturbed = []
        while publisher.vote == 0.0:
            disturbed.append(timed(step))
        write = time.perf_counter() - began
        publisher.wait()
        if number:
            seconds["step"] += alone
            seconds["waits"].append(waits)
            seconds["copy"].append(copy)
            seconds["beside"].append(stall)
            seconds["step_beside"] += disturbed
            seconds["write"].append(write)
    return {
        name: {"median_s": statistics.median(all_), "max_s": max(all_), "count": len(all_)}
        for name, all_ in seconds.items()
        if all_
    }


def _copy(snapshot: Snapshot, copies: list[Tensor]) -> None:
    tensors = [t for piece in snapshot.pieces for t in piece.tensors.values()]
    for tensor, out in zip(tensors, copies, strict=True):
        out.copy_(tensor)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="moe-ext bench checkpoint", description=__doc__)
    parser.add_argument("--million", type=float, default=20.0, help="trained parameters a rank")
    parser.add_argument("--checkpoints", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder by default")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    snapshot = state_of(int(options.million * 1e6), device)
    size = sum(t.numel() * 4 for piece in snapshot.pieces for t in piece.tensors.values())
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        found = measure(snapshot, Path(folder), device, options.checkpoints)
    print(
        f"{size / 2**20:,.0f} MiB a checkpoint and rank, {options.checkpoints} checkpoints, {device}"
    )
    lines = {
        "step": "a step",
        "step_beside": "a step while a thread writes",
        "copy": "copying the state",
        "beside": "stall, written beside training",
        "waits": "stall, waited for",
        "write": "until it is on disk, beside training",
    }
    for name, text in lines.items():
        if name in found:
            print(
                f"  {text:<38} {found[name]['median_s'] * 1e3:9.1f} ms (at most {found[name]['max_s'] * 1e3:.1f})"
            )
    if options.json:
        content = {"environment": environment(), "bytes": size, "seconds": found}
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    return 0
