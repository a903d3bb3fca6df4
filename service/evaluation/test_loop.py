"""The test loop. It contains no ranks: `world` is all processes as one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn

from service.data.batches import Batch
from service.data.loading import test_batches
from service.data.shapes import require_loss_shape, require_measured_shape
from service.data.task import Task, TestSet, WithLoss, metrics_of, step_of, with_loss
from service.distributed.world import World
from service.evaluation.metrics import Gathered, Tally
from service.evaluation.own_step_test import CountedSteps
from service.evaluation.predictions import Predictions
from service.optimization.precision import computed
from service.plan.plan import Plan


@torch.no_grad()  # and not inference_mode: under FSDP the next training forward would fail
def test(
    model: nn.Module, batches: Iterable[Batch], *, world: World, counted: Counted | CountedSteps
) -> dict[str, float]:
    """Weighted mean of the loss and of each measure over the whole test set, each row once.

    Raises:
        DataBroken: the counted rows are not the rows of the test set.
    """
    with in_eval_mode(model):
        for batch in batches:
            world.seed(batch.key)
            counted.take(model, batch)
    return counted.means()


def test_each(
    model: nn.Module,
    sets: Iterable[TestSet],
    *,
    task: Task,
    plan: Plan,
    world: World,
    step: int,
    over: Over = lambda batches, plan: batches,
) -> dict[str, float]:
    """The measures of each test set after `step` optimizer steps, one set after the other.

    Args:
        over: wraps the micro-batches of a set, whose plan it gets, before the loop.
    """
    values: dict[str, float] = {}
    for part in sets:
        of_set = replace(plan, test_rows=part.rows)
        read = test_batches(part.data, task=task, plan=of_set, world=world, name=part.name)
        batches = over(read, of_set)
        counted = counted_for(task, plan=of_set, world=world, step=step)
        values |= part.named(test(model, batches, world=world, counted=counted))
    return values


Over = Callable[[Iterable[Batch], Plan], Iterable[Batch]]


def counted_for(
    task: Task,
    *,
    plan: Plan,
    world: World,
    step: int,
    predictions: Predictions | None = None,
) -> Counted | CountedSteps:
    """The object that counts a test pass of this task after `step` optimizer steps."""
    own = step_of(task)
    if own is not None:
        return CountedSteps(own, plan=plan, world=world, step=step, predictions=predictions)
    return Counted(with_loss(task), plan=plan, world=world, predictions=predictions)


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """A context in `eval()` mode that restores the mode of the model."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


class Counted:
    """The sums of a test pass so far, on this process."""

    def __init__(
        self, task: WithLoss, *, plan: Plan, world: World, predictions: Predictions | None = None
    ) -> None:
        """`predictions` collects the prediction of each row, if requested."""
        self._task = task
        self._measures = task.measures
        self._world = world
        self._rows = plan.test_rows
        self._count = plan.test_micro_batches
        self._tally = Tally(
            task.measures, micro_batches=plan.test_micro_batches, device=world.device
        )
        self._gathered = Gathered(metrics_of(task), world)
        self._predictions = predictions

    def take(self, model: nn.Module, batch: Batch) -> None:
        """Compute and count one micro-batch.

        Raises:
            SpecError: the task returned a wrong shape.
        """
        outputs = computed(model, batch.inputs, self._world)
        if batch.number >= self._count:  # other processes still compute, and a pass is a collective
            return
        losses = self._task.loss(outputs, batch.targets)  # [B] or [B, T]
        measured = self._task.measure(outputs, batch.targets)  # [B, measures]
        require_loss_shape(losses, batch)
        require_measured_shape(measured, losses, self._measures)
        self._tally.add(batch.number, losses, measured, batch.weight, rows=len(batch.rows))
        self._gathered.add(outputs, batch.targets)
        if self._predictions is not None:
            self._predictions.add(outputs, batch)

    def means(self) -> dict[str, float]:
        """The means over all processes; every process calls it."""
        return self._tally.means(self._world, rows=self._rows) | self._gathered.values()
