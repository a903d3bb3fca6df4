"""The train loop and the test loop.  No rank appears in them: `world` is all processes as one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from service import randomness
from service.agreement import StopPoll
from service.batches import Batch, Step, forward
from service.checkpoints import Checkpoints
from service.clock import Clock
from service.errors import Diverged
from service.exchange import Exchange
from service.faults import StopRequest
from service.loading import test_batches
from service.metrics import Gathered, Tally
from service.normalization import Normalization
from service.plan import Plan
from service.predictions import Predictions
from service.pulse import Pulse
from service.receipts import Receipt
from service.state import TrainState
from service.task import Data, Task
from service.tracking import Tracker
from service.world import World


def train(
    state: TrainState,
    steps: Iterable[Step],
    *,
    task: Task,
    world: World,
    plan: Plan,
    exchange: Exchange,
    normalization: Normalization,
    tracker: Tracker,
    receipt: Receipt,
    checkpoints: Checkpoints,
    test_data: Data,
    stop: StopRequest,
    pulse: Pulse,
) -> dict[str, float]:
    """Take optimizer steps until `steps` ends or some process is asked to stop.

    Returns:
        What the last step measured.  `state.step` says whether the run is finished.
    Raises:
        Diverged: the loss is not finite at a step that is logged.
    """
    exchange.model.train()
    clock = Clock()
    values: dict[str, float] = {}
    poll = StopPoll(world, most_steps=plan.spec.faults.stop_poll_steps)
    if poll.agreed(state.step, stop.requested):
        return values
    pulse.enter("data", state.step)
    for step in clock.waiting_for(steps):
        state.optimizer.zero_grad()
        losses: dict[int, Tensor] = {}
        for batch in exchange.over(step.micro_batches):
            last = batch is step.micro_batches[-1]
            pulse.enter("exchange" if last else "forward", state.step, batch.number)
            world.seed(randomness.key(randomness.FORWARD, plan.spec.seed, state.step, batch.number))
            loss_sum = summed_loss(exchange.model, batch, task=task, world=world)
            exchange.backward(loss_sum, step.weight)
            losses[batch.number] = loss_sum.detach()
            receipt.note(state.step, batch)
        pulse.enter("update")
        normalization.finish_step()
        grad_norm = clip(state.model, plan, logging=plan.logs_at(state.step + 1))
        state.optimizer.step()
        state.step += 1
        state.schedule.set(state.step)

        # The plan and the step are equal on every process, so all of them take the branches
        # below together: a collective in one is a collective in all.
        values = {}
        if plan.logs_at(state.step):
            pulse.enter("log", state.step)
            loss = float(total_loss(losses, plan, world) / step.weight)
            require_finite(loss, state.step)
            values = {"train/loss": loss, "train/grad_norm": float(grad_norm)}
            values |= state.schedule.rates(state.step - 1)
            values |= clock.reading(rows_per_step=plan.global_batch)
        if plan.tests_at(state.step):
            batches = test_batches(test_data, task=task, plan=plan, world=world)
            batches = pulse.during("test", batches)
            values |= test(state.model, batches, task=task, world=world, plan=plan)
        pulse.enter("agree", state.step)
        wanted = stop.requested or tracker.stop_requested
        stopping = poll.agreed(state.step, wanted) or plan.stops_at(state.step)
        best = state.improves(values, plan.spec.checkpoint.best)
        saving = plan.saves_at(state.step) or best or stopping
        pulse.enter("log")
        if values or saving:
            receipt.write(state.step)
        if values:
            tracker.log(state.step, values)
        if saving:
            tracker.sync()
            pulse.enter("save")
            checkpoints.save(state)
            pulse.write()
        if plan.tests_at(state.step) or saving:
            clock.restart()
        if stopping:
            break
        pulse.enter("data")
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
            with world.autocast():
                outputs = forward(model, batch.inputs)
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
    with world.autocast():
        losses = task.loss(forward(model, batch.inputs), batch.targets)  # [B] or [B, T]
    return losses.sum() if batch.weight is None else (losses * batch.weight).sum()


def total_loss(losses: Mapping[int, Tensor], plan: Plan, world: World) -> Tensor:
    """The step's summed loss, added up in the order of its micro-batches."""
    each = torch.zeros(plan.micro_batches, dtype=world.wide)  # 0 for what others computed
    for number, loss in losses.items():
        if number < plan.micro_batches:
            each[number] = loss
    return world.sum(each.to(world.device)).sum()


def clip(model: nn.Module, plan: Plan, *, logging: bool) -> Tensor | float:
    """Scale the gradients down to the plan's length; returns the length they had.

    It is not worked out where nobody asks for it: `nan` then.
    """
    if plan.spec.max_grad_norm is not None:
        return nn.utils.clip_grad_norm_(model.parameters(), plan.spec.max_grad_norm)
    if logging:
        return nn.utils.get_total_norm(p.grad for p in model.parameters() if p.grad is not None)
    return math.nan


def require_finite(loss: float, step: int) -> None:
    """Raise where training has gone astray."""
    if not math.isfinite(loss):
        raise Diverged(
            f"The training loss is {loss} at step {step}. Look at train/grad_norm before it, "
            "lower optimizer.lr or set max_grad_norm."
        )
