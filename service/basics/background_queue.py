"""A queue from the training thread to a background thread, which is not woken for each item."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")

LONGEST = 10_000
_LOOK_SECONDS = 0.1


class BackgroundQueue(Generic[T]):
    """Items that several threads put, and one thread takes in order.

    The consumer polls ten times a second. To wake it for each item would cost the producer
    some 30 microseconds: a system call, and then the contention for the interpreter's lock.
    """

    def __init__(self) -> None:
        self._things: deque[T] = deque()
        self._ended = threading.Event()

    def put(self, thing: T) -> None:
        """Add the item, unless `LONGEST` items are waiting."""
        if len(self._things) < LONGEST:
            self._things.append(thing)

    def end(self) -> None:
        """Declare that no more items come."""
        self._ended.set()

    @property
    def ended(self) -> bool:
        """Whether no more items come."""
        return self._ended.is_set()

    def __len__(self) -> int:
        return len(self._things)

    def __iter__(self) -> Iterator[T]:
        """Each item, until the last one."""
        for found in self.looks(_LOOK_SECONDS):
            yield from found

    def looks(self, look_seconds: float) -> Iterator[list[T]]:
        """Items since the last poll (maybe none), at intervals; after `end`, the remaining ones."""
        ended = False
        while not ended:
            ended = self._ended.wait(look_seconds)  # checked first, so that earlier rows are found
            yield [self._things.popleft() for _ in range(len(self._things))]
