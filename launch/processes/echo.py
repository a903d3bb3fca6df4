"""Copies the log files of the other ranks into the launcher's own output.

The log of a pod is all that a cluster keeps of it in a place that others can read.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from service.basics.atomic_files import plain

_LOOK_SECONDS = 1.0
_MOST_BYTES = 1 << 20
_SPOKEN = re.compile(r"\[rank (\d+)\] (.*)")


@contextmanager
def echoed(logs: Path, ranks: Sequence[int], say: Callable[[str], None]) -> Iterator[None]:
    """A context that prints what these ranks append to their logs in directory `logs`."""
    echo = _Echo(logs, ranks, say)
    over = threading.Event()

    def follow() -> None:
        while not over.wait(_LOOK_SECONDS):
            echo.look()

    thread = threading.Thread(target=follow, name="echo", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        echo.look(last=True)


def spoken(line: str) -> tuple[int, str]:
    """(rank, text) of a line in a pod's log; the launcher's own lines belong to rank 0."""
    found = _SPOKEN.fullmatch(line)
    return (int(found[1]), found[2]) if found else (0, line)


class _Echo:
    def __init__(self, logs: Path, ranks: Sequence[int], say: Callable[[str], None]) -> None:
        self._say = say
        self._files = {rank: logs / f"rank-{rank}.log" for rank in ranks}
        # Existing content belongs to earlier attempts, whose pods have printed it.
        self._read = {rank: _size(file) for rank, file in self._files.items()}

    def look(self, *, last: bool = False) -> None:
        """Print the complete lines that were added; with `last`, also one without a line end."""
        for rank, file in self._files.items():
            with suppress(OSError):  # it has been removed, or its storage does not answer
                while self._say_more(rank, file, last=last):
                    pass

    def _say_more(self, rank: int, file: Path, *, last: bool) -> bool:
        """Print a part of what was added; return whether there is more."""
        if _size(file) <= self._read[rank]:
            return False
        with open(file, "rb", opener=plain) as opened:
            opened.seek(self._read[rank])
            added = opened.read(_MOST_BYTES)
        # A progress bar ends its lines with a carriage return, for hours. Not at the very end: a
        # line end may follow it.
        end = max(added.rfind(b"\n"), added.rfind(b"\r", 0, -1)) + 1
        is_part = len(added) == _MOST_BYTES
        whole = added if last or (is_part and not end) else added[:end]
        self._read[rank] += len(whole)
        for line in whole.decode(errors="replace").splitlines():
            self._say(f"[rank {rank}] {line}")
        return is_part and bool(whole)


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0
