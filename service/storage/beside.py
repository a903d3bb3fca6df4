"""A run that lives in a store: brought here, trained in a scratch directory, uploaded beside it."""

from __future__ import annotations

import os
import random
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from service.basics.atomic_files import told_of, told_when_unwritten
from service.basics.errors import EvenstepError, NoCheckpoint, NotSaved, SpecError, printable
from service.basics.running_time import TimeLimit
from service.runs.checkpoint_files import checkpoints_in
from service.runs.directory import RunDirectory
from service.spec.models import Spec
from service.storage.address import Address
from service.storage.lease import LEASE, Lease, taken
from service.storage.mirror import LeaseLost, Mirror
from service.storage.published import DATA, PUBLISHED, SWEEP, Published, newest_published
from service.storage.scratch import Note, Say, bring, scratch_runs, settled
from service.storage.store import Store, open_store

_LOOK_SECONDS = 0.25
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 1.0, 30.0
_LAST_PAUSE_SECONDS = 2.0
"""The longest pause between two tries at the end of a run, which has little time."""
_ABANDONING_SECONDS = 1.5
"""How long the end of a start waits for the store, which may be what it has failed by."""
_NICE = 10
_TAKEN_NAMES = {name.rstrip("/") for name in (PUBLISHED, DATA, LEASE)}


class Offer:
    """A request to the upload: that other nodes can bring what this one resumes from."""

    def __init__(self, *, fresh: bool) -> None:
        self.fresh = fresh
        """Whether the run starts over, so that there is nothing to resume from."""
        self.term = 0
        """The number of the lease under which it is published."""
        self.checkpoint: str | None = None
        """Its name; None: there is none yet."""
        self._settled = threading.Event()
        self._failed: NoCheckpoint | None = None

    @property
    def is_settled(self) -> bool:
        """Whether it is in the store.

        Raises:
            NoCheckpoint: none of the checkpoints can be read.
        """
        if self._failed is not None:
            raise self._failed
        return self._settled.is_set()

    def settle(self, term: int, checkpoint: str | None) -> None:
        """It is in the store."""
        self.term, self.checkpoint = term, checkpoint
        self._settled.set()

    def fail(self, error: NoCheckpoint) -> None:
        """It can never be there."""
        self._failed = error


class Uploading:
    """The upload of a run beside its training, in a thread of this process."""

    def __init__(
        self, mirror: Mirror, lease: Lease, run: RunDirectory, note: Note, *, say: Say
    ) -> None:
        self._mirror = mirror
        self._lease = lease
        self._run = run
        self._note = note
        self._say = say
        self._ending = threading.Event()
        self._woken = threading.Event()
        self._offer: Offer | None = None
        self._failed: BaseException | None = None
        self._lost: EvenstepError | None = None
        self._is_up = False
        """Whether all is in the store, and nothing is to follow."""
        self._is_taken_over = False
        self._last: tuple[str, ...] | None = None
        self._worker = threading.Thread(target=self._work, name="upload", daemon=True)
        self._when_lost: Callable[[], None] = lambda: None
        self._when_uploaded: Callable[[float], None] = lambda seconds: None

    @property
    def runs(self) -> Path:
        """The directory in which the run is trained."""
        return self._run.path.parent

    @property
    def address(self) -> Address:
        """Of the run."""
        return self._lease.store.address

    @property
    def moved(self) -> float:
        """When the upload last came forward, or had nothing to do, by the monotonic clock."""
        return self._mirror.moved

    def start(
        self,
        when_lost: Callable[[], None],
        *,
        when_uploaded: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        """Begin to upload.

        Args:
            when_lost: called, by another thread, when another launcher has taken the run over.
            when_uploaded: called, by another thread, with the seconds that a checkpoint has taken.
        """
        self._when_lost, self._when_uploaded = when_lost, when_uploaded
        self._worker.start()

    def publish_now(self) -> None:
        """Publish what is here, so that the other nodes can bring it; before `start`.

        Raises:
            EvenstepError: the store does not take it.
        """
        self._publish(ending=False)

    def offer(self, *, fresh: bool) -> Offer:
        """Ask that other nodes can bring what this one resumes from; between two generations."""
        self._offer = offer = Offer(fresh=fresh)
        self._woken.set()
        return offer

    def require_at_work(self) -> None:
        """Check that the upload goes on.

        Raises:
            EvenstepError: it has ended: another launcher has the run, or the thread has failed.
        """
        if self._worker.is_alive():
            return
        if self._lost is not None:
            raise self._lost
        raise EvenstepError(f"The upload has ended: {self.missing()}. {self._why()}")

    def abandon(self) -> None:
        """Let the next launcher begin: nothing was trained."""
        _abandon(self._lease)

    def finish(self, seconds: Callable[[], float]) -> EvenstepError | None:
        """Upload the rest, and let the next launcher begin; what is wrong if it is not up.

        Args:
            seconds: how much longer this may take, asked again and again.
        """
        self._ending.set()
        self._woken.set()
        _joined(self._worker, seconds)
        if self._lost is not None:
            return self._lost
        if self._is_up:
            _let_go(self._lease, seconds)
            return None
        why = f" {self._why()}" if self._failed is not None else ""
        kind = NotSaved if isinstance(self._failed, SpecError) else EvenstepError
        return kind(
            f"The run is not completely uploaded: {self.missing()}.{why} All of it is in "
            f"{self._run.path}: run the same command again on this machine to upload it."
        )

    def missing(self) -> str:
        """What is not in the store yet."""
        try:
            newest = max((each.step for each in checkpoints_in(self._run.checkpoints)), default=0)
        except OSError as error:
            return f"what is here is not known ({error.strerror or error})"
        up = self._mirror.newest_step()
        there = f"step {up:,} is in the store" if up else "no checkpoint is in the store"
        return f"{there}, and step {newest:,} is here" if up != newest else f"{there}, its end not"

    # ---- the thread

    def _work(self) -> None:
        """Upload until all is up; whatever else ends this thread is kept, for `finish` to tell."""
        try:
            _stand_back()
            self._upload()
        except BaseException as error:
            self._tell(error)

    def _upload(self) -> None:
        """Publish whenever there is a new checkpoint, if it is asked for, and at the end."""
        pause = _FIRST_PAUSE_SECONDS
        while True:
            self._woken.clear()
            ending, offer = self._ending.is_set(), self._offer
            try:
                self._publish(ending=ending, offer=offer)
            except LeaseLost as lost:
                self._lost = lost
                self._when_lost()
                return
            except Exception as error:  # also of the driver, or ours: training must not end by it
                self._tell(error)
                if ending:
                    time.sleep(min(pause, _LAST_PAUSE_SECONDS))
                elif self._woken.wait(pause * (0.5 + random.random())):
                    pause = _FIRST_PAUSE_SECONDS  # whoever waits now has its tries at once
                pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
                continue
            if ending:
                self._is_up = True
                return
            pause, self._mirror.moved = _FIRST_PAUSE_SECONDS, time.monotonic()
            self._woken.wait(_LOOK_SECONDS)

    def _settle(self, offer: Offer) -> None:
        """Settle on the newest checkpoint that is good here and in the store."""
        held = None if offer.fresh else self._mirror.published
        try:
            name = bring(self._lease.store, held, self._run, self._say) if held else None
        except NoCheckpoint as error:
            self._offer = None
            offer.fail(error)
        else:
            # Only now, for it is tried again after a failure of the store; but before whoever
            # waits is told, who may ask for the next one at once.
            self._offer = None
            offer.settle(self._lease.term, name)

    def _publish(self, *, ending: bool, offer: Offer | None = None) -> None:
        self._mirror.require_lease()
        if not self._is_taken_over:
            self._mirror.take_over()
            self._is_taken_over = True
        elif offer is not None:
            self._mirror.find_missing()
        has_begun = self._run.facts.exists() and self._run.spec.exists()
        found = tuple(each.path.name for each in checkpoints_in(self._run.checkpoints))
        if has_begun and (found != self._last or ending or offer is not None):
            self._publish_all(found)
        if offer is not None:
            self._settle(offer)

    def _publish_all(self, found: tuple[str, ...]) -> None:
        began = time.monotonic()
        self._mirror.publish()
        if found != self._last:
            self._when_uploaded(time.monotonic() - began)
        if not self._note.published:
            self._note.write(published=True)
        self._last = found
        if self._failed is not None:
            self._failed = None
            self._say(f"{self._lease.store.address}: the upload goes on.")

    def _tell(self, error: BaseException) -> None:
        """Say what does not work, once."""
        is_told = self._failed is not None and str(self._failed) == str(error)
        self._failed = error
        if not is_told:
            self._say(
                f"WARNING: {self._why()} Training goes on, and the upload is tried again. Until "
                f"then {self.missing()}."
            )

    def _why(self) -> str:
        error = self._failed
        if isinstance(error, EvenstepError):
            return str(error)
        if isinstance(error, OSError):
            return told_of(self._run.path, error)
        return printable(f"{type(error).__name__}: {error}.")


def brought(
    address: Address,
    spec: Spec,
    *,
    fresh: bool,
    say: Say,
    is_stopped: Callable[[], bool] = lambda: False,
) -> Uploading:
    """Take the lease of the run at an address, and bring what is needed to go on with it here.

    Args:
        is_stopped: whether this launcher has been asked to stop.
    Raises:
        SpecError: it is held by another launcher, or the store cannot be used.
        EvenstepError: the store did not answer, or has lost what was published.
        Stopped: see `is_stopped`.
    """
    if address.name in _TAKEN_NAMES:
        raise SpecError(
            f"{address}: a run in an object store cannot be called {address.name!r}, because a run "
            "has objects below that name. Give it another --name."
        )
    store = open_store(address)
    if store.until(is_stopped).sizes(SWEEP):
        raise SpecError(f"--name: {address} is a sweep. Give the run another name.")
    run = RunDirectory(scratch_runs(address) / spec.name)
    with told_when_unwritten(run.path):
        run.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    lease = taken(store, say=say, is_stopped=is_stopped)
    lease.keep(say)
    for told in store.rules():
        say(told)
    try:
        held = _held(store, fresh=fresh, say=say)
        note = settled(run, held, say)
        if held is not None and not fresh and not _is_replaced(held, by=run):
            bring(store.until(is_stopped), held, run, say)
        mirror = Mirror(
            store, lease, run, held=held, scratch=note.id, spec=spec.checkpoint, say=say
        )
    except BaseException:
        _abandon(lease)
        raise
    return Uploading(mirror, lease, run, note, say=say)


def _is_replaced(held: Published, *, by: RunDirectory) -> bool:
    """Whether the run here was begun by `--fresh`, and ended before anything was published."""
    return by.facts.exists() and str(by.read_facts()["id"]) != held.run


def _held(store: Store, *, fresh: bool, say: Say) -> Published | None:
    """What the store holds of the run; None for nothing that can be read, if it is to start over.

    Raises:
        NoCheckpoint: it is damaged.
    """
    try:
        return newest_published(store)
    except NoCheckpoint as damaged:
        if not fresh:
            raise
        say(f"WARNING: {damaged} The run starts over; what the store holds stays.")
        return None


def _let_go(lease: Lease, seconds: Callable[[], float]) -> None:
    """Release a lease if there is time: otherwise it runs out, and the next launcher waits for it.

    In a thread of its own, because a store that stands still holds a request for many seconds.
    """

    def release() -> None:
        with suppress(EvenstepError):
            lease.release()

    releasing = threading.Thread(target=release, name="release", daemon=True)
    releasing.start()
    _joined(releasing, seconds)


def _abandon(lease: Lease) -> None:
    """Release a lease under which nothing was trained."""
    limit = TimeLimit(_ABANDONING_SECONDS)
    _let_go(lease, lambda: limit.left)


def _joined(thread: threading.Thread, seconds: Callable[[], float]) -> None:
    """Wait for the end of a thread, as long as there is time."""
    while thread.is_alive() and (left := seconds()) > 0:
        thread.join(min(_LOOK_SECONDS, left))


def _stand_back() -> None:
    """Let the threads that train go first; a thread that this one starts inherits it."""
    if sys.platform == "linux":
        thread = threading.get_native_id()
        with suppress(OSError):  # some sandboxes do not allow it
            nice = min(19, os.getpriority(os.PRIO_PROCESS, thread) + _NICE)
            os.setpriority(os.PRIO_PROCESS, thread, nice)
