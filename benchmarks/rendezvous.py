"""What a start asks of the store where processes meet, and how many connections gloo opens.

    python -m benchmarks.rendezvous [--processes 2 16 64 256 1000]

Each process of a job is a thread here, in a few real processes. They connect over loopback as
`launch.rank` lets them: gloo on a `TCPStore`, then a barrier and a sum by recursive doubling, as
a stop is agreed on. This is done twice: once with a store between gloo and torch's that counts the
requests (in Python, so its threads wait for each other), and once without it, for the time and the
processor time. Connections are those in the table of open files. Those to the store itself are made
before the time starts, a few at a time: for each, torch asks a name server for the names of both
addresses.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch.distributed import (  # type: ignore[attr-defined]  # exported all the same
    ProcessGroupGloo,
    Store,
    TCPStore,
)

from launch.environment import Environment
from launch.rank.joining import connect_in_few_requests, keep_to_loopback
from launch.rank.store import LOOPBACK, own_store
from service.distributed.recursive_doubling import RecursiveDoubling, meet

REAL_PROCESSES = 4
WAIT = timedelta(seconds=300)


class Counting(Store):  # type: ignore[misc]  # torch's class has no types
    """A store that counts what is asked of it, and the bytes of the answers."""

    def __init__(self, inner: Store) -> None:
        super().__init__()
        self._inner: Any = inner
        self.requests = self.received = 0

    def set(self, key: str, value: Any) -> None:
        self.requests += 1
        self._inner.set(key, value)

    def get(self, key: str) -> bytes:
        return self._got([self._inner.get(key)])[0]

    def wait(self, keys: list[str], timeout: timedelta = WAIT) -> None:
        self.requests += 1
        self._inner.wait(keys, timeout)

    def multi_get(self, keys: list[str]) -> list[bytes]:
        return self._got(self._inner.multi_get(keys))

    def has_extended_api(self) -> bool:
        return bool(self._inner.has_extended_api())

    def _got(self, values: list[bytes]) -> list[bytes]:
        self.requests += 1
        self.received += sum(map(len, values))
        return values


def connected(store: Store, rank: int, processes: int) -> ProcessGroupGloo:
    group = ProcessGroupGloo(store, rank, processes, WAIT)
    meet(group)
    sent = torch.full((2,), float(rank), dtype=torch.float64)
    RecursiveDoubling(group).combine(sent)
    assert sent[0] == processes * (processes - 1) / 2
    return group


def some(
    ranks: Sequence[int], processes: int, port: int, told: Connection, *, counting: bool
) -> None:
    """Connect these ranks, each in a thread; send the seconds, and what it took of this process."""
    keep_to_loopback()
    connect_in_few_requests(Environment(0, processes, 0, processes))
    with ThreadPoolExecutor(2) as few:
        inner = few.map(lambda _: TCPStore(LOOPBACK, port, is_master=False, timeout=WAIT), ranks)
        stores = [Counting(each) if counting else each for each in inner]
    before, ran = len(os.listdir("/proc/self/fd")), time.process_time()
    threading.stack_size(1 << 20)
    told.send("ready")
    told.recv()
    with ThreadPoolExecutor(len(ranks)) as pool:
        arguments = zip(stores, ranks, strict=True)
        groups = list(pool.map(lambda each: connected(*each, processes), arguments))
    ran = time.process_time() - ran
    opened = len(os.listdir("/proc/self/fd")) - before
    counted = [store for store in stores if isinstance(store, Counting)]
    asked, received = (sum(s.requests for s in counted), sum(s.received for s in counted))
    told.send((asked, received, opened, ran))
    told.recv()
    os._exit(len(groups) == 0)  # thousands of threads are left as they are


def measured(processes: int, *, counting: bool) -> tuple[float, list[float]]:
    """Seconds, and of each process: requests, bytes received, open files, processor seconds."""
    store = own_store(LOOPBACK)
    context = multiprocessing.get_context("spawn")
    pipes = []
    for part in range(min(REAL_PROCESSES, processes)):
        ours, theirs = context.Pipe()
        ranks = range(part, processes, REAL_PROCESSES)
        words = (ranks, processes, store.port, theirs)
        context.Process(target=some, args=words, kwargs={"counting": counting}).start()
        pipes.append(ours)
    for pipe in pipes:
        pipe.recv()
    begin = time.perf_counter()
    for pipe in pipes:
        pipe.send("go")
    counts = [pipe.recv() for pipe in pipes]
    seconds = time.perf_counter() - begin
    for pipe in pipes:
        pipe.send("end")
    return seconds, [sum(each) / processes for each in zip(*counts, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, nargs="*", default=[2, 16, 63, 64, 256, 1000])
    words = parser.parse_args()
    print(
        "| processes | requests of each | bytes received | open files of each | seconds "
        "| ms of a processor for each |"
    )
    print("|--:|--:|--:|--:|--:|--:|")
    for processes in words.processes:
        _, (asked, received, opened, _) = measured(processes, counting=True)
        seconds, (*_, ran) = measured(processes, counting=False)
        print(
            f"| {processes:,} | {asked:.1f} | {received:,.0f} | {opened:.1f} | {seconds:.2f} "
            f"| {ran * 1000:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
