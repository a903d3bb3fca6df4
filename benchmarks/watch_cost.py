"""Cost of reporting progress, of agreeing on a stop, and of supervising a process.

torchrun --standalone --nproc-per-node 2 -m benchmarks.watch_cost
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

from launch.environment import Environment, launched
from launch.rank.process_group import process_group
from service.health.heartbeat import Heartbeat

ROUNDS = 300


def median_microseconds(work: Callable[[], object]) -> float:
    """The median time of one call."""
    seconds = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds) * 1e6


def main() -> None:
    heartbeat = Heartbeat()
    with process_group(launched() or Environment()) as world:
        agree = median_microseconds(lambda: world.highest([0, 3]))
        say = median_microseconds(lambda: heartbeat.enter("forward", 3, 2))
        if world.is_lead:
            print("| what | microseconds |\n|---|---|")
            print(f"| one agreement of {world.processes} processes | {agree:.0f} |")
            print(f"| one heartbeat of a process | {say:.1f} |")


if __name__ == "__main__":
    main()
