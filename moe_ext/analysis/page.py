"""The look of the report: one style sheet and the few HTML pieces it is built from."""

from collections.abc import Sequence
from html import escape

FROZEN, NEW, QUIET = "var(--frozen)", "var(--new)", "var(--soft)"
"""Colours: of everything pretrained, of everything training added, of references."""

STYLE = """
:root { color-scheme: light dark;
  --page:#f6f7fb; --panel:#ffffff; --ink:#151a2d; --soft:#5b6480; --line:#e3e6f0; --track:#eef0f7;
  --frozen:#3a6ff0; --new:#f07a1c; --good:#12915a; --bad:#d2344c; --good-bg:#e3f6ec; --bad-bg:#fdebee;
  --shadow:0 1px 3px rgba(20,26,50,.07); }
@media (prefers-color-scheme: dark) { :root {
  --page:#0d1120; --panel:#151b2e; --ink:#eaeefb; --soft:#97a1bf; --line:#262e47; --track:#1e2540;
  --frozen:#6f9bff; --new:#ff9a4a; --good:#4bd493; --bad:#ff7c8d; --good-bg:#12352a; --bad-bg:#3f1b26;
  --shadow:none; } }
* { box-sizing:border-box; }
body { margin:0; background:var(--page); color:var(--ink); -webkit-font-smoothing:antialiased;
  font:15px/1.55 Inter,ui-sans-serif,system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif; }
main { max-width:1120px; margin:0 auto; padding:0 24px 72px; }
header { padding:56px 0 12px; }
h1 { font-size:38px; line-height:1.15; letter-spacing:-.025em; margin:8px 0 10px; font-weight:720; max-width:22em; }
.kicker { color:var(--soft); font-weight:600; letter-spacing:.02em; }
.kicker b { color:var(--new); }
.lead { color:var(--soft); font-size:17px; max-width:46em; margin:0; }
.lead strong { color:var(--ink); font-weight:600; }
h2 { font-size:22px; letter-spacing:-.015em; margin:52px 0 4px; font-weight:680; }
h3 { font-size:14px; margin:0 0 10px; font-weight:640; }
h2 + p { color:var(--soft); margin:0 0 18px; max-width:52em; }
.grid { display:grid; gap:16px; }
.cards { grid-template-columns:repeat(auto-fit,minmax(196px,1fr)); margin:30px 0 0; }
.two { grid-template-columns:repeat(auto-fit,minmax(min(440px,100%),1fr)); }
.three { grid-template-columns:repeat(auto-fill,minmax(min(300px,100%),1fr)); }
.beside { grid-template-columns:repeat(auto-fit,minmax(min(360px,100%),1fr)); }
.stack { display:grid; gap:16px; align-content:start; grid-template-columns:minmax(0,1fr); }
.panel { background:var(--panel); border:1px solid var(--line); border-radius:14px; padding:20px;
  box-shadow:var(--shadow); min-width:0; }
.panel > p:last-child { margin-bottom:0; }
.card .name { color:var(--soft); font-size:13px; font-weight:560; }
.card .figure { font-size:33px; font-weight:720; letter-spacing:-.03em; line-height:1.25; white-space:nowrap; }
.card .figure small { font-size:16px; font-weight:560; letter-spacing:0; color:var(--soft); }
.card .word { font-size:27px; line-height:41px; display:inline-block; }
.card .note { color:var(--soft); font-size:13px; line-height:1.4; }
.card.good { border-top:3px solid var(--good); } .card.bad { border-top:3px solid var(--bad); }
.card.new { border-top:3px solid var(--new); } .card.frozen { border-top:3px solid var(--frozen); }
.scroll { overflow-x:auto; }
table { border-collapse:collapse; width:100%; font-variant-numeric:tabular-nums; }
th { text-align:right; color:var(--soft); font-weight:580; font-size:13px; padding:6px 12px; border-bottom:1px solid var(--line); }
td { text-align:right; padding:9px 12px; border-bottom:1px solid var(--line); white-space:nowrap; }
th:first-child, td:first-child { text-align:left; padding-left:2px; white-space:normal; }
th:last-child, td:last-child { padding-right:2px; }
tr:last-child td { border-bottom:0; } tr.strong td { font-weight:640; } tr.quiet td { color:var(--soft); }
td small { color:var(--soft); font-size:12px; }
code { font:12.5px ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace; overflow-wrap:anywhere; }
.badge { display:inline-block; border-radius:99px; padding:1px 10px; font-size:12.5px; font-weight:620; }
.badge.good { color:var(--good); background:var(--good-bg); } .badge.plain { color:var(--soft); background:var(--track); } .badge.bad { color:var(--bad); background:var(--bad-bg); }
.note { color:var(--soft); font-size:13px; }
.legend { display:flex; gap:18px; flex-wrap:wrap; color:var(--soft); font-size:13px; margin:2px 0 14px; }
.legend i { display:inline-block; width:11px; height:11px; border-radius:3px; margin-right:6px; vertical-align:-1px; }
svg { display:block; width:100%; height:auto; overflow:visible; }
svg text { font-family:inherit; font-variant-numeric:tabular-nums; }
.tick { font-size:11px; fill:var(--soft); } .axis { font-size:11.5px; fill:var(--soft); }
.label { font-size:13px; fill:var(--ink); } .value { font-size:13px; font-weight:640; fill:var(--ink); }
path.rule { stroke:var(--line); stroke-width:1; } .track { fill:var(--track); }
.whisker { stroke:var(--ink); stroke-opacity:.55; stroke-width:1.3; fill:none; }
.cell { font-size:10.5px; font-weight:560; } .cell.off { fill:var(--ink); fill-opacity:.75; } .cell.on { fill:#fff; }
.matrix { width:100%; image-rendering:pixelated; border-radius:8px; background:var(--track); display:block; }
.gallery { display:grid; gap:14px; grid-template-columns:repeat(auto-fill,minmax(164px,1fr)); }
.shot { background:var(--panel); border:1px solid var(--line); border-radius:14px; overflow:hidden; box-shadow:var(--shadow); margin:0; }
.shot img { display:block; width:100%; aspect-ratio:1; object-fit:contain; background:#fff; padding:14px; }
.shot figcaption { padding:11px 13px 13px; border-top:1px solid var(--line); font-size:14px; line-height:1.35; }
.shot .written { font-weight:620; } .shot .truth { color:var(--soft); font-size:13px; margin-top:3px; }
.shot .rank { margin-top:8px; } .shot.exact { border-color:var(--good); }
footer { color:var(--soft); font-size:13px; margin-top:56px; border-top:1px solid var(--line); padding-top:18px; }
footer p { margin:0 0 8px; }
@media print { .panel,.shot { break-inside:avoid; box-shadow:none; } }
"""


def page(title: str, body: str) -> str:
    """A whole document that needs no other file."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body><main>\n{body}\n</main></body></html>\n"
    )


def card(name: str, figure: str, note: str, tone: str = "") -> str:
    """A headline number. `figure` is HTML."""
    return (f'<div class="panel card {tone}"><div class="name">{escape(name)}</div>'
            f'<div class="figure">{figure}</div><div class="note">{escape(note)}</div></div>')  # fmt: skip


def section(title: str, lead: str, *parts: str) -> str:
    """A heading, one sentence on what is shown (HTML), and the content."""
    return f"<section><h2>{escape(title)}</h2><p>{lead}</p>{''.join(parts)}</section>"


def panel(title: str, *parts: str) -> str:
    heading = f"<h3>{escape(title)}</h3>" if title else ""
    return f'<div class="panel">{heading}{"".join(parts)}</div>'


def grid(kind: str, parts: Sequence[str]) -> str:
    return f'<div class="grid {kind}">{"".join(parts)}</div>'


def stack(parts: Sequence[str]) -> str:
    """Parts below each other, spaced."""
    return f'<div class="stack">{"".join(parts)}</div>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]], tones: Sequence[str] = ()) -> str:
    """A table; cells are HTML. `tones` gives each row a class: strong, quiet or nothing."""
    tones = list(tones) + [""] * (len(rows) - len(tones))
    body = "".join(
        f'<tr class="{tone}">{"".join(f"<td>{cell}</td>" for cell in row)}</tr>'
        for row, tone in zip(rows, tones, strict=True)
    )
    cells = "".join(f"<th>{name}</th>" for name in head)
    return f'<div class="scroll"><table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>'


def badge(text: str, tone: str) -> str:
    """A small pill; `tone` is good, bad or plain."""
    return f'<span class="badge {tone}">{escape(text)}</span>'


def legend(entries: Sequence[tuple[str, str]]) -> str:
    """(CSS colour, name) pairs."""
    return '<div class="legend">' + "".join(
        f'<span><i style="background:{color}"></i>{escape(name)}</span>' for color, name in entries
    ) + "</div>"  # fmt: skip


def percent(share: float, digits: int = 1) -> str:
    """A share as text, its sign kept on the line by a narrow space."""
    return f"{100 * share:.{digits}f}\u202f%"
