"""Signals that ask a run to stop, and the death of a parent process."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

STOP_SIGNALS = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGUSR1,  # batch systems send these two when the time is nearly up or the node is needed
    signal.SIGUSR2,
)
_PR_SET_PDEATHSIG = 1
PARENT = "EVENSTEP_PARENT"
"""Set by what started this command and follows it: its process, with which the command dies."""


class StoppedEarly(BaseException):
    """Raised where a signal finds the process before its first step.

    No `Exception`: whatever is under way, a user's code or torch's, would take it for its own.
    """


class StopRequest:
    """Set by one of `STOP_SIGNALS`; the processes agree on the step at which they follow it."""

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self.interrupt = False
        """Whether a signal ends the work at once, because nothing would be lost."""
        self._starting = False

    @property
    def requested(self) -> bool:
        return self.signal_name is not None

    def hear(self, number: int, frame: FrameType | None = None) -> None:
        """Take a signal: the handler itself."""
        # Only a flag: a collective in a signal handler would be out of order.
        if self.interrupt or (self.requested and number == signal.SIGINT):
            raise KeyboardInterrupt
        self.signal_name = signal.Signals(number).name
        if self._starting:
            self._leave()

    @contextmanager
    def followed_at_once(self) -> Iterator[None]:
        """While it lasts, and until `has_started`: what takes long to begin has nothing to save.

        Raises:
            StoppedEarly: there is a request.
        """
        self._starting = True
        try:
            if self.requested:
                self._leave()
            yield
        finally:
            self._starting = False

    def has_started(self) -> None:
        """From now on a request waits for a step at which all processes follow it."""
        self._starting = False

    def _leave(self) -> NoReturn:
        self._starting = False  # the next signal must not interrupt this one
        raise StoppedEarly(f"Stopped by {self.signal_name} before the first step of this attempt.")


@contextmanager
def stop_on_signals(stop: StopRequest | None = None) -> Iterator[StopRequest]:
    """While it lasts, a signal asks for a stop; a second Ctrl-C interrupts at once.

    A signal that the process was told to ignore (SIGHUP under nohup) stays ignored.
    """
    stop = stop or StopRequest()
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    heard = [number for number, handler in before.items() if handler is not signal.SIG_IGN]
    for number in heard:
        signal.signal(number, stop.hear)
    # Blocked since before this process was forked, so that no early signal was lost.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    try:
        yield stop
    finally:
        for number in heard:
            signal.signal(number, before[number])


def _hear_nothing() -> None:
    """In a child that a user's code has forked, such as of a pool: a request is not meant for it.

    With the handlers of its parent it could not be ended by who started it, who then waits for it.
    """
    for number in STOP_SIGNALS:
        if isinstance(getattr(signal.getsignal(number), "__self__", None), StopRequest):
            # A signal to the whole group reaches its parent too, which ends it when the state is
            # saved.
            default = number == signal.SIGTERM
            signal.signal(number, signal.SIG_DFL if default else signal.SIG_IGN)


os.register_at_fork(after_in_child=_hear_nothing)


def die_with_follower() -> None:
    """Have this process die with the one that started and follows it, if one does."""
    parent = os.environ.pop(PARENT, "")
    if parent.isdecimal():
        die_with_parent(int(parent))


def die_with_parent(parent: int | None = None) -> None:
    """Have the kernel kill this process as soon as the one that started it is gone.

    However the parent went: also by SIGKILL, of which it could tell nobody. On Linux; elsewhere
    nothing happens.

    Args:
        parent: who started it, to notice that it was gone before the kernel was asked.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if parent is not None and os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)
