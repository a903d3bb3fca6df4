"""Runs as they are remembered: what their directories say, read without touching anything."""

from __future__ import annotations

import json
import math
import os
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from service.documents import dotted, read_document, shown
from service.durable import told_when_unread
from service.errors import EvenstepError, SpecError
from service.patience import is_better
from service.run_directory import RunDirectory, find_run
from service.tracking import read_metrics


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
    """Where every thread stood, if the report says so."""


@dataclass(frozen=True, repr=False)
class History:
    """One run: its facts, its spec as plain values, and its metrics."""

    directory: RunDirectory
    facts: dict[str, Any]
    spec: dict[str, Any]
    rows: list[dict[str, float]]
    failures: tuple[Failure, ...] = ()

    def __repr__(self) -> str:
        """What a notebook shows of it: `<run digits: done, step 180 of 180>`."""
        of = f" of {self.steps}" if self.steps else ""
        return f"<run {self.name}: {self.state}, step {self.step}{of}>"

    @property
    def name(self) -> str:
        return str(self.spec.get("name", self.directory.name))

    @property
    def attempts(self) -> list[dict[str, Any]]:
        return list(self.facts.get("attempts", ()))

    @property
    def state(self) -> str:
        """new, running, done, stopped or failed; `lost` where it says running and is not."""
        said = str(self.facts.get("state", "unknown"))
        return "lost" if said == "running" and _writer_is_gone(self.directory) else said

    @property
    def step(self) -> int:
        """The last step that is known to have been taken."""
        logged = int(self.rows[-1]["step"]) if self.rows else 0
        return max([logged, *(int(a.get("to_step", 0)) for a in self.attempts)])

    @property
    def steps(self) -> int | None:
        """Steps of the whole run; None while too little is known to tell."""
        length: dict[str, float] = self.spec.get("length", {})
        if length.get("steps"):
            return int(length["steps"])
        last = self.rows[-1] if self.rows else {"epoch": 0.0}
        if not length.get("epochs") or not last["epoch"]:
            return None
        # An epoch is written with six decimals: a whole number of steps may come out above it.
        return math.ceil(length["epochs"] * last["step"] / last["epoch"] - 1e-3)

    @property
    def news(self) -> float:
        """When it was last heard of, in seconds since 1970."""
        told = [float(self.facts.get("created", 0.0))]
        told += [float(a[key]) for a in self.attempts for key in ("started", "ended") if key in a]
        told += [row["time"] for row in self.rows[-1:]]
        return max(told)

    @property
    def seconds(self) -> float:
        """Time spent in attempts, what came between them left out."""
        return sum(end - begin for begin, end, _ in self.spans())

    def spans(self) -> Iterator[tuple[float, float, str]]:
        """Begin, end and outcome of every attempt; one that never said its end ends with news."""
        starts = [float(a["started"]) for a in self.attempts]
        for number, attempt in enumerate(self.attempts):
            later = starts[number + 1] if number + 1 < len(starts) else math.inf
            heard = [row["time"] for row in self.rows if starts[number] <= row["time"] < later]
            end = float(attempt.get("ended", max(heard, default=starts[number])))
            is_last = number + 1 == len(starts)
            outcome = attempt.get("outcome") or (self.state if is_last else "lost")
            yield starts[number], max(end, starts[number]), str(outcome)

    @cached_property
    def keys(self) -> list[str]:
        """What was measured, in the order in which it first came."""
        return [
            key
            for key in dict.fromkeys(key for row in self.rows for key in row)
            if key not in ("step", "epoch", "time")
        ]

    def series(self, key: str) -> list[tuple[float, float]]:
        """(step, value) wherever `key` was measured."""
        return [(row["step"], row[key]) for row in self.rows if key in row]

    @property
    def best(self) -> Best | None:
        """By the measure that the spec names; the test's loss where it names none."""
        wanted = self.spec.get("checkpoint", {}).get("best") or {}
        measure, mode = wanted.get("measure", "test/loss"), wanted.get("mode", "min")
        best: Best | None = None
        for step, value in self.series(measure):
            if is_better(value, best.value if best else None, mode=mode):
                best = Best(measure, value, int(step))
        return best


def read_history(path: Path | str) -> History:
    """The run in a directory, or the one of that name in `runs/`.

    Raises:
        SpecError: there is no run there, or what it left cannot be read.
    """
    with told_when_unread(Path(path)):
        directory = find_run(Path(path))
        facts = directory.read_facts()
        spec = read_document(directory.spec).values
        rows = read_metrics(directory.metrics) if directory.metrics.exists() else []
        return History(directory, facts, spec, rows, tuple(_failures(directory.path / "failures")))


def histories_in(runs: Path) -> tuple[list[History], list[str]]:
    """The runs in a directory, the latest news first, and why others cannot be read.

    Raises:
        SpecError: there is no such directory.
    """
    if not runs.is_dir():
        raise SpecError(f"There is no directory {runs}. Name the one that `run --runs` was given.")
    found, broken = [], []
    for entry in sorted(runs.iterdir()):
        try:
            with told_when_unread(entry):
                is_run = not entry.name.startswith(".") and (entry / "run.json").exists()
            if is_run:
                found.append(read_history(entry))
        except EvenstepError as error:
            broken.append(str(error))
    return sorted(found, key=lambda history: history.news, reverse=True), broken


def differing(values: Iterable[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """Keys on which nested mappings differ, each with its value in every one of them."""
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
    """Whether the process that holds the run was on this machine and is there no more.

    The lock itself is left alone: trying it could refuse a run that starts at that moment.
    """
    try:
        words = (directory.path / ".lock").read_text().split()
        process, host = int(words[1]), words[3]
    except (OSError, IndexError, ValueError):
        return False
    if host != socket.gethostname():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False  # it is there, and another person's
    return False


def _failures(directory: Path) -> Iterator[Failure]:
    for path in sorted(directory.glob("*.json")):
        try:
            told = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            yield Failure(path.stat().st_mtime, f"{path.name} cannot be read: {error}")
            continue
        told = told if isinstance(told, dict) else {"message": told}
        words = told.get("message") or " at ".join(
            str(told[key]) for key in ("kind", "line") if told.get(key)
        )
        rank = f"rank {told['rank']}: " if "rank" in told else ""
        when = told.get("time")
        moment = float(when) if isinstance(when, int | float) else path.stat().st_mtime
        stacks = str(told.get("stacks", ""))
        yield Failure(moment, f"{rank}{words or path.name}", stacks)
