"""`moe-ext jobs`: how the runs stand, from their own files and from Slurm's queue; and their end."""

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from moe_ext.analysis.run_folder import METRICS_FILE, load_run
from moe_ext.jobs import slurm, stopping
from moe_ext.jobs.processes import is_gone
from moe_ext.jobs.slurm import Submitted
from moe_ext.training.ownership import STATUS_FILE, read_status

DIED = ("FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")
"""Slurm's words for jobs that ended by an error."""


@dataclass
class Row:
    """One run as a line of the table."""

    run: str
    job: str
    slurm: str
    """Slurm's word for it; empty without a job or after Slurm forgot it."""
    state: str
    stage: str
    step: str
    loss: str
    error: str


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 1 when there is no run, or none to stop, or `--check` finds one that failed; else 0."""
    parser = argparse.ArgumentParser(
        prog="moe-ext jobs",
        description="State, last step, loss and error line of the runs at or below a folder; or end them. "
        "`moe-ext launch` with the same settings goes on where a run was ended.",
    )
    parser.add_argument("folder", type=Path, nargs="?", default=None, help="default: runs")
    ending = parser.add_mutually_exclusive_group()
    ending.add_argument(
        "--stop",
        action="store_true",
        help="ask the runs to publish a checkpoint, end and stay away; what waits in Slurm's queue leaves it",
    )
    ending.add_argument(
        "--cancel", action="store_true", help="end the runs at once, without a checkpoint"
    )
    ending.add_argument(
        "--check",
        action="store_true",
        help="name the runs that failed or were killed; code 1 if any",
    )
    options = parser.parse_args(argv)
    if (options.stop or options.cancel) and options.folder is None:
        parser.error(
            "--stop and --cancel need the folder of a run, of a sweep, or of several: runs"
        )
    folder = options.folder or Path("runs")
    standings = survey(folder)
    if options.check:
        code = 0
        for standing in standings:
            state, error = state_of(standing)
            word = standing.submitted.word if standing.submitted else ""
            if has_failed(state, word):
                print(f"{standing.run_dir.name}: {state or word} {error}".rstrip())
                code = 1
        return code
    if not standings:
        print(f"no runs at or below {folder}")
        return 1
    if options.stop or options.cancel:
        end = stopping.stop if options.stop else stopping.cancel
        said = [(s.run_dir, end(s.run_dir, s.submitted)) for s in standings]
        for run_dir, text in said:
            print(f"{run_dir.name}: {text or 'is not running'}")
        return 0 if any(text for _, text in said) else 1
    table = Table(*Row.__dataclass_fields__)
    for standing in standings:
        table.add_row(*vars(row(standing)).values())
    Console().print(table)
    return 0


@dataclass(frozen=True)
class Standing:
    """A run's folder, and what Slurm says of it if it was submitted there."""

    run_dir: Path
    submitted: Submitted | None


def survey(folder: Path) -> list[Standing]:
    """Every submitted run and every run folder, in order of name."""
    known: dict[Path, Submitted | None] = dict(slurm.submitted_below(folder))
    for name in (METRICS_FILE, STATUS_FILE):
        for path in folder.absolute().glob(f"**/{name}"):
            known.setdefault(path.parent, None)
    return [Standing(run_dir, known[run_dir]) for run_dir in sorted(known)]


def collect(folder: Path) -> list[Row]:
    """A row for every submitted run and for every run folder, in order of name."""
    return [row(standing) for standing in survey(folder)]


def row(standing: Standing) -> Row:
    run_dir, submitted = standing.run_dir, standing.submitted
    job, word = (submitted.current, submitted.word) if submitted else ("", "")
    state, error = state_of(standing)
    stage, step, loss = last_step(run_dir)
    return Row(run_dir.name, job, word, state, stage, step, loss, error)


def state_of(standing: Standing) -> tuple[str, str]:
    """The run's own word for how it stands, and its error line; its records are not read."""
    run_dir, submitted = standing.run_dir, standing.submitted
    status = read_status(run_dir)
    state = status.state if status is not None else ""
    error = status.error if status is not None and state == "failed" else ""
    over = submitted is not None and bool(submitted.word) and not submitted.alive
    if state == "running" and (over or is_gone(run_dir)):
        state = "gone"  # it ended without a word: killed
    if not error and submitted is not None and (over or not state) and state != "finished":
        error = error_line(submitted.log)
    return state, error


def has_failed(state: str, word: str) -> bool:
    """Whether a run failed or was killed; a job that died before its first word is known by Slurm's."""
    return state in ("failed", "gone") or (not state and word.startswith(DIED))


def last_step(run_dir: Path) -> tuple[str, str, str]:
    """(stage, step, total loss) of the newest record, as text; empty before the first."""
    if not (run_dir / "metrics.jsonl").is_file():
        return "", "", ""
    run = load_run(run_dir)
    if not run.steps:
        return "", "", ""
    stage, records = list(run.steps.items())[-1]
    losses = records[-1].get("loss", {})
    value = losses.get("total", next(iter(losses.values()), None)) if losses else None
    return stage, str(records[-1]["step"]), "" if value is None else f"{value:.4f}"


def error_line(log: Path) -> str:
    """The last line of a log that looks like the error which ended the run."""
    if not log.is_file():
        return ""
    lines = log.read_text(errors="replace").splitlines()
    named = [
        line for line in lines if re.match(r"(\[rank\d+\]: ?)?\w[\w.]*(Error|Exception)\b", line)
    ]
    slurm_lines = [
        line for line in lines if line.startswith(("slurmstepd: error:", "srun: error:"))
    ]
    ours = [line for line in lines[-3:] if line.startswith("moe-ext: ")]  # of the job script
    return (ours or named or slurm_lines or [""])[-1][:200]
