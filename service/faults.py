"""What may go wrong from outside: signals that ask to stop."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """Set by SIGTERM or SIGINT; the processes agree on it at a step that the plan names."""

    def __init__(self) -> None:
        self.signal_name: str | None = None

    @property
    def requested(self) -> bool:
        return self.signal_name is not None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        # Only a flag: a collective in a signal handler would come out of order.
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal_name = signal.Signals(number).name


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """While it lasts, SIGTERM and SIGINT ask for a stop; a second SIGINT interrupts at once."""
    stop = StopRequest()
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, stop._receive) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
