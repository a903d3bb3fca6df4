"""What a model says of each row of the test set, kept by all processes and written once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from service.errors import SpecError
from service.task import Task, logits
from service.world import World

KINDS = (".npy", ".safetensors")


class Predictions:
    """Collects one process's outputs, in the order of the data set."""

    def __init__(self, path: Path, *, task: Task, world: World) -> None:
        """`path` ends in .npy, or in .safetensors for one tensor named `predictions`.

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
        self._kept: list[Tensor] = []

    def add(self, outputs: Any) -> None:
        """Keep what was said of one micro-batch: [B, ...]."""
        self._kept.append(self._predict(outputs).cpu())

    def write(self) -> None:
        """Write the predictions of all processes, row by row as in the data set."""
        # Each process tests a run of the rows, so its place among them is its place in the file.
        own = torch.cat(self._kept) if self._kept else None
        parts = [part for part in self._world.gather(own) if part is not None]
        if not self._world.is_lead:
            return
        rows = torch.cat(parts)
        if self._path.suffix == ".npy":
            rows = rows.float() if rows.dtype == torch.bfloat16 else rows  # numpy has no bfloat16
            np.save(self._path, rows.numpy())
        else:
            save_file({"predictions": rows.contiguous()}, self._path)
