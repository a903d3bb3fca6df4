"""Reads files of JSON lines block by block, in bounded memory."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic_core import from_json

from service.basics.atomic_files import plain
from service.basics.errors import WillFailAgain

BLOCK_BYTES = 1 << 17
"""Larger ones, which leave the processor's cache, take half as long again to read."""
LONGEST_LINE_BYTES = 16 << 20
_FIRST_BYTES = 1 << 14
"""Of the first block: a short file needs no more, and there may be thousands of them."""


class Block(NamedTuple):
    """Some consecutive lines."""

    first: int
    """The number of the first line, from 1."""
    text: bytes
    """All of them, without the end of the last one."""
    values: list[Any]
    """The value of each line; None if it is not JSON."""
    is_torn: bool = False
    """Whether the last line has no line end: it may be incomplete."""

    @property
    def lines(self) -> list[bytes]:
        return self.text.split(b"\n")


def blocks_of(path: Path) -> Iterator[Block]:
    """The lines of a file, some hundreds at a time.

    Raises:
        OSError: it is not a regular file, or cannot be read.
        WillFailAgain: a line is longer than any line that Evenstep writes.
    """
    number = 1
    for chunk, is_torn in _chunks(path):
        values = _values_in(chunk)
        yield Block(number, chunk, values, is_torn)
        number += len(values)


def lines_with(path: Path, needle: bytes) -> Iterator[list[bytes]]:
    """The lines that contain these bytes, some at a time: ten times as fast as reading JSON."""
    held, begin = bytearray(_FIRST_BYTES), 0
    with open(path, "rb", buffering=0, opener=plain) as file:
        while count := file.readinto(memoryview(held)[begin : begin + BLOCK_BYTES]):
            filled = begin + count
            whole = held.rfind(b"\n", begin, filled) + 1
            if found := _found(held, needle, whole):
                yield found
            rest = held[whole:filled]
            begin = len(rest)
            held[:begin] = rest
            _require_short(path, begin + BLOCK_BYTES)
            if len(held) < begin + BLOCK_BYTES:
                held.extend(bytes(begin + BLOCK_BYTES))
    if found := _found(held[:begin], needle, begin):
        yield found


def _found(held: bytearray, needle: bytes, whole: int) -> list[bytes]:
    """The lines with the needle among the first `whole` bytes, which end with a line end."""
    found, at = [], held.find(needle, 0, whole)
    while at >= 0:
        end = held.find(b"\n", at, whole)
        end = whole if end < 0 else end
        found.append(bytes(held[held.rfind(b"\n", 0, at) + 1 : end]))
        at = held.find(needle, end, whole)
    return found


def last_lines(path: Path) -> tuple[list[bytes], bool]:
    """The last two lines of a file, or as many as it has; and whether the last one is torn."""
    with open(path, "rb", opener=plain) as file:
        size = file.seek(0, os.SEEK_END)
        length = 1 << 16
        while True:
            begin = max(0, size - length)
            file.seek(begin)
            lines = file.read(size - begin).split(b"\n")
            if begin == 0 or len(lines) > 3 or length >= LONGEST_LINE_BYTES:
                break
            length *= 4
    whole = lines if begin == 0 else lines[1:]  # the first of these is incomplete
    is_torn = bool(whole and whole[-1])
    return (whole if is_torn else whole[:-1])[-2:], is_torn


def values_of(lines: Sequence[bytes]) -> list[Any]:
    """The value of each line; None if it is not JSON."""
    return _values_in(b"\n".join(lines)) if lines else []


def _values_in(text: bytes) -> list[Any]:
    """The same for the lines of a text; a text without a line end is one line."""
    try:
        # All of them together: one call for each line takes six times as long.  No JSON value
        # contains a line end, so a line that is not JSON fails here or changes the count.
        values: list[Any] = from_json(b"[" + text.replace(b"\n", b",") + b"]", cache_strings="keys")
        if len(values) == text.count(b"\n") + 1:
            return values
    except ValueError:
        pass  # one of them is not JSON; found below
    return [_value_of(line) for line in text.split(b"\n")]


def _value_of(line: bytes) -> Any:
    try:
        return from_json(line)
    except ValueError:
        return None


def _chunks(path: Path) -> Iterator[tuple[bytes, bool]]:
    """The file in parts that end with a line end; and whether the last line is incomplete."""
    rest = b""
    with open(path, "rb", buffering=0, opener=plain) as file:
        while read := file.read(BLOCK_BYTES):
            whole, end, tail = read.rpartition(b"\n")
            if end:
                yield rest + whole, False
                rest = tail
            else:
                rest += read
            _require_short(path, len(rest))
    if rest:
        yield rest, True


def _require_short(path: Path, line_bytes: int) -> None:
    if line_bytes > LONGEST_LINE_BYTES:
        raise WillFailAgain(
            f"{path}: a line has more than {LONGEST_LINE_BYTES:,} bytes, so it is not a file of "
            "a run. Restore a good copy, or start over with --fresh."
        )
