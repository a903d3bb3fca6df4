"""Copies of runs in a store that are looked at again and again; a look requests only what is new.

One list of a run tells its newest publication and its lease. Of a file that grows, only the pieces
that were added are requested; of the metrics, only the last ones until somebody wants all of them.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from service.basics.atomic_files import remove, told_when_unwritten, write_at
from service.basics.errors import EvenstepError, SpecError
from service.runs.directory import RunDirectory
from service.spec.part import RUN_NAME
from service.storage.address import Address
from service.storage.bringing import RUN, Gone
from service.storage.lease import LEASE, is_abandoned
from service.storage.published import (
    PUBLISHED,
    Piece,
    Stamp,
    decoded,
    newest_published,
    stamps_in,
)
from service.storage.reading import require_published
from service.storage.store import NoObject, Store, StoreFailed, StoreRefused, in_parallel

MOST_WHOLE = 40
"""Copies that have all of their metrics; of the others, the last part is here."""
_TAIL_BYTES = (1 << 17) + 1
"""Of the metrics, what a list of runs reads; one byte more is the end of the line before."""
_SPEC, _METRICS, _FAILURES = "spec.yaml", "metrics.jsonl", "failures/"
_REST_LOOKS = 20
"""Among all runs at an address, one that does not go on is looked at once in so many looks."""
_RENEWAL_SECONDS = 10.0
"""A lease that did not change for so long is read."""
_TRIES = 3


class _Signs(NamedTuple):
    """What one list tells of a run."""

    stamp: Stamp | None
    lease: str
    """Changes whenever the lease is renewed."""


class Copy:
    """The copy of one run."""

    def __init__(self, store: Store, path: Path) -> None:
        self.store = store
        self.path = path
        self.is_abandoned = False
        """Whether the run should go on, but no launcher holds it."""
        self.is_whole = False
        self.failed: str | None = None
        """Why it cannot be read."""
        self.looks = 0
        self._looking = threading.RLock()
        self._state = ""
        self._signs = _Signs(None, "")
        self._renewed = 0.0
        self._run = ""
        self._files: dict[str, Sequence[Piece]] = {}
        """What the store holds of the files that are shown."""
        self._here: dict[str, list[Piece]] = {}
        """What is here of them."""

    @property
    def address(self) -> Address:
        return self.store.address

    @property
    def is_there(self) -> bool:
        """Whether something of the run is here."""
        return RUN in self._here

    @property
    def goes_on(self) -> bool:
        return self._state in ("", "new", "running") and not self.is_abandoned

    def look(self) -> None:
        """Request what has changed.

        Raises:
            StoreFailed: the store does not answer.
            EvenstepError: what it holds of this run cannot be read.
        """
        with self._looking:
            self.looks += 1
            signs = self._signs_now()
            if signs.stamp is not None and signs.stamp != self._signs.stamp:
                self._follow(signs.stamp)
            self._judge(signs)
            self._signs = signs

    def require_there(self) -> None:
        """Check that something of the run was in the store at the last look.

        Raises:
            SpecError: it was not.
        """
        if self._signs.stamp is None and self._signs.lease.strip():
            raise SpecError(
                f"{self.address}: nothing of this run is in the store yet. Its launcher uploads it "
                "with the first checkpoint; try again then."
            )
        if self._signs.stamp is None:
            require_published(self.store)

    def bring_whole(self) -> None:
        """Have all of its metrics and failure reports here, now and after later looks.

        Raises: see `look`.
        """
        with self._looking:
            self.is_whole = True
            try:
                self._bring()
            except Gone:  # replaced by a newer publication meanwhile
                self.look()
                self._bring()

    def shrink(self) -> None:
        """Let go what only `bring_whole` needs."""
        with self._looking:
            self.is_whole = False
            for path in [path for path in self._here if path not in (RUN, _SPEC)]:
                del self._here[path]
                remove(self.path / path)
            self._bring()

    def _signs_now(self) -> _Signs:
        listed = self.store.listing_of(LEASE, PUBLISHED)
        lease = max((name for name in listed if name.startswith(LEASE)), default="")
        stamps = stamps_in(listed)
        version = listed[lease].version if lease else ""
        return _Signs(stamps[-1] if stamps else None, f"{lease} {version}")

    def _follow(self, stamp: Stamp) -> None:
        """Bring what this publication, or a newer one, has changed."""
        name = f"{PUBLISHED}{stamp}.json"
        try:
            held = decoded(self.store.get(name), stamp, self.store)
        except NoObject:
            newest = newest_published(self.store)
            if newest is None:
                return
            held = newest
        for tries_left in reversed(range(_TRIES)):
            if held.run != self._run:  # started over
                for path in self._here:
                    remove(self.path / path)
                self._here, self._run = {}, held.run
            self._files = {p: list(pieces) for p, pieces in held.files.items() if _is_shown(p)}
            try:
                self._bring()
                return
            except Gone:
                newest = newest_published(self.store)
                if newest is None or newest.stamp == held.stamp or not tries_left:
                    raise
                held = newest

    def _judge(self, signs: _Signs) -> None:
        """Find out whether a run that should go on is held by a launcher."""
        if self._state != "running":
            self.is_abandoned = False
            return
        is_first = not self._renewed
        if is_first or signs.lease != self._signs.lease:
            self._renewed = time.monotonic()
            self.is_abandoned = is_first and is_abandoned(self.store)
        elif not self.is_abandoned and time.monotonic() - self._renewed >= _RENEWAL_SECONDS:
            self.is_abandoned = is_abandoned(self.store)

    # ---- the files

    def _bring(self) -> None:
        with told_when_unwritten(self.path):
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
            for path in sorted(self._files, key=lambda path: path != RUN):
                pieces = self._wanted(path)
                if pieces and pieces != self._here.get(path):
                    if not self._grows(path, pieces):
                        self._replace(path, pieces)
                    self._here[path] = pieces
                    if path == RUN:  # first: it says what else is wanted
                        self._state = str(RunDirectory(self.path).read_facts()["state"])

    def _wanted(self, path: str) -> list[Piece]:
        """The pieces of a file that are to be here."""
        pieces = list(self._files[path])
        if self.is_whole or path == RUN:
            return pieces
        if path == _SPEC:  # how long a run is to be: of one that is done, nobody asks
            return pieces if self._state != "done" else []
        if path != _METRICS:
            return []
        begin = pieces[-1].end - _TAIL_BYTES if pieces else 0
        return [piece for piece in pieces if piece.end > begin]

    def _grows(self, path: str, pieces: Sequence[Piece]) -> bool:
        """Append what is new to the copy of a file; False if the file is not what it was.

        What is here stays the same file, so that its readers go on where they were.
        """
        here, file = self._here.get(path), self.path / path
        if not here or not path.endswith(".jsonl"):
            return False
        end = here[-1].end
        if pieces[0].begin > end or pieces[-1].end < end or pieces[0].begin < here[0].begin:
            return False
        descriptor = os.open(file, os.O_RDWR)
        try:
            for piece in pieces:
                if piece in here:
                    continue
                content = self._content(piece)
                overlap = max(0, min(end, piece.end) - piece.begin)
                if os.pread(descriptor, overlap, piece.begin) != content[:overlap]:
                    return False
                write_at(descriptor, content[overlap:], piece.begin + overlap)
        finally:
            os.close(descriptor)
        return True

    def _replace(self, path: str, pieces: Sequence[Piece]) -> None:
        """Write a file anew; what is before its first piece stays a hole."""
        file, partial = self.path / path, self.path / ".partial"
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            for piece in pieces:
                write_at(descriptor, self._content(piece), piece.begin)
        finally:
            os.close(descriptor)
        os.replace(partial, file)

    def _content(self, piece: Piece) -> bytes:
        for _ in range(2):  # the first answer may have been cut on its way
            try:
                content = self.store.get(piece.name)
            except NoObject as missing:
                raise Gone(
                    f"{self.address}/{piece.name} is published, but is not in the store: somebody, "
                    "or a lifecycle rule of the bucket, has deleted it."
                ) from missing
            if hashlib.sha256(content).hexdigest() == piece.sha256:
                return content
        raise Gone(f"{self.address}/{piece.name} is not what was uploaded.")


def _is_shown(path: str) -> bool:
    return path in (RUN, _SPEC, _METRICS) or path.startswith(_FAILURES)


class Copies:
    """The copies of several runs: those that are named, or all at an address."""

    def __init__(
        self, place: Path, runs: Sequence[Store] = (), *, below: Sequence[Store] = ()
    ) -> None:
        """`place` is an empty directory; `below` are the addresses of which all runs are meant."""
        self._place = place
        self._below = below
        self._copies = {str(run.address): Copy(run, self._path(run)) for run in runs}
        self._looks = 0
        self.requests = 0
        """Lists of the last look; what they cost is far more than what the rest costs."""
        self._whole: list[Copy] = []

    @property
    def runs(self) -> list[Copy]:
        """Those that are here; during the first look they become more."""
        return [copy for copy in list(self._copies.values()) if copy.is_there]

    @property
    def unread(self) -> list[str]:
        """Why others are not."""
        found = (copy.failed for copy in list(self._copies.values()))
        return [words for words in found if words is not None]

    def look(self) -> None:
        """Request what has changed.

        Raises:
            StoreFailed: the store does not answer.
            SpecError: it refuses; or, at the first look, a run that is named is not there.
        """
        for store in self._below:
            self._find(store)
        if self._below and not self._copies and not self._looks:
            places = ", ".join(str(store.address) for store in self._below)
            raise SpecError(f"There is no run in {places}. Name the address of run --runs.")
        due = [
            copy for number, copy in enumerate(self._copies.values()) if self._is_due(copy, number)
        ]
        self.requests = len(self._below) + len(due)
        self._looks += 1
        in_parallel(self._look_at, due)
        if self._looks == 1:
            for copy in due:
                if self._is_named(copy) and copy.failed is None:
                    copy.require_there()

    def whole(self, paths: Collection[Path]) -> None:
        """Have all metrics of these copies here; of the latest `MOST_WHOLE` they stay.

        Raises: see `Copy.look`.
        """
        wanted = [copy for copy in self.runs if copy.path in paths]
        in_parallel(Copy.bring_whole, wanted)
        self._whole = [copy for copy in self._whole if copy not in wanted] + wanted
        while len(self._whole) > MOST_WHOLE:
            self._whole.pop(0).shrink()

    def _path(self, run: Store) -> Path:
        """Where the copy of a run is: runs of one name are in different directories."""
        above = hashlib.sha256(str(run.address.parent).encode()).hexdigest()[:12]
        return self._place / above / run.address.name

    def _find(self, store: Store) -> None:
        """Know the runs that are at an address now."""
        # Whoever may write to the bucket chooses the names there; one such as `..` is no run.
        names = [name for name in store.children() if re.fullmatch(RUN_NAME, name, re.ASCII)]
        found = {str(store.address / name): name for name in names}
        here = [at for at, copy in self._copies.items() if copy.address.parent == store.address]
        for gone in set(here) - found.keys():
            remove(self._copies.pop(gone).path)
        for address in found.keys() - self._copies.keys():
            run = store.below(found[address])
            self._copies[address] = Copy(run, self._path(run))

    def _is_named(self, copy: Copy) -> bool:
        return all(copy.address.parent != store.address for store in self._below)

    def _is_due(self, copy: Copy, number: int) -> bool:
        """Whether a run is looked at in this look."""
        if self._is_named(copy):
            return True
        may_change = copy.goes_on and (copy.is_there or copy.looks < _REST_LOOKS)
        return may_change or not copy.looks or (number + self._looks) % _REST_LOOKS == 0

    def _look_at(self, copy: Copy) -> None:
        try:
            copy.look()
            copy.failed = None
        except (StoreFailed, StoreRefused):
            raise  # so it is with all of them
        except EvenstepError as error:
            copy.failed = str(error)
