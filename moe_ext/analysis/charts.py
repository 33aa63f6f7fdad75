"""Small charts as SVG text. Colours are the page's CSS variables, so they follow light and dark.

`--frozen` is the colour of everything pretrained, `--new` of everything that training added.
Each function returns one `<svg>` element that scales to the width of its container.
"""

import base64
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from PIL import Image


@dataclass
class Line:
    """One curve: points in order of x, a CSS colour, a name for the legend."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    color: str = "var(--frozen)"


@dataclass
class Bar:
    """One bar: a value with its standard error (0 draws none) and a CSS colour."""

    name: str
    value: float
    error: float = 0.0
    color: str = "var(--frozen)"
    note: str = ""


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` round numbers inside [low, high], steps of 1, 2 or 5 times a power of ten."""
    span = high - low
    if not math.isfinite(span) or span <= 0:
        return [low]
    raw = span / max(count, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = min((m * power for m in (1, 2, 5, 10)), key=lambda s: abs(s - raw))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def number(value: float) -> str:
    """A number for an axis: at most three significant digits, no trailing zeros."""
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) < 0.001:
        return f"{value:.0e}"
    text = f"{value:.3g}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def smooth(values: Sequence[float], weight: float) -> list[float]:
    """Exponential moving average, corrected for its start; weight 0 gives the values back."""
    average, norm, out = 0.0, 0.0, []
    for value in values:
        average = weight * average + (1 - weight) * value
        norm = weight * norm + (1 - weight)
        out.append(average / norm)
    return out


def line_chart(lines: Sequence[Line], x_label: str, width: int = 520, height: int = 250) -> str:
    """Curves over shared axes: raw values faint, their moving average bold."""
    lines = [line for line in lines if len(line.x)]
    if not lines:
        return empty("no steps recorded", width, height)
    left, right, top, bottom = 46, 14, 14, 38
    x_low, x_high = min(line.x[0] for line in lines), max(line.x[-1] for line in lines)
    y_all = [y for line in lines for y in line.y if math.isfinite(y)] or [0.0]
    y_low, y_high = min(y_all), max(y_all)
    pad = 0.06 * (y_high - y_low or abs(y_high) or 1.0)
    y_low, y_high = max(y_low - pad, 0.0) if y_low >= 0 else y_low - pad, y_high + pad

    def px(x: float) -> float:
        return left + (x - x_low) / ((x_high - x_low) or 1) * (width - left - right)

    def py(y: float) -> float:
        return top + (y_high - y) / ((y_high - y_low) or 1) * (height - top - bottom)

    parts = [_y_axis(ticks(y_low, y_high), py, left, width - right)]
    for x in ticks(x_low, x_high, 5):
        parts.append(f'<text class="tick" x="{px(x):.1f}" y="{height - bottom + 17}"'
                     f' text-anchor="middle">{number(x)}</text>')  # fmt: skip
    parts.append(f'<text class="axis" x="{(left + width - right) / 2:.0f}" y="{height - 4}"'
                 f' text-anchor="middle">{escape(x_label)}</text>')  # fmt: skip
    for line in lines:
        weight = 0.9 if len(line.x) > 60 else 0.6 if len(line.x) > 12 else 0.0
        if weight:
            parts.append(_path(line.x, line.y, px, py, line.color, 1.0, 0.28))
        mean = smooth(line.y, weight)
        parts.append(_path(line.x, mean, px, py, line.color, 2.2, 1.0))
        parts.append(f'<circle cx="{px(line.x[-1]):.1f}" cy="{py(mean[-1]):.1f}" r="3.2"'
                     f' style="fill:{line.color}"><title>{escape(line.name)}: {mean[-1]:.4g} at step'
                     f" {number(line.x[-1])}</title></circle>")  # fmt: skip
    return _svg(width, height, parts, "curves of " + ", ".join(line.name for line in lines))


def column_chart(bars: Sequence[Bar], x_label: str, width: int = 1080, height: int = 240) -> str:
    """Upright bars, one a name, the axis starting at zero."""
    if not bars:
        return empty("nothing to show", width, height)
    left, right, top, bottom = 52, 10, 14, 40
    y_high = max(bar.value for bar in bars) * 1.08 or 1.0
    slot = (width - left - right) / len(bars)
    thick = min(slot * 0.62, 46)

    def py(y: float) -> float:
        return top + (y_high - y) / y_high * (height - top - bottom)

    parts = [_y_axis(ticks(0, y_high), py, left, width - right)]
    for i, bar in enumerate(bars):
        middle = left + slot * (i + 0.5)
        parts.append(
            f'<rect x="{middle - thick / 2:.1f}" y="{py(bar.value):.1f}" width="{thick:.1f}"'
            f' height="{max(py(0) - py(bar.value), 1):.1f}" rx="3" style="fill:{bar.color}">'
            f"<title>{escape(bar.name)}: {bar.value:.4g} {escape(bar.note)}</title></rect>"
            f'<text class="tick" x="{middle:.1f}" y="{height - bottom + 17}" text-anchor="middle">'
            f"{escape(bar.name)}</text>"
        )
    parts.append(f'<text class="axis" x="{(left + width - right) / 2:.0f}" y="{height - 3}"'
                 f' text-anchor="middle">{escape(x_label)}</text>')  # fmt: skip
    return _svg(width, height, parts, f"bars by {x_label}")


def row_chart(bars: Sequence[Bar], high: float = 1.0, width: int = 520, unit: str = "%") -> str:
    """Lying bars with their names left, values right and error whiskers; shares when unit is %."""
    left, right, pitch = 168, 74, 32
    scale = (width - left - right) / high
    parts = []
    for i, bar in enumerate(bars):
        y = 6 + i * pitch
        end = left + bar.value * scale
        text = f"{100 * bar.value:.1f} %" if unit == "%" else f"{bar.value:.2f} {unit}"
        parts.append(
            f'<text class="label" x="{left - 10}" y="{y + 15}" text-anchor="end">{escape(bar.name)}</text>'
            f'<rect x="{left}" y="{y}" width="{width - left - right}" height="21" rx="4" class="track"/>'
            f'<rect x="{left}" y="{y}" width="{max(bar.value * scale, 1.5):.1f}" height="21" rx="4"'
            f' style="fill:{bar.color}"><title>{escape(bar.name)}: {text} {escape(bar.note)}</title></rect>'
            f'<text class="value" x="{width - right + 8}" y="{y + 15}">{text}</text>'
        )
        if bar.error:
            low, top = (
                max(end - bar.error * scale, left),
                min(end + bar.error * scale, width - right),
            )
            parts.append(f'<path class="whisker" d="M{low:.1f} {y + 10.5}H{top:.1f}'
                         f'M{low:.1f} {y + 6}v9M{top:.1f} {y + 6}v9"/>')  # fmt: skip
    return _svg(width, 6 + pitch * len(bars), parts, ", ".join(bar.name for bar in bars))


def heatmap(
    share_LE: Sequence[Sequence[float]],
    row_names: Sequence[str],
    num_frozen: Sequence[int],
    width: int = 340,
) -> str:
    """Share of a layer's selections that each expert gets: rows layers, columns experts.

    The first `num_frozen[row]` cells of a row are pretrained experts, the others new ones. A cell's
    opacity is its share relative to the largest on the chart; numbers are percent.
    """
    columns = max((len(row) for row in share_LE), default=0)
    if not columns:
        return empty("nothing recorded", width, 80)
    left, top, gap = 42, 20, 3
    pitch = (width - left) / columns
    cell_height = 24 if columns <= 12 else 16
    peak = max((max(row, default=0.0) for row in share_LE), default=0.0) or 1.0
    show_number = pitch >= 26
    parts = []
    for e in range(columns):
        if columns <= 12 or e % 8 == 0:
            parts.append(f'<text class="tick" x="{left + pitch * (e + 0.5):.1f}" y="12"'
                         f' text-anchor="middle">{e}</text>')  # fmt: skip
    for r, (row, name) in enumerate(zip(share_LE, row_names, strict=True)):
        y = top + r * (cell_height + gap)
        parts.append(f'<text class="tick" x="{left - 9}" y="{y + cell_height / 2 + 4}"'
                     f' text-anchor="end">{escape(name)}</text>')  # fmt: skip
        for e, share in enumerate(row):
            kind = "frozen" if e < num_frozen[r] else "new"
            opacity = 0.06 + 0.94 * share / peak
            x = left + pitch * e
            parts.append(
                f'<rect x="{x:.1f}" y="{y}" width="{pitch - gap:.1f}" height="{cell_height}" rx="3"'
                f' style="fill:var(--{kind});fill-opacity:{opacity:.3f}">'
                f"<title>layer {escape(name)}, {kind} expert {e}: {100 * share:.2f} %</title></rect>"
            )
            if show_number:
                tone = "on" if opacity > 0.62 else "off"
                parts.append(f'<text class="cell {tone}" x="{x + (pitch - gap) / 2:.1f}"'
                             f' y="{y + cell_height / 2 + 3.6:.1f}" text-anchor="middle">'
                             f"{100 * share:.0f}</text>")  # fmt: skip
    return _svg(
        width,
        top + len(share_LE) * (cell_height + gap),
        parts,
        "share of tokens by layer and expert",
    )


def matrix_image(score_IC: Sequence[Sequence[float]], rgb: tuple[int, int, int]) -> str:
    """An `<img>` of a square matrix, one pixel a cell; a high score is opaque, a low one clear."""
    rows = [list(row) for row in score_IC]
    flat = sorted(v for row in rows for v in row)
    low, high = flat[len(flat) // 2], flat[-1]
    image = Image.new("RGBA", (len(rows[0]), len(rows)))
    for y, row in enumerate(rows):
        for x, value in enumerate(row):
            strength = min(max((value - low) / ((high - low) or 1.0), 0.0), 1.0)
            image.putpixel((x, y), (*rgb, round(12 + 243 * strength)))
    file = io.BytesIO()
    image.save(file, "PNG")
    return f'<img class="matrix" alt="score of every image with every caption" src="{png_url(file.getvalue())}">'


def png_url(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def empty(text: str, width: int, height: int) -> str:
    """A quiet place-holder chart that says why nothing is drawn."""
    part = f'<text class="axis" x="{width / 2}" y="{height / 2}" text-anchor="middle">{escape(text)}</text>'
    return _svg(width, height, [part], text)


def _svg(width: int, height: float, parts: Sequence[str], label: str) -> str:
    return (f'<svg viewBox="0 0 {width} {height:.0f}" role="img" aria-label="{escape(label)}">'
            + "".join(parts) + "</svg>")  # fmt: skip


def _y_axis(values: list[float], py: Callable, left: float, right: float) -> str:
    return "".join(
        f'<path class="rule" d="M{left} {py(v):.1f}H{right}"/>'
        f'<text class="tick" x="{left - 7}" y="{py(v) + 4:.1f}" text-anchor="end">{number(v)}</text>'
        for v in values
    )


def _path(
    x: Sequence[float],
    y: Sequence[float],
    px: Callable,
    py: Callable,
    color: str,
    stroke: float,
    opacity: float,
) -> str:
    points = [(px(a), py(b)) for a, b in zip(x, y, strict=True) if math.isfinite(b)]
    d = "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in points)
    return (f'<path d="{d}" fill="none" stroke-linejoin="round" style="stroke:{color};'
            f'stroke-width:{stroke};stroke-opacity:{opacity}"/>')  # fmt: skip
