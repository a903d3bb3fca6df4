"""The sentinel: a small process for each rank, which kills it when no thread of it can run.

The watchdog is a thread, so it cannot run while a library holds Python's lock. The timer of
faulthandler can, but it compares two clock times: if everything was stopped (SIGSTOP, a frozen
container) for longer than its limit, it would end the process at the moment it continues. A
separate process can count its own running time.
"""

from __future__ import annotations

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

    Process 1 of a container cannot be killed by its own children, and a machine at its
    limits may refuse to start another process.

    Args:
        mark: the file for the reason of a kill; by default standard error.
    """
    if not _started and sys.executable and os.getpid() != 1:
        started = _start(mark)
        if started is not None:
            _started.append(started)
    return running()


def running() -> Sentinel | None:
    """The sentinel of this process, if one was started."""
    return _started[0] if _started else None


def _start(mark: Path | None) -> Sentinel | None:
    script = [sys.executable, "-I", "-S", sentinel_process.__file__]
    # A request to stop this process is not meant for its sentinel, which inherits the blocked
    # signals.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        program = subprocess.Popen(
            [*script, str(os.getpid()), str(mark or "")],
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
