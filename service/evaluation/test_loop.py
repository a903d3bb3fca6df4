"""The test loop. No rank appears in it: `world` is all processes as one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from service.data.batches import Batch
from service.data.shapes import require_loss_shape, require_measured_shape
from service.data.task import Task
from service.distributed.world import World
from service.evaluation.metrics import Gathered, Tally
from service.evaluation.predictions import Predictions
from service.optimization.precision import computed
from service.plan.plan import Plan


@torch.no_grad()  # and not inference_mode: under FSDP the next training forward would fail
def test(
    model: nn.Module, batches: Iterable[Batch], *, task: Task, world: World, counted: Counted
) -> dict[str, float]:
    """Weighted mean of the loss and of each measure over the whole test set, each row once.

    Raises:
        DataBroken: the rows counted are not the rows of the test set.
    """
    with in_eval_mode(model):
        for batch in batches:
            world.seed(batch.key)
            outputs = computed(model, batch.inputs, world)
            losses = task.loss(outputs, batch.targets)  # [B] or [B, T]
            measured = task.measure(outputs, batch.targets)  # [B, measures]
            counted.add(batch, outputs, losses, measured)
    return counted.means()


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Set `eval()`, and give the model its own mode back."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


class Counted:
    """What a test pass has counted so far, on this process."""

    def __init__(
        self, task: Task, *, plan: Plan, world: World, predictions: Predictions | None = None
    ) -> None:
        """`predictions` keeps what the model says of each row, where somebody wants it."""
        self._measures = task.measures
        self._world = world
        self._rows = plan.test_rows
        self._tally = Tally(
            task.measures, micro_batches=plan.test_micro_batches, device=world.device
        )
        self._gathered = Gathered(getattr(task, "metrics", {}), world)
        self._predictions = predictions

    def add(self, batch: Batch, outputs: Any, losses: Tensor, measured: Tensor) -> None:
        """Count one micro-batch.

        Raises:
            SpecError: the task gave another shape than it promises.
        """
        require_loss_shape(losses, batch)
        require_measured_shape(measured, losses, self._measures)
        self._tally.add(batch.number, losses, measured, batch.weight, rows=len(batch.rows))
        self._gathered.add(outputs, batch.targets)
        if self._predictions is not None:
            self._predictions.add(outputs)

    def means(self) -> dict[str, float]:
        """The means over all processes; every process calls it."""
        return self._tally.means(self._world, rows=self._rows) | self._gathered.values()
