"""Atomic files: written, synced and renamed in an order that survives a power loss."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from service.basics.errors import EvenstepError, NotSaved, SpecError

_STANDING_IN_THE_WAY = {
    errno.ENOSPC: "no space is left there. Free some, or lower checkpoint.keep",
    errno.EDQUOT: "the disk quota is used up. Free some of it, or lower checkpoint.keep",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "this user has no permission to write there",
    errno.EPERM: "this user has no permission to write there",
    errno.EFBIG: "it would exceed the limit on the size of a file (ulimit -f)",
    errno.ELOOP: "a symbolic link is in its place, and a run is not written through links. "
    "Remove the link",
    errno.ENXIO: "a pipe is in its place. Remove it",
}
# Temporary errors of the machine or its storage, which do not mean that the file is damaged.
PASSING = {errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR}
PASSING |= {errno.ENOTCONN, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ESHUTDOWN}
PASSING |= {getattr(errno, "EREMOTEIO", errno.ESTALE)}  # only on Linux
# Small enough to stay in the cache while it is hashed, large enough that a writing thread takes the
# GIL only some hundred times per gigabyte.
_CHUNK_BYTES = 4 << 20
_READ_BYTES = 1 << 18  # as hashlib.file_digest reads
SYNC_BYTES = 64 << 20
"""Sync after this many bytes, so that progress is visible and the last sync is short."""


class Hashes(NamedTuple):
    """Two hashes of the same bytes, as hex digests."""

    sha256: str
    """Nobody can find other bytes that have it."""
    xxh3: str
    """XXH3 with 128 bits, as fast as memory: for damage that nobody intended."""


@dataclass(frozen=True)
class WrittenFile:
    """The size and the hashes of a written file."""

    size_bytes: int
    hashes: Hashes

    @property
    def sha256(self) -> str:
        """Its SHA-256."""
        return self.hashes.sha256


def write_file(
    path: Path, pieces: Iterable[bytes | memoryview], *, mode: int = 0o644
) -> WrittenFile:
    """Write a new file and sync it; call `sync_directory` for its directory.

    Raises:
        OSError: also if `path` exists, even as a link.
    """
    with opened_to_write(path, os.O_EXCL, mode) as descriptor:
        written = put(descriptor, pieces)
        os.fsync(descriptor)
    return written


def without_link(path: str | Path, flags: int, mode: int = 0o644) -> int:
    """Open a file in a run's directory to write to it: `open(path, "w", opener=without_link)`.

    A link at `path` is an error: a user who may write to the directory, but not to the target of
    the link, could make this process write there. A pipe without a reader is an error too, because
    `open` would wait for a reader.
    """
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, mode)


def plain(path: str | Path, flags: int) -> int:
    """Open a file in a run's directory to read it: `open(path, "rb", opener=plain)`.

    Raises:
        OSError: it is a link, a directory, a pipe or a device. A link might lead anywhere, and
            reading the others might block, or never end.
    """
    try:
        descriptor = without_link(path, flags)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, "it is a link and not a regular file", str(path)) from error
        raise
    kind = os.fstat(descriptor).st_mode
    if stat.S_ISREG(kind):
        return descriptor
    os.close(descriptor)
    if stat.S_ISDIR(kind):
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise OSError(errno.EINVAL, "it is not a regular file", str(path))


def is_utf_8(path: str) -> bool:
    """Whether a path is text: its bytes may be any, which Python keeps as lone surrogates."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_there(path: Path) -> bool:
    """Whether a name exists, also as a broken link.

    Raises:
        OSError: permission denied.
    """
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def require_replaceable(path: Path) -> None:
    """Refuse a path that a user named, and where a new file would replace what is no file.

    Raises:
        OSError: there is a link, a pipe, a socket or a device, such as /dev/null.
    """
    kind = os.lstat(path).st_mode if is_there(path) else stat.S_IFREG
    if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):  # a directory cannot be replaced by a file
        raise OSError(errno.EINVAL, "it is a link, a pipe or a device, and would be replaced")


def read_bytes(path: Path, *, at_most: int) -> bytes:
    """The content of a regular file.

    Raises:
        OSError: it cannot be read, is not a regular file, or has more than `at_most` bytes.
    """
    with open(path, "rb", opener=plain) as file:
        content = file.read(at_most + 1)
    if len(content) > at_most:
        raise OSError(errno.EFBIG, f"it has more than {at_most:,} bytes", str(path))
    return content


def are_equal(one: Path, other: Path) -> bool:
    """Whether two regular files hold the same bytes; a missing one is equal to none.

    Raises:
        OSError: one of them cannot be read, or is no regular file.
    """
    if not (is_there(one) and is_there(other)):
        return False
    with open(one, "rb", opener=plain) as a, open(other, "rb", opener=plain) as b:
        while (some := a.read(_READ_BYTES)) == b.read(_READ_BYTES):
            if not some:
                return True
    return False


def read_json(path: Path, *, at_most: int) -> Any:
    """The value in a regular JSON file.

    Raises:
        OSError: see `read_bytes`.
        ValueError: it is not JSON.
    """
    try:
        return json.loads(read_bytes(path, at_most=at_most))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


@contextmanager
def opened_to_write(path: Path, flags: int = 0, mode: int = 0o644) -> Iterator[int]:
    """A descriptor of the file, which is created if it is missing; never through a link."""
    descriptor = without_link(path, os.O_WRONLY | os.O_CREAT | flags, mode)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def put(
    descriptor: int,
    pieces: Iterable[bytes | memoryview],
    *,
    moved: Callable[[], None] = lambda: None,
) -> WrittenFile:
    """Write the pieces one after the other; the caller syncs the last of them.

    Writing, hashing and syncing leave the interpreter to other threads.

    Args:
        moved: called whenever a few megabytes more are written.
    """
    digest, quick, size, synced = hashlib.sha256(), xxhash.xxh3_128(), 0, 0
    for piece in pieces:
        view = memoryview(piece)
        if size - synced >= SYNC_BYTES:
            os.fsync(descriptor)
            synced = size
        for start in range(0, len(view), _CHUNK_BYTES):
            chunk = view[start : start + _CHUNK_BYTES]
            _write_whole(descriptor, chunk)
            quick.update(chunk)
            digest.update(chunk)
            moved()
        size += len(view)
    return WrittenFile(size, Hashes(digest.hexdigest(), quick.hexdigest()))


def _write_whole(descriptor: int, chunk: memoryview) -> None:
    while chunk:
        chunk = chunk[os.write(descriptor, chunk) :]


def write_at(descriptor: int, content: bytes, at: int) -> None:
    """Write all of the content from a position of the file on, whoever else writes to it."""
    view = memoryview(content)
    while view:
        written = os.pwrite(descriptor, view, at)
        view, at = view[written:], at + written


def replace_file(path: Path, content: str | bytes, *, mode: int = 0o644) -> None:
    """Replace a file by `content`: at every moment either the old or the new file exists."""
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    write_file(partial, [content.encode() if isinstance(content, str) else content], mode=mode)
    os.replace(partial, path)
    sync_directory(path.parent)


def replace_unsynced(path: Path, text: str) -> None:
    """The same without a sync, for a file that a power loss may destroy."""
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    with opened_to_write(partial, os.O_EXCL) as descriptor:
        _write_whole(descriptor, memoryview(text.encode()))
    os.replace(partial, path)


class AppendOnlyFile:
    """A file to which any thread appends lines, each line by one system call.

    Lines that the disk cannot take are kept in memory, and written before the next line or by
    `sync`: so a disk that is full for a while does not end the program.
    """

    def __init__(self, path: Path, *, say: Callable[[str], None]) -> None:
        """`say` reports once that lines wait in memory."""
        self._path = path
        self._say = say
        self._descriptor = without_link(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._adding = threading.Lock()
        self._kept = b""

    def add(self, line: bytes) -> None:
        """Write the line, or keep it in memory; a killed process tears at most one line."""
        with self._adding:
            is_told = bool(self._kept)
            self._kept += line
            try:
                self._write()
            except OSError as error:
                if not is_told:
                    self._say(
                        f"WARNING: {told_of(self._path, error)} Its lines are kept in memory; "
                        "training continues, but only until the next checkpoint."
                    )

    def sync(self) -> None:
        """Return when every line is on disk.

        Raises:
            OSError: it is not; names the file.
        """
        try:
            with self._adding:
                self._write()
            os.fsync(self._descriptor)
        except OSError as error:
            error.filename = str(self._path)
            raise

    def close(self) -> None:
        """Close the file; nothing is appended afterwards."""
        os.close(self._descriptor)

    def _write(self) -> None:
        while self._kept:
            self._kept = self._kept[os.write(self._descriptor, self._kept) :]


def in_the_way(error: OSError) -> str:
    """Why a file cannot be written, and what the user can do about it."""
    return _STANDING_IN_THE_WAY.get(error.errno or 0) or error.strerror or str(error)


def told_of(path: Path, error: OSError) -> str:
    """The same as a sentence, with the path."""
    return f"{path} could not be written: {in_the_way(error)}."


def kind_of(error: OSError) -> type[EvenstepError]:
    """Exit code 42 if the user must fix the cause; 1 if a restart may succeed."""
    return NotSaved if error.errno in _STANDING_IN_THE_WAY else EvenstepError


def kind_of_unread(error: OSError) -> type[EvenstepError]:
    """Exit code 64 if the user must fix the cause; 1 if a restart may succeed."""
    return EvenstepError if error.errno in PASSING | {errno.EIO} else SpecError


@contextmanager
def told_when_unwritten(path: Path) -> Iterator[None]:
    """A context in which a failed write raises a readable error.

    Raises:
        EvenstepError: the file could not be written.
    """
    try:
        yield
    except OSError as error:
        raise kind_of(error)(told_of(path, error)) from error


@contextmanager
def told_when_unread(path: Path) -> Iterator[None]:
    """A context in which a failed read raises a readable error.

    Raises:
        SpecError: permission is denied, or it is not a regular file.
        EvenstepError: it cannot be read at the moment.
    """
    try:
        yield
    except OSError as error:
        kind = kind_of_unread(error)
        named = error.filename if isinstance(error.filename, str | os.PathLike) else path
        raise kind(f"{named} cannot be read: {error.strerror or error}.") from error


def sync_file(path: Path) -> None:
    """Return when all writes to the file are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_directory(directory: Path) -> None:
    """Return when all new, renamed and removed names in the directory are on disk."""
    sync_file(directory)


def make_directory(directory: Path, *, mode: int = 0o777) -> None:
    """Make the directory and sync its name; the parent must exist.

    Raises:
        OSError: also if there is a link in its place.
    """
    if directory.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(directory))
    if not directory.is_dir():
        directory.mkdir(mode, exist_ok=True)
        sync_directory(directory.parent)


def remove(path: Path) -> None:
    """Remove a file, a link (never its target) or a directory with its content."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_if_possible(path: Path) -> None:
    """The same, as far as possible: what cannot be removed stays, without an error."""
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def sha256_of(path: Path, begin: int = 0, end: int | None = None) -> str:
    """The hash of a file's content, or of its bytes from `begin` to `end`."""
    digest = hashlib.sha256()
    _read(path, begin, end, digest)
    return digest.hexdigest()


def xxh3_of(path: Path, begin: int = 0, end: int | None = None) -> str:
    """XXH3 with 128 bits of the same bytes."""
    digest = xxhash.xxh3_128()
    _read(path, begin, end, digest)
    return digest.hexdigest()


def hashes_of(path: Path, begin: int = 0, end: int | None = None) -> Hashes:
    """Both hashes of the same bytes, which are read once."""
    digest, quick = hashlib.sha256(), xxhash.xxh3_128()
    _read(path, begin, end, digest, quick)
    return Hashes(digest.hexdigest(), quick.hexdigest())


def _read(path: Path, begin: int, end: int | None, *digests: Any) -> None:
    """Let each of the digests have these bytes of a file."""
    buffer = memoryview(bytearray(_READ_BYTES))
    with path.open("rb", buffering=0) as file:
        file.seek(begin)
        left = os.fstat(file.fileno()).st_size - begin if end is None else end - begin
        while left > 0 and (count := file.readinto(buffer[: min(left, _READ_BYTES)])):
            for digest in digests:
                digest.update(buffer[:count])
            left -= count
