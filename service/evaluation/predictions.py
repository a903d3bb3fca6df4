"""The model's prediction for each row of the test set, gathered and written once."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor

from service.basics.atomic_files import (
    in_the_way,
    remove_if_possible,
    require_replaceable,
    told_when_unwritten,
    without_link,
)
from service.basics.errors import SpecError, told_as_mistake
from service.data.batches import Batch
from service.data.task import Task, logits
from service.distributed.world import World


class Predictions:
    """Collects one process's outputs, in the order of the data set."""

    def __init__(self, path: Path, *, task: Task, rows: int, world: World) -> None:
        """The predictions for a test set with this number of rows.

        Args:
            path: its suffix determines the content: only the predictions (.npy), or with the ids of
                the rows and their targets (.csv, .parquet, .safetensors).
        Raises:
            SpecError: it has another suffix, cannot be written, or pyarrow is missing.
        """
        if path.suffix not in _KINDS:
            *others, last = _KINDS
            raise SpecError(f"--predictions: {path} must end in {', '.join(others)} or {last}.")
        if path.suffix == ".parquet" and find_spec("pyarrow") is None:
            raise SpecError(
                f"--predictions: {path} needs pyarrow, which is not installed. Install it: pip "
                "install pyarrow; or write .csv."
            )
        if not os.path.isdir(path.absolute().parent):
            raise SpecError(f"--predictions: there is no directory {path.absolute().parent}.")
        # By a name of its own: another test may write the same file at the same time.
        self._partial = path.with_name(f".{secrets.token_hex(8)}.partial")
        try:
            require_replaceable(path)
            open(self._partial, "xb", opener=without_link).close()  # not only after the test
            self._partial.unlink()
        except OSError as error:
            raise SpecError(f"--predictions: {path}: {in_the_way(error)}.") from error
        self._path = path
        self._world = world
        self._predict = getattr(task, "predict", logits)
        self._rows = rows
        self._kept: list[Tensor] = []
        self._ids: list[Tensor] = []
        self._targets: list[Tensor | None] = []

    def add(self, outputs: Any, batch: Batch) -> None:
        """Add the predictions of one micro-batch: [B, ...].

        Raises:
            SpecError: the task's `predict` fails, or returns no tensor.
        """
        with told_as_mistake("task.predict: it failed on the outputs of a micro-batch"):
            made: object = self._predict(outputs)
        if not isinstance(made, Tensor):
            raise SpecError(
                f"task.predict: must return a tensor, [B, ...], but returned a "
                f"{type(made).__name__}."
            )
        self._kept.append(made.cpu())
        self._ids.append(torch.from_numpy(np.array(batch.rows)))
        targets = batch.targets
        fits = isinstance(targets, Tensor) and targets.shape[:1] == (len(batch.rows),)
        self._targets.append(targets.cpu() if fits else None)

    def write(self) -> None:
        """Write the predictions of all processes, in the order of the data set.

        Raises:
            SpecError: they have different shapes, or there is not one for each row; on every
                process.
        """
        # Each process tests a contiguous range of rows, so their order in the file is known.
        rows = _in_one(_joined(self._world.gather(self._kept)), self._rows)
        ids = _joined(self._world.gather(self._ids))
        targets = _joined(self._world.gather(self._targets))
        if not self._world.is_lead:
            return
        tensors = {"rows": torch.cat(ids), "predictions": rows.contiguous()}
        if None not in targets and len({part.shape[1:] for part in targets}) == 1:
            tensors["targets"] = torch.cat(targets).contiguous()
        try:
            with told_when_unwritten(self._path):
                with open(self._partial, "xb", opener=without_link) as file:
                    _KINDS[self._path.suffix](file, tensors)
                os.replace(self._partial, self._path)
        finally:
            remove_if_possible(self._partial)


def _joined(parts: Sequence[Sequence[Any]]) -> list[Any]:
    return [each for part in parts for each in part]


def _in_one(parts: Sequence[Tensor], rows: int) -> Tensor:
    shapes = sorted({tuple(part.shape[1:]) for part in parts})
    if len(shapes) > 1:
        raise SpecError(
            f"task.predict: must return rows of one shape, but returned {list(shapes[0])} and "
            f"{list(shapes[1])}. Pad them to one length, or return one number per row."
        )
    given = sum(len(part) for part in parts if part.dim())
    if given != rows:
        raise SpecError(
            f"task.predict: must return one value for each of the {rows} test rows, so the shape "
            f"[B, ...], but returned {given}."
        )
    return torch.cat(list(parts))


# ---- the files

_VALUES_AT_ONCE = 2**13


def _npy(file: BinaryIO, tensors: Mapping[str, Tensor]) -> None:
    np.save(file, _of_numpy(tensors["predictions"]))


def _safetensors(file: BinaryIO, tensors: Mapping[str, Tensor]) -> None:
    file.write(save(dict(tensors)))


def _csv(file: BinaryIO, tensors: Mapping[str, Tensor]) -> None:
    columns = _columns(tensors)
    file.write(f"{','.join(columns)}\n".encode())
    # A value as numpy's text takes 128 bytes: all of them at once would take 32 times the memory.
    block = max(1, _VALUES_AT_ONCE // len(columns))
    for first in range(0, len(tensors["rows"]), block):
        texts = [
            values[first : first + block].astype(str).tolist() for values in columns.values()
        ]  # the shortest text that parses to an equal value
        lines = (f"{','.join(row)}\n" for row in zip(*texts, strict=True))
        file.write("".join(lines).encode())


def _parquet(file: BinaryIO, tensors: Mapping[str, Tensor]) -> None:
    arrow, parquet = import_module("pyarrow"), import_module("pyarrow.parquet")
    parquet.write_table(arrow.table(_columns(tensors)), file)


def _columns(tensors: Mapping[str, Tensor]) -> dict[str, NDArray[Any]]:
    """`row`, `prediction` and `target`; numbered from 0 if a row has several values."""
    columns = {}
    for name, values in tensors.items():
        flat = _of_numpy(values.flatten(1) if values.dim() > 1 else values)
        one = name.removesuffix("s")
        if flat.ndim == 1:
            columns[one] = flat
        else:
            columns |= {f"{one}_{at}": flat[:, at] for at in range(flat.shape[1])}
    return columns


def _of_numpy(values: Tensor) -> NDArray[Any]:
    wide = values.float() if values.dtype == torch.bfloat16 else values  # numpy has no bfloat16
    found: NDArray[Any] = wide.numpy()
    return found


_KINDS: dict[str, Callable[[BinaryIO, Mapping[str, Tensor]], None]] = {
    ".npy": _npy,
    ".safetensors": _safetensors,
    ".csv": _csv,
    ".parquet": _parquet,
}
