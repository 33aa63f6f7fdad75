"""`moe-ext watch RUN`: how a run goes, live in a terminal, read from the files of its folder alone.

It needs neither W&B nor the training process: over ssh, on a shared file system, for a run that is
waiting, running, stopped, failed or finished. The JSONL is read on from where the last look ended.
"""

import argparse
import contextlib
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from moe_ext.analysis.run_folder import METRICS_FILE
from moe_ext.jobs.processes import is_gone
from moe_ext.training.ownership import Status, read_status

BARS = "▁▂▃▄▅▆▇█"
ASCII_BARS = "_.-=+*%#"
COLORS = {"running": "green", "finished": "bold green", "stopped": "yellow", "failed": "bold red"}
RECENT = 50
"""Steps that the pace is measured over."""
SILENT_S = 120.0
"""Seconds without a record after which a running run is said to be silent."""


@dataclass
class Watched:
    """What the files of a run folder have said so far."""

    folder: Path
    config: dict[str, Any] = field(default_factory=dict)
    steps: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """Stage -> its step records, in order, each step once."""
    done: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Name -> the record of a finished piece of work."""
    events: list[dict[str, Any]] = field(default_factory=list)
    """Alerts, resumes, skipped steps, in order."""
    status: Status | None = None
    read_bytes: int = 0
    """How far the JSONL has been read."""

    def read(self) -> None:
        """Take in what was written since the last call; a line that is not whole yet waits."""
        self.status = read_status(self.folder)
        if not self.config and (self.folder / "config.json").is_file():
            self.config = json.loads((self.folder / "config.json").read_text())
        path = self.folder / METRICS_FILE
        if not path.is_file():
            return
        if path.stat().st_size < self.read_bytes:  # another run took the folder
            self.steps, self.done, self.events, self.read_bytes = {}, {}, [], 0
        with open(path, "rb") as file:
            file.seek(self.read_bytes)
            new = file.read()
        whole = new[: new.rfind(b"\n") + 1]
        self.read_bytes += len(whole)
        for line in whole.splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue  # a killed run's half line
            self._take(record)

    def _take(self, record: dict[str, Any]) -> None:
        kind = record.get("event", "step")
        if kind == "stage":
            self.done[record["stage"]] = record
        elif kind == "step":
            known = self.steps.setdefault(record["stage"], [])
            while known and known[-1]["step"] >= record["step"]:  # resumed from an earlier step
                known.pop()
            known.append(record)
        else:
            self.events.append(record)

    @property
    def stage(self) -> str:
        """The stage that the last record belongs to, or that the status names."""
        if self.status is not None and self.status.stage:
            return self.status.stage
        return list(self.steps)[-1] if self.steps else ""

    @property
    def state(self) -> str:
        """The status's word; `waiting` before the first, `gone` when its process is not there any more."""
        if self.status is None:
            return "waiting"
        return "gone" if is_gone(self.folder) else self.status.state

    def silent_s(self) -> float:
        """Seconds since anything was written."""
        times = [
            (self.folder / name).stat().st_mtime
            for name in (METRICS_FILE, "status.json")
            if (self.folder / name).is_file()
        ]
        return time.time() - max(times) if times else 0.0

    def total(self, stage: str) -> int:
        return int(self.config.get("stages", {}).get(stage, {}).get("steps", 0))

    def left_s(self, stage: str) -> float | None:
        """Seconds to the stage's end at the pace of its last steps; None before two records."""
        records = self.steps.get(stage, [])[-RECENT:]
        if len(records) < 2:
            return None
        steps = records[-1]["step"] - records[0]["step"]
        pace_s = (records[-1]["time_s"] - records[0]["time_s"]) / max(steps, 1)
        return pace_s * max(0, self.total(stage) - records[-1]["step"])

    def checkpoint(self) -> tuple[str, float] | None:
        """(name, seconds since it was published) of the newest checkpoint or result."""
        stages = self.folder / "stages"
        found: dict[Path, float] = {}
        for pattern in ("*/checkpoints/step-*/manifest.json", "*/result/manifest.json"):
            for manifest in stages.glob(pattern):
                with contextlib.suppress(FileNotFoundError):  # an old one that was just removed
                    found[manifest.parent] = manifest.stat().st_mtime
        if not found:
            return None
        newest = max(found, key=lambda path: found[path])
        name = str(newest.relative_to(stages)).replace("checkpoints/", "")
        return name, time.time() - found[newest]


# ---- drawing -------------------------------------------------------------------------------------


def sparkline(values: Sequence[float | None], width: int, bars: str = BARS) -> str:
    """The values as `width` characters at most, each the mean of its share of them; gaps are blank."""
    count = min(width, len(values))
    cells: list[float | None] = []
    for i in range(count):
        part = values[i * len(values) // count : (i + 1) * len(values) // count]
        known = [v for v in part if v is not None and math.isfinite(v)]
        cells.append(sum(known) / len(known) if known else None)
    known = [cell for cell in cells if cell is not None]
    if not known:
        return ""
    low, span = min(known), max(known) - min(known)
    return "".join(
        " " if cell is None else bars[round((cell - low) / span * (len(bars) - 1)) if span else 0]
        for cell in cells
    )


def duration(seconds: float) -> str:
    """`45 s`, `12:03` (minutes) or `3:07:00` (hours)."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def frame(run: Watched, width: int = 100, bars: str = BARS) -> RenderableType:
    """One picture of the run, `width` columns wide."""
    parts: list[RenderableType] = [_head(run), _chain(run)]
    stage = run.stage if run.steps.get(run.stage) else next(reversed(run.steps), "")
    records = run.steps.get(stage, [])
    if records:
        parts += [_stage(run, stage, width), Text(), _curves(records, width, bars)]
        last = records[-1]
        tables = [t for t in (_gradients(last), _experts(last, bars)) if t is not None]
        if width >= 90 and len(tables) == 2:
            grid = Table.grid(padding=(0, 4))
            grid.add_row(*tables)
            tables = [grid]
        for table in tables:
            parts += [Text(), table]
    parts += [Text(), _foot(run)]
    return Panel(Group(*parts), title=f"[bold]{run.folder.name}[/bold]", width=width)


def _head(run: Watched) -> Text:
    state = run.state
    text = Text(state, style=COLORS.get(state, "yellow"))
    if state == "waiting":
        return text.append(f": {run.folder} has no run yet", style="default not bold")
    if state == "gone":
        return text.append(
            ": its process ended without a word; start it again to go on", style="red"
        )
    silent = run.silent_s()
    if state == "running" and silent > SILENT_S:
        text.append(f"  silent for {duration(silent)}", style="bold yellow")
    return text


def _chain(run: Watched) -> Text:
    """The stages in order, the finished ones with their minutes."""
    line = Text()
    for index, name in enumerate([*run.config.get("chain", []), "evaluate"]):
        line.append(" > " if index else "", style="dim")
        if name in run.done:
            line.append(name, style="green").append(f" {run.done[name]['minutes']:.1f} m", "dim")
        elif name == run.stage:
            line.append(name, style="bold cyan")
        else:
            line.append(name, style="dim")
    return line


def _stage(run: Watched, stage: str, width: int) -> Table:
    step, total = run.steps[stage][-1]["step"], run.total(stage)
    left = run.left_s(stage)
    row = Table.grid(padding=(0, 1))
    row.add_row(
        Text(stage, style="bold cyan"),
        ProgressBar(total=max(total, 1), completed=step, width=max(10, width - 60)),
        f"{step}/{total}",
        Text(f"{step / max(total, 1):.0%}", style="bold"),
        "" if left is None or step >= total else f"{duration(left)} left",
    )
    return row


def _curves(records: list[dict[str, Any]], width: int, bars: str) -> Table:
    """A line a value: its name, its course over the stage, where it stands."""
    wide = width >= 100
    table = Table.grid(padding=(0, 1))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, justify="right")
    table.add_column(no_wrap=True, style="dim")
    room = max(10, width - (58 if wide else 36))

    def add(name: str, values: list[float | None], shown: str, style: str) -> None:
        line = Text(sparkline(values, room, bars), style=style)
        table.add_row(name, line, shown, _trend(values) if wide else "")

    for part in records[-1]["loss"]:
        values = [record["loss"].get(part) for record in records]
        add(f"loss {part}", values, _number(values[-1]), "cyan")
    for key, name, unit, style in (
        ("learning_rate", "learning rate", "", "blue"),
        ("grad_norm", "gradient norm", "", "magenta"),
        ("tokens_per_s", "tokens/s", "", "green"),
        ("data_wait_s", "data wait", " s", "yellow"),
    ):
        values = [record.get(key) for record in records]
        shown = (
            f"{values[-1]:,.0f}" if key == "tokens_per_s" and values[-1] else _number(values[-1])
        )
        add(name, values, shown + unit, style)
    return table


def _gradients(last: dict[str, Any]) -> Table | None:
    """Gradient norm by part of what trains."""
    norms = last.get("grad_norm_by_part")
    if not norms:
        return None
    table = Table("", "norm", title="gradients", title_justify="left", box=None)
    for part, norm in norms.items():
        table.add_row(part, _number(norm))
    return table


def _experts(last: dict[str, Any], bars: str) -> Table | None:
    """Busiest expert and entropy by layer, a bar a layer, and who uses the new experts."""
    if not last.get("expert_load"):
        return None
    names = [name for name in ("text", "image") if last.get(name)]
    table = Table("", *names, title="experts by layer", title_justify="left", box=None)
    for key, name, worst in (
        ("load", "busiest expert's load", max),
        ("entropy", "entropy", min),
        ("new_share", "new experts' share", max),
    ):
        by_kind = [list(last[kind].get(key, {}).values()) for kind in names]
        if any(by_kind):
            cells = [
                f"{sparkline(values, 24, bars)} {worst.__name__} {worst(values):.2f}"
                for values in by_kind
            ]
            table.add_row(name, *cells)
    share = last.get("new_share")
    if share:
        shown = [f"{share[kind]:.1%}" for kind in ("text", "image")]
        table.add_row("new experts, all layers", *([Text(cell, "bold") for cell in shown]))
    return table


def _foot(run: Watched) -> Table:
    """The last checkpoint, what was skipped, the last alert, the last error."""
    table = Table.grid(padding=(0, 2))
    checkpoint = run.checkpoint()
    if checkpoint is not None:
        table.add_row("checkpoint", f"{checkpoint[0]}, {duration(checkpoint[1])} ago")
    resumes = [e for e in run.events if e["event"] == "resume"]
    skipped = [e for e in run.events if e["event"] == "skipped_step"]
    if resumes or skipped:
        table.add_row("so far", f"{len(resumes)} resume(s), {len(skipped)} skipped step(s)")
    alerts = [e for e in run.events if e["event"] == "alert"]
    if alerts:
        ago = duration(time.time() - alerts[-1]["time"])
        text = f"{alerts[-1]['text']} ({ago} ago, {len(alerts)} in all)"
        table.add_row(Text("alert", "bold yellow"), Text(text, "yellow"))
    if run.status is not None and run.status.error:
        table.add_row(Text("error", "bold red"), Text(run.status.error, "red"))
    if run.state == "finished" and (run.folder / "report.html").is_file():
        table.add_row("report", str(run.folder / "report.html"))
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _trend(values: Sequence[float | None]) -> str:
    """The change of the mean over the last tenth of the values against the tenth before."""
    known = [v for v in values if v is not None]
    size = len(known) // 10
    if not size:
        return ""
    before, now = sum(known[-2 * size : -size]) / size, sum(known[-size:]) / size
    return f"({now - before:+.2g} in {size} records)"


# ---- the command ---------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 1 when the run has failed or its process is gone, 2 when there is no run, else 0."""
    parser = argparse.ArgumentParser(
        prog="moe-ext watch",
        description="Stage, time left, losses, gradients, experts, data wait, last checkpoint and last error of a "
        "run, live. Ends when the run ends; Ctrl-C ends the view, never the run.",
    )
    parser.add_argument("run", type=Path, help="a run's folder, such as runs/demo")
    parser.add_argument("--once", action="store_true", help="print one picture and leave")
    parser.add_argument("--every", type=float, default=2.0, metavar="SECONDS", help="default 2")
    options = parser.parse_args(argv)
    run, console = Watched(options.run), Console()
    bars = ASCII_BARS if console.options.ascii_only else BARS

    def draw() -> RenderableType:
        run.read()
        return frame(run, min(console.width, 120), bars)

    if options.once:
        console.print(draw())
        return _code(run)
    try:
        with Live(draw(), console=console, auto_refresh=False, screen=False) as live:
            while run.state in ("waiting", "running"):
                time.sleep(options.every)
                live.update(draw(), refresh=True)
    except KeyboardInterrupt:
        return 0
    return _code(run)


def _code(run: Watched) -> int:
    return {"waiting": 2, "failed": 1, "gone": 1}.get(run.state, 0)
