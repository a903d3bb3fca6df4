"""The files of a data set: found by an address, and read from a directory or a bucket."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from service.basics.atomic_files import told_when_unread
from service.basics.errors import DataBroken, SpecError
from service.drivers.endpoints import endpoint_of
from service.remote.cache import Cache, Held
from service.storage.address import Address, address_in
from service.storage.store import NoObject, Store, in_parallel, open_store

PART_BYTES = 16 * 2**20  # of one request
_PATIENCE_SECONDS = 60.0
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")


class File(NamedTuple):
    """A file of a data set."""

    name: str
    """In a bucket: the key. In a directory: the absolute path."""
    size: int
    version: str
    """Changes when the object is replaced, if the store says so."""


class Files:
    """Access to files of one bucket, or of this machine."""

    def __init__(self, bucket: Address | None, cache: Cache) -> None:
        self._bucket = bucket
        self._cache = cache
        self._opened: tuple[int, Store] | None = None

    def told(self, name: str) -> str:
        """The name as a user writes it."""
        return f"{self._bucket}/{name}" if self._bucket else name

    def below(
        self, prefix: str, *, wanted: Callable[[str], bool] = lambda name: True
    ) -> list[File]:
        """The file of this name, or all files below the directory of this name, in order.

        Args:
            wanted: whether to return a file of this name; others are not looked at.
        Raises:
            SpecError: there is no right to list them.
        """
        if self._bucket is not None:
            found = self._store().listing(prefix).items()
            files = [File(name, each.size, each.version) for name, each in found if wanted(name)]
        else:
            with told_when_unread(Path(prefix)):
                files = [
                    file for path in _paths_below(prefix) if wanted(path) for file in _file(path)
                ]
        inside = prefix.rstrip("/") + "/"
        return sorted(f for f in files if f.name == prefix or f.name.startswith(inside))

    def read(self, file: File, begin: int, end: int) -> bytes:
        """Bytes of a file.

        Raises:
            DataBroken: it is gone, or shorter than it was when it was listed.
        """
        if self._bucket is None:
            held = self.hold(file)
            content = held.read(begin, end - begin)
            held.close()
        else:
            try:
                content = self._store().get_range(file.name, begin, end)
            except NoObject as error:
                raise DataBroken(
                    f"{self.told(file.name)}: there is no such object. It was there when the files "
                    "were listed, or the index of the data set names it. Upload it again."
                ) from error
        if len(content) != end - begin:
            raise DataBroken(
                f"{self.told(file.name)}: has only {begin + len(content):,} of {file.size:,} "
                "bytes. Upload it again."
            )
        return content

    def hold(
        self,
        file: File,
        begin: int = 0,
        end: int | None = None,
        *,
        check: Callable[[Held], None] = lambda held: None,
    ) -> Held:
        """A local file with these bytes, which the caller closes: downloaded, or the file itself.

        Args:
            check: called with a file before it is used; raises if its content is wrong.
        """
        if self._bucket is None:
            with told_when_unread(Path(file.name)):
                held = Held(os.open(file.name, os.O_RDONLY | os.O_CLOEXEC), Path(file.name))
            check(held)
            return held
        stop = file.size if end is None else end

        def fetch(descriptor: int) -> None:
            def copied(start: int) -> None:
                content = self.read(file, start, min(start + PART_BYTES, stop))
                _write_at(descriptor, content, start - begin)

            in_parallel(copied, range(begin, stop, PART_BYTES))
            whole = Held(os.dup(descriptor), Path(), begin=begin)
            try:
                check(whole)
            finally:
                whole.close()

        key = f"{self.told(file.name)}{self._where} {file.version} {begin}-{stop}"
        held = self._cache.hold(key, stop - begin, fetch)
        held.begin = begin
        return held

    @cached_property
    def _where(self) -> str:
        """What tells apart two stores with buckets of one name; empty for the store of its
        cloud."""
        assert self._bucket is not None
        endpoint = endpoint_of(self._bucket.scheme)
        return f" at {endpoint}" if endpoint else ""

    def _store(self) -> Store:
        """The store, opened in this process: drivers do not survive a fork."""
        assert self._bucket is not None
        if self._opened is None or self._opened[0] != os.getpid():
            store = open_store(self._bucket, patience_seconds=_PATIENCE_SECONDS)
            self._opened = os.getpid(), store
        return self._opened[1]


def _write_at(descriptor: int, content: bytes, offset: int) -> None:
    left = memoryview(content)
    while left:
        written = os.pwrite(descriptor, left, offset)
        left, offset = left[written:], offset + written


class Place(NamedTuple):
    """Where the files of a data set are."""

    bucket: Address | None
    """None: on this machine."""
    names: tuple[str, ...]
    """Files, directories and patterns."""


def place_of(addresses: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> Place:
    """What the addresses of a data set mean; nothing is opened.

    Raises:
        SpecError: they are no addresses, or are in several buckets.
    """
    given = [addresses] if isinstance(addresses, str | os.PathLike) else list(addresses)
    texts = [text for each in given for text in _expanded(os.fspath(each))]
    if not texts:
        raise SpecError("rows_in: no address is given.")
    buckets: set[Address | None] = set()
    names = []
    for text in texts:
        address = address_in(text)
        if address is None:
            buckets.add(None)
            names.append(os.path.abspath(os.path.expanduser(text)))
        else:
            bucket, _, name = address.path.partition("/")
            buckets.add(Address(address.scheme, bucket))
            names.append(name)
    if len(buckets) > 1:
        told = ", ".join(sorted(str(each or "this machine") for each in buckets))
        raise SpecError(f"rows_in: the files must be in one place, but are in {told}.")
    return Place(buckets.pop(), tuple(names))


def found(files: Files, names: Sequence[str], *, ending: str | None) -> list[File]:
    """The files that these names mean, each once, in the order of the names.

    Args:
        ending: of a directory, only files with this ending are taken.
    Raises:
        SpecError: there is none for one of the names.
    """
    every: dict[str, File] = {}
    for parent, group in _by_parent(names):
        meanings = [_meaning(name, ending) for name in group]
        listed = files.below(parent, wanted=_any_of(meanings))
        for name, means in zip(group, meanings, strict=True):
            taken = [file for file in listed if file.name == name]
            taken = taken or [file for file in listed if means(file.name)]
            if not taken:
                kind = f" *{ending}" if ending else ""
                raise SpecError(f"{files.told(name)}: there is no{kind} file.")
            every |= {file.name: file for file in taken}
    return list(every.values())


def digest_of(files: Sequence[File]) -> str:
    """A digest of the names and sizes, the same wherever the data set is copied to."""
    root = os.path.commonpath([os.path.dirname(f"/{file.name}") for file in files])
    lines = [f"{os.path.relpath(f'/{file.name}', root)} {file.size}\n" for file in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]


def _expanded(text: str) -> list[str]:
    """`{000..011}` in an address stands for each of these numbers."""
    match = _BRACES.search(text)
    if match is None:
        return [text]
    first, last = match[1], match[2]
    numbers = [f"{n:0{len(first)}}" for n in range(int(first), int(last) + 1)]
    return [
        each for n in numbers for each in _expanded(text[: match.start()] + n + text[match.end() :])
    ]


def _by_parent(names: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Names in groups that one listing answers."""
    groups: list[tuple[str, list[str]]] = []
    for name in names:
        literal = re.split(r"[*?\[]", name, maxsplit=1)[0]
        parent = name if literal == name else literal.rpartition("/")[0]
        beside = len(names) > 1 and literal == name
        parent = name.rpartition("/")[0] if beside else parent
        if groups and groups[-1][0] == parent:
            groups[-1][1].append(name)
        else:
            groups.append((parent, [name]))
    return groups


def _meaning(name: str, ending: str | None) -> Callable[[str], bool]:
    """Whether a file is one of those that `name` means: itself, one below it, or of a pattern."""
    if re.search(r"[*?\[]", name):
        from fsspec.utils import glob_translate

        pattern = re.compile(glob_translate(name))
        return lambda path: path == name or pattern.match(path) is not None
    inside = f"{name}/"
    return lambda path: (
        path == name or (path.startswith(inside) and (ending is None or path.endswith(ending)))
    )


def _any_of(meanings: Sequence[Callable[[str], bool]]) -> Callable[[str], bool]:
    return lambda path: any(means(path) for means in meanings)


def _paths_below(name: str) -> list[str]:
    if os.path.isfile(name):
        return [name]
    walked = os.walk(name, onerror=_raise)
    return [os.path.join(where, each) for where, _, there in walked for each in there]


def _raise(error: OSError) -> None:
    raise error


def _file(path: str) -> list[File]:
    """The file at this path; nothing if it was removed since it was listed."""
    try:
        told = os.stat(path)
    except FileNotFoundError:
        return []
    return [File(path, told.st_size, str(told.st_mtime_ns))]
