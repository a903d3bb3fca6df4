"""torch's elastic agent over processes that are forked from a warm server and end in bounded time.

The agent provides the ranks and their environment. Its own way to run functions
(`LocalElasticAgent`) is replaced, because it always waits 30 s for a frozen process,
and forever if a process is killed in its last moment. So is its rendezvous: the dynamic one
listens on all interfaces and unpickles the contents of its store, so anyone who reaches the port
could run code as this user. The one here is static, and the agent itself reads nothing from the
store.
"""

from __future__ import annotations

import ctypes
import math
import multiprocessing
import os
import signal
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]  # its wheel has no types
from torch.distributed.elastic.agent.server.api import (
    RunResult,
    SimpleElasticAgent,
    Worker,
    WorkerGroup,
    WorkerSpec,
    WorkerState,
)
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousStoreInfo,
)

from launch.environment import RUN_OF_STORE, STORE_FILE
from launch.processes.warm_start import ensure_server
from launch.rank.store import LOOPBACK, close, local_store
from service.basics.errors import EvenstepError, Stopped
from service.basics.running_time import RunningClock
from service.health.stop_request import StopRequest
from service.monitoring.endpoint import endpoint_processes

PEERS_LEAVE_SECONDS = 5.0
"""After a failure the others end by themselves; one that cannot is killed after this time."""
_LOOK_SECONDS = 0.02
_ASK_SECONDS = 1.0  # between two looks for ranks that save
_PR_SET_CHILD_SUBREAPER = 36
_SERVER_LOST = 255  # what multiprocessing reports for a process whose fork server is gone


class NotStarted(EvenstepError):
    """A process could not be forked."""


@dataclass
class Rank:
    """One process of the group."""

    number: int
    process: BaseProcess
    ended: int | None = None
    """Its exit code, or minus the number of the signal that ended it."""
    ended_time: float = 0.0
    """The time when this was detected, in seconds since the epoch."""
    ended_by_us: bool = False

    @property
    def killed_by(self) -> int | None:
        """The signal that ended it, unless its launcher sent the signal."""
        if self.ended == _SERVER_LOST:
            return int(signal.SIGKILL)
        return -self.ended if self.ended and self.ended < 0 and not self.ended_by_us else None


class _Static(RendezvousHandler):
    """The rendezvous of one node's processes: a local store, without any agreement."""

    def __init__(self) -> None:
        self._run_id = (
            f"evenstep-{uuid.uuid4().hex}"  # a restarted rank must not connect to a dead one
        )
        self.store = local_store()

    @property
    def use_agent_store(self) -> bool:
        return True

    def get_backend(self) -> str:
        return "evenstep"

    def get_run_id(self) -> str:
        return self._run_id

    def next_rendezvous(self) -> RendezvousInfo:
        place = RendezvousStoreInfo(LOOPBACK, self.store.port)
        return RendezvousInfo(self.store.store, 0, 1, place)

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        """Does nothing: no other node can join."""

    def num_nodes_waiting(self) -> int:
        return 0

    def shutdown(self) -> bool:
        close(self.store)
        return True


def rank_spec(entry: Callable[..., None], *arguments: object, processes: int) -> WorkerSpec:
    """Ranks that each run `entry(environment, *arguments)`; opens the store for it."""
    return WorkerSpec(
        role="rank",
        local_world_size=processes,
        entrypoint=entry,
        args=arguments,
        rdzv_handler=_Static(),
        max_restarts=0,
        monitor_interval=_LOOK_SECONDS,
        local_addr="localhost",
    )


class Agent(SimpleElasticAgent):
    """One attempt at the job: a new rendezvous and `processes` ranks, from start to end."""

    def __init__(
        self,
        ranks: WorkerSpec,
        *,
        stop: StopRequest,
        stop_budget_seconds: Callable[[], float],
        some_save: Callable[[Sequence[Rank]], bool] = lambda ranks: False,
        first: int = 0,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        """`ranks` comes from `rank_spec`; `first` is the lowest rank of this node.

        `variables` are added to the environment of each rank. `stop_budget_seconds` is called when
        a request to stop arrives, because the duration of saves has been measured by then.
        `some_save` tells whether one of these ranks is writing a checkpoint.
        """
        super().__init__(ranks)
        self._first = first
        self._variables = dict(variables or {})
        self._stop = stop
        self._stop_budget = stop_budget_seconds
        self._some_save = some_save
        self.stop_budget_seconds = math.inf
        """The time limit that the ranks got for a stop, once it was requested."""
        self._forwarded = False
        self._failed = False
        self._clock = RunningClock()
        self._stop_by = math.inf
        """On a clock that pauses with this process: ranks stopped with it are not late."""
        self._leave_by = math.inf
        """On the same clock: when a rank that a failed one leaves behind is killed."""
        self._ask_at = -math.inf
        self.ranks: list[Rank] = []
        """In the order of their start, so by number."""
        self.first_ended: list[Rank] = []
        """In the order of their end."""
        self.overran = False
        """Whether ranks had to be killed after a request to stop."""

    def run_once(self) -> None:
        """Return when every rank has ended, and nothing that they started is left."""
        try:
            self.run()
        finally:
            try:
                self._shutdown()
            finally:
                self._worker_group.spec.rdzv_handler.shutdown()

    # ---- methods of torch's agent that would read its store, which another program may have
    # changed

    def _assign_worker_ranks(
        self, store: Any, group_rank: int, group_world_size: int, spec: WorkerSpec
    ) -> list[Worker]:
        count = spec.local_world_size
        return [Worker(n, n, n, count, count) for n in range(count)]

    def _exit_barrier(self) -> None:
        """Waits for nobody: nodes end by `launch.nodes.rendezvous`."""

    # ---- methods of torch's agent for its processes

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        ensure_server()
        context = multiprocessing.get_context("forkserver")
        spec = worker_group.spec
        assert callable(spec.entrypoint), "rank_spec takes a function"
        for worker in worker_group.workers:
            environment = self._variables | _environment(worker, worker_group)
            process = context.Process(target=spec.entrypoint, args=(environment, *spec.args))
            try:
                process.start()
            except (
                EOFError,
                OSError,
            ) as error:  # this has ended the fork server
                raise NotStarted(
                    f"rank {self._first + worker.global_rank} could not be started: this machine "
                    "cannot start another process. Its memory or the number of processes "
                    "(ulimit -u, a container's pids) is used up."
                ) from error
            self.ranks.append(Rank(self._first + worker.global_rank, process))
        return {local: rank.process.pid for local, rank in enumerate(self.ranks)}

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        reap_orphans()
        alive = self._look()
        now = self._clock()
        if alive:
            self._hurry(alive, now)
            return RunResult(WorkerState.HEALTHY)
        if any(rank.ended for rank in self.ranks):
            return RunResult(WorkerState.FAILED)
        return RunResult(WorkerState.SUCCEEDED, dict.fromkeys(range(len(self.ranks))))

    def _stop_workers(self, worker_group: WorkerGroup, *_: Any) -> None:
        self._shutdown()

    def _shutdown(self, death_sig: signal.Signals = signal.SIGKILL, timeout: int = 0) -> None:
        for rank in self._look():
            rank.ended_by_us = True
            rank.process.kill()
        for rank in self.ranks:
            rank.process.join()
        self._look()
        end_orphans()

    # ---- the end of the ranks

    def _look(self) -> list[Rank]:
        """The ranks that are still alive; the exit codes of the others are recorded."""
        alive = []
        for rank in self.ranks:
            if rank.ended is None:
                rank.ended = rank.process.exitcode
                if rank.ended is None:
                    alive.append(rank)
                else:
                    rank.ended_time = time.time()
                    self.first_ended.append(rank)
        return alive

    def _hurry(self, alive: list[Rank], now: float) -> None:
        """Pass on a request to stop, once; kill ranks that do not end in time."""
        if self._stop.requested and not self._forwarded:
            self._forwarded = True
            self.stop_budget_seconds = self._stop_budget()
            self._stop_by = now + self.stop_budget_seconds
            for rank in alive:
                rank.process.terminate()  # it may have ended in the meantime
            print(
                f"{self._stop.reason}: saving the state after the current step; Ctrl-C ends "
                "the run immediately.",
                file=sys.stderr,
                flush=True,
            )
        failed = any(rank.ended not in (None, 0, Stopped.exit_code) for rank in self.ranks)
        if failed and now > self._ask_at:
            # Also while they stop: if one is gone, the others cannot agree.
            self._ask_at = now + _ASK_SECONDS
            if not self._failed or self._some_save(alive):
                self._leave_by = now + PEERS_LEAVE_SECONDS
            self._failed = True
        deadline = min(self._stop_by, self._leave_by)
        if now > deadline:
            self.overran = self._forwarded and not self._failed
            for rank in alive:
                rank.ended_by_us = True
                rank.process.kill()
            if now > deadline + PEERS_LEAVE_SECONDS:
                end_server()  # it makes no progress, and only it can notice that they are gone


def _environment(worker: Any, group: WorkerGroup) -> dict[str, str]:
    """The environment that torchrun would give a process."""
    spec = group.spec
    return {
        "RANK": str(worker.global_rank),
        "LOCAL_RANK": str(worker.local_rank),
        "WORLD_SIZE": str(worker.world_size),
        "LOCAL_WORLD_SIZE": str(spec.local_world_size),
        "GROUP_RANK": str(group.group_rank),
        "GROUP_WORLD_SIZE": str(group.group_world_size),
        "ROLE_RANK": str(worker.role_rank),
        "ROLE_WORLD_SIZE": str(worker.role_world_size),
        "ROLE_NAME": spec.role,
        "MASTER_ADDR": str(group.master_addr),
        "MASTER_PORT": str(group.master_port),
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_MAX_RESTARTS": "0",
        "TORCHELASTIC_RUN_ID": spec.rdzv_handler.get_run_id(),
        RUN_OF_STORE: spec.rdzv_handler.get_run_id(),
        STORE_FILE: spec.rdzv_handler.store.file,  # type: ignore[attr-defined]  # of `_Static`
        "TORCHELASTIC_USE_AGENT_STORE": str(spec.rdzv_handler.use_agent_store),
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1"),
    }


# ---- processes that ranks leave behind: data-loader workers, wandb-core

_EARLIER: set[int | None] = set()
"""The children that this process had before the first rank, such as a daemon of an entrypoint."""


def adopt_orphans() -> None:
    """Become the parent of orphaned processes of a rank, as PID 1 of a container is already."""
    if not _EARLIER:  # later on, what ranks have left behind could be among them
        _EARLIER.update(_children())
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def reap_orphans() -> None:
    """Reap every adopted process that has ended, so that it does not remain a zombie."""
    for process in _orphans():
        _reap(process, os.WNOHANG)


def end_orphans() -> None:
    """Kill what the ranks have left behind."""
    for process in _orphans():
        with suppress(ProcessLookupError):  # another thread had started it, and has reaped it
            os.kill(process, signal.SIGKILL)
        _reap(process, 0)


def of_ranks() -> list[psutil.Process]:
    """The fork server, the ranks, and everything that they have started."""
    from multiprocessing import forkserver

    server = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    found: list[psutil.Process] = []
    for process in [*_orphans(), *([] if server is None else [server])]:
        with suppress(psutil.NoSuchProcess):
            first = psutil.Process(process)
            found += [first, *first.children(recursive=True)]
    return found


def end_server() -> None:
    """Kill the fork server and every process that it has started."""
    from multiprocessing import forkserver

    server = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    if server is not None:
        os.kill(server, signal.SIGKILL)  # a child, not reaped: its id is not reused


def _reap(process: int, options: int) -> None:
    with suppress(ChildProcessError):  # as above
        os.waitpid(process, options)


def _orphans() -> Iterator[int]:
    """The children of this process that a rank has started.

    A rank and the fork server have sessions of their own. What is in the session of this process
    belongs to it, such as a command by which a thread gets credentials, or to whoever started it:
    a script that runs a command in the background, and then becomes this process by `exec`.
    """
    ours = our_own() | _EARLIER
    own = os.getsid(0)
    for process in _children():
        session = own
        with suppress(ProcessLookupError):  # another thread has just reaped it
            session = os.getsid(process)
        if process not in ours and session != own:
            yield process


def our_own() -> set[int | None]:
    """The children of this process that are not ranks, and outlive them."""
    from multiprocessing import forkserver, resource_tracker

    return {
        forkserver._forkserver._forkserver_pid,  # type: ignore[attr-defined]
        resource_tracker._resource_tracker._pid,  # type: ignore[attr-defined]
        *endpoint_processes(),
    }


def _children() -> Iterator[int]:
    """The processes whose parent is this one."""
    if sys.platform != "linux":
        return
    for task in Path("/proc/self/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # this thread has just ended
            yield from map(int, (task / "children").read_text().split())
