"""The report and the summary from a synthetic run folder."""

import json
import re
from html.parser import HTMLParser

import pytest
from rich.console import Console

from moe_ext.analysis import charts
from moe_ext.analysis.report import write_report
from moe_ext.analysis.run_folder import load_run, record_evaluation, write_json
from moe_ext.analysis.summary import print_summary, summarise
from tests.analysis.synthetic import CHOSEN, LAYERS, write_run

VOID = {"meta", "img", "link", "br", "input", "hr"}


class Reader(HTMLParser):
    """Text, tags, and addresses of a page; raises where tags do not nest."""

    def __init__(self):
        super().__init__()
        self.open, self.text, self.tags, self.addresses = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.addresses += [value for name, value in attrs if name in ("src", "href", "srcset")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def read(html: str) -> Reader:
    reader = Reader()
    reader.feed(html)
    reader.close()
    assert reader.open == []
    return reader


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run") / "demo")


def test_page_is_whole_and_needs_no_other_file(folder):
    html = write_report(folder).read_text(encoding="utf-8")
    reader = read(html)
    assert reader.addresses
    assert all(address.startswith("data:image/png;base64,") for address in reader.addresses)
    assert not re.search(r"url\(|@import|<script|https?://", html)
    headings = [text for text in reader.text if text in html.split("<main>")[1]]
    for title in ("Held-out captions", "What it writes", "Text is untouched", "Training",
                  "Which layers the probe chose", "Who does the work", "Stages"):  # fmt: skip
        assert title in headings
    assert sum(tag == "figure" for tag, _ in reader.tags) == 16
    assert json.loads((folder / "summary.json").read_text())["name"] == "demo"


def test_chosen_layers_are_marked(folder):
    html = write_report(folder).read_text(encoding="utf-8")
    chart = html.split("Which layers the probe chose")[1].split("</svg>")[0]
    bars = re.findall(r"fill:var\(--(\w+)\)\"><title>(\d+):", chart)
    assert bars == [("new" if layer in CHOSEN else "frozen", str(layer)) for layer in LAYERS]


def test_captions_are_escaped(tmp_path):
    folder = write_run(tmp_path / "run")
    shot = {"key": "a", "truth": "<b>x</b>", "written": "<script>1</script>", "exact": False,
            "rank": 2, "image": ""}  # fmt: skip
    record_evaluation(folder, gallery=[shot])
    html = write_report(folder).read_text(encoding="utf-8")
    assert "<script>" not in html
    assert "&lt;script&gt;1&lt;/script&gt;" in html


def test_summary_holds_the_documented_keys(folder):
    run = load_run(folder)
    summary = summarise(run)
    evaluation = run.evaluation
    assert summary["training_minutes"] == pytest.approx(0.8 + 2.1 + 0.9 + 0.1 + 4.6 + 1.2)
    for split in ("heldout", "heldout_concept"):
        held, full = summary[split], evaluation[split]
        assert held["retrieval_at_1"] == full["image_to_caption"]["at_1"]
        assert held["retrieval_at_5"] == full["image_to_caption"]["at_5"]
        assert (held["nll_right"], held["nll_wrong"]) == (6.7, 21.9)
    text = summary["text"]
    assert text["nll_before"] == text["nll_after"] == 3.10421
    assert text["logits_sha256_before"] == text["logits_sha256_after"] == "5f3a9c17" * 8
    assert text["unchanged"] is True
    assert list(summary["stages"]) == ["upcycle", "align", "probe", "extend", "tune", "evaluate"]
    assert summary["memory"]["peak_bytes_a_rank"] == [int(2.1 * 2**30), int(2.0 * 2**30)]


def test_changed_text_is_said_loudly(tmp_path):
    folder = write_run(tmp_path / "run")
    record_evaluation(folder, text_after={"nll": 3.2, "tokens": 8, "logits_sha256": "00" * 32})
    html = write_report(folder).read_text(encoding="utf-8")
    assert "Text is untouched" not in html
    assert "unchanged" not in html
    assert "badge bad" in html
    assert json.loads((folder / "summary.json").read_text())["text"]["unchanged"] is False


def test_learned_is_said_only_of_what_chance_does_not_give(tmp_path):
    folder = write_run(tmp_path / "run")
    held = json.loads((folder / "evaluation.json").read_text())["heldout"]
    for at_1, verb in ((held["image_to_caption"]["at_1"], "learned"), (2 / 60, "learns")):
        scores = held["image_to_caption"] | {"at_1": at_1, "at_1_error": 0.02}
        record_evaluation(folder, heldout=held | {"image_to_caption": scores})
        html = write_report(folder).read_text(encoding="utf-8")
        assert f"A pretrained mixture of experts {verb} to see" in html


def test_unfinished_run_has_a_report(tmp_path):
    write_json(tmp_path / "config.json", {"name": "young"})
    lines = [
        {"stage": "align", "step": 1, "loss": {"nll": 3.0}},
        {"stage": "align", "step": 2, "loss": {}},
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    reader = read(write_report(tmp_path).read_text(encoding="utf-8"))
    assert "Training" in reader.text
    assert "Stages" not in reader.text
    print_summary(load_run(tmp_path), Console(file=open("/dev/null", "w")))
    with pytest.raises(ValueError, match="run_dir=.*metrics.jsonl"):
        load_run(tmp_path / "nowhere")


def test_later_lines_win_and_half_a_line_is_skipped(tmp_path):
    lines = [
        {"stage": "tune", "step": 1, "loss": {"nll": 5.0}},
        {"stage": "tune", "step": 2, "loss": {"nll": 4.0}},
        {"stage": "tune", "step": 2, "loss": {"nll": 3.5}},  # resumed
        {"event": "stage", "stage": "tune", "minutes": 1.0},
        {"event": "stage", "stage": "tune", "minutes": 2.0},
        {"event": "stage", "stage": "evaluate", "minutes": 0.5},
        {"event": "stage", "stage": "prepare", "kind": "prepare", "minutes": 1.0},
        {"event": "stage", "stage": "prepare", "kind": "prepare", "minutes": 0.25},
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"stage": "tu')
    run = load_run(tmp_path)
    assert [record["loss"]["nll"] for record in run.steps["tune"]] == [5.0, 3.5]
    assert summarise(run)["training_minutes"] == 3.75


def test_terminal_table_fits_and_tells(folder, tmp_path):
    with open(tmp_path / "out.txt", "w", encoding="utf-8") as file:
        print_summary(load_run(folder), Console(file=file, width=110))
    text = (tmp_path / "out.txt").read_text(encoding="utf-8")
    for part in (
        "bit for bit the base",
        "16,161,889 (7 %)",
        "1.7 %",
        "21.90",
        "396",
        "2.10 GiB",
        "9.7",
    ):
        assert part in text


def test_ticks_are_round_and_inside():
    assert charts.ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert charts.ticks(13, 248, 5) == [50, 100, 150, 200]
    assert charts.ticks(2.0, 2.0) == [2.0]


def test_smooth_keeps_a_constant_and_lags_a_step():
    assert charts.smooth([3.0] * 5, 0.9) == pytest.approx([3.0] * 5)
    assert charts.smooth([1.0, 2.0], 0.0) == [1.0, 2.0]
    first, second = charts.smooth([0.0, 1.0], 0.5)
    assert (first, second) == pytest.approx((0.0, 0.5 / 0.75))


def test_row_chart_draws_bars_to_scale():
    svg = charts.row_chart([charts.Bar("a", 0.25), charts.Bar("b", 0.5)])
    widths = [float(w) for w in re.findall(r'width="([\d.]+)" height="21" rx="4" style', svg)]
    assert widths[1] == pytest.approx(2 * widths[0], abs=0.2)


def test_heatmap_opacity_follows_share_and_marks_new_experts():
    svg = charts.heatmap([[0.5, 0.25, 0.25], [0.6, 0.4]], ["3", "7"], [2, 2])
    cells = re.findall(r"var\(--(\w+)\);fill-opacity:([\d.]+)", svg)
    assert [kind for kind, _ in cells] == ["frozen", "frozen", "new", "frozen", "frozen"]
    opacity = [float(value) for _, value in cells]
    assert opacity[3] == 1.0
    assert opacity[0] > opacity[4] > opacity[1] == opacity[2]
