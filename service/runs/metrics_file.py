"""Reads metrics.jsonl: all rows, single curves, or only its end. No torch."""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from service.basics.errors import WillFailAgain
from service.plan.early_stopping import is_better
from service.runs.line_file import Block, blocks_of, last_lines, lines_with, values_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# JSON does not have these values, and strict readers reject Python's bare NaN. Strings rather than
# null, to keep which of them it was; Python's float(), JavaScript's Number() and
# pandas.to_numeric can read all three of them.
NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
LARGEST_STEP = 2**53  # beyond it, a float does not hold every whole number
PLACE = ("step", "epoch", "time")
"""The keys for the position of a row; all other keys are measured values."""


@dataclass(frozen=True)
class Curves:
    """Measured values by key: steps [N] and values [N]."""

    steps: NDArray[np.float64]
    """The steps of all rows."""
    of: Mapping[str, tuple[NDArray[np.float64], NDArray[np.float64]]]


def read_metrics(path: Path | str) -> list[dict[str, float]]:
    """The rows of a `metrics.jsonl`, without an incomplete last line of a running run.

    Raises:
        WillFailAgain: an earlier line is not a row.
    """
    return [row for _, row in rows_in(Path(path))]


def rows_in(path: Path) -> Iterator[tuple[bytes, dict[str, float]]]:
    """Every line with its row, without an incomplete last one."""
    for block in blocks_of(path):
        yield from zip(block.lines, _rows_of(block, path), strict=False)


def read_curves(path: Path | None, wanted: Callable[[str], bool] = lambda key: True) -> Curves:
    """All measured values as arrays: at most sixteen bytes per value.

    Args:
        path: None: no values.
    Raises:
        WillFailAgain: a line is not a row.
    """
    import numpy as np

    gathered = _Gathered(wanted)
    for block in blocks_of(path) if path is not None else ():
        assert path is not None, "it has blocks"
        try:
            gathered.add([row for row in block.values if row is not None or not block.is_torn])
        except (TypeError, KeyError, OverflowError, AttributeError):
            # A value is not a number: a NaN is written as text, anything else is an error.
            gathered.add(_rows_of(block, path))
    steps = np.frombuffer(gathered.steps) if gathered.steps else np.zeros(0)
    return Curves(
        steps,
        {
            key: (
                np.frombuffer(gathered.own_steps[key]) if key in gathered.own_steps else steps,
                np.frombuffer(values),
            )
            for key, values in gathered.values.items()
        },
    )


class _Gathered:
    """Values that are added in blocks; keys that all rows have share one list of steps."""

    def __init__(self, wanted: Callable[[str], bool]) -> None:
        self._wanted = wanted
        self.steps = array("d")
        self.own_steps: dict[str, array[float]] = {}
        self.values: dict[str, array[float]] = {}

    def add(self, rows: list[dict[str, float]]) -> None:
        """Add all of these rows or, with an error, none.

        Raises:
            TypeError, KeyError, OverflowError, AttributeError: one of them is not a row of numbers.
        """
        if not rows:
            return
        steps = array("d", [row["step"] for row in rows])
        if not _are_steps(steps):
            raise TypeError("a step must be a whole number")
        new = {key: self._column(key, rows, steps) for key in self._keys(rows)}
        for key, (own, values) in new.items():
            known = self.values.setdefault(key, array("d"))
            shares = key not in self.own_steps and len(known) == len(self.steps)
            if not (shares and len(values) == len(rows)):
                self.own_steps.setdefault(key, self.steps[: len(known)]).extend(own)
            known.extend(values)
        for key in self.values.keys() - new.keys() - self.own_steps.keys():
            self.own_steps[key] = self.steps[: len(self.values[key])]
        self.steps.extend(steps)

    def _keys(self, rows: list[dict[str, float]]) -> list[str]:
        keys = dict.fromkeys(chain.from_iterable(rows))
        return [key for key in keys if key not in PLACE and self._wanted(key)]

    def _column(
        self, key: str, rows: list[dict[str, float]], steps: array[float]
    ) -> tuple[array[float], array[float]]:
        try:
            return steps, array("d", map(itemgetter(key), rows))
        except KeyError:  # not in every row
            having = [row for row in rows if key in row]
        return array("d", [row["step"] for row in having]), array("d", [row[key] for row in having])


def last_row(path: Path) -> dict[str, float] | None:
    """The last complete row, found at the end of the file; None if there is none yet.

    Raises:
        WillFailAgain: the last line is not a row.
    """
    lines, is_torn = last_lines(path)
    rows = [_row(value) for value in values_of(lines)]
    if is_torn and rows[-1] is None:
        del rows[-1]
    if not rows:
        return None
    if rows[-1] is None:
        raise _no_row(path, "at its end", lines[len(rows) - 1])
    return rows[-1]


def best_in(path: Path, key: str, *, largest: bool) -> tuple[float, int] | None:
    """The best finite value of a key and the step at which it was first reached."""
    mode = "max" if largest else "min"
    best: tuple[float, float] | None = None
    for lines in lines_with(path, json.dumps(key).encode() + b":"):
        for line, value in zip(lines, values_of(lines), strict=True):
            row = _row(value)
            if row is None:
                if value is None and not line.endswith(b"}"):
                    continue  # incomplete
                raise _no_row(path, "in it", line)
            found = row.get(key, math.nan)
            if is_better(found, best[0] if best else None, mode=mode):
                best = found, row["step"]
    return None if best is None else (best[0], int(best[1]))


def _rows_of(block: Block, path: Path) -> list[dict[str, float]]:
    rows = [_row(value) for value in block.values]
    if block.is_torn and rows[-1] is None:
        del rows[-1]
    for number, row in enumerate(rows):
        if row is None:
            raise _no_row(path, str(block.first + number), block.lines[number])
    return [row for row in rows if row is not None]


def _row(value: Any) -> dict[str, float] | None:
    """The row with its numbers, or None if it is not a row."""
    if not isinstance(value, dict) or "step" not in value:
        return None
    row: dict[str, Any] = {
        key: NOT_FINITE.get(v, v) if isinstance(v, str) else v for key, v in value.items()
    }
    if all(map(_is_number, row.values())) and _is_step(row["step"]):
        return row
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**1000)


def _are_steps(values: array[float]) -> bool:
    import numpy as np

    steps = np.frombuffer(values)
    return bool(np.all((steps >= 0) & (steps < LARGEST_STEP) & (np.floor(steps) == steps)))


def _is_step(value: float) -> bool:
    return 0 <= value < LARGEST_STEP and value == int(value)


def _no_row(path: Path, place: str, line: bytes) -> WillFailAgain:
    return WillFailAgain(
        f"{path}:{place}: this line is not a row of metrics: {line[:60]!r}. "
        "Remove the line, or start over with --fresh."
    )
