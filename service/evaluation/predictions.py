"""The model's prediction for each row of the test set, gathered and written once."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from service.basics.atomic_files import told_when_unwritten
from service.basics.errors import SpecError
from service.data.task import Task, logits
from service.distributed.world import World

KINDS = (".npy", ".safetensors")


class Predictions:
    """Collects one process's outputs, in the order of the data set."""

    def __init__(self, path: Path, *, task: Task, rows: int, world: World) -> None:
        """The predictions of a test set of so many rows.

        Args:
            path: ends in .npy, or in .safetensors for one tensor named `predictions`.
        Raises:
            SpecError: it does not, or its directory is missing.
        """
        if path.suffix not in KINDS:
            raise SpecError(f"--predictions: {path} must end in {' or '.join(KINDS)}.")
        if not path.absolute().parent.is_dir():
            raise SpecError(f"--predictions: there is no directory {path.absolute().parent}.")
        self._path = path
        self._world = world
        self._predict = getattr(task, "predict", logits)
        self._rows = rows
        self._kept: list[Tensor] = []

    def add(self, outputs: Any) -> None:
        """Add the predictions of one micro-batch: [B, ...]."""
        self._kept.append(self._predict(outputs).cpu())

    def write(self) -> None:
        """Write the predictions of all processes, row by row as in the data set.

        Raises:
            SpecError: they are not of one shape, or not one for each row; on every process.
        """
        # Each process tests a run of the rows, so its place among them is its place in the file.
        parts = [part for kept in self._world.gather(self._kept) for part in kept]
        rows = _in_one(parts, self._rows)
        if not self._world.is_lead:
            return
        partial = self._path.with_name(f".{self._path.stem}.partial{self._path.suffix}")
        with told_when_unwritten(self._path):
            with partial.open("wb") as file:
                if self._path.suffix == ".npy":
                    of_numpy = rows.float() if rows.dtype == torch.bfloat16 else rows  # it has none
                    np.save(file, of_numpy.numpy())
                else:
                    file.write(save({"predictions": rows.contiguous()}))
            os.replace(partial, self._path)


def _in_one(parts: Sequence[Tensor], rows: int) -> Tensor:
    shapes = sorted({tuple(part.shape[1:]) for part in parts})
    if len(shapes) > 1:
        raise SpecError(
            f"task.predict: must give rows of one shape, but gave {list(shapes[0])} and "
            f"{list(shapes[1])}. Fill them up to one length, or give one number a row."
        )
    given = sum(len(part) for part in parts if part.dim())
    if given != rows:
        raise SpecError(
            f"task.predict: must give one value for each of the {rows} test rows, so the shape "
            f"[B, ...], but gave {given}."
        )
    return torch.cat(list(parts))
