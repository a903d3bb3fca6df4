"""Curves as inline SVG: pure functions from numbers to markup, the same text for the same numbers.

An SVG here is stretched to the width it finds, with strokes that keep their own; labels stand
beside it as HTML, so that they are as sharp and as large on a phone as on a wide screen.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

Point = tuple[float, float]

SIZE = 1000
"""Width and height of a chart in its own units."""
MOST_POINTS = 800
"""Points of a curve that are drawn; of more, the least and the greatest of each stretch."""
COLOURS = 8


@dataclass(frozen=True)
class Line:
    """One curve."""

    label: str
    points: Sequence[Point]
    colour: int
    """A number of the palette; they repeat after `COLOURS`."""
    style: Literal["line", "faint", "dots"] = "line"


@dataclass(frozen=True)
class Axis:
    """From values to a place in [0, 1], with the values that are labelled."""

    low: float
    high: float
    log: bool = False

    def place(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log10(low), math.log10(high), math.log10(value)
        return (value - low) / (high - low)

    def ticks(self, wanted: int = 5) -> list[float]:
        if self.log:
            return _log_ticks(self.low, self.high, wanted)
        return _ticks(self.low, self.high, wanted)


def value_axis(values: Iterable[float], *, may_be_log: bool = True) -> Axis:
    """An axis that holds all finite values with some air; logarithmic where they span much."""
    finite = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    low, high = min(finite), max(finite)
    if may_be_log and low > 1e-30 and high / low > 30:
        air = (high / low) ** 0.04
        return Axis(low / air, high * air, log=True)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        half = max(abs(low) * 0.1, 1e-12)
        return Axis(low - half, high + half)
    air = 0.06 * (high - low)
    bottom = 0.0 if 0 <= low < 3 * air else low - air  # zero is worth showing where it is near
    return Axis(bottom, high + air)


def step_axis(steps: Iterable[float]) -> Axis:
    """From the first of these steps to the last; from 0 where the first is near it."""
    low, high = min(known := list(steps)), max(known)
    return Axis(0 if low < 0.25 * high else low, high) if high > 0 else Axis(0, 1)


def chart(
    title: str,
    lines: Sequence[Line],
    *,
    x: Axis,
    marks: Sequence[float] = (),
    may_be_log: bool = True,
) -> str:
    """A figure with its curves, its labels, and its numbers for whoever points at it.

    Args:
        marks: steps at which a thin line stands, such as where a run was resumed.
    """
    values = (value for line in lines for _, value in line.points)
    y = value_axis(values, may_be_log=may_be_log)
    drawn = [Line(n.label, thinned(n.points), n.colour, n.style) for n in lines]
    legend = "".join(_key(line) for line in lines if line.style != "faint")
    scale = ' <small class="scale">log</small>' if y.log else ""
    return (
        f'<figure class="chart"><figcaption>{escape(title)}{scale}</figcaption>'
        f'<div class="legend">{legend}</div><div class="plot">'
        f'<div class="ys">{"".join(_y_label(v, y) for v in y.ticks())}</div>'
        f'<div class="area">{_svg(title, drawn, x, y, marks)}</div>'
        f'<div class="xs">{"".join(_x_label(v, x) for v in x.ticks(6) if v == int(v))}</div>'
        f'</div><script type="application/json">{_numbers(drawn, x, y)}</script></figure>'
    )


def _svg(title: str, lines: Sequence[Line], x: Axis, y: Axis, marks: Sequence[float]) -> str:
    grid = "".join(f"M0 {_down(v, y)}H{SIZE}" for v in y.ticks())
    rules = "".join(f"M{_across(v, x)} 0V{SIZE}" for v in marks if x.low < v < x.high)
    curves = "".join(_curve(line, x, y) for line in lines)
    return (
        f'<svg viewBox="0 0 {SIZE} {SIZE}" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(title)}"><path class="grid" d="{grid}"/>'
        f'<path class="mark" d="{rules}"/>{curves}</svg>'
    )


def _curve(line: Line, x: Axis, y: Axis) -> str:
    colour, dots = f"c{line.colour % COLOURS}", line.style == "dots"
    drawn = f'<path class="{line.style} {colour}" d="{path(line.points, x, y, dots=dots)}"/>'
    if dots:
        drawn = f'<path class="thin {colour}" d="{path(line.points, x, y)}"/>{drawn}'
    broken = [step for step, value in line.points if not math.isfinite(value)]
    if broken:  # a loss that became NaN is the one thing a curve must not leave out
        rules = "".join(f"M{_across(v, x)} 0V{SIZE}" for v in broken[:1])
        drawn += f'<path class="broken" d="{rules}"/>'
    return drawn


def path(points: Sequence[Point], x: Axis, y: Axis, *, dots: bool = False) -> str:
    """The `d` of a curve; it is interrupted where a value is not finite.

    Args:
        dots: a dot at each point in place of a line from one to the next.
    """
    parts: list[str] = []
    pen_is_down = False
    for step, value in points:
        if not math.isfinite(value):
            pen_is_down = False
            continue
        place = f"{_across(step, x)} {_down(value, y)}"
        parts.append(f"{'L' if pen_is_down and not dots else 'M'}{place}{'h0' if dots else ''}")
        pen_is_down = True
    if len(parts) == 1 and not dots:
        parts.append("h0")  # one point alone: the round end of its stroke is a dot
    return "".join(parts)


def thinned(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most about `most` points that look the same: the extremes of equal stretches.

    Values that are not finite all stay: they are why somebody looks.
    """
    if len(points) <= most:
        return list(points)
    length = math.ceil(2 * len(points) / most)
    kept: list[Point] = []
    for begin in range(0, len(points), length):
        stretch = points[begin : begin + length]
        finite = [p for p in stretch if math.isfinite(p[1])]
        chosen = {p for p in stretch if not math.isfinite(p[1])}
        if finite:
            chosen |= {min(finite, key=lambda p: p[1]), max(finite, key=lambda p: p[1])}
        kept += sorted(chosen, key=lambda p: p[0])
    return kept


def smoothed(points: Sequence[Point]) -> list[Point]:
    """The curve as an exponential moving average over about a fiftieth of its points.

    Source of the correction at the beginning: Kingma & Ba, arXiv:1412.6980, section 3.
    """
    decay = 1 - 1 / max(1.0, len(points) / 50)
    total, weight = 0.0, 0.0
    smooth = []
    for step, value in points:
        if math.isfinite(value):
            total = decay * total + (1 - decay) * value
            weight = decay * weight + (1 - decay)
            smooth.append((step, total / weight))
        else:
            smooth.append((step, value))
    return smooth


def short(value: float) -> str:
    """A number in few characters: 0.0634, 1.2e-05, 14.8k, 3.1M."""
    if not math.isfinite(value):
        return {"nan": "NaN", "inf": "\N{INFINITY}"}.get(str(value), "-\N{INFINITY}")
    size = abs(value)
    for least, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= least:
            scale = 1e3 if unit == "k" else least
            return f"{value / scale:.3g}{unit}"
    if 0 < size < 1e-3:
        return f"{value:.3g}"
    return f"{value:.4g}"


def _ticks(low: float, high: float, wanted: int) -> list[float]:
    raw = (high - low) / wanted
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * nice for nice in (1, 2, 5, 10) if size * nice >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [float(f"{n * step:.12g}") for n in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float, wanted: int) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    every = max(1, math.ceil(len(decades) / (wanted + 1)))
    powers = [10.0**n for n in decades if n % every == 0 and low <= 10.0**n <= high]
    if len(powers) > 2:
        return powers
    return [d * 10.0**n for n in decades for d in (1, 2, 5) if low <= d * 10.0**n <= high]


def _across(value: float, x: Axis) -> str:
    return f"{x.place(value) * SIZE:.1f}"


def _down(value: float, y: Axis) -> str:
    return f"{(1 - y.place(value)) * SIZE:.1f}"


def _key(line: Line) -> str:
    shape = ' class="round"' if line.style == "dots" else ""
    return f'<span class="c{line.colour % COLOURS}"><i{shape}></i>{escape(line.label)}</span>'


def _y_label(value: float, y: Axis) -> str:
    return f'<span style="bottom:{100 * y.place(value):.2f}%">{short(value)}</span>'


def _x_label(value: float, x: Axis) -> str:
    return f'<span style="left:{100 * x.place(value):.2f}%">{short(value)}</span>'


def _numbers(lines: Sequence[Line], x: Axis, y: Axis) -> str:
    """What the page's script shows under the pointer, as JSON that no `</script>` can end."""
    told = {
        "x": [x.low, x.high],
        "lines": [
            {
                "label": line.label,
                "colour": line.colour % COLOURS,
                "points": [
                    [step, short(value), round(1 - y.place(value), 4)]
                    for step, value in line.points
                    if math.isfinite(value)
                ],
            }
            for line in lines
            if line.style != "faint"
        ],
    }
    return json.dumps(told, separators=(",", ":")).replace("<", "\\u003c")
