"""Sets the optimizer's learning rates once per step, and keeps the state for this."""

from __future__ import annotations

import copy
import inspect
import json
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from service.basics.errors import SpecError, did_you_mean, with_place
from service.data.task import imported
from service.optimization.optimizers import Turns, told_of_turn
from service.plan.early_stopping import EarlyStopping
from service.plan.plan import Plan
from service.plan.schedules import Multiplier, Pace
from service.spec.schedule import CustomScheduleSpec, PlateauSpec, ScheduleSpec


def make_schedule(optimizer: torch.optim.Optimizer, plan: Plan) -> Schedule:
    """The schedule of the plan's spec over the optimizer's groups.

    Raises:
        SpecError: a scheduler by import string cannot be created.
    """
    if not isinstance(optimizer, Turns):
        pace = Pace(plan.warmup, plan.rate)
        return _of_one(optimizer, plan.spec.schedule, pace, steps=plan.steps)
    each = {}
    for name, turn in plan.spec.optimizers.items():
        with told_of_turn(name):
            each[name] = _of_one(
                optimizer.by_name[name], turn.schedule, plan.paces[name], steps=plan.steps
            )
    return SchedulesOfTurns(optimizer, each)


def _of_one(
    optimizer: torch.optim.Optimizer, spec: ScheduleSpec, pace: Pace, *, steps: int
) -> Schedule:
    if isinstance(spec, PlateauSpec):
        return PlateauSchedule(optimizer, pace.rate, spec)
    if isinstance(spec, CustomScheduleSpec):
        return TorchSchedule(optimizer, spec, warmup=pace.warmup, steps=steps)
    return Schedule(optimizer, pace.rate)


class Schedule:
    """Sets the learning rate of every parameter group to its base rate times the multiplier."""

    def __init__(self, optimizer: torch.optim.Optimizer, rate: Multiplier) -> None:
        self._optimizer = optimizer
        self._base = [float(group["lr"]) for group in optimizer.param_groups]
        self._rate = rate
        self._factor = 1.0
        self._used = self._factor
        self.set(0)

    def set(self, step: int) -> None:
        """Set the rates of the update after `step` finished steps."""
        self._used, self._factor = self._factor, self.factor(step)
        if self._factor != self._used:
            self._apply()

    def restart(self, step: int) -> None:
        """Like `set`, for new groups from a loaded state."""
        self.set(step)
        self._apply()

    def _apply(self) -> None:
        for group, base in zip(self._optimizer.param_groups, self._base, strict=True):
            rate = base * self._factor
            if isinstance(group["lr"], Tensor):  # which a compiled step keeps hold of
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def factor(self, step: int) -> float:
        """The multiplier of the base rates in the update after `step` finished steps."""
        return self._rate(step)

    def used(self) -> dict[str, float]:
        """`train/lr` of the update before the last `set`; one key per group if several."""
        rates = self._rates_used()
        if len(rates) == 1:
            return {"train/lr": rates[0]}
        return {f"train/lr/{n}": rate for n, rate in enumerate(rates)}

    def _rates_used(self) -> list[float]:
        return [base * self._used for base in self._base]

    def learn(self, values: Mapping[str, float], step: int) -> None:
        """Process the measures after `step` steps, before the next update."""

    def memory(self) -> dict[str, Any]:
        """Its state for a checkpoint, as JSON."""
        return {}

    def remember(self, memory: Mapping[str, Any]) -> None:
        """Restore the state from a checkpoint; call `set` afterwards."""


class PlateauSchedule(Schedule):
    """Multiplies the rate by `gamma` each time a test measure stops improving.

    Like torch's ReduceLROnPlateau with an absolute threshold, which waits for one test more.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, rate: Multiplier, spec: PlateauSpec
    ) -> None:
        self._spec = spec
        self._early_stopping = EarlyStopping(spec)
        self._resting = 0
        self._lowered = 1.0
        super().__init__(optimizer, rate)

    def factor(self, step: int) -> float:
        return self._rate(step) * self._lowered

    def learn(self, values: Mapping[str, float], step: int) -> None:
        if not self._early_stopping.tested(values):
            return
        if self._resting:
            self._resting -= 1
            self._early_stopping.waited = 0
        if self._early_stopping.ran_out:
            self._lowered = max(self._lowered * self._spec.gamma, self._spec.final)
            self._resting, self._early_stopping.waited = self._spec.cooldown, 0
            used = self._used
            self.set(step)
            self._used = used  # in the update that was just measured

    def memory(self) -> dict[str, Any]:
        return {
            "lowered": self._lowered,
            "resting": self._resting,
            "patience": self._early_stopping.memory(),
        }

    def remember(self, memory: Mapping[str, Any]) -> None:
        if "lowered" not in memory:
            return  # from another schedule: the user has changed it during the run
        self._lowered, self._resting = memory["lowered"], memory["resting"]
        self._early_stopping.remember(memory["patience"])


class TorchSchedule(Schedule):
    """A scheduler of torch.optim.lr_scheduler, or similar, called once per optimizer step.

    The warmup comes before its first step.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, spec: CustomScheduleSpec, *, warmup: int, steps: int
    ) -> None:
        """`steps` are those of the run.

        Raises:
            SpecError: the scheduler cannot be created, or ends before the run.
        """
        self._torch = _made(spec, optimizer)
        self._name = spec.name
        end = getattr(self._torch, "total_steps", None)  # OneCycleLR's, which raises beyond it
        if isinstance(end, int) and end < steps - warmup:
            raise SpecError(
                f"schedule: {spec.name} ends after {end} steps, and the run takes {steps - warmup} "
                f"after the warmup. Use total_steps: {steps - warmup}."
            )
        self._built = copy.deepcopy(self._torch.state_dict())
        self._warmup = warmup
        self._taken = 0
        self._before: list[float] = []
        super().__init__(optimizer, lambda step: min((step + 1) / max(warmup, 1), 1.0))

    def set(self, step: int) -> None:
        self._before = [float(group["lr"]) for group in self._optimizer.param_groups]
        if step <= self._warmup:
            super().set(step)
            return
        while self._taken < step - self._warmup:
            try:
                self._step()
            except Exception as error:  # as when it is created: the user must see it
                raise SpecError(
                    f"schedule: {self._name} says at step {step}: {with_place(error)}"
                ) from error
            self._taken += 1

    def _step(self) -> None:
        if self._taken > 0:
            self._torch.step()
            return
        with warnings.catch_warnings():
            # With several optimizers this one may not have had a turn yet: torch warns about that.
            warnings.filterwarnings("ignore", "Detected call of")
            self._torch.step()

    def restart(self, step: int) -> None:
        if step <= self._warmup:
            super().restart(step)
        # Later the rates are the scheduler's own, and were restored with the state.

    def _rates_used(self) -> list[float]:
        return self._before

    def memory(self) -> dict[str, Any]:
        held = self._torch.state_dict()
        plain = {key: value for key, value in held.items() if _survives_json(value)}
        for key in held.keys() - plain.keys():
            if repr(held[key]) != repr(self._built.get(key)):
                kind = type(held[key]).__name__
                raise SpecError(
                    f"schedule.name: {self._name} remembers {key!r}, a {kind}, which cannot be "
                    "saved. Use a scheduler whose state is numbers, text and lists."
                )
        return {"taken": self._taken, "scheduler": plain}

    def remember(self, memory: Mapping[str, Any]) -> None:
        self._taken = memory["taken"]
        self._torch.load_state_dict({**self._built, **memory["scheduler"]})


class SchedulesOfTurns(Schedule):
    """The schedules of several optimizers, each a function of the steps of the run."""

    def __init__(self, optimizer: Turns, each: Mapping[str, Schedule]) -> None:
        self._each = dict(each)
        super().__init__(optimizer, lambda step: 1.0)

    def set(self, step: int) -> None:
        for schedule in self._each.values():
            schedule.set(step)

    def restart(self, step: int) -> None:
        for schedule in self._each.values():
            schedule.restart(step)

    def used(self) -> dict[str, float]:
        """`train/lr/NAME` of each optimizer; one key per group if several."""
        return {
            f"train/lr/{name}{key.removeprefix('train/lr')}": rate
            for name, schedule in self._each.items()
            for key, rate in schedule.used().items()
        }

    def learn(self, values: Mapping[str, float], step: int) -> None:
        for schedule in self._each.values():
            schedule.learn(values, step)

    def memory(self) -> dict[str, Any]:
        return {name: schedule.memory() for name, schedule in self._each.items()}

    def remember(self, memory: Mapping[str, Any]) -> None:
        for name, schedule in self._each.items():
            schedule.remember(memory[name])


def _survives_json(value: Any) -> bool:
    try:
        return bool(json.loads(json.dumps(value)) == value)
    except (TypeError, ValueError):
        return False


def _made(spec: CustomScheduleSpec, optimizer: torch.optim.Optimizer) -> LRScheduler:
    make, attribute = imported(spec.name, "schedule.name"), spec.name.rpartition(":")[2]
    if not callable(make):
        raise SpecError(f"schedule.name: {spec.name} is a {type(make).__name__}, not a scheduler.")
    if make is ReduceLROnPlateau:
        raise SpecError("schedule.name: ReduceLROnPlateau needs a measure; use name: plateau.")
    known = inspect.signature(make).parameters
    for option in spec.options():
        if option not in known and not any(p.kind is p.VAR_KEYWORD for p in known.values()):
            near = did_you_mean(option, set(known) - {"optimizer", "last_epoch"})
            raise SpecError(f"schedule.{option}: {attribute} has no such option{near}")
    try:
        made = make(optimizer, **spec.options())
    except Exception as error:  # the user must see whatever the scheduler raises
        raise SpecError(f"schedule: {spec.name} says: {type(error).__name__}: {error}") from error
    if not isinstance(made, LRScheduler):
        raise SpecError(f"schedule.name: {spec.name} does not give an LRScheduler of torch.")
    return made
