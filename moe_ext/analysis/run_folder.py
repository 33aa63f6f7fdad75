"""The files of a run folder that analysis reads and writes, and nothing else about a run.

config.json      the resolved configuration: `TrainConfig` as plain JSON
metrics.jsonl    one JSON object a line, written by rank 0; `event` says what it is (absent: "step")
    step         {"stage", "step", "global_step", "time_s", "step_s", "loss": {name: nats}, "grad_norm",
                  "grad_norm_by_part", "learning_rate", "tokens_per_s", "data_wait_s",
                  "real_token_share" of the step's positions, "truncated_samples" since this start,
                  "skipped"} and what `training/loop.py` says of the experts; after a resume a step may
                  appear twice, the later line counts
    alert        {"rule", "text"}: see `training/alerts.py`
    stage        one a finished stage, work outside of training (upcycle, evaluate) included:
                  {"stage", "kind", "steps", "minutes", "tokens_per_s", "trainable_parameters",
                  "total_parameters", "peak_memory_bytes": [one a rank]}; the last line of a stage
                  counts, but the minutes of preparation (kind "prepare") add up over starts
    probe.json       the probe's manifest (`probe.py` has its schema)
evaluation.json  parts, each written when it is known (`record_evaluation`):
    text_before, text_after, text_joint   `evaluate.TextResult`: base, trained model, and the trained
                  model with its new experts open to every token
    heldout, heldout_concept              `evaluate.RetrievalResult`
    experts       {"step0" | "trained": selections of the extended model (`probe.Selections.to_json`)}
    gallery       [{"key", "split", "truth", "written", "exact", "rank", "image": base64 PNG}]
summary.json, report.html                 written here
"""

import json
import os
import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

METRICS_FILE = "metrics.jsonl"


@dataclass
class Run:
    """What the run folder says. Files that are not there yet leave their field empty."""

    folder: Path
    config: dict[str, Any] = field(default_factory=dict)
    steps: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """Stage name -> its step records in order of step."""
    stages: list[dict[str, Any]] = field(default_factory=list)
    """One record a finished stage, in the order in which they first finished."""
    probe: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return str(self.config.get("name") or self.folder.resolve().name)


def load_run(folder: Path | str) -> Run:
    """The run of a folder; a missing file is no error, a folder without metrics is.

    Raises:
        ValueError: the folder holds no metrics.jsonl.
    """
    folder = Path(folder)
    metrics = folder / METRICS_FILE
    if not metrics.is_file():
        raise ValueError(
            f"run_dir={folder} holds no metrics.jsonl, so there is no run to report; "
            "train one first (`moe-ext train`), or name its folder"
        )
    steps: dict[str, dict[int, dict[str, Any]]] = {}
    stages: dict[str, dict[str, Any]] = {}
    for record in _read_lines(metrics):
        event = record.get("event", "step")
        if event == "step" and "stage" in record and "step" in record:
            steps.setdefault(record["stage"], {})[int(record["step"])] = record
        elif event == "stage":
            if record.get("kind") == "prepare" and (earlier := stages.get(record["stage"])):
                record["minutes"] += earlier["minutes"]
            stages[record["stage"]] = record
    return Run(
        folder=folder,
        config=_read_json(folder / "config.json"),
        steps={stage: [by_step[s] for s in sorted(by_step)] for stage, by_step in steps.items()},
        stages=list(stages.values()),
        probe=_read_json(folder / "probe.json"),
        evaluation=_read_json(folder / "evaluation.json"),
    )


def record_evaluation(folder: Path | str, **parts: Any) -> None:
    """Adds or replaces parts of evaluation.json, atomically. Rank 0 alone calls it."""
    path = Path(folder) / "evaluation.json"
    write_json(path, _read_json(path) | parts)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON beside `path` and renames it there, so that a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # ranks that fail together write at once, on any host: each has a draft of its own
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}.draft")
    with open(draft, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _read_lines(path: Path) -> list[dict[str, Any]]:
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue  # a killed run may leave half a line; the resumed run wrote that step again
        if isinstance(record, dict):
            records.append(record)
    return records
