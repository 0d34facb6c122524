"""Line charts as inline SVG: axes with round ticks, a legend, and the data for a hover read-out.

Pure functions of numbers and names; what the curves mean is `launcher.report`'s business.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Point = tuple[float, float]

WIDTH, HEIGHT = 860, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 14, 12, 40
#: More points than this on one curve cannot be told apart at this width.
_MOST = 800


@dataclass(frozen=True)
class Series:
    """One curve. `colour` is an index into the page's palette; `bold` curves carry their points."""

    name: str
    points: Sequence[Point]
    colour: int = 0
    bold: bool = False


def figure(title: str, x_label: str, y_label: str, series: Sequence[Series]) -> str:
    """A `<figure>` with the chart, its legend and an empty read-out; "" without points."""
    drawn = [Series(s.name, thin(s.points), s.colour, s.bold) for s in series if s.points]
    if not drawn:
        return ""
    x_low, x_high = bounds([x for s in drawn for x, _ in s.points], margin=0.0)
    y_low, y_high = bounds([y for s in drawn for _, y in s.points], margin=0.05)

    def x_at(value: float) -> float:
        return _LEFT + (value - x_low) / (x_high - x_low) * (WIDTH - _LEFT - _RIGHT)

    def y_at(value: float) -> float:
        return HEIGHT - _BOTTOM - (value - y_low) / (y_high - y_low) * (HEIGHT - _TOP - _BOTTOM)

    data = {
        "x": [x_low, x_high, _LEFT, WIDTH - _RIGHT],
        "label": x_label,
        "series": [[s.name, [[x, float(f"{y:.6g}")] for x, y in s.points]] for s in drawn],
    }
    parts = [
        f"<figure><figcaption>{_escape(title)}</figcaption>",
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{_escape(title)}"'
        f' data-chart="{_escape(json.dumps(data, allow_nan=False))}">',
        *_axes(x_low, x_high, y_low, y_high, x_at, y_at),
        f'<text class="label" x="{(_LEFT + WIDTH - _RIGHT) / 2:g}" y="{HEIGHT - 4}"'
        f' text-anchor="middle">{_escape(x_label)}</text>',
        f'<text class="label" transform="translate(13 {(HEIGHT - _BOTTOM + _TOP) / 2:g})'
        f' rotate(-90)" text-anchor="middle">{_escape(y_label)}</text>',
        *(_curve(s, x_at, y_at) for s in drawn),
        f'<line class="guide" y1="{_TOP}" y2="{HEIGHT - _BOTTOM}" x1="-9" x2="-9"/></svg>',
        '<p class="legend">',
        *(f'<span class="{_classes(s)}"><i></i>{_escape(s.name)}</span>' for s in drawn),
        '</p><p class="read" aria-live="polite">Point at the chart to read it.</p></figure>',
    ]
    return "\n".join(parts)


def ticks(low: float, high: float, about: int = 6) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) within [low, high], `about` of them."""
    if not high > low:
        return [low]
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(
        (power * factor for factor in (1, 2, 5) if raw <= power * factor * 1.000001), power * 10
    )
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def bounds(values: Sequence[float], margin: float) -> Point:
    """The range of an axis: what `values` span, plus `margin` of it on both sides, never empty."""
    low, high = min(values), max(values)
    if low == high:
        room = abs(low) * 0.1 or 1.0
        return low - room, high + room
    room = (high - low) * margin
    return low - room, high + room


def thin(points: Sequence[Point]) -> list[Point]:
    """At most about `_MOST` of the points: of each stretch its lowest and its highest, so that no
    spike is lost, and the first and the last of all."""
    if len(points) <= _MOST:
        return list(points)
    size = math.ceil(len(points) / (_MOST / 2))
    kept = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        extremes = {min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])}
        kept += sorted(extremes)
    return [points[0], *(p for p in kept if p not in (points[0], points[-1])), points[-1]]


def tick_label(value: float, step: float) -> str:
    """A tick as short as its neighbours allow: `0.0005` and `1e-05`, `5.25`, `8k`, `2M`."""
    if value == 0:
        return "0"
    if abs(value) < 1e-3:
        return f"{value:.3g}"
    for size, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size and step >= size / 10:
            return f"{value / size:.6g}{suffix}"
    decimals = max(0, -math.floor(math.log10(step) + 1e-9)) if step < 1 else 0
    return f"{value:.{decimals}f}"


def _axes(
    x_low: float,
    x_high: float,
    y_low: float,
    y_high: float,
    x_at: Callable[[float], float],
    y_at: Callable[[float], float],
) -> list[str]:
    floor = HEIGHT - _BOTTOM
    parts = []
    y_ticks, x_ticks = ticks(y_low, y_high, 5), ticks(x_low, x_high, 8)
    for value in y_ticks:
        y = y_at(value)
        text = tick_label(value, _step(y_ticks))
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text class="tick" x="{_LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{text}</text>'
        )
    for value in x_ticks:
        x = x_at(value)
        text = tick_label(value, _step(x_ticks))
        parts.append(
            f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{floor}" y2="{floor + 4}"/>'
            f'<text class="tick" x="{x:.1f}" y="{floor + 17}" text-anchor="middle">{text}</text>'
        )
    parts.append(
        f'<line class="axis" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{floor}" y2="{floor}"/>'
    )
    return parts


def _curve(series: Series, x_at: Callable[[float], float], y_at: Callable[[float], float]) -> str:
    places = [(x_at(x), y_at(y)) for x, y in series.points]
    dots = places if series.bold and len(places) <= 60 else []
    if len(places) == 1:
        dots = places
    marks = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>' for x, y in dots)
    line = ""
    if len(places) > 1:
        steps = " ".join(f"{'L' if i else 'M'}{x:.1f} {y:.1f}" for i, (x, y) in enumerate(places))
        line = f'<path d="{steps}"/>'
    return f'<g class="curve {_classes(series)}">{line}{marks}</g>'


def _classes(series: Series) -> str:
    return f"c{series.colour % 8}" + (" bold" if series.bold else "")


def _step(values: Sequence[float]) -> float:
    return values[1] - values[0] if len(values) > 1 else abs(values[0]) or 1.0


def _escape(text: str) -> str:
    return html.escape(text, quote=True)
