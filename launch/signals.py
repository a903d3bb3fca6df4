"""A request to stop, heard from the first moment on: before torch, click or a spec is loaded.

As PID 1 of a container a process without a handler does not even get the signal.
"""

from __future__ import annotations

import signal
import time

from service.faults import StopRequest

heard = StopRequest()
STARTED = time.time()
"""When the command began, in seconds since 1970."""


def listen() -> None:
    """Remember SIGTERM until `run` can act on it; Ctrl-C still ends the command at once."""
    signal.signal(signal.SIGTERM, heard.hear)


def stop_listening() -> None:
    """Let SIGTERM end the command as it ends any other; also one that came meanwhile."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if heard.requested:
        signal.raise_signal(signal.SIGTERM)
