"""Copies of a state that are made while the next pass runs, before the update that changes it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from threading import Event, Lock
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from service.basics.errors import NotSaved
from service.distributed.devices import module_of, moment


class PendingCopy(NamedTuple):
    """A copy to make between tensors of equal size and dtype."""

    name: str
    source: Tensor
    target: Tensor
    """In main memory."""
    watched: Tensor
    """Has the source's memory and counts its changes: operations on a sharded tensor do not count
    as changes of its rows."""


class LateCopies(Protocol):
    """Copies of values that must not be changed before they are complete."""

    def make(self) -> None:
        """Make all copies that nobody has begun."""

    def synchronize(self) -> None:
        """Return when all copies are complete."""

    def permit_change(self) -> None:
        """Order all later changes of the sources after the copies."""

    def require_unchanged(self) -> None:
        """Check, after `synchronize`, that no source was changed before it was copied.

        Raises:
            NotSaved: names the first that was.
        """


class PendingCopies:
    """Copies in main memory that several threads make together.

    The writer of a checkpoint begins at once.  Whoever is about to change the sources makes those
    that are left, and continues when the last one is complete.
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
        """See `LateCopies`."""
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
        """See `LateCopies`."""
        self.make()
        self._all.wait()

    permit_change = synchronize

    def require_unchanged(self) -> None:
        """See `LateCopies`."""
        _require_none(self._changed)


class DeviceCopies:
    """Copies to pinned memory that a device makes on a stream beside the computation.

    They begin after all work that it has so far, also the copies on its current stream.  Nobody
    waits on the host but the writer.
    """

    def __init__(self, copies: Sequence[PendingCopy], device: torch.device, stream: Any) -> None:
        """Queue the copies on `stream`, or on the current one if it is None."""
        self._module = module_of(device)
        self._lock = Lock()
        self._watched = [(copy.name, copy.watched, copy.watched._version) for copy in copies]
        self._changed: list[str] | None = None
        """Those changed before the update; None until an update is permitted."""
        beside = nullcontext() if stream is None else self._module.stream(stream)
        if stream is not None:
            stream.wait_stream(self._module.current_stream())
        with torch.no_grad(), beside:
            for copy in copies:
                copy.target.copy_(copy.source, non_blocking=True)
                if stream is not None:  # a source may be a temporary copy
                    copy.source.record_stream(stream)
            self._arrived = moment(device)

    def make(self) -> None:
        """See `LateCopies`; the device has begun all."""

    def synchronize(self) -> None:
        """See `LateCopies`."""
        self._arrived.synchronize()

    def permit_change(self) -> None:
        """See `LateCopies`."""
        with self._lock:
            self._changed = self._changed_now()
        self._module.current_stream().wait_event(self._arrived)

    def require_unchanged(self) -> None:
        """See `LateCopies`; a change after the copies may be named too."""
        with self._lock:
            changed = self._changed_now() if self._changed is None else self._changed
        _require_none(changed)

    def _changed_now(self) -> list[str]:
        return [name for name, watched, version in self._watched if watched._version != version]


def _require_none(changed: Sequence[str]) -> None:
    if changed:
        raise NotSaved(
            f"{changed[0]} was changed by the forward or backward pass after the step to save, "
            "before it was copied. Change trained weights in updates only, or set "
            "checkpoint.asynchronous=false, which saves before the next pass."
        )
