"""`evenstep check`: every part of a run, once and with little data."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from service.basics.errors import Diverged, EvenstepError, SpecError, told_as_mistake
from service.basics.limits import memory_each
from service.checkpoints.checkpoints import Checkpoints
from service.checkpoints.initial_weights import initial_weights
from service.checkpoints.snapshots import optimizer_state
from service.data.batches import Batch
from service.data.loading import require_short_paths, train_steps, way_of_rows
from service.data.streams import Stream, is_stream
from service.data.task import Task, first_row, load_task, sampling_of, step_of, test_sets
from service.distributed.devices import peak_bytes
from service.distributed.gradient_sync import OverlappedSync
from service.distributed.world import World
from service.evaluation.test_loop import test_each
from service.optimization.buffers import (
    BufferValues,
    buffers_in_words,
    plain_state_in_words,
    written_in_words,
)
from service.optimization.compilation import replays_in_words
from service.optimization.optimizers import Turns, needs_closure
from service.optimization.train_state import TrainState
from service.optimization.updates import Updates
from service.plan.plan import Plan, make_plan, with_micro_batch
from service.runs.directory import require_no_secret
from service.spec.models import CheckpointSpec, ExchangeSpec, Spec
from service.training.batch_size_finder import (
    default_on,
    default_workers,
    fitting_rows,
    with_workers,
)
from service.training.dry_run import DryRun, FirstPass, Rehearsed, nested_in_words
from service.training.own_train_step import after_update_by
from service.training.setup import (
    Model,
    Rehearsal,
    Rows,
    build_model,
    build_optimizer,
    build_state,
    compile_now,
    compiled,
    drawn_alike,
    rehearse,
)
from service.training.worker import require_possible

T = TypeVar("T")

Finding = tuple[str, str]
"""What was checked, and the result."""


def checked(spec: Spec, *, world: World, processes: int = 1) -> Iterator[Finding]:
    """Check every part of a run in this process, each after the previous one has succeeded.

    Args:
        processes: the intended number of processes; used for the arithmetic only.
    Raises:
        SpecError: an error that would end the run before its first step.
        EvenstepError: an error that would end it at its first step, test or checkpoint.
    """
    require_no_secret(spec)
    task, seconds = _timed(lambda: load_task(spec.task, spec.task_args, seed=spec.seed))
    yield "task", f"{_rows(task)} ({seconds:.2f} s)"
    workers = default_workers(spec, task=task, world=world, processes_here=processes)
    spec = with_workers(spec, workers)
    plan = yield from _planned(spec, task, world=world, processes=processes)
    spec = plan.spec
    model, seconds = _timed(lambda: build_model(plan, task, world))
    optimization = build_optimizer(model, plan, task)
    yield "model", f"{_model(model.module, optimization.optimizer)} ({seconds:.2f} s)"
    yield from _initial(spec, model.module)
    # As with one process for each micro-batch, so that a step loads one of them: also if the run
    # cannot have so many processes.
    small = _plan(spec.model_copy(update={"exactness": "rounding"}), task, plan.micro_batches)
    batch, seconds = _timed(lambda: _first_batch(task, small, world))
    read = _size(_bytes((batch.inputs, batch.targets)))
    yield "data", f"{len(batch.rows)} rows, {read} ({seconds:.2f} s)"
    rehearsal = _rehearsed(model, optimization.optimizer, plan, task, world)
    state = build_state(model, optimization, plan, world)
    # Refuses what an update does not support.
    Updates(state, plan=plan, world=world, normalization=model.normalization, say=_say_nothing)
    each = [replace(p, dry_run=replace(p.dry_run, batch=batch)) for p in rehearsal.each]
    activations = yield from _stepped(state, each, found=rehearsal.found, plan=plan)
    if task.test_rows:
        with state.evaluated():
            means, seconds = _timed(lambda: _tested(state.model, task, spec, world))
        told = ", ".join(
            f"{name.removeprefix('test/')} {value:.4g}" for name, value in means.items()
        )
        yield "test", f"{told} ({seconds:.2f} s for one micro-batch)"
    size, seconds = _timed(lambda: _round_trip(state, plan, task, world))
    yield "checkpoint", f"{_size(size)}, read back equal ({seconds:.2f} s)"
    if spec.model.compile:
        yield from _compiled(state, each, spec)
    yield "memory", _memory(state, activations, world)


def _rehearsed(
    model: Model, optimizer: torch.optim.Optimizer, plan: Plan, task: Task, world: World
) -> Rehearsal:
    """The dry run of a run: over the smallest micro-batch of a step."""
    train = drawn_alike(plan.spec, task.train_data)
    rows = Rows(train, [], way_of_rows(train, task=task, spec=plan.spec.loader))
    return rehearse(model, rows, optimizer, plan=plan, task=task, world=world)


def _compiled(state: TrainState, each: Sequence[Rehearsed], spec: Spec) -> Iterator[Finding]:
    """The model compiled in place, if the spec says so; nothing else is computed after it."""
    model, world = state.model, each[0].dry_run.world
    task = each[0].dry_run.task
    callee = each[0].dry_run.callee(model)
    called = compiled(callee, model, task=task, world=world, spec=spec, telling=False)
    for part in each:
        if isinstance(state.optimizer, Turns):
            state.optimizer.begin(str(part.turn))
        _, seconds = _timed(partial(compile_now, part.dry_run, called, model, spec))
        whose = "" if part.turn is None else f"{part.turn}: "
        yield "compile", f"{whose}a forward and a backward pass ({seconds:.2f} s)"
    for line in replays_in_words(spec.model.compilation, world.device):
        yield "compile", line


def _initial(spec: Spec, model: nn.Module) -> Iterator[Finding]:
    """The weights with which the model starts, if the spec names them."""
    if spec.init is not None:
        first = initial_weights(spec.init, model)
        first.apply(model)
        yield "init", first.in_words()


def _planned(
    spec: Spec, task: Task, *, world: World, processes: int
) -> Generator[Finding, None, Plan]:
    """The plan of the run, with the micro-batch size that `auto` finds, or of this device."""
    share = default_on(world, spec, task=task, processes=processes)
    plan = _plan(spec if share is None else with_micro_batch(spec, share), task, processes)
    require_possible(plan, task)
    if spec.batch.micro_batch == "auto":
        memory = memory_each(processes)
        rows, seconds = _timed(
            lambda: fitting_rows(
                spec, task=task, world=world, processes=processes, memory_bytes=memory
            )
        )
        yield "fitting", f"micro-batches of {rows} rows ({seconds:.2f} s)"
        plan = _plan(with_micro_batch(spec, rows), task, processes)
    yield (
        "plan",
        f"{plan.steps:,} steps of {plan.global_batch:,} rows, {plan.micro_batches} micro-batches "
        f"of {plan.micro_batch}: up to {plan.most_processes} processes",
    )
    return plan


def _stepped(
    state: TrainState, each: Sequence[Rehearsed], *, found: FirstPass, plan: Plan
) -> Generator[Finding, None, int]:
    """One step on the micro-batch of the dry run; returns the bytes that its forward pass keeps."""
    model, spec = state.model, plan.spec
    activations = 0
    for part in each:
        if isinstance(state.optimizer, Turns):
            state.optimizer.begin(str(part.turn))
        activations = max(activations, _saved_bytes(model, part.dry_run))
        loss, seconds = _timed(lambda part=part: _step(state, part.dry_run))  # type: ignore[misc]
        part.dry_run.normalization.finish_step()
        follow = after_update_by(part.dry_run.task, state, plan=plan, world=part.dry_run.world)
        if follow is not None:
            follow(part.turn)
        whose = "" if part.turn is None else f"{part.turn}: "
        took = f"({seconds:.2f} s for one micro-batch)"
        yield "step", f"{whose}loss {loss:.4g} on {part.dry_run.world.device.type} {took}"
    state.step += 1
    state.schedule.set(state.step)
    if isinstance(state.optimizer, Turns):
        state.optimizer.end()
    told = buffers_in_words(model, found.moving, spec.model.buffers)
    for line in told + plain_state_in_words(found.plain_state):
        yield ("warning", line[9:]) if line.startswith("WARNING: ") else ("buffers", line)
    if found.unreached:
        names = ", ".join(found.unreached[:8])
        yield "warning", f"the loss does not depend on {names}: never trained"
    if nested := nested_in_words(found, spec):
        yield "warning", nested
    if written := written_in_words(found.written):
        yield "warning", written
    return activations


def row_bytes(task: Task) -> int:
    """Size of the first training row once it is collated."""
    return _bytes(first_row(task))


def _timed(work: Callable[[], T]) -> tuple[T, float]:
    begin = time.perf_counter()
    return work(), time.perf_counter() - begin


def _rows(task: Task) -> str:
    measures = ", ".join(task.measures) or "none"
    train = "a stream of" if task.train_rows is None else f"{task.train_rows:,}"
    return f"{train} training and {task.test_rows:,} test rows, measures: {measures}"


def _plan(spec: Spec, task: Task, processes: int) -> Plan:
    rows = task.train_rows
    return make_plan(
        spec,
        processes=processes,
        train_rows=rows,
        test_rows=task.test_rows,
        sampling=sampling_of(task),
    )


def _model(model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    tensors = list(model.parameters())
    each = optimizer.by_name.values() if isinstance(optimizer, Turns) else [optimizer]
    groups = " and ".join(
        f"{len(one.param_groups)} {'group' if len(one.param_groups) == 1 else 'groups'} of "
        f"{type(one).__name__}"
        for one in each
    )
    return f"{sum(p.numel() for p in tensors):,} parameters in {len(tensors)} tensors, {groups}"


def _first_batch(task: Task, plan: Plan, world: World) -> Batch:
    """The first micro-batch of the run, from the spec's own loader and its workers."""
    data = task.train_data()
    require_short_paths(data, task=task, plan=plan)
    if is_stream(data):
        data = Stream(data, mode=plan.spec.loader.stream, index=0, of=1)
    steps = train_steps(data, task=task, plan=plan, world=world, start=0)
    return next(iter(steps)).micro_batches[0]


def _saved_bytes(model: nn.Module, dry_run: DryRun) -> int:
    """Bytes that one forward pass keeps for its backward pass, without the parameters."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, tuple[int, int]] = {}  # by storage: its first and last byte

    def keep(tensor: Tensor) -> Tensor:
        where = tensor.untyped_storage().data_ptr()
        if where not in own:
            start, end = _extent(tensor)
            first, last = kept.get(where, (start, end))
            kept[where] = (min(first, start), max(last, end))
        return tensor

    before = BufferValues(model)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        dry_run.forward(model)
    before.give_back()
    return sum(end - start for start, end in kept.values())


def _extent(tensor: Tensor) -> tuple[int, int]:
    """The bytes of its storage that a tensor spans, which may be a part of a larger tensor."""
    start = tensor.storage_offset()
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    end = start + last + 1 if tensor.numel() else start
    return int(start * tensor.element_size()), int(end * tensor.element_size())


def _step(state: TrainState, dry_run: DryRun) -> float:
    """One update with one micro-batch; creates the optimizer state that a checkpoint contains."""
    batch, world = dry_run.batch, dry_run.world
    called = dry_run.callee(state.model)
    exchange = OverlappedSync(called, world, spec=ExchangeSpec())
    weight: float | Tensor = len(batch.rows) if batch.weight is None else batch.weight.sum()
    if step_of(dry_run.task) is not None:
        weight = 1.0  # its losses are already divided

    def evaluate() -> Tensor:
        state.optimizer.zero_grad()
        loss_sum = dry_run.loss(exchange.model)
        exchange.backward(loss_sum, weight)
        return loss_sum.detach()

    loss_sum = evaluate()
    if needs_closure(type(state.optimizer)):
        again: Any = lambda: evaluate() / weight  # noqa: E731 - a tensor, where torch says float
        state.optimizer.step(again)
    else:
        state.optimizer.step()
    mean = float(loss_sum / weight)
    if not math.isfinite(mean):
        raise Diverged(
            f"The training loss is {mean} at step 1. Check the data and the loss, or lower "
            "optimizer.lr."
        )
    return mean


def _tested(model: nn.Module, task: Task, spec: Spec, world: World) -> dict[str, float]:
    """The test loop over its first micro-batch: it must run; the values do not matter."""
    values: dict[str, float] = {}
    plan = make_plan(spec, processes=1, train_rows=task.train_rows, test_rows=task.test_rows)
    for part in test_sets(task, task.test_data()):
        rows = min(part.rows, spec.test.micro_batch)
        first = [part._replace(rows=rows)]
        of_set = f" of {part.name}" if part.name else ""
        with told_as_mistake(f"task: the test loop failed over its first {rows} rows{of_set}"):
            values |= test_each(model, first, task=task, plan=plan, world=world, step=0)
    return values


def _round_trip(state: TrainState, plan: Plan, task: Task, world: World) -> int:
    """Bytes of a checkpoint that was written, read into a new model, and compared."""
    with tempfile.TemporaryDirectory(prefix="evenstep-check-") as place:
        waiting = CheckpointSpec(asynchronous=False)
        checkpoints = Checkpoints(
            Path(place), world=world, spec=waiting, facts={}, say=_say_nothing
        )
        checkpoints.save(state)
        model = build_model(plan, task, world)
        fresh = build_state(model, build_optimizer(model, plan, task), plan, world)
        checkpoints.restore(fresh)
        size = sum(path.stat().st_size for path in Path(place).rglob("*") if path.is_file())
    _require_equal(state, fresh)
    return size


def _require_equal(state: TrainState, read: TrainState) -> None:
    before, after = state.model.state_dict(), read.model.state_dict()
    changed = [
        name
        for name, value in before.items()
        if isinstance(value, Tensor)
        and not torch.equal(value.nan_to_num(), after[name].nan_to_num())
    ]
    if changed:
        raise SpecError(
            f"task.model: {', '.join(changed[:8])} was not restored unchanged from a checkpoint. "
            "All trained values of a model must be parameters or buffers in its state_dict()."
        )
    held, read_back = optimizer_state(state)[0], optimizer_state(read)[0]
    same = held.keys() == read_back.keys() and all(
        torch.equal(_bits(value), _bits(read_back[name])) for name, value in held.items()
    )
    if not same:
        raise EvenstepError("The optimizer's state was not restored unchanged from a checkpoint.")


def _bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _optimizer_tensors(state: TrainState) -> list[Tensor]:
    return list(optimizer_state(state)[0].values())


def _memory(state: TrainState, activations: int, world: World) -> str:
    """The memory that one process needs at least, by its parts."""
    weights = _bytes([*state.model.parameters(), *state.model.buffers()])
    gradients = _bytes([p for p in state.model.parameters() if p.requires_grad])
    parts = {
        "weights": weights,
        "gradients": gradients,
        "optimizer": _bytes(_optimizer_tensors(state)),
        "activations": activations,
    }
    told = ", ".join(f"{name} {_size(size)}" for name, size in parts.items())
    text = f"about {_size(sum(parts.values()))} a process: {told}"
    if world.device.type != "cpu":
        text += f"; measured {_size(peak_bytes(world.device))}"
    return text


def _bytes(value: Any) -> int:
    """Bytes of all tensors in a nested value."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(map(_bytes, value.values()))
    return sum(map(_bytes, value)) if isinstance(value, tuple | list) else 0


def _size(count: int) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000  # type: ignore[assignment]
    return f"{count:.3g} GB"


def _say_nothing(text: str) -> None:
    """A check prints its findings only, and not the messages of its parts."""
