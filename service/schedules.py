"""Learning-rate multipliers: pure functions of the step, the same at any number of processes."""

from __future__ import annotations

import math
from collections.abc import Callable

from service.spec import ConstantSpec, CosineSpec, LinearSpec, ScheduleSpec

Multiplier = Callable[[int], float]


def multiplier(schedule: ScheduleSpec, *, warmup: int, total: int) -> Multiplier:
    """Learning-rate multiplier of the optimizer step, counted from 0 to `total` - 1.

    Args:
        warmup: steps of the linear rise; the first step already moves (1 / warmup).
        total: steps of the whole run, warmup included.
    """
    shape = _shape(schedule)

    def at(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return shape((step - warmup) / max(total - warmup, 1))

    return at


def _shape(schedule: ScheduleSpec) -> Callable[[float], float]:
    """Multiplier of the progress after warmup, in [0, 1)."""
    match schedule:
        case ConstantSpec():
            return lambda progress: 1.0
        case LinearSpec(final=final):
            return lambda progress: 1.0 + (final - 1.0) * progress
        case CosineSpec(final=final):
            return lambda progress: cosine(progress, final=final)
    raise AssertionError(f"no shape for {schedule.name!r}")


def cosine(progress: float, *, final: float) -> float:
    """Half a cosine from 1 to `final`.

    Source: Loshchilov & Hutter, arXiv:1608.03983, eq. 5, with one period.
    """
    return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * progress))
