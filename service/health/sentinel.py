"""The sentinel: a small process for each rank, which kills it when no thread of it can run.

The watchdog is a thread, so it cannot run while a library holds Python's lock. The timer of
faulthandler can, but it compares two clock times: if everything was stopped (SIGSTOP, a frozen
container) for longer than its limit, it would end the process at the moment it continues. A
separate process can count its own running time.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO

from service.health import sentinel_process
from service.health.stop_request import STOP_SIGNALS

_started: list[Sentinel] = []
_of_the_parent: list[Sentinel] = []


class Sentinel:
    """Kills this process if `alive` is not called again in time."""

    def __init__(self, program: subprocess.Popen[bytes]) -> None:
        assert program.stdin is not None, "it was started with a pipe"
        self._program = program
        self._pipe: IO[bytes] = program.stdin

    def alive(self, seconds: float, *, stacks: Path | None = None) -> bool:
        """Send a sign of life; False if the sentinel is gone.

        Args:
            seconds: time until the next one is overdue.
            stacks: the file with the stacks of this process at that time.
        """
        try:
            told = os.fsencode(stacks or "").replace(b"\n", b"?")  # a line is one sign of life
            os.write(self._pipe.fileno(), b"%r %s\n" % (seconds, told))
        except BlockingIOError:
            return True  # the pipe is full: the sentinel is stopped, and will read it later
        except OSError:
            return False
        return True

    def rest(self) -> None:
        """Expect no sign of life until the next one."""
        self.alive(float("inf"))


def sentinel(mark: Path | None = None) -> Sentinel | None:
    """The sentinel of this process, started if there is none; None if it is not possible.

    A machine at its limits may refuse to start another process.

    Args:
        mark: the file for the reason of a kill; by default standard error.
    """
    if not _started and sys.executable:
        started = _start(mark)
        if started is not None:
            _started.append(started)
    return running()


def running() -> Sentinel | None:
    """The sentinel of this process, if one was started."""
    return _started[0] if _started else None


LOCKED_CODE = 40
"""Exit code of process 1 of a container whose sentinel has ended it."""


def _ending_signal() -> int | None:
    """The signal by which a sentinel ends this process; None if there is none.

    Process 1 of a container gets no SIGKILL from its own children, and Python handles no signal
    while a library holds its lock. So `_exit` of the C library is itself the handler of a signal
    that nobody else uses: it is called with the number of the signal, as the exit code.
    """
    if os.getpid() != 1:
        return signal.SIGKILL
    if signal.getsignal(LOCKED_CODE) is not signal.SIG_DFL:
        return None
    library = ctypes.CDLL(None)
    library.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
    library.signal.restype = ctypes.c_void_p
    library.signal(LOCKED_CODE, ctypes.cast(library._exit, ctypes.c_void_p))
    return LOCKED_CODE


def _start(mark: Path | None) -> Sentinel | None:
    number = _ending_signal()
    if number is None:
        return None
    script = [sys.executable, "-I", "-S", sentinel_process.__file__]
    # A request to stop this process is not meant for its sentinel, which inherits the blocked
    # signals.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        program = subprocess.Popen(
            [*script, str(os.getpid()), str(mark or ""), str(number)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            bufsize=0,
        )
    except OSError:
        return None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    found = Sentinel(program)
    os.set_blocking(found._pipe.fileno(), False)
    return found


def _forget() -> None:
    """In a forked child: the sentinel belongs to its parent."""
    for each in _started:
        each._pipe.close()  # so that it ends with its own process
    _of_the_parent.extend(_started)  # kept: deleting it would wait for it
    _started.clear()


os.register_at_fork(after_in_child=_forget)
