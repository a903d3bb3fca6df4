"""Brings a run from a store to a directory: the needed files, in parallel, verified."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from service.basics.atomic_files import (
    opened_to_write,
    remove,
    sync_directory,
    sync_file,
    without_link,
)
from service.basics.errors import NoCheckpoint
from service.storage.published import (
    CHECKPOINTS,
    Files,
    Piece,
    Published,
    checkpoints_of,
    is_newest,
    step_of,
)
from service.storage.store import Copied, NoObject, Store, in_parallel

RUN = "run.json"


class Gone(NoCheckpoint):
    """An object that is published is not in the store, or is not what was uploaded."""


def bring_files(
    store: Store, published: Published, directory: Path, *, only: Collection[str] | None = None
) -> None:
    """Bring all files but those of checkpoints into the directory of a run.

    Args:
        only: bring no other files than these.
    Raises:
        Gone: one of them is not as it was uploaded.
    """
    files = {p: pieces for p, pieces in published.files.items() if not _is_of_checkpoint(p)}
    if only is not None:
        files = {path: pieces for path, pieces in files.items() if path in only}
    facts = {RUN: files.pop(RUN)} if RUN in files else {}
    _bring(store, files, directory)
    _bring(store, facts, directory)  # last: a directory with it has all of them


def bring_checkpoint(store: Store, published: Published, name: str, directory: Path) -> None:
    """Bring one checkpoint into the directory of a run, where it appears when it is whole.

    It replaces one of this name.

    Raises:
        Gone: a file of it is not as it was uploaded.
    """
    target = directory / CHECKPOINTS / name
    partial = arrivals_of(directory) / name
    prefix = f"{CHECKPOINTS}/{name}/"
    files = checkpoints_of(published)[name]
    try:
        _bring(store, {p.removeprefix(prefix): pieces for p, pieces in files.items()}, partial)
        target.parent.mkdir(parents=True, exist_ok=True)
        remove(target)
        os.rename(partial, target)
        sync_directory(target.parent)
    finally:
        remove(arrivals_of(directory))


def arrivals_of(directory: Path) -> Path:
    """Where a checkpoint is while it is brought into the directory of a run: beside it."""
    return directory.with_name(f".{directory.name}.bringing")


def bring_newest(
    store: Store, published: Published, directory: Path, *, say: Callable[[str], None]
) -> str | None:
    """Bring the newest checkpoint that is whole, and return its name; None if there is none.

    Raises:
        Gone: there are checkpoints, but none of them is whole; or there is a newer publication.
    """
    names = newest_first(checkpoints_of(published))
    for name in names:
        try:
            bring_checkpoint(store, published, name, directory)
        except Gone as gone:
            if not is_newest(store, published):
                raise
            say(f"WARNING: {gone} Trying the checkpoint before.")
        else:
            return name
    if names:
        raise none_can_be_read(store, len(names))
    return None


def none_can_be_read(store: Store, checkpoints: int) -> Gone:
    """The error of a run with no good checkpoint."""
    return Gone(
        f"{store.address}: none of the {checkpoints} checkpoints can be read. Restore the "
        "objects, for example from the versions of the bucket, or start over with --fresh."
    )


def newest_first(names: Iterable[str]) -> list[str]:
    """The names of checkpoints, the newest first; of two of one step, the tested one."""
    return sorted(names, key=lambda name: (step_of(name), "." not in name), reverse=True)


def _is_of_checkpoint(path: str) -> bool:
    return path.startswith(f"{CHECKPOINTS}/") and path.count("/") > 1


def _bring(store: Store, files: Files, directory: Path) -> None:
    """Write the files, each synced when all of its pieces are there."""
    parts: list[tuple[Path, Piece]] = []
    for path, pieces in files.items():
        file = directory / path
        file.parent.mkdir(parents=True, exist_ok=True)
        remove(file)
        os.close(without_link(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        parts += [(file, piece) for piece in pieces]
    in_parallel(lambda part: _fetch(store, *part), parts)
    for path in files:
        sync_file(directory / path)


def _fetch(store: Store, file: Path, piece: Piece) -> None:
    """Write one piece to its place in the file."""
    with opened_to_write(file) as descriptor:
        for _ in range(2):  # the first answer may have been cut on its way
            found = _copied(store, descriptor, piece)
            if found.sha256 == piece.sha256:
                return
    raise Gone(
        f"{store.address}/{piece.name} has {found.size} bytes that are not the "
        f"{piece.end - piece.begin} bytes that were uploaded."
    )


def _copied(store: Store, descriptor: int, piece: Piece) -> Copied:
    try:
        return store.copy(piece.name, descriptor, begin=piece.begin, end=piece.end)
    except NoObject as missing:
        raise Gone(
            f"{store.address}/{piece.name} is published, but is not in the store: somebody, or a "
            "lifecycle rule of the bucket, has deleted it."
        ) from missing
