"""A copy of a run in a store, which the processes of torchrun on one machine share to test it."""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from launch.environment import Environment, launcher_here
from launch.processes.signals import heard, stop_raises
from service.basics.atomic_files import (
    remove_if_possible,
    replace_file,
    told_when_unread,
    told_when_unwritten,
)
from service.basics.errors import PeerLost, Stopped
from service.basics.running_time import TimeLimit
from service.runs.directory import RunDirectory
from service.storage.address import Address
from service.storage.reading import copied
from service.storage.scratch import scratch_runs

_LOOK_SECONDS = 0.05
_LONGEST_SECONDS = 1800.0


def copy_of(
    run: Address, place: Environment, *, checkpoint: str, say: Callable[[str], None]
) -> RunDirectory:
    """The copy, which the first process of this machine brings, and removes at its end.

    Args:
        checkpoint: `best`, `latest` or a step.
    Raises:
        SpecError: there is no such run, or no such checkpoint.
        Stopped: a stop was requested meanwhile.
        PeerLost: the first process does not bring it.
    """
    note = _note(run)
    if place.local_rank:
        return RunDirectory(_told(note))
    with told_when_unwritten(note):
        note.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        note.unlink(missing_ok=True)
    until_the_end = ExitStack()
    atexit.register(until_the_end.close)
    with stop_raises("the test"):
        found = until_the_end.enter_context(copied(run, checkpoint=checkpoint, say=say))
    until_the_end.callback(remove_if_possible, note)
    with told_when_unwritten(note):
        replace_file(note, str(found.path.absolute()))
    return found


def _note(run: Address) -> Path:
    """The file in which the first process tells the others of its machine where the copy is."""
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    root = scratch_runs(run).parent
    return root / f".copy-{launcher_here()}-{attempt}"


def _told(note: Path) -> Path:
    limit = TimeLimit(_LONGEST_SECONDS)
    while not note.exists():
        if heard.requested:
            raise Stopped("Stopped before the run was brought here.")
        if not limit.left:
            raise PeerLost(
                f"After {_LONGEST_SECONDS:g} s the first process of this machine has not brought "
                "the run."
            )
        time.sleep(_LOOK_SECONDS)
    with told_when_unread(note):
        return Path(note.read_text(encoding="utf-8"))
