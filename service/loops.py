"""The train loop and the test loop.  No rank appears in them: `world` is all processes as one."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from service import randomness
from service.batches import Batch, Step
from service.checkpoints import Checkpoints
from service.clock import Clock
from service.compiling import compiled_graphs
from service.exchange import Exchange
from service.faults import StopRequest
from service.loading import test_batches
from service.metrics import Gathered, Tally
from service.plan import Plan
from service.precision import computed
from service.predictions import Predictions
from service.receipts import Receipt
from service.state import TrainState
from service.task import Data, Task
from service.tracking import Tracker
from service.updates import Updates
from service.world import World


def train(
    state: TrainState,
    steps: Iterable[Step],
    *,
    task: Task,
    world: World,
    plan: Plan,
    exchange: Exchange,
    updates: Updates,
    tracker: Tracker,
    receipt: Receipt,
    checkpoints: Checkpoints,
    test_data: Data,
    stop: StopRequest,
) -> dict[str, float]:
    """Take optimizer steps until `steps` ends or some process is asked to stop.

    Returns:
        What the last step measured.  `state.step` says whether the run is finished.
    Raises:
        Diverged: a loss or a gradient is not finite, and may not be.
    """
    exchange.model.train()
    clock = Clock()
    values: dict[str, float] = {}
    for step in clock.waiting_for(steps):
        state.optimizer.zero_grad()
        losses: dict[int, Tensor] = {}
        divisor = updates.divisor(step.weight)
        for batch in exchange.over(step.micro_batches):
            world.seed(randomness.key(randomness.FORWARD, plan.spec.seed, state.step, batch.number))
            loss_sum = summed_loss(exchange.model, batch, task=task, world=world)
            exchange.backward(loss_sum, divisor)
            losses[batch.number] = loss_sum.detach()
            receipt.note(state.step, batch)
        updates.apply(losses, step.weight, logging=plan.logs_at(state.step + 1))
        state.schedule.set(state.step)

        # The plan and the step are equal on every process, so all of them take the branches
        # below together: a collective in one is a collective in all.
        values = {}
        if plan.logs_at(state.step):
            values = updates.look()
            values |= state.schedule.rates(state.step - 1)
            values |= clock.reading(rows_per_step=plan.global_batch)
            if plan.spec.model.compile:
                values["train/compiled_graphs"] = compiled_graphs()
        if plan.tests_at(state.step):
            updates.look()  # what has gone astray is neither tested nor, below, saved
            batches = test_batches(test_data, task=task, plan=plan, world=world)
            values |= test(state.tested, batches, task=task, world=world, plan=plan)
        stopping = plan.stops_at(state.step) or (
            plan.polls_at(state.step) and world.any(stop.requested or tracker.stop_requested)
        )
        best = state.improves(values, plan.spec.checkpoint.best)
        saving = plan.saves_at(state.step) or best or stopping
        if saving:
            updates.look()
        if values or saving:
            receipt.write(state.step)
        if values:
            tracker.log(state.step, values)
        if saving:
            tracker.sync()
            checkpoints.save(state)
        if plan.tests_at(state.step) or saving:
            clock.restart()
        if stopping:
            break
    return values


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
            world.seed(randomness.key(randomness.TEST, plan.spec.seed, batch.number))
            outputs = computed(model, batch.inputs, world)
            losses = task.loss(outputs, batch.targets)  # [B] or [B, T]
            measured = task.measure(outputs, batch.targets)  # [B, measures]
            tally.add(batch.number, losses, measured, batch.weight, rows=len(batch.rows))
            gathered.add(outputs, batch.targets)
            if predictions is not None:
                predictions.add(outputs)
    finally:
        model.train(was_training)
    return tally.means(world, rows=plan.test_rows) | gathered.values()


def summed_loss(model: nn.Module, batch: Batch, *, task: Task, world: World) -> Tensor:
    """Weighted sum of the losses of one micro-batch: a scalar with a graph."""
    losses = task.loss(computed(model, batch.inputs, world), batch.targets)  # [B] or [B, T]
    return losses.sum() if batch.weight is None else (losses * batch.weight).sum()
