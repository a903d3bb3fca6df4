"""From a data set to micro-batches on the device: one list of them for each optimizer step."""

from __future__ import annotations

import atexit
import math
import multiprocessing
import os
import signal
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import islice, tee
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple
from weakref import WeakSet

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from service.basics import randomness
from service.basics.errors import (
    DataBroken,
    EvenstepError,
    SpecError,
    told_as_mistake,
    with_place,
)
from service.basics.limits import LONGEST_TMPDIR, memory_here
from service.data.batches import (
    Batch,
    Step,
    carrier,
    each_tensor,
    first_rows,
    split,
    split_or_whole,
    tensors_of,
    to_device,
)
from service.data.in_memory import (
    InMemory,
    beside_tensors,
    in_memory,
    joined,
    near,
    picker,
    run_copier,
)
from service.data.streams import Stream, contents, is_stream, reads_at_once
from service.data.task import Data, Task, collate_of, step_of
from service.distributed.devices import copies_late
from service.distributed.generators import (
    Global,
    noticing_draws,
    noticing_use,
    python_and_numpy,
    seed_generators,
    seeding_without,
)
from service.distributed.world import World
from service.health.stop_request import STOP_SIGNALS, die_with_parent
from service.plan.plan import Plan
from service.plan.samplers import epochs_at, micro_batches
from service.spec.models import LoaderSpec, Spec

# Row ids are computed for many steps at a time: a call costs the same for 4,096 rows as for 30.
_ROWS_AHEAD = 4096
# Rows of a micro-batch from which it is cheaper to find out whether they used a generator than to
# seed it for each of them.
_SPARED_FROM = 4


class Order(NamedTuple):
    """The rows to load, and the micro-batch and step that they belong to."""

    step: int
    number: int
    key: int  # seed of the random numbers that the model draws
    rows: NDArray[np.int64]  # [B]
    row_keys: NDArray[np.int64] | None = None  # seeds of what is drawn while a row is read: [B]


def train_steps(
    data: Data | Stream, *, task: Task, plan: Plan, world: World, start: int
) -> Iterator[Step]:
    """This process's micro-batches of every step from `start` on, to the end of the run.

    A stream is read only as far as the steps that are requested.

    Raises:
        DataBroken: the data set failed on a row, or returned something that no model accepts.
    """
    if isinstance(data, Stream):
        collated = _from_stream(data, plan, world.index, start, collate=collate_of(task))
        batches = _as_batches(collated, task=task, world=world, known=False)
    elif (rows := _held(data, task)) is not None:
        rows = near(data, rows, world.device)
        batches = _from_memory(rows, task=task, plan=plan, world=world, start=start)
    else:
        orders = _train_orders(plan, world.index, start)
        reader = _Reader(data, plan.spec.seed, collate=collate_of(task))
        brought = _collated(reader, orders, plan, world)
        batches = _as_batches(brought, task=task, world=world, known=False)
    per_step = len(plan.share(world.index))
    is_sync = plan.spec.model.batchnorm == "sync"
    collective = is_sync or plan.spec.exchange.shards
    empty_rounds = plan.rounds - per_step if collective else 0
    for step in range(start, plan.steps):
        taken = list(islice(batches, per_step))
        # With statistics over all processes, or sharded parameters, every forward pass is a
        # collective: a process with fewer micro-batches takes part in the last round without rows,
        # or with some of weight zero (many models cannot compute an empty batch).
        if empty_rounds:
            key = randomness.key(randomness.FORWARD, plan.spec.seed, step, plan.micro_batches)
            # With its own key, so that it is non-finite only if the pass that counts is too.
            empty = taken[0]._replace(number=plan.micro_batches)
            if is_sync:
                empty = _without_rows(taken[0], number=plan.micro_batches, key=key)
            taken += [empty] * empty_rounds
        yield Step(taken, _step_weight(taken, plan, world))


def test_batches(
    data: Data, *, task: Task, plan: Plan, world: World, name: str = ""
) -> Iterator[Batch]:
    """This process's micro-batches of the test set, each row once over all processes.

    Args:
        name: of the test set, for messages, if there are several.
    """
    orders = _test_orders(plan, world)
    rows = _held(data, task)
    if rows is not None:
        rows = near(data, rows, world.device)
        return _copied_from_memory(rows, orders, task=task, world=world)
    told = f"The test set {name!r}" if name else "The test set"
    reader = _Reader(data, plan.spec.seed, collate=collate_of(task), test=told)
    keyed = (_keyed(order, plan.spec.seed) for order in orders)
    brought = _collated(reader, keyed, plan, world)
    return _as_batches(brought, task=task, world=world)


def _test_orders(plan: Plan, world: World) -> Iterator[Order]:
    size, seed = plan.spec.test.micro_batch, plan.spec.seed
    share = _test_share(plan.test_rows, size, world.index, world.processes, seed)
    first, stop = (share[0][2], share[-1][3]) if share else (0, 0)
    rows = np.arange(first, stop)  # a share is a contiguous range
    for number, key, start, end in share:
        yield Order(0, number, key, rows[start - first : end - first])
    if plan.spec.exchange.shards:  # every forward pass is a collective
        some = np.arange(min(size, plan.test_rows))
        for _ in range(-(-plan.test_micro_batches // world.processes) - len(share)):
            yield Order(0, plan.test_micro_batches, 0, some)


def _keyed(order: Order, seed: int) -> Order:
    """The same with the keys that its rows have in the first epoch."""
    keys = randomness.keys(randomness.ROW, seed, 0, numbers=order.rows)
    return order._replace(row_keys=keys)


def _first_rows(count: int, *, seed: int) -> Order:
    """The first rows of a data set, for other purposes than a step."""
    return _keyed(Order(0, 0, 0, np.arange(count)), seed)


@lru_cache(maxsize=16)  # the same in every test of a run
def _test_share(
    rows: int, size: int, process: int, processes: int, seed: int
) -> list[tuple[int, int, int, int]]:
    """(number, key, first row, row after the last) of each micro-batch that a process tests."""
    shared = micro_batches(rows, micro_batch=size, index=process, of=processes)
    numbers = np.array([number for number, _ in shared], np.int64)
    keys = randomness.keys(randomness.TEST, seed, numbers=numbers).tolist()
    return [(n, key, span.start, span.stop) for (n, span), key in zip(shared, keys, strict=True)]


def sample(data: Data, *, task: Task, plan: Plan, world: World, rows: int | None = None) -> Batch:
    """The first rows of the data set as one micro-batch, for the dry run.

    By default as many rows as the smallest micro-batch has: what a model cannot
    do with few rows, such as a BatchNorm with one, then fails before the first step.
    """
    count = rows or plan.global_batch - (plan.micro_batches - 1) * plan.micro_batch
    order = _first_rows(min(count, plan.train_rows or count), seed=plan.spec.seed)
    first = order.rows
    collate = collate_of(task)
    held = None if is_stream(data) else _held(data, task)
    if is_stream(data):
        collated = collate(Stream(data, mode="whole", index=0, of=1).take(len(first)))
    elif held is not None:  # it is collated already
        index = torch.from_numpy(first).to(held.device)
        collated = picker(held.inputs)(index), picker(held.targets)(index)
    else:
        collated = _Reader(data, plan.spec.seed, collate=collate)[order]
    known = held is not None
    return next(_as_batches([(order, collated)], task=task, world=world, known=known))


def _from_stream(
    stream: Stream,
    plan: Plan,
    process: int,
    start: int,
    *,
    collate: Callable[[list[Any]], Any],
) -> Iterator[tuple[Order, Any]]:
    share = plan.share(process)
    spans = [_span(number, plan) for number in share]
    own = range(spans[0].start, spans[-1].stop)
    read = range(plan.global_batch) if stream.mode == "whole" else own
    for step in range(start, plan.steps):
        stream.pass_over(own.start - read.start)
        rows = stream.take(len(own))
        stream.pass_over(read.stop - own.stop)
        for number, span in zip(share, spans, strict=True):
            piece = rows[span.start - own.start : span.stop - own.start]
            key = randomness.key(randomness.FORWARD, plan.spec.seed, step, number)
            order = Order(step, number, key, contents(piece))
            # What it draws must not depend on the rows that this process read before.
            seed_generators(randomness.key(randomness.BATCH, plan.spec.seed, step, number))
            yield order, collate(piece)


def _span(number: int, plan: Plan) -> range:
    """Positions in the global batch of micro-batch `number`."""
    first = number * plan.micro_batch
    return range(first, min(first + plan.micro_batch, plan.global_batch))


class _Block(NamedTuple):
    """The share of one process in some consecutive steps."""

    steps: range  # S of them
    numbers: range  # of its micro-batches in each step, M of them
    sizes: list[int]  # rows of each: [M]
    keys: NDArray[np.int64]  # [S, M]
    positions: NDArray[np.int64]  # in the endless sequence of epochs: [S, rows of a step]
    rows: NDArray[np.int64]  # [S, rows of a step]

    def parts(self) -> tuple[list[int], list[int], list[NDArray[np.int64]]]:
        """(number, key, rows) of each micro-batch, in order: three lists."""
        numbers = [*self.numbers] * len(self.steps)
        return numbers, self.keys.ravel().tolist(), self._divided(self.rows)

    def orders(self, plan: Plan) -> Iterator[Order]:
        """One for each micro-batch, in order."""
        steps = np.repeat(self.steps, len(self.sizes)).tolist()
        repeats = plan.sampling is not None
        row_keys = _row_keys(self, plan.spec.seed, epoch=plan.train_rows or 1, repeats=repeats)
        return map(Order, steps, *self.parts(), self._divided(row_keys))

    def _divided(self, of_rows: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """The part of each micro-batch."""
        ends = np.cumsum(self.sizes).tolist()
        spans = [slice(end - size, end) for end, size in zip(ends, self.sizes, strict=True)]
        return [of_step[span] for of_step in of_rows for span in spans]


def _row_keys(block: _Block, seed: int, *, epoch: int, repeats: bool) -> NDArray[np.int64]:
    """The key of each row: [S, rows of a step].

    Args:
        epoch: rows in one epoch.
        repeats: whether a row may occur twice in an epoch.
    """
    columns = [epochs_at(block.positions, rows=epoch), block.rows]
    if repeats:
        columns.append(block.positions)
    return randomness.keys_of(randomness.ROW, seed, columns=columns)


def _train_blocks(plan: Plan, process: int, start: int, *, ahead: int) -> Iterator[_Block]:
    """The shares of a process from step `start` on; about `ahead` rows at a time."""
    share, seed = plan.share(process), plan.spec.seed
    spans = [_span(number, plan) for number in share]
    places = np.arange(spans[0].start, spans[-1].stop)
    block = max(1, ahead // len(places))
    for begin in range(start, plan.steps, block):
        steps = np.arange(begin, min(begin + block, plan.steps))
        positions = steps[:, None] * plan.global_batch + places  # [S, rows of a step]
        rows = plan.rows_at(positions.ravel())
        yield _Block(
            range(begin, begin + len(steps)),
            share,
            [len(span) for span in spans],
            randomness.grid(randomness.FORWARD, seed, rows=steps, columns=np.array(share)),
            positions,
            rows.reshape(positions.shape),
        )


def _train_orders(plan: Plan, process: int, start: int) -> Iterator[Order]:
    for block in _train_blocks(plan, process, start, ahead=_ROWS_AHEAD):
        yield from block.orders(plan)


def _step_weight(batches: Sequence[Batch], plan: Plan, world: World) -> float | torch.Tensor:
    if batches[0].weight is None:
        return plan.global_batch  # each row has weight 1: known without communication
    # One entry for each micro-batch, 0 for those of others: summed in the same order everywhere.
    each = torch.zeros(plan.micro_batches + 1, dtype=world.wide, device=world.device)
    for batch in batches:
        assert batch.weight is not None, "a task gives a weight to every micro-batch or to none"
        if batch.number < plan.micro_batches:
            each[batch.number] = batch.weight.sum()
    return world.sum(each).sum()


def _without_rows(batch: Batch, *, number: int, key: int) -> Batch:
    return Batch(
        number=number,
        rows=batch.rows[:0],
        inputs=first_rows(batch.inputs, 0),
        targets=first_rows(batch.targets, 0),
        weight=first_rows(batch.weight, 0),
        key=key,
    )


def _as_batches(
    collated: Iterable[tuple[Order, Any]], *, task: Task, world: World, known: bool = True
) -> Iterator[Batch]:
    """Micro-batches of collated rows.

    Args:
        known: whether all processes know that the step has a row that the loss ignores.
    """
    weigh = _weight_of(task)
    bring = carrier(world.device)
    ignored = getattr(task, "ignored", None) if weigh is None else None
    parted = split_or_whole if step_of(task) else split
    for order, value in collated:
        try:
            inputs, targets = parted(value)
        except TypeError as error:
            raise DataBroken(f"The data set's rows cannot be used: {error}") from error
        if isinstance(targets, torch.Tensor):
            _require_every_row(targets, order)
        some_ignored = ignored is not None and _holds(targets, ignored)
        if some_ignored and not known:
            raise SpecError(
                f"task.loss: ignores targets of {ignored}, and with rows that are loaded one by "
                f"one the "
                "number of the others in a step is not known in advance. Give a weight, such as "
                f"weight=lambda targets: targets.ne({ignored}).float(), or use loader.in_memory."
            )
        inputs, targets = bring((inputs, targets))
        weight = weigh(targets) if weigh is not None else None
        if some_ignored:
            weight = targets.ne(ignored).float()
        yield Batch(order.number, order.rows, inputs, targets, weight, order.key)


def _holds(targets: Any, ignored: int) -> bool:
    """Whether one of these classes (one for each row, [B] or [B, 1]) is the ignored one."""
    if not isinstance(targets, torch.Tensor) or targets.dim() == 0 or targets.is_floating_point():
        return False
    if targets.numel() != len(targets):
        return False
    return bool(targets.long().eq(ignored).any())  # in uint8, -100 would be class 156


def _weigher(task: Task, targets: Any) -> Callable[[Any], torch.Tensor] | None:
    """A function that returns the weight of each row with these targets; None: 1 for each."""
    ignored = getattr(task, "ignored", None)
    if hasattr(task, "weight") or ignored is None or not _holds(targets, ignored):
        return _weight_of(task)
    return lambda some: some.ne(ignored).float()


def _weight_of(task: Task) -> Callable[[Any], torch.Tensor] | None:
    """The weight of a task, if it has one; its errors name it.

    Raises:
        SpecError: when it is called, it fails or returns no tensor.
    """
    weigh: Callable[[Any], object] | None = getattr(task, "weight", None)
    if weigh is None:
        return None

    def weight_of(targets: Any) -> torch.Tensor:
        with told_as_mistake("task.weight: it failed on the targets of a micro-batch"):
            weight = weigh(targets)
        if not isinstance(weight, torch.Tensor):
            raise SpecError(
                "task.weight: must return a tensor, the weight of each value of the loss, but "
                f"returned a {type(weight).__name__}. For the same weight everywhere, leave it out."
            )
        return weight

    return weight_of


def _require_every_row(targets: torch.Tensor, order: Order) -> None:
    """Check that no row is missing and none is duplicated."""
    _require_as_many(len(targets) if targets.dim() else 0, order)


def _require_as_many(come: int, order: Order) -> None:
    """Check that as many rows have come as were requested."""
    asked = len(order.rows)
    if come != asked:
        raise DataBroken(
            f"Of {asked} requested rows, {come} were returned (step {order.step}, "
            f"micro-batch {order.number}, rows {_told(order.rows)}). Each row counts once, so a "
            "task's collate, or a data set's __getitems__, must keep every row. Remove rows from "
            "the data set beforehand, or give them weight 0."
        )


def _told(rows: NDArray[np.int64], *, most: int = 8) -> str:
    return f"{rows[:most].tolist()}{' ...' if len(rows) > most else ''}"


def _collated(
    reader: _Reader, orders: Iterable[Order], plan: Plan, world: World
) -> Iterator[tuple[Order, Any]]:
    if not plan.spec.loader.workers:
        for order in orders:
            yield order, reader[order]
        return
    kept, sent = tee(orders)
    loader = DataLoader(
        reader,
        sampler=sent,
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=int(plan.spec.loader.workers),
        prefetch_factor=plan.spec.loader.prefetch * math.ceil(plan.rounds),
        pin_memory=copies_late(world.device),
        worker_init_fn=_outlive_signals,
    )
    for value in _in_our_words(loader):
        yield next(kept), value


def workers_with_room(task: Task, spec: Spec) -> int:
    """How many workers each process of a machine can have without harm.

    None if rows are not read by workers; otherwise so many that the rows which they read ahead
    take at most half of the free space in /dev/shm.

    Raises:
        DataBroken: the data set fails on its first row.
    """
    data = task.train_data()
    if is_stream(data) or _held(data, task) is not None or len(data) == 0:
        return 0
    if len(os.fsencode(tempfile.gettempdir())) > LONGEST_TMPDIR or not os.path.isdir("/dev/shm"):
        return 0
    reader = _Reader(data, spec.seed, collate=collate_of(task))
    first = reader[_first_rows(1, seed=spec.seed)]
    row = sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(first))
    asked = spec.batch.global_batch
    rows = len(data) if asked == "all" else asked  # of all processes, at most
    disk = os.statvfs("/dev/shm")
    ahead = spec.loader.prefetch * rows * row
    return int(disk.f_bavail * disk.f_frsize // 2 // max(1, ahead))


def require_short_paths(data: Data, *, task: Task, plan: Plan) -> None:
    """Refuse a temporary directory with a path too long for the workers' sockets: they would hang.

    Raises:
        SpecError: it is too long, and workers read the rows.
    """
    if not plan.spec.loader.workers or is_stream(data) or _held(data, task) is not None:
        return
    place = tempfile.gettempdir()
    if (size := len(os.fsencode(place))) > LONGEST_TMPDIR:
        raise SpecError(
            f"loader.workers: workers send rows through a socket in the temporary directory, whose "
            f"path may have {LONGEST_TMPDIR} bytes; {place} has {size}. Set TMPDIR to a shorter "
            "path, such as TMPDIR=/tmp, or loader.workers to 0."
        )


def _in_our_words(loader: Iterable[Any]) -> Iterator[Any]:
    """The batches of workers; their errors about broken data come without the outer traceback."""
    before = set(multiprocessing.active_children())
    try:
        brought = iter(loader)
        _WORKERS.update(set(multiprocessing.active_children()) - before)
        yield from brought
    except DataBroken as error:
        told = str(error).rpartition("service.basics.errors.DataBroken: ")[2].strip()
        raise DataBroken(told) from error
    except RuntimeError as error:
        # A page of shared memory for which there is no space.
        if "Bus error" not in str(error) or not os.path.isdir("/dev/shm"):
            raise
        raise DataBroken(f"{error} {_shared_memory_advice()}") from error


def _shared_memory_advice() -> str:
    disk = os.statvfs("/dev/shm")
    size, free = (blocks * disk.f_frsize / 2**20 for blocks in (disk.f_blocks, disk.f_bavail))
    return (
        f"Loader workers send rows through /dev/shm, which has {size:,.1f} MiB here, {free:,.1f} "
        "MiB of them free. Raise it (docker run --shm-size; on Kubernetes "
        "kubernetes.shared_memory), or lower loader.workers or loader.prefetch; loader.workers=0 "
        "needs none of it."
    )


def _held(data: Data | Stream, task: Task) -> InMemory | None:
    """The rows if they are tensors in memory, and the task does not collate them itself."""
    if hasattr(task, "collate") and not isinstance(data, InMemory):
        return None
    return in_memory(data)


def way_of_rows(data: Data, *, task: Task, spec: LoaderSpec) -> str:
    """A description of the data path, for the user."""
    if is_stream(data):
        return "one after the other, in the order of the stream"
    if spec.in_memory or _held(data, task) is not None:
        return "by index, from memory"
    each = "a micro-batch at a time" if reads_at_once(data) else "row by row"
    if spec.workers == "auto":
        return f"{each}, by as many workers as there are cores for"
    return f"{each}, by {spec.workers} workers ahead of time" if spec.workers else each


def brought_into_memory(data: Data, *, task: Task, plan: Plan, world: World) -> Data:
    """The data set with its rows as tensors, if `loader.in_memory` is set.

    Raises:
        SpecError: not possible, or too large; or workers could not send rows here.
        DataBroken: the data set failed on a row, or its rows have different shapes.
    """
    require_short_paths(data, task=task, plan=plan)
    if not plan.spec.loader.in_memory:
        return data
    if is_stream(data):
        raise SpecError("loader.in_memory: the training data is a stream. Leave in_memory out.")
    if len(data) == 0:
        return data
    held = _held(data, task)
    if held is not None:
        return held
    seed = plan.spec.seed
    reader = _Reader(data, seed, collate=collate_of(task))
    _require_room(reader[_first_rows(1, seed=seed)], len(data))
    starts = range(0, len(data), _ROWS_AHEAD)
    spans = [np.arange(at, min(at + _ROWS_AHEAD, len(data))) for at in starts]
    orders = [_keyed(Order(0, n, 0, rows), seed) for n, rows in enumerate(spans)]
    parted = split_or_whole if step_of(task) else split
    try:
        pieces = [parted(value) for _, value in _collated(reader, orders, plan, world)]
        for side, value in zip(("inputs", "targets"), pieces[0], strict=True):
            _require_tensors(value, side, rows=len(orders[0].rows))
        return joined(pieces)
    except (RuntimeError, TypeError) as error:
        raise DataBroken(
            f"loader.in_memory: the rows cannot be converted to tensors: {error}"
        ) from error


def _require_tensors(value: Any, side: str, *, rows: int) -> None:
    """Refuse values of rows that cannot be selected by index."""
    told = beside_tensors(value, rows=rows)
    if told is not None:
        raise SpecError(
            f"loader.in_memory: of the {side} of the collated rows, {told}, and only rows of "
            "tensors are selected by index. Make it a tensor or leave it out, in the data set or "
            "in collate; or leave in_memory out."
        )


def _require_room(first: Any, rows: int) -> None:
    """Estimated from the first row; while they are joined, all rows exist twice."""
    needed = 2 * rows * sum(t.numel() * t.element_size() for t in tensors_of(first))
    free = memory_here()
    if needed > free:
        raise SpecError(
            f"loader.in_memory: {rows:,} rows take {needed / 2**30:.1f} GiB while they are read, "
            f"and {free / 2**30:.1f} GiB are free here. Leave in_memory out, or use loader.workers."
        )


def _from_memory(
    data: InMemory, *, task: Task, plan: Plan, world: World, start: int
) -> Iterator[Batch]:
    """Rows selected by index on the device that computes them, or on the host if they are there.

    Each micro-batch has its own memory: for a part of a larger block, the bits of the result would
    depend on its offset in the block, and so on the step at which the run was resumed.
    """
    inputs, targets = picker(data.inputs), picker(data.targets)
    send = _sender(data, world)
    weigh = _weigher(task, data.targets)
    for block in _train_blocks(plan, world.index, start, ahead=_ROWS_AHEAD):
        indices = torch.from_numpy(block.rows.ravel()).to(data.device, non_blocking=True)
        each = torch.split_with_sizes(indices, block.sizes * len(block.steps))
        for number, key, rows, index in zip(*block.parts(), each, strict=True):
            aims = send(targets(index))
            weight = None if weigh is None else weigh(aims)
            yield Batch(number, rows, send(inputs(index)), aims, weight, key)


def _copied_from_memory(
    data: InMemory, orders: Iterable[Order], *, task: Task, world: World
) -> Iterator[Batch]:
    """Rows that are requested in the order in which they are stored."""
    inputs, targets = run_copier(data.inputs), run_copier(data.targets)
    send = _sender(data, world)
    weigh = _weigher(task, data.targets)
    for _, number, key, rows, _ in orders:
        first = int(rows[0])
        # Its own memory, as above, so that a model that changes its inputs in place changes no row.
        aims = send(targets(first, len(rows)))
        weight = None if weigh is None else weigh(aims)
        yield Batch(number, rows, send(inputs(first, len(rows))), aims, weight, key)


def _sender(data: InMemory, world: World) -> Callable[[Any], Any]:
    """Copies selected rows to the device; does nothing if they are there already."""
    if data.device.type == world.device.type:
        return _as_it_is
    if copies_late(world.device):
        return lambda rows: to_device(each_tensor(rows, Tensor.pin_memory), world.device)
    return lambda rows: to_device(rows, world.device)


def resident_bytes(data: Iterable[Data], task: Task, device: torch.device) -> int:
    """Device memory in bytes that the rows of these data sets will use for the whole run."""
    held = [rows for part in data if (rows := _held(part, task)) is not None]
    return sum(rows.size_bytes for rows in held if rows.fits_on(device))


class _Reader(Dataset[Any]):
    """A data set that returns whole micro-batches, with a random key for each row."""

    def __init__(
        self,
        data: Data,
        seed: int,
        *,
        collate: Callable[[list[Any]], Any],
        test: str | None = None,
    ) -> None:
        """The reader of a data set; `test` is what messages call a test set."""
        self._test = test
        self._asked: int | None = None
        self._data = data
        self._at_once = reads_at_once(data)
        self._seed = seed
        self._collate = collate
        self._unused: list[Global] | None = None

    def __getitem__(self, order: Order) -> Any:
        brought: list[Any] | None = None
        self._asked = None
        try:
            brought = self._rows(order)
            return self._collate(brought)
        except EvenstepError:
            raise
        except Exception as error:
            row = self._asked if self._asked is not None else self._failing(order, brought)
            which = f"rows {_told(order.rows, most=32)}" if row is None else f"row {row}"
            at = f"micro-batch {order.number}"
            at = f"step {order.step}, {at}" if self._test is None else at
            told = f"{self._test or 'The data set'} failed on {which} ({at})"
            raise DataBroken(f"{told}: {with_place(error)}{_remedy(error)}") from error

    def _rows(self, order: Order) -> list[Any]:
        rows = order.rows.tolist()
        if self._at_once:
            # Rows that are read in one call share a key, which is the same at any world size.
            seed_generators(randomness.key(randomness.BATCH, self._seed, order.step, order.number))
            brought = list(self._data.__getitems__(rows))
            _require_as_many(len(brought), order)
            return brought
        assert order.row_keys is not None, "rows that are read one by one have keys"
        return self._one_by_one(rows, order.row_keys.tolist())

    def _one_by_one(self, rows: list[int], keys: list[int]) -> list[Any]:
        """Each row, read with the random numbers of its key."""
        if self._unused is None:  # the very first row shows which generators rows use
            seed_generators(keys[0])
            with noticing_draws() as drawn:
                first = self._read(rows[:1], keys[:1], _as_it_is)
            self._unused = [each for each in python_and_numpy() if each not in drawn]
            return first + self._one_by_one(rows[1:], keys[1:])
        if self._unused and len(rows) >= _SPARED_FROM:
            spared = self._sparingly(rows, keys, self._unused)
            if spared is not None:
                return spared
        return self._read(rows, keys, seed_generators)

    def _sparingly(
        self, rows: list[int], keys: list[int], unused: list[Global]
    ) -> list[Any] | None:
        """The rows, without seeding generators that no row uses; None if one of them was used.

        They are seeded for the last row only, so that collate and whatever else draws before the
        next seeding finds them as after any other way of reading.
        """
        used: list[Global] = []
        brought: list[Any] = []
        try:
            with noticing_use(unused) as used:
                brought = self._read(rows[:-1], keys[:-1], seeding_without(unused))
        except Exception:
            if not used:
                raise
        if used:  # from now on it is seeded for each row
            self._unused = [each for each in unused if each not in used]
            return None
        return brought + self._read(rows[-1:], keys[-1:], seed_generators)

    def _read(
        self, rows: Iterable[int], keys: Iterable[int], seed: Callable[[int], object]
    ) -> list[Any]:
        data, brought = self._data, []
        for row, key in zip(rows, keys, strict=True):
            seed(key)
            self._asked = row
            brought.append(data[row])
        self._asked = None
        return brought

    def _failing(self, order: Order, brought: list[Any] | None) -> int | None:
        """The first row that fails by itself too; None if only all of them together do."""
        for place, row in enumerate(order.rows.tolist()):
            try:
                if brought is None:
                    self._data.__getitems__([row])
                else:
                    self._collate([brought[place]])
            except Exception:  # the error of all rows is the one that is raised
                return int(row)
        return None


def _remedy(error: Exception) -> str:
    """Advice for torch's message: rows that it cannot stack, or shared memory that is full."""
    said = ("default_collate", "stack expects each tensor", "in list of batch should be of equal")
    if any(words in str(error) for words in said):
        return ". Give the task a collate that makes a batch of such rows."
    if "unable to allocate shared memory" in str(error) and os.path.isdir("/dev/shm"):
        return f". {_shared_memory_advice()}"
    return ""


def _as_it_is(value: Any) -> Any:
    return value


# ---- workers and signals

_WORKERS: WeakSet[BaseProcess] = WeakSet()


@atexit.register  # before multiprocessing's handler, which waits without a limit
def _end_workers() -> None:
    """Make a worker ignore requests to stop, so that it never blocks its training process."""
    left = _WORKERS & set(multiprocessing.active_children())
    if left:
        signal.signal(
            signal.SIGCHLD, signal.SIG_DFL
        )  # torch's handler raises if a worker is killed
    for worker in left:
        worker.kill()


def _outlive_signals(worker: int) -> None:
    # A request to stop goes to the whole process group.  The workers continue until the loop
    # has taken its last step; they end when the training process releases them or is gone.
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    # Immediately, not at its next check: it holds the lock of the run as long as it lives.
    die_with_parent()
