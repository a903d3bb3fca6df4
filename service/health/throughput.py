"""Throughput between two logged steps: rows per second, and the time spent waiting for data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter

from service.health.heartbeat import Heartbeat


class Throughput:
    """Times the train loop of one process, from one reading to the next."""

    def __init__(
        self,
        heartbeat: Heartbeat,
        *,
        flops_a_row: float | None = None,
        peak_flops: float | None = None,
    ) -> None:
        """Start the measurement.

        Args:
            heartbeat: has the step, and the time spent waiting for data.
            flops_a_row: the operations of training on one row, if known.
            peak_flops: the peak of all devices together in operations per second, if known.
        """
        self._heartbeat = heartbeat
        self._flops_a_row = flops_a_row
        self._peak_flops = peak_flops
        self.restart()

    def restart(self) -> None:
        """Discard the time so far: what happens between two steps is not training."""
        self._since = perf_counter()
        self._waited = self._heartbeat.seconds_waited
        self._step = self._heartbeat.step

    @property
    def seconds_a_step(self) -> float:
        """Since the last reading; 0 before the first step."""
        steps = self._steps()
        return (perf_counter() - self._since) / steps if steps else 0.0

    @property
    def waited_a_step(self) -> float:
        """The part of it, in seconds, spent waiting for data."""
        steps = self._steps()
        return (self._heartbeat.seconds_waited - self._waited) / steps if steps else 0.0

    def reading(self, *, rows_per_step: int, weight: float | None = None) -> dict[str, float]:
        """Rows per second and the fraction of time waited, since the last reading.

        Also, if known, the operations per second and their fraction of the peak.

        Args:
            weight: the weight of the rows of the latest step, if the task gives weights.
        """
        seconds = max(perf_counter() - self._since, 1e-9)
        waited = self._heartbeat.seconds_waited - self._waited
        steps = self._steps()
        rate = steps * rows_per_step / seconds
        values = {
            "train/rows_per_second": rate,
            "train/data_wait": min(max(waited, 0.0) / seconds, 1.0),
        }
        if weight is not None:
            values["train/weight_per_second"] = steps * weight / seconds
        if self._flops_a_row is not None:
            flops = rate * self._flops_a_row
            values["system/tflops"] = flops / 1e12
            if self._peak_flops is not None:
                values["system/flop_utilization"] = flops / self._peak_flops
        self.restart()
        return values

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """A context that counts neither as training nor as waiting; for the source of steps."""
        begin = perf_counter()
        self._heartbeat.enter("log")  # this is not time spent waiting for data
        yield
        self._since += perf_counter() - begin
        self._heartbeat.enter("data")

    def _steps(self) -> int:
        return self._heartbeat.step - self._step
