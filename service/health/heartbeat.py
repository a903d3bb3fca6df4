"""The heartbeat of a process: what it is doing now, and the seconds spent on each kind of work."""

from __future__ import annotations

import json
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
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

from service.basics.atomic_files import replace_unsynced, told_when_unwritten, without_link
from service.runs.directory import RunDirectory

# In the order in which one step goes through them.
Work = Literal["starting", "data", "forward", "exchange", "update", "log", "test", "agree", "save"]
ORDER: tuple[Work, ...] = (
    "starting",
    "data",
    "forward",
    "exchange",
    "update",
    "log",
    "test",
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
    "agree": "agreeing on whether to stop",
    "save": "saving a checkpoint",
}
WRITER = "checkpoints"
"""How the thread that writes them is called."""


class Numbered(Protocol):
    """A batch, as far as this room knows one."""

    @property
    def number(self) -> int: ...


B = TypeVar("B", bound=Numbered)


class Position(NamedTuple):
    """Where a process is in its run."""

    work: Work
    step: int
    """Optimizer steps finished."""
    micro_batch: int
    """Its number in the step, or -1 where there is none."""
    since: float
    """On the monotonic clock."""

    def words(self) -> str:
        """`step 12, micro-batch 3, in a forward or backward pass`."""
        micro_batch = f", micro-batch {self.micro_batch}" if self.micro_batch >= 0 else ""
        return f"step {self.step}{micro_batch}, {WORDS[self.work]}"


@dataclass
class Trace:
    """What this process last asked all others for."""

    name: str = "none"
    count: int = 0
    """How many times it asked; ranks that differ in it wait for different things."""

    def begin(self, name: str) -> None:
        self.name, self.count = name, self.count + 1


class Heartbeat:
    """The place of one process, and the seconds it has spent at each kind of work.

    To say where one is costs less than a microsecond, so the loops say it for every micro-batch.
    """

    def __init__(
        self, *, rank: int = 0, scratch: Path | None = None, started: float | None = None
    ) -> None:
        """`scratch` takes what is to be kept before the run has a directory."""
        self.rank = rank
        self.started = time.time() if started is None else started
        """Seconds since 1970 at which this attempt began, perhaps before this process did."""
        self.longest_save_seconds = 0.0
        """From the beginning of a save to the checkpoint on disk, at most so far; on the lead."""
        self.trace = Trace()
        """The last collective; the world's own, as soon as there is one."""
        self.device_waits = False
        """Whether a value is waited for where it is read: this process computes on a device."""
        self.directory: RunDirectory | None = None
        self._scratch = scratch
        self._writing = threading.Lock()
        self._seconds: dict[Work, float] = dict.fromkeys(ORDER, 0.0)
        self._writer_moved = 0.0
        """On the monotonic clock; counts only while training waits for the writer."""
        self._waits_for_the_writer = False
        since = monotonic() - (time.time() - self.started)
        self._place: tuple[Work, int, int, float] = ("starting", 0, -1, since)

    def enter(self, work: Work, step: int | None = None, micro_batch: int = -1) -> None:
        """Say what begins now; `step` stays as it was where it is not given."""
        now = monotonic()
        before, last_step, _, since = self._place
        self._seconds[before] += now - since
        # One assignment: whoever reads it from another thread sees a whole place.
        self._place = (work, last_step if step is None else step, micro_batch, now)
        if work == "exchange":
            self.trace.begin("exchange of gradients")

    @property
    def place(self) -> Position:
        """Where this process is now."""
        work, step, micro_batch, since = self._place
        if self._waits_for_the_writer:
            since = max(since, self._writer_moved)
        return Position(work, step, micro_batch, since)

    @property
    def step(self) -> int:
        """Optimizer steps finished."""
        return self._place[1]

    @property
    def seconds_waited(self) -> float:
        """Seconds waited for data so far, the present wait not included."""
        return self._seconds["data"]

    def moved(self) -> None:
        """What this process waits for, or does at length, gets on: it does not stand still."""
        self.enter(self.place.work, micro_batch=self.place.micro_batch)

    def writer_moved(self) -> None:
        """The writer beside training gets on; called by any thread."""
        self._writer_moved = monotonic()

    @contextmanager
    def waiting_for_the_writer(self) -> Iterator[None]:
        """While it lasts, this process stands still only where its writer does."""
        self._waits_for_the_writer = True
        try:
            yield
        finally:
            self.moved()  # first: the wait is over, and must not be held against what follows
            self._waits_for_the_writer = False

    def during(self, work: Work, batches: Iterable[B]) -> Iterator[B]:
        """The same batches; each of them is entered as it comes."""
        for batch in batches:
            self.enter(work, micro_batch=batch.number)
            yield batch

    def spent(self) -> dict[Work, float]:
        """Seconds of each kind of work so far, the present one included."""
        seconds, (work, _, _, since) = dict(self._seconds), self._place
        seconds[work] += monotonic() - since
        return seconds

    def seconds(self) -> dict[str, float]:
        """The same as a person reads it: rounded, and without what took none."""
        seconds = self.spent()
        return {work: round(seconds[work], 3) for work in ORDER if seconds[work]}

    @property
    def scratch(self) -> Path | None:
        """Where this process may write what nobody needs unless it fails."""
        return self.directory.logs if self.directory else self._scratch

    @property
    def failures(self) -> Path | None:
        """Where this process reports that it failed, if there is a place that others read too."""
        if self.directory is not None:
            return self.directory.failures
        return self._scratch / "failures" if self._scratch else None

    def settle(self, directory: RunDirectory) -> None:
        """From now on write into the run's directory; what was printed so far moves there.

        Raises:
            EvenstepError: it cannot be written there.
        """
        log = self._log
        if log is not None and log.exists():
            final = directory.logs / f"rank-{self.rank}.log"
            sys.stdout.flush()
            sys.stderr.flush()
            with told_when_unwritten(final), open(final, "ab", opener=without_link) as file:
                file.write(log.read_bytes())
                file.flush()
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            log.unlink()
        self.directory = directory

    def speak_into_log(self) -> None:
        """Send what this process prints into a file: on the terminal one speaks for all."""
        assert self._log is not None, "a process without a terminal has a place for its words"
        with self._log.open("ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)

    @property
    def _log(self) -> Path | None:
        return self._scratch / f"rank-{self.rank}.log" if self._scratch else None

    def record(self) -> dict[str, Any]:
        """Who and where this process is, as others may read it."""
        place = self.place
        return {
            "rank": self.rank,
            "host": socket.gethostname(),
            "process": os.getpid(),
            "group": group(),
            "time": round(time.time(), 3),
            "started": self.started,
            "step": place.step,
            "micro_batch": place.micro_batch,
            "work": place.work,
            "last_collective": self.trace.name,
            "collectives": self.trace.count,
            "standing_seconds": round(monotonic() - place.since, 3),
            "longest_save_seconds": round(self.longest_save_seconds, 3),
            "seconds": self.seconds(),
        }

    def write(self) -> None:
        """Leave the record where it outlives this process, if there is room for it."""
        if self.scratch is None:
            return
        # Who trains writes it and who watches: of one file, the second would miss what the first
        # has renamed.  Where it cannot be written, no run ends of it: a report lacks a place.
        with self._writing, suppress(OSError):
            replace_unsynced(self.scratch / f"rank-{self.rank}.beat", json.dumps(self.record()))


def group() -> str:
    """Names this attempt, equal on all of its processes and different from every other."""
    names = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_PORT")
    return "/".join(os.environ.get(name, "-") for name in names)
