"""A directory of downloaded parts of objects, with a size limit, used by several processes."""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from service.basics.atomic_files import told_when_unwritten
from service.basics.errors import EvenstepError, SpecError

CACHE_VARIABLE = "EVENSTEP_DATA_CACHE"
_PART = ".part"  # being downloaded: its writer holds its lock, which ends with the process
_LOOK_SECONDS = 0.05
_PATIENCE_SECONDS = 120.0


def default_cache() -> Path:
    """The directory of the cache if the task names none."""
    asked = os.environ.get(CACHE_VARIABLE)
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(asked) if asked else Path(cache).expanduser() / "evenstep" / "data"


class Held:
    """An open file that is not removed from the cache until it is closed."""

    def __init__(self, descriptor: int, path: Path, *, begin: int = 0) -> None:
        self.descriptor = descriptor
        self.path = path
        self.begin = begin
        """Where its first byte is in the object."""

    def read(self, offset: int, size: int) -> bytes:
        """Bytes of the object, fewer at its end."""
        content = b""
        while len(content) < size:
            position = offset - self.begin + len(content)
            more = os.pread(self.descriptor, size - len(content), position)
            if not more:
                break
            content += more
        return content

    def close(self) -> None:
        """Let the cache remove it; a second call does nothing."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def __del__(self) -> None:
        self.close()


class _Entry(NamedTuple):
    used: int  # nanoseconds
    size: int
    path: Path


class Cache:
    """Downloaded files of a machine; the least recently used ones are removed first.

    Locks (flock) keep several processes apart. The kernel drops the locks of a process that is
    killed, so nothing has to be cleaned up: a partial file without a lock is removed or
    overwritten by the next process.
    """

    def __init__(self, directory: Path, *, limit_bytes: int) -> None:
        self.directory = directory
        self.limit_bytes = limit_bytes

    def hold(self, key: str, size: int, fetch: Callable[[int], None]) -> Held:
        """The file of a key, downloaded if it is not there; by one process, if several ask.

        Args:
            fetch: writes the content to a descriptor, and raises if it is not complete.
        Raises:
            SpecError: the file is larger than the limit.
            EvenstepError: the disk does not take it, or files in use leave no space for it.
        """
        if size > self.limit_bytes:
            raise SpecError(
                f"{self.directory}: the cache may hold {self.limit_bytes / 2**30:.3g} GiB, and one "
                f"part of the data has {size / 2**30:.3g} GiB. Raise cache_gib of rows_in."
            )
        path = self.directory / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}-{size}"
        with told_when_unwritten(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            while True:
                held = _opened(path, size)
                if held is None and self._downloaded(path, size, fetch):
                    held = _opened(path, size)
                if held is not None:
                    return held
                time.sleep(_LOOK_SECONDS)

    def _downloaded(self, path: Path, size: int, fetch: Callable[[int], None]) -> bool:
        """Download the file; False if another process is doing so, or has just done so."""
        part = path.with_name(path.name + _PART)
        descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            if not (_lock(descriptor, fcntl.LOCK_EX) and _is_at(descriptor, part)):
                return False
            try:
                if path.exists():  # since it was looked for
                    part.unlink()
                    return True
                self._reserve(descriptor, part, size)
                fetch(descriptor)
                os.fsync(descriptor)
                os.rename(part, path)
            except BaseException:
                part.unlink(missing_ok=True)
                raise
            return True
        finally:
            os.close(descriptor)

    def _reserve(self, descriptor: int, part: Path, size: int) -> None:
        """Give the partial file its size, for which older files are removed."""
        ends = time.monotonic() + _PATIENCE_SECONDS
        while True:
            with self._alone():
                os.ftruncate(descriptor, 0)
                excess = sum(each.size for each in self._entries()) + size - self.limit_bytes
                for entry in sorted(self._entries()):
                    if excess <= 0:
                        break
                    if entry.path != part and _removed(entry.path):
                        excess -= entry.size
                if excess <= 0:
                    if size:
                        os.posix_fallocate(descriptor, 0, size)  # a full disk is found here
                    return
            if time.monotonic() > ends:
                raise EvenstepError(
                    f"{self.directory}: the cache may hold {self.limit_bytes / 2**30:.3g} GiB, and "
                    "files that are in use leave no space. Raise cache_gib of rows_in, or lower "
                    "shuffle."
                )
            time.sleep(_LOOK_SECONDS)  # other processes may still be reading older files

    def _entries(self) -> Iterator[_Entry]:
        for found in os.scandir(self.directory):
            try:
                told = found.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            if found.is_file(follow_symlinks=False) and not found.name.startswith("."):
                yield _Entry(told.st_mtime_ns, told.st_size, Path(found.path))

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """A context in which no other process reserves space."""
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        lock = os.open(self.directory / ".lock", flags, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)


def _opened(path: Path, size: int) -> Held | None:
    """The complete file, locked; None if there is none."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    if not (_lock(descriptor, fcntl.LOCK_SH) and _is_at(descriptor, path)):
        os.close(descriptor)  # it is just being removed
        return None
    if os.fstat(descriptor).st_size != size:
        os.close(descriptor)
        path.unlink(missing_ok=True)
        return None
    os.utime(descriptor)
    return Held(descriptor, path)


def _removed(path: Path) -> bool:
    """Remove a file that no process uses; whether it is gone."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return True
    try:
        if not _lock(descriptor, fcntl.LOCK_EX):
            return False
        if _is_at(descriptor, path):
            path.unlink()
        return True
    finally:
        os.close(descriptor)


def _lock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the path still names the open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False
