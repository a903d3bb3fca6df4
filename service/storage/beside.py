"""A run that lives in a store: brought here, trained in a scratch directory, uploaded beside it."""

from __future__ import annotations

import hashlib
import json
import os
import random
import secrets
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from service.basics.atomic_files import (
    read_json,
    remove,
    replace_file,
    told_of,
    told_when_unwritten,
)
from service.basics.errors import EvenstepError, NotSaved, SpecError
from service.runs.checkpoint_files import checkpoints_in
from service.runs.directory import RunDirectory
from service.spec.models import Spec
from service.storage.address import Address
from service.storage.bringing import bring_files, bring_newest
from service.storage.lease import Lease, taken
from service.storage.mirror import LeaseLost, Mirror
from service.storage.published import Published, newest_published
from service.storage.store import Store, open_store

Say = Callable[[str], None]

SCRATCH_VARIABLE = "EVENSTEP_SCRATCH"
_LOOK_SECONDS = 0.25
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 1.0, 30.0
_NICE = 10
_NOTE_BYTES = 10_000


def scratch_runs(address: Address) -> Path:
    """The directory on this machine where the runs of an address are trained."""
    asked = os.environ.get(SCRATCH_VARIABLE)
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    root = Path(asked) if asked else Path(cache).expanduser() / "evenstep" / "scratch"
    digest = hashlib.sha256(str(address).encode()).hexdigest()[:12]
    return root.absolute() / f"{address.path.partition('/')[0]}-{digest}"


@dataclass
class _Note:
    """What a scratch directory knows of itself, in a file beside the run."""

    run: RunDirectory
    id: str
    published: bool
    """Whether the store has held something that was uploaded from here."""

    @classmethod
    def read(cls, run: RunDirectory) -> _Note | None:
        """The note of the scratch directory of a run; None if there is none."""
        try:
            told = read_json(_note_of(run), at_most=_NOTE_BYTES)
            return cls(run, str(told["id"]), bool(told["published"]))
        except (FileNotFoundError, ValueError, TypeError, KeyError):
            return None  # then nothing is known of what is there: it is brought again

    def write(self, *, published: bool) -> None:
        """Keep it on disk."""
        self.published = published
        with told_when_unwritten(_note_of(self.run)):
            replace_file(
                _note_of(self.run), json.dumps({"id": self.id, "published": published}) + "\n"
            )


def _note_of(run: RunDirectory) -> Path:
    return run.path.with_name(f".{run.name}.scratch")


class Uploading:
    """The upload of a run beside its training, in threads of this process."""

    def __init__(
        self, mirror: Mirror, lease: Lease, run: RunDirectory, note: _Note, *, say: Say
    ) -> None:
        self._mirror = mirror
        self._lease = lease
        self._run = run
        self._note = note
        self._say = say
        self._ending = threading.Event()
        self._failed: Exception | None = None
        self._lost: EvenstepError | None = None
        self._is_taken_over = False
        self._last: tuple[str, ...] | None = None
        self._worker = threading.Thread(target=self._work, name="upload", daemon=True)
        self._holder = threading.Thread(target=self._hold, name="lease", daemon=True)
        self._when_lost: Callable[[], None] = lambda: None

    @property
    def runs(self) -> Path:
        """The directory in which the run is trained."""
        return self._run.path.parent

    @property
    def succeeded(self) -> float:
        """When the store last did what it was asked, by the monotonic clock."""
        return self._lease.store.succeeded

    def start(self, when_lost: Callable[[], None]) -> None:
        """Begin to upload, and to renew the lease.

        Args:
            when_lost: called, by another thread, when another launcher has taken the run over.
        """
        self._when_lost = when_lost
        self._worker.start()
        self._holder.start()  # which waits for the end of the other

    def abandon(self) -> None:
        """Let the next launcher begin: nothing was trained."""
        self._lease.release()

    def finish(self, seconds: Callable[[], float]) -> EvenstepError | None:
        """Upload the rest, and let the next launcher begin; what is wrong if it is not up.

        Args:
            seconds: how much longer this may take, asked again and again.
        """
        self._ending.set()
        while self._worker.is_alive() and seconds() > 0:
            self._worker.join(_LOOK_SECONDS)
        if self._lost is not None:
            return self._lost
        if not self._worker.is_alive():
            self._lease.release()
            return None
        why = f" {self._failed}" if self._failed is not None else ""
        kind = NotSaved if isinstance(self._failed, SpecError) else EvenstepError
        return kind(
            f"The run is not completely uploaded: {self.missing()}.{why} All of it is in "
            f"{self._run.path}: run the same command again on this machine to upload it."
        )

    def missing(self) -> str:
        """What is not in the store yet."""
        newest = max((each.step for each in checkpoints_in(self._run.checkpoints)), default=0)
        up = self._mirror.newest_step()
        there = f"step {up:,} is in the store" if up else "no checkpoint is in the store"
        return f"{there}, and step {newest:,} is here" if up != newest else f"{there}, its end not"

    # ---- the threads

    def _work(self) -> None:
        """Publish whenever there is a new checkpoint, and once more at the end."""
        _stand_back()
        pause = _FIRST_PAUSE_SECONDS
        while True:
            ending = self._ending.is_set()
            try:
                self._publish(ending=ending)
            except LeaseLost as lost:
                self._lost = lost
                self._when_lost()
                return
            except (EvenstepError, OSError) as error:
                self._tell(error)
                time.sleep(pause * (0.5 + random.random()))
                pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
                continue
            if ending:
                return
            pause = _FIRST_PAUSE_SECONDS
            self._ending.wait(_LOOK_SECONDS)

    def _publish(self, *, ending: bool) -> None:
        if not self._is_taken_over:
            self._mirror.take_over()
            self._is_taken_over = True
        if not (self._run.facts.exists() and self._run.spec.exists()):
            return  # the run has not begun
        found = tuple(each.path.name for each in checkpoints_in(self._run.checkpoints))
        if found == self._last and not ending:
            return
        self._mirror.publish()
        self._last = found
        self._note.write(published=True)
        if self._failed is not None:
            self._failed = None
            self._say(f"{self._lease.store.address}: the upload goes on.")

    def _tell(self, error: Exception) -> None:
        """Say what does not work, once."""
        if self._failed is None or str(self._failed) != str(error):
            told = told_of(self._run.path, error) if isinstance(error, OSError) else str(error)
            self._say(
                f"WARNING: {told} Training goes on, and the upload is tried again. Until then "
                f"{self.missing()}."
            )
        self._failed = error

    def _hold(self) -> None:
        """Renew the lease while there is something to upload."""
        while True:
            self._worker.join(self._lease.seconds / 3)
            if not self._worker.is_alive():
                return
            try:
                self._lease.renew()
            except EvenstepError as error:
                self._tell(error)


def brought(address: Address, spec: Spec, *, fresh: bool, say: Say) -> Uploading:
    """Take the lease of the run at an address, and bring what is needed to go on with it here.

    Raises:
        SpecError: it is held by another launcher, or the store cannot be used.
        EvenstepError: the store did not answer, or has lost what was published.
    """
    store = open_store(address)
    run = RunDirectory(scratch_runs(address) / spec.name)
    with told_when_unwritten(run.path):
        run.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    lease = taken(store, say=say)
    try:
        held = newest_published(store)
        note = _settled(run, held, say)
        if held is not None and not fresh:
            _bring(store, held, run, say)
        mirror = Mirror(
            store, lease, run, held=held, scratch=note.id, spec=spec.checkpoint, say=say
        )
    except BaseException:
        lease.release()
        raise
    return Uploading(mirror, lease, run, note, say=say)


def _settled(run: RunDirectory, held: Published | None, say: Say) -> _Note:
    """The note of the scratch directory, which is emptied if the run has gone on elsewhere."""
    note = _Note.read(run)
    if note is not None:
        goes_on = not note.published if held is None else held.scratch == note.id
        if goes_on:
            return note
    if run.path.exists():
        say(f"{run.path} is not what the store holds, so it is removed and brought again.")
        stale = run.path.with_name(f".{run.name}.stale-{secrets.token_hex(4)}")
        with told_when_unwritten(run.path):
            os.rename(run.path, stale)
            remove(stale)
    note = _Note(run, secrets.token_hex(8), published=held is not None)
    note.write(published=note.published)
    return note


def _bring(store: Store, held: Published, run: RunDirectory, say: Say) -> None:
    """Bring what a resume needs, unless it is here."""
    began = time.monotonic()
    with told_when_unwritten(run.path):
        if not run.facts.exists():
            bring_files(store, held, run.path)
        if checkpoints_in(run.checkpoints):
            return
        name = bring_newest(store, held, run.path, say=say)
    if name is not None:
        say(f"Brought {store.address} ({name}) in {time.monotonic() - began:.1f} s.")


def _stand_back() -> None:
    """Let the threads that train go first; a thread that this one starts inherits it."""
    if sys.platform == "linux":
        thread = threading.get_native_id()
        nice = min(19, os.getpriority(os.PRIO_PROCESS, thread) + _NICE)
        os.setpriority(os.PRIO_PROCESS, thread, nice)
