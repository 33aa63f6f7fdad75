"""The parts of the report that tell how the run went: losses, the probe's choice, experts, stages."""

from html import escape
from typing import Any

from moe_ext.analysis import charts, page
from moe_ext.analysis.page import FROZEN, NEW, QUIET, percent
from moe_ext.analysis.run_folder import Run
from moe_ext.analysis.summary import STAGE_COLUMNS, peak_memory, stage_cells

LOSSES = {
    "nll": "loss a target token",
    "balance": "balance loss",
    "z": "router z-loss",
    "router_kl": "divergence from the base's routing",
}
"""Names in the metrics and on the page; others appear under their own."""


def training(run: Run) -> str:
    """Curves of every stage that has steps."""
    losses: list[tuple[str, list[charts.Line]]] = []
    others: list[tuple[str, list[charts.Line]]] = []
    for stage, records in run.steps.items():
        names = dict.fromkeys(name for record in records for name in record.get("loss", {}))
        for name in names:
            line = _curve(records, "loss", name, NEW if name == "nll" else QUIET)
            if any(line.y):
                group = losses if name == "nll" else others
                group.append((f"{stage}: {LOSSES.get(name, name)}", [line]))
        shares = [
            _curve(records, "new_share", name, color)
            for name, color in (("image", NEW), ("text", FROZEN))
        ]
        if any(line.x for line in shares):
            others.append((f"{stage}: share of selections by new experts", shares))
    if not losses + others:
        return ""
    lead = (
        "Loss in nats a target token. A balance loss of 1 is an even load. Faint: each step. Bold:"
        " moving average."
    )
    rows = [_charts(group) for group in (losses, others) if group]
    return page.section("Training", lead, page.stack(rows))


def _charts(group: list[tuple[str, list[charts.Line]]]) -> str:
    """A grid of as many columns as leave no gap."""
    kind, width = ("two", 550) if len(group) in (2, 4) else ("three", 360)
    panels = []
    for title, lines in group:
        named = [(line.color, f"{line.name} tokens") for line in lines] if len(lines) > 1 else []
        chart = charts.line_chart(lines, "step", width, 196 if named else 220)
        panels.append(page.panel(title, *([page.legend(named)] if named else []), chart))
    return page.grid(kind, panels)


def _curve(records: list[dict[str, Any]], group: str, name: str, color: str) -> charts.Line:
    points = [(r["step"], r[group][name]) for r in records if name in (r.get(group) or {})]
    return charts.Line(name, [x for x, _ in points], [y for _, y in points], color)


def probe(run: Run) -> str:
    layers = run.probe.get("layers", [])
    if not layers:
        return ""
    plans = {plan["layer"]: plan for plan in run.probe.get("plans", [])}
    bars = [
        charts.Bar(str(layer["layer"]), layer["shift"], 0, NEW if layer["chosen"] else FROZEN,
                   "chosen" if layer["chosen"] else "")
        for layer in layers
    ]  # fmt: skip
    rows = []
    for layer in layers:
        if (plan := plans.get(layer["layer"])) is None:
            continue
        step0 = plan.get("step0", {})
        rows.append([
            f"layer {layer['layer']}", f"{layer['shift']:.4f}",
            ", ".join(str(e) for e in plan["sources"]), str(layer["source_before"]),
            ", ".join(f"{b:+.3f}" for b in plan["bias"]),
            *(percent(step0[name]) if name in step0 else "" for name in ("affected_share", "evicted_share", "new_share")),
        ])  # fmt: skip
    head = ["chosen layer", "shift", "source expert", "most selected before", "row bias",
            "tokens affected at step&nbsp;0", "another expert evicted", "selections by new experts"]  # fmt: skip
    lead = (
        f"Only router differences were trained, then discarded. Shift: standard deviation over experts of the change in"
        f" selection share on {run.probe.get('samples', 0):,} held-out samples’ image tokens. The top"
        f" {percent(run.probe.get('layer_share', 0.5), 0)} of the sparse layers get new experts, each a clone of the"
        " expert most selected after the router’s training."
    )
    marks = page.legend([(NEW, "chosen"), (FROZEN, "left as it is")])
    chart = page.panel("", marks, charts.column_chart(bars, "decoder layer"))
    parts = [chart, page.panel("", page.table(head, rows), _step0(run))] if rows else [chart]
    return page.section("Which layers the probe chose", lead, page.stack(parts))


def _step0(run: Run) -> str:
    """What the extended model really did before its first step."""
    measured = run.evaluation.get("experts", {}).get("step0", {})
    shares = measured.get("affected_share", {}), measured.get("new_share", {})
    told = [
        f"{percent(affected)} of {kind} affected, {percent(shares[1][kind])} of their selections new"
        for kind, affected in shares[0].items()
    ]
    if not told:
        return ""
    return f'<p class="note">Measured in the extended layers before the first step: {"; ".join(told)}.</p>'


def experts(run: Run) -> str:
    trained = run.evaluation.get("experts", {}).get("trained")
    if not trained or not trained["layers"]:
        return ""
    layers = trained["layers"]
    panels = []
    for group in dict.fromkeys(name for layer in layers for name in layer["count"]):
        shares = []
        for layer in layers:
            count = layer["count"].get(group, [])
            shares.append([c / (sum(count) or 1) for c in count])
        names = [str(layer["layer"]) for layer in layers]
        heat = charts.heatmap(shares, names, [layer["num_frozen"] for layer in layers])
        panels.append(page.panel(group, heat))
    lead = (
        "Percent of a layer’s selections that each expert gets, after training. Rows are decoder layers, columns"
        " experts; new experts stand last."
    )
    marks = page.legend([(FROZEN, "pretrained, frozen"), (NEW, "new")])
    return page.section("Who does the work", lead, marks, page.grid("three", panels))


def stages(run: Run, summary: dict[str, Any]) -> str:
    if not run.stages:
        return ""
    rows = [[f"<b>{escape(cells[0])}</b>", *cells[1:]] for cells in map(stage_cells, run.stages)]
    memory = peak_memory(run)
    gib = f"{max(memory) / 2**30:.2f} GiB" if memory else ""
    rows.append(["together", "", f"{summary['training_minutes']:.1f}", "", gib, "", ""])
    lead = "Each stage builds a fresh engine and publishes its own checkpoint; the chain resumes where it stopped."
    tones = [""] * len(run.stages) + ["strong"]
    return page.section("Stages", lead, page.panel("", page.table(STAGE_COLUMNS, rows, tones)))
