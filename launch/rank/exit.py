"""Ends a process with its exit code and in time, even if its libraries block the exit."""

from __future__ import annotations

import atexit
import faulthandler
import os
import select
import signal
import sys
import threading
from contextlib import suppress
from types import FrameType
from typing import NoReturn

from service.basics.running_time import TimeLimit
from service.health.sentinel import running
from service.health.stop_request import STOP_SIGNALS

LEAVING_SECONDS = 10.0
"""Longest time from the end of the work to the end of the process."""
_LOCKED_SECONDS = 5.0  # additional, if no thread can run
_REPORT_SECONDS = 2.0  # longest time to say how the work ended, after a signal to stop
_STOPS = {int(number) for number in STOP_SIGNALS}
_ending = threading.Event()
_reported = threading.Event()


def leave(code: int) -> NoReturn:
    """End this process now; exit handlers run if there is time.

    Called when the end of the work has been reported, to the user and to the launcher.

    The interpreter's own exit takes seconds with torch loaded, while peers wait; and with
    gloo it sometimes ends in an abort ("terminate called without an active exception").
    """
    end_in_time(code)
    _reported.set()
    atexit._run_exitfuncs()
    with suppress(OSError):  # the reader is gone, or the disk is full: the exit code still counts
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def end_in_time(code: int) -> None:
    """From now on this process ends within `LEAVING_SECONDS`, or soon after a signal to stop.

    Such a signal is often the second: systemd and Slurm send one to every process of a job, and
    the launcher passes its own on. It waits until the end of the work has been reported.

    Called in the main thread when its work has ended.  The rest of the exit may block forever: a
    library's exit handler, a worker that does not respond, a terminal that nobody reads.
    A thread enforces the limit. If it cannot run, because the interpreter's lock is held, the
    sentinel kills the process a little later. Without a sentinel, faulthandler ends it with 1.
    """
    if _ending.is_set():
        return
    _ending.set()
    heard, hears = os.pipe()
    os.set_blocking(hears, False)
    # The C-level signal handler writes there, also while the main thread is in a library.
    signal.set_wakeup_fd(hears, warn_on_full_buffer=False)
    for number in STOP_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _heard)
    locked_seconds = LEAVING_SECONDS + _LOCKED_SECONDS
    watching = running()
    if watching is None or not watching.alive(locked_seconds):
        with suppress(ValueError, OSError):  # standard error may be closed
            faulthandler.dump_traceback_later(locked_seconds, exit=True, file=2)
    threading.Thread(target=_count, args=(heard, code), name="leaving", daemon=True).start()


def _count(heard: int, code: int) -> NoReturn:
    limit = TimeLimit(LEAVING_SECONDS)
    signals = select.poll()  # select does not support descriptors from 1,024 on
    signals.register(heard, select.POLLIN)
    while look := limit.look:
        if signals.poll(look * 1000) and set(os.read(heard, 512)) & _STOPS:
            _reported.wait(_REPORT_SECONDS)
            os._exit(code)  # other signals arrive there too, such as SIGCHLD
    text = f"WARNING: this process did not release everything within {LEAVING_SECONDS:g} s: ended."
    teller = threading.Thread(target=tell, args=(text,), daemon=True)
    teller.start()  # in its own thread: nobody may be reading its output
    teller.join(1.0)
    os._exit(code)


def _heard(number: int, frame: FrameType | None) -> None:
    """Do nothing: receiving the signal is enough."""


def tell(text: str) -> None:
    """Write to standard error without any lock, which another thread may hold."""
    with suppress(OSError):
        os.write(2, f"{text}\n".encode(errors="replace"))


def leave_hung(code: int, message: str) -> NoReturn:
    """End this process from another thread than the hanging one, which may hold any lock."""
    tell(f"error: {message}")
    os._exit(code)
