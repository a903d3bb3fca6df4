"""The test loop.  No rank appears in it: `world` is all processes as one."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

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
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    task: Task,
    world: World,
    plan: Plan,
    predictions: Predictions | None = None,
) -> dict[str, float]:
    """Weighted mean of the loss and of each measure over the whole test set, each row once.

    Args:
        predictions: keeps what the model says of each row, where somebody wants it.

    Raises:
        DataBroken: the rows counted are not the rows of the test set.
    """
    tally = Tally(task.measures, micro_batches=plan.test_micro_batches, device=world.device)
    gathered = Gathered(getattr(task, "metrics", {}), world)
    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            world.seed(batch.key)
            outputs = computed(model, batch.inputs, world)
            losses = task.loss(outputs, batch.targets)  # [B] or [B, T]
            require_loss_shape(losses, batch)
            measured = task.measure(outputs, batch.targets)  # [B, measures]
            require_measured_shape(measured, losses, task.measures)
            tally.add(batch.number, losses, measured, batch.weight, rows=len(batch.rows))
            gathered.add(outputs, batch.targets)
            if predictions is not None:
                predictions.add(outputs)
    finally:
        model.train(was_training)
    return tally.means(world, rows=plan.test_rows) | gathered.values()
