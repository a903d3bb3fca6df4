"""What a start asks of the store where processes meet, and how many connections gloo opens.

    python -m benchmarks.rendezvous [--processes 2 16 64 256 1000] [--patient] [--small-tables]

Each process of a job is a thread here, in a few real processes. They connect over loopback as
`launch.rank` lets them: gloo on a `TCPStore`, then a barrier and a sum, as a stop is agreed on.
This is done twice: once with a store between gloo and torch's that counts the requests (in Python,
so its threads wait for each other), and once without it, for the time and the processor time.
Connections are those in the table of open files. The threads and their connections to the store are
made before the time starts: the processes of a job come one after the other.

Two things that a job on its own cores does not have limit the simulation. Each has its option.

`--patient`: gloo's thread in each process wakes up 100 times a second, and two cores have no time
left for some thousand of them. A wrapper, compiled by the machine's C compiler and loaded into the
simulated processes, lets it wait for two seconds instead. It also answers torch's questions for the
names of addresses, which it only logs, with the addresses: no name server is asked.

`--small-tables`: in each process gloo's group has an object of 1.4 kB for each of the N, whether it
sends to it or not: 24 GB for 4,096 processes together. With this option each has a group of 16
members, in which those that it sends to have places of their own, see `place`; a store in Python
finds their addresses under the usual keys, so one pass both counts and takes the time. The last two
columns say what one whole table takes, which each process of a job makes on a core of its own.

`--in-pairs` uses recursive doubling where the product uses a tree, to compare.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]  # its wheel has no types
import torch
from torch.distributed import (  # type: ignore[attr-defined]  # exported all the same
    HashStore,
    ProcessGroupGloo,
    Store,
    TCPStore,
)

from launch.environment import Environment
from launch.rank.joining import connect_in_few_requests, keep_to_loopback
from launch.rank.store import LOOPBACK, own_store
from service.distributed.recursive_doubling import (
    MANY,
    RecursiveDoubling,
    agreements,
    meet,
)

FEWEST, THREADS = 4, 256
"""Real processes at least, and simulated ones in each at most, for the limit of open files."""
MEMBERS, OBJECT_BYTES = 16, 1440
WAIT = timedelta(seconds=300)
PATIENT = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <netdb.h>
#include <sys/epoll.h>
int epoll_wait(int fd, struct epoll_event *events, int count, int timeout) {
    static int (*next)(int, struct epoll_event *, int, int);
    if (!next) next = (int (*)(int, struct epoll_event *, int, int))dlsym(RTLD_NEXT, "epoll_wait");
    return next(fd, events, count, timeout == 10 ? 2000 : timeout);
}
int getnameinfo(const struct sockaddr *address, socklen_t size, char *host, socklen_t host_size,
                char *service, socklen_t service_size, int flags) {
    typedef int (*lookup)(const struct sockaddr *, socklen_t, char *, socklen_t, char *, socklen_t,
                          int);
    static lookup next;
    if (!next) next = (lookup)dlsym(RTLD_NEXT, "getnameinfo");
    return next(address, size, host, host_size, service, service_size, flags | NI_NUMERICHOST);
}
"""


def place(rank: int) -> int:
    """The place of a process in a group of 16: those whose ranks differ in one bit have others.

    The exclusive or of the numbers of its bits that are set, as in a Hamming code. A process and
    all that it sends to in recursive doubling have different places, up to 2^15 processes.
    """
    result = 0
    for bit in range(rank.bit_length()):
        if rank >> bit & 1:
            result ^= bit + 1
    return result


class Between(Store):  # type: ignore[misc]  # torch's class has no types
    """A store that counts what is asked of it, and the bytes of the answers."""

    def __init__(self, inner: Store, rank: int, *, small: bool) -> None:
        super().__init__()
        self._inner: Any = inner
        self._rank, self._small = rank, small
        self.requests = self.received = 0

    def set(self, key: str, value: Any) -> None:
        self.requests += 1
        self._inner.set(self._known(key), value)

    def get(self, key: str) -> bytes:
        return self._got([self._inner.get(self._known(key))])[0]

    def wait(self, keys: list[str], timeout: timedelta = WAIT) -> None:
        self.requests += 1
        self._inner.wait([self._known(key) for key in keys], timeout)

    def multi_get(self, keys: list[str]) -> list[bytes]:
        return self._got(self._inner.multi_get([self._known(key) for key in keys]))

    def has_extended_api(self) -> bool:
        return bool(self._inner.has_extended_api())

    def _got(self, values: list[bytes]) -> list[bytes]:
        self.requests += 1
        self.received += sum(map(len, values))
        return values

    def _known(self, key: str) -> str:
        """The key of the process that has this place among those that this one sends to."""
        if not self._small:
            return key
        prefix, _, member = key.rpartition("/")
        bit = place(self._rank) ^ int(member)
        rank = self._rank ^ (1 << bit - 1) if bit else self._rank
        return f"{prefix}/{rank}"


class Placed:
    """A group of 16 members that takes the ranks of a large one."""

    def __init__(self, inner: Any, rank: int, processes: int) -> None:
        self.inner, self._rank, self._processes = inner, rank, processes

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._processes

    def send(self, values: list[torch.Tensor], rank: int, tag: int) -> Any:
        return self.inner.send(values, place(rank), tag)

    def recv(self, values: list[torch.Tensor], rank: int, tag: int) -> Any:
        return self.inner.recv(values, place(rank), tag)


@dataclass(frozen=True)
class Job:
    """The processes of a job that are simulated."""

    processes: int
    port: int
    """Of the store."""
    counting: bool
    small: bool
    """Whether with groups of 16."""
    in_pairs: bool

    def store(self, rank: int) -> Store:
        store = TCPStore(LOOPBACK, self.port, is_master=False, timeout=WAIT)
        return Between(store, rank, small=self.small) if self.counting or self.small else store

    def connected(self, store: Store, rank: int) -> object:
        """What one process does."""
        group: Any
        if self.small:
            inner = ProcessGroupGloo(store, place(rank), MEMBERS, WAIT)
            group = Placed(inner, rank, self.processes)
        else:
            group = ProcessGroupGloo(store, rank, self.processes, WAIT)
        if self.in_pairs:
            sums = RecursiveDoubling(group)
            sums.combine(torch.zeros(1))
        else:
            sums = agreements(group)
            meet(group)
        sent = torch.full((2,), float(rank), dtype=torch.float64)
        sums.combine(sent)
        assert sent[0] == self.processes * (self.processes - 1) / 2
        return group


def some(ranks: Sequence[int], job: Job, told: Connection) -> None:
    """Connect these ranks, each in a thread; send the seconds, and what it took of this process."""
    keep_to_loopback()
    connect_in_few_requests(Environment(0, job.processes, 0, job.processes))
    sys.setswitchinterval(1)  # a thread that waits for Python's lock wakes up so often
    gc.disable()
    with ThreadPoolExecutor(2) as few:
        stores = list(few.map(job.store, ranks))
    threading.stack_size(1 << 20)
    here, go = threading.Barrier(len(ranks) + 1), threading.Event()

    def one(store: Store, rank: int) -> object:
        here.wait()
        go.wait()
        return job.connected(store, rank)

    pool = ThreadPoolExecutor(len(ranks))
    running = [pool.submit(one, *each) for each in zip(stores, ranks, strict=True)]
    here.wait()
    before, ran = len(os.listdir("/proc/self/fd")), time.process_time()
    told.send("ready")
    told.recv()
    go.set()
    groups = [each.result() for each in running]
    told.send(time.process_time() - ran)
    opened = len(os.listdir("/proc/self/fd")) - before
    counted = [store for store in stores if isinstance(store, Between)]
    told.send((sum(s.requests for s in counted), sum(s.received for s in counted), opened))
    told.recv()
    os._exit(len(groups) == 0)  # thousands of threads are left as they are


@dataclass(frozen=True)
class Took:
    """What a start took."""

    seconds: float
    processor_ms: float
    """Of each process."""
    store_seconds: float
    """Of a processor, of the store's one thread."""
    requests: float
    received: float
    opened: float
    """Of each process: requests, bytes, open files."""


def measured(processes: int, ways: argparse.Namespace, *, counting: bool) -> Took:
    store = own_store(LOOPBACK)
    job = Job(processes, store.port, counting, ways.small_tables, ways.in_pairs)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.rendezvous"])
    pipes = []
    real = min(processes, max(FEWEST, -(-processes // THREADS)))
    for part in range(real):
        ours, theirs = context.Pipe()
        words = (range(part, processes, real), job, theirs)
        context.Process(target=some, args=words, daemon=True).start()
        theirs.close()
        pipes.append(ours)
    for pipe in pipes:
        pipe.recv()
    begin, ran = time.perf_counter(), time.process_time()
    for pipe in pipes:
        pipe.send("go")
    processor = sum(pipe.recv() for pipe in pipes)
    seconds, ran = time.perf_counter() - begin, time.process_time() - ran
    counts = [sum(each) / processes for each in zip(*(pipe.recv() for pipe in pipes), strict=True)]
    for pipe in pipes:
        pipe.send("end")
    return Took(seconds, processor / processes * 1000, ran, *counts)


def table(processes: int, told: Connection) -> None:
    """Send the milliseconds of a processor and the megabytes of one process's group in gloo."""
    keep_to_loopback()
    os.environ["TORCH_GLOO_LAZY_INIT"] = "1"  # also for few: there are no others
    store, kept, own = HashStore(), [], psutil.Process()
    for rank, size in ((0, MANY), (1, processes)):  # the first loads what all need
        ran, used = time.process_time(), own.memory_info().rss
        kept.append(ProcessGroupGloo(store, rank, size, WAIT))
    ran, used = time.process_time() - ran, own.memory_info().rss - used
    told.send((ran * 1000, used / 1e6))
    os._exit(len(kept) == 0)


def one_table(processes: int) -> tuple[float, float]:
    """Milliseconds of a processor, and megabytes."""
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe()
    context.Process(target=table, args=(processes, theirs), daemon=True).start()
    theirs.close()
    took: tuple[float, float] = ours.recv()
    return took


def make_patient(folder: Path) -> None:
    """Let the processes that are started from now on load the wrapper."""
    compiler = shutil.which("cc")
    if compiler is None:
        raise SystemExit("--patient: no C compiler (cc) is installed.")
    source, library = folder / "patient.c", folder / "patient.so"
    source.write_text(PATIENT)
    words = (compiler, "-shared", "-fPIC", "-O2", "-o", library, source, "-ldl")
    subprocess.run(words, check=True)
    os.environ["LD_PRELOAD"] = str(library)


def row(processes: int, ways: argparse.Namespace) -> str:
    table_ms, table_mb = one_table(processes)
    counted = took = measured(processes, ways, counting=True)
    if not ways.small_tables:
        took = measured(processes, ways, counting=False)
    return (
        f"| {processes:,} | {counted.requests:.1f} | {counted.received:,.0f} "
        f"| {counted.opened:.1f} | {took.seconds:.2f} | {took.processor_ms:.1f} "
        f"| {took.store_seconds:.2f} | {table_ms:.1f} | {table_mb:.1f} |"
    )


def wanted() -> argparse.Namespace:
    """The words of the command, if they can be simulated on this machine."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, nargs="*", default=[2, 16, 63, 64, 256, 1000])
    parser.add_argument("--patient", action="store_true")
    parser.add_argument("--small-tables", action="store_true")
    parser.add_argument("--in-pairs", action="store_true")
    ways = parser.parse_args()
    if ways.small_tables and min(ways.processes) < MANY:
        parser.error(f"--small-tables: below {MANY} processes gloo connects each with each.")
    tables, free = OBJECT_BYTES * max(ways.processes) ** 2, psutil.virtual_memory().available
    if tables > free and not ways.small_tables:
        parser.error(
            f"{max(ways.processes):,} processes take {tables / 1e9:.0f} GB here, and "
            f"{free / 1e9:.0f} GB are free: use --small-tables."
        )
    return ways


def main() -> None:
    ways = wanted()
    with tempfile.TemporaryDirectory() as folder:
        if ways.patient:
            make_patient(Path(folder))
        print(
            "| processes | requests of each | bytes received | open files of each | seconds "
            "| ms of a processor for each | seconds of the store's thread | ms for a table "
            "| its MB |"
        )
        print("|" + "--:|" * 9)
        for processes in ways.processes:
            print(row(processes, ways), flush=True)


if __name__ == "__main__":
    main()
