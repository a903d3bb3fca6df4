"""What training changes: the model, the optimizer, and how many steps they have taken."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from service.averages import MovingAverage
from service.errors import SpecError, did_you_mean
from service.precision import LossScaler
from service.schedules import Multiplier
from service.spec import BestSpec, Spec
from service.streams import Stream
from service.task import Task, measured_by


@dataclass
class TrainState:
    """Everything a checkpoint holds, and nothing else changes from step to step."""

    model: nn.Module
    """Without what is wrapped around it to exchange gradients."""
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    step: int = 0
    """Optimizer steps finished."""
    stream: Stream | None = None
    """Where the training data is read from, if it can only be read one after the other."""
    best: Best | None = None
    """The best test measure so far, where the spec names one."""
    average: MovingAverage | None = None
    """The moving average of the weights, where the spec asks for one."""
    scaler: LossScaler | None = None
    """What keeps fp16's gradients within its range."""
    skipped_steps: int = 0
    """Steps that were counted and not taken."""
    faulty_steps: int = 0
    """Those of them that `faults.skips_allowed` counts: fp16's overflows are not among them."""

    @property
    def tested(self) -> nn.Module:
        """The model that is tested: the average of the weights where there is one."""
        return self.model if self.average is None else self.average.model

    def improves(self, values: Mapping[str, float], wanted: BestSpec | None) -> bool:
        """Whether `values` holds a better measure than any before; if so, it is the best now."""
        if wanted is None or wanted.measure not in values:
            return False
        value = values[wanted.measure]
        sign = 1 if wanted.mode == "max" else -1
        # Asked this way round, a measure that is not a number is never the best.
        if self.best is not None and not sign * value > sign * self.best.value:
            return False
        self.best = Best(step=self.step, measure=wanted.measure, value=value)
        return True


@dataclass(frozen=True)
class Best:
    """A test measure and the step at which it was reached."""

    step: int
    measure: str
    value: float


class Schedule:
    """Holds every parameter group's learning rate at its base rate times the multiplier."""

    def __init__(self, optimizer: torch.optim.Optimizer, rate: Multiplier) -> None:
        self._optimizer = optimizer
        self._base = [group["lr"] for group in optimizer.param_groups]
        self._rate = rate
        self.set(0)

    def set(self, step: int) -> None:
        """Set the rates of the update that follows `step` finished ones."""
        factor = self._rate(step)
        # Asked anew each time: loading a state replaces the optimizer's groups.
        for group, base in zip(self._optimizer.param_groups, self._base, strict=True):
            group["lr"] = base * factor

    def rates(self, step: int) -> dict[str, float]:
        """`train/lr` of the update after `step` finished ones; one key per group if several."""
        factor = self._rate(step)
        if len(self._base) == 1:
            return {"train/lr": self._base[0] * factor}
        return {f"train/lr/{n}": base * factor for n, base in enumerate(self._base)}


def require_best_measure(spec: Spec, task: Task) -> None:
    """Check that the task gives the measure by which the spec wants to know the best checkpoint.

    Raises:
        SpecError: it does not.
    """
    best, known = spec.checkpoint.best, [f"test/{name}" for name in measured_by(task)]
    if best is not None and best.measure not in known:
        near = did_you_mean(best.measure, known)
        raise SpecError(f"checkpoint.best.measure: the test gives no {best.measure!r}{near}")
