"""Learning-rate schedules: pure functions of the step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

from service.basics.errors import SpecError
from service.spec.extending import UNITS
from service.spec.schedule import (
    ConstantSpec,
    CosineRestartsSpec,
    CosineSpec,
    CustomScheduleSpec,
    ExponentialSpec,
    InverseSqrtSpec,
    LinearSpec,
    MultiStepSpec,
    OneCycleSpec,
    PlateauSpec,
    PolynomialSpec,
    ScheduleSpec,
    StepSpec,
    WarmupStableDecaySpec,
)

Multiplier = Callable[[int], float]


class Pace(NamedTuple):
    """How the learning rate of one of several optimizers changes."""

    warmup: int
    """Steps of its warmup."""
    rate: Multiplier


@dataclass(frozen=True)
class Length:
    """The length of a run, to convert durations in epochs and fractions to steps."""

    steps: int
    steps_per_epoch: Fraction | None = None
    """None for a stream, which has no number of rows."""

    def exactly(self, schedule: ScheduleSpec, word: str) -> Any:
        """Steps of the duration `word`, such as `warmup`; a list if the duration is a list.

        None if the user did not set it.  An epoch need not be a whole number of steps.

        Raises:
            SpecError: it is in epochs, and the data is a stream.
        """
        # The decimal number as written: 0.1 of 30 steps is 3, not 3.0000000000000004.
        steps = (Fraction(1), self.steps_per_epoch, Fraction(self.steps))
        for unit, each in zip(UNITS, steps, strict=True):
            given = getattr(schedule, f"{word}_{unit}", None)
            if given is None:
                continue
            if each is None:
                raise SpecError(
                    f"schedule.{word}_{unit}: the training data is a stream, which has no number "
                    "of rows. Count in steps."
                )
            if isinstance(given, tuple):
                return [Fraction(str(value)) * each for value in given]
            return Fraction(str(given)) * each
        return None

    def whole(self, schedule: ScheduleSpec, word: str, *, default: float) -> int:
        """The same as the nearest whole number of steps; `default` is rounded too."""
        exact = self.exactly(schedule, word)
        return round(default if exact is None else exact)


def multiplier(schedule: ScheduleSpec, length: Length) -> Multiplier:
    """Learning-rate multiplier of the optimizer step, counted from 0 to `length.steps` - 1.

    The first step of a warmup already trains (1 / warmup).  What `plateau` and a scheduler of
    torch add is not a function of the step: see `service.optimization.learning_rates`.
    """
    warmup = length.whole(schedule, "warmup", default=0)
    shape = _shape(schedule, length, warmup)

    def at(step: int) -> float:
        return (step + 1) / warmup if step < warmup else shape(step)

    return at


def pace(schedule: ScheduleSpec, length: Length) -> Pace:
    """The pace of a schedule for a run of this length."""
    return Pace(length.whole(schedule, "warmup", default=0), multiplier(schedule, length))


def _shape(schedule: ScheduleSpec, length: Length, warmup: int) -> Multiplier:
    """Multiplier of the steps after the warmup."""
    rest = max(length.steps - warmup, 1)
    match schedule:
        case ConstantSpec() | PlateauSpec() | CustomScheduleSpec():
            return lambda step: 1.0
        case LinearSpec(final=final):
            return lambda step: polynomial((step - warmup) / rest, power=1.0, final=final)
        case CosineSpec(final=final):
            return lambda step: cosine((step - warmup) / rest, final=final)
        case CosineRestartsSpec(final=final, growth=growth):
            cycle = max(length.whole(schedule, "cycle", default=0), 1)
            return lambda step: cosine(in_cycle(step - warmup, cycle, growth), final=final)
        case PolynomialSpec(final=final, power=power):
            return lambda step: polynomial((step - warmup) / rest, power=power, final=final)
        case ExponentialSpec(gamma=gamma):
            every = length.exactly(schedule, "every")
            return lambda step: gamma ** float((step - warmup) / every)
        case StepSpec(gamma=gamma):
            every = length.exactly(schedule, "every")
            return lambda step: float(gamma ** math.floor(step / every))
        case MultiStepSpec(gamma=gamma):
            moments = length.exactly(schedule, "at")
            return lambda step: float(gamma ** sum(moment <= step for moment in moments))
        case OneCycleSpec() as cycle_spec:
            rise = length.exactly(schedule, "rise")
            peak = float(0.3 * rest if rise is None else rise) - 1
            return lambda step: one_cycle(step - warmup, peak, rest - 1, cycle_spec)
        case InverseSqrtSpec():
            scale = max(length.whole(schedule, "timescale", default=warmup or 1), 1)
            return lambda step: inverse_sqrt(step - warmup, timescale=scale)
        case WarmupStableDecaySpec(shape=bend, final=final):
            wanted = length.whole(schedule, "decay", default=0.2 * length.steps)
            decay = max(min(wanted, rest), 1)  # it begins at the full rate, after the warmup
            begin = length.steps - decay
            return lambda step: decayed(max(step - begin, 0) / decay, bend=bend, final=final)
    raise AssertionError(f"no shape for {schedule.name!r}")


def cosine(progress: float, *, final: float) -> float:
    """Half a cosine from 1 to `final`.

    Source: Loshchilov & Hutter, arXiv:1608.03983, eq. 5, with one period.
    """
    return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * progress))


def in_cycle(step: int, cycle: int, growth: int) -> float:
    """Progress in [0, 1) of the cycle that `step` is in; each is `growth` times as long.

    Source: Loshchilov & Hutter, arXiv:1608.03983, section 3 (T_0 and T_mult).
    """
    if growth == 1:
        return step % cycle / cycle
    while step >= cycle:
        step, cycle = step - cycle, cycle * growth
    return step / cycle


def polynomial(progress: float, *, power: float, final: float) -> float:
    """From 1 to `final` along (1 - progress) ** power."""
    return final + (1.0 - final) * math.pow(1.0 - progress, power)


def one_cycle(step: int, peak: float, last: int, spec: OneCycleSpec) -> float:
    """Up from `start` to 1 at step `peak`, and down to `final` at step `last`.

    Source: Smith & Topin, arXiv:1708.07120, as torch's OneCycleLR without its third phase.
    """
    bend = cosine if spec.shape == "cosine" else _straight
    if step < peak:
        return spec.start + 1.0 - bend(step / peak, final=spec.start)
    return bend(min((step - peak) / max(last - peak, 1), 1.0), final=spec.final)


def _straight(progress: float, *, final: float) -> float:
    return polynomial(progress, power=1.0, final=final)


def inverse_sqrt(step: int, *, timescale: int) -> float:
    """1 / sqrt(1 + (step + 1) / timescale), `step` counted from the end of the warmup.

    If the timescale is the warmup, this is sqrt(warmup / n) at the n-th step of the run.
    Source: Vaswani et al., arXiv:1706.03762, eq. 3, without its constant factor (the base rate).
    """
    return math.sqrt(timescale / (timescale + step + 1))


def decayed(progress: float, *, bend: str, final: float) -> float:
    """From 1 to `final`: `linear`, `cosine`, or `sqrt` for 1 - sqrt(progress).

    Source: Haegele et al., arXiv:2405.18392, eq. 1 and section 3.
    """
    if bend == "cosine":
        return cosine(progress, final=final)
    return _straight(math.sqrt(progress) if bend == "sqrt" else progress, final=final)
