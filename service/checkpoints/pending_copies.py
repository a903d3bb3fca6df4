"""Copies of a state that are made while the next pass runs, before the update that changes it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from threading import Event, Lock
from typing import NamedTuple

import torch
from torch import Tensor

from service.basics.errors import NotSaved


class PendingCopy(NamedTuple):
    """A copy to make between tensors in main memory, of equal size and dtype."""

    name: str
    source: Tensor
    target: Tensor
    watched: Tensor
    """Has the source's memory and counts its changes: operations on a sharded tensor do not count
    as changes of its rows."""


class PendingCopies:
    """Copies that several threads make together.

    The writer of a checkpoint begins at once.  Whoever is about to change the sources calls
    `synchronize`, makes those that are left, and continues when the last one is complete.
    """

    def __init__(self, copies: Iterable[PendingCopy]) -> None:
        self._waiting = deque((copy, copy.watched._version) for copy in copies)
        self._left = len(self._waiting)
        self._lock = Lock()
        self._all = Event()
        self._changed: list[str] = []
        if not self._left:
            self._all.set()

    def make(self) -> None:
        """Make all copies that no thread has begun."""
        while True:
            try:
                copy, version = self._waiting.popleft()
            except IndexError:
                return
            try:
                with torch.no_grad():
                    copy.target.copy_(copy.source)
                if copy.watched._version != version:
                    self._changed.append(copy.name)
            finally:
                self._count_one()

    def _count_one(self) -> None:
        with self._lock:
            self._left -= 1
            if not self._left:
                self._all.set()

    def synchronize(self) -> None:
        """Return when all copies are complete."""
        self.make()
        self._all.wait()

    def require_unchanged(self) -> None:
        """Check, after `synchronize`, that no source was changed before it was copied.

        Raises:
            NotSaved: names the first that was.
        """
        if self._changed:
            raise NotSaved(
                f"{self._changed[0]} was changed by the forward or backward pass after the step to "
                "save, before it was copied. With exchange.mode: sharded, only updates may change "
                "trained weights; checkpoint.asynchronous=false saves before the next pass."
            )
