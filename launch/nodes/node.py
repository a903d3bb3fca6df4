"""One node's part of a job on several nodes: rendezvous, local processes, end.

`launch.processes.local` runs the processes of this node as usual; the information about
the other nodes is passed with the job, as its `group`.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import replace
from types import FrameType
from typing import Any, Protocol

import psutil  # type: ignore[import-untyped]  # its wheel has no types

from launch.environment import Group, Node, meeting_secret
from launch.nodes.handshake import JoinRequest
from launch.nodes.rendezvous import Membership, host, is_loopback, join
from launch.nodes.secret_file import secret_in
from launch.processes.echo import echoed
from launch.processes.signals import STARTED, heard
from service.basics.errors import EvenstepError, PeerLost, SpecError, Stopped
from service.basics.running_time import TimeLimit
from service.health.stop_request import STOP_SIGNALS
from service.monitoring.endpoint import metrics_endpoint
from service.plan.changing import changes
from service.runs.directory import RunDirectory
from service.spec.files import dump_spec

MEETING_SECONDS = 600
_PATIENCE_SECONDS = 10.0
"""Time for the local processes to detect by themselves that a node is gone, and to end with their
own messages."""


class _Job(Protocol):
    """The part of `launch.rank.job.Job` that needs no torch."""

    spec: Any
    runs: Any
    fresh: bool

    def directory(self) -> RunDirectory: ...


def run_node(
    job: Any, node: Node, *, processes: int, when_met: Callable[[], None] = lambda: None
) -> int:
    """Run this node's processes in the group of all nodes; return the exit code of this node.

    Args:
        when_met: called when all nodes have connected, before the processes start.
    Raises:
        SpecError: the nodes disagree, the port is taken, or an interface does not exist.
        PeerLost: not all nodes connected, or one was lost.
        Stopped: a stop was requested before the start.
    """
    check_interfaces()
    if _is_done(job):
        _say(f"Nothing to do: {job.runs / job.spec.name} is done.")
        return 0
    with _stop_raises():
        company, group, store = _meet(job, node, processes)
    # From here on a request to stop is recorded, for `run_locally`; at the end it changes nothing.
    take_interface(group.address, company.own_address)
    first = node.index * processes
    ranks = range(first, first + processes)
    watch = _Watch(company, job, ranks)
    from launch.processes.local import run_locally

    code = 1
    try:
        when_met()
        logs = RunDirectory(job.runs / job.spec.name).logs
        with (
            _endpoint(job, node, processes),
            echoed(logs, [rank for rank in ranks if rank], _say),
        ):
            ended = run_locally(
                replace(job, group=group),
                processes=processes,
                node_lost=lambda: company.lost_time,
            )
            code = watch.outcome(ended)
    except EvenstepError as error:
        code = error.exit_code
        raise
    finally:
        watch.end()
        company.part(code)
        del store  # node 0's store; the others need it only until here
    return code


def _endpoint(job: _Job, node: Node, processes: int) -> AbstractContextManager[None]:
    """The metrics endpoint of this machine, which the first of its launchers serves."""
    if node.local_index:
        return nullcontext()
    first = node.index * processes
    ranks = range(first, first + node.local_nodes * processes)
    run = job.runs / job.spec.name
    return metrics_endpoint(job.spec, run, ranks=ranks, started=STARTED, say=_say)


def _meet(job: _Job, node: Node, processes: int) -> tuple[Membership, Group, object]:
    cluster = job.spec.kubernetes
    seconds = cluster.meeting_seconds if cluster else MEETING_SECONDS
    secret = meeting_secret()
    if not secret and node.secret_name:
        made = secret_in(job.runs, node.secret_name, makes=node.index == 0, seconds=seconds)
        with made as secret:
            return _meet_with(job, node, processes, secret, seconds)
    if not secret and not is_loopback(node.address):
        _say(_OPEN.format(port=node.port))
    return _meet_with(job, node, processes, secret, seconds)


def _meet_with(
    job: _Job, node: Node, processes: int, secret: bytes, seconds: float
) -> tuple[Membership, Group, object]:
    digest = hashlib.sha256(dump_spec(job.spec).encode()).hexdigest()
    own = JoinRequest(node.index, node.nodes, processes, digest)
    _say(f"Node {node.index} of {node.nodes}, meeting at {node.address}:{node.port}.")
    place: dict[str, Any] = {"address": node.address, "port": node.port, "secret": secret}
    if node.index == 0:
        company = host(own, **place, seconds=seconds, say=_say)
        store, address, port = _store(company.own_address)
        company.begin(address, port)
    else:
        store = None
        company, (address, port) = join(own, **place, seconds=seconds, say=_say)
    here = {"local_index": node.local_index, "local_nodes": node.local_nodes}
    return company, Group(node.index, node.nodes, processes, address, port, **here), store


_OPEN = (
    "WARNING: no secret is given, so anyone who reaches port {port} of node 0 can join as a node. "
    "Give all nodes the same one: EVENSTEP_SECRET_FILE=<a file>, from `openssl rand -hex 32`."
)


def _store(address: str) -> tuple[object, str, int]:
    """The store through which the processes of all nodes find each other, and its address.

    It is new in every rendezvous, on a port that only connected nodes know, and on the interface
    over which they connected.
    """
    from launch.rank.store import own_store

    store = own_store(address)
    return store, address, store.port


class _Watch:
    """Ends the local processes after another node has ended, if they do not end by themselves."""

    def __init__(self, company: Membership, job: _Job, ranks: Collection[int]) -> None:
        self._company = company
        self._job = job
        self._ranks = ranks
        self._over = threading.Event()
        self._killed = False
        company.watch(self._when_lost, self._when_stopped)

    def outcome(self, code: int) -> int:
        """The exit code of this node, from that of its processes."""
        self.end()
        code = PeerLost.exit_code if self._killed else code
        if code == PeerLost.exit_code and self._company.lost is not None:
            _say(self._company.lost)
        return code

    def end(self) -> None:
        """The local processes have ended."""
        self._over.set()

    def _when_lost(self) -> None:
        from launch.processes.agent import of_ranks

        limit = TimeLimit(_PATIENCE_SECONDS)
        while limit.left:
            if self._over.wait(limit.look):
                return
            if self._some_save():
                limit = TimeLimit(_PATIENCE_SECONDS)
        self._killed = True
        kill_each(of_ranks())

    def _some_save(self) -> bool:
        from launch.processes.saving import some_save

        processes = {process.pid for process in psutil.Process().children(recursive=True)}
        return some_save(self._job, self._ranks, processes)

    def _when_stopped(self) -> None:
        """Stop the local processes: they may wait for ranks that the other node never started."""
        if not TimeLimit(_PATIENCE_SECONDS).wait(self._over.wait):
            os.kill(os.getpid(), signal.SIGTERM)


def kill_each(processes: Iterable[psutil.Process]) -> None:
    """Kill these processes; some die with one that was killed before."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()


@contextmanager
def _stop_raises() -> Iterator[None]:
    """Let a request to stop end the wait for other nodes; Ctrl-C does so without a handler.

    Process 1 of a pod ignores every signal without a handler. A signal that the process was told to
    ignore (SIGHUP under nohup) stays ignored. While the local processes run,
    `launch.processes.local` replaces this handler by its own.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        raise Stopped(f"Stopped by {name} before training started; nothing has changed.")

    before = {n: signal.getsignal(n) for n in STOP_SIGNALS if n != signal.SIGINT}
    followed = [n for n, handler in before.items() if handler is not signal.SIG_IGN]
    for number in followed:
        signal.signal(number, stop)
    try:
        if heard.signal_name is not None:  # while this module was being imported
            stop(signal.Signals[heard.signal_name], None)
        yield
    finally:
        for number in followed:
            signal.signal(number, before[number])


def _is_done(job: _Job) -> bool:
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


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
