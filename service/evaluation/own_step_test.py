"""The sums of a test pass for a task with its own step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from service.basics.errors import DataBroken, SpecError
from service.data.batches import Batch, counted
from service.data.losses import Entry, StepContext
from service.data.own_step import Pass, SteppedModel
from service.data.task import WithStep, metrics_of
from service.distributed.world import World
from service.evaluation.metrics import Gathered
from service.evaluation.named_sums import Ledger
from service.evaluation.predictions import Predictions
from service.optimization.precision import widened
from service.plan.plan import Plan

_ROWS, _WEIGHT = "(rows)", "(weight of the losses)"


class CountedSteps:
    """Named losses, logged values and measures of a test pass, on this process."""

    def __init__(
        self,
        task: WithStep,
        *,
        plan: Plan,
        world: World,
        step: int,
        predictions: Predictions | None = None,
    ) -> None:
        """`step` optimizer steps were taken before this test."""
        self._task, self._world = task, world
        self._rows, self._measures = plan.test_rows, task.measures
        self._count = plan.test_micro_batches
        self._step, self._epoch = step, plan.epoch(step)
        self._averaged = plan.spec.model.moving_average is not None
        self._ledger = Ledger()
        self._gathered = Gathered(metrics_of(task), world)
        self._predictions = predictions

    def take(self, model: nn.Module, batch: Batch) -> None:
        """Compute and count one micro-batch.

        Raises:
            SpecError: the result of the step is invalid.
        """
        average = model if self._averaged else None
        context = StepContext(self._step, self._epoch, False, batch.key, average=average)
        taken = Pass(batch, context)
        SteppedModel.of(model, self._task, self._world)(taken)
        if batch.number >= self._count:  # other processes still compute, and a pass is a collective
            return
        rows: Entry = (float(len(batch.rows)), 0.0, 0.0)
        weight: Entry = (sum(part.weight for part in (taken.parts or {}).values()), 0.0, 0.0)
        told = {_ROWS: rows, _WEIGHT: weight}
        self._ledger.add(entries_of_test(self._task, taken) | told)
        if taken.outputs is not None:
            self._gathered.add(widened(taken.outputs), batch.targets)
        if self._predictions is not None:
            _require_outputs(taken.outputs, "--predictions")
            self._predictions.add(widened(taken.outputs), batch)

    def means(self) -> dict[str, float]:
        """The means over all processes; every process calls it.

        What nothing in the test set counts for has no value, as in training.

        Raises:
            DataBroken: the rows counted are not those of the test set, or no loss has weight.
        """
        totals = self._ledger.totals(self._world)
        weight = totals.pop(_WEIGHT).sum if _WEIGHT in totals else 0
        counted = totals.pop(_ROWS).sum if _ROWS in totals else 0
        if counted != self._rows:
            raise DataBroken(
                f"The test loop counted {counted:.0f} rows, but the test set has {self._rows}. "
                "A data set must give one row for each of its indices."
            )
        if not weight:
            raise DataBroken("Nothing in the test set counts for any loss: their weights are 0.")
        totals = {name: total for name, total in totals.items() if total.weight}
        means = {f"test/{name}": total.sum / total.weight for name, total in totals.items()}
        means["test/loss"] = sum(total.scaled / total.weight for total in totals.values())
        return means | self._gathered.values()


def entries_of_test(task: WithStep, taken: Pass) -> dict[str, Entry]:
    """The recorded values of one test micro-batch: losses, logged values and measures, by name.

    Raises:
        SpecError: a measure needs outputs and there are none, or has another shape.
    """
    entries, outputs = taken.entries(), widened(taken.outputs)
    wanted = [*task.measures, *metrics_of(task)]
    if wanted:
        _require_outputs(outputs, ", ".join(wanted))
    measured = _measured(task, outputs, taken.batch) if task.measures else {}
    taken_twice = sorted(set(wanted) & set(entries))
    if taken_twice:
        raise SpecError(f"task.step: {taken_twice[0]!r} is already the name of a measure.")
    return entries | measured


def _measured(task: WithStep, outputs: Any, batch: Batch) -> dict[str, Entry]:
    """The measures of a micro-batch as sums: with the weight of the batch, or 1 for each row.

    Raises:
        SpecError: they have another shape.
    """
    measured: Tensor = task.measure(outputs, batch.targets).to(torch.float64)  # type: ignore[attr-defined]
    rows, weight = len(batch.rows), batch.weight
    shape = list(measured.shape)
    if weight is not None and shape[:-1] == list(weight.shape):
        each = counted(measured, weight.to(measured).unsqueeze(-1)).flatten(0, -2).sum(0)
        divisor: Tensor | float = weight.sum()
    elif shape == [rows, len(task.measures)]:
        each, divisor = measured.sum(0), float(rows)
    else:
        told = "" if weight is None else f", or that of task.weight, {list(weight.shape)}"
        raise SpecError(
            f"task.measures: each must return one value for each row, so the shape [{rows}]{told}, "
            f"but they return {shape[:-1]}."
        )
    return {name: (value, divisor, 0.0) for name, value in zip(task.measures, each, strict=True)}


def _require_outputs(outputs: object, wanted: str) -> None:
    if outputs is None:
        raise SpecError(
            f"task.step: {wanted} needs the model's outputs, but the step returns only losses. "
            "Return both: `return losses, outputs`."
        )
