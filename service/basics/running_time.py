"""Limits of time in which only time counts that this process has run.

A stopped process (SIGSTOP, Ctrl-Z, a frozen container or machine) does not run, but the monotonic
clock goes on. A limit that compares two readings of the clock has then expired when the process
continues, although nothing has failed. So a limit here is a count of looks, and each look counts
for a bounded time.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Thread
from time import monotonic

LOOK_SECONDS = 1.0
"""A wait looks at its limit at least this often."""


class RunningClock:
    """Seconds since it was made, without the time in which this process was stopped.

    Whoever uses it looks at it regularly: of the time between two looks, at most `most_seconds`
    count.
    """

    def __init__(self, most_seconds: float = LOOK_SECONDS) -> None:
        self._most_seconds = most_seconds
        self._seconds = 0.0
        self._looked = monotonic()

    def __call__(self) -> float:
        now = monotonic()
        self._seconds += min(now - self._looked, self._most_seconds)
        self._looked = now
        return self._seconds


class TimeLimit:
    """A limit of `seconds` for one wait, in looks that are at most `LOOK_SECONDS` apart."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._clock = RunningClock()

    @property
    def left(self) -> float:
        """Seconds left; 0 when it is over."""
        return max(0.0, self._seconds - self._clock())

    @property
    def look(self) -> float:
        """How long to wait until the next look."""
        return min(self.left, LOOK_SECONDS)

    def wait(self, happens: Callable[[float], object]) -> bool:
        """Whether `happens(seconds)`, which waits at most so long, becomes true in time."""
        while not happens(self.look):
            if not self.left:
                return False
        return True


def joined(thread: Thread, seconds: float) -> bool:
    """Wait for the end of a thread; whether it came in time."""

    def has_ended(look_seconds: float) -> bool:
        thread.join(look_seconds)
        return not thread.is_alive()

    return TimeLimit(seconds).wait(has_ended)
