"""Curves as inline SVG: pure functions, the same text for the same numbers.

The SVG is stretched to the available width, with strokes of constant width; labels are HTML
next to it, so that they are equally sharp and large on a phone and on a wide screen.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Point = tuple[float, float]
Points = Sequence[Point] | NDArray[np.float64]
"""(step, value) each, as pairs or as an array [N, 2]."""

SIZE = 1000
"""Width and height of a chart in its own units."""
MOST_POINTS = 800
"""Points drawn for a curve; of longer curves, the minimum and maximum of each section."""
COLOURS = 8
SMOOTHED_POINTS = 8000
"""Longer curves are first averaged in sections."""
_LARGEST = 1e300
"""Limit of drawn values: their differences are still finite."""
_LARGEST_RATIO = 1e300
_HIGHEST = 1e305
"""The end of an axis; below it, the space around its values is still finite."""
_LEAST = 1e-290
"""The shortest valid axis."""


@dataclass(frozen=True)
class Line:
    """One curve."""

    label: str
    points: Points
    colour: int
    """A number in the palette, which repeats after `COLOURS`."""
    style: Literal["line", "faint", "dots"] = "line"


@dataclass(frozen=True)
class Axis:
    """Maps values to a position in [0, 1], with the labelled values."""

    low: float
    high: float
    log: bool = False

    def place(self, value: float) -> float:
        """The position of a value, in [0, 1] within the axis."""
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log10(low), math.log10(high), math.log10(value)
        return (value - low) / (high - low)

    def ticks(self, wanted: int = 5) -> list[float]:
        """About `wanted` round values within the axis."""
        if self.log:
            return _log_ticks(self.low, self.high, wanted)
        return _ticks(self.low, self.high, wanted)


def value_axis(values: Iterable[float], *, may_be_log: bool = True) -> Axis:
    """An axis for all finite values with a margin; logarithmic for a large range."""
    finite = [value for value in values if _is_drawn(value)] or [0.0, 1.0]
    low, high = min(finite), max(finite)
    if may_be_log and low > 1e-30 and high / low > 30:
        air = min(high / low, _LARGEST_RATIO) ** 0.04
        return Axis(low / air, min(high * air, _HIGHEST), log=True)
    if high - low <= max(1e-9 * max(abs(low), abs(high)), _LEAST):
        half = abs(low) * 0.1
        if half < _LEAST:  # only zeros: an axis around zero
            return Axis(-1.0, 1.0)
        return Axis(low - half, high + half)
    air = 0.06 * (high - low)
    bottom = 0.0 if 0 <= low < 3 * air else low - air  # the axis includes zero if it is near
    return Axis(bottom, high + air)


def step_axis(steps: Iterable[float]) -> Axis:
    """From the first of these steps to the last; from 0 if it is near, or there is only one."""
    low, high = min(known := list(steps)), max(known)
    begin = 0 if low < 0.25 * high or low == high else low
    return Axis(begin, high) if high > 0 else Axis(0, 1)


def chart(
    title: str,
    lines: Sequence[Line],
    *,
    x: Axis,
    marks: Sequence[float] = (),
    may_be_log: bool = True,
) -> str:
    """A figure with its curves, its labels, and its numbers for the tooltip.

    Args:
        marks: steps with a thin vertical line, such as where a run was resumed.
    """
    drawn = [Line(n.label, thinned(n.points), n.colour, n.style) for n in lines]
    values = (value for line in drawn for _, value in line.points)
    y = value_axis(values, may_be_log=may_be_log)
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
    broken = [step for step, value in line.points if not _is_drawn(value)]
    if broken:  # a curve must show where a loss became NaN
        rules = "".join(f"M{_across(v, x)} 0V{SIZE}" for v in broken[:1])
        drawn += f'<path class="broken" d="{rules}"/>'
    return drawn


def path(points: Points, x: Axis, y: Axis, *, dots: bool = False) -> str:
    """The `d` of a curve; it is interrupted where a value is not finite.

    Args:
        dots: a dot at each point instead of a line from one to the next.
    """
    parts: list[str] = []
    pen_is_down = False
    for step, value in points:
        if not _is_drawn(value):
            pen_is_down = False
            continue
        place = f"{_across(step, x)} {_down(value, y)}"
        parts.append(f"{'L' if pen_is_down and not dots else 'M'}{place}{'h0' if dots else ''}")
        pen_is_down = True
    if len(parts) == 1 and not dots:
        parts.append("h0")  # a single point: the round end of its stroke is a dot
    return "".join(parts)


def thinned(points: Points, most: int = MOST_POINTS) -> list[Point]:
    """At most about `most` points that look the same: the extremes of equal sections.

    Of values that are not finite, the first and the last of each sequence are kept too: they are
    the reason for looking at the chart.
    """
    table = _table(points)
    if len(table) <= most:
        return _pairs(table)
    length = math.ceil(2 * len(table) / most)
    stretches = _padded(table[:, 1], length)
    drawn = np.abs(stretches) <= _LARGEST
    other = ~drawn
    other.flat[len(table) :] = False
    extremes = [
        (drawn, np.argmin(np.where(drawn, stretches, np.inf), axis=1)),
        (drawn, np.argmax(np.where(drawn, stretches, -np.inf), axis=1)),
        (other, np.argmax(other, axis=1)),
        (other, length - 1 - np.argmax(other[:, ::-1], axis=1)),
    ]
    begins = np.arange(0, stretches.size, length)
    kept = [(begins + at)[which.any(axis=1)] for which, at in extremes]
    return _pairs(table[np.unique(np.concatenate(kept))])


def smoothed(points: Points) -> list[Point]:
    """The curve as an exponential moving average over about a fiftieth of its points.

    Source of the correction at the beginning: Kingma & Ba, arXiv:1412.6980, section 3.
    """
    table = _table(points)
    if len(table) > SMOOTHED_POINTS:
        table = _means(table, math.ceil(len(table) / SMOOTHED_POINTS))
    decay = 1 - 1 / max(1.0, len(table) / 50)
    total, weight = 0.0, 0.0
    smooth = []
    for step, value in table.tolist():
        if _is_drawn(value):
            total = decay * total + (1 - decay) * value
            weight = decay * weight + (1 - decay)
            smooth.append((step, total / weight))
        else:
            smooth.append((step, value))
    return smooth


def _means(table: NDArray[np.float64], length: int) -> NDArray[np.float64]:
    """The mean of each section at its last step; NaN if a value in it is not finite."""
    values = _padded(table[:, 1], length)
    drawn = np.abs(values) <= _LARGEST
    counts = np.maximum(drawn.sum(axis=1), 1)
    means = np.sum(np.where(drawn, values, 0.0) / counts[:, None], axis=1)
    other = ~drawn
    other.flat[len(table) :] = False
    means[other.any(axis=1)] = np.nan
    last = np.minimum(np.arange(length, values.size + 1, length), len(table)) - 1
    return np.column_stack([table[last, 0], means])


def _padded(values: NDArray[np.float64], length: int) -> NDArray[np.float64]:
    """Sections of equal length [S, length]; the last one is padded with NaN."""
    stretches = np.full(-(-len(values) // length) * length, np.nan)
    stretches[: len(values)] = values
    return stretches.reshape(-1, length)


def _table(points: Points) -> NDArray[np.float64]:
    return np.asarray(points, dtype=np.float64).reshape(-1, 2)


def _pairs(table: NDArray[np.float64]) -> list[Point]:
    return [(step, value) for step, value in table.tolist()]


def short(value: float) -> str:
    """A number in few characters: 0.0634, 1.2e-05, 14.8k, 3.1M, 2e+20."""
    if not math.isfinite(value):
        return {"nan": "NaN", "inf": "\N{INFINITY}"}.get(str(value), "-\N{INFINITY}")
    size = abs(value)
    for least, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if least <= size < 1e15:
            scale = 1e3 if unit == "k" else least
            return f"{value / scale:.3g}{unit}"
    return f"{value:.3g}" if 0 < size < 1e-3 else f"{value:.4g}"


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


def _height(value: float, y: Axis) -> float:
    return round(1 - y.place(value), 4)


def _is_drawn(value: float) -> bool:
    return abs(value) <= _LARGEST  # false for NaN


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
    """The values for the tooltip script, as JSON in which no `</script>` can occur."""
    told = {
        "x": [x.low, x.high],
        "lines": [
            {
                "label": line.label,
                "colour": line.colour % COLOURS,
                "points": [
                    [int(step) if step == int(step) else step, short(value), _height(value, y)]
                    for step, value in line.points
                    if _is_drawn(value)
                ],
            }
            for line in lines
            if line.style != "faint"
        ],
    }
    return json.dumps(told, separators=(",", ":")).replace("<", "\\u003c")
