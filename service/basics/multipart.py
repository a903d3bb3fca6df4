"""Large files in parts that several threads and processes write at the same time. No torch.

A file with one part has its own SHA-256.  A larger one has the SHA-256 of the concatenated SHA-256s
of its parts (a composite checksum, as in S3), so no process must read it from end to end.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, NamedTuple

from service.basics.atomic_files import SYNC_BYTES, Hashes, hashes_of, opened_to_write, put

PART_BYTES = 16 << 20
"""Size of a part. Each manifest records it, so it may change."""


class Part(NamedTuple):
    """The bytes of a file from `begin` to `end`."""

    file: str
    begin: int
    end: int


def parts_of(file: str, size_bytes: int, part_bytes: int) -> list[Part]:
    """The parts of a file in order; the last one may be smaller."""
    ends = [*range(part_bytes, size_bytes, part_bytes), size_bytes]
    return [Part(file, begin, end) for begin, end in zip([0, *ends], ends, strict=False)]


def shared_out(parts: Sequence[Part], shares: int, *, first: Iterable[Part]) -> list[set[Part]]:
    """The parts in shares of nearly equal number, each with as many adjacent parts as possible.

    Args:
        first: parts that belong to the first share.
    """
    bound = set(first)
    free = [part for part in parts if part not in bound]
    taken = max(0, -(-len(parts) // shares) - len(bound))
    rest, others = free[taken:], max(1, shares - 1)
    cuts = [len(rest) * number // others for number in range(others + 1)]
    cut = [set(rest[begin:end]) for begin, end in pairwise(cuts)]
    return [bound | set(free[:taken]), *cut][:shares]


def write_parts(
    directory: Path,
    parts: Iterable[Part],
    bytes_of: Callable[[Part], Iterable[memoryview]],
    *,
    moved: Callable[[], None],
) -> dict[Part, Hashes]:
    """Write these parts at their positions, and sync them; return the hashes of each part.

    Other processes may write other parts at the same time: the directory is new, and the first
    writer creates the files.

    Args:
        moved: called after every few megabytes that are written or synced.
    """
    digests = {}
    for file, of_file in groupby(sorted(parts), key=lambda part: part.file):
        with opened_to_write(directory / file) as descriptor:
            unsynced = 0
            for part in of_file:
                if unsynced >= SYNC_BYTES:
                    os.fsync(descriptor)
                    unsynced = 0
                os.lseek(descriptor, part.begin, os.SEEK_SET)
                digests[part] = put(descriptor, bytes_of(part), moved=moved).hashes
                unsynced += part.end - part.begin
            os.fsync(descriptor)
            moved()
    return digests


def write_pieces(
    directory: Path,
    pieces: Iterable[tuple[str, int, Iterable[memoryview]]],
    *,
    moved: Callable[[], None],
) -> None:
    """Write pieces (file, start, bytes) and sync them; others may write at the same time.

    Pieces begin and end within pages. For a write beyond the end of the file that it knows, an NFS
    client of Linux sends the whole page, with zeros where another machine has just written, unless
    the file has a lock on some of its bytes, or is opened with O_DSYNC.
    """
    for file, of_file in groupby(pieces, key=lambda piece: piece[0]):
        with ExitStack() as opened:
            descriptor = opened.enter_context(opened_to_write(directory / file))
            is_locked = None
            for _, begin, content in of_file:
                if is_locked is None:
                    is_locked = _locked_from(descriptor, begin)
                    if not is_locked:
                        again = opened_to_write(directory / file, os.O_DSYNC)
                        descriptor = opened.enter_context(again)
                os.lseek(descriptor, begin, os.SEEK_SET)
                put(descriptor, content, moved=moved)
            os.fsync(descriptor)
            moved()


def _locked_from(descriptor: int, begin: int) -> bool:
    """Lock the byte at `begin`, which this process alone writes, until the file is closed."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, begin)
    except OSError:  # this storage has no locks
        return False
    return True


def hash_parts(
    directory: Path, parts: Iterable[Part], *, moved: Callable[[], None]
) -> dict[Part, Hashes]:
    """The hashes of parts on disk, after all of their bytes have been written."""
    digests = {}
    for part in sorted(parts):
        digests[part] = hashes_of(directory / part.file, part.begin, part.end)
        moved()
    return digests


def told_of(digests: Mapping[Part, Hashes]) -> dict[str, dict[str, Any]]:
    """The manifest's entries for files whose parts are all given."""
    told = {}
    for file, parts in groupby(sorted(digests), key=lambda part: part.file):
        of_file = list(parts)
        each = [digests[part].sha256 for part in of_file]
        quick = [digests[part].xxh3 for part in of_file]
        told[file] = {"bytes": of_file[-1].end, "sha256": digest_of(each), "xxh3": quick}
        if len(each) > 1:
            told[file]["parts"] = each
    return told


def digest_of(digests: Sequence[str]) -> str:
    """SHA-256 of a file, from the hashes of its parts.

    Raises:
        ValueError: they are not hex digests.
    """
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256(b"".join(map(bytes.fromhex, digests))).hexdigest()
