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
import ctypes
import faulthandler
import gc
import json
import mmap
import multiprocessing.forkserver
import multiprocessing.resource_tracker
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
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from io import TextIOWrapper
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

_STREAMS = 4  # stdin, stdout, stderr, and the pipe for the exit code
_OPTIONS = ("-P", "-W", "-u")
_WITHOUT_MORE = (-1, None, None, None, -1, None)
"""No process group, group, groups, user, umask and function for the new process."""
_FORK_SERVER = "from multiprocessing.forkserver import main; main("
# Python and libraries read variables of these beginnings when they are loaded.
_READ_AT_START = (
    *("ACCELERATE_", "CUBLAS_", "CUDA_", "GOMP_", "HF_", "KINETO_", "KMP_", "LANG", "LC_", "LD_"),
    *("MALLOC_", "MKL_", "NUMEXPR_", "OMP_", "OPENBLAS_", "PYTHON", "PYTORCH_", "TORCH"),
)
_SET_MM, _SET_MM_MAP, _SET_MM_MAP_SIZE = 35, 14, 15
# The fields of `struct prctl_mm_map`, and their numbers in /proc/pid/stat.
_PLACES = {
    "start_code": 26,
    "end_code": 27,
    "start_data": 45,
    "end_data": 46,
    "start_brk": 47,
    "brk": 0,
    "start_stack": 28,
    "arg_start": 48,
    "arg_end": 49,
    "env_start": 50,
    "env_end": 51,
}
_libc = ctypes.CDLL(None)
_libc.sbrk.restype = ctypes.c_void_p
# These are read when they are needed: by the first use of a GPU, by torchrun and its processes.
_READ_LATER = (
    "CUDA_VISIBLE_DEVICES",
    "TORCHELASTIC_",
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE",
    "TORCH_ELASTIC_",
    "TORCH_NCCL_",
)
# How Python starts other programs, as long as it is not replaced here.
_spawn = multiprocessing.util.spawnv_passfds
_fork_exec = subprocess._fork_exec  # type: ignore[attr-defined]
_installed = sys.path[1:]
_path: list[str] = []
"""`sys.path` as a program finds it, but for the first, which is where the program is."""
_kept: list[Any] = []
_begun_with: dict[str, str] = {}
_imported: set[str] = set()
_filters: list[Any] = []
"""The filters for warnings that a program finds."""


def read_at_start(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that matter when something is loaded; PYTHONPATH has a rule of its own."""
    read = {k: v for k, v in environ.items() if k.startswith(_READ_AT_START)}
    return {k: v for k, v in read.items() if k != "PYTHONPATH" and not k.startswith(_READ_LATER)}


def changes_a_start(place: str) -> bool:
    """Whether a directory of PYTHONPATH has something that Python runs when it starts."""
    return Path(place, "sitecustomize.py").exists()


def adds_devices(place: str) -> bool:
    """Whether torch would find a device there when it is imported."""
    return any(Path(place).glob("*.dist-info"))


def split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The options of `python` that a fork can have too, and the rest of its words."""
    rest = list(words[1:])
    options = []
    while rest and rest[0] in _OPTIONS:
        options += rest[: 1 + (rest[0] == "-W")]
        rest = rest[1 + (rest[0] == "-W") :]
    return options, rest


def can_be_forked(words: Sequence[str]) -> bool:
    """Whether this is `python` with a program and without options that only a start can have."""
    _, rest = split(words)
    runs = bool(rest) and (rest[0] in ("-c", "-m") or not rest[0].startswith("-"))
    return runs and words[0] == sys.executable


def main(control: socket.socket, modules: list[str]) -> None:
    """Import the modules, then start what is asked for until the other end closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests, which close the socket
    sys.path[:] = _installed
    for name in modules:
        __import__(name)
    _use_once()
    _imported.update(sys.modules)
    _filters.extend(warnings.filters)
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
    _begun_with.update(read_at_start(os.environ))
    time.tzset()
    tempfile.tempdir = None
    random.seed()
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()
    _begin_signals(_handlers(), ignored=request["ignored"])
    _begin_streams(unbuffered="-u" in split(request["words"])[0])
    multiprocessing.util.spawnv_passfds = _spawned  # type: ignore[assignment]
    subprocess._fork_exec = _started  # type: ignore[attr-defined]
    found = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    more = [os.path.abspath(path) for path in found if path]
    _path[:] = [*more, *(path for path in _installed if path not in more)]
    tell_as(request["words"])
    _leave(_program(request["words"]))


def _program(words: list[str]) -> Callable[[], object]:
    """What an interpreter does with these words: `python -m module`, `-c code` or a script."""
    if words[0] != sys.executable:  # a script, by its first line
        words = [sys.executable, *words]
    sys.orig_argv = words
    options, (first, *rest) = split(words)
    if "-W" in options:
        sys.warnoptions.extend(options[n + 1] for n, word in enumerate(options) if word == "-W")
        warnings._processoptions(sys.warnoptions)  # type: ignore[attr-defined]
    if first == "-m":
        sys.argv, place = rest, os.getcwd()
    elif first == "-c":
        sys.argv, place = ["-c", *rest[1:]], ""
    else:
        sys.argv, place = [first, *rest], os.path.dirname(os.path.realpath(first))
    sys.path[:] = [*([] if "-P" in options else [place]), *_path]
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


def _begin_signals(before: dict[int, Any], *, ignored: bool = False) -> None:
    """As after the start of an interpreter: no handlers but its own; what is ignored stays so."""
    signal.set_wakeup_fd(-1)
    faulthandler.disable()
    for number, handler in before.items():
        if callable(handler):
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN if ignored else signal.default_int_handler)


def _begin_streams(*, unbuffered: bool = False) -> None:
    """New text streams for 0, 1 and 2, without what others have written and not flushed."""
    _kept.extend((sys.stdin, sys.stdout, sys.stderr))  # to let go of them would be to flush them
    sys.stdin = sys.__stdin__ = _stream(0, "<stdin>", like=sys.stdin, unbuffered=unbuffered)
    sys.stdout = sys.__stdout__ = _stream(1, "<stdout>", like=sys.stdout, unbuffered=unbuffered)
    sys.stderr = sys.__stderr__ = _stream(2, "<stderr>", like=sys.stderr, unbuffered=unbuffered)


def _stream(number: int, name: str, *, like: Any, unbuffered: bool) -> TextIOWrapper:
    """A descriptor as a text stream, in lines where it is a terminal."""
    mode = "wb" if number else "rb"
    unbuffered = unbuffered or like.write_through  # by PYTHONUNBUFFERED
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


# ---- what others see of it


class _Map(ctypes.Structure):
    """`struct prctl_mm_map` of Linux: where the kernel finds what belongs to a process."""

    _fields_ = [
        *((name, ctypes.c_uint64) for name in _PLACES),
        ("auxv", ctypes.c_uint64),
        ("auxv_size", ctypes.c_uint32),
        ("exe_fd", ctypes.c_uint32),
    ]


def can_tell_as() -> bool:
    """Whether this kernel lets a process say where its words are."""
    size = ctypes.c_uint()
    return _libc.prctl(_SET_MM, _SET_MM_MAP_SIZE, ctypes.byref(size), 0, 0) == 0


def tell_as(words: Sequence[str]) -> None:
    """Let /proc tell these words and the environment as those of this process, where it can.

    Source: prctl(2), PR_SET_MM_MAP; proc(5), /proc/pid/stat.
    """
    told = [os.fsencode(word) for word in words]
    variables = [os.fsencode(f"{name}={value}") for name, value in os.environ.items()]
    both = [b"".join(each + b"\0" for each in texts) for texts in (told, variables)]
    memory = mmap.mmap(-1, sum(map(len, both)), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory[:] = b"".join(both)
    _kept.append(memory)
    begin = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    between, end = begin + len(both[0]), begin + len(memory)
    _, _, after = Path("/proc/self/stat").read_text().rpartition(")")
    fields = [0, 0, 0, *after.split()]  # numbered as in proc(5)
    numbers = {name: int(fields[number]) for name, number in _PLACES.items() if number}
    numbers |= {"arg_start": begin, "arg_end": between, "env_start": between, "env_end": end}
    numbers["brk"] = _libc.sbrk(0)
    asked = _Map(**numbers, exe_fd=0xFFFFFFFF)
    _libc.prctl(_SET_MM, _SET_MM_MAP, ctypes.byref(asked), ctypes.sizeof(asked), 0)


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
    tell_as([os.fsdecode(word) for word in args])
    _leave(_program(["-c", code]))


def _started(words: Sequence[Any], *rest: Any) -> int:
    """Start what `subprocess` asks for; a program in Python as a fork, without the imports.

    The arguments are those of `_posixsubprocess.fork_exec`.
    """
    cwd, listed, p2cread, _, _, c2pwrite, _, errwrite, _, broken = rest[3:13]
    told = [os.fsdecode(word) for word in words]
    pairs = [pair.partition(b"=") for pair in listed or []]
    environ = {os.fsdecode(name): os.fsdecode(value) for name, _, value in pairs}
    environ = environ if listed is not None else dict(os.environ)
    is_plain = rest[1:3] == (True, (broken,)) and rest[15:21] == _WITHOUT_MORE
    if not (is_plain and can_be_forked(told) and _is_as_begun() and _finds_as_begun(environ)):
        return _fork_exec(words, *rest)  # type: ignore[no-any-return]
    umask = os.umask(0)
    os.umask(umask)
    before = _handlers()
    request = {"words": told, "cwd": cwd or ".", "environ": environ, "umask": umask}
    request |= {"session": rest[14], "ignored": before[signal.SIGINT] is signal.SIG_IGN}
    process = os.fork()
    if process:
        return process
    gc.freeze()  # what belongs to the program is not to be tidied up here
    _begin_signals(before)
    streams = [p2cread, c2pwrite, errwrite]
    streams = [os.dup(n if stream == -1 else stream) for n, stream in enumerate(streams)]
    _forget(streams)
    for name in set(sys.modules) - _imported:
        if name.partition(".")[0] in ("__main__", "launch", "service"):
            del sys.modules[name]
    warnings.filters[:] = _filters
    warnings._filters_mutated()  # type: ignore[attr-defined]
    sys.excepthook = sys.__excepthook__
    _become(request, [*streams, os.dup(0)], unused=[])


def _is_as_begun() -> bool:
    """Whether a fork of this process would find nothing that the program has set up.

    The threads of torchrun's agent wait for its store and its timer, those of doctor for other
    nodes. Of other threads nobody knows which locks they hold, which a fork would keep for ever.
    """
    import torch.distributed as dist

    server: Any = multiprocessing.forkserver._forkserver
    tracker: Any = multiprocessing.resource_tracker._resource_tracker
    has_begun = server._forkserver_pid is not None or tracker._fd is not None
    only_wait = Path(sys.argv[0]).name == "torchrun" or sys.argv[1:2] == ["doctor"]
    return (only_wait or _is_alone()) and not has_begun and not dist.is_initialized()


def _finds_as_begun(environ: Mapping[str, str]) -> bool:
    """Whether a start with these variables would find what this process found."""
    known, places = (v.get("PYTHONPATH", "").split(os.pathsep) for v in (os.environ, environ))
    more = [place for place in places if place and place not in known]
    return read_at_start(environ) == _begun_with and not any(
        changes_a_start(place) or adds_devices(place) for place in more
    )


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
    os._exit(0)  # to take all imports apart takes half a second
