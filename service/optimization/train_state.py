"""The state of training: the model, the optimizer, and the number of finished steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._C._autograd import _profiler_enabled

from service.basics.errors import SpecError, did_you_mean
from service.data.streams import Stream
from service.data.task import Task, measured_by, metrics_of, require_names, step_of
from service.optimization.learning_rates import Schedule
from service.optimization.moving_average import MovingAverage
from service.optimization.optimizers import Frozen, modal, plain_step, step_hooks
from service.optimization.precision import LossScaler
from service.plan.early_stopping import EarlyStopping, is_better
from service.spec.models import BestSpec, Spec
from service.spec.schedule import PlateauSpec


@dataclass
class TrainState:
    """The content of a checkpoint: everything that changes from step to step."""

    model: nn.Module
    """The model without its wrapper for gradient synchronization."""
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    step: int = 0
    """Optimizer steps finished."""
    stream: Stream | None = None
    """The position in the training data, if they are a stream."""
    bests: list[Best] = field(default_factory=list)
    """The best test measures so far, the best one first, if the spec names one."""
    early_stopping: EarlyStopping | None = None
    frozen: Sequence[Frozen] = ()
    """Parameters that are frozen until a later step."""
    average: MovingAverage | None = None
    """The moving average of the weights, if the spec asks for one."""
    scaler: LossScaler | None = None
    """The loss scaler of fp16."""
    skipped_steps: int = 0
    """Skipped steps."""
    untested: dict[str, float] | None = None
    """The values of training at this step, if its test pass was abandoned and is still due."""
    faulty_steps: int = 0
    """Skipped steps that `faults.skips_allowed` counts: all but the overflows of fp16."""
    still: frozenset[str] = frozenset()
    """The parameters that change in updates only, and so does the optimizer's state of them. They
    are saved while the next pass runs."""
    before_update: Callable[[], None] | None = None
    """Called once before the next update."""

    def zero_grad(self) -> None:
        """Clear the gradients, as the optimizer's method does, without its hooks."""
        if type(self.optimizer).zero_grad is not torch.optim.Optimizer.zero_grad:
            self.optimizer.zero_grad()
            return
        for parameter in self._parameters:
            parameter.grad = None

    def permit_update(self) -> None:
        """Wait for whoever still reads the state of the last step."""
        if self.before_update is not None:
            self.before_update()
            self.before_update = None

    def take_step(self) -> None:
        """The step of the optimizer, without hooks and labels for a profiler."""
        if self._plain_step is None or any(self._hooks) or _profiler_enabled():
            self.optimizer.step()
        else:
            self._plain_step(self.optimizer)

    def __post_init__(self) -> None:
        groups = self.optimizer.param_groups
        self._parameters = [parameter for group in groups for parameter in group["params"]]
        self._plain_step = plain_step(self.optimizer)
        self._hooks = step_hooks(self.optimizer)
        self._modal = modal(self.optimizer)
        for optimizer in self._modal:
            optimizer.train()

    @property
    def is_modal(self) -> bool:
        """Whether the optimizer has separate weights for training and for testing."""
        return bool(self._modal)

    @contextmanager
    def evaluated(self) -> Iterator[None]:
        """A context with the optimizer's weights for testing.

        Afterwards the weights are restored bit by bit: the conversion rounds both ways, so a
        run with one more test or save would end in different bits.
        """
        if not self._modal:
            yield
            return
        before = [parameter.detach().clone() for parameter in self._parameters]
        for optimizer in self._modal:
            optimizer.eval()
        try:
            yield
        finally:
            for optimizer in self._modal:
                optimizer.train()
            with torch.no_grad():
                torch._foreach_copy_(self._parameters, before)

    @property
    def ended_early(self) -> bool:
        """Whether the measure of `early_stopping` has not improved for long enough."""
        return self.early_stopping is not None and self.early_stopping.ran_out

    @property
    def recorded_step(self) -> int:
        """The last step whose row is complete."""
        return self.step if self.untested is None else self.step - 1

    def drop_frozen_gradients(self) -> None:
        """Exclude the frozen parameters from the next update."""
        for frozen in self.frozen:
            if self.step < frozen.until_step:
                for parameter in frozen.parameters:
                    parameter.grad = None

    def learn(self, values: Mapping[str, float]) -> None:
        """Pass the measures after this step to the schedule and to early stopping."""
        self.schedule.learn(values, self.step)
        if self.early_stopping is not None:
            self.early_stopping.tested(values)

    def memory(self) -> dict[str, Any]:
        """The state of the schedule and of early stopping for a checkpoint, as JSON."""
        waiting = self.early_stopping.memory() if self.early_stopping else None
        return {"schedule": self.schedule.memory(), "early_stopping": waiting}

    def remember(self, memory: Mapping[str, Any]) -> None:
        """Restore the state from a checkpoint."""
        self.schedule.remember(memory["schedule"])
        if self.early_stopping is not None and memory["early_stopping"] is not None:
            self.early_stopping.remember(memory["early_stopping"])
        self.schedule.restart(self.step)

    @property
    def tested(self) -> nn.Module:
        """The model to test: the moving average of the weights if there is one."""
        return self.model if self.average is None else self.average.model

    @property
    def best(self) -> Best | None:
        """The best measure so far; of equal ones the earliest."""
        return self.bests[0] if self.bests else None

    def improves(
        self, values: Mapping[str, float], wanted: BestSpec | None, *, among: int = 1
    ) -> bool:
        """Whether `values` has a measure among so many best ones; if so, store it."""
        if wanted is None or wanted.measure not in values:
            return False
        value = values[wanted.measure]
        # If the user has changed the measure in the run, old values cannot be compared.
        rivals = [rival for rival in self.bests if rival.measure == wanted.measure]
        beaten = [is_better(value, rival.value, mode=wanted.mode) for rival in rivals]
        place = beaten.index(True) if any(beaten) else len(rivals)
        if place >= among or not is_better(value, None, mode=wanted.mode):
            return False
        new = Best(step=self.step, measure=wanted.measure, value=value)
        self.bests = [*rivals[:place], new, *rivals[place:]][:among]
        return True


@dataclass(frozen=True)
class Best:
    """A test measure and the step at which it was reached."""

    step: int
    measure: str
    value: float


def require_measures(spec: Spec, task: Task, *, known: Sequence[str] | None = None) -> None:
    """Check that the task has the measures that the spec refers to.

    Args:
        known: the values that a task's own step returns in a test; before they are known, only
            the existence of test rows can be checked.
    Raises:
        SpecError: it does not, or has no test rows; or two of them have one name.
    """
    require_names(task)
    told = step_of(task) is None or known is not None
    sets = [f"test/{name}/" for name in getattr(task, "tests", ())] or ["test/"]
    known = [f"{part}{name}" for part in sets for name in known or measured_by(task)]
    # The parts of a metric are known when it is computed.
    parts = tuple(f"{part}{name}/" for part in sets for name in metrics_of(task))
    for where, part in _decided(spec).items():
        found = part.measure in known or part.measure.startswith(parts)
        if told and not found:
            near = did_you_mean(part.measure, known)
            raise SpecError(f"{where}.measure: the test has no {part.measure!r}{near}")
        if task.test_rows == 0:
            raise SpecError(f"{where}: the task has no test rows to measure {part.measure} on.")


def require_measured(spec: Spec, values: Mapping[str, float]) -> None:
    """Check that a test pass returned the measures that the spec refers to.

    Raises:
        SpecError: it did not: a metric has no such part.
    """
    for where, part in _decided(spec).items():
        if part.measure not in values:
            near = did_you_mean(part.measure, values)
            raise SpecError(f"{where}.measure: the test has no {part.measure!r}{near}")


def _decided(spec: Spec) -> dict[str, BestSpec | PlateauSpec]:
    """The sections that refer to a test measure, by their keys."""
    asked: dict[str, BestSpec | PlateauSpec | None] = {
        "checkpoint.best": spec.checkpoint.best,
        "early_stopping": spec.early_stopping,
    }
    asked |= {key: part for key, part in spec.schedules.items() if isinstance(part, PlateauSpec)}
    return {where: part for where, part in asked.items() if part is not None}
