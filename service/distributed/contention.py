"""Lets threads that wait for each other spin on idle cores, and sleep on shared cores.

torch computes with a team of OpenMP threads, which wait for each other after every operation.  A
thread that spins continues immediately, but keeps its core: if another program needs it too, the
team waits for the thread that has none, and training slows down drastically.  libgomp decides by a
count: while a process has more OpenMP threads than available cores, waiting threads sleep almost
immediately (https://gcc.gnu.org/onlinedocs/libgomp/GOMP_005fSPINCOUNT.html).  So a few idle threads
are kept while the cores are shared.  The number of computing threads never changes: that would
change the bits of the result.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

TASKS = Path("/proc/self/task")
_LOOK_SECONDS = 0.5
# Seconds for which a thread was ready without a core, per second and per thread of the team.
_SHARED_FROM, _FREE_BELOW = 0.1, 0.03
_FIRST_REST_SECONDS, _LONGEST_REST_SECONDS = 2.0, 120.0
_MOST_IDLE_THREADS = 256


@contextmanager
def cores_shared(device: torch.device) -> Iterator[None]:
    """A context in which the threads of this process sleep if they would take cores of others.

    Nothing happens if the user has set how they wait, or if they never wait.
    """
    said = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys()
    team = torch.get_num_threads()
    if device.type != "cpu" or said or team == 1 or not TASKS.is_dir():
        yield
        return
    ended = threading.Event()
    watch = threading.Thread(target=_watch, args=(team, ended), name="cores", daemon=True)
    watch.start()
    try:
        yield
    finally:
        ended.set()
        watch.join()


class Patience:
    """Decides, from the time that threads wait for a core, whether waiting threads sleep.

    While they sleep there is less of this time.  So they sleep for a while, twice as long each
    time that the cores are found to be still shared.
    """

    def __init__(self, team: int, *, now: float) -> None:
        self.sleeps = False
        self._team = team
        self._looked = now
        self._rest = _FIRST_REST_SECONDS
        self._changed = now - self._rest

    def look(self, waited: float, *, now: float) -> None:
        """Process the seconds that all threads have waited for a core since the last call."""
        share = waited / (now - self._looked) / self._team
        self._looked = now
        since = now - self._changed
        if not self.sleeps and share > _SHARED_FROM:
            again = since < self._rest
            self._rest = min(2 * self._rest, _LONGEST_REST_SECONDS) if again else self._rest
            self.sleeps, self._changed = True, now
        elif self.sleeps and share < _FREE_BELOW and since >= self._rest:
            self.sleeps, self._changed = False, now
        elif not self.sleeps and since >= _LONGEST_REST_SECONDS:
            self._rest = _FIRST_REST_SECONDS


def waited_for_cores() -> dict[str, float]:
    """Seconds for which each thread of this process has been ready without a core."""
    found = {}
    for task in os.listdir(TASKS):
        try:
            text = (TASKS / task / "schedstat").read_text()
        except OSError:
            continue  # the thread has ended, or this kernel does not count
        found[task] = int(text.split()[1]) / 1e9
    return found


def _watch(team: int, ended: threading.Event) -> None:
    patience = Patience(team, now=time.monotonic())
    before = waited_for_cores()
    held: threading.Event | None = None
    while not ended.wait(_LOOK_SECONDS):
        after = waited_for_cores()
        waited = sum(seconds - before.get(task, 0.0) for task, seconds in after.items())
        before = after
        patience.look(waited, now=time.monotonic())
        if patience.sleeps and held is None:
            held = _hold_threads(team)
        elif not patience.sleeps and held is not None:
            held.set()
            held = None
    if held is not None:
        held.set()


def _hold_threads(team: int) -> threading.Event:
    """Keep enough OpenMP threads to have more threads than cores, until the event is set."""
    count = len(os.sched_getaffinity(0)) - team + 2  # the first one is not additional
    let_go = threading.Event()
    if count <= _MOST_IDLE_THREADS:
        threading.Thread(target=_hold, args=(count, team, let_go), name="idle", daemon=True).start()
    return let_go


def _hold(count: int, team: int, let_go: threading.Event) -> None:
    torch.set_num_threads(count)
    torch.zeros(2**17)  # large enough for torch to use and start the threads
    torch.set_num_threads(team)  # threads that start later inherit this number
    let_go.wait()  # they end with this thread
