"""What one node does in a group of nodes: its processes, and the watch over the other nodes."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import replace
from typing import Any, Protocol

import psutil  # type: ignore[import-untyped]  # its wheel has no types

from launch.environment import Group, Node
from launch.nodes.rendezvous import Membership, Replaced
from launch.processes.echo import echoed
from launch.processes.signals import STARTED
from service.basics.errors import PeerLost, SpecError
from service.basics.running_time import TimeLimit
from service.monitoring.endpoint import metrics_endpoint
from service.plan.changing import changes
from service.runs.directory import RunDirectory

MEETING_SECONDS = 600
DETECTION_SECONDS = 10.0
"""Time for the local processes to detect by themselves that a node is gone, and to end with their
own messages."""

NEWS_SECONDS = 2.0
"""Time for this node to detect the loss of a node that its processes have reported."""

KILL_SECONDS = 1.0
"""Time between two attempts to kill the local processes, until they have ended."""


class Job(Protocol):
    """The part of `launch.rank.job.Job` that needs no torch."""

    spec: Any
    runs: Any
    fresh: bool

    def directory(self) -> RunDirectory: ...


def run_part(
    job: Any,
    node: Node,
    membership: Membership,
    group: Group | None,
    *,
    processes: int,
    kill: Callable[[], None],
    stop: Callable[[], None],
    started: float = STARTED,
) -> int:
    """Run this node's processes in the group; return their exit code.

    If another node is lost, they end by themselves, or by `kill`.

    Args:
        group: None if this node is alone.
        stop: called when another node has stopped, and this one continues.
        started: when this attempt began, in seconds since the epoch.
    """
    from launch.processes.local import run_locally

    first = group.index * processes if group else 0
    ranks = range(first, first + processes)
    watch = _Watch(membership, job, ranks, kill=kill, stop=stop)
    logs = RunDirectory(job.runs / job.spec.name).logs
    try:
        with (
            _endpoint(job, node, range(first, first + node.local_nodes * processes)),
            echoed(logs, [rank for rank in ranks if rank], say),
        ):
            ended = run_locally(
                replace(job, group=group),
                processes=processes,
                node_lost=lambda: membership.lost_time,
                started=started,
            )
            return watch.outcome(ended)
    finally:
        watch.end()


def _endpoint(job: Job, node: Node, ranks: range) -> AbstractContextManager[None]:
    """The metrics endpoint of this machine, which the first of its launchers serves."""
    if node.local_index:
        return nullcontext()
    run = job.runs / job.spec.name
    return metrics_endpoint(job.spec, run, ranks=ranks, started=STARTED, say=say)


def new_store(address: str) -> tuple[object, str, int]:
    """The store through which the processes of all nodes find each other, and its address.

    It is new in every rendezvous, on a port that only connected nodes know, and on the interface
    over which they connected.
    """
    from launch.rank.store import own_store

    store = own_store(address)
    return store, address, store.port


def meeting_seconds(job: Job) -> float:
    """How long a node waits for the others."""
    cluster = job.spec.kubernetes
    return float(cluster.meeting_seconds if cluster else MEETING_SECONDS)


class _Watch:
    """Ends the local processes after another node has ended, if they do not end by themselves."""

    def __init__(
        self,
        membership: Membership,
        job: Job,
        ranks: Collection[int],
        *,
        kill: Callable[[], None],
        stop: Callable[[], None],
    ) -> None:
        self._membership = membership
        self._job = job
        self._ranks = ranks
        self._kill, self._stop = kill, stop
        self._over = threading.Event()
        self._killed = False
        membership.watch(self._when_lost, self._when_stopped)

    def outcome(self, code: int) -> int:
        """The exit code of this node, from that of its processes."""
        self.end()
        code = PeerLost.exit_code if self._killed else code
        if code == PeerLost.exit_code:
            self._membership.await_news(NEWS_SECONDS)  # its processes may have noticed it first
            if self._membership.lost is not None:
                say(self._membership.lost)
        return code

    def end(self) -> None:
        """The local processes have ended."""
        self._over.set()

    def _when_lost(self) -> None:
        limit = TimeLimit(DETECTION_SECONDS)
        while limit.left:
            if self._over.wait(limit.look):
                return
            if self._some_save():
                limit = TimeLimit(DETECTION_SECONDS)
        self._killed = True
        while True:  # on a busy machine some may not even have been started the first time
            self._kill()
            if self._over.wait(KILL_SECONDS):
                return

    def _some_save(self) -> bool:
        from launch.processes.saving import some_save

        processes = {process.pid for process in psutil.Process().children(recursive=True)}
        return some_save(self._job, self._ranks, processes)

    def _when_stopped(self) -> None:
        """Stop the local processes: they may wait for ranks that the other node never started."""
        if not TimeLimit(DETECTION_SECONDS).wait(self._over.wait):
            self._stop()


def kill_each(processes: Iterable[psutil.Process]) -> None:
    """Kill these processes; some die with one that was killed before."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def kill_ranks(*, but: Collection[int | None] = ()) -> None:
    """Kill the fork server, the ranks and what they have started, except the processes in `but`."""
    from launch.processes.agent import of_ranks

    kill_each(process for process in of_ranks() if process.pid not in but)


@contextmanager
def started_again(node: Node) -> Iterator[None]:
    """A context in which a node of a cluster is replaced: by the cluster, which did not see it.

    Raises:
        PeerLost: in place of `Replaced`, which would end the job of a cluster.
    """
    try:
        yield
    except Replaced as replaced:
        if not node.returns:
            raise
        raise PeerLost(str(replaced)) from replaced


def is_done(job: Job) -> bool:
    """Whether a pod that starts late finds the run finished, so that its peers are gone.

    A run that this command would change, such as make longer, is not finished.
    """
    directory = RunDirectory(job.runs / job.spec.name)
    if job.fresh or not directory.facts.exists():
        return False
    done = directory.read_facts()["state"] == "done"
    return done and not changes(directory.read_spec(), job.spec)


_INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def check_interfaces() -> None:
    """Refuse the name of a network interface that this machine does not have.

    Raises:
        SpecError: names the variable, and the existing interfaces.
    """
    own = sorted(psutil.net_if_addrs())
    for variable in _INTERFACES:
        asked = os.environ.get(variable, "")
        if not asked or asked.startswith("^"):
            continue
        exact = asked.startswith("=") or variable == "GLOO_SOCKET_IFNAME"
        names = asked.removeprefix("=").split(",")
        if not any(n == name or (not exact and n.startswith(name)) for n in own for name in names):
            raise SpecError(
                f"{variable}={asked}: this machine has no such network interface, but "
                f"{', '.join(own)}. Without it, the interface of the rendezvous is used."
            )


def take_interface(*addresses: str) -> None:
    """Let gloo and NCCL use the interface of the rendezvous, unless the user chose another.

    By default gloo may choose loopback, and NCCL an interface that the nodes cannot use to reach
    each other. NCCL treats a name as a prefix (`eth1` would allow `eth10`) unless it starts with
    `=`.

    Args:
        addresses: the interface is that of the first which this machine has. That of the store
            comes before the own end of the connection to node 0, which is loopback for a process on
            the same machine.
    """
    own = {
        each.address.partition("%")[0]: name
        for name, found in psutil.net_if_addrs().items()
        for each in found
    }
    name = next((own[address] for address in addresses if address in own), None)
    if name is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
