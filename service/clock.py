"""Time between two logged steps: how fast the rows went by, and how long they were waited for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import TypeVar

T = TypeVar("T")


class Clock:
    """Times the train loop of one process, from one reading to the next."""

    def __init__(self) -> None:
        self._since = perf_counter()
        self._waited = 0.0
        self._steps = 0

    def waiting_for(self, steps: Iterable[T]) -> Iterator[T]:
        """The same steps; the time they take to come counts as waiting for data."""
        source = iter(steps)
        while True:
            asked = perf_counter()
            try:
                step = next(source)
            except StopIteration:
                return
            self._waited += perf_counter() - asked
            self._steps += 1
            yield step

    def reading(self, *, rows_per_step: int) -> dict[str, float]:
        """Rows per second and the fraction of time waited, since the last reading."""
        now = perf_counter()
        seconds = max(now - self._since, 1e-9)
        values = {
            "train/rows_per_second": self._steps * rows_per_step / seconds,
            "train/data_wait": min(self._waited / seconds, 1.0),
        }
        self.restart()
        return values

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Time that is neither training nor waiting; for who brings the steps, between two."""
        begin = perf_counter()
        yield
        seconds = perf_counter() - begin
        self._since += seconds
        self._waited -= seconds

    def restart(self) -> None:
        """Forget the time so far: what comes between two steps is not training."""
        self._since = perf_counter()
        self._waited = 0.0
        self._steps = 0
