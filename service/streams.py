"""Data that can only be read one after the other, and taken up again where it was left.

`whole`  Every process reads all of the stream and keeps the micro-batches that are its own.  So
         the promises hold as for other data: the same rows at any number of processes, and a
         resume at any other.  Reading costs every process what it costs one.
`split`  Each process reads its own part, as the stream divides itself.  Reading is shared, but
         which rows meet in a step depends on the number of processes, and so does the run.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any, Literal

from service.errors import DataBroken, SpecError

Mode = Literal["whole", "split"]


def is_stream(data: Any) -> bool:
    """Whether the rows can only be iterated, and not asked for."""
    # torch's and datasets' own classes of that name; torch's inherits a __getitem__ that raises.
    by_name = any(kind.__name__ == "IterableDataset" for kind in type(data).__mro__)
    return by_name or (hasattr(data, "__iter__") and not hasattr(data, "__getitem__"))


class Stream:
    """An iterable data set as one endless sequence of rows, pass after pass."""

    def __init__(self, data: Any, *, mode: Mode, index: int, of: int) -> None:
        """Process `index` of `of` reads it.

        Raises:
            SpecError: it can be read once only, or `split` is asked of a stream that cannot divide
                itself.
        """
        if hasattr(data, "__next__"):
            raise SpecError(
                f"task: the training data is a {type(data).__name__}, which can be read once only. "
                "Give an object whose __iter__ begins anew, so that a run can go on and resume."
            )
        self.mode = mode
        self._of = of
        self._data = _divided(data, index, of) if mode == "split" and of > 1 else data
        self._passes = 0
        self._rows = 0  # since this pass began
        self._rest: Iterator[Any] | None = None

    def take(self, count: int) -> list[Any]:
        """The next `count` rows; at its end the stream begins again.

        Raises:
            DataBroken: it has no rows at all, or fails.
        """
        return [self._next() for _ in range(count)]

    def place(self) -> dict[str, Any]:
        """Where it is: plain values that JSON keeps.

        Raises:
            SpecError: the stream's own state does not fit into JSON.
        """
        state = self._data.state_dict() if hasattr(self._data, "state_dict") else None
        try:
            state = json.loads(json.dumps(state))
        except TypeError as error:
            raise SpecError(
                f"task: the state of the {type(self._data).__name__} cannot be saved: {error}. "
                "Its state_dict must hold plain numbers, text, lists and mappings."
            ) from error
        return {"passes": self._passes, "rows": self._rows, "state": state}

    def move_to(self, places: list[dict[str, Any]], index: int) -> None:
        """Go on from where the processes of an earlier attempt were.

        Raises:
            SpecError: the stream was split, and among another number of processes.
        """
        if self.mode == "split" and len(places) != self._of:
            raise SpecError(
                f"loader.stream: split among {len(places)} processes so far, and that cannot "
                f"be taken up by {self._of}. Use {len(places)} processes, or loader.stream=whole "
                "from the beginning."
            )
        place = places[index] if self.mode == "split" else places[0]
        self._begin(place["passes"])
        if place["state"] is not None and hasattr(self._data, "load_state_dict"):
            self._data.load_state_dict(copy.deepcopy(place["state"]))
            self._rest, self._rows = iter(self._data), place["rows"]
        else:  # no state of its own: read up to there again
            self.take(place["rows"])

    def _next(self) -> Any:
        if self._rest is None:
            self._begin(self._passes)
        for _ in range(2):
            assert self._rest is not None
            row = next(self._rest, _END)
            if row is not _END:
                self._rows += 1
                return row
            if self._rows == 0:
                break
            self._begin(self._passes + 1)
        raise DataBroken(f"The stream {type(self._data).__name__} gave no row in a whole pass.")

    def _begin(self, number: int) -> None:
        if hasattr(self._data, "set_epoch"):
            self._data.set_epoch(number)
        self._passes, self._rows, self._rest = number, 0, iter(self._data)


_END = object()


def _divided(data: Any, index: int, of: int) -> Any:
    if not hasattr(data, "shard"):
        raise SpecError(
            f"loader.stream: split needs a stream that divides itself; {type(data).__name__} has "
            "no shard(num_shards=, index=). Use loader.stream=whole."
        )
    return data.shard(num_shards=of, index=index)
