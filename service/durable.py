"""Files that outlive the machine: written, synced and renamed in the order a power cut respects."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

# Small enough that a hash finds it still in the cache, large enough that a thread which writes
# asks for the interpreter only some hundred times a gigabyte.
_CHUNK_BYTES = 4 << 20
# What is synced at the end takes its time then, and nobody sees how far it is.
_SYNC_BYTES = 256 << 20


@dataclass(frozen=True)
class Written:
    """What went into a file."""

    size_bytes: int
    sha256: str


def write_file(path: Path, pieces: Iterable[bytes | memoryview]) -> Written:
    """Write a new file and sync it; its directory is left to `sync_directory`.

    Writing, hashing and syncing leave the interpreter to other threads.

    Raises:
        OSError: also where `path` exists, be it as a link.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644)
    digest, size, synced = hashlib.sha256(), 0, 0
    try:
        for piece in pieces:
            view = memoryview(piece)
            if size - synced >= _SYNC_BYTES:
                os.fsync(descriptor)
                synced = size
            for start in range(0, len(view), _CHUNK_BYTES):
                chunk = view[start : start + _CHUNK_BYTES]
                _write_whole(descriptor, chunk)
                digest.update(chunk)
            size += len(view)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return Written(size, digest.hexdigest())


def _write_whole(descriptor: int, chunk: memoryview) -> None:
    while chunk:
        chunk = chunk[os.write(descriptor, chunk) :]


def replace_file(path: Path, text: str) -> None:
    """Put `text` in the place of a file: at every moment the old one or the new one is there."""
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    write_file(partial, [text.encode()])
    os.replace(partial, path)
    sync_directory(path.parent)


def sync_file(path: Path) -> None:
    """Return when what was written to the file is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_directory(directory: Path) -> None:
    """Return when the names in the directory, new, changed and gone, are on disk."""
    sync_file(directory)


def make_directory(directory: Path) -> None:
    """Make the directory, and have its name on disk; its parent is there."""
    if not directory.is_dir():
        directory.mkdir(exist_ok=True)
        sync_directory(directory.parent)


def remove(path: Path) -> None:
    """Remove a file, a link (never what it points to) or a directory with all that is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_if_possible(path: Path) -> None:
    """The same where a failure is already being told: what is left over goes next time."""
    with suppress(OSError):
        remove(path)


def sha256_of(path: Path) -> str:
    """The hash of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
