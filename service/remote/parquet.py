"""Parquet files: a row group is a part, and only the bytes of its needed columns are read."""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from service.basics.errors import DataBroken, SpecError, did_you_mean
from service.remote.columns import Columns
from service.remote.files import File, Files, found
from service.remote.parts import Part

_TAIL_BYTES = 2**16
_MAGIC = b"PAR1"


class Parquet:
    """The row groups of Parquet files."""

    def __init__(self, files: Files, names: Sequence[str], columns: Sequence[str] | None) -> None:
        self._files = files
        self._names = names
        self._columns = columns
        self._footer = lru_cache(maxsize=4)(self._footer_of)

    def files(self) -> Sequence[File]:
        return found(self._files, self._names, ending=".parquet")

    def parts(self, file: File) -> int:
        return int(self._footer(file).num_row_groups)

    def read(self, file: File, part: int) -> Part:
        footer = self._footer(file)
        columns = self._needed(file, footer)
        begin, end = _span(footer.row_group(part), columns)
        held = self._files.hold(file, begin, end)
        try:
            with pq.ParquetFile(
                pa.PythonFile(_Raw(held.read, file.size), mode="r"),
                metadata=footer,
                page_checksum_verification=True,
            ) as opened:
                table = opened.read_row_group(part, columns=columns, use_threads=False)
        except (pa.ArrowException, OSError) as error:
            raise DataBroken(
                f"{self._files.told(file.name)}: row group {part} cannot be read: {error}. Write "
                "the file again."
            ) from error
        finally:
            held.close()
        return Columns(table)

    def _needed(self, file: File, footer: Any) -> list[str]:
        """The names of the columns to read.

        Raises:
            SpecError: the file has no such column.
        """
        known = footer.schema.to_arrow_schema().names
        if self._columns is None:
            return list(known)
        for name in self._columns:
            if name not in known:
                raise SpecError(
                    f"{self._files.told(file.name)}: has no column "
                    f"{name!r}{did_you_mean(name, known)}"
                )
        return list(self._columns)

    def _footer_of(self, file: File) -> Any:
        """The metadata of a file, read from its end."""
        size = min(file.size, _TAIL_BYTES)
        tail = self._files.read(file, file.size - size, file.size)
        needed = int.from_bytes(tail[-8:-4], "little") + 8
        if tail[-4:] != _MAGIC or needed > file.size:
            raise DataBroken(
                f"{self._files.told(file.name)}: does not end as a Parquet file does. It is not "
                "one, or was not uploaded completely; upload it again."
            )
        if needed > size:
            tail = self._files.read(file, file.size - needed, file.size)
        try:
            return pq.read_metadata(pa.BufferReader(tail))
        except (pa.ArrowException, OSError) as error:
            raise DataBroken(
                f"{self._files.told(file.name)}: its metadata cannot be read: {error}. Write the "
                "file again."
            ) from error


def _span(group: Any, columns: Sequence[str]) -> tuple[int, int]:
    """The bytes of a row group from its first needed column to its last."""
    chunks = [group.column(number) for number in range(group.num_columns)]
    tops = tuple((name, f"{name}.") for name in columns)
    used = [
        chunk
        for chunk in chunks
        if any(
            chunk.path_in_schema == name or chunk.path_in_schema.startswith(inside)
            for name, inside in tops
        )
    ]
    if not used:
        return 0, 0
    begins = [
        chunk.dictionary_page_offset or chunk.data_page_offset
        if chunk.has_dictionary_page
        else chunk.data_page_offset
        for chunk in used
    ]
    ends = [begin + chunk.total_compressed_size for begin, chunk in zip(begins, used, strict=True)]
    return min(begins), max(ends)


class _Raw(io.RawIOBase):
    """A file of which only some bytes are here, by their offset in the whole."""

    def __init__(self, read_at: Any, size: int) -> None:
        self._read_at = read_at
        self._size = size
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = start + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        content: bytes = self._read_at(self._at, self._size - self._at if size < 0 else size)
        self._at += len(content)
        return content
