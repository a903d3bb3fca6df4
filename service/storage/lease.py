"""The lease of a run in a store: it replaces the lock of a directory.

Each lease is an object with a number, created only if there is none of that number: of two
launchers, one succeeds. Its holder rewrites it regularly; when it has not been rewritten for as
long as it says, the next launcher creates the next number, and from then on only that one counts.
No two clocks are compared: ages are told by the store's clock, and waits by the own one.
"""

from __future__ import annotations

import getpass
import json
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from service.basics.errors import SpecError, printable
from service.basics.process_starts import start_of
from service.basics.running_time import RunningClock
from service.runs.directory import RunInUse
from service.storage.published import PUBLISHED, stamps_in
from service.storage.store import NoObject, Store

LEASE = "lease/"
SECONDS = 30.0
SECONDS_VARIABLE = "EVENSTEP_LEASE_SECONDS"
_PROBE = f"{LEASE}probe-"
_PROBES = 2
"""A launcher that has just got its lease removes the probes that it finds, once."""
_NAME = re.compile(r"lease/(\d{6,})\.json", re.ASCII)
_LEAST_SECONDS = 1.5
_LONGEST_SECONDS = 3600.0
_LONGEST_HOLDER = 300  # characters
_LOOK_SECONDS = 1.0
_MOST_SECONDS = 10.0
"""What one look counts at most in a wait: more means that this machine has not run."""


@dataclass(frozen=True)
class _Record:
    """The content of a lease."""

    holder: str
    """For a person."""
    place: str
    """The machine and the process, to find out on the same machine that it is gone."""
    nonce: str
    beat: int
    seconds: float
    """How long it holds without being rewritten."""
    released: bool = False

    def encoded(self) -> bytes:
        return (json.dumps(asdict(self)) + "\n").encode()


@dataclass
class Lease:
    """The right to write a run, held by this process."""

    store: Store
    """Of the run."""
    term: int
    _record: _Record
    _writing: threading.Lock = field(default_factory=threading.Lock)
    _over: threading.Event = field(default_factory=threading.Event)
    _lost: threading.Event = field(default_factory=threading.Event)

    @property
    def seconds(self) -> float:
        return self._record.seconds

    @property
    def is_known_lost(self) -> bool:
        """Whether its thread has found that another launcher has taken the run over."""
        return self._lost.is_set()

    def keep(self, say: Callable[[str], None]) -> None:
        """Renew it from now on, by a thread of its own, until it is released."""
        threading.Thread(target=self._keep, args=(say,), name="lease", daemon=True).start()

    def _keep(self, say: Callable[[str], None]) -> None:
        renewed, is_told, wait = time.monotonic(), False, self.seconds / 3
        while not self._over.wait(wait):
            try:
                self.renew()
                if self.is_lost():
                    self._lost.set()
                    return
            except Exception as error:  # whatever it is: a thread that ended would lose the run
                wait = min(_LOOK_SECONDS, self.seconds / 3)
                if not is_told and time.monotonic() - renewed > self.seconds:
                    is_told = True
                    say(
                        f"WARNING: {error} The lease of this run was not renewed for "
                        f"{self.seconds:g} s, so another launcher could take the run over."
                    )
            else:
                renewed, is_told, wait = time.monotonic(), False, self.seconds / 3

    def renew(self) -> None:
        """Rewrite it, so that it goes on."""
        with self._writing:
            self._record = replace(self._record, beat=self._record.beat + 1)
            self.store.put(_name(self.term), self._record.encoded())

    def is_lost(self) -> bool:
        """Whether another launcher has taken the run over."""
        return _newest(self.store) > self.term

    def release(self) -> None:
        """Let the next launcher begin at once."""
        self._over.set()
        with self._writing:
            self._record = replace(self._record, released=True)
            self.store.put(_name(self.term), self._record.encoded())


def lease_seconds() -> float:
    """How long a lease holds without being rewritten.

    Raises:
        SpecError: the environment names no such duration.
    """
    text = os.environ.get(SECONDS_VARIABLE)
    if text is None:
        return SECONDS
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not _LEAST_SECONDS <= seconds <= _LONGEST_SECONDS:
        raise SpecError(
            f"{SECONDS_VARIABLE}={text}: must be a number of seconds from {_LEAST_SECONDS:g} to "
            f"{_LONGEST_SECONDS:g}."
        )
    return seconds


def taken(
    store: Store,
    *,
    say: Callable[[str], None],
    is_stopped: Callable[[], bool] = lambda: False,
) -> Lease:
    """Take the lease of the run at this store's address; waits while it may still be held.

    Args:
        is_stopped: whether this launcher has been asked to stop; then a wait ends.
    Raises:
        RunInUse: another launcher holds it.
        SpecError: a right is missing, see `require_rights`.
        Stopped: see `is_stopped`.
    """
    seconds = lease_seconds()
    asked = store.until(is_stopped)
    probe = require_rights(asked, say=say)
    me = _Record(_holder(), _place(), secrets.token_hex(8), 0, seconds)
    while True:
        newest = _newest(asked)
        last = stamps_in(asked.sizes(PUBLISHED))
        if newest:
            _wait_for(asked, newest, probe, say)
        term = 1 + max(newest, last[-1].term if last else 0)
        if asked.create(_name(term), me.encoded()):
            store.remove(name for name in store.sizes(LEASE) if _is_over(name, term))
            return Lease(store, term, me)


def is_abandoned(store: Store) -> bool:
    """Whether no launcher holds the run: its lease was released or has run out, or its holder was a
    process of this machine that is gone. Nothing is written.

    Raises:
        EvenstepError: the lease cannot be read.
    """
    newest = _newest(store)
    if not newest:
        return True  # a launcher that still runs would write it again
    try:
        record = _read(store, newest)
        if record is None:
            return False  # it was replaced by a newer one meanwhile
        return record.released or _is_gone(record) or store.age(_name(newest)) > record.seconds
    except NoObject:
        return False


def _is_over(name: str, term: int) -> bool:
    """Whether this object is an earlier lease, or the probe of a launcher that was killed."""
    match = _NAME.fullmatch(name)
    return name.startswith(_PROBE) or (match is not None and int(match[1]) < term)


def require_rights(store: Store, *, say: Callable[[str], None]) -> float:
    """Check that objects can be written, read, listed and deleted here; the store's time.

    Args:
        say: told if two launchers that start in the same second cannot be kept apart.
    Raises:
        SpecError: one of these is not possible; says which.
    """
    name, content = f"{_PROBE}{secrets.token_hex(8)}", secrets.token_bytes(16)
    for _ in range(_PROBES):
        store.put(name, content)
        with suppress(NoObject):
            is_there = store.get(name) == content and name in store.sizes(LEASE)
            moment = store.modified(name)
            if is_there:
                break
    else:
        raise SpecError(
            f"{store.address}: an object that was just written cannot be read or listed. Runs need "
            "a store in which a write is visible at once, as it is in S3, GCS and Azure."
        )
    if all(store.create(name, secrets.token_bytes(16)) for _ in range(_PROBES)):
        say(
            f"WARNING: {store.address}: this store has no conditional writes, so of two launchers "
            "that start in the same second none may be refused. Start one after the other."
        )
    store.remove([name])
    return moment.timestamp() if moment is not None else 0.0


def _wait_for(store: Store, term: int, now: float, say: Callable[[str], None]) -> None:
    """Return when this lease has run out.

    Args:
        now: a recent moment by the store's clock.
    Raises:
        RunInUse: it is held: it has been rewritten meanwhile.
    """
    first = _read(store, term)
    if first is None or first.released or _is_gone(first):
        return
    try:
        moment = store.modified(_name(term))
    except NoObject:
        return  # the next launcher has just replaced it: its lease is looked at then
    age = max(0.0, now - moment.timestamp()) if moment is not None else 0.0
    if age > first.seconds:
        return
    say(
        f"{store.address}: {first.holder} held this run until {age:.0f} s ago. Waiting up to "
        f"{first.seconds:.0f} s to see whether it still runs."
    )
    waited = RunningClock(_MOST_SECONDS)
    while waited() < first.seconds:
        store.wait(min(_LOOK_SECONDS, first.seconds / 10))
        last = _read(store, term)
        if last is None or last.released:
            return
        if last.beat != first.beat or _newest(store) > term:
            raise RunInUse(
                f"{store.address} is being written by {first.holder}. Wait for it, or stop it; "
                "to begin a second run of this spec, give it its own --name."
            )


def _read(store: Store, term: int) -> _Record | None:
    try:
        told: Any = json.loads(store.get(_name(term)))
        record = _Record(**told)
        seconds = min(max(float(record.seconds), _LEAST_SECONDS), _LONGEST_SECONDS)
        return replace(record, holder=printable(record.holder[:_LONGEST_HOLDER]), seconds=seconds)
    except NoObject:
        return None
    except (ValueError, TypeError) as error:
        raise SpecError(
            f"{store.address}/{_name(term)} is no lease of this version of evenstep. If no "
            "launcher writes this run, remove this object."
        ) from error


def _name(term: int) -> str:
    return f"{LEASE}{term:06d}.json"


def _terms(store: Store) -> list[int]:
    found = (_NAME.fullmatch(name) for name in store.sizes(LEASE))
    return sorted(int(match[1]) for match in found if match)


def _newest(store: Store) -> int:
    return max(_terms(store), default=0)


def _holder() -> str:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        user = f"user {os.getuid()}"
    return f"process {os.getpid()} of {user} on {socket.gethostname()}"


def _place() -> str:
    """`MACHINE PROCESS`: the boot and the process namespace; the process and when it began."""
    return f"{_machine()} {os.getpid()}:{start_of(os.getpid())}"


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()}/{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:  # no Linux: then it is never known to be gone
        return f"{socket.gethostname()}/{secrets.token_hex(8)}"


def _is_gone(record: _Record) -> bool:
    """Whether its holder was a process of this machine that has ended."""
    machine, _, process = record.place.partition(" ")
    number, _, began = process.partition(":")
    if machine != _machine() or not number.isdecimal():
        return False
    found = start_of(int(number))
    if found is not None or Path(f"/proc/{number}").exists():  # without a start it has ended
        return found != began
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False  # of another user, whose processes /proc may hide
    return False
