"""Time between two logged steps: how fast the rows went by, and how long they were waited for."""

from __future__ import annotations

from time import perf_counter

from service.pulse import Pulse


class Clock:
    """Times the train loop of one process, from one reading to the next."""

    def __init__(self, pulse: Pulse, *, step: int) -> None:
        """`pulse` knows how long data was waited for; `step` steps are finished."""
        self._pulse = pulse
        self.restart(step)

    def restart(self, step: int) -> None:
        """Forget the time so far: what comes between two steps is not training."""
        self._since = perf_counter()
        self._waited = self._pulse.seconds_waited
        self._step = step

    def reading(self, step: int, *, rows_per_step: int) -> dict[str, float]:
        """Rows per second and the fraction of time waited, since the last reading."""
        seconds = max(perf_counter() - self._since, 1e-9)
        waited = self._pulse.seconds_waited - self._waited
        values = {
            "train/rows_per_second": (step - self._step) * rows_per_step / seconds,
            "train/data_wait": min(waited / seconds, 1.0),
        }
        self.restart(step)
        return values
