"""Records a request to stop from the start on, before torch, click or a spec is loaded.

As PID 1 of a container a process without a handler does not even get the signal.
"""

from __future__ import annotations

import os
import signal
import time
from types import FrameType
from typing import NoReturn

from service.health.stop_request import STOP_SIGNALS, StopRequest

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
