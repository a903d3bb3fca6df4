"""Starts commands in an interpreter that has its imports behind it.

Nearly all of the CPU time of a small command is the import of torch. `popen` takes a process from
`tests/warm_interpreter.py`, which has done it once and forks: the process is real, with arguments,
environment, directory, streams, signals, session and exit code of its own.

What a start depends on and a fork cannot have is started as always: another program than
`evenstep`, another locale, variables that Python or a library reads when it is loaded. With
EVENSTEP_COLD_TESTS=1 everything is.
"""

from __future__ import annotations

import atexit
import inspect
import json
import os
import select
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from warm_interpreter import (
    adds_devices,
    can_be_forked,
    can_tell_as,
    changes_a_start,
    read_at_start,
)

_PROGRAM = Path(__file__).with_name("warm_interpreter.py")
_MODULES = (
    "accelerate",
    "torch.distributed",
    "torch.distributed.elastic.agent.server.api",
    "torch._dynamo",
    "service.training.worker",
    "service.preview.check",
    "service.preview.plan",
    "service.recipes.digits",
    "psutil",
    "click",
)
_MORE = {"mlflow": ("mlflow.tracking", "service.observability.mlflow_backend")}
"""Imports that take a second, for programs whose words have this one."""
WARM = os.environ.get("EVENSTEP_COLD_TESTS") != "1" and hasattr(os, "pidfd_open")
_SCRIPTS = {str(Path(sys.executable).with_name(name)) for name in ("evenstep", "torchrun")}
_KNOWN = {"cwd", "stdin", "stdout", "stderr", "text", "errors", "bufsize", "start_new_session"}
_interpreters: dict[tuple[object, ...], Interpreter] = {}


class Interpreter:
    """A process that has imported what commands need, and forks them."""

    def __init__(self, environ: Mapping[str, str], modules: Sequence[str]) -> None:
        ours, theirs = socket.socketpair()
        self._control = ours
        self._one_at_a_time = threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, _PROGRAM, str(theirs.fileno()), *modules],
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
        )
        theirs.close()
        atexit.register(self.close)

    def start(self, request: Mapping[str, Any], streams: Sequence[int]) -> tuple[int, int]:
        """The new process, and the pipe from which its exit code can be read."""
        read, write = os.pipe()
        text = json.dumps(request).encode()
        with self._one_at_a_time:
            socket.send_fds(self._control, [struct.pack("q", len(text))], [*streams, write])
            os.close(write)
            self._control.sendall(text)
            told = self._control.recv(8)
        assert told, f"the warm interpreter has ended with {self._process.wait()}"
        return struct.unpack("q", told)[0], read

    def close(self) -> None:
        self._control.close()
        self._process.wait()


class Warm(subprocess.Popen[Any]):
    """A Popen whose process is forked and reaped by an interpreter."""

    def __init__(self, interpreter: Interpreter, words: Sequence[str], **how: Any) -> None:
        self._interpreter = interpreter
        self._exit: int | None = None
        super().__init__(words, **how)

    def _execute_child(self, *args: Any) -> None:
        asked = inspect.signature(super()._execute_child).bind(*args).arguments
        streams = [asked[name] for name in ("p2cread", "c2pwrite", "errwrite")]
        umask = os.umask(0)
        os.umask(umask)
        request = {
            "words": [os.fspath(word) for word in asked["args"]],
            "cwd": os.path.abspath(asked["cwd"] or "."),
            "environ": dict(asked["env"]),
            "session": asked["start_new_session"],
            "umask": umask,
            "ignored": False,
        }
        inherited = [n if stream == -1 else stream for n, stream in enumerate(streams)]
        self.pid, self._exit = self._interpreter.start(request, inherited)
        self._child_created = True
        ends = [f"{name}{end}" for name in ("p2c", "c2p", "err") for end in ("read", "write")]
        self._close_pipe_fds(*(asked[end] for end in ends))

    def _internal_poll(self, *_: Any, **__: Any) -> int | None:
        self._read_exit(0.0)
        return self.returncode

    def _wait(self, timeout: float | None) -> int:
        if not self._read_exit(timeout):
            assert timeout is not None
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def _read_exit(self, timeout: float | None) -> bool:
        if self._exit is not None:
            if not select.select([self._exit], [], [], timeout)[0]:
                return False
            told = os.read(self._exit, 8)
            assert told, "the warm interpreter is gone, and with it the exit code"
            self.returncode = struct.unpack("q", told)[0]
            os.close(self._exit)
            self._exit = None
        return True


def popen(
    words: Sequence[str], *, env: Mapping[str, str], clean: Mapping[str, str], **how: Any
) -> subprocess.Popen[Any]:
    """`subprocess.Popen`, warm where nothing of the start is different by it.

    Args:
        clean: the environment in which the interpreter is started.
    """
    devices = _devices(words, env, clean) if WARM and not how.keys() - _KNOWN else None
    if devices is None:
        return subprocess.Popen(words, env=env, **how)
    named = next((name for name in _MORE if any(name in word for word in words)), None)
    kind = (devices, named, *read_at_start(clean).items())
    if kind not in _interpreters:
        modules = (*_MODULES, *_MORE.get(named or "", ()))
        _interpreters[kind] = Interpreter({**clean, "PYTHONPATH": devices}, modules)
    return Warm(_interpreters[kind], words, env=env, **how)


def _devices(words: Sequence[str], env: Mapping[str, str], clean: Mapping[str, str]) -> str | None:
    """Where torch finds devices when it is imported; None if this start cannot be warm."""
    if not can_be_forked(words) and words[0] not in _SCRIPTS:
        return None
    if Path(words[0]).name == "torchrun" and not can_tell_as():
        return None  # its processes read its command line
    if read_at_start(env) != read_at_start(clean):
        return None
    known = env.get("PYTHONPATH", "")
    places = [place for place in known.split(os.pathsep) if place]
    if any(map(changes_a_start, places)):
        return None
    return known if any(map(adds_devices, places)) else ""
