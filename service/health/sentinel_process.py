"""The program of a sentinel: kills its parent after too long a silence.

It is run as a script, without the package and without site-packages, so that it starts in a few
milliseconds. Each line of standard input is a sign of life: the seconds until the next one is
overdue, and the file with the stacks of the parent at that time.

Process 1 of a container gets no signal of its own children that it does not handle, so it is sent
another one than SIGKILL.

Silence is counted in checks: while everything is stopped, nothing is counted. Nor is anything
counted while only the parent is stopped, by a signal or a debugger.
"""

from __future__ import annotations

import math
import os
import select
import sys
import time
from contextlib import suppress

_LOOK_SECONDS = 1.0


def main(parent: int, mark: str, number: int) -> None:
    """Watch until the parent is gone; write the reason to the file `mark` before it is killed.

    Without a mark, the reason goes to standard error. `number` is the signal that ends the parent.
    """
    limit, stacks, rest, silent = math.inf, "", b"", 0.0
    while os.getppid() == parent:
        look = min(_LOOK_SECONDS, limit / 8)
        began = time.monotonic()
        if select.select([0], [], [], look)[0]:
            piece = os.read(0, 1 << 16)
            if not piece:
                return
            *lines, rest = (rest + piece).split(b"\n")
            if lines:
                told, _, stacks = lines[-1].decode(errors="surrogateescape").partition(" ")
                limit, silent = float(told), 0.0
        elif not _is_stopped(parent):
            silent += min(time.monotonic() - began, look)
            if silent >= limit:
                _kill(parent, _reason(silent, stacks), mark, number)
                return


def _reason(silent: float, stacks: str) -> str:
    where = f" Its stacks are in {stacks}." if stacks else ""
    return (
        f"This process has not answered for {silent:.0f} s: a library holds Python's lock, or the "
        f"system does not let it run. It was killed.{where}"
    )


def _kill(parent: int, reason: str, mark: str, number: int) -> None:
    with suppress(OSError):  # even with a full disk or no reader, it must end
        if mark:
            with open(mark, "w", encoding="utf-8", errors="surrogateescape") as file:
                file.write(reason)
        else:
            os.write(2, f"error: {reason}\n".encode(errors="surrogateescape"))
    if os.getppid() == parent:  # otherwise it has ended, and its number may be reused
        os.kill(parent, number)


def _is_stopped(process: int) -> bool:
    """Whether it is stopped by a signal or a debugger, according to the system."""
    try:
        with open(f"/proc/{process}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] in (b"T", b"t")
    except OSError:
        return False


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
