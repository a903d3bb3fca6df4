"""Trains and tests the run that a plan describes: build, restore, train, close."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from service.basics.errors import EvenstepError, SpecError, Stopped
from service.checkpoints.checkpoints import Checkpoints, agreed_checkpoint
from service.checkpoints.initial_weights import InitialWeights, settled_weights
from service.checkpoints.snapshots import load_weights
from service.data.batches import Step
from service.data.loaders import require_batch
from service.data.loading import test_batches, train_steps
from service.data.task import (
    Task,
    bring_losses,
    chosen_test_sets,
    files_may_have_moved,
    new_model,
    test_sets,
)
from service.distributed.agreed_stop import StopPoll
from service.distributed.batchnorm import prepare
from service.distributed.contention import cores_shared
from service.distributed.devices import copies_late
from service.distributed.generators import python_and_numpy
from service.distributed.profiler import Profile
from service.distributed.world import World
from service.evaluation.hooks import Hooks, require_hooks
from service.evaluation.predictions import Predictions
from service.evaluation.test_loop import counted_for, test, test_each
from service.health.heartbeat import Heartbeat
from service.health.stop_budget import GracePeriod, StopBudget
from service.health.stop_request import StopRequest
from service.observability.console import LeadOutput
from service.observability.other_writers import require_packages
from service.optimization.buffers import buffers_in_words, plain_state_in_words
from service.optimization.optimizers import Turns
from service.optimization.train_state import TrainState, require_measures
from service.plan.plan import Plan, make_plan
from service.runs.checkpoint_files import saving_in_words
from service.runs.directory import RunDirectory
from service.runs.tracking import Outcome
from service.spec.models import Spec
from service.training.after_step import AfterStep
from service.training.attempt import (
    Attempt,
    Records,
    begin_records,
    closing,
    learn_save_time,
    make_checkpoints,
    opened_attempt,
    opening,
)
from service.training.changed_spec import (
    Options,
    changes_since,
    follow,
    in_words,
    options_of,
    require_something_left,
)
from service.training.own_train_step import OwnTrainStep, TurnsTrainStep
from service.training.receipts import Receipt
from service.training.setup import (
    Prepared,
    drawn_alike,
    prepare_training,
    require_same_numbers,
    together,
)
from service.training.train_loop import train
from service.training.train_step import CompiledTrainStep, TrainStep, is_with_loss


def run(
    plan: Plan,
    task: Task,
    world: World,
    *,
    runs: Path,
    stop: StopRequest,
    fresh: bool = False,
    heartbeat: Heartbeat | None = None,
    grace_periods: Sequence[GracePeriod] = (),
) -> dict[str, float]:
    """Train and test the run of a plan, starting at its newest checkpoint.

    Args:
        heartbeat: records what this process is doing.
        grace_periods: the time that each launcher allows for a stop before it kills the processes.

    Returns:
        The values of the last step; empty if the run was already done.
    Raises:
        Stopped: a stop was requested, and the state is saved.
        EvenstepError: it cannot continue; `exit_code` gives the kind of failure.
    """
    assert plan.spec.batch.micro_batch != "auto", "settle it first: the run's spec has the number"
    heartbeat, say = observed(heartbeat, world), LeadOutput(speaks=world.is_lead)
    require_possible(plan, task)
    prepared = prepare_training(plan, task, world, heartbeat=heartbeat, say=say)
    first = settled_weights(plan.spec, prepared.state.model, world, runs=runs, fresh=fresh)

    # All errors of the user have been found by now, and nothing is written yet.
    with opened_attempt(runs, plan, world, fresh=fresh, heartbeat=heartbeat, say=say) as attempt:
        stopping = StopBudget(grace_periods, say=say)
        checkpoints = make_checkpoints(attempt, stopping)
        restore(checkpoints, prepared, attempt, first)
        learn_save_time(attempt, stopping, prepared.saved_bytes)
        if is_done(prepared.state, plan):
            return nothing_to_do(prepared.state, attempt)
        stop.has_started()
        return carry_out(prepared, task, stop, attempt, checkpoints)


def require_possible(plan: Plan, task: Task) -> None:
    """Check that the task has what the spec asks for, and that the trackers are installed.

    Raises:
        SpecError: something is missing.
    """
    require_measures(plan.spec, task)
    require_hooks(task, plan)
    require_batch(task, plan)
    require_packages(plan.spec.tracking)


def observed(heartbeat: Heartbeat | None, world: World) -> Heartbeat:
    """The heartbeat of this process, which also records collectives and the device."""
    heartbeat = heartbeat or Heartbeat(rank=world.index)
    heartbeat.trace, heartbeat.device_waits = world.trace, world.device.type != "cpu"
    return heartbeat


def restore(
    checkpoints: Checkpoints, prepared: Prepared, attempt: Attempt, first: InitialWeights | None
) -> None:
    """Restore the newest valid checkpoint, and report its step.

    Args:
        first: the initial weights if there is no checkpoint yet.
    Raises:
        EvenstepError: there are checkpoints, but none can be read; on every process.
    """
    state, spec = prepared.state, attempt.plan.spec
    asked = options_of(state.optimizer)
    resumed = checkpoints.restore(state)
    if not resumed:
        together(attempt.world, attempt.require_never_saved)
        begin_with(first, state, attempt)
    take_changes(state, asked, attempt)
    resumed_at = state.step if resumed else None
    attempt.say(opening(attempt, state.model, prepared.found.unreached, resumed_at))
    for line in buffers_in_words(state.model, prepared.found.moving, spec.model.buffers):
        attempt.say(line)
    for line in plain_state_in_words(prepared.found.plain_state):
        attempt.say(line)
    pinned = copies_late(attempt.world.device)
    saving = saving_in_words(prepared.saved_bytes, spec.checkpoint, pinned=pinned)
    attempt.say(f"Checkpoints: {saving}")


def begin_with(first: InitialWeights | None, state: TrainState, attempt: Attempt) -> None:
    """Put the initial weights into the model, and into its average."""
    if first is None:
        return
    first.apply(state.model)
    if state.average is not None:
        first.apply(state.average.model)
    attempt.say(first.in_words())


def take_changes(state: TrainState, asked: Options, attempt: Attempt) -> None:
    """Apply the user's changes of the spec to the restored state, and report their effect.

    Args:
        asked: the options of the optimizer's groups according to the spec.
    Raises:
        SpecError: the state does not support a change, or no step would be left; on every process.
    """
    plan, world, opened = attempt.plan, attempt.world, attempt.opened
    since = world.from_lead(changes_since(opened, state.step))
    new = world.from_lead(list(opened.changed) if opened is not None else [])
    require_something_left(state, plan, new)
    follow(state, asked, since)
    if opened is not None and new:
        attempt.say(in_words(new, old=attempt.directory.read_spec(), plan=plan, step=state.step))


def nothing_to_do(state: TrainState, attempt: Attempt) -> dict[str, float]:
    """Report that the run was already finished, and record it; no values."""
    attempt.say(
        f"Nothing to do: {attempt.directory.path} is done, after step {state.step:,}. Extend it "
        "with --change length.epochs=... or length.steps=..., or start over with --fresh."
    )
    together(attempt.world, attempt.enter_done)
    return {}


def is_done(state: TrainState, plan: Plan) -> bool:
    """Whether all steps of the run are done, or early stopping has ended it."""
    return (state.step >= plan.steps and state.untested is None) or state.ended_early


def carry_out(
    prepared: Prepared,
    task: Task,
    stop: StopRequest,
    attempt: Attempt,
    checkpoints: Checkpoints,
) -> dict[str, float]:
    """Train to the end of the run or of the attempt, and record which one it was.

    Raises:
        Stopped: the attempt ended before the run.
        EvenstepError: it failed; on every process.
    """
    plan, world, state, heartbeat = attempt.plan, attempt.world, prepared.state, attempt.heartbeat
    prepared.updates.begin()
    records = begin_records(attempt, prepared)
    checkpoints.reserve(prepared.saved_bytes)
    training = train_step(prepared, task, attempt, records.receipt)
    after = after_step(prepared, task, stop, attempt, checkpoints, records, training.named)
    outcome: Outcome = "failed"
    unentered: EvenstepError | None = None
    try:
        with (
            collector_at_rest(),
            cores_shared(world.device),
            steps_of(prepared, task, attempt) as steps,
        ):
            last = train(state, steps, training=training, after=after)
        heartbeat.enter("save")
        checkpoints.finish()
        heartbeat.enter("log")
        outcome = "done" if is_done(state, plan) else "stopped"
    finally:
        checkpoints.close()
        records.close(outcome)
        unentered = attempt.end(outcome, step=state.step)
    if outcome == "stopped":
        due = "" if state.untested is None else ", in its test, which is then repeated"
        where = attempt.directory.path
        saved = f"the state is saved in {where}" if state.step else f"{where} has no state yet"
        raise Stopped(
            f"Stopped after step {state.step} of {plan.steps}; {saved}. Run the same command again "
            f"to continue{due}."
        )
    # No process exits before all have finished: a peer that failed now would be alone.
    world.fail_together(unentered)
    attempt.say(closing(state, last, attempt.directory))
    return last


def after_step(
    prepared: Prepared,
    task: Task,
    stop: StopRequest,
    attempt: Attempt,
    checkpoints: Checkpoints,
    records: Records,
    named: Callable[[], dict[str, float]],
) -> AfterStep:
    """What happens between two steps of this run: log, test, save, stop.

    Args:
        named: the losses of the task's own step by name.
    """
    plan, world, heartbeat = attempt.plan, attempt.world, attempt.heartbeat
    hooks = Hooks(
        task, plan=plan, world=world, heartbeat=heartbeat, files=records.logged, say=attempt.say
    )
    return AfterStep(
        task,
        world,
        plan,
        prepared.rows.tests,
        prepared.updates,
        named,
        hooks,
        records.tracker,
        records.receipt,
        checkpoints,
        stop,
        StopPoll(world, most_steps=plan.spec.faults.stop_poll_steps),
        heartbeat,
        prepared.throughput,
        prepared.stragglers,
    )


def train_step(prepared: Prepared, task: Task, attempt: Attempt, receipt: Receipt) -> TrainStep:
    """The train step of this run: with a loss, or with the task's own step."""
    plan, world, heartbeat = attempt.plan, attempt.world, attempt.heartbeat
    updates, stepped, optimizer = prepared.updates, prepared.stepped, prepared.state.optimizer
    first = prepared.exchanges[0].sync
    if stepped is None:
        kind = CompiledTrainStep if is_with_loss(first.model) else TrainStep
        return kind(task, world, plan, first, updates, receipt, heartbeat)
    each = [
        OwnTrainStep(
            task,
            world,
            plan,
            exchange.sync,
            updates,
            receipt,
            heartbeat,
            own_weights=exchange.found.own_weights,
            across=sorted(exchange.found.across),
            stepped=stepped,
            turn=exchange.turn,
            place=place,
        )
        for place, exchange in enumerate(prepared.exchanges)
    ]
    if not isinstance(optimizer, Turns):
        return each[0]
    return TurnsTrainStep(
        task,
        world,
        plan,
        first,
        updates,
        receipt,
        heartbeat,
        turns=each,
        optimizers=optimizer,
    )


@contextmanager
def steps_of(prepared: Prepared, task: Task, attempt: Attempt) -> Iterator[Iterable[Step]]:
    """Run the remaining steps, with a profile if the plan asks for one."""
    state, plan, world = prepared.state, attempt.plan, attempt.world
    data = state.stream or prepared.rows.train
    steps = train_steps(data, task=task, plan=plan, world=world, start=state.step)
    if plan.profile is None:
        yield steps
        return
    tracing = Profile(
        plan.profile,
        directory=attempt.directory.profile,
        device=world.device,
        heartbeat=attempt.heartbeat,
        throughput=prepared.throughput,
        say=attempt.say,
    )
    try:
        yield tracing.over(steps, start=state.step)
    finally:
        tracing.close()


@contextmanager
def collector_at_rest() -> Iterator[None]:
    """A context in which the garbage collector ignores all existing objects.

    With torch loaded that is 200,000 objects, and each full collection would stop training for as
    long as it takes to visit them: 0.1 s.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def test_run(
    spec: Spec,
    task: Task,
    world: World,
    *,
    run: Path,
    checkpoint: str = "latest",
    predictions: Path | None = None,
    data: str | None = None,
) -> dict[str, float]:
    """Test a checkpoint of a run, without its optimizer.

    Args:
        checkpoint: `latest`, `best`, or a step.
        predictions: the file for the predictions of each row.
        data: the test set, if the task has several; None for all of them.
    Raises:
        SpecError: there is no such checkpoint, or it belongs to another model.
        NoCheckpoint: it is damaged.
    """
    # The plan of micro-batches is for training only, so any number of processes can test.
    plan = make_plan(spec, processes=1, train_rows=task.train_rows, test_rows=task.test_rows)
    chosen = agreed_checkpoint(RunDirectory(run).checkpoints, checkpoint, world)
    with files_may_have_moved():
        model = new_model(task, seed=spec.seed)
    model.to(world.device)
    bring_losses(task, world.device)
    prepare(model, spec.model.batchnorm, world)
    average = spec.model.moving_average is not None
    load_weights(chosen.path, model, rename=spec.checkpoint.rename, average=average)
    world.seed_also(python_and_numpy())  # there is no dry run, which would find what is used
    sets = chosen_test_sets(test_sets(task, drawn_alike(spec, task.test_data)), data)
    require_same_numbers(replace(plan, train_rows=None), sets, world)
    if not any(part.rows for part in sets):
        raise SpecError("task.test: has no rows, so there is nothing to test. Give the task some.")
    if predictions is None:
        return test_each(model, sets, task=task, plan=plan, world=world, step=chosen.step)
    if len(sets) > 1:
        names = " or ".join(part.name for part in sets)
        raise SpecError(f"--predictions: the task has several test sets. Add --data {names}.")
    [part] = sets
    plan = replace(plan, test_rows=part.rows)
    kept = Predictions(predictions, task=task, rows=part.rows, world=world)
    batches = test_batches(part.data, task=task, plan=plan, world=world, name=part.name)
    counted = counted_for(task, plan=plan, world=world, step=chosen.step, predictions=kept)
    measures = test(model, batches, world=world, counted=counted)
    kept.write()
    return part.named(measures)
