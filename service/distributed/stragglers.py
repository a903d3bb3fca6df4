"""Peak memory of the processes, and detection of a straggler that the others wait for.

Every process sends its values at a logged step, in a sum that is computed anyway.
"""

from __future__ import annotations

import socket
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from time import perf_counter
from typing import Any, TypeVar

import torch

from service.distributed.devices import moment, peak_bytes
from service.distributed.world import World
from service.health.throughput import Throughput

T = TypeVar("T")

_NOTABLE_RATIO = 1.3
_NOTABLE_PART = 0.05  # fraction of a step for which the others wait for it
_SAID_AFTER = 3  # consecutive logged steps: a single one may be chance
_PASSES_HELD = 64


class Stopwatch:
    """Times the forward passes of this process, in which it waits for no other process.

    Every backward pass ends when the slowest process has exchanged its gradients; the slowness of a
    process shows equally in its forward passes. With `batchnorm: sync` these also wait for
    the others, and only the time that each waits for its data is its own.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._on_cpu = device.type == "cpu"
        self._begun: Any = None
        # The seconds of each pass; on a device two events, because it may not have finished yet.
        self._latest: deque[Any] = deque(maxlen=_PASSES_HELD)

    def over(self, micro_batches: Iterable[T]) -> Iterator[T]:
        """The same micro-batches; taking one starts the time of its forward pass."""
        for micro_batch in micro_batches:
            self._begun = self._now()
            yield micro_batch

    def end(self) -> None:
        """Record the end of the forward pass."""
        now = self._now()
        self._latest.append(now - self._begun if self._on_cpu else (self._begun, now))

    def seconds_a_pass(self) -> float:
        """The mean of the latest passes without the longest; on a device it waits for the last one.

        A single very long one is chance: this process may have been stopped and continued in it.
        """
        if not self._latest:
            return 0.0
        if self._on_cpu:
            return _mean_but_longest(list(self._latest))
        self._latest[-1][1].synchronize()
        return _mean_but_longest([b.elapsed_time(e) for b, e in self._latest]) / 1e3

    def _now(self) -> Any:
        return perf_counter() if self._on_cpu else moment(self._device, timing=True)


def _mean_but_longest(seconds: list[float]) -> float:
    if len(seconds) > 1:
        seconds.remove(max(seconds))
    return statistics.fmean(seconds)


class StragglerDetector:
    """Collects the times and memory of all processes, and finds the slowest one."""

    width = 2
    """How many numbers one process sends."""

    def __init__(
        self,
        world: World,
        *,
        rounds: int,
        throughput: Throughput,
        stopwatch: Stopwatch,
        say: Callable[[str], None],
    ) -> None:
        """Every process creates one at the same point: they exchange their host names.

        `rounds`: forward passes of a step, one after the other.
        """
        self._device = world.device
        self._rounds = rounds
        self._throughput = throughput
        self._stopwatch = stopwatch
        self._say = say
        self._hosts = world.gather(socket.gethostname())
        self._slow_rank, self._slow_for = -1, 0
        self._said = False

    def own(self) -> list[float]:
        """For this process: seconds for a pass and its data, and peak memory in bytes."""
        waited = self._throughput.waited_a_step / self._rounds
        return [waited + self._stopwatch.seconds_a_pass(), float(peak_bytes(self._device))]

    def reading(self, told: Sequence[Sequence[float]]) -> dict[str, float]:
        """The logged values, from the numbers of each process by rank."""
        values = {"system/peak_memory_gib": max(memory for _, memory in told) / 2**30}
        if len(told) > 1:
            values |= self._slowest([seconds for seconds, _ in told])
        return values

    def _slowest(self, seconds: Sequence[float]) -> dict[str, float]:
        """The slowest rank and its factor, if the others wait for it noticeably."""
        most, others = max(seconds), min(seconds)
        rank = seconds.index(most)
        if most >= _NOTABLE_RATIO * others:  # rarely true; otherwise no median is needed
            others = statistics.median(value for n, value in enumerate(seconds) if n != rank)
        lost = (most - others) * self._rounds
        notable = lost > _NOTABLE_PART * self._throughput.seconds_a_step
        if not notable or most < _NOTABLE_RATIO * others:
            self._slow_rank, self._slow_for = -1, 0
            return {}
        ratio = most / max(others, 1e-9)
        self._slow_for = self._slow_for + 1 if rank == self._slow_rank else 1
        self._slow_rank = rank
        if self._slow_for == _SAID_AFTER and not self._said:
            self._said = True
            self._say(
                f"Rank {rank} on {self._hosts[rank]} is a straggler: its forward passes and their "
                f"data take {ratio:.1f} times as long, {lost * 1e3:.3g} ms of every "
                "step. system/slowest_rank in the record follows it; --profile START:STEPS shows "
                "where its time goes."
            )
        return {"system/slowest_rank": rank, "system/slowest_ratio": round(ratio, 3)}
