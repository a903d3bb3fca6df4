"""Time limits that count only the time in which this process has run.

A stopped process (SIGSTOP, Ctrl-Z, a frozen container or machine) does not run, but the monotonic
clock continues. A limit that compares two readings of the clock has then expired when the process
continues, although nothing has failed. So a limit here counts checks, and each check adds at most
a fixed time.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Thread
from time import monotonic

LOOK_SECONDS = 1.0
"""A wait checks its limit at least this often."""


class RunningClock:
    """Seconds since its creation, without the time in which this process was stopped.

    Read it regularly: of the time between two readings, at most `most_seconds`
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


class StandingClock:
    """Seconds in which this process has run since something last came forward.

    Read it regularly, as a `RunningClock`.
    """

    def __init__(self, moved: Callable[[], float], *, since: float | None = None) -> None:
        """
        Args:
            moved: when it last came forward, by the monotonic clock.
            since: count from this moment on; None: from when it last came forward.
        """
        self._moved = moved
        self._seen = moved()
        self._before = max(0.0, monotonic() - self._seen) if since is None else monotonic() - since
        self._clock = RunningClock()

    def __call__(self) -> float:
        now = self._moved()
        if now != self._seen:
            self._seen, self._before, self._clock = now, 0.0, RunningClock()
        return self._before + self._clock()


class TimeLimit:
    """A limit of `seconds` for one wait, with checks at most `LOOK_SECONDS` apart."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._clock = RunningClock()

    @property
    def left(self) -> float:
        """Seconds left; 0 when it is over."""
        return max(0.0, self._seconds - self._clock())

    @property
    def look(self) -> float:
        """How long to wait until the next check."""
        return min(self.left, LOOK_SECONDS)

    def wait(self, happens: Callable[[float], object]) -> bool:
        """Whether `happens(seconds)`, which waits at most that long, becomes true in time."""
        while not happens(self.look):
            if not self.left:
                return False
        return True


def joined(thread: Thread, seconds: float) -> bool:
    """Wait for the end of a thread; return whether it ended in time."""

    def has_ended(look_seconds: float) -> bool:
        thread.join(look_seconds)
        return not thread.is_alive()

    return TimeLimit(seconds).wait(has_ended)
