"""What a run shows and records, on rank 0: progress, console, one JSONL of truth, W&B, TensorBoard.

Nothing here may stop or hang a run. The JSONL is the record; everything else is a view of it, and a
view that fails turns itself off with one line on the console.
"""

import contextlib
import json
import math
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

METRICS_FILE = "metrics.jsonl"
LINE_EVERY_S = 10.0
"""Without a terminal, a line at most every so many seconds."""


class JsonLines:
    """Append-only records, each whole on its own line, flushed at once."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        torn = path.is_file() and path.stat().st_size > 0 and path.read_bytes()[-1:] != b"\n"
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (open for the whole run)
        if torn:  # a killed run left half a line: end it, readers skip it
            self._file.write("\n")

    def write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(_plain(record), allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


class Wandb:
    """W&B that can neither stop nor hang: offline without a key or a network, off after an error."""

    def __init__(
        self,
        run_dir: Path,
        config: dict[str, Any],
        *,
        project: str,
        entity: str = "",
        name: str = "",
        group: str = "",
        say: Callable[[str], None] = print,
        init_timeout_s: float = 15.0,
        finish_timeout_s: float = 30.0,
    ):
        self._run: Any = None
        self._say = say
        identity = run_dir / "wandb_id"
        try:
            import wandb
        except Exception as error:
            say(f"W&B is off: {type(error).__name__}: {error}")
            return
        if not identity.is_file():
            identity.write_text(secrets.token_hex(4))
        self.id = identity.read_text().strip()
        common = {
            "project": project,
            "entity": entity or None,
            "name": name or None,
            "group": group or None,
            "id": self.id,
            "resume": "allow",
            "dir": str(run_dir),
            "config": config,
        }
        for mode in ("offline",) if not _has_key() else ("online", "offline"):
            try:
                settings = wandb.Settings(
                    init_timeout=init_timeout_s,
                    finish_timeout=finish_timeout_s,
                    silent=True,
                    console="off",
                    x_disable_stats=True,
                )
                self._run = wandb.init(mode=mode, settings=settings, **common)
                if mode == "offline":
                    say(f"W&B records offline in {run_dir / 'wandb'}; `wandb sync` sends it later")
                return
            except Exception as error:
                say(f"W&B {mode} failed: {type(error).__name__}: {_first_line(error)}")

    def log(self, values: dict[str, Any], step: int) -> None:
        self._guard(lambda run: run.log(values, step=step))

    def finish(self) -> None:
        self._guard(lambda run: run.finish())
        self._run = None

    def _guard(self, call: Callable[[Any], Any]) -> None:
        if self._run is None:
            return
        try:
            call(self._run)
        except Exception as error:  # its service died, its disk is full, ...
            self._run = None
            self._say(f"W&B is off from here on: {type(error).__name__}: {_first_line(error)}")


def _has_key() -> bool:
    mode = os.environ.get("WANDB_MODE", "")
    if mode in ("offline", "disabled", "dryrun"):
        return False
    netrc = Path.home() / ".netrc"
    with contextlib.suppress(OSError):
        if netrc.is_file() and "wandb" in netrc.read_text():
            return True
    return bool(os.environ.get("WANDB_API_KEY"))


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0]


class TensorBoard:
    """TensorBoard's event files; off with one line when the package is missing or a write fails."""

    def __init__(self, run_dir: Path, say: Callable[[str], None]):
        self._writer: Any = None
        self._say = say
        try:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(run_dir / "tensorboard"))
        except Exception as error:
            say(f"TensorBoard is off: {type(error).__name__}: {_first_line(error)}")

    def log(self, values: dict[str, Any], step: int) -> None:
        if self._writer is None:
            return
        try:
            for name, value in values.items():
                if isinstance(value, int | float):
                    self._writer.add_scalar(name, value, step)
        except Exception as error:
            self._writer = None
            self._say(f"TensorBoard is off from here on: {type(error).__name__}: {error}")

    def finish(self) -> None:
        if self._writer is not None:
            with contextlib.suppress(Exception):
                self._writer.close()


class Progress:
    """One task with a bar and the time left on a terminal, plain lines elsewhere."""

    def __init__(self, label: str, total: int, done: int = 0, *, bar: bool = True):
        self.label, self.total, self.done = label, total, done
        self._first, self._began, self._last_line = done, time.monotonic(), 0.0
        self._bar: Any = None
        self._note = ""
        if bar and sys.stdout.isatty():
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                Progress,
                TextColumn,
                TimeElapsedColumn,
                TimeRemainingColumn,
            )

            self._bar = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
            )
            self._bar.start()
            self._task = self._bar.add_task(label, total=total, completed=done, note="")

    def update(self, done: int, note: str = "", total: int | None = None) -> None:
        """`done` of the total, which may change; `note` stands behind the bar."""
        if total is not None and (total, note) != (self.total, self._note):
            self.total, self._first, self._began = total, 0, time.monotonic()
        self.done, self._note = done, note
        if self._bar is not None:
            self._bar.update(self._task, completed=done, note=note, total=self.total)
            return
        now = time.monotonic()
        if now - self._last_line < LINE_EVERY_S and done < self.total:
            return
        self._last_line = now
        left = ""
        if done > self._first and done < self.total:
            seconds = (now - self._began) / (done - self._first) * (self.total - done)
            left = f", {int(seconds // 60)}:{int(seconds % 60):02d} left"
        print(f"[{self.label}] {done}/{self.total}{left}  {note}".rstrip(), flush=True)

    def say(self, text: str) -> None:
        """A line above the bar."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class Tracker:
    """All of it for one run. Ranks other than 0 hold a tracker that does nothing.

    Args:
        config: the resolved configuration as plain values, for W&B.
    """

    def __init__(
        self,
        run_dir: Path,
        config: dict[str, Any],
        *,
        rank: int = 0,
        wandb: bool = False,
        wandb_project: str = "moe_ext",
        wandb_entity: str = "",
        name: str = "",
        group: str = "",
        tensorboard: bool = False,
        bars: bool = True,
    ):
        self.active, self.bars = rank == 0, bars
        self._progress: Progress | None = None
        self._views: list[Wandb | TensorBoard] = []
        if not self.active:
            return
        self._lines = JsonLines(run_dir / METRICS_FILE)
        if wandb:
            self._views.append(
                Wandb(
                    run_dir,
                    config,
                    project=wandb_project,
                    entity=wandb_entity,
                    name=name,
                    group=group,
                    say=self.say,
                )
            )
        if tensorboard:
            self._views.append(TensorBoard(run_dir, self.say))

    def say(self, text: str) -> None:
        """A line for people."""
        if not self.active:
            return
        if self._progress is not None:
            self._progress.say(text)
        else:
            print(text, flush=True)

    @contextlib.contextmanager
    def progress(self, label: str, total: int, done: int = 0) -> Iterator[Callable[..., None]]:
        """Inside, call the given function with (done, note) as the work goes on."""
        if not self.active:
            yield lambda *_, **__: None
            return
        self._progress = Progress(label, total, done, bar=self.bars)
        try:
            yield self._progress.update
        finally:
            self._progress.close()
            self._progress = None

    def step(self, record: dict[str, Any], global_step: int) -> None:
        """One training step: `stage`, `step`, and numbers, nested by name."""
        if not self.active:
            return
        self._lines.write({"event": "step", **record})
        values = flatten({k: v for k, v in record.items() if k not in ("stage", "step")})
        for view in self._views:
            view.log({f"{record['stage']}/{k}": v for k, v in values.items()}, global_step)

    def stage(self, record: dict[str, Any]) -> None:
        """One finished piece of work; see `analysis/run_folder.py`."""
        if self.active:
            self._lines.write({"event": "stage", **record})

    def event(self, kind: str, **fields: Any) -> None:
        """Anything else worth keeping: a skipped step, a resume, a skipped sample."""
        if self.active:
            self._lines.write({"event": kind, "time": time.time(), **fields})

    def close(self) -> None:
        if not self.active:
            return
        for view in self._views:
            view.finish()
        self._lines.close()


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Nested numbers by slash-separated names; lists become their index."""
    flat: dict[str, float] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            flat |= flatten(value, name + "/")
        elif isinstance(value, list | tuple):
            flat |= flatten(dict(enumerate(value)), name + "/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            flat[name] = value
    return flat
