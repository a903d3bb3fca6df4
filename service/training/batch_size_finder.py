"""The batch-size finder (`batch.micro_batch: auto`), `loader.workers: auto`, and their defaults.

The micro-batch is part of the experiment: dropout is keyed by its number, and BatchNorm may use
its statistics. So its size is determined before the first step, agreed by all processes, stored in
the run's own spec, and never changed afterwards, at any number of processes.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from service.basics.errors import EvenstepError, OutOfMemory, is_out_of_memory
from service.basics.limits import memory_each, workers_each
from service.checkpoints.snapshots import expected_bytes
from service.data.loading import resident_bytes, sample, workers_with_room
from service.data.own_step import SteppedModel
from service.data.task import Task, bring_losses, new_model, step_of, test_sets
from service.distributed.batchnorm import prepare
from service.distributed.devices import forget_peak, peak_bytes
from service.distributed.world import World
from service.optimization.activation_checkpointing import checkpoint_activations
from service.optimization.optimizers import trained_by
from service.plan.plan import (
    Plan,
    largest_micro_batch,
    make_plan,
    share_of_process,
    with_micro_batch,
)
from service.runs.directory import RunDirectory
from service.sharding.sharding import holds_rows, own_rows, stand_alone, told_as_used_outside
from service.spec.files import load_spec
from service.spec.models import Spec
from service.training.dry_run import DryRun, rehearsed, teacher_of
from service.training.setup import build_model, set_up_exchange

_USED_AT_MOST = 0.8  # fraction of the main memory, which other programs use too


def settled(
    spec: Spec,
    *,
    task: Task,
    world: World,
    runs: Path,
    fresh: bool,
    processes: int,
    processes_here: int,
    say: Callable[[str], None],
) -> Spec:
    """The spec with numbers instead of `auto` and of what depends on the device.

    Every process calls it.

    Args:
        processes: the most processes that the job may have; each gets a micro-batch of a step.
        processes_here: processes of the job on this machine, which share its cores and memory.
        say: reports the result to the user.
    Raises:
        OutOfMemory: not even a micro-batch of one row fits.
        SpecError: the task breaks a rule, or the run cannot be read.
        DataBroken: the data set fails on its first row.
    """
    begun = None if isinstance(spec.batch.micro_batch, int) else _begun(spec, world, runs, fresh)
    spec, told = _with_micro_batch(
        spec, begun, task=task, world=world, processes=processes, processes_here=processes_here
    )
    spec, also_told = _with_workers(spec, task=task, world=world, processes_here=processes_here)
    for line in (told, also_told):
        if line and world.is_lead:
            say(line)
    return spec


def _begun(spec: Spec, world: World, runs: Path, fresh: bool) -> Sequence[int | str | None]:
    """The micro-batch with which the run has begun; empty if it has not."""
    begun: list[int | str | None] = []
    failed: EvenstepError | None = None
    if world.is_lead and not fresh:
        try:
            begun = [first.batch.micro_batch for first in _first_spec(runs / spec.name)]
        except EvenstepError as error:
            failed = error
    world.fail_together(failed)
    return world.from_lead(begun)


def _with_micro_batch(
    spec: Spec,
    begun: Sequence[int | str | None] | None,
    *,
    task: Task,
    world: World,
    processes: int,
    processes_here: int,
) -> tuple[Spec, str]:
    """With the micro-batch of the run if it has begun, or else its own; and what to say of it."""
    if begun is None:
        return spec, ""
    if begun:
        return with_micro_batch(spec, begun[0]), ""
    if spec.batch.micro_batch == "auto":
        memory = memory_each(processes_here)
        rows = fitting_rows(spec, task=task, world=world, processes=processes, memory_bytes=memory)
        found = f"batch.micro_batch: auto found {rows} rows, for all of this run."
        return with_micro_batch(spec, rows), found
    share = default_on(world, spec, task=task, processes=processes)
    if share is None:
        return spec, ""
    chosen = (
        f"batch.micro_batch: {share} rows, the share of a process on a device, for all of this "
        "run. Set it if runs at other numbers of processes must have the same results."
    )
    return with_micro_batch(spec, share), chosen


def default_on(world: World, spec: Spec, *, task: Task, processes: int) -> int | None:
    """Rows of the default micro-batch on an accelerator; None if the plan's default holds.

    On a CPU, 32 rows are as fast as more. An accelerator is idle during most of such a pass.
    """
    if world.device.type == "cpu":
        return None
    return share_of_process(spec, processes=processes, train_rows=task.train_rows)


def _with_workers(spec: Spec, *, task: Task, world: World, processes_here: int) -> tuple[Spec, str]:
    """With the number of loader workers of each process; and what to say of it."""
    if isinstance(spec.loader.workers, int):
        return spec, ""
    if spec.loader.workers is None and world.device.type == "cpu":
        return with_workers(spec, 0), ""
    workers, failed = 0, None
    if world.is_lead:
        try:
            workers = default_workers(spec, task=task, world=world, processes_here=processes_here)
        except EvenstepError as error:
            failed = error
    world.fail_together(failed)
    workers = world.from_lead(workers)
    chosen = ""
    if workers and spec.loader.workers is None:
        chosen = (
            f"loader.workers: {workers} for each process, by default on a device with so many "
            "free cores; set loader.workers=0 for none."
        )
    return with_workers(spec, workers), chosen


def default_workers(spec: Spec, *, task: Task, world: World, processes_here: int) -> int:
    """Loader workers of each process if the spec does not give their number.

    By default none on a CPU, where they would take the cores that train.

    Raises:
        DataBroken: the data set fails on its first row.
    """
    most = workers_each(processes_here)
    if spec.loader.workers == "auto":
        return most
    if world.device.type == "cpu" or not most:
        return 0
    return min(most, workers_with_room(task, spec))


def with_workers(spec: Spec, workers: int) -> Spec:
    """The same spec with this number of loader workers, unless it has its own."""
    if isinstance(spec.loader.workers, int):
        return spec
    return spec.model_copy(update={"loader": spec.loader.model_copy(update={"workers": workers})})


def fitting_rows(spec: Spec, *, task: Task, world: World, processes: int, memory_bytes: int) -> int:
    """Rows of the largest micro-batch that fits in every process, in equal parts of the batch.

    Args:
        processes: the number of processes of the run; each gets at least one micro-batch of a step.
        memory_bytes: main memory that this process may use.
    """
    plan = make_plan(
        spec, processes=processes, train_rows=task.train_rows, test_rows=task.test_rows
    )
    if world.device.type != "cpu":
        world.sum(torch.zeros(1, device=world.device))  # now the backend allocates its own memory
    failed: EvenstepError | None = None
    found = 0
    # A sharded model is made by all processes together, so what one of them raises ends all.
    sharded = spec.exchange.shards and world.processes > 1
    bring_losses(task, world.device)
    trial = _sharded_trial(plan, task=task, world=world) if sharded else None
    try:
        trial = trial or _whole_trial(plan, task=task, world=world)
        found = _largest(trial, plan, task=task, world=world, memory_bytes=memory_bytes)
    except EvenstepError as error:
        failed = error
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        failed = OutOfMemory(f"Out of memory with the model alone: {str(error).splitlines()[0]}")
    world.fail_together(failed)
    del trial
    gc.collect()  # the parts of a sharded model refer to each other
    forget_peak(world.device)
    [fewest] = world.highest([-found])
    return _in_equal_parts(plan.global_batch, -fewest, processes)


def _first_spec(place: Path) -> list[Spec]:
    """The spec with which the run started, if it exists."""
    directory = RunDirectory(place)
    there = directory.facts.exists() and directory.spec.exists()
    return [load_spec(directory.regular_spec())] if there else []


def _in_equal_parts(global_batch: int, most: int, processes: int) -> int:
    """Rows of a micro-batch, at most `most`, so that the load of all processes is equal.

    With 96 rows of which 40 fit, on 2 processes: 4 micro-batches of 24, not 40, 40 and 16.
    """
    rounds = math.ceil(math.ceil(global_batch / most) / processes)
    return math.ceil(global_batch / min(rounds * processes, global_batch))


@dataclass(frozen=True)
class _Trial:
    """A model for trial passes, which no other process takes part in."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    held: int
    """Bytes that training needs in addition to a pass."""
    waiting: int = 0
    """Bytes that it needs besides if a process computes several micro-batches of a step."""
    twin: nn.Module | None = None
    """The model for the average, if it is sharded."""


def _whole_trial(plan: Plan, *, task: Task, world: World) -> _Trial:
    model = new_model(task, seed=plan.spec.seed).to(world.device)
    checkpoint_activations(model, plan.spec.model.activation_checkpointing)
    optimizer = trained_by(model, plan.spec, task).optimizer
    held = _held_besides(model, optimizer, plan, processes=world.processes)
    return _Trial(model, optimizer, held)


def _sharded_trial(plan: Plan, *, task: Task, world: World) -> _Trial:
    """A trial whose model is sharded as in training, and then exchanges nothing."""
    spec = plan.spec
    built = build_model(plan, task, world)
    model, own = built.module, step_of(task)
    for each in filter(None, [model, built.twin]):
        root = each if own is None else SteppedModel.of(each, own, world)
        set_up_exchange(root)  # with all processes, for the last time
        stand_alone(root)
    optimizer = trained_by(model, spec, task).optimizer
    weights = sum(p.nbytes for p in model.parameters())
    size = expected_bytes(model, optimizer, averaged=False)  # the average exists already
    state = 2 * weights if size is None else max(0, size - weights)
    held = state * sum(own_rows(p).nbytes for p in model.parameters()) // weights
    # Gradients are exchanged with the last micro-batch, unless the spec says otherwise.
    whole = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    waiting = 0 if spec.exchange.sync_each_micro_batch else whole
    offloaded = spec.exchange.offload
    return _Trial(model, optimizer, 0 if offloaded else held, waiting, built.twin)


def _largest(trial: _Trial, plan: Plan, *, task: Task, world: World, memory_bytes: int) -> int:
    """The largest number of rows, doubled from 1 on, with which a pass fits in this process."""
    most = largest_micro_batch(plan.global_batch, plan.processes)
    on_cpu = world.device.type == "cpu"
    resident = 0 if on_cpu else _resident_bytes(task, world)
    before, found = peak_bytes(world.device), 0
    for rows in _doubled(most):
        held = trial.held + resident + (trial.waiting if rows < most else 0)
        took = peak_bytes(world.device) - before
        if on_cpu and found and took * rows / found > _USED_AT_MOST * memory_bytes - held:
            break  # the kernel would kill a process that uses more
        # On a device this memory is reserved, so that a pass fails here if it would fail in
        # training.
        reserved = None if on_cpu else _reserved(held, trial, world)
        if not _fits(rows, trial, plan, task=task, world=world):
            break
        found = rows
        del reserved
    if not found:
        raise OutOfMemory("Out of memory with a micro-batch of one row. Use a smaller model.")
    return found


def _reserved(size_bytes: int, trial: _Trial, world: World) -> Tensor:
    try:
        return torch.empty(size_bytes, dtype=torch.uint8, device=world.device)
    except RuntimeError as error:
        if not trial.waiting or not is_out_of_memory(error):
            raise
        raise OutOfMemory(
            "Out of memory with the gradients of the whole model, which a process with several "
            "micro-batches holds until the last. Set exchange.sync_each_micro_batch=true."
        ) from error


def _resident_bytes(task: Task, world: World) -> int:
    tests = [part.data for part in test_sets(task, task.test_data())]
    return resident_bytes((task.train_data(), *tests), task, world.device)


def _doubled(most: int) -> Iterator[int]:
    rows = 1
    while rows < most:
        yield rows
        rows *= 2
    yield most


def _held_besides(
    model: nn.Module, optimizer: torch.optim.Optimizer, plan: Plan, *, processes: int
) -> int:
    """Bytes that training needs in addition to a trial pass.

    The state of the optimizer and of the average; and if gradients are exchanged, one more set of
    buckets: while DDP rearranges them, the old ones exist too.
    """
    averaged = plan.spec.model.moving_average is not None
    weights = sum(p.nbytes for p in model.parameters())
    buckets = sum(p.nbytes for p in model.parameters() if p.requires_grad) if processes > 1 else 0
    size = expected_bytes(model, optimizer, averaged=averaged)
    # For an optimizer whose state is unknown before its first step: as much as Adam's.
    return buckets + (2 * weights if size is None else max(0, size - weights))


def _fits(rows: int, trial: _Trial, plan: Plan, *, task: Task, world: World) -> bool:
    """Whether this many rows fit in a pass; with several optimizers, in that of each turn."""
    alone, model = replace(plan, global_batch=rows, micro_batch=rows), trial.model
    try:
        batch = sample(task.train_data(), task=task, plan=alone, world=world)
        normalization = prepare(model, "micro", world)
        average = teacher_of(model, task, plan.spec, twin=trial.twin)
        dry_run = DryRun(
            batch, task=task, world=world, normalization=normalization, average=average
        )
        with told_as_used_outside(model) if holds_rows(model) else nullcontext():
            rehearsed(dry_run, model, trial.optimizer)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        model.zero_grad(set_to_none=True)
        return False
    return True
