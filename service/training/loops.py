"""The train loop and the test loop.  No rank appears in them: `world` is all processes as one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from service.checkpoints.checkpoints import Checkpoints
from service.data.batches import Batch, Step
from service.data.loading import test_batches
from service.data.shapes import require_loss_shape, require_measured_shape
from service.data.task import Data, Task
from service.distributed.agreed_stop import GivenUp, StopPoll
from service.distributed.gradient_sync import Exchange
from service.distributed.stragglers import Vitals
from service.distributed.world import World
from service.evaluation.metrics import Gathered, Tally
from service.evaluation.predictions import Predictions
from service.health.heartbeat import Pulse
from service.health.stop_request import StopRequest
from service.health.throughput import Clock
from service.optimization.buffers import BufferValues
from service.optimization.compilation import compiled_graphs
from service.optimization.precision import computed
from service.optimization.train_state import TrainState
from service.optimization.updates import Updates
from service.plan.plan import Plan
from service.runs.tracking import Tracker
from service.training.receipts import Receipt


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
    pulse: Pulse,
    clock: Clock,
    vitals: Vitals,
) -> dict[str, float]:
    """Take optimizer steps until `steps` ends or some process is asked to stop.

    Returns:
        What the last step measured.  `state.step` says whether the run is finished.
    Raises:
        Diverged: a loss or a gradient is not finite, and may not be.
    """
    exchange.model.train()
    poll = StopPoll(world, most_steps=plan.spec.faults.stop_poll_steps)
    if poll.agreed(state.step, stop.requested):
        return {}
    conclude = partial(
        conclude_step,
        state,
        task=task,
        world=world,
        plan=plan,
        updates=updates,
        tracker=tracker,
        receipt=receipt,
        checkpoints=checkpoints,
        test_data=test_data,
        stop=stop,
        poll=poll,
        pulse=pulse,
        clock=clock,
    )
    values: dict[str, float] = {}
    if state.untested is not None:  # the last attempt stopped in the test pass of its last step
        values = state.untested
        if conclude(values):
            return values
    due = min(plan.next_due(state.step), poll.next_step)
    pulse.enter("data", state.step)
    clock.restart()
    for step in steps:
        divisor = updates.divisor(step.weight)
        passes = partial(
            backpropagate, state, step, exchange, divisor, task=task, world=world, pulse=pulse
        )
        losses = passes()
        receipt.note(state.step, step.micro_batches)
        again = None
        if updates.asks_again:
            mean_loss = partial(total_loss, plan=plan, world=world, weight=step.weight)
            again = closure(losses, passes, mean_loss, state.model, updates)
        pulse.enter("update")
        logging = state.step + 1 == due and plan.logs_at(due)
        updates.apply(losses, step.weight, logging=logging, closure=again)
        state.schedule.set(state.step)
        if state.step < due:
            pulse.enter("data", state.step)
            continue

        # The plan and the step are equal on every process, so all of them take the branches
        # below together: a collective in one is a collective in all.
        values = {}
        if plan.logs_at(state.step):
            pulse.enter("log", state.step)
            values = updates.look(vitals)
            values |= state.schedule.used()
            values |= clock.reading(rows_per_step=plan.global_batch)
            values |= checkpoints.timings()
            if plan.spec.model.compile:
                values["train/compiled_graphs"] = compiled_graphs()
        if conclude(values):
            break
        due = min(plan.next_due(state.step), poll.next_step)
        pulse.enter("data")
    return values


def conclude_step(
    state: TrainState,
    values: dict[str, float],
    *,
    task: Task,
    world: World,
    plan: Plan,
    updates: Updates,
    tracker: Tracker,
    receipt: Receipt,
    checkpoints: Checkpoints,
    test_data: Data,
    stop: StopRequest,
    poll: StopPoll,
    pulse: Pulse,
    clock: Clock,
) -> bool:
    """Test, log and save as the plan has it for the step just taken; whether to stop after it.

    Args:
        values: what training measured; what the test measures is added.
    """
    state.untested = None

    def wanted() -> bool:
        return stop.requested or tracker.stop_requested

    if plan.tests_at(state.step):
        updates.look()  # what has gone astray is neither tested nor, below, saved
        batches = test_batches(test_data, task=task, plan=plan, world=world)
        batches = pulse.during("test", batches)
        batches = poll.within(batches, rounds=plan.test_rounds, wanted=wanted)
        try:
            with state.evaluated():
                values |= test(state.tested, batches, task=task, world=world, plan=plan)
        except GivenUp:
            state.untested = {name: float(value) for name, value in values.items()}
    pulse.enter("agree", state.step)
    stopping = state.untested is not None or poll.agreed(state.step, wanted())
    stopping |= plan.stops_at(state.step)
    best = state.improves(values, plan.spec.checkpoint.best)
    state.learn(values)
    stopping |= state.ended_early
    saving = plan.saves_at(state.step) or best or stopping
    pulse.enter("log")
    if saving:
        updates.look()
    if values or saving:
        receipt.write(state.step)
    if values and state.untested is None:  # a step has one row, and half of this one is due
        tracker.log(state.step, values)
    if saving:
        pulse.enter("save")
        checkpoints.save(state, records=(tracker, receipt), seal=receipt.seal)
        pulse.write()
    if plan.tests_at(state.step) or saving:
        clock.restart()
    return stopping


def backpropagate(
    state: TrainState,
    step: Step,
    exchange: Exchange,
    divisor: float | Tensor,
    *,
    task: Task,
    world: World,
    pulse: Pulse,
) -> dict[int, Tensor]:
    """Leave the step's gradients in the parameters; a forward and a backward pass per micro-batch.

    Args:
        divisor: what the gradients are divided by: the weight of the step, perhaps scaled.

    Returns:
        The summed loss of each micro-batch that this process computed.
    """
    state.zero_grad()
    losses: dict[int, Tensor] = {}
    last = step.micro_batches[-1]
    for batch in exchange.over(step.micro_batches):
        pulse.enter("exchange" if batch is last else "forward", state.step, batch.number)
        world.seed(batch.key)
        loss_sum = summed_loss(exchange.model, batch, task=task, world=world)
        exchange.backward(loss_sum, divisor)
        losses[batch.number] = loss_sum.detach()
    if state.frozen:
        state.drop_frozen_gradients()
    return losses


def closure(
    losses: dict[int, Tensor],
    evaluate: Callable[[], dict[int, Tensor]],
    mean_loss: Callable[[dict[int, Tensor]], float],
    model: nn.Module,
    updates: Updates,
) -> Callable[[], float]:
    """What LBFGS calls for the loss of the step, and its gradients, at each point that it tries.

    The first point is where the parameters stand, and what was found there is known.  At every
    other one the same micro-batches are computed with the same random numbers, and what a forward
    pass moves besides gradients (BatchNorm's statistics) stays as the first one left it.  Loss
    and gradients are those of all processes, so each of them draws the same conclusions.
    """
    known = [losses]

    def loss() -> float:
        if known:
            return mean_loss(known.pop())
        with unmoved_buffers(model):
            here = evaluate()
        updates.forget()
        return mean_loss(here)

    return loss


@contextmanager
def unmoved_buffers(model: nn.Module) -> Iterator[None]:
    """Give the buffers back the values that they have on entering."""
    before = BufferValues(model)
    yield
    before.give_back()


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


def summed_loss(model: nn.Module, batch: Batch, *, task: Task, world: World) -> Tensor:
    """Weighted sum of the losses of one micro-batch: a scalar with a graph."""
    outputs = computed(model, batch.inputs, world)
    summed = getattr(task, "summed_loss", None)
    if summed is not None and batch.weight is None:
        total: Tensor = summed(outputs, batch.targets)
        return total
    losses = task.loss(outputs, batch.targets)  # [B] or [B, T]
    require_loss_shape(losses, batch)
    return losses.sum() if batch.weight is None else (losses * batch.weight).sum()


def total_loss(
    losses: Mapping[int, Tensor], *, plan: Plan, world: World, weight: float | Tensor
) -> float:
    """The step's mean loss, added up in the order of its micro-batches."""
    each = torch.zeros(plan.micro_batches, dtype=world.wide)  # 0 for what others computed
    for number, loss in losses.items():
        if number < plan.micro_batches:
            each[number] = loss
    return float(world.sum(each.to(world.device)).sum() / weight)
