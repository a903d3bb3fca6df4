"""Builds a run from its plan, in order, in one function; trains and tests; cleans up."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from service.basics import randomness
from service.basics.errors import EvenstepError, SpecError, Stopped
from service.checkpoints.checkpoints import Checkpoints
from service.checkpoints.snapshots import expected_bytes, load_weights
from service.data.batches import Batch
from service.data.loading import (
    brought_into_memory,
    sample,
    test_batches,
    train_steps,
    way_of_rows,
)
from service.data.streams import Stream, is_stream
from service.data.task import Task, files_may_have_moved, new_model
from service.distributed.batchnorm import prepare
from service.distributed.devices import copies_late, name_of
from service.distributed.generators import seed_generators
from service.distributed.gradient_sync import Exchange, Ordered, Overlapped
from service.distributed.profiler import Profile, Window
from service.distributed.stragglers import Stopwatch, Vitals
from service.distributed.world import World
from service.evaluation.predictions import Predictions
from service.health.heartbeat import Pulse
from service.health.stop_budget import Grace, Stopping, estimated, measured_in
from service.health.stop_request import StopRequest
from service.health.throughput import Clock
from service.observability.console import Voice, console
from service.observability.other_writers import require_packages, second_writers
from service.observability.wandb_writer import WandB
from service.optimization.buffers import buffers_in_words, buffers_of, kept_equal
from service.optimization.compilation import compile_in_place, spare_compiler
from service.optimization.flops import cost_of_fp32, peak_flops
from service.optimization.learning_rates import make_schedule
from service.optimization.moving_average import MovingAverage
from service.optimization.optimizers import (
    frozen_for_now,
    make_optimizer,
    parameter_groups,
    require_its_loss,
    require_sparse_can_travel,
)
from service.optimization.precision import LossScaler
from service.optimization.train_state import TrainState, require_measures
from service.optimization.updates import Updates
from service.plan.early_stopping import Patience
from service.plan.plan import Plan, make_plan
from service.runs.checkpoint_files import find_checkpoint, saving_in_words
from service.runs.directory import OpenRun, RunDirectory, open_run, versions
from service.runs.tracking import MetricsFile, Outcome, Tracker, Writer
from service.spec.files import fingerprint
from service.spec.models import Spec
from service.training.dry_run import Trial
from service.training.loops import test, train
from service.training.receipts import Receipt

T = TypeVar("T")


def run(
    plan: Plan,
    task: Task,
    world: World,
    *,
    runs: Path,
    stop: StopRequest,
    fresh: bool = False,
    pulse: Pulse | None = None,
    profile: Window | None = None,
    graces: Sequence[Grace] = (),
) -> dict[str, float]:
    """Train and test the run that the plan describes, from its newest checkpoint on.

    Args:
        pulse: is told what this process is doing.
        profile: the steps to trace.
        graces: who gives a stop how long before the processes are killed.

    Returns:
        The values of the last step; empty when the run was done before.
    Raises:
        Stopped: it was asked to stop, and its state is saved.
        EvenstepError: it cannot go on; its `exit_code` says of what kind the reason is.
    """
    spec = plan.spec
    assert spec.batch.micro_batch != "auto", "settle it first: the run's spec holds the number"
    pulse = pulse or Pulse(rank=world.index)
    pulse.trace = world.trace
    pulse.device_waits = world.device.type != "cpu"
    require_measures(spec, task)
    require_packages(spec.tracking)
    if profile is not None and profile.first > plan.steps:
        raise SpecError(
            f"--profile: the run ends after step {plan.steps}, before step {profile.first}."
        )
    train_data, test_data = drawn_alike(spec, task.train_data), drawn_alike(spec, task.test_data)
    rows_come = way_of_rows(train_data, task=task, spec=spec.loader)
    train_data, test_data = together(
        world,
        lambda: [
            brought_into_memory(data, task=task, plan=plan, world=world)
            for data in (train_data, test_data)
        ],
    )

    ordered = spec.exactness == "bitwise"
    weights_key = randomness.key(randomness.WEIGHTS, spec.seed)
    seed_generators(weights_key)
    torch.manual_seed(weights_key)  # those of the devices too
    model = new_model(task).to(world.device)
    normalization = prepare(model, spec.model.batchnorm, world, exchanged=ordered)
    if spec.model.channels_last:
        nhwc: Any = {"memory_format": torch.channels_last}  # unknown to the types of Module.to
        model.to(**nhwc)
    require_sparse_can_travel(model, spec, device=world.device.type, many=world.processes > 1)
    groups = parameter_groups(model, spec.optimizer)
    if not spec.model.compile:
        spare_compiler()
    optimizer = make_optimizer(model, spec.optimizer, groups)
    require_its_loss(optimizer, spec)
    schedule = make_schedule(optimizer, plan)

    batch = sample(train_data, task=task, plan=plan, world=world)
    two_rows: Batch | None = None
    if len(batch.rows) == 1 < plan.micro_batch:
        two_rows = sample(train_data, task=task, plan=plan, world=world, rows=2)
    trial = Trial(batch, task=task, world=world, normalization=normalization, two_rows=two_rows)
    found = trial.first(model)
    world.suit_threads(found.flops_a_row and found.flops_a_row * plan.micro_batch)
    world.seed_also(found.drawn)
    unreached = found.unreached
    buffers = buffers_of(
        model,
        found.moving,
        rule=spec.model.buffers,
        micro_batches=plan.micro_batches,
        world=world,
        bitwise=ordered,
    )
    peak = peak_flops(world.device, spec.model.precision)
    clock = Clock(
        pulse,
        flops_a_row=found.flops_a_row,
        peak_flops=None if peak is None else peak * world.processes,
    )
    average = MovingAverage(model, spec.model.moving_average) if spec.model.moving_average else None
    scaler = LossScaler(model, world.device) if spec.model.precision == "fp16" else None
    if spec.model.compile:  # within what wraps it, which then exchanges while it computes
        compile_in_place(model, telling=world.is_lead)
        if average is not None:
            compile_in_place(average.model, telling=False)
    stopwatch = Stopwatch(world.device)
    timed = stopwatch if world.processes > 1 else None
    # Where a step may be skipped, all processes have to learn from the gradients that it shall be.
    telling = spec.faults.on_non_finite == "skip" or scaler is not None
    exchange: Exchange
    if ordered:
        exchange = Ordered(
            model,
            world,
            unreached=unreached,
            gathered=[*normalization.sums(), *(buffers.sums if buffers is not None else ())],
            telling=telling,
            stopwatch=timed,
        )
    else:
        exchange = Overlapped(
            model,
            world,
            find_unused=bool(unreached),
            spec=spec.exchange,
            telling=telling,
            stopwatch=timed,
        )
        if spec.model.compile:
            trial.compile(exchange.model, model)
        trial.settle_buckets(exchange.model, model)
    exchange = kept_equal(exchange, buffers)
    state = TrainState(
        model,
        optimizer,
        schedule,
        early_stopping=Patience(spec.early_stopping) if spec.early_stopping else None,
        frozen=frozen_for_now(model, groups),
        average=average,
        scaler=scaler,
    )
    say = Voice(speaks=world.is_lead)
    vitals = Vitals(world, rounds=plan.rounds, clock=clock, stopwatch=stopwatch, say=say)
    updates = Updates(
        state, plan=plan, world=world, normalization=normalization, buffers=buffers, say=say
    )
    saved_bytes = expected_bytes(model, optimizer, averaged=average is not None)

    # Whatever a person can have got wrong is found by now, and nothing is written yet.
    opened = together(world, lambda: _open(runs, spec, world=world, fresh=fresh))
    directory = RunDirectory(runs / spec.name)
    with closed_on_failure(opened):
        together(world, lambda: pulse.settle(directory))
    if is_stream(train_data):
        mode, index, of = spec.loader.stream, world.index, world.processes
        state.stream = Stream(train_data, mode=mode, index=index, of=of, seed=spec.seed)
    stopping = Stopping(graces, say=say)
    checkpoints = Checkpoints(
        directory.checkpoints,
        world=world,
        spec=spec.checkpoint,
        rename=spec.checkpoint.rename,
        pulse=pulse,
        facts={
            "processes": world.processes,
            "train_rows": plan.train_rows,
            "spec_sha256": fingerprint(spec),
            "versions": versions(),
        },
        say=say,
        stopping=stopping,
    )
    with closed_on_failure(opened):
        resumed = checkpoints.restore(state)
        if not resumed:
            together(world, lambda: opened.require_never_saved() if opened else None)
    say(_opening(plan, world, model, directory, unreached, state.step if resumed else None))
    for line in buffers_in_words(model, found.moving, spec.model.buffers):
        say(line)
    pinned = copies_late(world.device)
    say(f"Checkpoints: {saving_in_words(saved_bytes, spec.checkpoint, pinned=pinned)}")
    if opened is not None and graces:
        attempts = opened.facts["attempts"]
        takes = measured_in(attempts) or estimated(saved_bytes, directory.path)
        if takes is not None:
            stopping.learned(takes.save_seconds, takes.how)
    if (state.step >= plan.steps and state.untested is None) or state.ended_early:
        say(f"Nothing to do: {directory.path} is done. Begin again with --fresh.")
        with closed_on_failure(opened):
            together(world, lambda: opened.enter_done() if opened else None)
        if opened:
            opened.close()
        return {}

    stop.has_started()
    with closed_on_failure(opened):
        together(
            world,
            lambda: _start_attempt(
                opened, plan, world, step=state.step, started=pulse.started, data=rows_come
            ),
        )
        checkpoints.reserve(saved_bytes)
        receipt = together(
            world, lambda: Receipt(directory.receipt, world=world, step=state.step, say=say)
        )
        tracker = together(
            world, lambda: _tracker(plan, opened, world=world, step=state.recorded_step, voice=say)
        )
    steps = train_steps(
        state.stream or train_data, task=task, plan=plan, world=world, start=state.step
    )
    tracing: Profile | None = None
    if profile is not None:
        tracing = Profile(
            profile,
            directory=directory.profile,
            device=world.device,
            pulse=pulse,
            clock=clock,
            say=say,
        )
        steps = tracing.over(steps, start=state.step)
    outcome: Outcome = "failed"
    unentered: EvenstepError | None = None
    try:
        with collector_at_rest():
            last = train(
                state,
                steps,
                task=task,
                world=world,
                plan=plan,
                exchange=exchange,
                updates=updates,
                tracker=tracker,
                receipt=receipt,
                checkpoints=checkpoints,
                test_data=test_data,
                stop=stop,
                pulse=pulse,
                clock=clock,
                vitals=vitals,
            )
        pulse.enter("save")
        checkpoints.finish()
        pulse.enter("log")
        is_last = state.step >= plan.steps and state.untested is None
        outcome = "done" if is_last or state.ended_early else "stopped"
    finally:
        if tracing is not None:
            tracing.close()
        checkpoints.close()
        receipt.close()
        tracker.close(outcome)
        if opened:
            unentered = _end_attempt(opened, outcome, step=state.step, pulse=pulse)
    if outcome == "stopped":
        due = "" if state.untested is None else ", in its test, which is then done anew"
        raise Stopped(
            f"Stopped after step {state.step} of {plan.steps}; the state is saved in "
            f"{directory.path}. Run the same command again to continue{due}."
        )
    # Nobody leaves as finished before everybody has: a peer that failed now would be alone.
    world.fail_together(unentered)
    say(_closing(state, last, directory))
    return last


@contextmanager
def collector_at_rest() -> Iterator[None]:
    """Meanwhile the garbage collector passes by all that is there now, and looks at what comes.

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
) -> dict[str, float]:
    """What the test loop measures of a checkpoint of a run, and of its optimizer nothing.

    Args:
        checkpoint: `latest`, `best`, or a step.
        predictions: where to write what the model says of each row.
    Raises:
        SpecError: there is no such checkpoint, or it is not of this model.
        NoCheckpoint: it is damaged.
    """
    # Testing has no micro-batches to share out, so any number of processes can take part.
    plan = make_plan(spec, processes=1, train_rows=task.train_rows, test_rows=task.test_rows)
    chosen = find_checkpoint(RunDirectory(run).checkpoints, checkpoint)
    with files_may_have_moved():
        model = new_model(task)
    model.to(world.device)
    prepare(model, spec.model.batchnorm, world)
    average = spec.model.moving_average is not None
    load_weights(chosen.path, model, rename=spec.checkpoint.rename, average=average)
    kept = Predictions(predictions, task=task, world=world) if predictions else None
    test_data = drawn_alike(spec, task.test_data)
    batches = test_batches(test_data, task=task, plan=plan, world=world)
    measures = test(model, batches, task=task, world=world, plan=plan, predictions=kept)
    if kept is not None:
        kept.write()
    return measures


def drawn_alike(spec: Spec, bring: Callable[[], T]) -> T:
    """What `bring` returns, drawn from the same random numbers on every process, every time.

    Two that split one set of rows at random, each for its own part, split it in the same way.
    """
    seed_generators(randomness.key(randomness.TASK, spec.seed))
    return bring()


def together(world: World, act: Callable[[], T]) -> T:
    """What `act` returns on this process.

    Raises:
        EvenstepError: it failed on some process, and so do all.
    """
    done: list[T] = []
    failed: EvenstepError | None = None
    try:
        done.append(act())
    except EvenstepError as error:
        failed = error
    world.fail_together(failed)
    return done[0]


@contextmanager
def closed_on_failure(opened: OpenRun | None) -> Iterator[None]:
    """Let others have the run where it does not come to its first step."""
    try:
        yield
    except BaseException:
        if opened is not None:
            opened.close()
        raise


def _open(runs: Path, spec: Spec, *, world: World, fresh: bool) -> OpenRun | None:
    """The run, opened by the lead; None on the other processes."""
    return open_run(runs, spec, fresh=fresh) if world.is_lead else None


def _start_attempt(
    opened: OpenRun | None, plan: Plan, world: World, *, step: int, started: float, data: str
) -> None:
    """Enter the attempt, on the lead, unless none got any further; `data` says how rows come."""
    if opened is None:
        return
    opened.start_attempt(
        processes=plan.processes,
        device=str(world.device),
        step=step,
        started=started,
        data=data,
        most_failures=plan.spec.faults.attempts_without_progress,
    )


def _end_attempt(
    opened: OpenRun, outcome: Outcome, *, step: int, pulse: Pulse
) -> EvenstepError | None:
    """Enter how the attempt ended; what kept it from being entered.

    The state is saved by then, or something worse is being told: it takes nobody's place.
    """
    unentered: EvenstepError | None = None
    try:
        opened.end_attempt(
            outcome,
            step=step,
            seconds=pulse.seconds(),
            longest_save_seconds=pulse.longest_save_seconds,
        )
    except EvenstepError as error:
        what = "The run is done and saved" if outcome == "done" else f"This attempt {outcome}"
        unentered = type(error)(f"{error} {what}; the same command, run again, enters it there.")
        if outcome != "done":
            print(f"WARNING: {unentered}", file=sys.stderr, flush=True)
    opened.close()
    return unentered


def _tracker(
    plan: Plan, opened: OpenRun | None, *, world: World, step: int, voice: Voice
) -> Tracker:
    """Writers on the lead, the file of metrics first; none on the others."""
    resume_step = step if step else None
    if opened is None:
        return Tracker(epoch_at=plan.epoch, resume_step=resume_step)
    directory, wandb = opened.directory, plan.spec.tracking.wandb
    config = _config(plan, opened)
    screen = console(plan.steps, resume_step=resume_step)
    voice.speak_through(screen)
    metrics = MetricsFile(directory.metrics, resume_step=resume_step, say=voice)
    writers: list[Writer] = [metrics, screen]
    if wandb is not None:
        writers.append(
            WandB(
                wandb,
                run_id=opened.id,
                name=plan.spec.name,
                directory=directory.path,
                config=config,
                say=screen.say,
                resume_step=resume_step,
            )
        )
    writers += second_writers(
        plan.spec.tracking,
        directory=directory.path,
        name=plan.spec.name,
        config=config,
        resume_step=resume_step,
        say=screen.say,
    )
    return Tracker(writers, epoch_at=plan.epoch, resume_step=resume_step)


def _config(plan: Plan, opened: OpenRun) -> dict[str, Any]:
    """What trackers show as the configuration: the spec as resolved, and what it ran on."""
    return {
        **plan.spec.model_dump(mode="json"),
        "spec_sha256": fingerprint(plan.spec),
        "processes": plan.processes,
        "versions": opened.facts["versions"],
        "git": opened.facts["git"],
    }


def _opening(
    plan: Plan,
    world: World,
    model: nn.Module,
    directory: RunDirectory,
    unreached: list[str],
    resumed_at: int | None,
) -> str:
    """What a person wants to know before the first step."""
    parameters = sum(p.numel() for p in model.parameters())
    many = "process" if world.processes == 1 else "processes"
    lines = [
        f"{plan.spec.name}: {world.processes} {many} on {world.device.type} | "
        f"{parameters:,} parameters | {_rows(plan)} training and {plan.test_rows:,} test rows"
        f" | {plan.steps:,} steps of {plan.global_batch} rows in micro-batches of "
        f"{plan.micro_batch} | {directory.path}"
    ]
    given_up = cost_of_fp32(name_of(world.device)) if plan.spec.model.precision == "fp32" else None
    if given_up is not None:
        lines.append(given_up)
    if unreached:
        lines.append(f"The loss does not depend on {', '.join(unreached[:8])}: never trained.")
    if resumed_at is not None:
        lines.append(f"Resuming after step {resumed_at} (epoch {plan.epoch(resumed_at):.2f}).")
    return "\n".join(lines)


def _rows(plan: Plan) -> str:
    return "a stream of" if plan.train_rows is None else f"{plan.train_rows:,}"


def _closing(state: TrainState, last: dict[str, float], directory: RunDirectory) -> str:
    """What came out, and where it lies."""
    tested = ", ".join(f"{k} {v:.4g}" for k, v in last.items() if k.startswith("test/"))
    line = f"Done after step {state.step:,}: {tested or 'no test'}."
    if state.best is not None:
        line += f" Best {state.best.measure} {state.best.value:.4g} at step {state.best.step:,}."
    if state.early_stopping is not None and state.ended_early:
        waited = state.early_stopping
        line += f" Ended early: {waited.spec.measure} did not improve in {waited.waited} tests."
    return f"{line} All of it is in {directory.path}"
