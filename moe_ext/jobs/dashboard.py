"""`moe-ext dashboard`: the W&B workspace of this project as code, with the panels that an MoE needs.

The table below is the dashboard; W&B's package only carries it there. Every value that it names is one
that a run logs: `tests/training/test_run_tracking.py` compares the two.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

NAME = "moe_ext"


@dataclass(frozen=True)
class Panel:
    """One chart over the steps: of the named values, or of all that match a pattern."""

    title: str
    keys: tuple[str, ...] = ()
    pattern: str = ""
    log: bool = False


@dataclass(frozen=True)
class Number:
    """One number of the evaluation, compared over runs."""

    title: str
    key: str


@dataclass(frozen=True)
class Rows:
    """A table of the evaluation, with images."""

    key: str


SECTIONS: dict[str, tuple[Panel | Number | Rows, ...]] = {
    "Loss": (
        Panel("Loss of the next token (nats)", ("loss/nll",)),
        Panel("Balance loss (1 is even)", ("loss/balance",)),
        Panel("Router z-loss", ("loss/z",)),
        Panel("Learning rate", ("learning_rate",)),
    ),
    "Experts, image tokens": (
        Panel("Busiest expert's load by layer, image (1 is even)", pattern=r"^image/load/\d+$"),
        Panel("Entropy of the choice by layer, image (1 is even)", pattern=r"^image/entropy/\d+$"),
        Panel("New experts' share by layer, image", pattern=r"^image/new_share/\d+$"),
        Panel("Each new expert's share of its layer", pattern=r"^new_expert_share/\d+/\d+$"),
    ),
    "Experts, text tokens": (
        Panel("Busiest expert's load by layer, text (1 is even)", pattern=r"^text/load/\d+$"),
        Panel("Entropy of the choice by layer, text (1 is even)", pattern=r"^text/entropy/\d+$"),
    ),
    "Drift of the old routing": (
        Panel("KL of the base's routing and today's", ("loss/router_kl",)),
        Panel(
            "New experts' share of text and of image tokens", ("new_share/text", "new_share/image")
        ),
        Panel("New experts' share by layer, text", pattern=r"^text/new_share/\d+$"),
    ),
    "Gradients": (
        Panel("Gradient norm", ("grad_norm",), log=True),
        Panel("Gradient norm by part of what trains", pattern=r"^grad_norm_by_part/", log=True),
        Panel("Skipped steps", ("skipped",)),
    ),
    "Speed": (
        Panel("Tokens a second, all ranks", ("tokens_per_s",)),
        Panel("Seconds a step", ("step_s",)),
        Panel("Share of real tokens in the step's positions", ("real_token_share",)),
        Panel("Seconds of it waiting for data, mean of the ranks", ("data_wait_s",)),
    ),
    "Evaluation": (
        Number("Held-out pictures: image to caption @1", "heldout/image_to_caption/at_1"),
        Number("Held-out pictures: caption to image @1", "heldout/caption_to_image/at_1"),
        Number("Text, nats a token, before", "text_before/nll"),
        Number("Text, nats a token, after", "text_after/nll"),
        Rows("gallery"),
    ),
}


def named_values() -> Iterator[tuple[str, str]]:
    """(`step`, `summary` or `table`; key or pattern) of everything that the panels name."""
    for panels in SECTIONS.values():
        for panel in panels:
            if isinstance(panel, Panel):
                yield from (("step", f"^{key}$") for key in panel.keys)
                if panel.pattern:
                    yield "step", panel.pattern
            elif isinstance(panel, Number):
                yield "summary", f"^{panel.key}$"
            else:
                yield "table", f"^{panel.key}$"


def workspace(entity: str, project: str) -> Any:
    """The workspace, as an object of wandb-workspaces that `.save()` sends.

    Raises:
        ModuleNotFoundError: the extra `dashboards` is not installed; the message says how.
    """
    try:
        import wandb_workspaces.workspaces as ws
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "moe-ext dashboard needs the package wandb-workspaces: pip install 'moe_ext[dashboards]'"
        ) from error
    sections = [
        ws.Section(name=name, panels=[_drawn(panel) for panel in panels], is_open=True)
        for name, panels in SECTIONS.items()
    ]
    runs = ws.RunsetSettings(groupby=[ws.Metric("Group"), ws.Metric("JobType")])
    return ws.Workspace(
        entity=entity,
        project=project,
        name=NAME,
        sections=sections,
        settings=ws.WorkspaceSettings(x_axis="Step"),
        runset_settings=runs,
    )


def _drawn(panel: Panel | Number | Rows) -> Any:
    import wandb_workspaces.reports.v2 as reports

    if isinstance(panel, Number):
        return reports.ScalarChart(title=panel.title, metric=reports.SummaryMetric(panel.key))
    if isinstance(panel, Rows):
        return reports.WeavePanelSummaryTable(table_name=panel.key)
    return reports.LinePlot(
        title=panel.title,
        y=list(panel.keys),
        metric_regex=panel.pattern or None,
        log_y=panel.log or None,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 2 when a package or a login is missing."""
    parser = argparse.ArgumentParser(
        prog="moe-ext dashboard",
        description="The project's W&B workspace: losses, load and entropy of experts by layer and modality, drift "
        "of the old routing, gradients by part, speed, held-out results. Prints its specification as JSON; "
        "--save sends it to W&B and prints its address.",
    )
    parser.add_argument("--entity", default="", help="team or user; needed by --save")
    parser.add_argument("--project", default="moe_ext", help="tracking.wandb_project of the runs")
    parser.add_argument("--save", action="store_true", help="create it on the server")
    options = parser.parse_args(argv)
    try:
        made = workspace(options.entity, options.project)
        if not options.save:
            print(made._to_model().model_dump_json(indent=1, by_alias=True))
            return 0
        if not options.entity:
            raise ValueError("--save needs --entity, the team or user whose project it is")
        print(made.save().url)
    except Exception as error:
        print(f"moe-ext dashboard: {error}", file=sys.stderr)
        return 2
    return 0
