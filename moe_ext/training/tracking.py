"""What a run shows and records, on rank 0: progress, console, one JSONL of truth, alerts, and views of it.

Nothing here may stop or hang a run but a copy of it whose folder a newer start has. The JSONL is the
record; W&B and TensorBoard (`views.py`) are made from it.
"""

import contextlib
import json
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from moe_ext.analysis.run_folder import METRICS_FILE, load_run
from moe_ext.config import TrackingConfig
from moe_ext.training.alerts import Alert, Alerts, Watchdog
from moe_ext.training.ownership import StaleRunError
from moe_ext.training.views import TensorBoard, Wandb

NO_VALUES = ("event", "stage", "step", "global_step")
"""Fields of a step record that say where it belongs."""
LINE_EVERY_S = 10.0
"""Without a terminal, a line at most every so many seconds."""
OWNER_EVERY_S = 5.0
"""Between two looks at whose the folder is: on a shared file system one may take as long as a step."""


class JsonLines:
    """Append-only records, each whole on its own line, written at once.

    What a full disk refuses is kept and tried again with the next record: a checkpoint that cannot be
    written ends the run, on all ranks and with a remedy; a line of this file does not.
    """

    def __init__(self, path: Path, say: Callable[[str], None] = print):
        path.parent.mkdir(parents=True, exist_ok=True)
        torn = path.is_file() and path.stat().st_size > 0 and path.read_bytes()[-1:] != b"\n"
        self._path, self._say = path, say
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (open for the whole run)
        # a killed run left half a line: end it, readers skip it
        self._pending = b"\n" if torn else b""
        self._refused = False
        self._lock = threading.Lock()  # the watchdog writes from a thread of its own

    def write(self, record: dict[str, Any]) -> None:
        with self._lock:
            self._pending += json.dumps(_plain(record), allow_nan=False).encode() + b"\n"
            self._flush()

    def _flush(self) -> None:
        try:
            while self._pending:
                self._pending = self._pending[self._file.write(self._pending) or 0 :]
            self._refused = False
        except OSError as error:
            if not self._refused:
                self._say(f"{self._path} cannot be written now, its lines are kept: {error}")
            self._refused = True

    def close(self) -> None:
        self._flush()
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


def show_line(text: str) -> None:
    """On the console, whose file may be on a full disk."""
    with contextlib.suppress(OSError):
        print(text, flush=True)


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
        show_line(f"[{self.label}] {done}/{self.total}{left}  {note}".rstrip())

    def say(self, text: str) -> None:
        """A line above the bar."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            show_line(text)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class Tracker:
    """All of it for one run. Ranks other than 0 hold a tracker that does nothing.

    Args:
        config: the resolved configuration as plain values, for W&B.
        settings: which views there are, and what is worth an alert; None: no view.
        group: joins the runs of a sweep in W&B.
        owned: called before a record, at most every OWNER_EVERY_S; what it raises (the folder belongs to a
            newer start) ends the run, and nothing is written. So a copy that has lost the folder may add
            lines for that long, as a killed one leaves some: of a step's lines the last counts.
            Checkpoints and the status are fenced by themselves, exactly (`ownership.Claim.held`).
    """

    def __init__(
        self,
        run_dir: Path,
        config: dict[str, Any],
        settings: TrackingConfig | None = None,
        *,
        rank: int = 0,
        group: str = "",
        owned: Callable[[], None] = lambda: None,
    ):
        settings = settings or TrackingConfig(wandb=False)
        self.active, self.bars = rank == 0, settings.progress
        self._progress: Progress | None = None
        self._views: list[Wandb | TensorBoard] = []
        self._alerts, self._alert_settings = Alerts(settings.alerts), settings.alerts
        self._watchdog: Watchdog | None = None
        self._stage = ""
        self._run_dir, self._owned, self._asked_s = run_dir, owned, -math.inf
        if not self.active:
            return
        self._lines = JsonLines(run_dir / METRICS_FILE, self.say)
        if settings.wandb:
            view = Wandb(
                run_dir,
                config,
                project=settings.wandb_project,
                entity=settings.wandb_entity,
                group=group,
                timeout_s=settings.wandb_timeout_s,
                history=self.history,
                say=self.say,
            )
            self._views.append(view)
        if settings.tensorboard:
            self._views.append(TensorBoard(run_dir, history=self.history, say=self.say))

    def say(self, text: str) -> None:
        """A line for people."""
        if not self.active:
            return
        if self._progress is not None:
            self._progress.say(text)
        else:
            show_line(text)

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

    # ---- stages ------------------------------------------------------------------------------

    def enter(self, stage: str, known: dict[str, Any] | None = None) -> None:
        """What follows belongs to this stage; `known` is what its checkpoint holds of `state()`."""
        if not self.active:
            return
        if stage != self._stage:
            self._stage, self._alerts = stage, Alerts(self._alert_settings)
        for view in self._views:
            view.enter(stage, (known or {}).get("wandb_id", ""))

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: the id under which W&B knows this run."""
        ids = [view.id for view in self._views if isinstance(view, Wandb)]
        return {"wandb_id": ids[0]} if ids else {}

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, an alert is given when no step is reported for `tracking.alerts.stalled_s`."""
        limit_s = self._alert_settings.stalled_s
        if not self.active or not limit_s:
            yield
            return

        def stalled(silent_s: float) -> None:
            text = (
                f"[{self._stage}] no step for {silent_s:.0f} s: a loader, a rank or the network hangs; "
                f"tracking.alerts.stalled_s={limit_s:g}"
            )
            with contextlib.suppress(StaleRunError):  # this is the watchdog's thread
                self.alert(Alert("stalled", text))

        self._watchdog = Watchdog(limit_s, stalled)
        try:
            yield
        finally:
            self._watchdog.close()
            self._watchdog = None

    def alive(self) -> None:
        """A step has ended, whether it is logged or not."""
        if self._watchdog is not None:
            self._watchdog.report()

    # ---- records -----------------------------------------------------------------------------

    def step(self, record: dict[str, Any], global_step: int) -> None:
        """One training step: `stage`, `step`, and numbers, nested by name."""
        if not self.active:
            return
        self._write({"event": "step", "global_step": global_step, **record})
        for view in self._views:
            view.log(values_of(record), global_step)
        for alert in self._alerts.look(record):
            self.alert(alert)

    def alert(self, alert: Alert) -> None:
        """Something that a person should look at."""
        self.event("alert", rule=alert.kind, text=alert.text)
        self.say(f"ALERT {alert.text}")
        for view in self._views:
            view.alert(alert.kind, alert.text)

    def stage(self, record: dict[str, Any]) -> None:
        """One finished piece of work; see `analysis/run_folder.py`."""
        if self.active:
            self._write({"event": "stage", **record})

    def event(self, kind: str, **fields: Any) -> None:
        """Anything else worth keeping: a skipped step, a resume, a skipped sample."""
        if self.active:
            self._write({"event": kind, "time": time.time(), **fields})

    def _write(self, record: dict[str, Any]) -> None:
        now_s = time.monotonic()
        if now_s - self._asked_s >= OWNER_EVERY_S:
            self._owned()  # raises again at the next record: only a good answer counts for a while
            self._asked_s = now_s
        self._lines.write(record)

    def evaluation(self, parts: dict[str, Any], extension: Path, metadata: dict[str, Any]) -> None:
        """The results of a run: its numbers, its gallery of images and captions, its extension."""
        self.enter("evaluate")
        numbers = {k: v for k, v in parts.items() if k not in ("gallery", "experts")}
        for view in self._views:
            view.summary(flatten(_without_lists(numbers)))
            if parts.get("gallery"):
                view.gallery(parts["gallery"])
            view.artifact(extension, metadata)

    def history(self, stage: str) -> Iterator[tuple[int, dict[str, float]]]:
        """(global step, values) of what the JSONL holds of a stage, in order, each step once."""
        by_step = {}
        for record in load_run(self._run_dir).steps.get(stage, []):
            if "global_step" in record:
                by_step[int(record["global_step"])] = values_of(record)
        yield from sorted(by_step.items())

    def close(self, code: int = 0, resumable: bool = False) -> None:
        """End the views; `code` is the process's, `resumable` says that it was asked to stop."""
        if not self.active:
            return
        for view in self._views:
            view.finish(code, resumable)
        self._lines.close()


def values_of(record: dict[str, Any]) -> dict[str, float]:
    """The numbers of a step record under the names that views give them."""
    return flatten({k: v for k, v in record.items() if k not in NO_VALUES})


def _without_lists(values: dict[str, Any]) -> dict[str, Any]:
    """The results without their tables of every candidate."""
    return {
        key: _without_lists(value) if isinstance(value, dict) else value
        for key, value in values.items()
        if not isinstance(value, list | tuple)
    }


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
