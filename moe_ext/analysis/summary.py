"""A run in numbers: `summary.json` for programs and the table that a terminal shows at the end."""

from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from moe_ext.analysis.run_folder import Run, write_json

SPLITS = {"heldout": "held-out pictures", "heldout_concept": "held-out concepts"}
"""Evaluated splits and what they are called."""


def summarise(run: Run) -> dict[str, Any]:
    """The run's result as plain JSON; a part that was not evaluated is absent.

    `training_minutes` adds every stage's minutes, from upcycling to evaluation, without downloads and
    installation. `retrieval_at_1` and `_5` are image -> caption, length-fair (`evaluate.py`); `nll_*`
    are nats a caption. Memory is the peak of each rank's process over all stages. A stage's
    `tensor_bytes` are those of every rank's tensors by kind, activations apart, between its first backward and
    step; `tensor_bytes_formula` is e * frozen + (2 e + 12/dp) * trained (`training/held.py`).
    """
    summary: dict[str, Any] = {
        "name": run.name,
        "training_minutes": round(sum(stage.get("minutes", 0.0) for stage in run.stages), 3),
    }
    for split in SPLITS:
        if result := run.evaluation.get(split):
            summary[split] = _heldout(result)
    before, after, joint = (
        run.evaluation.get(f"text_{which}") for which in ("before", "after", "joint")
    )
    if before or after:
        summary["text"] = text = {}
        for which, result in (("before", before), ("after", after), ("joint", joint)):
            if result:
                text[f"nll_{which}"] = result["nll"]
                text[f"logits_sha256_{which}"] = result["logits_sha256"]
        if before and after:
            text["unchanged"] = before["logits_sha256"] == after["logits_sha256"]
    fields = (
        "kind",
        "steps",
        "minutes",
        "tokens_per_s",
        "trainable_parameters",
        "total_parameters",
        "tensor_bytes",
        "tensor_bytes_formula",
    )
    summary["stages"] = {
        stage["stage"]: {name: stage[name] for name in fields if stage.get(name) is not None}
        for stage in run.stages
    }
    summary["memory"] = {"peak_bytes_a_rank": peak_memory(run)}
    return summary


def _heldout(result: dict[str, Any]) -> dict[str, Any]:
    """The flat keys of one evaluated split."""
    forth, back = result["image_to_caption"], result["caption_to_image"]
    flat = {
        "candidates": result["candidates"],
        "score": result["score"],
        "retrieval_at_1": forth["at_1"],
        "retrieval_at_1_error": forth["at_1_error"],
        "retrieval_at_5": forth["at_5"],
        "retrieval_at_5_error": forth["at_5_error"],
        "caption_to_image_at_1": back["at_1"],
        "caption_to_image_at_5": back["at_5"],
        "nll_right": result["nll_right"],
        "nll_wrong": result["nll_wrong"],
    }
    for name in ("exact_captions", "captions_written"):
        if name in result:
            flat[name] = result[name]
    if neighbour := result.get("nearest_neighbour"):
        flat["nearest_neighbour_at_1"] = neighbour["at_1"]
        flat["nearest_neighbour_at_5"] = neighbour["at_5"]
    return flat


def peak_memory(run: Run) -> list[int]:
    """Bytes: each rank's highest peak over the stages."""
    peaks = [stage["peak_memory_bytes"] for stage in run.stages if stage.get("peak_memory_bytes")]
    ranks = max((len(peak) for peak in peaks), default=0)
    return [max(peak[rank] for peak in peaks if rank < len(peak)) for rank in range(ranks)]


def write_summary(run: Run) -> Path:
    path = run.folder / "summary.json"
    write_json(path, summarise(run))
    return path


def print_summary(run: Run, console: Console | None = None) -> None:
    """The run's tables in the terminal: held-out captions, text, stages."""
    if console is None:
        console = Console()
        if not console.is_terminal:
            console = Console(width=110)  # a log file has no width; the default would break lines
    console.print(Group(*tables(run)))


def tables(run: Run) -> list[Table | Text]:
    summary = summarise(run)
    parts: list[Table | Text] = []
    if any(split in summary for split in SPLITS):
        parts.append(_captions_table(summary))
    if text := summary.get("text"):
        parts.append(_text_table(text))
    stages = Table(title="stages", title_justify="left", title_style="bold")
    for name in STAGE_COLUMNS:
        stages.add_column(name, justify="left" if name == "stage" else "right")
    for stage in run.stages:
        stages.add_row(*stage_cells(stage))
    stages.add_section()
    stages.add_row(
        "together", "", f"{summary['training_minutes']:.1f}", "", gib(peak_memory(run)), "", ""
    )
    return [*parts, stages]


def _captions_table(summary: dict[str, Any]) -> Table:
    table = Table(title="held-out captions", title_justify="left", title_style="bold")
    table.add_column("")
    splits = [split for split in SPLITS if split in summary]
    for split in splits:
        table.add_column(SPLITS[split], justify="right")
    table.add_column("chance", justify="right")
    count = summary[splits[0]]["candidates"]
    for k in (1, 5):
        cells = [
            f"{100 * summary[s][f'retrieval_at_{k}']:.1f} ± {100 * summary[s][f'retrieval_at_{k}_error']:.1f} %"
            for s in splits
        ]
        table.add_row(
            f"retrieval@{k} of {count}, image -> caption",
            *cells,
            f"{100 * min(1.0, k / count):.1f} %",
        )
        cells = [f"{100 * summary[s][f'caption_to_image_at_{k}']:.1f} %" for s in splits]
        table.add_row(
            f"retrieval@{k} of {count}, caption -> image",
            *cells,
            f"{100 * min(1.0, k / count):.1f} %",
        )
    if all("nearest_neighbour_at_1" in summary[s] for s in splits):
        cells = [f"{100 * summary[s]['nearest_neighbour_at_1']:.1f} %" for s in splits]
        table.add_row("  nearest-neighbour look-up, @1", *cells, f"{100 / count:.1f} %")
    table.add_row(
        "nats a caption, right image", *(f"{summary[s]['nll_right']:.2f}" for s in splits), ""
    )
    table.add_row(
        "nats a caption, wrong image", *(f"{summary[s]['nll_wrong']:.2f}" for s in splits), ""
    )
    if all("exact_captions" in summary[s] for s in splits):
        cells = [
            f"{summary[s]['exact_captions']} of {summary[s]['captions_written']}" for s in splits
        ]
        table.add_row("captions written exactly", *cells, "")
    return table


def _text_table(text: dict[str, Any]) -> Table:
    table = Table(title="held-out text", title_justify="left", title_style="bold")
    table.add_column("")
    table.add_column("nats a token", justify="right")
    table.add_column("SHA-256 of the logits")
    names = {"before": "base", "after": "trained", "joint": "trained, new experts open to text"}
    for which, name in names.items():
        if f"nll_{which}" in text:
            table.add_row(name, f"{text[f'nll_{which}']:.5f}", text[f"logits_sha256_{which}"][:16])
    if "unchanged" in text:
        verdict = "bit for bit the base" if text["unchanged"] else "CHANGED"
        table.add_row("text-only logits after training", "", verdict)
    return table


STAGE_COLUMNS = (
    "stage",
    "steps",
    "minutes",
    "tokens/s",
    "peak memory a rank",
    "tensors a rank (formula)",
    "trainable parameters",
)
"""Heads of the cells of `stage_cells`."""


def stage_cells(stage: dict[str, Any]) -> list[str]:
    """Name, steps, minutes, tokens/s, memory, tensors, trainable parameters of a stage, as text."""
    trainable, total = stage.get("trainable_parameters"), stage.get("total_parameters")
    share = f" ({100 * trainable / total:.2g} %)" if trainable and total else ""
    return [
        stage["stage"],
        str(stage.get("steps") or ""),
        f"{stage.get('minutes', 0.0):.1f}",
        f"{stage['tokens_per_s']:,.0f}" if stage.get("tokens_per_s") else "",
        gib(stage.get("peak_memory_bytes") or []),
        _tensors(stage),
        f"{trainable:,}{share}" if trainable else "",
    ]


def _tensors(stage: dict[str, Any]) -> str:
    """Measured bytes of the rank that holds most, and the formula's."""
    ranks = [sum(kinds.values()) for kinds in stage.get("tensor_bytes") or []]
    if not ranks:
        return ""
    most = ranks.index(max(ranks))
    return f"{gib(ranks)} ({gib([stage['tensor_bytes_formula'][most]])})"


def gib(memory_bytes: list[int]) -> str:
    """Bytes a rank as one figure in GiB, the highest rank's."""
    return f"{max(memory_bytes) / 2**30:.2f} GiB" if memory_bytes else ""
