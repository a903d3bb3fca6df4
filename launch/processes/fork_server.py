"""Imported only by the fork server, before torch: binds it to its launcher.

Every rank is a fork of the server, so the launcher's death kills the server, this kills the ranks,
and this their data-loader workers; the kernel does this within milliseconds.
"""

from __future__ import annotations

import gc
import os
import signal

from launch.processes.warm_start import LAUNCHER, SAFE_PATH
from service.health.stop_request import STOP_SIGNALS, die_with_parent

PROCESS = os.getpid()
"""The fork server itself, as seen by its forks."""

if os.environ.get("PYTHONSAFEPATH") == SAFE_PATH:
    del os.environ["PYTHONSAFEPATH"]  # no concern of what ranks start
if os.environ.get(LAUNCHER, "").isdecimal():
    die_with_parent(int(os.environ[LAUNCHER]))
    os.setsid()  # signals to the launcher's process group reach the ranks only through it
    # A rank starts with these signals blocked, and unblocks them when it can handle them.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    gc.disable()  # until a rank is ready: imported objects are never freed
