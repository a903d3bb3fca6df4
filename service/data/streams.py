"""Data that can only be read in order, and is resumed at the position where it was left.

`whole`  Every process reads all of the stream and keeps its own micro-batches.  So the
         guarantees hold as for other data: the same rows at any number of processes, and a
         resume at any other.  Every process has the full cost of reading.
`split`  Each process reads its own part, as the stream divides itself.  Reading is shared, but
         the rows of a step, and so the run, depend on the number of processes.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from service.basics import randomness
from service.basics.errors import DataBroken, EvenstepError, SpecError, with_place
from service.data.serialization import from_plain, plain
from service.distributed.generators import seed_generators

Mode = Literal["whole", "split"]

_KEYS_AHEAD = 1024


def is_stream(data: Any) -> bool:
    """Whether the rows can only be iterated, and not accessed by index."""
    # torch's and datasets' own classes of that name; torch's inherits a __getitem__ that raises.
    by_name = any(kind.__name__ == "IterableDataset" for kind in type(data).__mro__)
    return by_name or (hasattr(data, "__iter__") and not hasattr(data, "__getitem__"))


def reads_at_once(data: Any) -> bool:
    """Whether a data set gives several rows in one call, by `__getitems__`.

    Not if a subclass has its own `__getitem__` beside an inherited `__getitems__`, which does not
    call it: the rows would be read past it.
    """
    if not hasattr(data, "__getitems__"):
        return False
    depth = [
        next((n for n, kind in enumerate(type(data).__mro__) if name in vars(kind)), None)
        for name in ("__getitem__", "__getitems__")
    ]
    one, many = depth
    return one is None or many is None or many <= one


class Stream:
    """An iterable data set as one endless sequence of rows, epoch after epoch."""

    def __init__(self, data: Any, *, mode: Mode, index: int, of: int, seed: int = 0) -> None:
        """Process `index` of `of` reads it.

        Args:
            seed: with the position of a row, determines the random numbers while it is read.
        Raises:
            SpecError: it can be read only once, returns batches, or `split` is set for a stream
                that cannot divide itself.
        """
        if hasattr(data, "__next__"):
            raise SpecError(
                f"task: the training data is a {type(data).__name__}, which can be read only "
                "once. Give an object whose __iter__ starts again from the beginning, so that a "
                "run can continue and resume."
            )
        if getattr(data, "batch_size", None) is not None and hasattr(data, "dataset"):
            raise SpecError(
                f"task: the training data is a {type(data).__name__} that returns batches. Give "
                f"its "
                "data set, from which micro-batches are made, or create it with batch_size=None."
            )
        self.mode = mode
        self._of = of
        self._seed = seed, index if mode == "split" else 0
        self._data = _divided(data, index, of) if mode == "split" and of > 1 else data
        self._passes = 0
        self._rows = 0  # since the start of this epoch
        self._taken = 0  # since the start of the first epoch
        self._rest: Iterator[Any] | None = None
        self._keys: list[int] = []
        self._keyed_from = 0  # the row that has the first of these keys

    def take(self, count: int) -> list[Any]:
        """The next `count` rows; at its end the stream starts again.

        The generators of Python, numpy and torch are seeded for each of them, and for the start of
        each epoch, so the same rows have the same random numbers, also when they are read again.

        Raises:
            DataBroken: it has no rows, or fails.
        """
        rows = []
        with self._told_when_failed():
            for _ in range(count):
                rows.append(self._next())
                self._taken += 1
        return rows

    def pass_over(self, count: int) -> None:
        """Go on by `count` rows that other processes use.

        A stream whose iterator has a `skip(count)`, which returns the number of rows that were
        left, does not make these rows.

        Raises:
            DataBroken: as for `take`.
        """
        while count:
            skip = getattr(self._started(), "skip", None)
            if skip is None:
                self.take(count)
                return
            with self._told_when_failed():
                passed = skip(count)
            self._rows, self._taken = self._rows + passed, self._taken + passed
            count -= passed
            if count:
                self._begin_next()

    def place(self) -> dict[str, Any]:
        """Its position: plain values for JSON.

        Raises:
            SpecError: the stream's own state cannot be saved without a pickle.
        """
        try:
            state = plain(self._data.state_dict()) if _remembers_all(self._data) else None
        except TypeError as error:
            raise SpecError(
                f"task: the state of the {type(self._data).__name__} cannot be saved: {error}. "
                "Its state_dict must hold numbers, text, bytes, tensors, lists and mappings."
            ) from error
        place = {"passes": self._passes, "rows": self._rows, "taken": self._taken}
        return place | {"state": state}

    def move_to(self, places: list[dict[str, Any]], index: int) -> None:
        """Continue from the positions of the processes of an earlier attempt.

        Raises:
            SpecError: the stream was split among another number of processes.
        """
        if self.mode == "split" and len(places) != self._of:
            raise SpecError(
                f"loader.stream: split among {len(places)} processes so far, which "
                f"{self._of} cannot continue. Use {len(places)} processes, or loader.stream=whole "
                "from the beginning."
            )
        place = places[index] if self.mode == "split" else places[0]
        if place["state"] is not None and hasattr(self._data, "load_state_dict"):
            if hasattr(self._data, "_ex_iterable"):
                self._data = _own_copy(self._data)
            self._begin(place["passes"])
            self._data.load_state_dict(from_plain(place["state"]))
            self._rest = self._iterator(place["passes"])
            self._rows, self._taken = place["rows"], place["taken"]
            return
        # It has no state: read again up to there; all epochs if one may depend on another.
        if hasattr(self._data, "set_epoch"):
            self._begin(place["passes"])
            self._taken = place["taken"] - place["rows"]
        self.take(place["taken"] - self._taken)

    @contextmanager
    def _told_when_failed(self) -> Iterator[None]:
        try:
            yield
        except EvenstepError:
            raise
        except Exception as error:
            raise DataBroken(
                f"The stream {type(self._data).__name__} failed after {self._taken} rows: "
                f"{with_place(error)}"
            ) from error

    def _next(self) -> Any:
        while (row := self._drawn(self._started())) is _END:
            self._begin_next()
        self._rows += 1
        return row

    def _drawn(self, rest: Iterator[Any]) -> Any:
        """What follows, read with the random numbers of the next row; `_END` at the end."""
        seed_generators(self._key())
        return next(rest, _END)

    def _key(self) -> int:
        """The key of the next row; computed for many at a time."""
        at = self._taken - self._keyed_from
        if not 0 <= at < len(self._keys):
            numbers = np.arange(self._taken, self._taken + _KEYS_AHEAD)
            self._keys = randomness.keys(randomness.ROW, *self._seed, numbers=numbers).tolist()
            self._keyed_from, at = self._taken, 0
        return self._keys[at]

    def _started(self) -> Iterator[Any]:
        if self._rest is None:
            self._begin(self._passes)
        assert self._rest is not None
        return self._rest

    def _begin_next(self) -> None:
        """Start again from the beginning, after the last row."""
        if self._rows == 0:
            raise DataBroken(
                f"The stream {type(self._data).__name__} returned no row in a whole epoch."
            )
        self._begin(self._passes + 1)

    def _begin(self, number: int) -> None:
        if hasattr(self._data, "set_epoch"):
            self._seed_epoch(number)
            self._data.set_epoch(number)
        self._passes, self._rows, self._rest = number, 0, self._iterator(number)

    def _iterator(self, epoch: int) -> Iterator[Any]:
        """A stream may draw its order here: the same at any number of processes, in any attempt."""
        self._seed_epoch(epoch)
        return iter(self._data)

    def _seed_epoch(self, epoch: int) -> None:
        seed_generators(randomness.key(randomness.STREAM, *self._seed, epoch))


_END = object()


def _remembers_all(data: Any) -> bool:
    """Whether a stream has a state that determines everything that it reads from there on.

    The state of Hugging Face's streams does not include the shuffle buffer: after a resume it is
    filled with later rows, and the rows that were in it are lost.
    """
    inner = getattr(data, "_ex_iterable", None)
    while inner is not None:
        if "Shuffled" in type(inner).__name__ and hasattr(inner, "buffer_size"):
            return False
        inner = getattr(inner, "ex_iterable", None)
    return hasattr(data, "state_dict")


def _own_copy(data: Any) -> Any:
    """A copy of a Hugging Face stream.

    It keeps a state that it is given: the next run in this process with the same data set would
    start there. `copy.copy` shares its attributes.
    """
    copied = object.__new__(type(data))
    vars(copied).update(vars(data))
    return copied


def contents(rows: list[Any]) -> NDArray[np.int64]:
    """Ids for rows without ids: a digest of the content of each: [B]."""
    return np.array([_content(row) for row in rows], np.int64)


def _content(row: Any) -> int:
    digest = hashlib.blake2b(digest_size=8)
    _note(row, digest.update)
    return int.from_bytes(digest.digest(), "little", signed=True)


def _checksum(data: bytes | memoryview) -> bytes:
    # CRC-32, five times as fast as a hash: reading an image should not wait for its digest.
    return zlib.crc32(data).to_bytes(4, "little")


_PLAIN = {str, int, float, bool, type(None)}


def _note(value: Any, add: Callable[[bytes], object]) -> None:
    """Add the content of a value to a digest."""
    if type(value) in _PLAIN:
        add(repr(value).encode())
    elif isinstance(value, torch.Tensor):
        add(f"{value.dtype}{list(value.shape)}".encode())
        flat = value.detach().cpu().reshape(-1).contiguous().view(torch.uint8)
        add(_checksum(flat.numpy().data))
    elif isinstance(value, np.ndarray) and value.dtype != object:
        add(f"{value.dtype}{list(value.shape)}".encode())
        add(_checksum(np.ascontiguousarray(value).data))
    elif isinstance(value, Mapping):
        for key, item in value.items():
            add(repr(key).encode())
            _note(item, add)
    elif isinstance(value, (tuple, list)):
        add(str(len(value)).encode())
        kinds = {*map(type, value)}
        if kinds == {int}:  # such as tokens: the same bytes as below, in half of the time
            add(("%d" * len(value) % tuple(value)).encode())
        elif kinds <= _PLAIN:
            add("".join(map(repr, value)).encode())
        else:
            for item in value:
                _note(item, add)
    elif isinstance(value, bytes):
        add(_checksum(value))
    elif isinstance(value, (str, int, float, np.generic)):
        add(repr(value).encode())
    else:  # an object of an unknown class, such as an image: its type
        add(type(value).__qualname__.encode())


def _divided(data: Any, index: int, of: int) -> Any:
    if not hasattr(data, "shard"):
        raise SpecError(
            f"loader.stream: split needs a stream that can be split; {type(data).__name__} has "
            "no shard(num_shards=, index=). Use loader.stream=whole."
        )
    return data.shard(num_shards=of, index=index)
