"""The result of a task's own step: named losses, each a sum with its weight."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from service.basics.errors import SpecError
from service.data.batches import Batch, counted
from service.distributed.devices import copies_late

_NAME = re.compile(r"[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)*")


class Across(NamedTuple):
    """A loss across rows."""

    function: Callable[..., Tensor]
    features: tuple[Tensor, ...]
    """The features of this micro-batch: [B, ...] each."""


@dataclass(frozen=True)
class Loss:
    """One loss of a micro-batch: a sum, and the weight that divides it.

    The value of a step is the sum over all its micro-batches, on all processes, divided by the sum
    of their weights. So it is the same at any number of processes.

    `Loss.each(values)`   one value for each row, or for each value of the task's `weight`
    `Loss.mean(mean)`     a mean over the rows of the batch, or over their `weight`
    `Loss(sum, weight)`   a sum, and its divisor, such as a number of boxes
    `Loss.of_all_rows(function, *features)`   a function of the features of all rows of a step
    """

    sum: Tensor
    """A tensor of one number, with a gradient in training."""
    weight: float | Tensor | None
    """A number from 0 up, without a gradient. The weights of all micro-batches must be known
    before the first backward pass: all forward passes of a step then run before it, and this
    process holds the activations of all its micro-batches. `each` and `mean` without a weight
    do not need that: the weight of a batch is known in advance."""
    scale: float = 1.0
    """Its factor in the loss of the step. It is logged without this factor."""
    kind: Literal["sum", "mean", "each", "across"] = "sum"
    across: Across | None = None

    @staticmethod
    def each(values: Tensor, *, scale: float = 1.0) -> Loss:
        """One value for each row: [B]. If the task has a `weight`, of its shape."""
        return Loss(values, None, scale, "each")

    @staticmethod
    def mean(mean: Tensor, weight: float | Tensor | None = None, *, scale: float = 1.0) -> Loss:
        """A mean over `weight`; by default over the weight of the batch."""
        return Loss(mean, weight, scale, "mean")

    @staticmethod
    def of_all_rows(function: Callable[..., Tensor], *features: Tensor, scale: float = 1.0) -> Loss:
        """A loss of all rows of a step together, such as a contrastive one.

        The function gets the features of the whole global batch, in the order of its rows, from all
        processes: [N, ...] each. It returns one value for each row: [N]. The value and the gradient
        are the same at any number of processes and with any micro-batch. In a test, which has
        no global batch, it gets the features of a micro-batch.

        All forward passes of a step run before its backward passes, as with an explicit weight.
        """
        if not features:
            raise SpecError("task.step: Loss.of_all_rows needs features: tensors [B, ...].")
        return Loss(features[0], None, scale, "across", Across(function, features))


Losses = Mapping[str, Loss | Tensor]
"""By name; a tensor means `Loss.each` of it."""
StepResult = Losses | tuple[Losses, Any]
"""The result of a step: its losses, or the losses and the outputs for measures and predictions."""
OwnStep = Callable[[Any, Batch, "StepContext"], StepResult]
AfterUpdate = Callable[[Any, "StepContext"], None]

Entry = tuple[Tensor | float, Tensor | float, float]
"""A sum, its weight, and its scale in the loss of the step."""


@dataclass(frozen=True)
class StepContext:
    """The arguments of a task's own step besides its batch."""

    step: int
    """Finished optimizer steps: 0 in the first one."""
    epoch: float
    """Finished passes over the training rows; 0 for a stream."""
    training: bool
    """False in a test, which has no gradients."""
    key: int
    """A function of seed, step and micro-batch. The generators of torch, numpy and Python are
    seeded with it, so random numbers from them are the same at any number of processes; seed your
    own generators with it."""
    whole: bool = False
    """Whether losses of all rows are computed for the whole step, or for the micro-batch."""
    average: nn.Module | None = None
    """The moving average of the weights, with `model.moving_average` in the spec: a teacher that
    is equal on all processes and saved in every checkpoint. It has no gradients."""
    optimizer: str | None = None
    """The optimizer whose turn it is, with `optimizers` in the spec: only its parameters get
    gradients. None in a test."""
    logged: dict[str, Entry] = field(default_factory=dict, repr=False)

    def log(self, name: str, sum: Tensor | float, weight: Tensor | float) -> None:
        """Record `train/NAME` or `test/NAME`: the sum over all micro-batches divided by the weight.

        Raises:
            SpecError: the name is already used, or a value is not a single number.
        """
        _require_name(name, self.logged)
        total = _number(sum, f"context.log({name!r}): the sum")
        self.logged[name] = (total, _weight(weight, f"context.log({name!r}): weight"), 0.0)


class LossPart(NamedTuple):
    """One named loss of a micro-batch, read and checked."""

    sum: Tensor
    weight: Tensor | float
    """The contribution of this micro-batch to the divisor."""
    scale: float
    divided_by: Literal["batch", "rows", "own"]
    """The weight of the step's batches, its rows, or the sum of its own weights."""
    across: Across | None = None
    """A loss of all rows: `sum` is set only when the whole step has been gathered."""


def read_losses(
    given: object, batch: Batch, *, context: StepContext
) -> tuple[dict[str, LossPart], Any]:
    """The losses of a step, and its outputs or None.

    Raises:
        SpecError: the result is invalid; names the loss, and what to write instead.
    """
    losses, outputs = given if isinstance(given, tuple) and len(given) == 2 else (given, None)
    if not isinstance(losses, Mapping) or not losses:
        what = "none" if isinstance(losses, Mapping) else f"a {type(losses).__name__}"
        raise SpecError(
            f"task.step: must return losses by name, such as {{'loss': values}}, but returned "
            f"{what}. "
            "Outputs for measures come second: return losses, outputs."
        )
    parts: dict[str, LossPart] = {}
    for name, loss in losses.items():
        _require_name(name, parts)
        parts[name] = _part(name, loss, batch, context)
    if "loss" in parts and len(parts) > 1:
        raise SpecError(
            f"task.step: with several losses ({', '.join(parts)}) none may be named 'loss', which "
            f"is "
            "the sum of them all. Give it another name."
        )
    taken = sorted(set(parts) & set(context.logged))
    if taken:
        raise SpecError(
            f"task.step: {taken[0]!r} is the name of a loss and of a context.log value."
        )
    return parts, outputs


def _part(name: str, given: object, batch: Batch, context: StepContext) -> LossPart:
    where = f"task.step: the loss {name!r}"
    loss = Loss.each(given) if isinstance(given, Tensor) else given
    if not isinstance(loss, Loss):
        raise SpecError(f"{where} must be a tensor or a Loss, but is a {type(loss).__name__}.")
    if not isinstance(loss.sum, Tensor) or not loss.sum.is_floating_point():
        kind = loss.sum.dtype if isinstance(loss.sum, Tensor) else type(loss.sum).__name__
        raise SpecError(f"{where} must be a tensor of real numbers, but is {kind}.")
    scale = _scale(loss.scale, where)
    if loss.across is not None:
        return _across(loss.across, batch, scale, where, context)
    if context.training and not loss.sum.requires_grad:
        raise SpecError(
            f"{where} has no gradient: it does not depend on a parameter that is trained, or was "
            "detached. To only log a value, use context.log."
        )
    wide = loss.sum if loss.sum.dtype.itemsize >= 4 else loss.sum.float()
    if loss.kind == "each":
        return _of_values(wide, batch, scale, where, training=context.training)
    value = _scalar(wide, where)
    if loss.kind == "mean" and loss.weight is None:
        if batch.weight is None:
            return LossPart(value * len(batch.rows), float(len(batch.rows)), scale, "rows")
        weight = batch.weight.sum()
        return LossPart(_times(value, weight), weight, scale, "batch")
    own = _weight(loss.weight, f"{where}: weight")
    if loss.kind == "mean" and context.training:
        _require_something(value, own, where)
    total = value if loss.kind == "sum" else _times(value, own)
    return LossPart(total, own, scale, "own")


def _require_something(mean: Tensor, weight: Tensor | float, where: str) -> None:
    """Refuse a mean over nothing, such as 0 / 0: whatever it counts, its gradient is not a number.

    On a device this would wait for it; there the gradient norm tells later.
    """
    if not copies_late(mean.device) and not weight and not mean.isfinite():
        raise SpecError(
            f"{where} is a mean over nothing: its weight is 0 in this micro-batch, and its value "
            "is not finite, so no gradient would be. Return the sum instead, Loss(sum, weight), or "
            "divide by weight.clamp(min=1)."
        )


def _times(mean: Tensor, weight: Tensor | float) -> Tensor:
    """A mean times its weight; a mean over nothing, which is NaN, becomes 0."""
    if isinstance(weight, Tensor):
        return torch.where(weight > 0, mean, torch.zeros_like(mean)) * weight.to(mean.dtype)
    return mean * weight if weight else torch.zeros_like(mean) * mean.nan_to_num()


def _across(
    across: Across, batch: Batch, scale: float, where: str, context: StepContext
) -> LossPart:
    rows = len(batch.rows)
    for feature in across.features:
        if not isinstance(feature, Tensor) or feature.dim() == 0 or len(feature) != rows:
            told = list(feature.shape) if isinstance(feature, Tensor) else type(feature).__name__
            raise SpecError(
                f"{where}: of_all_rows takes tensors with a first dimension of the {rows} rows of "
                f"the micro-batch, but one is {told}."
            )
    wide = tuple(f.float() if f.dtype.itemsize < 4 else f for f in across.features)
    if context.training and not any(feature.requires_grad for feature in wide):
        raise SpecError(f"{where} has no gradient: none of its features depends on a parameter.")
    read = Across(across.function, wide)
    if context.whole:
        return LossPart(wide[0].sum(), float(rows), scale, "rows", read)
    return LossPart(values_across(read, wide, where).sum(), float(rows), scale, "rows", read)


def values_across(across: Across, features: Sequence[Tensor], where: str) -> Tensor:
    """One value for each row of these features, which may be those of a whole step.

    Raises:
        SpecError: the function returns something else.
    """
    values: object = across.function(*features)
    rows = len(features[0])
    if not isinstance(values, Tensor) or list(values.shape) != [rows]:
        told = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise SpecError(
            f"{where}: the function of of_all_rows must return one value for each row, so the "
            f"shape "
            f"[{rows}], but returned {told}."
        )
    return values


def _of_values(
    values: Tensor, batch: Batch, scale: float, where: str, *, training: bool
) -> LossPart:
    rows, weight = len(batch.rows), batch.weight
    if weight is not None and values.shape == weight.shape:
        weighed = values * weight if training else counted(values, weight)
        return LossPart(weighed.sum(), weight.sum(), scale, "batch")
    if values.dim() == 0:
        raise SpecError(
            f"{where} is a single number, a mean or a sum of unknown weight. Return one value for "
            f"each "
            f"row, so the shape [{rows}]; or Loss.mean(value), a mean over the rows; or "
            "Loss(sum, weight), where weight is the divisor of the sum."
        )
    if list(values.shape) not in ([rows], [rows, 1]):
        told = "" if weight is None else f", or that of task.weight, {list(weight.shape)}"
        raise SpecError(
            f"{where} must have one value for each row, so the shape [{rows}]{told}, but has "
            f"{list(values.shape)}. Sum or average over the other dimensions; or give "
            "Loss(sum, weight)."
        )
    return LossPart(values.sum(), float(rows), scale, "rows")


def _scalar(value: Tensor, where: str) -> Tensor:
    if value.numel() != 1:
        raise SpecError(
            f"{where} must be a single number if it has a weight, but has the shape "
            f"{list(value.shape)}. Return one value for each row without a weight."
        )
    return value.reshape(())


def _weight(weight: object, where: str) -> Tensor | float:
    value = _number(weight, where)
    if isinstance(value, float):
        if value < 0 or not math.isfinite(value):
            raise SpecError(f"{where} must be a finite number from 0 up, but is {value}.")
    elif value.requires_grad:
        raise SpecError(
            f"{where} has a gradient. The divisor of a sum must not have one: detach it."
        )
    return value


def require_weights(entries: Mapping[str, Entry]) -> None:
    """Check the weights that are on a device, for which training does not wait.

    Raises:
        SpecError: one is not a finite number from 0 up; names its loss or value.
    """
    for name, (_, weight, _) in entries.items():
        value = float(weight)
        if value < 0 or not math.isfinite(value):
            raise SpecError(
                f"task.step: the weight of {name!r} must be a finite number from 0 up, but is "
                f"{value}."
            )


def _number(value: object, where: str) -> Tensor | float:
    """One number, as float or as a tensor with no dimension."""
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        return value.reshape(())
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    shape = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
    raise SpecError(f"{where} must be one number, but is {shape}.")


def _scale(scale: object, where: str) -> float:
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
        raise SpecError(f"{where}: scale must be a finite number, but is {scale!r}.")
    return float(scale)


def _require_name(name: object, taken: Mapping[str, Any]) -> None:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise SpecError(
            f"task.step: the name of a loss or a logged value must consist of letters, digits and "
            f"_ . - /, but is {name!r}."
        )
    if name in taken:
        raise SpecError(f"task.step: {name!r} was given twice in one micro-batch.")


def own_loss(model: nn.Module, batch: Batch, context: StepContext) -> StepResult:
    """The step of a model that computes its own loss, as transformers models do.

    The model is called with the inputs by name and the targets as `labels`. Its `loss` is used as
    a mean over the weight of the batch: its rows, or the sum of the task's `weight`.

    Raises:
        SpecError: the inputs have no names, or the outputs have no loss.
    """
    if not isinstance(batch.inputs, dict):
        raise SpecError(
            "task.step: own_loss calls the model by name, so a row must be a mapping, such as "
            f"{{'input_ids': ..., 'labels': ...}}, but its inputs are a "
            f"{type(batch.inputs).__name__}."
        )
    outputs = model(**batch.inputs, labels=batch.targets)
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    if not isinstance(loss, Tensor):
        raise SpecError(
            f"task.step: own_loss needs a model whose outputs have a loss, but "
            f"{type(model).__name__} gave a {type(outputs).__name__} without one."
        )
    return {"loss": Loss.mean(loss)}, outputs
