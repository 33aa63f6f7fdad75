"""`moe-ext jobs`: how the runs stand, from their own files and from Slurm's queue."""

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from moe_ext.analysis.run_folder import load_run
from moe_ext.jobs import slurm
from moe_ext.training.ownership import read_status


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
    parser = argparse.ArgumentParser(
        prog="moe-ext jobs",
        description="State, last step, loss and error line of the runs at or below a folder.",
    )
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs"))
    options = parser.parse_args(argv)
    rows = collect(options.folder)
    if not rows:
        print(f"no runs at or below {options.folder}")
        return 1
    table = Table(*Row.__dataclass_fields__)
    for row in rows:
        table.add_row(*vars(row).values())
    Console().print(table)
    return 0


def collect(folder: Path) -> list[Row]:
    """A row for every submitted run and for every run folder, in order of name."""
    rows: dict[Path, Row] = {}
    for path in slurm.submissions(folder):
        submission = slurm.read_submission(path)
        job = submission["jobs"][-1]
        known = {
            task: state for each in submission["jobs"] for task, state in slurm.states(each).items()
        }
        for index, task in enumerate(submission["tasks"]):
            run_dir = Path(task["run_dir"])
            name = f"{job}_{index}" if len(submission["tasks"]) > 1 else job
            log = Path(submission["log"].format(task=index))
            rows[run_dir] = _row(run_dir, name, known.get(name, ""), log)
    for path in folder.glob("**/metrics.jsonl"):
        rows.setdefault(path.parent, _row(path.parent, "", "", None))
    return [rows[run_dir] for run_dir in sorted(rows)]


def _row(run_dir: Path, job: str, slurm_state: str, log: Path | None) -> Row:
    status = read_status(run_dir)
    stage, step, loss = last_step(run_dir)
    error = status.error if status is not None and status.state == "failed" else ""
    if not error and (status is None or "FAIL" in slurm_state) and log is not None:
        error = error_line(log)
    state = status.state if status is not None else ""
    return Row(run_dir.name, job, slurm_state, state, stage, step, loss, error)


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
    return (named or slurm_lines or [""])[-1][:200]
