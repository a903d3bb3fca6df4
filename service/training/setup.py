"""Builds what a run trains, part by part, in the order that its random numbers need."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from service.basics import randomness
from service.basics.errors import EvenstepError, SpecError
from service.checkpoints.snapshots import expected_bytes
from service.data.batches import Batch, tensors_of
from service.data.loading import brought_into_memory, sample, way_of_rows
from service.data.own_step import SteppedModel
from service.data.streams import Stream, contents, is_stream
from service.data.task import Data, Task, TestSet, bring_losses, new_model, step_of, test_sets
from service.distributed.batchnorm import Normalization, prepare
from service.distributed.devices import copies_late
from service.distributed.generators import python_and_numpy, seed_generators
from service.distributed.gradient_sync import (
    GradientSync,
    OrderedSync,
    OverlappedSync,
    ReplayedSync,
)
from service.distributed.stragglers import Stopwatch, StragglerDetector
from service.distributed.world import World
from service.health.heartbeat import Heartbeat
from service.health.throughput import Throughput
from service.optimization.activation_checkpointing import (
    checkpoint_activations,
    require_still_buffers,
)
from service.optimization.buffers import Buffers, StillBuffers, buffers_of, kept_equal
from service.optimization.compilation import (
    compile_in_place,
    parts_to_compile,
    replays_in_words,
    spare_compiler,
)
from service.optimization.flops import peak_flops
from service.optimization.learning_rates import Schedule, make_schedule
from service.optimization.moving_average import MovingAverage, copy_for_average
from service.optimization.optimizers import (
    Frozen,
    Turns,
    frozen_for_now,
    modal,
    require_its_loss,
    require_sparse_can_travel,
    sparse_parameters,
    trained_by,
)
from service.optimization.precision import LossScaler
from service.optimization.train_state import TrainState, require_measures
from service.optimization.updates import Updates
from service.plan.early_stopping import EarlyStopping
from service.plan.plan import Plan
from service.remote.rows import StoredRows
from service.sharding.deferred_init import Deferring, NotDeferred, made_deferred
from service.sharding.heap import return_blocks
from service.sharding.sharding import (
    ShardedSync,
    holds_rows,
    is_sharded,
    parameters_by_unit,
    release,
    require_one_type,
    shard,
    told_as_used_outside,
    units_of,
)
from service.spec.models import Spec
from service.training.dry_run import (
    DryRun,
    FirstPass,
    Rehearsed,
    rehearsed,
    require_followed,
    teacher_of,
    together_found,
)
from service.training.own_train_step import after_update_by, require_own_step
from service.training.train_step import ModelWithLoss

T = TypeVar("T")


@dataclass(frozen=True)
class Rows:
    """The data of a run."""

    train: Data
    tests: Sequence[TestSet]
    way: str
    """Describes how the training rows reach the device."""


def bring_rows(plan: Plan, task: Task, world: World) -> Rows:
    """The training and the test data, in memory if the spec says so.

    Raises:
        SpecError: the task does not provide them; on every process.
    """
    spec = plan.spec
    train, test = drawn_alike(spec, task.train_data), drawn_alike(spec, task.test_data)
    sets = test_sets(task, test)
    require_same_numbers(plan, sets, world)
    way = way_of_rows(train, task=task, spec=spec.loader)
    brought = together(
        world,
        lambda: [
            brought_into_memory(data, task=task, plan=plan, world=world)
            for data in (train, *(part.data for part in sets))
        ],
    )
    tests = [part._replace(data=rows) for part, rows in zip(sets, brought[1:], strict=True)]
    return Rows(brought[0], tests, way)


@dataclass(frozen=True)
class Model:
    """The model on its device, its weights drawn from the seed."""

    module: nn.Module
    normalization: Normalization
    """Keeps its BatchNorm layers equal on all processes."""
    twin: nn.Module | None = None
    """The same model again, with the same sharding, for the moving average if there is one."""
    made_whole: str | None = None
    """Why a sharded model was first built in full on each process; None if it was not."""


def build_model(plan: Plan, task: Task, world: World) -> Model:
    """The task's model, with the same weights on every process.

    Raises:
        SpecError: the task does not provide one, or it cannot be trained as specified.
    """
    spec = plan.spec
    if spec.exchange.offload and world.device.type == "cpu":
        raise SpecError(
            "exchange.offload: true keeps weights in main memory that would otherwise be in the "
            "memory of a GPU, but this run computes on the CPU. Leave it out here."
        )
    sharded = spec.exchange.shards and world.processes > 1
    made_whole: str | None = None
    deferred: Deferring | None = None
    if sharded:
        if spec.exchange.return_memory:
            return_blocks()
        module, deferred, made_whole = unit_by_unit(spec, task)
    else:
        module = new_model(task, seed=spec.seed)
    checkpoint_activations(module, spec.model.activation_checkpointing)
    if spec.exchange.shards:
        require_shardable(module, spec)
    twin: nn.Module | None = None
    if sharded:
        twin = copy_for_average(module) if spec.model.moving_average else None
        root = _root_for(module, task, world)
        shard(module, world, spec=spec.exchange, root=root, deferred=deferred)
        if twin is not None:  # it gets its values from the model
            root = _root_for(twin, task, world)
            shard(twin, world, spec=spec.exchange, root=root, filled=False)
    else:
        module.to(world.device)
    bitwise = spec.exactness == "bitwise"
    normalization = prepare(module, spec.model.batchnorm, world, exchanged=bitwise)
    if spec.model.channels_last:
        nhwc: Any = {
            "memory_format": torch.channels_last
        }  # not in the type annotations of Module.to
        module.to(**nhwc)
    require_sparse_can_travel(module, spec, device=world.device.type, many=plan.processes > 1)
    return Model(module, normalization, twin, made_whole)


def _root_for(model: nn.Module, task: Task, world: World) -> nn.Module | None:
    """The module around the model to shard, for a task with its own step."""
    own = step_of(task)
    return None if own is None else SteppedModel.root(model, own, world)


def unit_by_unit(spec: Spec, task: Task) -> tuple[nn.Module, Deferring | None, str | None]:
    """The same without its large weights, and the object that creates them; or it, and why not."""
    try:
        module, deferred = made_deferred(lambda: new_model(task, seed=spec.seed))
    except NotDeferred as reason:
        return new_model(task, seed=spec.seed), None, str(reason)
    return module, deferred, None


def require_shardable(model: nn.Module, spec: Spec) -> None:
    """Check that a model can be sharded at all, whatever the number of processes.

    Raises:
        SpecError: it cannot.
    """
    parameters_by_unit(model, units_of(model, spec.exchange.units))
    sparse = sparse_parameters(model)
    if sparse:
        raise SpecError(
            f"exchange.mode: sharded cannot sum sparse gradients, such as those of {sparse[0]}. "
            "Create the embeddings with sparse=False."
        )


@dataclass(frozen=True)
class Optimization:
    """The optimizer and its learning rates."""

    optimizer: torch.optim.Optimizer
    schedule: Schedule
    frozen: Sequence[Frozen]
    """Parameters that are frozen until a later step."""


def build_optimizer(model: Model, plan: Plan, task: Task) -> Optimization:
    """The optimizer over the spec's parameter groups, and the schedule of its learning rates.

    Raises:
        SpecError: the spec refers to something that this model or optimizer does not have.
    """
    spec = plan.spec
    if not spec.model.compile:
        spare_compiler()
    trained = trained_by(model.module, spec, task)
    optimizer = trained.optimizer
    require_its_loss(optimizer, spec)
    schedule = make_schedule(optimizer, plan)
    return Optimization(optimizer, schedule, frozen_for_now(model.module, trained.groups, plan))


@dataclass(frozen=True)
class Rehearsal:
    """The result of the dry run before the first step."""

    each: Sequence[Rehearsed]
    """One for each optimizer that has turns; a single one otherwise."""
    found: FirstPass
    """All of them together."""
    buffers: Buffers | None
    """Buffers that change in training, except BatchNorm's; None if there are none."""
    warning: str | None = None
    """What the user should know of the rows."""


def rehearse(
    model: Model,
    rows: Rows,
    optimizer: torch.optim.Optimizer,
    *,
    plan: Plan,
    task: Task,
    world: World,
) -> Rehearsal:
    """Run the first micro-batch once; then `world` chooses its threads to fit the model.

    Raises:
        SpecError: the model, the loss or a measure breaks a rule of tasks; or the processes read
            different rows of a stream.
    """
    batch = sample(rows.train, task=task, plan=plan, world=world)
    warning = _other_rows(batch, rows.train, plan, world)
    two_rows: Batch | None = None
    if len(batch.rows) == 1 < plan.micro_batch:
        two_rows = sample(rows.train, task=task, plan=plan, world=world, rows=2)
    dry_run = DryRun(
        batch,
        task=task,
        world=world,
        normalization=model.normalization,
        two_rows=two_rows,
        average=teacher_of(model.module, task, plan.spec, twin=model.twin),
        place=_last_of_a_step(plan, len(batch.rows)),
    )
    if holds_rows(model.module):
        require_one_type(model.module, plan.spec.exchange)
        set_up_exchange(dry_run.callee(model.module))
    with told_as_used_outside(model.module) if holds_rows(model.module) else nullcontext():
        each = rehearsed(dry_run, model.module, optimizer)
    found = together_found(each, plan.spec)
    require_followed(found, plan.spec, processes=plan.processes)
    require_still_buffers(model.module, found.moving, plan.spec.model.activation_checkpointing)
    scale = plan.micro_batch / len(batch.rows)
    numbers = scale * sum(tensor.numel() for tensor in tensors_of(batch.inputs))
    if plan.spec.loader.workers:  # they need the other cores
        numbers = 0
    world.suit_threads(found.flops_a_row and found.flops_a_row * plan.micro_batch, numbers)
    # A step of one's own may begin to draw later, such as an augmentation after some epochs.
    world.seed_also(found.drawn if step_of(task) is None else python_and_numpy())
    buffers = buffers_of(
        model.module,
        found.moving,
        rule=plan.spec.model.buffers,
        micro_batches=plan.micro_batches,
        world=world,
        bitwise=plan.spec.exactness == "bitwise",
    )
    if step_of(task) is not None:
        for part in each:
            require_own_step(plan, part.found, model.normalization, moving=buffers is not None)
        require_measures(plan.spec, task, known=found.tested)
    return Rehearsal(each, found, buffers, warning)


def set_up_exchange(root: nn.Module) -> None:
    """Let FSDP2 set up its units, which it does in the first pass, with all that will be trained.

    In the turn of one of several optimizers, the parameters of the others seem frozen.
    """
    if isinstance(root, SteppedModel):
        root(None)
        release(root)


def _last_of_a_step(plan: Plan, rows: int) -> str:
    """Words for the last micro-batch of each step, which may be too small for a model."""
    if rows == plan.micro_batch:
        return ""
    even = -(-plan.global_batch // plan.micro_batches)
    least = plan.global_batch - (plan.micro_batches - 1) * even
    if least > rows:
        advice = f"batch.micro_batch: {even} has none of fewer than {least}"
    else:
        advice = f"batch.global_batch: {plan.micro_batches * plan.micro_batch} makes all equal"
    return f", the last micro-batch of each step ({advice}),"


def build_state(model: Model, optimization: Optimization, plan: Plan, world: World) -> TrainState:
    """The content of a checkpoint before the first step.

    Raises:
        SpecError: the weights cannot be averaged.
    """
    spec, module = plan.spec, model.module
    average = None
    if spec.model.moving_average:
        for own in modal(optimization.optimizer):
            raise SpecError(
                f"model.moving_average: {type(own).__name__} has weights of its own for tests "
                "(eval()), and an average of those for training would be tested in their place. "
                "Leave the moving average out."
            )
        average = MovingAverage(module, spec.model.moving_average, twin=model.twin)
    return TrainState(
        module,
        optimization.optimizer,
        optimization.schedule,
        early_stopping=EarlyStopping(spec.early_stopping) if spec.early_stopping else None,
        frozen=optimization.frozen,
        average=average,
        scaler=LossScaler(module, world) if spec.model.precision == "fp16" else None,
    )


@dataclass(frozen=True)
class Exchange:
    """The gradient synchronization of an optimizer, and the result of its dry run."""

    turn: str | None
    """Its name, if there are several."""
    sync: GradientSync
    found: FirstPass


def build_exchanges(
    state: TrainState,
    called: nn.Module,
    model: Model,
    rehearsal: Rehearsal,
    *,
    task: Task,
    plan: Plan,
    world: World,
) -> tuple[Sequence[Exchange], Stopwatch]:
    """The compiled and wrapped model for training, and the stopwatch of its passes.

    With several optimizers each has its own wrapper, over the parameters that it trains: in its
    turn no process waits for gradients that are not computed.

    Args:
        called: the model, or the model within the task's own step.

    Raises:
        SpecError: torch cannot compile it.
    """
    spec, how = plan.spec, plan.spec.model.compilation
    if how is not None:  # inside the wrapper, which can then overlap the exchange
        lead = world.is_lead
        called = compiled(called, state.model, task=task, world=world, spec=spec, telling=lead)
        if state.average is not None:
            average = state.average.model
            compile_in_place(average, how, telling=False, units=compiled_units(average, spec))
    stopwatch = Stopwatch(world.device)
    timed = stopwatch if world.processes > 1 else None
    exchanges = []
    for part in rehearsal.each:
        if isinstance(state.optimizer, Turns):
            state.optimizer.begin(str(part.turn))
        sync = _exchange(
            state, called, model, part, rehearsal.buffers, timed, plan=plan, world=world
        )
        exchanges.append(Exchange(part.turn, sync, part.found))
    if isinstance(state.optimizer, Turns):
        state.optimizer.end()
    return exchanges, stopwatch


def compiled(
    called: nn.Module, model: nn.Module, *, task: Task, world: World, spec: Spec, telling: bool
) -> nn.Module:
    """Let torch compile the model in place; returns the module that training calls.

    That is the model together with its loss and the casts between them, unless the task has its
    own step: the compiler then computes a loss such as cross-entropy without keeping its
    intermediate values. Of a sharded model each unit is compiled, and neither the rest nor the
    loss: also on one process, so that compiled dropout draws the same numbers on several.

    Args:
        called: the model, or the model within the task's own step.
        telling: let torch report on stderr why it recompiles.
    Raises:
        SpecError: not in the way of the spec.
    """
    how = spec.model.compilation
    assert how is not None, "the spec asks for it"
    require_replayable(spec, task)
    compile_in_place(model, how, telling=telling, units=compiled_units(model, spec))
    if called is not model or spec.exchange.shards:
        return called
    whole = ModelWithLoss(model, task, world)
    compile_in_place(whole, how, telling=False)
    return whole


def require_replayable(spec: Spec, task: Task) -> None:
    """Check that CUDA graphs, if the spec asks for them, are possible with this task.

    Raises:
        SpecError: its step may keep what a graph overwrites.
    """
    how = spec.model.compilation
    if how is not None and how.replays and step_of(task) is not None:
        raise SpecError(
            f"{how.in_words} makes CUDA graphs, which do not work with a task's own step: it may "
            "call the model several times and keep what it returns, and the next pass would "
            "overwrite it. Use mode: default."
        )


def compiled_units(model: nn.Module, spec: Spec) -> dict[str, nn.Module]:
    """The units of a sharded model, of which each is compiled by itself; otherwise none."""
    return units_of(model, spec.exchange.units) if spec.exchange.shards else {}


def compile_now(dry_run: DryRun, called: nn.Module, model: nn.Module, spec: Spec) -> None:
    """Let torch compile with the rows of the dry run, before anything is written.

    Args:
        called: the result of `compiled`, maybe wrapped.
    Raises:
        SpecError: it cannot.
    """
    parts = parts_to_compile(model, compiled_units(model, spec))
    how = spec.model.compilation
    dry_run.compile(called, model, parts, replays=how is not None and how.replays)


def _exchange(
    state: TrainState,
    called: nn.Module,
    model: Model,
    rehearsed: Rehearsed,
    buffers: Buffers | None,
    timed: Stopwatch | None,
    *,
    plan: Plan,
    world: World,
) -> GradientSync:
    spec, unreached = plan.spec, rehearsed.found.unreached
    # If steps may be skipped, all processes must learn from the gradients that one is skipped.
    telling = spec.faults.on_non_finite == "skip" or state.scaler is not None
    if spec.exactness == "bitwise":
        ordered = OrderedSync(
            called,
            world,
            unreached=unreached,
            gathered=[*model.normalization.sums(), *(buffers.sums if buffers is not None else ())],
            telling=telling,
            stopwatch=timed,
        )
        if spec.model.compile:
            compile_now(rehearsed.dry_run, ordered.model, state.model, spec)
        return kept_equal(ordered, buffers)
    if holds_rows(state.model):
        if spec.model.compile:  # before the hooks that record which gradients a step has
            compile_now(rehearsed.dry_run, called, state.model, spec)
        sharded = ShardedSync(
            called,
            world,
            micro_batches=plan.micro_batches,
            each=spec.exchange.sync_each_micro_batch,
            unreached=unreached,
            gathered=model.normalization.sums(),
            telling=telling,
            stopwatch=timed,
        )
        return kept_equal(sharded, buffers)
    overlapped = OverlappedSync(
        called,
        world,
        unreached=unreached,
        spec=spec.exchange,
        telling=telling,
        stopwatch=timed,
    )
    if spec.model.compile:
        compile_now(rehearsed.dry_run, overlapped.model, state.model, spec)
    rehearsed.dry_run.settle_buckets(
        overlapped.model, state.model, is_static=spec.exchange.static_graph
    )
    how = spec.model.compilation
    if how is not None and how.replays:
        replayed = ReplayedSync(overlapped, exchanges=world.processes > 1)
        return kept_equal(replayed, buffers)
    return kept_equal(overlapped, buffers)


@dataclass(frozen=True)
class Prepared:
    """All parts of a run, built before anything is written."""

    rows: Rows
    state: TrainState
    exchanges: Sequence[Exchange]
    """One for each optimizer, if there are several."""
    updates: Updates
    throughput: Throughput
    stragglers: StragglerDetector
    found: FirstPass
    """The result of the dry run."""
    saved_bytes: int | None
    """Size of a checkpoint, if it is known before the first step."""
    stepped: SteppedModel | None
    """The model, wrapped in the task's own step if it has one."""


def prepare_training(
    plan: Plan, task: Task, world: World, *, heartbeat: Heartbeat, say: Callable[[str], None]
) -> Prepared:
    """Build all parts in their order; every error of the user is found here.

    Raises:
        SpecError: the spec and the task do not match.
    """
    bring_losses(task, world.device)
    rows = bring_rows(plan, task, world)
    model = build_model(plan, task, world)
    if model.made_whole is not None:
        say(f"Each process builds the whole model before it keeps its rows: {model.made_whole}.")
    if plan.spec.exchange.offload and not holds_rows(model.module):
        say("WARNING: exchange.offload: a single process shards nothing, so nothing is offloaded.")
    optimization = build_optimizer(model, plan, task)
    optimizer = optimization.optimizer
    rehearsal = rehearse(model, rows, optimizer, plan=plan, task=task, world=world)
    if rehearsal.warning is not None:
        say(rehearsal.warning)
    throughput = _throughput(plan, rehearsal.found, world=world, heartbeat=heartbeat)
    state = build_state(model, optimization, plan, world)
    own = step_of(task)
    stepped = SteppedModel.of(state.model, own, world) if own is not None else None
    called = stepped or state.model
    exchanges, stopwatch = build_exchanges(
        state, called, model, rehearsal, task=task, plan=plan, world=world
    )
    for line in replays_in_words(plan.spec.model.compilation, world.device):
        say(line)
    stragglers = StragglerDetector(
        world, rounds=plan.rounds, throughput=throughput, stopwatch=stopwatch, say=say
    )
    updates = Updates(
        state,
        plan=plan,
        world=world,
        normalization=model.normalization,
        buffers=rehearsal.buffers,
        say=say,
        after_update=after_update_by(task, state, plan=plan, world=world),
        still=_still_buffers(model.module, rehearsal.found, plan.spec, world),
    )
    # The user's own step may change any weight in a pass, and so may a modal optimizer in a test.
    if own is None and not state.is_modal:
        state.still = _still_parameters(model.module, rehearsal.found, world.device)
    averaged = state.average is not None
    saved_bytes = expected_bytes(model.module, optimizer, averaged=averaged)
    if is_stream(rows.train):
        state.stream = _stream(rows.train, plan, world)
    found = rehearsal.found
    return Prepared(
        rows, state, exchanges, updates, throughput, stragglers, found, saved_bytes, stepped
    )


def _still_parameters(model: nn.Module, found: FirstPass, device: torch.device) -> frozenset[str]:
    """The parameters that may be copied for a save while the next pass runs.

    A pass through a sharded model changes the gathered weights, if any.  Other weights are copied
    late only by a device, for which nobody waits, and only if the first pass did not write to them.
    A frozen parameter, such as a teacher's, may change in any pass.
    """
    changed = {*found.written, *found.touched}
    late = copies_late(device)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return frozenset(n for n, p in trained if is_sharded(p) or (late and n not in changed))


def _still_buffers(
    model: nn.Module, found: FirstPass, spec: Spec, world: World
) -> StillBuffers | None:
    """The buffers that must stay equal by themselves; None if each process may have its own."""
    moving = world.gather([*found.moving.kept, *found.moving.reshaped])
    if world.processes == 1 or spec.model.buffers == "local":
        return None
    return StillBuffers(model, [name for names in moving for name in names])


def _throughput(plan: Plan, found: FirstPass, *, world: World, heartbeat: Heartbeat) -> Throughput:
    peak = peak_flops(world.device, plan.spec.model.precision)
    return Throughput(
        heartbeat,
        flops_a_row=found.flops_a_row,
        peak_flops=None if peak is None else peak * world.processes,
    )


def _stream(data: Any, plan: Plan, world: World) -> Stream:
    mode, seed = plan.spec.loader.stream, plan.spec.seed
    if isinstance(data, StoredRows):
        _require_same_files(data, world)
    return Stream(data, mode=mode, index=world.index, of=world.processes, seed=seed)


def require_same_numbers(plan: Plan, sets: Sequence[TestSet], world: World) -> None:
    """Check that every process has as many rows, and chooses them in the same way.

    Raises:
        SpecError: one has not, for example because files are missing on its node.
    """
    numbers = {"training rows": plan.train_rows} | {
        f"rows of the test set {part.name!r}" if part.name else "test rows": part.rows
        for part in sets
    }
    sampling = plan.sampling.digest() if plan.sampling is not None else ""
    each, chosen = world.gather(numbers), world.gather(sampling)
    lead = each[0]
    for rank, others in enumerate(each):
        for what in [*lead, *others]:
            if lead.get(what) != others.get(what):
                raise SpecError(
                    f"task: the processes have different data: rank 0 has {lead.get(what)} {what}, "
                    f"and rank {rank} has {others.get(what)}. The task must give every process all "
                    "rows, in the same order; let every node see the same files, and do not divide "
                    "the rows by rank."
                )
        if chosen[rank] != chosen[0]:
            raise SpecError(
                f"task.sampling: rank {rank} chooses rows in another way than rank 0: the weights, "
                "labels or proportions differ. They must be the same on every process; give the "
                "random generators that make them a fixed seed."
            )


def _other_rows(first: Batch, data: Any, plan: Plan, world: World) -> str | None:
    """What to tell if the first rows that the processes have read are not the same.

    Raises:
        SpecError: they are those of a stream of which each process keeps a part: it divides itself,
            or has random numbers of its own.
    """
    if plan.spec.loader.stream != "whole" and is_stream(data):
        return None
    found = world.gather(int(contents([(first.inputs, first.targets)])[0]))
    if len(set(found)) == 1:
        return None
    if not is_stream(data):
        return (
            "WARNING: the processes read different values in the same first rows. Either the order "
            "of the rows differs, such as that of an unsorted directory: then some rows are used "
            "twice in an epoch, and others never. Or the rows have random numbers that do not come "
            "from the generators of torch, numpy or random: then the result depends on the number "
            "of processes."
        )
    raise SpecError(
        f"loader.stream: the processes read different first rows of the stream "
        f"{type(data).__name__}, but with whole each of them must read the same rows; it keeps "
        "those of its own micro-batches. Do not divide the stream by rank (as "
        "split_dataset_by_node, or nodesplitter of webdataset, does), and give its random "
        "generators a fixed seed. For a stream that is read in parts, give it "
        "shard(num_shards, index), and use loader.stream=split."
    )


def _require_same_files(data: StoredRows, world: World) -> None:
    """Check that every process has found the same files.

    Raises:
        SpecError: one has not, for example because a file was added meanwhile.
    """
    found = world.gather(together(world, data.fingerprint))
    if len(set(found)) > 1:
        raise SpecError(
            f"{data.name}: the processes found different files, or files of different sizes. Write "
            "to this place before or after a run only, and let every node see the same files."
        )


def drawn_alike(spec: Spec, bring: Callable[[], T]) -> T:
    """The result of `bring`, called with the same random numbers on every process, every time.

    If the training and the test data each split one data set at random, both splits are equal.
    """
    seed_generators(randomness.key(randomness.TASK, spec.seed))
    return bring()


def together(world: World, act: Callable[[], T]) -> T:
    """The result of `act` on this process.

    Raises:
        EvenstepError: it failed on at least one process; raised on all of them.
    """
    done: list[T] = []
    failed: EvenstepError | None = None
    try:
        done.append(act())
    except EvenstepError as error:
        failed = error
    world.fail_together(failed)
    return done[0]
