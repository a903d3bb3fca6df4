"""The rows of an Arrow table: numbers as numpy's values, all else as Python's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import types


class Columns:
    """A table in memory; each row is a mapping from the names of the columns."""

    def __init__(self, table: pa.Table) -> None:
        self._rows = int(table.num_rows)
        self._columns = {
            name: _column(table.column(name).combine_chunks()) for name in table.column_names
        }

    def __len__(self) -> int:
        return self._rows

    def row(self, index: int) -> dict[str, Any]:
        return {name: value(index) for name, value in self._columns.items()}

    def close(self) -> None:
        """Nothing: the file has been read."""


def _column(array: Any) -> Callable[[int], Any]:
    """The values of a column, by the number of the row."""
    if isinstance(array, pa.ChunkedArray):  # without any chunk
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], array.type)
    if isinstance(array.type, pa.FixedShapeTensorType):
        tensors = array.to_numpy_ndarray()
        return lambda row: tensors[row].copy()
    if _is_number(array.type) and not array.null_count:
        numbers = _numbers(array)
        return lambda row: numbers[row]
    if _is_list(array.type) and _is_number(array.type.value_type) and not array.null_count:
        values = array.flatten()
        if not values.null_count:
            return _lists(array, _numbers(values))
    return lambda row: array[row].as_py()


def _lists(array: Any, values: Any) -> Callable[[int], Any]:
    if types.is_fixed_size_list(array.type):
        size = array.type.list_size
        return lambda row: values[row * size : (row + 1) * size].copy()
    # `flatten` begins at the first offset.
    ends = array.offsets.to_numpy() - array.offsets[0].as_py()
    return lambda row: values[ends[row] : ends[row + 1]].copy()


def _numbers(array: Any) -> Any:
    return np.asarray(array.to_numpy(zero_copy_only=False))


def _is_number(kind: pa.DataType) -> bool:
    return bool(types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind))


def _is_list(kind: pa.DataType) -> bool:
    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))
