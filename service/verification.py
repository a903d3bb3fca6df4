"""Whether two runs took the same steps: by their rows, their losses, or to the bit.  No torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from service.durable import told_when_unread
from service.errors import SpecError
from service.receipt_file import read_receipt, read_weights
from service.run_directory import RunDirectory
from service.tracking import read_metrics, tells_of_speed


@dataclass(frozen=True)
class Compared:
    """The outcome, and what there is to say about it."""

    equal: bool
    lines: list[str]


def compare(a: RunDirectory, b: RunDirectory, *, level: str, tolerance: float) -> Compared:
    """Compare two runs, as far as both have come.

    Args:
        level: `rows`, the rows that every step consumed; `losses`, these and every loss within
            `tolerance`, relative or absolute; `bits`, every measured value exactly, and the
            weights too.
    Raises:
        SpecError: one of them is no run, or they have no step in common.
    """
    for run in (a, b):
        run.read_facts()
    with told_when_unread(a.path):
        checks = [_rows(a, b)]
        if level != "rows":
            checks.append(_values(a, b, tolerance=tolerance if level == "losses" else None))
        if level == "bits":
            checks.append(_weights(a, b))
    return Compared(all(check.equal for check in checks), [c for x in checks for c in x.lines])


def _rows(a: RunDirectory, b: RunDirectory) -> Compared:
    first, second = read_receipt(a.receipt), read_receipt(b.receipt)
    common = sorted(first.keys() & second.keys())
    if not common:
        raise SpecError(f"{a.path} and {b.path} have no step in common to compare.")
    for step in common:
        if first[step] != second[step]:
            return Compared(False, [f"rows: step {step} is the first that consumed other rows"])
    return Compared(True, [f"rows: the same in {_told(common)}"])


def _values(a: RunDirectory, b: RunDirectory, *, tolerance: float | None) -> Compared:
    """Every loss within `tolerance`, or every measured value exactly where it is None."""
    first, second = ({row["step"]: row for row in read_metrics(r.metrics)} for r in (a, b))
    common = sorted(first.keys() & second.keys())
    worst = 0.0
    for step in common:
        for key, x, y in _pairs(first[step], second[step], losses_only=tolerance is not None):
            if not _alike(x, y, tolerance or 0.0):
                line = f"{key}: step {int(step)} is the first that differs: {x!r} and {y!r}"
                return Compared(False, [line])
            worst = max(worst, abs(x - y)) if math.isfinite(x - y) else worst
    if not common:
        return Compared(True, ["values: no step was logged by both"])
    what = "values" if tolerance is None else "losses"
    return Compared(True, [f"{what}: the same in {_told(common)}, largest difference {worst:.3g}"])


def _pairs(
    x: Mapping[str, float], y: Mapping[str, float], *, losses_only: bool
) -> Iterator[tuple[str, float, float]]:
    for key in sorted(x.keys() & y.keys()):
        if key in ("step", "epoch") or tells_of_speed(key):
            continue
        if not losses_only or key.endswith("/loss"):
            yield key, x[key], y[key]


def _alike(x: float, y: float, tolerance: float) -> bool:
    if math.isnan(x) or math.isnan(y):
        return math.isnan(x) and math.isnan(y)
    return x == y or math.isclose(x, y, rel_tol=tolerance, abs_tol=tolerance)


def _weights(a: RunDirectory, b: RunDirectory) -> Compared:
    """What the receipts say of every checkpoint there was, kept or removed since."""
    first, second = read_weights(a.receipt), read_weights(b.receipt)
    common = sorted(first.keys() & second.keys())
    if not common:
        return Compared(False, ["weights: no checkpoint of the same step to compare"])
    for step in common:
        for file in first[step]:
            if first[step][file] != second[step].get(file):
                return Compared(False, [f"weights: {file} differs at step {step}"])
    return Compared(True, [f"weights: the same bits at {_told(common)}"])


def _told(steps: list[Any]) -> str:
    if len(steps) == 1:
        return f"step {int(steps[0])}"
    return f"{len(steps):,} steps from {int(steps[0]):,} to {int(steps[-1]):,}"
