"""Imported by the fork server alone, before torch: binds it to its launcher.

Every rank is a fork of the server, so the chain of deaths is launcher, server, rank, and the
data-loader workers of the rank; the kernel carries it out within milliseconds.
"""

from __future__ import annotations

import gc
import os
import signal

from launch.processes.warm_start import LAUNCHER
from service.health.stop_request import STOP_SIGNALS, die_with_parent

PROCESS = os.getpid()
"""The fork server itself, as its forks know it."""

if os.environ.get(LAUNCHER, "").isdecimal():
    die_with_parent(int(os.environ[LAUNCHER]))
    os.setsid()  # signals to the launcher's process group reach the ranks only through it
    # A rank starts with these signals blocked, and unblocks them when it can handle them.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    gc.disable()  # until a rank has all it needs: what is imported stays
