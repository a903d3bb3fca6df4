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
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from service.basics.errors import SpecError, printable
from service.basics.process_starts import start_of
from service.basics.running_time import RunningClock
from service.storage.published import PUBLISHED, stamps_in
from service.storage.store import NoObject, Store

LEASE = "lease/"
SECONDS = 30.0
SECONDS_VARIABLE = "EVENSTEP_LEASE_SECONDS"
_NAME = re.compile(r"lease/(\d{6,})\.json", re.ASCII)
_LEAST_SECONDS = 1.5
_LONGEST_SECONDS = 3600.0
_LONGEST_HOLDER = 300  # characters


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

    @property
    def seconds(self) -> float:
        return self._record.seconds

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


def taken(store: Store, *, say: Callable[[str], None]) -> Lease:
    """Take the lease of the run at this store's address; waits while it may still be held.

    Raises:
        SpecError: another launcher holds it; or a right is missing, see `require_rights`.
    """
    seconds = lease_seconds()
    probe = require_rights(store)
    me = _Record(_holder(), _place(), secrets.token_hex(8), 0, seconds)
    while True:
        newest = _newest(store)
        last = stamps_in(store.sizes(PUBLISHED))
        if newest:
            _wait_for(store, newest, probe, say)
        term = 1 + max(newest, last[-1].term if last else 0)
        if store.create(_name(term), me.encoded()):
            store.remove(_name(old) for old in _terms(store) if old < term)
            return Lease(store, term, me)


def require_rights(store: Store) -> float:
    """Check that objects can be written, read, listed and deleted here; the store's time.

    Raises:
        SpecError: one of these is not possible; says which.
    """
    name, content = f"{LEASE}probe-{secrets.token_hex(8)}", secrets.token_bytes(16)
    store.put(name, content)
    if store.get(name) != content or name not in store.sizes(LEASE):
        raise SpecError(
            f"{store.address}: an object that was just written cannot be read or listed. Runs need "
            "a store in which a write is visible at once, as it is in S3, GCS and Azure."
        )
    moment = store.modified(name)
    store.remove([name])
    return moment.timestamp() if moment is not None else 0.0


def _wait_for(store: Store, term: int, now: float, say: Callable[[str], None]) -> None:
    """Return when this lease has run out.

    Args:
        now: a recent moment by the store's clock.
    Raises:
        SpecError: it is held: it has been rewritten meanwhile.
    """
    first = _read(store, term)
    if first is None or first.released or _is_gone(first):
        return
    moment = store.modified(_name(term))
    age = max(0.0, now - moment.timestamp()) if moment is not None else 0.0
    if age > first.seconds:
        return
    say(
        f"{store.address}: {first.holder} held this run until {age:.0f} s ago. Waiting up to "
        f"{first.seconds:.0f} s to see whether it still runs."
    )
    waited = RunningClock()
    while waited() < first.seconds:
        time.sleep(min(1.0, first.seconds / 10))
        last = _read(store, term)
        if last is None or last.released:
            return
        if last.beat != first.beat or _newest(store) > term:
            raise SpecError(
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
    return machine == _machine() and number.isdecimal() and start_of(int(number)) != began
