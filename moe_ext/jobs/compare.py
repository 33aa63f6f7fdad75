"""`moe-ext compare RUN...`: mean and spread over runs that differ only in their seed, as Markdown."""

import argparse
import json
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

COLUMNS = {
    "retrieval@1": ("heldout", "retrieval_at_1"),
    "retrieval@5": ("heldout", "retrieval_at_5"),
    "image for caption @1": ("heldout", "caption_to_image_at_1"),
    "concepts @1": ("heldout_concept", "retrieval_at_1"),
    "look-up @1": ("heldout", "nearest_neighbour_at_1"),
    "nats, right image": ("heldout", "nll_right"),
    "nats, wrong image": ("heldout", "nll_wrong"),
    "exact captions": ("heldout", "exact_captions"),
    "text, nats before": ("text", "nll_before"),
    "text, nats after": ("text", "nll_after"),
    "minutes": ("training_minutes",),
}
"""Column -> path of keys in summary.json."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="moe-ext compare",
        description="Mean ± standard deviation of finished runs; runs whose names differ only in a "
        "number at the end (demo-0, demo-1) are one row.",
    )
    parser.add_argument("runs", type=Path, nargs="+", help="run folders with a summary.json")
    options = parser.parse_args(argv)
    missing = [str(run) for run in options.runs if not (run / "summary.json").is_file()]
    if missing:
        print(f"no summary.json in {', '.join(missing)}: these runs are not finished")
        return 1
    print(table(options.runs))
    return 0


def table(runs: Sequence[Path]) -> str:
    """Markdown: a row a group of runs, a column a number that any of them has."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        summary = json.loads((run / "summary.json").read_text())
        groups.setdefault(re.sub(r"-\d+$", "", run.name), []).append(summary)
    columns = [
        name
        for name, path in COLUMNS.items()
        if any(value(summary, path) is not None for group in groups.values() for summary in group)
    ]
    lines = [f"| run | seeds | {' | '.join(columns)} |", "|---" * (len(columns) + 2) + "|"]
    for name, summaries in groups.items():
        cells = [
            mean_and_spread([value(s, COLUMNS[column]) for s in summaries]) for column in columns
        ]
        lines.append(f"| {name} | {len(summaries)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def value(summary: dict[str, Any], path: Sequence[str]) -> float | None:
    found: Any = summary
    for key in path:
        found = found.get(key) if isinstance(found, dict) else None
    return found


def mean_and_spread(values: Sequence[float | None]) -> str:
    """`0.72 ± 0.02` (sample standard deviation), without ± for one value, empty for none."""
    known = [v for v in values if v is not None]
    if not known:
        return ""
    mean = f"{statistics.fmean(known):.3g}"
    return f"{mean} ± {statistics.stdev(known):.2g}" if len(known) > 1 else mean
