"""An interpreter that has imported torch and the service, and runs each program in a fork of it.

`tests/warm.py` starts it and says what is to be run. What Python does at a start is done in the
fork instead: its own arguments, environment, directory, standard streams and signals. So a command
is still a real process, with real signals and exit codes, but it does without the three seconds of
CPU time that its imports take.

The modules of `launch` are not among the imports: when they are loaded, and in which order, is what
a start of the command is about.
"""

from __future__ import annotations

import atexit
import faulthandler
import gc
import json
import multiprocessing.util
import os
import random
import runpy
import selectors
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from io import TextIOWrapper
from types import ModuleType
from typing import Any, NoReturn

_STREAMS = 4  # stdin, stdout, stderr, and the pipe for the exit code
_FORK_SERVER = "from multiprocessing.forkserver import main; main("
# Python and libraries read variables of these beginnings when they are loaded.
_READ_AT_START = (
    *("ACCELERATE_", "CUBLAS_", "CUDA_", "GOMP_", "HF_", "KINETO_", "KMP_", "LANG", "LC_", "LD_"),
    *("MALLOC_", "MKL_", "NUMEXPR_", "OMP_", "OPENBLAS_", "PYTHON", "PYTORCH_", "TORCH"),
)
# How Python starts other programs, as long as it is not replaced here.
_spawn = multiprocessing.util.spawnv_passfds
_fork_exec = subprocess._fork_exec  # type: ignore[attr-defined]
_installed = sys.path[1:]
_path: list[str] = []
"""`sys.path` as a program finds it, but for the first, which is where the program is."""
_kept: list[Any] = []


def read_at_start(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that matter when something is loaded; PYTHONPATH has a rule of its own."""
    read = {k: v for k, v in environ.items() if k.startswith(_READ_AT_START)}
    return {k: v for k, v in read.items() if k != "PYTHONPATH"}


def main(control: socket.socket, modules: list[str]) -> None:
    """Import the modules, then start what is asked for until the other end closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests, which close the socket
    sys.path[:] = _installed
    for name in modules:
        __import__(name)
    _use_once()
    gc.collect()
    gc.freeze()  # a collection in a fork would copy the pages of all that was imported
    running: dict[int, tuple[int, int]] = {}  # process: its pidfd, the pipe for its exit code
    with selectors.DefaultSelector() as selector:
        selector.register(control, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.data is None:
                    request, streams = _received(control)
                    if not streams:
                        return
                    process = os.fork()
                    if process == 0:
                        kept = [control.detach(), selector.fileno()]
                        kept += [number for pair in running.values() for number in pair]
                        _become(request, streams, unused=kept)
                    running[process] = os.pidfd_open(process), streams[-1]
                    selector.register(running[process][0], selectors.EVENT_READ, process)
                    control.sendall(struct.pack("q", process))
                    for stream in streams[:-1]:
                        os.close(stream)
                else:
                    pidfd, pipe = running.pop(key.data)
                    selector.unregister(pidfd)
                    _tell_exit(key.data, pidfd, pipe)


def _use_once() -> None:
    """Do what every command does with the imports, where each would take 0.1 s for it again."""
    import torch.library

    from service.recipes import find_recipe
    from service.spec.files import load_spec

    load_spec(find_recipe("digits"))  # builds the validator of a spec
    # At its end torch takes back its operators one by one, before all of its memory is.
    registry: Any = weakref.finalize._registry  # type: ignore[attr-defined]
    for finalizer, about in registry.items():
        if about.func is torch.library._del_library:
            finalizer.atexit = False


def _received(control: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """What is to be run, and its streams; no streams where nothing will come any more."""
    head, streams, _, _ = socket.recv_fds(control, 8, _STREAMS)
    if not head:
        return {}, []
    size = struct.unpack("q", head)[0]
    text = b""
    while len(text) < size:
        text += control.recv(size - len(text))
    return json.loads(text), streams


def _tell_exit(process: int, pidfd: int, pipe: int) -> None:
    """Tell how a process has ended, and only then let go of its number."""
    ended = os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOWAIT)
    assert ended is not None
    code = ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
    with suppress(BrokenPipeError):  # nobody waits for it any more
        os.write(pipe, struct.pack("q", code))
    os.waitpid(process, 0)
    os.close(pidfd)
    os.close(pipe)


# ---- in the fork


def _become(request: dict[str, Any], streams: list[int], *, unused: list[int]) -> NoReturn:
    """Run a program as an interpreter does that was started for it."""
    for number in unused:
        os.close(number)
    if request["session"]:
        os.setsid()
    for number, stream in enumerate(streams[:-1]):
        os.dup2(stream, number)
    for stream in streams:
        os.close(stream)
    os.chdir(request["cwd"])
    os.umask(request["umask"])
    os.environ.clear()
    os.environ.update(request["environ"])
    time.tzset()
    tempfile.tempdir = None
    random.seed()
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()
    _begin_signals(_handlers())
    _begin_streams()
    multiprocessing.util.spawnv_passfds = _spawned  # type: ignore[assignment]
    subprocess._fork_exec = _started  # type: ignore[attr-defined]
    found = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    more = [os.path.abspath(path) for path in found if path]
    _path[:] = [*more, *(path for path in _installed if path not in more)]
    _leave(_program(request["words"]))


def _program(words: list[str]) -> Callable[[], object]:
    """What an interpreter does with these words: `python -m module`, `-c code` or a script."""
    if words[0] != sys.executable:  # a script, by its first line
        words = [sys.executable, *words]
    sys.orig_argv = words
    safe = words[1] == "-P"
    first, *rest = words[1 + safe :]
    if first == "-m":
        sys.argv, place = rest, os.getcwd()
    elif first == "-c":
        sys.argv, place = ["-c", *rest[1:]], ""
    else:
        sys.argv, place = [first, *rest], os.path.dirname(os.path.realpath(first))
    sys.path[:] = [*([] if safe else [place]), *_path]
    if first == "-m":
        return lambda: runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    if first == "-c":
        return lambda: exec(rest[0], _new_main())
    return lambda: runpy.run_path(first, run_name="__main__")


def _new_main() -> dict[str, Any]:
    sys.modules["__main__"] = ModuleType("__main__")
    return sys.modules["__main__"].__dict__


def _handlers() -> dict[int, Any]:
    return {number: signal.getsignal(number) for number in signal.valid_signals()}


def _begin_signals(before: dict[int, Any]) -> None:
    """As after the start of an interpreter: no handlers but its own; what is ignored stays so."""
    signal.set_wakeup_fd(-1)
    faulthandler.disable()
    for number, handler in before.items():
        if callable(handler):
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _begin_streams() -> None:
    """New text streams for 0, 1 and 2, without what others have written and not flushed."""
    _kept.extend((sys.stdin, sys.stdout, sys.stderr))  # to let go of them would be to flush them
    sys.stdin = sys.__stdin__ = _stream(0, "<stdin>", like=sys.stdin)
    sys.stdout = sys.__stdout__ = _stream(1, "<stdout>", like=sys.stdout)
    sys.stderr = sys.__stderr__ = _stream(2, "<stderr>", like=sys.stderr)


def _stream(number: int, name: str, *, like: Any) -> TextIOWrapper:
    """A descriptor as a text stream, in lines where it is a terminal."""
    mode, unbuffered = ("wb" if number else "rb"), like.write_through  # by PYTHONUNBUFFERED
    buffer: Any = open(  # noqa: SIM115  # it stays
        number, mode, buffering=0 if number and unbuffered else -1, closefd=False
    )
    getattr(buffer, "raw", buffer).name = name
    in_lines = not unbuffered and (number == 2 or os.isatty(number))
    how = {"encoding": like.encoding, "errors": like.errors, "write_through": unbuffered}
    stream = TextIOWrapper(buffer, line_buffering=in_lines, **how)
    stream.mode = mode[0]  # type: ignore[misc]
    return stream


def _leave(work: Callable[[], object]) -> NoReturn:
    """End this process after `work` as an interpreter ends; nothing of the caller is run."""
    code = 1
    try:
        work()
        code = 0
    except SystemExit as left:
        if left.code is None or isinstance(left.code, int):
            code = (left.code or 0) & 0xFF
        else:
            print(left.code, file=sys.stderr)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        if isinstance(error, KeyboardInterrupt):
            code = -signal.SIGINT
    finally:
        threading._shutdown()  # type: ignore[attr-defined]  # waits for threads
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError):
                code = code or 120
        if code < 0:
            signal.signal(-code, signal.SIG_DFL)
            os.kill(os.getpid(), -code)
        os._exit(code)


# ---- what the program itself starts


def _spawned(path: Any, args: Any, passfds: Any) -> int:
    """Start what `multiprocessing` asks for; its fork server as a fork, without the imports."""
    code = os.fsdecode(args[-1])
    if not code.startswith(_FORK_SERVER) or not _is_alone():
        return _spawn(path, args, passfds)
    before = _handlers()
    process = os.fork()
    if process:
        return process
    _forget(passfds)
    _begin_signals(before)
    _begin_streams()
    _leave(_program(["-c", code]))


def _started(words: Sequence[Any], *rest: Any) -> int:
    """Start what `subprocess` asks for; a run of a sweep as a fork, without the imports.

    The arguments are those of `_posixsubprocess.fork_exec`.
    """
    cwd, listed, p2cread, _, _, c2pwrite, _, errwrite = rest[3:11]
    told = [os.fsdecode(word) for word in words]
    pairs = [pair.partition(b"=") for pair in listed or []]
    environ = {os.fsdecode(name): os.fsdecode(value) for name, _, value in pairs}
    of_sweep = sys.argv[1:2] == ["sweep"] and told[1:4] == ["-P", "-m", "launch"]
    if not (of_sweep and _is_alone()) or read_at_start(environ) != read_at_start(os.environ):
        return _fork_exec(words, *rest)  # type: ignore[no-any-return]
    umask = os.umask(0)
    os.umask(umask)
    before = _handlers()
    process = os.fork()
    if process:
        return process
    _begin_signals(before)
    streams = [p2cread, c2pwrite, errwrite]
    streams = [os.dup(n if stream == -1 else stream) for n, stream in enumerate(streams)]
    _forget(streams)
    for name in [name for name in sys.modules if name.partition(".")[0] == "launch"]:
        del sys.modules[name]
    request = {"words": told, "cwd": cwd or ".", "environ": environ, "umask": umask}
    _become(request | {"session": True}, [*streams, os.dup(0)], unused=[])


def _is_alone() -> bool:
    """Whether this process has no second thread, which a fork would lack, and which holds locks."""
    return len(os.listdir("/proc/self/task")) == 1


def _forget(used: Sequence[int]) -> None:
    """In a fork of the program: what the program has open, and what it does at its end."""
    for number in {int(name) for name in os.listdir("/proc/self/fd")} - {0, 1, 2, *used}:
        with suppress(OSError):  # the listing's own is closed by now
            os.close(number)
    # What it would tidy up is not ours. Those of multiprocessing know whose they are.
    weakref.finalize._registry.clear()  # type: ignore[attr-defined]


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])), sys.argv[2:])
