"""All processes agree on the step, or the position in a test, at which they stop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from service.distributed.world import World

T = TypeVar("T")

POLL_SECONDS = 0.5
"""Approximate time until all processes know of a request; at least one step."""


class TestInterrupted(Exception):
    """All processes have agreed to abandon a test pass."""


class StopPoll:
    """Checks every few steps, on all processes together, for a request to stop.

    The number of steps between two checks depends on their duration, and the processes agree on
    it in each check: so all of them check at the same steps.
    """

    def __init__(self, world: World, *, most_steps: int) -> None:
        self._world = world
        self._most_steps = most_steps
        self._asked_at = time.monotonic()
        self._asked_step: int | None = None
        """The step of the last check; the first one, where a run begins or resumes, has none."""
        self.next_step = 0
        """The step of the next check."""

    def agreed(self, step: int, wanted: bool) -> bool:
        """Whether all stop now, after `step` finished steps; called by all at every step."""
        if step < self.next_step:
            return False
        now = time.monotonic()
        steps = 0 if self._asked_step is None else step - self._asked_step
        fitting = int(POLL_SECONDS * steps / max(now - self._asked_at, 1e-9))
        fitting = min(fitting, 2 * steps)  # after a few fast steps the next may be slow
        # The shortest interval of all processes is used, so a larger number is more urgent.
        hurry = self._most_steps - min(max(fitting, 1), self._most_steps)
        stop, hurry = self._world.highest([int(wanted), hurry])
        self._asked_at, self._asked_step = now, step
        self.next_step = step + self._most_steps - hurry
        return bool(stop)

    def within(
        self, batches: Iterable[T], *, rounds: int, wanted: Callable[[], bool]
    ) -> Iterator[T]:
        """The same batches of a test pass; before some of them, all processes check together.

        Args:
            rounds: batches that every process has; before the remaining ones no check is possible.
        Raises:
            TestInterrupted: a process has a request to stop.
        """
        poll = StopPoll(self._world, most_steps=self._most_steps)
        for number, batch in enumerate(batches):
            if number < rounds and poll.agreed(number, wanted()):
                raise TestInterrupted
            yield batch
