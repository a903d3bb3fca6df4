"""Real processes that stay for the whole test session, joined as a job's processes are.

def total(world: World, value: float) -> float:
    return float(world.sum(torch.tensor(value * world.index)))

def test_sum(processes: ProcessesOf) -> None:
    assert processes(3).run(total, 0.5) == [1.5, 1.5, 1.5]
"""

from __future__ import annotations

import faulthandler
import importlib
import io
import multiprocessing as mp
import os
import pickle
import resource
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import FunctionType, TracebackType
from typing import Any, Self, TypeVar, TypeVarTuple

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

# What every child would otherwise import for itself, two seconds and more each time.
_PRELOAD = [
    "pytest",
    "hypothesis.strategies",
    "torchmetrics",
    "accelerate",
    "torch.distributed",
    "torch._dynamo",
    "service.training.worker",
    "service.recipes.digits",
    "tests.frozen_imports",  # the last, and found from the root of the tree
]
_GRACE_SECONDS = 2.0
_LOG_CHARACTERS = 6000


class ProcessesFailed(Exception):
    """At least one of the processes raised, died or hung; the message holds what each said."""


@dataclass(frozen=True)
class _Answer:
    """What one call came to in one process."""

    value: Any = None
    error: str | None = None
    """The traceback, where it raised."""
    warnings: list[tuple[str, type[Warning], str, int]] = field(default_factory=list)


class _ByName(pickle.Pickler):
    """Functions by name: a test may have loaded their module again, as the file of a task."""

    def reducer_override(self, value: Any) -> Any:
        is_named = isinstance(value, FunctionType) and value.__qualname__.isidentifier()
        if is_named and value is not _function:
            return _function, (value.__module__, value.__qualname__)
        return NotImplemented


def _function(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


def _pickled(value: object) -> bytes:
    written = io.BytesIO()
    _ByName(written).dump(value)
    return written.getvalue()


class Processes:
    """`count` processes joined in one gloo group, each behind `World(Accelerator(cpu=True))`.

    With `device="sim"` each computes on a simulated device of its own, and they are joined by its
    backend.

    They start with the first call.  After a call that failed the state of their group is
    unknown: all of them are killed, and the next call starts new ones.
    """

    def __init__(self, count: int, *, device: str = "cpu") -> None:
        self.count = count
        self._device = device
        self._children: list[_Child] = []

    def run(
        self, function: Callable[[Any, *Ts], T], *args: *Ts, timeout_seconds: float = 300.0
    ) -> list[T]:
        """What `function(world, *args)` returns in every process, by rank.

        Args:
            function: of the top level of a module; it, `args` and what it returns are pickled.
            timeout_seconds: after it every process that still runs prints its stacks and is killed.

        Raises:
            ProcessesFailed: a process raised, died or hung.
        """
        call = _pickled((function, args))
        if not self._children:
            self._children = _start(self.count, self._device)
        for child in self._children:
            with suppress(BrokenPipeError):  # it is dead, and `_answers` says of what
                child.connection.send_bytes(call)
        answers = _answers(self._children, timeout_seconds)
        if any(answer.error is not None for answer in answers.values()):
            self.close()
            raise ProcessesFailed(_failure(function, answers))
        for rank in range(self.count):
            _warn_again(answers[rank])
        return [answers[rank].value for rank in range(self.count)]

    def close(self) -> None:
        """End the processes, and whatever they started."""
        children, self._children = self._children, []
        for child in children:
            child.connection.close()  # an idle child leaves at the end of its input
        deadline = time.monotonic() + _GRACE_SECONDS
        for child in children:
            child.process.join(max(0.0, deadline - time.monotonic()))
            child.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()


ProcessesOf = Callable[[int], Processes]
"""The `processes` fixture: the session's pool of that many processes."""


@dataclass(frozen=True)
class _Child:
    process: mp.process.BaseProcess
    connection: Connection
    log: Path
    """Its stdout and stderr, and its stacks when it is aborted."""

    def last_words(self) -> str:
        words = self.log.read_text(errors="replace").partition("\nExtension modules:")[0]
        return words[-_LOG_CHARACTERS:]

    def abort(self) -> None:
        """End it; faulthandler writes every thread's stack into its log on the way."""
        with suppress(ProcessLookupError):
            os.kill(self.process.pid or 0, signal.SIGABRT)
        self.process.join(_GRACE_SECONDS)

    def kill(self) -> None:
        """End it and its descendants, and remove its log."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid or 0, signal.SIGKILL)
        self.process.join()
        self.process.close()
        self.log.unlink(missing_ok=True)


def _start(count: int, device: str) -> list[_Child]:
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is loaded, in the fork server
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(count):
        ours, theirs = context.Pipe()
        handle, log = tempfile.mkstemp(prefix=f"rank-{rank}-of-{count}-", suffix=".log")
        os.close(handle)
        environment = _environment(rank, count, port)
        process = context.Process(target=_serve, args=(theirs, log, environment, device))
        process.start()
        theirs.close()
        children.append(_Child(process, ours, Path(log)))
    return children


def _environment(rank: int, count: int, port: int) -> dict[str, str]:
    """What torchrun tells one of `count` processes; a process alone is started without it."""
    if count == 1:
        return {}
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _answers(children: list[_Child], timeout_seconds: float) -> dict[int, _Answer]:
    """Every rank's answer, in the order in which they came."""
    answers: dict[int, _Answer] = {}
    deadline = time.monotonic() + timeout_seconds
    while len(answers) < len(children):
        waiting = {rank: c for rank, c in enumerate(children) if rank not in answers}
        sources = [
            source for c in waiting.values() for source in (c.connection, c.process.sentinel)
        ]
        ready = set(wait(sources, max(0.0, deadline - time.monotonic())))
        if not ready:
            return answers | _hung(waiting, timeout_seconds, failed=bool(answers))
        for rank, child in waiting.items():
            if ready & {child.connection, child.process.sentinel}:
                answers[rank] = _answer(child)
        if any(answer.error is not None for answer in answers.values()):
            # The others may wait for the one that failed; they get a moment to say so.
            deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
    return answers


def _answer(child: _Child) -> _Answer:
    """The answer of a child that has sent one or is dead."""
    try:
        if child.connection.poll():
            answer: _Answer = pickle.loads(child.connection.recv_bytes())
            return answer
    except (EOFError, ConnectionResetError):
        pass  # it died with the connection
    child.process.join()
    words = child.last_words()
    return _Answer(error=f"ended with exit code {child.process.exitcode}\n{words}")


def _hung(waiting: dict[int, _Child], seconds: float, *, failed: bool) -> dict[int, _Answer]:
    what = "still waited" if failed else f"gave no answer in {seconds:g} s"
    for child in waiting.values():
        child.abort()
    return {
        rank: _Answer(error=f"{what}; its stacks:\n{child.last_words()}")
        for rank, child in waiting.items()
    }


def _failure(function: Callable[..., Any], answers: dict[int, _Answer]) -> str:
    """All errors, the first that came first."""
    name = f"{function.__module__}.{function.__qualname__}"
    errors = [f"rank {rank}: {a.error}" for rank, a in answers.items() if a.error is not None]
    return "\n".join([f"{name} failed in {len(errors)} of {len(answers)} processes.", *errors])


def _warn_again(answer: _Answer) -> None:
    """Raise the child's warnings here, where pytest's filters decide what they are."""
    for message, category, path, line in answer.warnings:
        warnings.warn_explicit(message, category, path, line)


def _serve(connection: Connection, log: str, environment: dict[str, str], device: str) -> None:
    """A child's life: one call after the other, until the connection closes."""
    _isolate(log)
    os.environ.update(environment)
    import collector
    import torch
    import torch.distributed as dist
    from accelerate import Accelerator

    from service.distributed.world import World

    torch.set_num_threads(1)
    # A child's own children (a loader's workers) start as they do in a process of torchrun.
    mp.set_start_method(mp.get_all_start_methods()[0], force=True)
    if device == "cpu":
        world = World(Accelerator(cpu=True))
    else:
        world = _on_simulated(int(environment.get("RANK", 0)), joined=bool(environment))
    while True:
        try:
            call = connection.recv_bytes()
        except EOFError:
            break
        connection.send_bytes(_outcome(world, call))
        collector.rest()
    if dist.is_initialized():
        dist.destroy_process_group()


def _on_simulated(rank: int, *, joined: bool) -> Any:
    """A world on a simulated device that is not the first, which is each thread's own choice."""
    import simulated_device
    import torch
    import torch.distributed as dist
    from accelerate import Accelerator

    from service.distributed.world import World

    # Before it is counted; the fork server has the environment of the session's start.
    os.environ["SIM_DEVICES"] = str(max(simulated_device.device_count(), rank + 2))
    simulated_device.register()
    if joined:
        dist.init_process_group(dist.get_default_backend_for_device("sim"))
    return World(Accelerator(), device=torch.device("sim", rank + 1))


def _isolate(log: str) -> None:
    """Let nothing of this process reach the terminal, and nothing of it outlive its parent."""
    os.setsid()
    with open(log, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    faulthandler.enable(sys.__stderr__ or 2, all_threads=True)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    """Kill this process and its children when the test session is gone, however it went."""
    parent = mp.parent_process()
    assert parent is not None
    parent.join()
    os.killpg(0, signal.SIGKILL)


def _outcome(world: Any, call: bytes) -> bytes:
    """The pickled answer to a pickled call."""
    error, value = None, None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            function, args = pickle.loads(call)
            value = function(world, *args)
            pickle.dumps(value)
        except BaseException:
            error, value = traceback.format_exc(), None
    told = [(str(w.message), w.category, w.filename, w.lineno) for w in caught]
    return pickle.dumps(_Answer(value=value, error=error, warnings=told))
