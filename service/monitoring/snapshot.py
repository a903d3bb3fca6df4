"""What the files of a run say at this moment: heartbeats, the latest values, attempts. No torch."""

from __future__ import annotations

import os
import socket
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]  # its wheel has no types

from service.basics.atomic_files import plain
from service.basics.errors import EvenstepError
from service.basics.process_starts import start_of
from service.runs.directory import RunDirectory, read_beat
from service.runs.goodput import account_of
from service.runs.history import History
from service.runs.line_file import values_of
from service.runs.metrics_file import NOT_FINITE

_MOST_BYTES_A_LOOK = 1 << 20
_STARTED_SECONDS = 30.0  # by which the clocks of one launcher's processes may differ


@dataclass(frozen=True)
class Watched:
    """The part of a run that one launcher has started."""

    path: str
    """The directory of the run."""
    first_rank: int
    ranks: int
    is_lead: bool
    """Whether rank 0 is one of them: this launcher then tells of the run as a whole."""
    started: float
    """When the launcher was started, in seconds since 1970."""
    spec: Mapping[str, Any]
    """The parts of the spec that say how long the run is: `length` and `batch`."""

    def record(self) -> dict[str, Any]:
        """As plain values, for another process."""
        return asdict(self)


@dataclass(frozen=True)
class Snapshot:
    """What was found at one moment."""

    name: str
    time: float
    beats: Mapping[int, Mapping[str, Any]]
    """The last heartbeat of each rank that this launcher has started."""
    memory: Mapping[int, int]
    """Bytes of main memory of each of these ranks that runs on this machine."""
    history: History | None
    """The run as a whole; None where another launcher tells of it, or there is none yet."""
    latest: Mapping[str, float]
    """The latest value of everything that was measured, by key, and the row's `step` and `time`."""

    @property
    def goodput(self) -> float | None:
        """The goodput so far, the attempt that is running included."""
        attempts = self.history.attempts if self.history is not None else []
        if not attempts:
            return None
        if "ended" not in attempts[-1]:
            beat = self.beats.get(0, {})
            attempts[-1] = attempts[-1] | {
                "ended": max(self.time, attempts[-1]["started"]),
                "to_step": max(attempts[-1]["from_step"], int(beat.get("step", 0))),
                "seconds": beat.get("seconds", {}),
            }
        return float(account_of(attempts)["goodput"])


class Observer:
    """Reads the files of a run again and again, of the metrics only what is new."""

    def __init__(self, watched: Watched) -> None:
        self._watched = watched
        self._directory = RunDirectory(Path(watched.path))
        self._values = LatestValues(self._directory)

    def look(self) -> Snapshot:
        """What the files say now; what cannot be read is left out."""
        watched = self._watched
        ranks = range(watched.first_rank, watched.first_rank + watched.ranks)
        beats = {rank: beat for rank in ranks if (beat := self._beat(rank)) is not None}
        memory = {rank: held for rank, beat in beats.items() if (held := self._memory(beat))}
        return Snapshot(
            self._directory.name,
            time.time(),
            beats,
            memory,
            self._history() if watched.is_lead else None,
            self._values.look() if watched.is_lead else {},
        )

    def _beat(self, rank: int) -> dict[str, Any] | None:
        """The last heartbeat of a rank, unless it is one of an earlier launcher."""
        beat = read_beat(self._directory.logs, rank)
        if beat is None or beat["started"] < self._watched.started - _STARTED_SECONDS:
            return None
        return beat

    @staticmethod
    def _memory(beat: Mapping[str, Any]) -> int | None:
        if not is_there(beat):
            return None
        try:
            return int(psutil.Process(beat["process"]).memory_info().rss)
        except (psutil.Error, ValueError):
            return None  # it has ended

    def _history(self) -> History | None:
        try:
            facts = self._directory.read_facts()
        except EvenstepError:
            return None  # not begun yet
        # Without the spec's file: what of it matters here does not change while a launcher runs.
        return History(self._directory, facts, dict(self._watched.spec))


def is_there(beat: Mapping[str, Any]) -> bool:
    """Whether the process of a heartbeat is on this machine and has not ended.

    A later process that has its number is not the same; of a heartbeat that does not say when its
    process started, any process of that number counts.
    """
    process, start = beat.get("process"), beat.get("process_start")
    if beat.get("host") != socket.gethostname() or not isinstance(process, int):
        return False
    found = start_of(process)
    return found is not None and start in (None, found)


class LatestValues:
    """The latest value of every key of metrics.jsonl; each look reads what was added."""

    def __init__(
        self,
        directory: RunDirectory,
        *,
        keep: str = "",
        most: int = 0,
        look_bytes: int = _MOST_BYTES_A_LOOK,
    ) -> None:
        """Of the key `keep` also keep the latest `most` values.

        A look reads at most the last `look_bytes` of what was added; with `keep`, of its older rows
        only those with tests.
        """
        self._path = directory.metrics
        self._look_bytes = look_bytes
        self._keep = keep
        self.kept: deque[float] = deque(maxlen=most)
        self._file = (0, 0)
        """Device and inode of the file that was read."""
        self._read = 0
        self._is_within_a_line = False
        """Whether what was read ends within a line that is longer than a look."""
        self._values: dict[str, float] = {}

    def look(self) -> Mapping[str, float]:
        """By key, with the `step`, `epoch` and `time` of the last row."""
        lines = self._new_lines()
        if self._keep:
            lines = _latest_lines(lines, 2 * (self.kept.maxlen or 0))
        rows = [row for row in values_of(lines) if isinstance(row, dict)]
        self._values |= _latest_of(rows)
        for row in rows:
            if self._keep in row:
                self.kept.extend(_numbers({self._keep: row[self._keep]}).values())
        return dict(self._values)

    def _new_lines(self) -> list[bytes]:
        """The lines that were added since the last look; where they are many, the last of them."""
        try:
            descriptor = plain(self._path, os.O_RDONLY)
        except OSError:
            return []  # not begun yet, or not to be read now
        with os.fdopen(descriptor, "rb") as file:
            facts = os.fstat(descriptor)
            if (facts.st_dev, facts.st_ino) != self._file or facts.st_size < self._read:
                # The file of a resumed run is another one.
                self._file, self._read, self._values = (facts.st_dev, facts.st_ino), 0, {}
                self._is_within_a_line = False
                self.kept.clear()
            # With one byte more, which may be the end of the line before.
            begin = max(self._read, facts.st_size - self._look_bytes - 1)
            if begin > self._read:
                self._is_within_a_line = True
            file.seek(begin)
            added = file.read(self._look_bytes + 1)
        whole = added[: added.rfind(b"\n") + 1]
        self._read = begin + len(whole)
        lines = whole.split(b"\n")[:-1]
        if lines and self._is_within_a_line:
            del lines[0]  # its beginning was not read
            self._is_within_a_line = False
        return lines


def _latest_lines(lines: list[bytes], most: int) -> list[bytes]:
    """The last `most` lines, and before them the last so many with a test, which are fewer."""
    older = [line for line in lines[:-most] if b'"test/' in line]
    return [*older[-most:], *lines[-most:]]


def _latest_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The latest number of each key."""
    merged: dict[str, Any] = {}
    for row in rows:
        merged |= row
    numbers = _numbers(merged)
    if len(numbers) < len(merged):  # an earlier row may hold a number of that key
        for row in rows:
            numbers = _numbers(row) if row is rows[0] else numbers | _numbers(row)
    return numbers


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    told = {key: NOT_FINITE.get(v, v) if isinstance(v, str) else v for key, v in row.items()}
    return {
        key: float(value)
        for key, value in told.items()
        if isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**1000)
    }
