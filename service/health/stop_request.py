"""Signals that ask a run to stop, and the death of a parent process."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

STOP_SIGNALS = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGUSR1,  # sent by batch systems near the time limit or when the node is needed
    signal.SIGUSR2,
)
_PR_SET_PDEATHSIG = 1
PARENT = "EVENSTEP_PARENT"
"""Set by the process that started this command and follows it; the command dies with it."""


class StoppedEarly(BaseException):
    """Raised if a signal arrives before the first step.

    Not an `Exception`, because other code, the user's or torch's, would catch it.
    """


class StopRequest:
    """Set by one of `STOP_SIGNALS`; the processes agree on the step at which they stop."""

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self.regroups = False
        """Whether the launcher asks for it, to continue with other nodes; no signal has arrived."""
        self.heard_at: float | None = None
        """When it was first asked for, by the monotonic clock."""
        self._interrupts = False
        self._starting = False

    @property
    def requested(self) -> bool:
        """Whether a request to stop has arrived."""
        return self.regroups or self.signal_name is not None

    @property
    def reason(self) -> str:
        """What asks for it: the name of a signal, or the change of nodes."""
        return self.signal_name or "a change of nodes"

    def hear(self, number: int, frame: FrameType | None = None) -> None:
        """The signal handler."""
        # It sets only a flag: a collective in a signal handler would be out of order.
        again = self.signal_name is not None
        self.signal_name = signal.Signals(number).name
        self.heard_at = self.heard_at or time.monotonic()
        if again and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self._interrupts:
            self._interrupt()
        if self._starting:
            self._leave()

    def interrupts_from_now_on(self) -> None:
        """Let a request end the work immediately, because nothing would be lost.

        Raises:
            KeyboardInterrupt: there is a request; otherwise, when it arrives.
        """
        self._interrupts = True
        if self.requested:
            self._interrupt()

    def _interrupt(self) -> NoReturn:
        self._interrupts = False  # the next signal must not interrupt the end of the work
        raise KeyboardInterrupt

    @contextmanager
    def followed_at_once(self) -> Iterator[None]:
        """A context in which, until `has_started`, a request ends the process immediately.

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
        """From now on a request waits for a step at which all processes stop."""
        self._starting = False

    def _leave(self) -> NoReturn:
        self._starting = False  # the next signal must not interrupt this one
        raise StoppedEarly(f"Stopped by {self.signal_name} before the first step of this attempt.")


@contextmanager
def stop_on_signals(stop: StopRequest | None = None) -> Iterator[StopRequest]:
    """A context in which a signal requests a stop; a second Ctrl-C interrupts immediately.

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
    """In a child that the user's code has forked, such as of a pool: requests are not for it.

    With its parent's handlers the process that started it could not end it, and would wait.
    """
    for number in STOP_SIGNALS:
        if isinstance(getattr(signal.getsignal(number), "__self__", None), StopRequest):
            # A signal to the whole group also reaches its parent, which ends it after the state has
            # been saved.
            default = number == signal.SIGTERM
            signal.signal(number, signal.SIG_DFL if default else signal.SIG_IGN)


os.register_at_fork(after_in_child=_hear_nothing)


def die_with_follower() -> None:
    """Let this process die with the process that started and follows it, if there is one."""
    parent = os.environ.pop(PARENT, "")
    if parent.isdecimal():
        die_with_parent(int(parent))


def die_with_parent(parent: int | None = None) -> None:
    """Let the kernel kill this process as soon as the process that started it is gone.

    This includes SIGKILL, after which the parent cannot notify anyone. On Linux; elsewhere
    nothing happens.

    Args:
        parent: the process that started it, to detect that it was gone before this call.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if parent is not None and os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)
