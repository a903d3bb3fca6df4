"""`rows_in`: the rows of files in a bucket or a directory, as a stream with a position."""

from __future__ import annotations

import importlib
import os
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from service.basics import randomness
from service.basics.errors import DataBroken, EvenstepError, SpecError, with_place
from service.remote.cache import Cache, default_cache
from service.remote.files import File, Files, Place, digest_of, place_of
from service.remote.parts import Format, Part

FormatName = Literal["parquet", "webdataset", "mds", "datasets"]
_FORMATS: dict[str, tuple[str, str, str]] = {
    # module, class, what it needs
    "parquet": ("parquet", "Parquet", "pip install 'evenstep[data]'"),
    "webdataset": ("tar", "Tar", "pip install 'evenstep[data]'"),
    "mds": ("mds", "Mds", "pip install 'evenstep[data]'"),
    "datasets": ("arrow", "Arrow", "pip install 'evenstep[huggingface]'"),
}
_ENDINGS = {".parquet": "parquet", ".tar": "webdataset", ".tar.gz": "webdataset"}
_ENDINGS |= {".tgz": "webdataset", "index.json": "mds", "state.json": "datasets"}
_ENDINGS |= {"dataset_dict.json": "datasets"}
_FILES, _PARTS, _ROWS = range(3)  # what a random order is of


def rows_in(
    address: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    row: Callable[[dict[str, Any]], Any] | None = None,
    columns: Sequence[str] | None = None,
    shuffle: int = 0,
    format: FormatName | None = None,
    cache: str | os.PathLike[str] | None = None,
    cache_gib: float = 20.0,
) -> StoredRows:
    """Rows of Parquet files, WebDataset or MDS shards or a saved data set of `datasets`: a stream.

    For `train=` of a task. Nothing is read before the first row is needed. With
    `list(rows_in(...))` all rows are read into memory, as `test=` needs them.

    Args:
        address: a file, a directory, or a pattern with `*`, `**` or `{000..011}`; or several of
            these. In a bucket (`s3://bucket/train/*.parquet`, any address of fsspec) or on this
            machine.
        row: makes a row for the model from the stored one, a mapping from names to values. Without
            it the mapping is the row.
        columns: the names to read. By default all.
        shuffle: 0 keeps the order of the files. Otherwise, in each epoch the files and their parts
            are in another order, and the rows of this number of parts are mixed. A part is a row
            group of Parquet, or a whole shard of the other formats. The order is a function of the
            epoch and the position, so a resume needs no earlier rows.
        format: by default recognized from the names of the files.
        cache: the directory for downloaded files; by default `$EVENSTEP_DATA_CACHE`, or
            `~/.cache/evenstep/data`. Processes and runs may share it.
        cache_gib: the most that this directory may hold.
    Raises:
        SpecError: the address or another argument cannot be used.
    """
    if shuffle < 0:
        raise SpecError(f"rows_in: shuffle is {shuffle}. Use 0, or a number of parts to mix.")
    if not cache_gib > 0:
        raise SpecError(f"rows_in: cache_gib is {cache_gib}. Use a size in GiB above 0.")
    if format is not None and format not in _FORMATS:
        raise SpecError(f"rows_in: format is {format!r}; known: {', '.join(_FORMATS)}.")
    if isinstance(columns, str):
        raise SpecError(f"rows_in: columns is a text. Write columns=[{columns!r}].")
    directory = Path(cache) if cache is not None else default_cache()
    store = Cache(directory.absolute(), limit_bytes=int(cache_gib * 2**30))
    source = _Source(place_of(address), format, tuple(columns) if columns is not None else None)
    return StoredRows(source, store, row=row or (lambda values: values), shuffle=shuffle)


class _Source(NamedTuple):
    """What is read."""

    place: Place
    format: FormatName | None
    columns: tuple[str, ...] | None


class _At(NamedTuple):
    """A position in an epoch: a row of the window that begins with a part of a file."""

    epoch: int = 0
    file: int = 0
    part: int = 0
    row: int = 0


class _Unread(NamedTuple):
    """A part that is to be read."""

    file: int
    """Its number in the order of this epoch."""
    part: int
    """The same, in its file."""
    read: Callable[[], Part]
    told: str
    """What messages call it."""


class StoredRows:
    """The rows of files as a stream: made by `rows_in`."""

    def __init__(
        self,
        source: _Source,
        cache: Cache,
        *,
        row: Callable[[dict[str, Any]], Any],
        shuffle: int,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        self.row = row
        self.window = max(1, shuffle)
        self.shuffled = shuffle > 0
        self._source = source
        self._cache = cache
        self._share = share
        self._known: tuple[Format, list[File], str] | None = None
        self._begin = _At()
        self._reading: Reading | None = None

    def __iter__(self) -> Reading:
        """From the last loaded position, or from the beginning of the epoch."""
        begin, self._begin = self._begin, _At(self._begin.epoch)
        if self._reading is not None:
            self._reading.close()
        self._reading = Reading(self, begin)
        return self._reading

    def set_epoch(self, epoch: int) -> None:
        """The next iteration is that of this epoch, from its beginning."""
        self._begin = _At(epoch)

    def state_dict(self) -> dict[str, Any]:
        """The position, and a digest of the files that it belongs to."""
        at = self._reading.at if self._reading is not None else self._begin
        return {**at._asdict(), "order": self._order(), "files": self.fingerprint()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The next iteration begins at the position.

        Raises:
            SpecError: the files are others, or are read in another order.
        """
        if state["files"] != self.fingerprint():
            raise SpecError(
                f"{self.name}: the files are not those that this run began with: their names or "
                "sizes differ. Restore them, or begin a new run with --fresh."
            )
        if state["order"] != self._order():
            raise SpecError(
                f"{self.name}: shuffle was {state['order']} when this run began, and is "
                f"{self._order()} now. Use that again, or begin a new run with --fresh."
            )
        self._begin = _At(*(state[name] for name in _At._fields))

    def shard(self, num_shards: int, index: int) -> StoredRows:
        """Every `num_shards`-th file: for `loader.stream: split`."""
        return StoredRows(
            self._source,
            self._cache,
            row=self.row,
            shuffle=self.window if self.shuffled else 0,
            share=(index, num_shards),
        )

    @property
    def name(self) -> str:
        """The address, for messages."""
        bucket, names = self._source.place
        return f"{bucket}/{names[0]}" if bucket else names[0]

    def _told(self, file: File) -> str:
        bucket = self._source.place.bucket
        return f"{bucket}/{file.name}" if bucket else file.name

    def fingerprint(self) -> str:
        """A digest of the names and sizes of all files."""
        return self._look()[2]

    def _order(self) -> int:
        return self.window if self.shuffled else 0

    def _look(self) -> tuple[Format, list[File], str]:
        """The format, the files of this process, and the fingerprint of all files."""
        if self._known is None:
            bucket, names = self._source.place
            files = Files(bucket, self._cache)
            kind = self._source.format or _recognized(files, names)
            format = _opened(kind, files, names, self._source.columns)
            every = list(format.files())
            if not every:
                raise SpecError(f"{self.name}: has no files with rows.")
            index, of = self._share
            if len(every) < of:
                raise SpecError(
                    f"loader.stream: {len(every)} files cannot be split among {of} processes. Use "
                    "loader.stream=whole, or write more files."
                )
            self._known = format, every[index::of], digest_of(every)
        return self._known

    def parts(self, begin: _At) -> Iterator[_Unread]:
        """The parts of this epoch, in order, from a position on."""
        format, files, _ = self._look()
        for number in range(begin.file, len(files)):
            file = files[self._permuted(len(files), begin.epoch, _FILES)[number]]
            count = format.parts(file)
            order = self._permuted(count, begin.epoch, _PARTS, number)
            for part in range(begin.part if number == begin.file else 0, count):
                which = int(order[part])
                told = f"{self._told(file)}, part {which}" if count > 1 else self._told(file)
                yield _Unread(number, part, partial(format.read, file, which), told)

    def rows_of(self, at: _At, count: int) -> Any:
        """The order of the rows of the window that begins there."""
        return self._permuted(count, at.epoch, _ROWS, at.file, at.part)

    def _permuted(self, count: int, *name: int) -> Any:
        if not self.shuffled:
            return range(count)
        keys = randomness.keys(randomness.STORED, *name, numbers=np.arange(count))
        return np.argsort(keys, kind="stable")


class Reading:
    """An epoch that is being read; the next window is read by a thread beside it."""

    def __init__(self, rows: StoredRows, at: _At) -> None:
        self._stored = rows
        self.at = at
        self._parts = rows.parts(at)
        self._window: _Window | None = None
        self._next: _Ahead | None = None

    def __iter__(self) -> Reading:
        return self

    def __next__(self) -> Any:
        window = self._filled()
        if window is None:
            raise StopIteration
        number = self.at.row
        values = window.row(number)
        self.at = self.at._replace(row=number + 1)
        try:
            return self._stored.row(values)
        except EvenstepError:
            raise
        except Exception as error:  # also StopIteration, which would end the epoch here
            raise DataBroken(
                f"{window.told(number)}: row= of rows_in failed: {with_place(error)}. The row has "
                f"{', '.join(values)}."
            ) from error

    def skip(self, count: int) -> int:
        """Go on without making rows; the number of rows, which is lower at the end of the epoch."""
        left = count
        while left and (window := self._filled()) is not None:
            step = min(left, len(window) - self.at.row)
            self.at = self.at._replace(row=self.at.row + step)
            left -= step
        return count - left

    def close(self) -> None:
        """Give up the files."""
        for each in (self._window, self._next):
            if each is not None:
                each.close()
        self._window = self._next = None

    def _filled(self) -> _Window | None:
        """The window that the next row is in; None at the end of the epoch."""
        while self._window is None or self.at.row >= len(self._window):
            if self._window is not None:
                self._window.close()
            # Kept until it has succeeded, so that a failure is raised again and nothing skipped.
            self._next = self._next or self._ahead()
            window = self._next.result()
            if window is None:
                return None
            if self._window is not None:
                self.at = self.at._replace(file=window.file, part=window.part, row=0)
            self._window, self._next = window, self._ahead()
        return self._window

    def _ahead(self) -> _Ahead:
        return _Ahead(self._stored, self._parts, self.at.epoch)


class _Window:
    """Parts whose rows are mixed."""

    def __init__(
        self, stored: StoredRows, at: _At, parts: Sequence[Part], told: Sequence[str]
    ) -> None:
        """`told`: what messages call the parts."""
        self.file, self.part = at.file, at.part
        self._parts = parts
        self._told = told
        self._ends = list(accumulate(len(part) for part in parts))
        self._order = stored.rows_of(at, self._ends[-1])

    def __len__(self) -> int:
        return self._ends[-1]

    def row(self, number: int) -> dict[str, Any]:
        index, row = self._place(number)
        return self._parts[index].row(row)

    def told(self, number: int) -> str:
        """The file, the part and the row of this row of the window, for messages."""
        index, row = self._place(number)
        return f"{self._told[index]}, row {row}"

    def _place(self, number: int) -> tuple[int, int]:
        """The part of this row, and the number of the row in it."""
        place = int(self._order[number])
        index = bisect_right(self._ends, place)
        return index, place - (self._ends[index - 1] if index else 0)

    def close(self) -> None:
        for part in self._parts:
            part.close()


class _Ahead:
    """The next window, which a thread reads."""

    def __init__(self, stored: StoredRows, parts: Iterator[_Unread], epoch: int) -> None:
        self._stored = stored
        self._parts = parts
        self._epoch = epoch
        self._window: _Window | None = None
        self._failed: BaseException | None = None
        self._is_closed = False
        self._lock = threading.Lock()
        # A daemon: a process that ends does not wait for a download.
        self._thread = threading.Thread(target=self._work, name="rows", daemon=True)
        self._thread.start()

    def result(self) -> _Window | None:
        """The window, None at the end of the epoch; or the error of the thread."""
        self._thread.join()
        if self._failed is not None:
            raise self._failed
        return self._window

    def close(self) -> None:
        """Give it up; its thread ends after the part that it is reading."""
        with self._lock:
            self._is_closed = True
            if self._window is not None:
                self._window.close()

    def _work(self) -> None:
        read: list[Part] = []
        told: list[str] = []
        try:
            begins: _At | None = None
            for unread in islice(self._parts, self._stored.window):
                begins = begins or _At(self._epoch, unread.file, unread.part)
                read.append(unread.read())
                told.append(unread.told)
                if self._is_closed:
                    break
            with self._lock:
                if begins is not None and not self._is_closed:
                    self._window = _Window(self._stored, begins, read, told)
        except BaseException as error:  # raised in the thread that needs the rows
            self._failed = error
        if self._window is None:
            for each in read:
                each.close()


def _recognized(files: Files, names: Sequence[str]) -> str:
    """The format, by the names of the files."""
    for name in names:
        for ending, kind in _ENDINGS.items():
            if name.endswith(ending):
                return kind
    listed = [file.name for file in files.below(names[0])]
    for ending in ("index.json", "state.json", "dataset_dict.json", ".parquet", ".tar"):
        if any(name.endswith(ending) for name in listed):
            return _ENDINGS[ending]
    if not listed:
        raise SpecError(f"{files.told(names[0])}: there is nothing.")
    raise SpecError(
        f"{files.told(names[0])}: holds no files of a known format (*.parquet, *.tar, index.json "
        f"of MDS, state.json of datasets), but such as {listed[0]}. Give rows_in a format."
    )


def _opened(kind: str, files: Files, names: Sequence[str], columns: Sequence[str] | None) -> Format:
    module, name, install = _FORMATS[kind]
    try:
        if kind == "datasets":
            importlib.import_module("datasets")
        made: Callable[..., Format] = getattr(
            importlib.import_module(f"service.remote.{module}"), name
        )
    except ImportError as error:
        raise SpecError(
            f"rows_in: files of the format {kind} need a package that is not installed ({error}). "
            f"{install}"
        ) from error
    return made(files, names, columns)
