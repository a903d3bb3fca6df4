"""Records a request to stop from the start on, before torch, click or a spec is loaded.

As PID 1 of a container a process without a handler does not even get the signal.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from service.basics.errors import Stopped
from service.health.stop_request import STOP_SIGNALS, StoppedEarly, StopRequest

_EARLY = tuple(number for number in STOP_SIGNALS if number != signal.SIGINT)
heard = StopRequest()
STARTED = time.time()
"""Start of the command in seconds since 1970."""


def listen() -> None:
    """Remember a signal to stop until `run` can handle it; Ctrl-C still ends the command now.

    A signal that the process was told to ignore (SIGHUP under nohup) is still ignored.
    """
    for number in _EARLY:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, heard.hear)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupted)


def _interrupted(number: int, frame: FrameType | None) -> NoReturn:
    """End without a traceback of imports."""
    os._exit(128 + number)


def hear_interrupts() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again, which the command handles from now on."""
    if signal.getsignal(signal.SIGINT) is _interrupted:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def stop_listening() -> None:
    """Restore the default effect of the signals, also for one that has already arrived."""
    for number in _EARLY:
        if signal.getsignal(number) == heard.hear:
            signal.signal(number, signal.SIG_DFL)
    if heard.signal_name is not None:
        signal.raise_signal(signal.Signals[heard.signal_name])


@contextmanager
def stop_raises(what: str = "training") -> Iterator[None]:
    """Let a request to stop end a long wait at once; Ctrl-C does so without a handler.

    Process 1 of a pod ignores every signal without a handler. A signal that the process was told to
    ignore (SIGHUP under nohup) stays ignored. While the local processes run,
    `launch.processes.local` replaces this handler by its own.

    Args:
        what: has not begun yet.
    Raises:
        Stopped: a signal has arrived.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if heard.signal_name is None:  # its time counts, whatever is to be done before the end
            heard.hear(number)
        # What waits may catch every Exception, as the drivers of stores do.
        raise StoppedEarly(f"Stopped by {name} before {what} started; nothing has changed.")

    before = {n: signal.getsignal(n) for n in STOP_SIGNALS if n != signal.SIGINT}
    followed = [n for n, handler in before.items() if handler is not signal.SIG_IGN]
    try:
        for number in followed:
            signal.signal(number, stop)
        if heard.signal_name is not None:  # while this module was being imported
            stop(signal.Signals[heard.signal_name], None)
        yield
    except StoppedEarly as told:
        raise Stopped(str(told)) from None
    finally:
        for number in followed:
            signal.signal(number, before[number])
