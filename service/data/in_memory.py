"""Data sets whose rows are tensors in memory: selected by index, one micro-batch at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset, TensorDataset

from service.basics.errors import SpecError
from service.data.batches import each_tensor, tensors_of
from service.distributed.devices import free_bytes

# The fraction of the device's free memory that rows may use; training needs the rest.
_SHARE_OF_FREE = 0.25


@dataclass(frozen=True, eq=False)  # data sets are compared by identity
class InMemory:
    """All rows of a data set as tensors, or nested tensors, whose first dimension is the row."""

    inputs: Any
    """The inputs of the model: [N, ...]."""
    targets: Any
    """The targets for the loss: [N, ...]."""

    def __len__(self) -> int:
        return len(tensors_of((self.targets, self.inputs))[0])

    def __getitem__(self, row: int) -> tuple[Any, Any]:
        inputs, targets = (each_tensor(v, lambda t: t[row]) for v in (self.inputs, self.targets))
        return inputs, targets

    @property
    def size_bytes(self) -> int:
        """Bytes of all rows."""
        return sum(t.numel() * t.element_size() for t in tensors_of((self.inputs, self.targets)))

    @property
    def device(self) -> torch.device:
        """The device of the rows."""
        return tensors_of((self.targets, self.inputs))[0].device

    def on(self, device: torch.device) -> InMemory:
        """The same on the device."""
        moved = [each_tensor(v, lambda t: t.to(device)) for v in (self.inputs, self.targets)]
        return InMemory(*moved)

    def fits_on(self, device: torch.device) -> bool:
        """Whether the rows fit on the device, in a quarter of its free memory."""
        free = free_bytes(device)
        return free is None or self.size_bytes <= _SHARE_OF_FREE * free


# The rows of each data set on the device: copied once, not for every test pass.
_RESIDENT: WeakKeyDictionary[Any, InMemory] = WeakKeyDictionary()


def near(data: Any, rows: InMemory, device: torch.device) -> InMemory:
    """The rows of a data set on the device while it exists; on the host if they do not fit."""
    if device.type == "cpu" or rows.device.type != "cpu":
        return rows
    if data not in _RESIDENT:
        if not rows.fits_on(device):
            return rows
        _RESIDENT[data] = rows.on(device)
    return _RESIDENT[data]


def bytes_on_device() -> int:
    """Bytes of device memory that rows use now."""
    return sum(rows.size_bytes for rows in _RESIDENT.values())


def in_memory(data: Any) -> InMemory | None:
    """The data set as tensors, if it consists of two tensors, or is a subset of such a data set.

    A subclass with its own way to make a row, such as an augmentation, is not.

    Raises:
        SpecError: the rows of a subset are not row numbers of its data set.
    """
    if isinstance(data, InMemory):
        return data
    if _reads_as(data, TensorDataset) and len(data.tensors) == 2:
        return InMemory(*data.tensors)
    if _reads_as(data, Subset):
        whole = in_memory(data.dataset)
        if whole is not None:
            rows = _row_numbers(data, of=len(whole))
            return InMemory(picker(whole.inputs)(rows), picker(whole.targets)(rows))
    return None


def _reads_as(data: Any, kind: type) -> bool:
    """Whether it reads rows as this class of torch does, and not as a subclass overrides it."""
    reading = ("__len__", "__getitem__", "__getitems__")
    return isinstance(data, kind) and all(
        getattr(type(data), name, None) is getattr(kind, name, None) for name in reading
    )


def _row_numbers(subset: Subset[Any], *, of: int) -> Tensor:
    """The rows of a subset as numbers from 0 up; torch counts negative ones from the end.

    Raises:
        SpecError: there is no such row, or they are no whole numbers.
    """
    given: Any = subset.indices
    rows = np.asarray(given if hasattr(given, "__array__") else list(given))
    rows = rows if rows.size else rows.astype(np.int64)  # [] has floats
    if rows.dtype.kind not in "iu" or rows.ndim != 1:
        raise SpecError(
            f"task: the rows of a Subset must be whole numbers, but are {rows.dtype} of the shape "
            f"{list(rows.shape)}. For a mask, write Subset(data, mask.nonzero()[0]) with numpy, or "
            "mask.nonzero().flatten() with torch."
        )
    numbers = torch.from_numpy(rows.astype(np.int64))
    outside = numbers[(numbers < -of) | (numbers >= of)]
    if len(outside):
        raise SpecError(
            f"task: a Subset has the row {int(outside[0])}, but its data set has {of:,} rows, "
            f"numbered from 0 to {of - 1:,}."
        )
    return numbers.remainder(of) if of else numbers


def joined(pieces: Sequence[tuple[Any, Any]]) -> InMemory:
    """The rows of (inputs, targets), one piece after the other.

    Raises:
        RuntimeError: rows of one piece have another shape than those of another.
    """
    return InMemory(*(_joined([piece[side] for piece in pieces]) for side in (0, 1)))


def beside_tensors(value: Any, *, rows: int, where: str = "") -> str | None:
    """The first part of collated rows that has a value for each row and is no tensor, in words.

    A single number or text, such as a setting that a collate adds, belongs to no row.
    """
    if isinstance(value, Tensor | str | bytes | int | float | None):
        return None
    if isinstance(value, Mapping):
        parts = [(item, f"{where}[{key!r}]") for key, item in value.items()]
    elif isinstance(value, tuple | list):
        is_column = len(value) == rows and not tensors_of(value)
        if is_column:
            return f"{where or 'whole'} is a {type(value).__name__} of {type(value[0]).__name__}"
        parts = [(item, f"{where}[{place}]") for place, item in enumerate(value)]
    else:
        return f"{where or 'whole'} is a {type(value).__name__}"
    told = (beside_tensors(item, rows=rows, where=part) for item, part in parts)
    return next(filter(None, told), None)


def _joined(values: Sequence[Any]) -> Any:
    leaves = list(zip(*(tensors_of(value) for value in values), strict=True))
    whole = iter([torch.cat(parts) for parts in leaves])
    return each_tensor(values[0], lambda _: next(whole))


def picker(value: Any) -> Callable[[Tensor], Any]:
    """Selects rows by their index [B], in new memory."""
    if isinstance(value, Tensor):
        return partial(value.index_select, 0)
    return lambda index: each_tensor(value, lambda tensor: tensor.index_select(0, index))


def run_copier(value: Any) -> Callable[[int, int], Any]:
    """Copies the given number of rows from a first row on."""
    if isinstance(value, Tensor):
        return partial(value.narrow_copy, 0)
    return lambda first, count: each_tensor(value, lambda t: t.narrow_copy(0, first, count))
