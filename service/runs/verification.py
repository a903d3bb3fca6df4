"""Verifies that two runs took the same steps: by rows, losses or bits. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.basics.atomic_files import are_equal, told_when_unread
from service.basics.errors import SpecError
from service.runs.directory import RunDirectory, change_in_words, changes_in
from service.runs.metrics_file import read_curves
from service.runs.receipt_file import read_digests, read_weights
from service.runs.tracking import tells_of_speed

_ROUNDING = 1e-6  # a sum of float32 in another order; relative, or absolute below 1
_ONE_ROUNDING = 1e-7
_GROWS_BY_AT_MOST = 100.0  # from one logged value to the next


@dataclass(frozen=True)
class Compared:
    """The outcome, and its explanation."""

    equal: bool
    lines: list[str]


def compare(a: RunDirectory, b: RunDirectory, *, level: str, tolerance: float) -> Compared:
    """Compare two runs, up to the last common step.

    Args:
        level: `rows`, the rows of every step; `losses`, also every loss within
            `tolerance`, relative or absolute; `bits`, every measured value exactly, and also the
            weights.
    Raises:
        SpecError: one of them is not a run, or they have no common step.
    """
    changed = [
        f"{run.name}: {change_in_words(entry)}"
        for run in (a, b)
        for entry in changes_in(run.read_facts())
    ]
    with told_when_unread(a.path):
        checks = [_rows(a, b)]
        if level != "rows":
            checks.append(_values(a, b, tolerance=tolerance if level == "losses" else None))
        if level == "bits":
            checks.append(_weights(a, b))
    lines = [line for check in checks for line in check.lines]
    return Compared(all(check.equal for check in checks), lines + changed)


def _rows(a: RunDirectory, b: RunDirectory) -> Compared:
    a_steps, first = read_digests(a.receipt)
    # As they are where all is well: then one of them needs to be taken apart only.
    same = are_equal(a.receipt, b.receipt)
    b_steps, second = (a_steps, first) if same else read_digests(b.receipt)
    common, in_a, in_b = _common(a_steps, b_steps)
    if not len(common):
        raise SpecError(f"{a.path} and {b.path} have no common step to compare.")
    other = first[in_a] != second[in_b]
    if other.any():
        step = int(common[other.argmax()])
        return Compared(False, [f"rows: step {step} is the first with different rows"])
    return Compared(True, [f"rows: the same in {_told(common)}"])


def _values(a: RunDirectory, b: RunDirectory, *, tolerance: float | None) -> Compared:
    """Every loss within `tolerance`, or every measured value exactly if it is None."""

    def wanted(key: str) -> bool:
        return not tells_of_speed(key) and (tolerance is None or key.endswith("/loss"))

    first, second = (read_curves(run.metrics, wanted) for run in (a, b))
    worst, differing = 0.0, []
    for key in sorted(first.of.keys() & second.of.keys()):
        (a_steps, x), (b_steps, y) = first.of[key], second.of[key]
        common, in_a, in_b = _common(a_steps, b_steps)
        x, y = x[in_a], y[in_b]
        alike, gaps = _alike(x, y, tolerance or 0.0)
        if not alike.all():
            at = int(alike.argmin())
            told = f"{key}: step {int(common[at])} is the first that differs"
            line = f"{told}: {float(x[at])!r} and {float(y[at])!r}"
            grown = None if tolerance is None else _growth(common, x, y, at)
            differing.append((common[at], [line, *([f"{key}: {grown}"] if grown else [])]))
        worst = max(worst, float(np.max(gaps, where=np.isfinite(gaps), initial=0.0)))
    if differing:
        return Compared(False, min(differing)[1])
    common, _, _ = _common(first.steps, second.steps)
    if not len(common):
        return Compared(True, ["values: no step was logged by both"])
    what = "values" if tolerance is None else "losses"
    return Compared(True, [f"{what}: the same in {_told(common)}, largest difference {worst:.3g}"])


def _growth(
    steps: NDArray[Any], x: NDArray[np.float64], y: NDArray[np.float64], at: int
) -> str | None:
    """A text that the difference at index `at` grew from rounding, if it did.

    It did if the first different values are within `_ROUNDING`, and no later value up to
    `at` is more than `_GROWS_BY_AT_MOST` times as far apart as the farthest before it.
    """
    x, y = x[: at + 1], y[: at + 1]
    with np.errstate(invalid="ignore", over="ignore"):
        gaps = np.abs(x - y) / np.maximum(1.0, np.maximum(np.abs(x), np.abs(y)))
    apart = np.flatnonzero(gaps)  # including NaN
    if not len(apart) or not gaps[apart[0]] <= _ROUNDING:
        return None
    farthest = np.maximum(np.maximum.accumulate(gaps), _ONE_ROUNDING)
    if not np.all(farthest[1:] <= _GROWS_BY_AT_MOST * farthest[:-1]):
        return None
    first, last = apart[0], apart[-1]
    return (
        f"grew from rounding: {gaps[first]:.1e} apart at step {int(steps[first])}, "
        f"{gaps[last]:.1e} at step {int(steps[last])}, without a jump between"
    )


def _common(a: NDArray[Any], b: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """The steps in both, increasing, and their indices in each."""
    if np.array_equal(a, b) and np.all(np.diff(a) > 0):
        everywhere = np.arange(len(a))
        return a, everywhere, everywhere
    return np.intersect1d(a, b, return_indices=True)


def _alike(
    x: NDArray[np.float64], y: NDArray[np.float64], tolerance: float
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Whether they are equal as in `math.isclose`, and NaN to NaN; and the differences [N]."""
    with np.errstate(invalid="ignore", over="ignore"):
        gaps = np.abs(x - y)
        near = gaps <= tolerance * np.maximum(1.0, np.maximum(np.abs(x), np.abs(y)))
    return (x == y) | (near & np.isfinite(gaps)) | (np.isnan(x) & np.isnan(y)), gaps


def _weights(a: RunDirectory, b: RunDirectory) -> Compared:
    """The receipts' hashes of every checkpoint, also of removed ones."""
    first, second = read_weights(a.receipt), read_weights(b.receipt)
    common = sorted(first.keys() & second.keys())
    if not common:
        return Compared(False, ["weights: no checkpoint of the same step to compare"])
    for step in common:
        for file in sorted(first[step].keys() | second[step].keys()):
            if not (file in first[step] and file in second[step]):
                told = f"weights: at step {step}, only one of them has {file}"
                return Compared(False, [told])
            if first[step][file] != second[step][file]:
                return Compared(False, [f"weights: {file} differs at step {step}"])
    return Compared(True, [f"weights: the same bits at {_told(common)}"])


def _told(steps: Sequence[Any] | NDArray[Any]) -> str:
    if len(steps) == 1:
        return f"step {int(steps[0])}"
    return f"{len(steps):,} steps from {int(steps[0]):,} to {int(steps[-1]):,}"
