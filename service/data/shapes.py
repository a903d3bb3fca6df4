"""Checks the shapes of a task's loss, weight and measures in every micro-batch.

torch broadcasts tensors of unequal shapes silently: [B, 1] and [B] make [B, B].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from service.basics.errors import SpecError
from service.data.batches import Batch


def require_loss_shape(losses: Any, batch: Batch) -> None:
    """Check that there is one loss value for each row, or one for each weight.

    Raises:
        SpecError: there are not.
    """
    rows = len(batch.rows)
    if not isinstance(losses, Tensor):
        raise SpecError(f"task.loss: must give a tensor, but gave a {type(losses).__name__}.")
    if losses.dim() == 0 or losses.shape[0] != rows:
        raise SpecError(
            f"task.loss: must give one value for each row, so the shape [{rows}] or "
            f"[{rows}, tokens], but gave {list(losses.shape)}. Use reduction='none'."
        )
    if batch.weight is None:
        if losses.numel() != rows:
            raise SpecError(_unweighed(losses, batch))
    elif batch.weight.shape != losses.shape:
        raise SpecError(
            f"task.weight: must have the shape of the loss, {list(losses.shape)}, but has "
            f"{list(batch.weight.shape)}."
        )


def _unweighed(losses: Tensor, batch: Batch) -> str:
    rows, shape = len(batch.rows), list(losses.shape)
    if shape == [rows, rows] and isinstance(batch.targets, Tensor):
        return (
            f"task.loss: must give one value for each row, so the shape [{rows}], but gave "
            f"{shape}: each row was compared with every other row. The targets are "
            f"{list(batch.targets.shape)}; bring the outputs to the same shape."
        )
    return (
        f"task.weight: the loss has {losses[0].numel()} values for each row "
        f"({shape}), and their weights are not known. Give a weight, "
        "such as `weight=lambda targets: targets.ne(-100).float()` with the target that the loss "
        "ignores (ignore_index; -100 by default), or one value for each row."
    )


def require_measured_shape(measured: Any, losses: Tensor, measures: Sequence[str]) -> None:
    """Check that there is one value of each measure wherever there is a loss value.

    Raises:
        SpecError: there is not.
    """
    if not measures:
        return
    if not isinstance(measured, Tensor):
        raise SpecError(f"task.measure: must give a tensor, but gave a {type(measured).__name__}.")
    wanted = [*losses.shape, len(measures)]
    if list(measured.shape) != wanted:
        raise SpecError(
            f"task.measure: must have the shape {wanted}, one value for each row and measure "
            f"{list(measures)}, but has {list(measured.shape)}."
        )
