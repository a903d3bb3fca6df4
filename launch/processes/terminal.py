"""Standard output and standard error that survive the loss of their reader.

With a closed terminal (EIO), `| head -1` and Ctrl-C in `| tee log` (EPIPE), or a full disk
(ENOSPC), the output of a training is lost, but not the training.  All output of Python goes through
this, including that of the user's code and of libraries.
"""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from typing import Any, Literal, TextIO

from service.basics.errors import EvenstepError

_NUMBERS = {"stdout": 1, "stderr": 2}


class OutputLost(EvenstepError):
    """The result of a command could not be written to standard output."""


class ReaderGone(OutputLost):
    """The reader has closed the pipe, such as `head`, or the terminal has been closed."""

    exit_code = 141  # as by SIGPIPE


def open_descriptors() -> None:
    """Open /dev/null for descriptors 0, 1 and 2 if they are closed.

    Otherwise the next opened file would get the number, and printed text would go into it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # it gets the lowest number


def outlive_readers(*names: Literal["stdout", "stderr"]) -> None:
    """From now on ignore failed writes to these streams."""
    for name in names:
        setattr(sys, name, _stream(name, _Lasting(_NUMBERS[name], "wb", closefd=False)))


def require_reader() -> None:
    """From now on a failed write to standard output ends the command with a message."""
    sys.stdout = _stream("stdout", _Required(1, "wb", closefd=False))


def _stream(name: str, raw: io.FileIO) -> TextIO:
    """A text stream above `raw`, as Python creates it; unknown characters are escaped."""
    before = getattr(sys, name)
    unbuffered = bool(getattr(before, "write_through", False))  # PYTHONUNBUFFERED
    above: Any = raw if unbuffered else io.BufferedWriter(raw)
    return io.TextIOWrapper(
        above,
        encoding=getattr(before, "encoding", None) or "utf-8",
        errors="backslashreplace",
        line_buffering=name == "stderr" or raw.isatty(),
        write_through=unbuffered,
    )


class _Whole(io.FileIO):
    """Writes everything, also if another program has made the terminal non-blocking."""

    def write(self, data: Any) -> int:
        left = memoryview(data).cast("B")
        size = len(left)
        try:
            while left:
                written: int | None = super().write(left)
                if written is None:
                    select.select([], [self], [])
                else:
                    left = left[written:]
        except OSError as error:
            self._lose(error)
        return size

    def _lose(self, error: OSError) -> None:
        raise NotImplementedError


class _Lasting(_Whole):
    def _lose(self, error: OSError) -> None:
        """Continue: a failed print must not end the run."""


class _Required(_Whole):
    _told = False

    def __init__(self, *told: Any, **named: Any) -> None:
        super().__init__(*told, **named)
        self._was_terminal = self.isatty()  # one that is closed is none any more

    def _lose(self, error: OSError) -> None:
        if self._told:
            return  # what is left in the buffer, at the interpreter's exit
        self._told = True
        is_closed = self._was_terminal and error.errno == errno.EIO
        if isinstance(error, BrokenPipeError) or is_closed:
            raise ReaderGone("Nobody reads standard output.") from error
        raise OutputLost(f"Standard output cannot be written: {error.strerror}.") from error
