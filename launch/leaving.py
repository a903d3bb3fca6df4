"""How a process of ours leaves: at once, with its exit code, whatever its libraries would do."""

from __future__ import annotations

import atexit
import os
import sys
from contextlib import suppress
from typing import NoReturn


def leave(code: int) -> NoReturn:
    """End this process now, with what is registered for its exit done.

    The interpreter's own way out takes seconds with torch loaded, in which peers wait; and with
    gloo it now and then ends in an abort ("terminate called without an active exception").
    """
    atexit._run_exitfuncs()
    with suppress(OSError):  # who reads it is gone, or its disk is full: the code still counts
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def leave_hung(code: int, message: str) -> NoReturn:
    """End this process from another thread than the one that hangs, which may hold any lock."""
    os.write(2, f"error: {message}\n".encode(errors="replace"))
    os._exit(code)
