"""Places in a running rank where it may be killed, by name.

`install` wraps functions of the package, in a test's process only. Every passing of a place is
counted; at the planned one the rank sends itself SIGKILL, which nothing in it can notice.
"""

import collections
import functools
import importlib
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BEFORE, AFTER = "before", "after"
ANYWHERE = "anywhere"
"""After a random time, wherever the rank is then."""

# name -> the functions whose beginnings and ends it is
FUNCTIONS = {
    "start": ["moe_ext.training.topology:start", "moe_ext.training.build:prepare"],
    "features": [
        "moe_ext.training.feature_cache:_write_shards",
        "moe_ext.training.feature_cache:_write_index",
    ],
    "resume": [
        "moe_ext.training.resume:restore_masters",
        "moe_ext.training.checkpoint:Published.verify",
    ],
    "forward": ["moe_ext.model.moe:ExtendedMoE.forward"],
    "exchange": ["moe_ext.model.dispatch:_Flight.__init__", "moe_ext.model.dispatch:_Flight.wait"],
    "backward": ["moe_ext.training.engine:Engine.backward"],
    "optimizer": ["moe_ext.training.engine:Engine.step", "torch.optim:AdamW.step"],
    "snapshot": ["moe_ext.training.publishing:Publisher.start"],
    "writing": ["moe_ext.training.publishing:write_tensors"],
    "removal": ["moe_ext.training.publishing:remove_published"],
    "probe": ["moe_ext.training.stages:write_probe", "moe_ext.training.stages:measure_probe"],
    "surgery": ["moe_ext.training.stages:extend"],
    "hand-over": ["moe_ext.training.stages:finish", "moe_ext.training.stages:run_stage"],
    "evaluation": [
        "moe_ext.training.conclusion:evaluate_run",
        "moe_ext.analysis.text:_logits",
    ],
    "record": ["moe_ext.analysis.run_folder:write_json"],
    "extension": ["moe_ext.export:save_extension", "moe_ext.export:sync"],
    "report": ["moe_ext.analysis.report:write_report"],
}
IN_FILES = (
    *("middle of a shard", "middle of a file", "middle of the manifest"),
    *("before rename", "after rename"),
)
POINTS = (*FUNCTIONS, *IN_FILES)


@dataclass(frozen=True)
class Kill:
    """A signal to one rank at its `number`-th passing of a point, or after `delay_s` anywhere."""

    point: str
    rank: int
    number: int = 1
    delay_s: float = 0.0
    signal: int = signal.SIGKILL
    command: str = ""
    """Run in a shell instead of the signal, while the rank waits."""


class Counter:
    """Passings of one process; kills it at the planned one."""

    def __init__(self, kill: Kill | None, record: Path):
        self.kill, self.record = kill, record
        self.passed: collections.Counter[str] = collections.Counter()

    def __call__(self, point: str) -> None:
        self.passed[point] += 1
        kill = self.kill
        if kill is not None and kill.point == point and kill.number == self.passed[point]:
            self.die(point)

    def die(self, point: str) -> None:
        assert self.kill is not None
        append(self.record, {"step": current(), "passed": dict(self.passed)})
        if self.kill.command:
            subprocess.run(["sh", "-c", self.kill.command], check=True)
        else:
            os.kill(os.getpid(), self.kill.signal)

    def arm(self) -> None:
        """For a kill anywhere: the clock runs."""
        kill = self.kill
        if kill is not None and kill.point == ANYWHERE:

            def wait() -> None:
                time.sleep(kill.delay_s)
                self.die(ANYWHERE)

            threading.Thread(target=wait, daemon=True).start()


_now: dict[str, Any] = {"stage": "", "position": None}


def current() -> list[Any]:
    """[stage, steps finished in it] of the loop that runs."""
    return [_now["stage"], _now["position"].step if _now["position"] else 0]


def append(path: Path, record: Any) -> None:
    """One line, by one write: a kill leaves it whole or not there."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, json.dumps(record).encode() + b"\n")
    os.close(descriptor)


def install(folder: Path, rank: int, kill: Kill | None) -> Counter:
    """Wrap this process' points; `folder` gets `data-RANK.jsonl`, what every step trained on."""
    passing = Counter(kill if kill and kill.rank == rank else None, folder / "killed.jsonl")
    for name, functions in FUNCTIONS.items():
        for function in functions:
            _wrap(function, lambda call, name=name: _both_ends(call, name, passing))
    _wrap_files(passing)
    _log_data(folder / f"data-{rank}.jsonl")
    passing.arm()
    return passing


def _wrap(where: str, wrapper: Callable[[Any], Any]) -> None:
    module_name, _, path = where.partition(":")
    owner: Any = importlib.import_module(module_name)
    *outer, last = path.split(".")
    for name in outer:
        owner = getattr(owner, name)
    original = getattr(owner, last)
    wrapped = wrapper(original)
    setattr(owner, last, wrapped)
    if outer:
        return
    for module in list(__import__("sys").modules.values()):  # `from x import f` bound it elsewhere
        if getattr(module, "__name__", "").startswith("moe_ext") and (
            getattr(module, last, None) is original
        ):
            setattr(module, last, wrapped)


def _both_ends(call: Callable[..., Any], name: str, passing: Counter) -> Callable[..., Any]:
    @functools.wraps(call)
    def wrapped(*args: Any, **options: Any) -> Any:
        passing(name)
        result = call(*args, **options)
        passing(name)
        return result

    return wrapped


def _wrap_files(passing: Counter) -> None:
    """Inside of files while they are written, and around the renames that publish."""

    def write_file(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(path: Path, chunks: Any) -> Any:
            where = "the manifest" if path.name == "manifest.json" else "a file"

            def interrupted() -> Any:
                for chunk in chunks:
                    half = len(chunk) // 2
                    yield chunk[:half]
                    passing(f"middle of {where}")
                    yield chunk[half:]

            return call(path, interrupted())

        return wrapped

    def write_tar(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(samples: Any, path: Any) -> Any:
            def interrupted() -> Any:
                for number, sample in enumerate(samples):
                    if number % 50 == 25:
                        passing("middle of a shard")
                    yield sample

            return call(interrupted(), path)

        return wrapped

    def rename(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(source: Any, target: Any, **options: Any) -> None:
            counts = "partial" not in Path(target).name
            if counts:
                passing("before rename")
            call(source, target, **options)
            if counts:
                passing("after rename")

        return wrapped

    _wrap("moe_ext.training.feature_cache:write_tar", write_tar)
    _wrap("moe_ext.training.publishing:write_file", write_file)
    os.rename = rename(os.rename)  # type: ignore[assignment]


def _log_data(path: Path) -> None:
    """What is trained on: a line a micro-batch."""

    def train(call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def wrapped(name: str, stage: Any, engine: Any, loader: Any, tracker: Any, position: Any,
                    *args: Any, **options: Any) -> Any:  # fmt: skip
            _now.update(stage=name, position=position, loader=loader)
            return call(name, stage, engine, loader, tracker, position, *args, **options)

        return wrapped

    def forward(call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def wrapped(self: Any, batch: Any, *args: Any) -> Any:
            append(path, [*current(), _now["loader"].cursor.position, batch.sample_keys])
            return call(self, batch, *args)

        return wrapped

    _wrap("moe_ext.training.stages:train", train)
    _wrap("moe_ext.training.engine:Engine.__call__", forward)
