"""From a data set to micro-batches on the device: one list of them for each optimizer step."""

from __future__ import annotations

import math
import random
import signal
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

from service import randomness
from service.batches import Batch, Step, first_rows, split, to_device
from service.errors import DataBroken, EvenstepError
from service.faults import STOP_SIGNALS, die_with_parent
from service.plan import Plan
from service.samplers import epochs_at, micro_batches, rows_at
from service.streams import Stream, is_stream
from service.task import Data, Task
from service.world import World

# Row ids are worked out for many steps at once: a call costs as much for 4,096 rows as for 30.
_ROWS_AHEAD = 4096


class Order(NamedTuple):
    """Which rows to bring, for which micro-batch of which step."""

    step: int
    number: int
    rows: NDArray[np.int64]  # [B]
    epochs: NDArray[np.int64]  # [B], the pass over the data each row belongs to


def train_steps(
    data: Data | Stream, *, task: Task, plan: Plan, world: World, start: int
) -> Iterator[Step]:
    """This process's micro-batches of every step from `start` on, to the end of the run.

    A stream is read no further than the steps that were asked for.

    Raises:
        DataBroken: the data set failed on a row, or gave what no model takes.
    """
    if isinstance(data, Stream):
        collated = _from_stream(data, plan, world.index, start)
        batches = _as_batches(collated, task=task, world=world)
    else:
        orders = _train_orders(plan, world.index, start)
        batches = _bring(data, orders, task=task, plan=plan, world=world)
    per_step = len(plan.share(world.index))
    empty_rounds = plan.rounds - per_step if plan.spec.model.batchnorm == "sync" else 0
    for _ in range(start, plan.steps):
        brought = [next(batches) for _ in range(per_step)]
        # With statistics over all processes every forward pass is a collective: a process
        # with fewer micro-batches takes part in the last round with no rows.
        if empty_rounds:
            brought += [_without_rows(brought[0], number=plan.micro_batches)] * empty_rounds
        yield Step(brought, _step_weight(brought, plan, world))


def test_batches(data: Data, *, task: Task, plan: Plan, world: World) -> Iterator[Batch]:
    """This process's micro-batches of the test set, each row once over all processes."""
    return _bring(data, _test_orders(plan, world), task=task, plan=plan, world=world)


def _test_orders(plan: Plan, world: World) -> Iterator[Order]:
    shared = micro_batches(
        plan.test_rows,
        micro_batch=plan.spec.test.micro_batch,
        index=world.index,
        of=world.processes,
    )
    for number, span in shared:
        yield Order(0, number, np.arange(span.start, span.stop), np.zeros(len(span), np.int64))


def sample(data: Data, *, task: Task, plan: Plan, world: World) -> Batch:
    """The first rows of the data set as one micro-batch, to try things out on.

    As many as the smallest micro-batch has: what a model cannot do with few rows, such as a
    BatchNorm with one, then shows before the first step.
    """
    smallest = plan.global_batch - (plan.micro_batches - 1) * plan.micro_batch
    rows = np.arange(min(smallest, plan.train_rows or smallest))
    order = Order(0, 0, rows, np.zeros_like(rows))
    if is_stream(data):
        collated = default_collate(Stream(data, mode="whole", index=0, of=1).take(len(rows)))
    else:
        collated = _Reader(data, plan.spec.seed)[order][1]
    return next(_as_batches([(order, collated)], task=task, world=world))


def _from_stream(
    stream: Stream, plan: Plan, process: int, start: int
) -> Iterator[tuple[Order, Any]]:
    share = plan.share(process)
    spans = [_span(number, plan) for number in share]
    own = range(spans[0].start, spans[-1].stop)
    read = range(plan.global_batch) if stream.mode == "whole" else own
    for step in range(start, plan.steps):
        rows = []
        for place in read:
            position = step * plan.global_batch + place
            seed_generators(randomness.key(randomness.ROW, plan.spec.seed, 0, position))
            rows += stream.take(1)
        for number, span in zip(share, spans, strict=True):
            ids = np.arange(span.start, span.stop) + step * plan.global_batch
            piece = rows[span.start - read.start : span.stop - read.start]
            yield Order(step, number, ids, np.zeros_like(ids)), default_collate(piece)


def _span(number: int, plan: Plan) -> range:
    """Places in the global batch that micro-batch `number` takes."""
    first = number * plan.micro_batch
    return range(first, min(first + plan.micro_batch, plan.global_batch))


def _train_orders(plan: Plan, process: int, start: int) -> Iterator[Order]:
    assert plan.train_rows is not None, "a stream is not asked for rows"
    share = plan.share(process)
    first, last = _span(share.start, plan).start, _span(share.stop - 1, plan).stop
    spans = (_span(number, plan) for number in share)
    pieces = [slice(span.start - first, span.stop - first) for span in spans]
    block = max(1, _ROWS_AHEAD // (last - first))
    for begin in range(start, plan.steps, block):
        steps = np.arange(begin, min(begin + block, plan.steps))
        positions = steps[:, None] * plan.global_batch + np.arange(first, last)  # [steps, rows]
        rows = rows_at(positions.ravel(), rows=plan.train_rows, seed=plan.spec.seed)
        of_steps = zip(
            steps.tolist(),
            rows.reshape(positions.shape),
            epochs_at(positions, rows=plan.train_rows),
            strict=True,
        )
        for step, step_rows, step_epochs in of_steps:
            for number, piece in zip(share, pieces, strict=True):
                yield Order(step, number, step_rows[piece], step_epochs[piece])


def _step_weight(batches: Sequence[Batch], plan: Plan, world: World) -> float | torch.Tensor:
    if batches[0].weight is None:
        return plan.global_batch  # each row counts 1: known beforehand, nothing to ask
    # One place for each micro-batch, 0 for what others have: added up in one order everywhere.
    each = torch.zeros(plan.micro_batches + 1, dtype=world.wide, device=world.device)
    for batch in batches:
        assert batch.weight is not None, "a task weighs every micro-batch or none"
        each[batch.number] = batch.weight.sum()
    return world.sum(each).sum()


def _without_rows(batch: Batch, *, number: int) -> Batch:
    return Batch(
        number=number,
        rows=batch.rows[:0],
        inputs=first_rows(batch.inputs, 0),
        targets=first_rows(batch.targets, 0),
        weight=first_rows(batch.weight, 0),
    )


def _bring(
    data: Data, orders: Iterable[Order], *, task: Task, plan: Plan, world: World
) -> Iterator[Batch]:
    """Carry out the orders, in order."""
    if isinstance(data, TensorDataset) and len(data.tensors) == 2:
        return _from_memory(data, orders, task=task, world=world)
    return _as_batches(_collated(data, orders, plan, world), task=task, world=world)


def _as_batches(
    collated: Iterable[tuple[Order, Any]], *, task: Task, world: World
) -> Iterator[Batch]:
    weigh = getattr(task, "weight", None)
    for order, value in collated:
        try:
            inputs, targets = split(value)
        except TypeError as error:
            raise DataBroken(f"The data set's rows cannot be used: {error}") from error
        inputs, targets = to_device((inputs, targets), world.device)
        weight = weigh(targets) if weigh is not None else None
        yield Batch(order.number, order.rows, inputs, targets, weight)


def _collated(
    data: Data, orders: Iterable[Order], plan: Plan, world: World
) -> Iterator[tuple[Order, Any]]:
    reader = _Reader(data, plan.spec.seed)
    if plan.spec.loader.workers == 0:
        return ((order, reader[order][1]) for order in orders)
    loader = DataLoader(
        reader,
        sampler=orders,
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=int(plan.spec.loader.workers),
        prefetch_factor=plan.spec.loader.prefetch * math.ceil(plan.rounds),
        pin_memory=world.device.type == "cuda",
        worker_init_fn=_outlive_signals,
    )
    return _in_our_words(loader)


def _in_our_words(loader: Iterable[tuple[Order, Any]]) -> Iterator[tuple[Order, Any]]:
    """What workers bring; what they say of broken data comes without the traceback around it."""
    try:
        yield from loader
    except DataBroken as error:
        told = str(error).rpartition("service.errors.DataBroken: ")[2].strip()
        raise DataBroken(told) from error


def _from_memory(
    data: TensorDataset, orders: Iterable[Order], *, task: Task, world: World
) -> Iterator[Batch]:
    """Rows of two tensors are picked by index, on the device that computes them."""
    inputs, targets = (tensor.to(world.device) for tensor in data.tensors)
    weigh = getattr(task, "weight", None)
    elsewhere = world.device.type != "cpu"
    for order in orders:
        index = torch.from_numpy(order.rows)
        if elsewhere:
            index = index.to(world.device, non_blocking=True)
        aims = targets.index_select(0, index)
        weight = weigh(aims) if weigh is not None else None
        yield Batch(order.number, order.rows, inputs.index_select(0, index), aims, weight)


class _Reader(Dataset[tuple[Order, Any]]):
    """A data set asked for whole micro-batches, with every row's random numbers keyed."""

    def __init__(self, data: Data, seed: int) -> None:
        self._data = data
        self._seed = seed

    def __getitem__(self, order: Order) -> tuple[Order, Any]:
        try:
            return order, default_collate(self._rows(order))
        except EvenstepError:
            raise
        except Exception as error:
            rows = order.rows.tolist()
            raise DataBroken(
                f"The data set failed at step {order.step}, micro-batch {order.number} "
                f"(rows {rows[:8]}{' ...' if len(rows) > 8 else ''}): "
                f"{type(error).__name__}: {error}"
            ) from error

    def _rows(self, order: Order) -> list[Any]:
        rows = order.rows.tolist()
        if hasattr(self._data, "__getitems__"):
            # Rows that come together draw together: keyed by what is the same at any world size.
            seed_generators(randomness.key(randomness.BATCH, self._seed, order.step, order.number))
            return list(self._data.__getitems__(rows))
        brought = []
        for row, epoch in zip(rows, order.epochs.tolist(), strict=True):
            seed_generators(randomness.key(randomness.ROW, self._seed, epoch, row))
            brought.append(self._data[row])
        return brought


def seed_generators(key: int) -> None:
    """Start python's, numpy's and torch's global generators at `key`."""
    random.seed(key)
    np.random.seed(key & 0xFFFFFFFF)
    torch.default_generator.manual_seed(key)


def _as_it_is(value: Any) -> Any:
    return value


def _outlive_signals(worker: int) -> None:
    # A request to stop goes to the whole process group.  The workers serve until the loop
    # has taken its last step; they leave when the training process lets them go or is gone.
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    # At once, and not when it next looks: it holds the run's lock open as long as it lives.
    die_with_parent()
