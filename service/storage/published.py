"""What a store holds of a run: one small object, written last, that names all others.

    NAME/published/000003-000017.json   the newest one counts: 3 is the lease, 17 the number in it
    NAME/data/000003-000017/...         the bytes that were uploaded for it, in pieces
    NAME/lease/000003.json              who writes

An object of `data` is written once and never changed: its name holds a number that is never used
again. So no writer, however late, can change what another has published.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from service.basics.errors import NoCheckpoint
from service.storage.store import NoObject, Store

FORMAT = 1
PUBLISHED, DATA = "published/", "data/"
SWEEP = "sweep/"
"""The settings of the runs of a sweep, below its address."""
CHECKPOINTS = "checkpoints"
_NAME = re.compile(r"published/(\d{6,})-(\d{6,})\.json", re.ASCII)
_CHECKPOINT = re.compile(r"step-\d{8,15}(\.untested)?", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)
_TRIES = 5


class Stamp(NamedTuple):
    """The place of one publication among all of a run; they only grow."""

    term: int
    """The number of the lease under which it was made."""
    number: int
    """Its number under this lease."""

    def __str__(self) -> str:
        return f"{self.term:06d}-{self.number:06d}"


class Piece(NamedTuple):
    """The bytes of a file from `begin` to `end`, which are one object."""

    begin: int
    end: int
    sha256: str
    name: str
    """The object."""


Files = Mapping[str, Sequence[Piece]]
"""The pieces of each file, by its path in the directory of the run."""


@dataclass(frozen=True)
class Published:
    """All files of a run as they were at one moment."""

    stamp: Stamp
    run: str
    """The id of the run, which `--fresh` changes."""
    scratch: str
    """The scratch directory that it was published from."""
    files: Files

    @property
    def name(self) -> str:
        return f"{PUBLISHED}{self.stamp}.json"

    def objects(self) -> set[str]:
        """The objects that it needs."""
        return {piece.name for pieces in self.files.values() for piece in pieces}

    def encoded(self) -> bytes:
        """The content of its object, with its own hash in it."""
        files = {path: [list(piece) for piece in pieces] for path, pieces in self.files.items()}
        body = {"format": FORMAT, "run": self.run, "scratch": self.scratch, "files": files}
        sha256 = hashlib.sha256(json.dumps(body).encode()).hexdigest()
        return (json.dumps({**body, "sha256": sha256}, indent=1) + "\n").encode()


def newest_published(store: Store) -> Published | None:
    """The newest publication of a run; None where nothing is published.

    Raises:
        NoCheckpoint: it is damaged.
    """
    was_damaged = False
    for _ in range(_TRIES):
        stamps = stamps_in(store.sizes(PUBLISHED))
        if not stamps:
            return None
        name = f"{PUBLISHED}{stamps[-1]}.json"
        try:
            return decoded(store.get(name), stamps[-1], store)
        except NoObject:
            continue  # a newer one was published meanwhile, and this one was removed
        except NoCheckpoint:
            if was_damaged:
                raise
            was_damaged = True  # or the first answer was cut on its way
    raise NoCheckpoint(
        f"{store.address}/{name}: the store lists this object, but does not give it. Listings of "
        "this store may be out of date; try again."
    )


def is_newest(store: Store, published: Published) -> bool:
    """Whether this is still the newest publication: objects of an earlier one may be deleted."""
    return stamps_in(store.sizes(PUBLISHED))[-1:] == [published.stamp]


def checkpoints_of(published: Published | None) -> dict[str, Files]:
    """The files of each checkpoint that is published, by its name."""
    found: dict[str, dict[str, Sequence[Piece]]] = {}
    for path, pieces in (published.files if published is not None else {}).items():
        place, _, file = path.partition("/")
        name, _, rest = file.partition("/")
        if place == CHECKPOINTS and rest and _CHECKPOINT.fullmatch(name):
            found.setdefault(name, {})[path] = pieces
    return dict(found)


def step_of(name: str) -> int:
    """The step in the name of a checkpoint."""
    return int(name.removeprefix("step-").partition(".")[0])


def stamps_in(names: Iterable[str]) -> list[Stamp]:
    """The stamps of all publications, from the oldest to the newest."""
    found = (_NAME.fullmatch(name) for name in names)
    return sorted(Stamp(int(match[1]), int(match[2])) for match in found if match)


def decoded(content: bytes, stamp: Stamp, store: Store) -> Published:
    """The publication in the content of an object, checked.

    Raises:
        NoCheckpoint: it is not as it was written.
    """
    try:
        body: dict[str, Any] = json.loads(content)
        files = {path: [Piece(*piece) for piece in told] for path, told in body["files"].items()}
        published = Published(stamp, body["run"], body["scratch"], files)
        if body["format"] == FORMAT and published.encoded() == content:
            _require_sound(files)
            return published
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        pass  # reported below, as for every other change
    raise NoCheckpoint(
        f"{store.address}/{PUBLISHED}{stamp}.json is damaged, or of another version of evenstep. "
        "Restore a good copy of this object, or start over with --fresh."
    )


def is_sound(path: str) -> bool:
    """Whether a file of this path can be published: in the directory, with a printable name."""
    return path.isprintable() and not any(part in ("", ".", "..") for part in path.split("/"))


def _require_sound(files: Files) -> None:
    """Check that the paths stay in the directory of a run, whoever wrote them, and the pieces fit.

    Raises:
        ValueError: they do not.
    """
    for path, pieces in files.items():
        if not is_sound(path):
            raise ValueError(path)
        end = 0
        for piece in pieces:
            known = _SHA256.fullmatch(piece.sha256) and piece.name.startswith(DATA)
            if not known or piece.begin != end or piece.end < end or ".." in piece.name:
                raise ValueError(path)
            end = piece.end
