"""The train loop. It contains no ranks: `world` is all processes as one."""

from __future__ import annotations

from collections.abc import Iterable

from service.data.batches import Step
from service.optimization.train_state import TrainState
from service.training.after_step import AfterStep
from service.training.train_step import TrainStep


def train(
    state: TrainState, steps: Iterable[Step], *, training: TrainStep, after: AfterStep
) -> dict[str, float]:
    """Take optimizer steps until `steps` ends or a process is asked to stop.

    Returns:
        The values of the last step.  `state.step` shows whether the run is finished.
    Raises:
        Diverged: a loss or a gradient is not finite and must be.
    """
    plan, heartbeat = training.plan, training.heartbeat
    training.exchange.model.train()
    if after.poll.agreed(state.step, after.stop.requested) or after.begin(state):
        return {}
    values: dict[str, float] = {}
    if state.untested is not None:  # the last attempt stopped in the test of its last step
        values = state.untested
        if after.conclude(state, values):
            return values
    due = after.next_due(state.step)
    heartbeat.enter("data", state.step)
    after.throughput.restart()
    for step in steps:
        losses = training.backpropagate(state, step)  # zero_grad, forward, loss, backward
        logging = state.step + 1 == due and plan.logs_at(due)
        training.update(state, step, losses, logging=logging)  # clip, optimizer.step, schedule
        if state.step < due:
            heartbeat.enter("data", state.step)
            continue

        # The plan and the step are equal on every process, so all of them take the same branches
        # below: a collective in one is a collective in all.
        values = after.measured(state)
        if after.conclude(state, values):
            break
        due = after.next_due(state.step)
        heartbeat.enter("data")
    return values
