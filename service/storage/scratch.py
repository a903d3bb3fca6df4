"""The scratch directory of a run that lives in a store: whether what is there may go on, and what
is brought to it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from service.basics.atomic_files import (
    read_json,
    remove,
    remove_if_possible,
    replace_file,
    told_when_unread,
    told_when_unwritten,
)
from service.basics.errors import EvenstepError, NoCheckpoint, SpecError
from service.basics.multipart import digest_of
from service.drivers.endpoints import endpoint_of
from service.runs.checkpoint_files import (
    Checkpoint,
    checkpoints_in,
    damage_of,
    read_manifest,
)
from service.runs.directory import RunDirectory
from service.storage.address import Address
from service.storage.bringing import (
    Gone,
    arrivals_of,
    bring_checkpoint,
    bring_files,
    newest_first,
    none_can_be_read,
)
from service.storage.published import CHECKPOINTS, Published, checkpoints_of, step_of
from service.storage.store import Store

Say = Callable[[str], None]

SCRATCH_VARIABLE = "EVENSTEP_SCRATCH"
_NOTE_BYTES = 10_000


def scratch_runs(address: Address) -> Path:
    """The directory on this machine where the runs of an address are trained.

    Two stores that have one address, at different endpoints, have different directories.

    Raises:
        SpecError: this user has no home directory, and the environment names no other place.
    """
    asked = os.environ.get(SCRATCH_VARIABLE)
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    except RuntimeError as error:
        raise SpecError(
            f"{address}: this user has no home directory. Name a directory for the run on this "
            f"machine by {SCRATCH_VARIABLE}."
        ) from error
    root = Path(asked) if asked else cache / "evenstep" / "scratch"
    endpoint = endpoint_of(address.scheme)
    told = f"{address} at {endpoint}" if endpoint else str(address)
    digest = hashlib.sha256(told.encode()).hexdigest()[:12]
    return root.absolute() / f"{address.path.partition('/')[0]}-{digest}"


@dataclass
class Note:
    """What a scratch directory knows of itself, in a file beside the run."""

    run: RunDirectory
    id: str
    published: bool = False
    """Whether the store has held something that was uploaded from here."""
    brought: str | None = None
    """The stamp of the publication that was brought here."""

    @classmethod
    def read(cls, run: RunDirectory) -> Note | None:
        """The note of the scratch directory of a run; None if there is none.

        Raises:
            EvenstepError: it cannot be read.
        """
        try:
            with told_when_unread(_note_of(run)):
                if not _note_of(run).exists():
                    return None
                told = read_json(_note_of(run), at_most=_NOTE_BYTES)
            return cls(run, str(told["id"]), bool(told["published"]), told.get("brought"))
        except (ValueError, TypeError, KeyError, AttributeError):
            return None  # then nothing is known of what is there: it is brought again

    def write(self, *, published: bool) -> None:
        """Keep it on disk."""
        self.published = published
        told = {"id": self.id, "published": published, "brought": self.brought}
        with told_when_unwritten(_note_of(self.run)):
            replace_file(_note_of(self.run), json.dumps(told) + "\n")

    def goes_on(self, held: Published | None) -> bool:
        """Whether what is here is the run in the store, or goes on from it.

        Every other launcher publishes under a stamp of its own before it trains, so with the stamp
        that was brought here nothing has been trained elsewhere.
        """
        return held is None or held.scratch == self.id or str(held.stamp) == self.brought


def _note_of(run: RunDirectory) -> Path:
    return run.path.with_name(f".{run.name}.scratch")


def settled(run: RunDirectory, held: Published | None, say: Say) -> Note:
    """The note of the scratch directory, which is emptied if the run has gone on elsewhere.

    Raises:
        EvenstepError: it cannot be written.
    """
    _sweep(run)
    note = Note.read(run)
    if note is not None and note.goes_on(held):
        if held is None and note.published and checkpoints_in(run.checkpoints):
            say(
                f"WARNING: the store holds nothing of this run any more. The run goes on from "
                f"{run.path}, and is uploaded again; --fresh would start it over."
            )
        return note
    if run.path.exists():
        _clear(run, held, say)
    brought = str(held.stamp) if held is not None else None
    note = Note(run, secrets.token_hex(8), brought=brought)
    note.write(published=held is not None)
    return note


def _sweep(run: RunDirectory) -> None:
    """Remove what a start that was killed has left beside the run."""
    remove_if_possible(arrivals_of(run.path))
    # A run may be called `NAME.stale-1`, and has a note like this beside it.
    left = re.compile(rf"\.{re.escape(run.name)}\.stale-[0-9a-f]+")
    for path in run.path.parent.glob(f".{run.name}.stale-*"):
        if left.fullmatch(path.name):
            remove_if_possible(path)


def _clear(run: RunDirectory, held: Published | None, say: Say) -> None:
    """Put the directory of a run out of the way; it stays if it has steps that the store lacks."""
    is_the_same = held is not None and _id_of(run) == held.run
    there = max(map(step_of, checkpoints_of(held)), default=0) if is_the_same else 0
    here = max((each.step for each in checkpoints_in(run.checkpoints)), default=0)
    with told_when_unwritten(run.path):
        if here > there:
            aside = f".{run.name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
            os.rename(run.path, run.path.with_name(aside))
            say(
                f"{run.path} is not what the store holds. It has step {here:,}, which the store "
                f"has not, so it is moved to {run.path.with_name(aside)}."
            )
            return
        stale = run.path.with_name(f".{run.name}.stale-{secrets.token_hex(4)}")
        os.rename(run.path, stale)
    say(f"{run.path} is not what the store holds, so it is removed and brought again.")
    remove_if_possible(stale)


def _id_of(run: RunDirectory) -> str | None:
    """The id of the run that is here; None if it cannot be read."""
    try:
        return str(run.read_facts()["id"])
    except (EvenstepError, KeyError):
        return None


def bring(store: Store, held: Published, run: RunDirectory, say: Say) -> str | None:
    """Bring what a resume needs, unless it is here: the newest checkpoint of all that is good.

    Returns its name; None if there is no checkpoint yet.

    Raises:
        Gone: neither the store nor this directory has a good one.
        EvenstepError: the store did not answer, or this disk takes nothing more.
    """
    began = time.monotonic()
    with told_when_unwritten(run.path):
        if not run.facts.exists():
            bring_files(store, held, run.path)
        local = {each.path.name: each for each in checkpoints_in(run.checkpoints)}
        published = checkpoints_of(held)
        for name in newest_first({*local, *published}):
            damage = damage_of(local[name]) if name in local else "it is not here"
            if damage is None:
                return name
            if name in local and name in published:
                say(f"WARNING: {local[name].path}: {damage}. It is brought again from the store.")
            if name in published and _brought(store, held, name, run, say):
                say(f"Brought {store.address} ({name}) in {time.monotonic() - began:.1f} s.")
                return name
    if published:
        raise none_can_be_read(store, len(published))
    return None


def _brought(store: Store, held: Published, name: str, run: RunDirectory, say: Say) -> bool:
    try:
        bring_checkpoint(store, held, name, run.path)
        checkpoint = Checkpoint(run.checkpoints / name, step_of(name))
        if _is_as_saved(checkpoint, held) or (damage := damage_of(checkpoint)) is None:
            return True
        remove(checkpoint.path)  # every byte is as it was uploaded, so it was damaged before
        say(f"WARNING: {store.address}: {name} was uploaded damaged: {damage}.")
    except Gone as gone:
        say(f"WARNING: {gone} Trying the checkpoint before.")
    return False


def _is_as_saved(checkpoint: Checkpoint, held: Published) -> bool:
    """Whether the hashes of its pieces, which were just compared with its bytes, are those of its
    manifest. False if that is not known: the parts may be of another size.
    """
    name = checkpoint.path.name
    pieces = checkpoints_of(held)[name]
    try:
        files = read_manifest(checkpoint)["files"]
    except NoCheckpoint:
        return False
    return len(pieces) == len(files) + 1 and all(
        digest_of([piece.sha256 for piece in pieces.get(f"{CHECKPOINTS}/{name}/{file}", ())])
        == told["sha256"]
        for file, told in files.items()
    )
