"""The history of a run, read from its directory without changing anything."""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from service.basics.atomic_files import is_there, read_bytes, read_json, told_when_unread
from service.basics.errors import EvenstepError, SpecError
from service.runs.directory import LATEST_TIME, RunDirectory, changes_in, find_run, is_number
from service.runs.failure_reports import LARGEST_REPORT_BYTES
from service.runs.metrics_file import Curves, best_in, last_row, read_curves, read_metrics
from service.spec.documents import dotted, find, shown

MOST_FAILURES = 1000
_LONGEST_HOLDER_BYTES = 1000


@dataclass(frozen=True)
class Best:
    """The best value of a measure, and the step at which it was first reached."""

    measure: str
    value: float
    step: int


@dataclass(frozen=True)
class Failure:
    """One report from a run's `failures` directory."""

    time: float
    """Seconds since 1970."""
    text: str
    stacks: str = ""
    """The stacks of all threads, if the report has them."""


@dataclass(frozen=True, repr=False)
class History:
    """One run: its metadata, its spec as plain values, and its metrics, read on first use.

    Raises, on access to metrics:
        WillFailAgain: they contain an invalid line.
    """

    directory: RunDirectory
    facts: dict[str, Any]
    spec: dict[str, Any]
    failures: tuple[Failure, ...] = ()
    address: str | None = None
    """Where the run lives, if `directory` is a copy."""
    is_abandoned: bool = False
    """Whether no process holds the run: known of a copy only, by the lease of the run."""

    def __repr__(self) -> str:
        """The text in a notebook: `<run digits: done, step 180 of 180>`."""
        of = f" of {self.steps}" if self.steps else ""
        return f"<run {self.name}: {self.state}, step {self.step}{of}>"

    @cached_property
    def rows(self) -> list[dict[str, float]]:
        """Every row of the metrics, as plain values; a long run may have a million."""
        with self._read():
            return read_metrics(self.directory.metrics) if self._has_metrics else []

    @cached_property
    def curves(self) -> Curves:
        """The same as arrays, one for each key."""
        with self._read():
            return read_curves(self.directory.metrics if self._has_metrics else None)

    @cached_property
    def last(self) -> dict[str, float]:
        """The last row, or an empty one."""
        with self._read():
            return (last_row(self.directory.metrics) if self._has_metrics else None) or {}

    @property
    def _has_metrics(self) -> bool:
        return is_there(self.directory.metrics)

    def _read(self) -> AbstractContextManager[None]:
        return told_when_unread(self.directory.metrics)

    @property
    def place(self) -> str:
        """Where the run is, for a person."""
        return self.address or str(self.directory.path)

    @property
    def name(self) -> str:
        """The name of the run."""
        name = self.spec.get("name")
        return name if isinstance(name, str) else self.directory.name

    @property
    def attempts(self) -> list[dict[str, Any]]:
        """The attempts, as in run.json."""
        return list(self.facts.get("attempts", ()))

    @property
    def changes(self) -> list[dict[str, Any]]:
        """The changes of the spec after the start of the run: `step`, `time`, `by`, `keys`."""
        return changes_in(self.facts)

    @property
    def state(self) -> str:
        """new, running, done, stopped or failed; `lost` if it should be running but is not."""
        said = str(self.facts.get("state", "unknown"))
        is_gone = said == "running" and (self.is_abandoned or _writer_is_gone(self.directory))
        return "lost" if is_gone else said

    @property
    def step(self) -> int:
        """The last step that is known to be finished."""
        return max(
            [int(self.last.get("step", 0)), *(int(a.get("to_step", 0)) for a in self.attempts)]
        )

    @property
    def steps(self) -> int | None:
        """Steps of the whole run; None if unknown."""
        return self.steps_at(self.last)

    def steps_at(self, last: Mapping[str, float]) -> int | None:
        """The same, if the last row is known already."""
        wanted = find(self.spec, ("length", "steps"))
        if is_number(wanted) and wanted:
            return int(wanted)
        epochs, step = find(self.spec, ("length", "epochs")), last.get("step")
        if not is_number(epochs) or not epochs or not last.get("epoch", 0) > 0 or step is None:
            return None
        # An epoch is written with six decimals: a whole number of steps may be slightly exceeded.
        return math.ceil(min(2.0**53, epochs * step / last["epoch"]) - 1e-3)

    @property
    def news(self) -> float:
        """The time of the last sign of life, in seconds since 1970."""
        told = [float(self.facts.get("created", 0.0))]
        told += [float(a[key]) for a in self.attempts for key in ("started", "ended") if key in a]
        return max([*told, self._heard])

    @property
    def _heard(self) -> float:
        """The time of the last row, or 0."""
        time = self.last.get("time", 0.0)
        return float(time) if is_number(time, LATEST_TIME) else 0.0

    @property
    def seconds(self) -> float:
        """Time spent in attempts, without the time between them."""
        return sum(end - begin for begin, end, _ in self.spans())

    def spans(self) -> Iterator[tuple[float, float, str]]:
        """Start, end and outcome of every attempt; a missing end is the last sign of life."""
        starts = [float(a["started"]) for a in self.attempts]
        for number, attempt in enumerate(self.attempts):
            is_last = number + 1 == len(starts)
            end = float(attempt.get("ended", self._heard if is_last else starts[number]))
            outcome = attempt.get("outcome") or (self.state if is_last else "lost")
            yield starts[number], max(end, starts[number]), str(outcome)

    @property
    def keys(self) -> list[str]:
        """The measured keys, in the order of their first occurrence."""
        return list(self.curves.of)

    def series(self, key: str) -> list[tuple[float, float]]:
        """(step, value) of every row with `key`."""
        steps, values = self.curves.of.get(key, ((), ()))
        return [(int(step), float(value)) for step, value in zip(steps, values, strict=True)]

    @cached_property
    def best(self) -> Best | None:
        """By the measure in the spec; by default the test loss."""
        wanted = find(self.spec, ("checkpoint", "best"))
        wanted = wanted if isinstance(wanted, dict) else {}
        measure = wanted.get("measure", "test/loss")
        if not isinstance(measure, str) or not self._has_metrics:
            return None
        with self._read():
            largest = wanted.get("mode") == "max"
            found = best_in(self.directory.metrics, measure, largest=largest)
        return Best(measure, *found) if found else None


def read_history(path: Path | str) -> History:
    """The run in a directory, or the run of that name in `runs/`.

    Raises:
        SpecError: there is no run, or its files cannot be read.
    """
    with told_when_unread(Path(path)):
        return _history_in(find_run(Path(path)))


def _history_in(directory: RunDirectory) -> History:
    facts, spec = directory.read_facts(), directory.read_spec_values()
    return History(directory, facts, spec, tuple(_failures(directory.failures)))


def histories_in(runs: Path) -> tuple[list[History], list[str]]:
    """The runs in a directory, the latest first, and why others cannot be read.

    Raises:
        SpecError: there is no such directory, or permission is denied.
        EvenstepError: it cannot be read at the moment.
    """
    if not os.path.isdir(runs):  # False also for a name that is too long for a file
        raise SpecError(
            f"There is no directory {runs}. Use the directory that was given to `run --runs`."
        )
    with told_when_unread(runs):
        names = sorted(os.listdir(runs))
    found, broken = [], []
    for name in names:
        if name.startswith("."):
            continue
        directory = RunDirectory(runs / name)
        try:
            with told_when_unread(directory.path):
                if is_there(directory.facts):
                    history = _history_in(directory)
                    _ = history.last, history.best  # checks that the values for a list can be read
                    found.append(history)
        except EvenstepError as error:
            broken.append(str(error))
    return sorted(found, key=lambda history: history.news, reverse=True), broken


def differing(values: Iterable[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """Keys on which nested mappings differ, each with its value in all of them."""
    flat = [dict(_flat(value, ())) for value in values]
    keys = dict.fromkeys(key for one in flat for key in one)
    table = [(key, [one.get(key, "-") for one in flat]) for key in keys]
    return [(key, told) for key, told in table if len(set(told)) > 1]


def _flat(value: Any, steps: tuple[str | int, ...]) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(inner, (*steps, key))
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for number, inner in enumerate(value):
            yield from _flat(inner, (*steps, number))
    elif isinstance(value, list):
        yield dotted(steps), ", ".join(_word(item) for item in value) or "none"
    elif not isinstance(value, dict):
        yield dotted(steps), _word(value)


def _word(value: Any) -> str:
    return value if isinstance(value, str) else shown(value)


def _writer_is_gone(directory: RunDirectory) -> bool:
    """Whether the process that holds the run was on this machine and no longer exists.

    The lock itself is not tried: that could make a run fail that starts at this moment.
    """
    try:
        words = read_bytes(directory.path / ".lock", at_most=_LONGEST_HOLDER_BYTES).split()
        process, host = int(words[1]), words[3].decode()
    except (OSError, IndexError, ValueError):
        return False
    if host != socket.gethostname() or not 0 < process < 2**31:
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False  # it exists, and belongs to another user
    return False


def _reports_in(directory: Path) -> list[Path]:
    """The files of the reports, the earliest first; none if there is no permission to look."""
    try:
        names = os.listdir(directory)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return []
    return [directory / name for name in sorted(names) if name.endswith(".json")]


def _failures(directory: Path) -> Iterator[Failure]:
    """The latest reports, up to a limit, the earliest of them first."""
    for path in _reports_in(directory)[-MOST_FAILURES:]:
        try:
            told = read_json(path, at_most=LARGEST_REPORT_BYTES)
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            yield Failure(os.lstat(path).st_mtime, f"{path.name} cannot be read: {why}")
            continue
        told = told if isinstance(told, dict) else {"message": told}
        words = told.get("message") or " at ".join(
            str(told[key]) for key in ("kind", "line") if told.get(key)
        )
        rank = f"rank {told['rank']}: " if "rank" in told else ""
        when = told.get("time")
        moment = float(when) if is_number(when, LATEST_TIME) else os.lstat(path).st_mtime
        stacks = str(told.get("stacks", ""))
        yield Failure(moment, f"{rank}{words or path.name}", stacks)
