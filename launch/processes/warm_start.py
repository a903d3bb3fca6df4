"""Work that starts before the command is parsed, for an earlier first step.

Importing torch takes longer than the rest of the start.  If processes will be started, the
fork server imports it from the first moment on; if this process trains, the larger part of it, the
loading of its libraries, runs while the command and its spec are read.
"""

from __future__ import annotations

import ctypes
import gc
import os
import re
import signal
import stat
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from typing import Any

from service.health.stop_request import STOP_SIGNALS

LAUNCHER = "EVENSTEP_LAUNCHER"
"""Tells the fork server the process id of its launcher."""
SAFE_PATH = "evenstep"
"""The value of PYTHONSAFEPATH with which the fork server starts, but not its ranks."""
# In this order: first the binding to its launcher, then everything that a rank needs.
_PRELOAD = [
    "launch.processes.fork_server",
    "launch.__main__",
    "launch.rank.entry",
    "launch.processes.local",
]
_PRELOAD += ["torch._dynamo"]  # every optimizer imports it
_begun_with: dict[str, str] = {}


def warm_up(words: Sequence[str], variables: Mapping[str, str]) -> None:
    """Start what a command line of these `words` will need; if unclear, nothing."""
    # Imported objects are never freed: the garbage collector took a fifth of the time to visit
    # them.
    gc.disable()
    if words[:1] not in (["run"], ["test"]) or {"-h", "--help"} & set(words):
        return
    # Read when torch is loaded.  `service.distributed.contention` decides during training when the
    # threads of GNU's OpenMP spin and when they sleep.  It cannot do so for LLVM's and Intel's,
    # which torch uses on macOS and from conda: these sleep whenever they wait.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("KMP_BLOCKTIME", "0")
    if any(word.partition("=")[0] == "--profile" for word in words):
        # Also read then: torch's profiler writes to stderr at each start.
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    if starts_processes(words, variables):
        begin_server()
    else:
        # Not a daemon thread: a command that ends in the meantime waits for it briefly.
        threading.Thread(target=_load_libraries, name="torch's libraries").start()


def out_of_place(words: Sequence[str], variables: Mapping[str, str]) -> str | None:
    """A problem with the directories or variables of this command, found before a library fails."""
    try:
        os.getcwd()
    except OSError as error:
        return f"The current directory is gone: {error.strerror}. Change into one that exists."
    starts = words[:1] in (["run"], ["test"]) and starts_processes(words, variables)
    if starts and "TMPDIR" in variables:
        from service.basics.limits import LONGEST_TMPDIR

        size = len(os.fsencode(variables["TMPDIR"]))
        if size > LONGEST_TMPDIR:
            return (
                f"TMPDIR has {size} bytes, but processes connect by a socket in it, so it can have "
                f"at most {LONGEST_TMPDIR}. Set it to a shorter path, such as TMPDIR=/tmp."
            )
    if starts:
        import tempfile

        try:
            tempfile.gettempdir()
        except OSError as error:
            return f"{error.strerror or error}. Set TMPDIR to a directory that can be written to."
    threads = variables.get("OMP_NUM_THREADS")
    computes = words[:1] in (["run"], ["test"], ["check"])
    if computes and threads is not None and not re.fullmatch(r"0*[1-9][0-9]*", threads.strip()):
        return (
            f"OMP_NUM_THREADS={threads}: must be a whole number, at least 1. Correct or unset it."
        )
    return None


def collect_garbage() -> None:
    """Enable the garbage collector, and let it ignore all existing objects."""
    gc.freeze()
    gc.enable()


def starts_processes(words: Sequence[str], variables: Mapping[str, str]) -> bool:
    """Whether the command of these words will start processes, as far as is known this early."""
    if "RANK" in variables or "WORLD_SIZE" in variables:  # torchrun has
        return False
    processes = _value_of("--processes", words) or variables.get("PET_NPROC_PER_NODE", "1")
    restarts = _value_of("--max-restarts", words) or "0"
    if "://" in (_value_of("--runs", words) or ""):  # the launcher uploads, so it does not train
        return True
    # Of a run in a store: the launcher removes its copy afterwards.
    if words[:1] == ["test"] and any("://" in word.partition("=")[0] for word in words):
        return True
    return processes != "1" or restarts != "0" or variables.get("PET_NNODES", "1") != "1"


def _value_of(option: str, words: Sequence[str]) -> str | None:
    """The last value of this option in the words."""
    value = None
    for at, word in enumerate(words):
        name, equals, given = word.partition("=")
        if name == option:
            value = given if equals else "".join(words[at + 1 : at + 2])
    return value


# ---- the fork server


def begin_server() -> None:
    """Start the fork server, unless it runs; it imports what ranks need, and waits."""
    import multiprocessing
    from multiprocessing import forkserver, resource_tracker, util

    if _begun_with:
        return
    os.environ[LAUNCHER] = str(os.getpid())
    _begun_with.update(os.environ)
    if not _imports_from_here():
        # multiprocessing starts it by `python -c`, which looks for modules in the current directory
        # first: a file queue.py or a directory launch there would be taken for Python's or ours.
        os.environ.setdefault("PYTHONSAFEPATH", SAFE_PATH)
    multiprocessing.get_context("forkserver").set_forkserver_preload(_PRELOAD)
    # The server blocks them from its start, and so do the ranks until they can handle them.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        resource_tracker.ensure_running()  # else the server starts it, unblocking signals
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if os.environ.get("PYTHONSAFEPATH") == SAFE_PATH:
            del os.environ["PYTHONSAFEPATH"]
    # Before multiprocessing removes it, with -100.
    util.Finalize(None, _make_directory_again, exitpriority=-99)


def _imports_from_here() -> bool:
    """Whether this process finds modules in the current directory, as under `python -m`."""
    try:
        return bool({"", os.getcwd()} & set(sys.path))
    except OSError:  # it was removed
        return False


def ensure_server() -> None:
    """Start another fork server, if something has removed the socket of this one.

    Raises:
        SpecError: another user could replace the socket.
    """
    from multiprocessing import forkserver

    _make_directory_again()
    _require_own_directory()
    server: Any = forkserver._forkserver
    address = server._forkserver_address
    if _begun_with and address is not None and not os.path.exists(address):
        end_server()
        begin_server()


def _make_directory_again() -> None:
    """Make multiprocessing's own directory again, if something has removed temporary files.

    A new server puts its socket there, and the exit handler reports a directory that is missing.
    """
    place = _own_directory()
    if place is not None:
        with suppress(OSError):  # whoever needs the directory reports what is wrong
            os.makedirs(place, mode=0o700, exist_ok=True)


def _require_own_directory() -> None:
    """Refuse a directory that another user has made at this path since ours was removed.

    Raises:
        SpecError: it is not ours, or others can write into it.
    """
    place = _own_directory()
    if place is None:
        return
    try:
        found = os.lstat(place)
    except OSError:  # whoever needs the directory reports what is wrong
        return
    is_own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()
    if not is_own or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        from service.basics.errors import SpecError

        raise SpecError(
            f"{place}: the directory for the sockets of this command was removed, and what is "
            "there now belongs to another user, or others can write into it. Set TMPDIR to a "
            "directory of your own, and start again."
        )


def _own_directory() -> str | None:
    """The path of multiprocessing's own directory; None if it has made none."""
    from multiprocessing import process

    current: Any = process.current_process()
    place: str | None = current._config.get("tempdir")
    return place


def end_server() -> None:
    """Stop the fork server, which is not needed."""
    if not _begun_with:
        return
    from multiprocessing import forkserver

    server: Any = forkserver._forkserver
    os.kill(server._forkserver_pid, signal.SIGKILL)
    with suppress(FileNotFoundError):  # its socket, which something has removed
        server._stop()  # reaps it, so that another one can be started
    _begun_with.clear()


def set_since() -> dict[str, str]:
    """The environment variables that were set after the server started, for its ranks."""
    return {k: v for k, v in os.environ.items() if _begun_with.get(k) != v}


# ---- torch's libraries


def _load_libraries() -> None:
    """Let the system load them, in torch's order and without holding the interpreter's lock.

    If that fails nothing is lost: torch's import tries again, and reports the error.
    """
    found = find_spec("torch")
    if found is None or not found.submodule_search_locations:
        return
    system = ctypes.CDLL(None)
    if not hasattr(system, "dlopen"):
        return
    place = os.path.join(found.submodule_search_locations[0], "lib")
    for name, how in (
        ("libtorch_global_deps.so", os.RTLD_NOW | os.RTLD_GLOBAL),
        ("libtorch_python.so", os.RTLD_NOW),
    ):
        system.dlopen(os.fsencode(os.path.join(place, name)), how)
