"""Node 0 of an elastic job whose run is in a store: what the other nodes of a generation bring."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from launch.stored.in_store import WITHOUT_SUCCESS_SECONDS
from service.basics.errors import EvenstepError
from service.basics.running_time import StandingClock
from service.storage.address import Address
from service.storage.beside import Uploading

_TELL_AFTER_SECONDS = 10.0


class Leading:
    """Offers the others what node 0 resumes from: its own disk may have more than the store."""

    def __init__(self, uploading: Uploading, *, say: Callable[[str], None]) -> None:
        self._uploading = uploading
        self._say = say

    @property
    def address(self) -> Address:
        """Of the run."""
        return self._uploading.address

    def offer(self, *, fresh: bool) -> Callable[[], dict[str, Any] | None]:
        """Ask for the upload; a function that gives what the others are told, None until it is up.

        Args:
            fresh: whether the run starts over, so that nobody resumes from anything.
        Raises:
            EvenstepError: that function: the store takes nothing; another launcher has the run.
        """
        asked, offer = time.monotonic(), self._uploading.offer(fresh=fresh)
        standing = StandingClock(lambda: self._uploading.moved, since=asked)
        waits = [f"The other nodes wait for the upload: {self._uploading.missing()}."]

        def told() -> dict[str, Any] | None:
            if offer.is_settled:
                return {"term": offer.term, "checkpoint": offer.checkpoint}
            self._uploading.require_at_work()
            if waits and time.monotonic() - asked > _TELL_AFTER_SECONDS:
                self._say(waits.pop())
            if standing() > WITHOUT_SUCCESS_SECONDS:
                raise EvenstepError(
                    f"The other nodes cannot resume, because for {WITHOUT_SUCCESS_SECONDS:g} s the "
                    f"store has taken nothing: {self._uploading.missing()}."
                )
            return None

        return told
