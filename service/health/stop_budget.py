"""How long a stop takes, from measured saves, and whether there is enough time. No torch."""

from __future__ import annotations

import math
import os
import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.basics.atomic_files import (
    is_there,
    remove_if_possible,
    told_when_unread,
    write_file,
)
from service.basics.errors import EvenstepError
from service.runs.directory import RunDirectory, read_beat
from service.spec.models import Spec

LEAVING_SECONDS = 10.0
"""For the current step, the end of W&B and the end of the processes."""
LEAST_SECONDS = 120.0
"""The minimum time that the launcher allows for a stop, unless the spec sets another."""
_TRIAL_BYTES = 16 << 20


@dataclass(frozen=True)
class GracePeriod:
    """The time limit of a stop, after which the processes are killed."""

    seconds: float
    name: str
    """The setting to raise."""


@dataclass(frozen=True)
class StopTime:
    """The time of a stop: the current save, the last one, their uploads if any, and the exit."""

    save_seconds: float
    how: str
    """The source of the value: `measured`, or the basis of the estimate."""
    upload_seconds: float = 0.0
    """Of one checkpoint to an object store."""

    @property
    def seconds(self) -> float:
        """The time of a stop in seconds."""
        return 2 * (self.save_seconds + self.upload_seconds) + LEAVING_SECONDS

    def words(self) -> str:
        """The time of a stop, with its parts, as text."""
        uploads = f"two uploads of {self.upload_seconds:.2g} s, " if self.upload_seconds else ""
        return (
            f"{_rounded(self.seconds)} s (two saves of {self.save_seconds:.2g} s, {self.how}, "
            f"{uploads}and {LEAVING_SECONDS:g} s to exit)"
        )

    def too_long_for(self, grace: GracePeriod) -> str | None:
        """One line if a stop takes longer than this limit; otherwise None."""
        if self.seconds <= grace.seconds:
            return None
        lost = "lose the steps since the last save"
        if self.upload_seconds:
            lost = "end before its last checkpoint is uploaded"
        return (
            f"a stop may take {self.words()}, but {grace.name} allows {grace.seconds:g} s. Raise "
            f"it to {_rounded(self.seconds)}, or a stop can {lost}."
        )


class StopBudget:
    """Warns, once for each limit, if a stop takes longer than allowed."""

    def __init__(self, grace_periods: Sequence[GracePeriod], *, say: Callable[[str], None]) -> None:
        self.grace_periods = grace_periods
        self._say = say
        self._said: set[GracePeriod] = set()

    @property
    def is_bounded(self) -> bool:
        """Whether there is any time limit for a stop."""
        return bool(self.grace_periods)

    def learned(self, save_seconds: float, how: str, *, upload_seconds: float = 0.0) -> None:
        """Store the duration of a save, and of the upload of what it has saved."""
        for grace in self.grace_periods:
            told = StopTime(save_seconds, how, upload_seconds).too_long_for(grace)
            if told is not None and grace not in self._said:
                self._said.add(grace)
                self._say(f"WARNING: {told}")


def grace_periods(spec: Spec, *, launcher: GracePeriod | None = None) -> tuple[GracePeriod, ...]:
    """The limits of a stop: of our launcher or the given one, and of a pod."""
    budget, cluster = spec.faults.stop_budget_seconds, spec.kubernetes
    if launcher is None and budget != "auto":
        launcher = GracePeriod(budget, "faults.stop_budget_seconds")
    found = [launcher] if launcher else []
    if cluster is not None:
        found.append(GracePeriod(cluster.grace_seconds, "kubernetes.grace_seconds"))
    return tuple(found)


def budget_seconds(spec: Spec, directory: RunDirectory) -> float:
    """The launcher's limit for a stop: from the spec, or enough for the saves so far."""
    if spec.faults.stop_budget_seconds != "auto":
        return spec.faults.stop_budget_seconds
    try:
        measured = longest_save(directory)
    except EvenstepError:  # run.json cannot be read now, and the stop must not fail because of it
        measured = measured_in([read_beat(directory.logs, 0) or {}])
    return LEAST_SECONDS if measured is None else max(LEAST_SECONDS, 2 * measured.seconds)


def longest_save(directory: RunDirectory) -> StopTime | None:
    """From the longest save of all attempts of a run, including this one; None before the first.

    Raises:
        EvenstepError: run.json cannot be read.
    """
    attempts: list[Mapping[str, Any]] = []
    with told_when_unread(directory.facts):
        there = is_there(directory.facts)
    if there:
        attempts += directory.read_facts()["attempts"]
    return measured_in([*attempts, read_beat(directory.logs, 0) or {}])


def measured_in(attempts: Iterable[Mapping[str, Any]]) -> StopTime | None:
    """The same from the records of the attempts."""
    longest = max((float(a.get("longest_save_seconds", 0.0)) for a in attempts), default=0.0)
    return StopTime(longest, "as measured in this run") if longest else None


def estimated(size_bytes: int | None, directory: Path) -> StopTime | None:
    """From the size of a checkpoint and a disk test; None if either is unknown."""
    place = next((p for p in (directory, *directory.parents) if os.path.isdir(p)), None)
    if size_bytes is None or place is None:
        return None
    piece = os.urandom(1 << 20)  # some file systems store zeros at no cost
    trial = place / f".evenstep-trial-{secrets.token_hex(4)}"
    pieces = math.ceil(min(max(size_bytes, 1), _TRIAL_BYTES) / len(piece))
    begin = time.perf_counter()
    try:
        written = write_file(trial, [piece] * pieces)
    except OSError:
        return None  # the code that needs the file reports that it cannot be written
    finally:
        remove_if_possible(trial)
    rate = written.size_bytes / (time.perf_counter() - begin)
    how = f"estimated from {size_bytes / 1e6:.3g} MB at the {rate / 1e6:.3g} MB/s of this disk"
    return StopTime(size_bytes / rate, how)


def stop_in_words(spec: Spec, takes: StopTime | None) -> str:
    """The line of `evenstep plan` on the time of a stop."""
    told = takes.words() if takes else "an unknown time, until a save of this run has been measured"
    for grace in grace_periods(spec):
        if takes is None or takes.seconds <= grace.seconds:
            told += f"; {grace.name} allows {grace.seconds:g} s"
        else:
            told += (
                f"; WARNING: {grace.name} allows only {grace.seconds:g} s, raise it to "
                f"{_rounded(takes.seconds)}"
            )
    return told


def _rounded(seconds: float) -> int:
    return math.ceil(seconds)
