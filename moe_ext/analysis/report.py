"""`report.html`: a run on one page, made from the files of its folder alone, needing no other file."""

from html import escape
from pathlib import Path
from typing import Any

from moe_ext.analysis import charts, page
from moe_ext.analysis.page import NEW, QUIET, percent
from moe_ext.analysis.report_training import experts, probe, stages, training
from moe_ext.analysis.run_folder import Run, load_run
from moe_ext.analysis.summary import SPLITS, peak_memory, summarise, write_summary


def write_report(folder: Path | str) -> Path:
    """Writes report.html and summary.json into the run folder; the path of the report."""
    run = load_run(folder)
    write_summary(run)
    path = run.folder / "report.html"
    path.write_text(report(run), encoding="utf-8")
    return path


def report(run: Run) -> str:
    """The page as HTML. Sections whose files are missing are left out."""
    summary = summarise(run)
    sections = (
        _header(run, summary),
        _captions(run, summary),
        _gallery(run),
        _text(summary),
        training(run),
        probe(run),
        experts(run),
        stages(run, summary),
        _footer(run),
    )
    return page.page(f"{run.name} · moe_ext", "\n".join(part for part in sections if part))


def _header(run: Run, summary: dict[str, Any]) -> str:
    extension = run.config.get("extension", {}).get("name", "vision")
    chosen = [layer["layer"] for layer in run.probe.get("layers", []) if layer.get("chosen")]
    added = sum(plan["num_new"] for plan in run.probe.get("plans", []))
    facts = "Everything pretrained stayed frozen."
    if chosen:
        facts += (
            f" The probe chose <strong>{len(chosen)} of {len(run.probe['layers'])} sparse layers</strong>,"
            f" and training added <strong>{added} expert{'s' if added != 1 else ''}</strong> there, with their"
            " router rows and a connector for the frozen encoder's features."
        )
    return (
        f'<header><div class="kicker">moe_ext &nbsp;/&nbsp; <b>{escape(run.name)}</b></div>'
        f"<h1>{_headline(extension, summary)}</h1>"
        f'<p class="lead">{facts}</p>{page.grid("cards", _cards(run, summary))}</header>'
    )


def _headline(extension: str, summary: dict[str, Any]) -> str:
    """That it learned is said where held-out retrieval is two standard errors above chance."""
    held = summary.get("heldout")
    gain = held["retrieval_at_1"] - 1 / held["candidates"] if held else 0.0
    verb = "learned" if held and gain > 2 * held["retrieval_at_1_error"] else "learns"
    what = "to see" if extension == "vision" else f"“{escape(extension)}”"
    return f"A pretrained mixture of experts {verb} {what}"


def _cards(run: Run, summary: dict[str, Any]) -> list[str]:
    cards = []
    if held := summary.get("heldout"):
        count = held["candidates"]
        note = f"of {count} held-out captions for an image; chance {percent(1 / count)}"
        cards.append(page.card("retrieval@1", percent(held["retrieval_at_1"]), note, "new"))
        gap = held["nll_wrong"] - held["nll_right"]
        note = f"nats a caption: {held['nll_right']:.1f} with the right image, {held['nll_wrong']:.1f} with a wrong one"
        cards.append(page.card("worth of the image", f"{gap:.1f} <small>nats</small>", note, "new"))
    if (text := summary.get("text")) and "unchanged" in text:
        change = 100 * (text["nll_after"] / text["nll_before"] - 1)
        if text["unchanged"]:
            note = f"{text['nll_after']:.4f} nats a token before and after; logits bit for bit the base’s"
            cards.append(
                page.card("text loss", '<span class="word">unchanged</span>', note, "good")
            )
        else:
            note = f"{text['nll_before']:.4f} → {text['nll_after']:.4f} nats a token"
            cards.append(page.card("text loss", f"{change:+.2f} <small>%</small>", note, "bad"))
    trained = [s for s in run.stages if s.get("trainable_parameters") and s.get("total_parameters")]
    if trained:
        last = trained[-1]
        count, total = last["trainable_parameters"], last["total_parameters"]
        note = f"{percent(count / total)} of {total / 1e6:,.0f} M parameters"
        cards.append(page.card("trained", f"{count / 1e6:.1f} <small>M</small>", note, "frozen"))
    if run.stages:
        memory = peak_memory(run)
        ranks = (
            f", {max(memory) / 2**30:.1f} GiB a rank at most, {len(memory)} ranks" if memory else ""
        )
        minutes = f"{summary['training_minutes']:.1f} <small>min</small>"
        cards.append(page.card("time", minutes, f"all stages together{ranks}", "frozen"))
    return cards


def _captions(run: Run, summary: dict[str, Any]) -> str:
    splits = [split for split in SPLITS if split in summary]
    if not splits:
        return ""
    rows, tones = [], []
    for split in splits:
        flat, full = summary[split], run.evaluation[split]
        for direction, key in (
            ("image → caption", "image_to_caption"),
            ("caption → image", "caption_to_image"),
        ):
            r = full[key]
            rows.append(
                [f"{SPLITS[split]}, {direction}", _with_error(r, "at_1"), _with_error(r, "at_5")]
            )
            tones.append("strong" if key == "image_to_caption" else "")
        if neighbour := full.get("nearest_neighbour"):
            name = (
                f"&emsp;look-up: names of the {neighbour['neighbours']} nearest of"
                f" {neighbour['train_images']:,} training pictures, by the encoder’s features"
            )
            rows.append([name, percent(neighbour["at_1"]), percent(neighbour["at_5"])])
            tones.append("quiet")
        if alone := run.evaluation.get(f"{split}_connector_only"):
            r = alone["image_to_caption"]
            rows.append(
                [
                    "&emsp;connector alone, no new experts",
                    _with_error(r, "at_1"),
                    _with_error(r, "at_5"),
                ]
            )
            tones.append("quiet")
        count = flat["candidates"]
        rows.append(["&emsp;chance", *(percent(min(1.0, k / count)) for k in (1, 5))])
        tones.append("quiet")
    matrix = run.evaluation[splits[0]].get("score_IC")
    figures = [page.stack(_caption_figures(run, summary, splits))]
    if matrix:
        note = (
            f'<p class="note">Row: held-out image. Column: caption. Strong: the model finds the caption likely for'
            f" the image. The diagonal is right. Score: {escape(run.evaluation[splits[0]]['score'])}.</p>"
        )
        figures.insert(
            0,
            page.panel(
                "every image with every caption", charts.matrix_image(matrix, (240, 122, 28)), note
            ),
        )
    lead = (
        f"The model scores {summary[splits[0]]['candidates']} candidate captions for each image (and images for each"
        " caption); none of these pictures was in training, and for “concepts” no skin-tone or gender sibling was either."
    )
    table = page.panel("", page.table(["retrieval", "@1", "@5"], rows, tones))
    return page.section(
        "Held-out captions", lead, page.stack([page.grid("beside", figures), table])
    )


def _caption_figures(run: Run, summary: dict[str, Any], splits: list[str]) -> list[str]:
    """Panels: retrieval beside its references, and nats a caption with right and wrong images."""
    panels = []
    for k in (1, 5):
        bars = []
        for split in splits:
            flat, short = summary[split], SPLITS[split].removeprefix("held-out ")
            error = flat[f"retrieval_at_{k}_error"]
            bars.append(charts.Bar(short, flat[f"retrieval_at_{k}"], error, NEW))
            if f"nearest_neighbour_at_{k}" in flat:
                bars.append(charts.Bar("look-up", flat[f"nearest_neighbour_at_{k}"], 0, QUIET))
            bars.append(charts.Bar("chance", min(1.0, k / flat["candidates"]), 0, QUIET))
        panels.append(page.panel(f"retrieval@{k}, image → caption", charts.row_chart(bars)))
    nats = []
    for split in splits:
        flat, short = summary[split], SPLITS[split].removeprefix("held-out ")
        nats.append(charts.Bar(f"{short}, right image", flat["nll_right"], 0, NEW))
        nats.append(charts.Bar(f"{short}, wrong image", flat["nll_wrong"], 0, QUIET))
    high = max(bar.value for bar in nats)
    return [*panels, page.panel("nats a caption", charts.row_chart(nats, high=high, unit=""))]


def _gallery(run: Run) -> str:
    shots = run.evaluation.get("gallery", [])
    if not shots:
        return ""
    parts = []
    for split in dict.fromkeys(shot.get("split", "") for shot in shots):
        figures = [_shot(shot) for shot in shots if shot.get("split", "") == split]
        title = SPLITS.get(split, split)
        result = run.evaluation.get(split, {})
        if "exact_captions" in result:
            title += f": {result['exact_captions']} of {result['captions_written']} word for word"
        parts.append(f'<h3>{escape(title)}</h3><div class="gallery">{"".join(figures)}</div>')
    lead = (
        "Held-out images. In bold what the model wrote, greedily; below it the true name, and its rank"
        " among all candidates where the written one is not it."
    )
    return page.section("What it writes", lead, page.stack(parts))


def _shot(shot: dict[str, Any]) -> str:
    marks = page.badge("✓ exact", "good") if shot["exact"] else ""
    if not shot["exact"] and shot.get("rank"):
        marks = f'<span class="note">true name ranked {shot["rank"]}</span>'
    return (
        f'<figure class="shot{" exact" if shot["exact"] else ""}">'
        f'<img alt="{escape(shot["truth"])}" src="data:image/png;base64,{shot["image"]}">'
        f'<figcaption><div class="written">{escape(shot["written"]) or "(nothing)"}</div>'
        f'<div class="truth">{escape(shot["truth"])}</div><div class="rank">{marks}</div>'
        "</figcaption></figure>"
    )


def _text(summary: dict[str, Any]) -> str:
    text = summary.get("text")
    if not text or "nll_before" not in text:
        return ""
    base = text["nll_before"]
    names = {
        "before": "base, before training",
        "after": "trained model",
        "joint": "trained model, new experts open to text (<code>extension.scope=joint</code>)",
    }
    rows = []
    for which, name in names.items():
        if f"nll_{which}" not in text:
            continue
        nll, digest = text[f"nll_{which}"], text[f"logits_sha256_{which}"]
        verdict = ""
        if which != "before":
            same = digest == text["logits_sha256_before"]
            wrong = "plain" if which == "joint" else "bad"
            verdict = page.badge("identical", "good") if same else page.badge("differs", wrong)
        rows.append(
            [name, f"{nll:.5f}", f"{nll - base:+.5f}", f"<code>{digest[:24]}…</code> {verdict}"]
        )
    head = ["held-out text", "nats a token", "against the base", "SHA-256 of all logits"]
    lead = (
        "Python’s own documentation, never trained on. A sequence without an image takes the base’s own path, so its"
        " logits are compared by hash, not by eye. The last row opens the new experts to every token instead."
    )
    return page.section(
        "Text is untouched" if text.get("unchanged") else "Text",
        lead,
        page.panel("", page.table(head, rows)),
    )


def _footer(run: Run) -> str:
    notes = [
        "± is the standard error over candidates. Image → caption is length-fair: a caption’s score is"
        " log p(caption | image) − log p(caption), with p(caption) its mean over the candidate images"
        " (Bayes’ rule). Caption → image compares one caption under all images. Ties count as wrong.",
    ]
    if digest := run.probe.get("base_sha256"):
        notes.append(f"Base <code>{escape(digest[:16])}</code>, seed {run.config.get('seed', 0)}.")
    if run.config.get("data", {}).get("builtin") == "openmoji":
        notes.append(
            "Drawings: OpenMoji, the open-source emoji and icon project, licence CC BY-SA 4.0."
        )
    return "<footer>" + "".join(f"<p>{note}</p>" for note in notes) + "</footer>"


def _with_error(result: dict[str, float], key: str) -> str:
    return f"{percent(result[key])} <small>± {100 * result[f'{key}_error']:.1f}</small>"
