"""Measures of the test loop that merge exactly, for any distribution of rows over processes."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from service.basics.errors import DataBroken, SpecError, told_as_mistake
from service.data.batches import counted, to_device
from service.data.streams import contents
from service.distributed.world import World

_PARTS_AT_MOST = 1000  # numbers of one metric, such as one for each class
_HELD_AT_MOST = 1000  # micro-batches whose sums are not in the table yet


class _Line(NamedTuple):
    """The sums of one micro-batch."""

    number: int
    sums: list[Tensor]
    """Weighted sums of the loss [1] and the measures [measures], float64, on the device."""
    weight: float | Tensor
    rows: int


class Tally:
    """Weighted sums of a loss and of measures, one line for each micro-batch of the test set.

    Every process fills the lines of its own micro-batches; the merged table is summed in the
    order of the data set.  So the result has the same bits at any number of processes.
    """

    def __init__(
        self, measures: Sequence[str], *, micro_batches: int, device: torch.device
    ) -> None:
        self._names = ("loss", *measures)
        # float64 [micro-batches, loss and measures, then weight and rows]
        columns = len(self._names) + 2
        # Apple's GPUs have no float64; their sums are merged on the CPU, as on all devices.
        self._on = torch.device("cpu") if device.type == "mps" else device
        self._lines = torch.zeros(micro_batches, columns, dtype=torch.float64, device=self._on)
        self._held: list[_Line] = []

    def add(
        self, number: int, losses: Tensor, measured: Tensor, weight: Tensor | None, *, rows: int
    ) -> None:
        """Add micro-batch `number`.

        Args:
            losses: [B] or [B, T].
            measured: [B, measures] or [B, T, measures]; any shape if there are no measures.
            weight: in the shape of `losses`, or None for 1 each.
        """
        # A task may measure on the CPU although the GPU has computed.
        losses, measured, wide = losses.to(self._on), measured.to(self._on), torch.float64
        if weight is not None:
            weight = weight.to(self._on, wide)
            losses = counted(losses, weight)
        sums = [losses.flatten().sum(0, keepdim=True, dtype=wide)]
        if len(self._names) > 1:  # there are measures
            each = measured if weight is None else counted(measured, weight.unsqueeze(-1))
            sums.append(each.flatten(0, -2).sum(0, dtype=wide))
        total = losses.numel() if weight is None else weight.sum()
        self._held.append(_Line(number, sums, total, rows))
        if len(self._held) == _HELD_AT_MOST:
            self._write()

    def _write(self) -> None:
        """Copy all waiting rows into the table in one transfer: a single row takes as long."""
        held, self._held = self._held, []
        if not held:
            return
        sums = torch.cat([part for line in held for part in line.sums])
        parts = [sums.view(len(held), -1), _weights_and_rows(held, self._on)]
        numbers = [line.number for line in held]
        run = range(numbers[0], numbers[-1] + 1)
        # They are nearly always consecutive, and then no index is needed.
        place = slice(run.start, run.stop) if numbers == [*run] else numbers
        self._lines[place] = torch.cat(parts, dim=1)

    def means(self, world: World, *, rows: int) -> dict[str, float]:
        """Weighted mean of the loss and each measure over the whole test set.

        Raises:
            DataBroken: the rows counted are not `rows`, or nothing in them has weight.
        """
        self._write()
        totals = world.sum(self._lines).sum(0).tolist()
        *sums, weight, counted = totals
        if counted != rows:
            raise DataBroken(
                f"The test loop counted {counted:.0f} rows, but the test set has {rows}. "
                "A data set must give one row for each of its indices."
            )
        if weight == 0:
            raise DataBroken("No row of the test set has any weight; the mean does not exist.")
        if weight < 0:
            raise DataBroken(
                f"task.weight: the weights of the test set sum to {weight:g}. A weight is what a "
                "value counts, from 0 up."
            )
        return {
            f"test/{name}": value / weight for name, value in zip(self._names, sums, strict=True)
        }


def _weights_and_rows(lines: Sequence[_Line], device: torch.device) -> Tensor:
    """Numbers, or weights on the device and counts of rows: float64 [N, 2] on the device."""
    weights = {n: line.weight for n, line in enumerate(lines) if isinstance(line.weight, Tensor)}
    told = [(0 if n in weights else line.weight, line.rows) for n, line in enumerate(lines)]
    counts = torch.tensor(told, dtype=torch.float64, device=device)
    if weights:
        told_later = torch.tensor(list(weights), device=device)
        counts[told_later, 0] = torch.stack(list(weights.values()))
    return counts


class Gathered:
    """Measures that are not sums, such as an area under a curve: torchmetrics objects.

    Each process feeds its own copies, and the copies are merged in the order of the data set.
    A metric that declares that it cannot be merged gets all outputs in that order on every process.
    """

    def __init__(self, metrics: Mapping[str, Any], world: World) -> None:
        """`metrics` have torchmetrics' `update`, `compute`, `reset` and `merge_state`."""
        self._metrics = {name: copy.deepcopy(m).to(world.device) for name, m in metrics.items()}
        self._world = world
        self._kept: list[tuple[Any, Any]] = []
        self._has_rows = False
        for metric in self._metrics.values():
            metric.reset()
            # By default it would sum the states of all processes, and count everything twice.
            for part in metric.modules():  # a wrapper's own metrics too
                part.distributed_available_fn = _alone
        self._empty = copy.deepcopy(self._metrics)
        self._unmerged = {n for n, m in self._metrics.items() if not _merges_exactly(m)}

    def add(self, outputs: Any, targets: Any) -> None:
        """Add one micro-batch, in the order of the data set."""
        outputs = _scores(outputs) if self._metrics else outputs
        for name, metric in self._metrics.items():
            if name not in self._unmerged:
                with told_as_mistake(f"task.measures: {name} failed on a micro-batch"):
                    metric.update(outputs, targets)
        if not self._has_rows:
            self._unmerged.update(self._not_in_states())
        self._has_rows = True
        if self._unmerged:
            self._kept.append((to_device(outputs, _CPU), to_device(targets, _CPU)))

    def values(self) -> dict[str, float]:
        """`test/<name>` of each over the whole test set, and `test/<name>/<key>` of its parts.

        Raises:
            SpecError: a metric fails, its result is not numbers, or it cannot be merged.
        """
        if not self._metrics:
            return {}
        self._agree_on_unmerged()
        own = {n: m.cpu() for n, m in self._metrics.items() if n not in self._unmerged}
        states = self._world.gather({name: metric.metric_state for name, metric in own.items()})
        whole = {name: copy.deepcopy(empty).cpu() for name, empty in self._empty.items()}
        for name in own:
            for state in reversed(states):  # torchmetrics puts what it merges before the rest
                whole[name].merge_state(state[name])
            whole[name]._update_count = 1  # otherwise it warns that it was never updated
        if self._unmerged:
            for kept in self._world.gather(self._kept):
                for outputs, targets in kept:
                    for name in sorted(self._unmerged):
                        with told_as_mistake(f"task.measures: {name} failed on a micro-batch"):
                            whole[name].update(outputs, targets)
        found: dict[str, float] = {}
        for name, metric in whole.items():
            with told_as_mistake(f"task.measures: {name} failed on the test set"):
                value = metric.compute()
            found |= _numbers(f"test/{name}", value, metric)
        return found

    def _not_in_states(self) -> list[str]:
        """Metrics to be merged that have kept something which is not in their states."""
        merged = [name for name in self._metrics if name not in self._unmerged]
        return [n for n in merged if _beside_states(self._metrics[n], self._empty[n])]

    def _agree_on_unmerged(self) -> None:
        """Agree with all processes on the metrics that get all outputs.

        Raises:
            SpecError: one of them was not noticed from the first micro-batch on, on a process.
        """
        late = self._not_in_states()
        noticed = self._world.gather(sorted(self._unmerged))
        every = {name for names in (*noticed, *self._world.gather(late)) for name in names}
        for unmerged, has_rows in zip(noticed, self._world.gather(self._has_rows), strict=True):
            if has_rows and (missed := sorted(every - {*unmerged})):
                raise SpecError(
                    f"task.measures: {missed[0]} keeps something in an attribute that is no state "
                    "of the metric, so it cannot be merged over processes. Declare it by add_state "
                    "of torchmetrics, or set full_state_update = True in the class."
                )
        self._unmerged = every


def _alone() -> bool:
    """The answer to a metric that checks for other processes."""
    return False


def _scores(outputs: Any) -> Any:
    """The outputs; for a transformers model, their logits."""
    there = outputs.get("logits") if isinstance(outputs, Mapping) else None
    return there if (there := getattr(outputs, "logits", there)) is not None else outputs


def _numbers(name: str, value: Any, metric: Any) -> dict[str, float]:
    """A number by its name; the elements of a vector or mapping, as `<name>/<index or key>`."""
    if isinstance(value, Tensor) and value.dim() == 1 and 1 < len(value) <= _PARTS_AT_MOST:
        return {f"{name}/{n}": number for n, number in enumerate(value.tolist())}
    if isinstance(value, Mapping):
        parts = [_numbers(f"{name}/{key}", part, metric) for key, part in value.items()]
        return {key: number for part in parts for key, number in part.items()}
    if isinstance(value, Tensor) and value.numel() != 1:
        kind = f"a tensor of shape {list(value.shape)}"
    elif not isinstance(value, Tensor | int | float):
        kind = f"a {type(value).__name__}"
    else:
        return {name: float(value)}
    raise SpecError(
        f"task.measures: {name.removeprefix('test/')} must return numbers: one, or a vector or a "
        f"mapping of them; but {type(metric).__name__} returns {kind}. Average it, such as with "
        "average='macro', or measure its parts separately."
    )


def _merges_exactly(metric: Any) -> bool:
    """Whether its states are sums, extremes or lists, and it treats each micro-batch separately.

    A metric without states has them in plain attributes or in metrics of its own.
    """
    exact = {"dim_zero_sum", "dim_zero_cat", "dim_zero_max", "dim_zero_min"}
    ways = {getattr(way, "__name__", None) for way in metric._reductions.values()}
    inner = sum(hasattr(part, "merge_state") for part in metric.modules()) - 1
    by_rows = metric.full_state_update is False and inner == 0
    return by_rows and len(ways) > 0 and ways <= exact


_OF_EVERY_METRIC = {"_update_count", "_computed", "_forward_cache", "_cache", "_device"}


def _beside_states(metric: Any, empty: Any) -> bool:
    """Whether updates have changed an attribute of a metric that is none of its states.

    Such as a counter in plain Python, or states that are created by the first update.
    """
    before, now = (
        {n: v for n, v in vars(each).items() if n not in _OF_EVERY_METRIC | {*empty._defaults}}
        for each in (empty, metric)
    )
    return bool((contents([before]) != contents([now])).any())


_CPU = torch.device("cpu")
