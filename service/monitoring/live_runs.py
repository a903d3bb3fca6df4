"""Runs that are looked at again and again; a look reads only what has changed. No torch."""

from __future__ import annotations

import os
import stat
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from service.basics.atomic_files import is_there, told_when_unread
from service.basics.errors import EvenstepError, SpecError
from service.monitoring.snapshot import LatestValues
from service.runs.directory import LATEST_TIME, RunDirectory, is_number
from service.runs.history import History, read_history
from service.storage.copies import Copies, Copy

MOST_LOSSES = 60
"""Of the latest losses, so many are kept for a small chart."""
LEAST_SECONDS = 15.0
"""Between two looks at a store."""
MOST_LISTS_PER_SECOND = 4.0
"""Requests to list objects, which are paid for like writes."""
FIRST_SECONDS = 3.0
"""How long the first look in the background is waited for."""
_LOSS = "train/loss"
_LOOK_BYTES = 1 << 17

Signature = tuple[int, ...]
"""Inode, size and time of change of each file of a run that a look reads."""


@dataclass(frozen=True)
class RunNow:
    """What is known of one run at this moment."""

    name: str
    path: Path
    state: str
    step: int
    steps: int | None
    latest: Mapping[str, float]
    """The latest value of everything that was measured, by key."""
    losses: Sequence[float]
    news: float
    """When it was last heard of, in seconds since 1970."""
    signature: Signature
    address: str | None = None
    """Where the run lives, if `path` is a copy."""

    @property
    def is_running(self) -> bool:
        return self.state in ("new", "running")

    @property
    def seconds_left(self) -> float | None:
        """Until the last step, by the latest rate; None where it is not known."""
        rate, rows = self.latest.get("train/rows_per_second", 0.0), self.latest.get("rows", 0.0)
        if self.steps is None or not rate > 0 or not rows > 0 or not self.is_running:
            return None
        return max(0, self.steps - self.step) * rows / rate


class LiveRun:
    """One run, whose files are read again when they have changed."""

    def __init__(self, path: Path, *, name: str | None = None, copy: Copy | None = None) -> None:
        self._directory = RunDirectory(path)
        self._name = name or path.name
        self._copy = copy
        self._values = LatestValues(
            self._directory, keep=_LOSS, most=MOST_LOSSES, look_bytes=_LOOK_BYTES
        )
        self._signature: Signature = ()
        self._now: RunNow | None = None
        self._spec: dict[str, Any] = {}
        self._spec_facts: tuple[int, ...] = ()

    def look(self) -> RunNow:
        """What is known of it now.

        Raises:
            EvenstepError: it is no run, or what it left cannot be read.
        """
        signature = (*signature_of(self._directory), self._is_abandoned)
        if self._now is None or signature != self._signature or self._now.is_running:
            self._now, self._signature = self._read(signature), signature
        return self._now

    def _read(self, signature: Signature) -> RunNow:
        facts = self._directory.read_facts()
        # How long the run is to be: of one that is done, nobody asks.
        spec = {} if facts["state"] == "done" else self._known_spec()
        history = History(self._directory, facts, spec, is_abandoned=self._is_abandoned)
        latest = dict(self._values.look())
        batch = spec.get("batch")
        rows = batch.get("global_batch") if isinstance(batch, dict) else None
        if is_number(rows):
            latest["rows"] = float(rows)
        attempts = history.attempts
        # Not every value of a row that somebody else wrote is a step or a time.
        for key, most in (("step", 2**53), ("time", LATEST_TIME)):
            if not is_number(latest.get(key, 0), most):
                del latest[key]
        steps = [int(latest.get("step", 0)), *(int(a.get("to_step", 0)) for a in attempts)]
        moments = [float(history.facts.get("created", 0.0)), latest.get("time", 0.0)]
        moments += [float(a[key]) for a in attempts for key in ("started", "ended") if key in a]
        return RunNow(
            self._name,
            self._directory.path,
            history.state,
            max(steps),
            history.steps_at(latest),
            latest,
            tuple(self._values.kept),
            max(moments),
            signature,
            str(self._copy.address) if self._copy is not None else None,
        )

    @property
    def _is_abandoned(self) -> bool:
        return self._copy is not None and self._copy.is_abandoned

    def _known_spec(self) -> dict[str, Any]:
        """The spec as plain values, read again when it has changed; of a run without, nothing."""
        facts = _facts_of(self._directory.spec)  # a run may be extended, or started afresh
        if facts != self._spec_facts:
            try:
                self._spec, self._spec_facts = self._directory.read_spec_values(), facts
            except EvenstepError:
                return {}
        return self._spec if facts else {}


class LiveRuns:
    """Several runs: those that are named, or all in a directory."""

    def __init__(self, paths: Sequence[Path] = (), *, directory: Path | None = None) -> None:
        self._directory = directory
        names = [path.name for path in paths]
        self._runs = {
            path: LiveRun(path, name=path.name if names.count(path.name) == 1 else str(path))
            for path in paths
        }

    def look(self) -> tuple[list[RunNow], list[str]]:
        """The runs, the latest news first, and why others cannot be read."""
        return self._looked()

    def history(self, run: RunNow) -> History:
        """All that is known of one of them.

        Raises:
            EvenstepError: it cannot be read.
        """
        return read_history(run.path)

    @property
    def trouble(self) -> str | None:
        """Why nothing newer is known of the runs."""
        return None

    def seen(self, now: float) -> str | None:
        """How old what is shown is, in words; None where it is what the files say now."""
        return None

    def _looked(self) -> tuple[list[RunNow], list[str]]:
        found, broken = [], []
        if self._directory is not None:
            try:
                paths = list(run_paths(self._directory))
                self._runs = {path: self._runs.get(path) or LiveRun(path) for path in paths}
            except EvenstepError as error:
                broken.append(str(error))
        for run in self._runs.values():
            try:
                found.append(run.look())
            except EvenstepError as error:
                broken.append(str(error))
        return sorted(found, key=lambda run: (not run.is_running, -run.news)), broken


class StoredRuns(LiveRuns):
    """Runs in an object store, and directories beside them: copies that are renewed now and then.

    A store that does not answer is told as a trouble, and the copies stay as they are.
    """

    def __init__(
        self,
        copies: Copies,
        paths: Sequence[Path] = (),
        *,
        every_seconds: float | None,
        in_background: bool = False,
    ) -> None:
        """Args:
        every_seconds: how often to ask the store; None for `LEAST_SECONDS`, or less often where
            that is more than `MOST_LISTS_PER_SECOND`.
        in_background: a look does not wait for the store, but for the first one a few seconds.
        """
        super().__init__(paths)
        self._copies = copies
        self._of_paths = dict(self._runs)
        self._every_seconds = every_seconds
        self._in_background = in_background
        self._asked: float | None = None
        """When the store was last asked, by the monotonic clock."""
        self._read: float | None = None
        """When it last answered, in seconds since 1970."""
        self._trouble: str | None = None
        self._failed: EvenstepError | None = None
        self._asking: threading.Thread | None = None

    def look(self) -> tuple[list[RunNow], list[str]]:
        """See `LiveRuns.look`.

        Raises:
            EvenstepError: the store does not answer the first look, or refuses a later one that
                waits for it.
        """
        is_first = self._asked is None
        if self._is_due and self._in_background:
            self._asking = threading.Thread(target=self._renew, daemon=True, name="copies")
            self._asking.start()
            self._asking.join(FIRST_SECONDS if is_first else 0)
            if is_first and self._failed is not None:
                raise self._failed
        elif self._is_due and is_first:
            self._ask()
        elif self._is_due:
            self._renew()
        runs = self._copies.runs
        names = Counter(copy.path.name for copy in runs) + Counter(p.name for p in self._of_paths)
        self._runs = self._of_paths | {
            copy.path: self._runs.get(copy.path)
            or LiveRun(
                copy.path,
                name=None if names[copy.path.name] == 1 else str(copy.address),
                copy=copy,
            )
            for copy in runs
        }
        found, broken = self._looked()
        return found, [*broken, *self._copies.unread]

    def history(self, run: RunNow) -> History:
        """See `LiveRuns.history`."""
        if run.address is None:
            return read_history(run.path)
        self._copies.whole([run.path])
        is_lost = run.state == "lost"
        return replace(read_history(run.path), address=run.address, is_abandoned=is_lost)

    @property
    def trouble(self) -> str | None:
        """See `LiveRuns.trouble`."""
        return self._trouble

    def seen(self, now: float) -> str | None:
        """See `LiveRuns.seen`."""
        if self._read is None:
            return "being read from the store"
        ago = max(0.0, now - self._read)
        words = f"{ago:.0f} s" if ago < 120 else f"{ago / 60:.0f} min"
        return f"read from the store {words} ago"

    @property
    def _is_due(self) -> bool:
        if self._asking is not None and self._asking.is_alive():
            return False
        least = max(LEAST_SECONDS, self._copies.requests / MOST_LISTS_PER_SECOND)
        pause = self._every_seconds or least
        return self._asked is None or time.monotonic() - self._asked >= pause

    def _renew(self) -> None:
        try:
            self._ask()
        except EvenstepError as error:
            if isinstance(error, SpecError) and not self._in_background:
                raise
            self._failed, self._trouble = error, str(error)

    def _ask(self) -> None:
        try:
            self._copies.look()
            self._read, self._trouble = time.time(), None
        finally:
            self._asked = time.monotonic()


def run_paths(directory: Path) -> Iterator[Path]:
    """The runs in a directory; a link is none, wherever it leads.

    Raises:
        SpecError: permission is denied, or it is no longer there.
        EvenstepError: it cannot be read at the moment.
    """
    with told_when_unread(directory), os.scandir(directory) as entries:
        names = sorted(
            entry.name
            for entry in entries
            if not entry.name.startswith(".") and entry.is_dir(follow_symlinks=False)
        )
    for name in names:
        if _is_run(directory / name):
            yield directory / name


def _is_run(directory: Path) -> bool:
    facts = directory / "run.json"
    try:
        return is_there(facts) and not facts.is_symlink()
    except OSError:
        return True  # reading it as a run reports the reason


def signature_of(directory: RunDirectory) -> Signature:
    """Equal as long as no file of the run that is shown has changed."""
    files = (directory.facts, directory.metrics, directory.failures)
    return tuple(number for file in files for number in _facts_of(file))


def _facts_of(path: Path) -> tuple[int, int, int] | tuple[()]:
    try:
        found = os.lstat(path)
    except OSError:
        return ()
    if stat.S_ISLNK(found.st_mode):
        return ()
    return found.st_ino, found.st_size, found.st_mtime_ns
