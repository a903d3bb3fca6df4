"""What every format gives: files, their parts, and the rows of a part."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from service.remote.files import File


class Part(Protocol):
    """Rows that are read together: a row group of Parquet, a shard of the other formats."""

    def __len__(self) -> int: ...

    def row(self, index: int) -> dict[str, Any]:
        """A row by its number: names and values."""
        ...

    def close(self) -> None:
        """Give up the file; a second call does nothing."""
        ...


class Format(Protocol):
    """How the files of a data set are read."""

    def files(self) -> Sequence[File]:
        """The files that hold rows, in order."""
        ...

    def parts(self, file: File) -> int:
        """The number of parts of a file."""
        ...

    def read(self, file: File, part: int) -> Part:
        """The rows of a part."""
        ...
