"""The heartbeat of a process: what it is doing now, and the seconds spent on each kind of work."""

from __future__ import annotations

import json
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import IO, Any, Literal, NamedTuple, Protocol, TypeVar

from service.basics.atomic_files import replace_unsynced, told_when_unwritten, without_link
from service.basics.process_starts import start_of
from service.basics.running_time import TimeLimit
from service.runs.directory import RunDirectory

# In the order of one step.
Work = Literal[
    "starting", "data", "forward", "exchange", "update", "log", "test", "hook", "agree", "save"
]
ORDER: tuple[Work, ...] = (
    "starting",
    "data",
    "forward",
    "exchange",
    "update",
    "log",
    "test",
    "hook",
    "agree",
    "save",
)
WORDS: dict[Work, str] = {
    "starting": "before the first step",
    "data": "waiting for data",
    "forward": "in a forward or backward pass",
    "exchange": "in the last pass, which exchanges gradients",
    "update": "updating the weights",
    "log": "recording metrics",
    "test": "in the test loop",
    "hook": "in a hook of the task",
    "agree": "agreeing on whether to stop",
    "save": "saving a checkpoint",
}
_VISIBLE_SECONDS = 10.0
WRITER = "checkpoints"
"""Name of the thread that writes checkpoints."""


class Numbered(Protocol):
    """The part of a batch that this module uses."""

    @property
    def number(self) -> int: ...


B = TypeVar("B", bound=Numbered)


class Position(NamedTuple):
    """What a process is doing, and in which step."""

    work: Work
    step: int
    """Optimizer steps finished."""
    micro_batch: int
    """Its number in the step, or -1 if there is none."""
    since: float
    """On the monotonic clock."""

    def words(self) -> str:
        """`step 12, micro-batch 3, in a forward or backward pass`."""
        micro_batch = f", micro-batch {self.micro_batch}" if self.micro_batch >= 0 else ""
        return f"step {self.step}{micro_batch}, {WORDS[self.work]}"


@dataclass
class Trace:
    """The last collective operation of this process."""

    name: str = "none"
    count: int = 0
    """Number of collectives so far; ranks with different numbers wait for different ones."""

    def begin(self, name: str) -> None:
        self.name, self.count = name, self.count + 1


class _Seen(NamedTuple):
    """The state at the watchdog's last check."""

    place: Position
    standing_seconds: float
    time: float
    """On the monotonic clock."""
    most_seconds: float


class Heartbeat:
    """The current activity of one process, and the seconds spent on each kind of work.

    An update costs less than a microsecond, so the loops update it for every micro-batch.
    """

    def __init__(
        self, *, rank: int = 0, scratch: Path | None = None, started: float | None = None
    ) -> None:
        """`scratch` is the directory for files before the run has its own."""
        self.rank = rank
        self.started = time.time() if started is None else started
        """Start of this attempt in seconds since 1970, which may be before this process started."""
        self.longest_save_seconds = 0.0
        """The longest save so far, from its start to the checkpoint on disk; on rank 0."""
        self.trace = Trace()
        """The last collective; shared with the world as soon as there is one."""
        self.device_waits = False
        """Whether reading a value waits for it, because this process computes on a device."""
        self.directory: RunDirectory | None = None
        self._scratch = scratch
        self._writing = threading.Lock()
        self._seconds: dict[Work, float] = dict.fromkeys(ORDER, 0.0)
        self._writer_moved = 0.0
        """On the monotonic clock; counts only while training waits for the writer."""
        self._waits_for_the_writer = False
        self._saves = False
        self._seen: _Seen | None = None
        # A clock that was set back must not give a negative duration.
        since = monotonic() - max(0.0, time.time() - self.started)
        self._place: tuple[Work, int, int, float] = ("starting", 0, -1, since)

    def enter(self, work: Work, step: int | None = None, micro_batch: int = -1) -> None:
        """Record the work that starts now; without `step` the step does not change."""
        now = monotonic()
        before, last_step, _, since = self._place
        self._seconds[before] += now - since
        # One assignment, so that another thread always reads a consistent value.
        self._place = (work, last_step if step is None else step, micro_batch, now)
        if work == "exchange":
            self.trace.begin("exchange of gradients")

    @property
    def place(self) -> Position:
        """The current activity of this process."""
        work, step, micro_batch, since = self._place
        if self._waits_for_the_writer:
            since = max(since, self._writer_moved)
        return Position(work, step, micro_batch, since)

    def look(self, most_seconds: float) -> tuple[Position, float]:
        """The position of this process, and the time without progress; for the watchdog.

        Of the time since the last check, at most `most_seconds` count: if it is longer, this
        process was stopped, and perhaps all others with it.
        """
        place = self.place
        standing = self._standing_seconds(place, most_seconds)
        self._seen = _Seen(place, standing, monotonic(), most_seconds)
        return place, standing

    def _standing_seconds(self, place: Position, most_seconds: float) -> float:
        seen, now = self._seen, monotonic()
        if seen is None or seen.place != place:
            return min(now - place.since, most_seconds)
        return seen.standing_seconds + min(now - seen.time, most_seconds)

    @property
    def step(self) -> int:
        """Optimizer steps finished."""
        return self._place[1]

    @property
    def seconds_waited(self) -> float:
        """Seconds waited for data so far, without the current wait."""
        return self._seconds["data"]

    def moved(self) -> None:
        """Record progress of a long wait or operation, so that it is not reported as a hang."""
        self.enter(self.place.work, micro_batch=self.place.micro_batch)

    def writer_moved(self) -> None:
        """Record progress of the writer thread; called by any thread."""
        self._writer_moved = monotonic()

    @contextmanager
    def waiting_for_the_writer(self) -> Iterator[None]:
        """A context in which this process hangs only if its writer thread makes no progress."""
        self._waits_for_the_writer = True
        try:
            yield
        finally:
            self.moved()  # first: the wait is over and must not count towards a hang
            self._waits_for_the_writer = False

    @contextmanager
    def saving(self) -> Iterator[None]:
        """A context in which this process writes its part of a checkpoint."""
        self.writer_moved()
        self._saves = True
        try:
            yield
        finally:
            self._saves = False

    def during(self, work: Work, batches: Iterable[B]) -> Iterator[B]:
        """The same batches; each one is recorded when it is taken."""
        for batch in batches:
            self.enter(work, micro_batch=batch.number)
            yield batch

    def spent(self) -> dict[Work, float]:
        """Seconds of each kind of work so far, including the current one."""
        seconds, (work, _, _, since) = dict(self._seconds), self._place
        seconds[work] += monotonic() - since
        return seconds

    def seconds(self) -> dict[str, float]:
        """The same for the user: rounded, without zeros."""
        seconds = self.spent()
        return {work: round(seconds[work], 3) for work in ORDER if seconds[work]}

    @property
    def scratch(self) -> Path | None:
        """The directory for files that are only needed after a failure."""
        return self.directory.logs if self.directory else self._scratch

    @property
    def failures(self) -> Path | None:
        """The directory for failure reports, if there is one that other processes read."""
        if self.directory is not None:
            return self.directory.failures
        return self._scratch / "failures" if self._scratch else None

    def settle(self, directory: RunDirectory) -> None:
        """From now on write into the directory of the run, and move earlier output there.

        Raises:
            EvenstepError: it cannot be written there.
        """
        log = self._log
        if log is not None and log.exists():
            final = directory.logs / f"rank-{self.rank}.log"
            sys.stdout.flush()
            sys.stderr.flush()
            with told_when_unwritten(final), _opened_to_append(final) as file:
                file.write(log.read_bytes())
                file.flush()
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            log.unlink()
        self.directory = directory

    def speak_into_log(self) -> None:
        """Redirect the output of this process to a file: only rank 0 prints on the terminal."""
        assert self._log is not None, "a process without a terminal has a log file"
        with self._log.open("ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)

    @property
    def _log(self) -> Path | None:
        return self._scratch / f"rank-{self.rank}.log" if self._scratch else None

    def record(self) -> dict[str, Any]:
        """The identity and state of this process, for other processes."""
        place = self.place
        most_seconds = self._seen.most_seconds if self._seen else math.inf  # inf: no watchdog
        standing = self._standing_seconds(place, most_seconds)
        saves = round(monotonic() - self._writer_moved, 3) if self._saves else None
        return {
            "rank": self.rank,
            "host": socket.gethostname(),
            "process": os.getpid(),
            "process_start": start_of(os.getpid()),
            "group": group(),
            "time": round(time.time(), 3),
            "started": self.started,
            "step": place.step,
            "micro_batch": place.micro_batch,
            "work": place.work,
            "last_collective": self.trace.name,
            "collectives": self.trace.count,
            "standing_seconds": round(standing, 3),
            "save_standing_seconds": saves,
            "longest_save_seconds": round(self.longest_save_seconds, 3),
            "seconds": self.seconds(),
        }

    def write(self) -> None:
        """Write the heartbeat to disk, if there is space."""
        if self.scratch is None:
            return
        # The training thread and the watchdog write it. With one temporary file, one thread could
        # miss the file that the other has renamed.  If it cannot be written, the run continues.
        with self._writing, suppress(OSError):
            replace_unsynced(self.scratch / f"rank-{self.rank}.beat", json.dumps(self.record()))


def group() -> str:
    """Unique name of this attempt, equal on all of its processes."""
    names = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_PORT")
    return "/".join(os.environ.get(name, "-") for name in names)


def _opened_to_append(path: Path) -> IO[bytes]:
    """Open a file in a directory that another machine may have created only now.

    An NFS client that has looked for the directory before remembers for a while that it is missing.
    Opening the directory above makes the client ask again.
    """
    limit = TimeLimit(_VISIBLE_SECONDS)
    while True:
        for directory in (path.parents[2], path.parents[1], path.parent):
            with suppress(OSError):
                os.close(os.open(directory, os.O_RDONLY | os.O_DIRECTORY))
        try:
            return open(path, "ab", opener=without_link)
        except FileNotFoundError:
            if not limit.left:
                raise
        time.sleep(0.1)
