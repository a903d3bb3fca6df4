"""Rendezvous of the nodes of a job, and the connections between them while it runs.

Node 0 listens; the other nodes connect and prove that they know the job's secret
(`launch.nodes.handshake`). When all are connected, node 0 sends them the address of its store, and
stops listening: a pod that replaces a lost one is refused until there is
a new rendezvous, and so can never join a group that is shutting down. The connections stay open: if
one ends without a closing message, the node is gone, which a GPU library alone might detect only
after many minutes.

Other connections are closed and counted, and delay nobody: all connections are read in one
loop, each has a few seconds and bytes to authenticate, and none is waited for. No torch.
"""

from __future__ import annotations

import errno
import resource
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import psutil  # type: ignore[import-untyped]  # its wheel has no types

from launch.nodes.handshake import (
    LINE_BYTES,
    Authenticator,
    JoinRequest,
    Lines,
    OtherVersion,
    Seal,
    Unauthenticated,
    answered,
    launcher_in_words,
)
from service.basics.errors import PeerLost, SpecError, Stopped, printable
from service.basics.running_time import LOOK_SECONDS, RunningClock, TimeLimit

_CONNECT_SECONDS = 5.0
_AUTHENTICATION_SECONDS = 10.0
"""Time limit for a connection to identify itself."""
_SEND_SECONDS = 5.0
_POLL_SECONDS = 0.25
_TELL_AFTER_SECONDS = 10.0
CLOSING_SECONDS = 30.0
_ACCEPTED_AT_ONCE = 256
_MOST_PENDING = 4096
_SPARE_FILES = 64
GOOD_ENDS = (0, 75)
"""Exit codes without a failure: the node is done, or stopped together with all others."""


_ONE_EACH = "Each node needs its own number: PET_NODE_RANK."


class Replaced(SpecError):
    """Another launcher has connected with the index of this node."""


@dataclass
class Peer:
    """The connection to another node."""

    index: int
    connection: socket.socket
    address: str
    seal: Seal
    lines: Lines = field(default_factory=Lines)
    unread: list[dict[str, Any]] = field(default_factory=list)
    """Messages that arrived together with an earlier one, for the next `receive`."""
    launcher: str = ""
    """As it is in its request to join."""

    def __post_init__(self) -> None:
        self.connection.settimeout(_SEND_SECONDS)
        _keep_alive(self.connection)

    def send(self, message: dict[str, Any]) -> bool:
        """Send it; False if the other end is gone."""
        try:
            self.connection.sendall(self.seal.sealed(message))
        except OSError:
            return False
        return True

    def receive(self) -> list[dict[str, Any]] | None:
        """The received messages, when there is something to read; None if the other end is gone."""
        if self.unread:
            messages, self.unread = self.unread, []
            return messages
        try:
            piece = self.connection.recv(LINE_BYTES)
            return [self.seal.opened(line) for line in self.lines.fed(piece)] if piece else None
        except TimeoutError:
            return []
        except (OSError, Unauthenticated):
            return None

    @property
    def own_address(self) -> str:
        """Address of this machine, on the interface to the other end."""
        return str(self.connection.getsockname()[0]).removeprefix("::ffff:")

    @property
    def in_words(self) -> str:
        """Its launcher, and from where it has connected."""
        return f"{launcher_in_words(self.launcher)}, from {self.address}"

    def shut_down(self) -> None:
        """Tell the other end that this one closes; its last message can still be read."""
        with suppress(OSError):  # the other end has already closed it
            self.connection.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self.connection.close()


class Membership:
    """The other nodes while the job runs: on node 0 all of them, on the others only node 0."""

    def __init__(self, peers: list[Peer]) -> None:
        self.peers = peers
        self.lost: str | None = None
        """A description of the node that was lost first."""
        self.lost_time: float | None = None
        """The time when this was detected, in seconds since the epoch."""
        self.closing_messages: dict[int, dict[str, Any] | None] = {}
        """The closing message of each node that has ended; None of one that is gone."""
        self._settled = threading.Event()
        self._all_ended = threading.Event()
        self._is_watched = False

    @property
    def own_address(self) -> str:
        """Address of this machine, on the interface to the other nodes.

        A node on the same machine may have connected through loopback, on which others cannot reach
        this one.
        """
        ends = [str(peer.connection.getsockname()[0]) for peer in self.peers]
        own = [end.removeprefix("::ffff:") for end in ends]
        return next((address for address in own if not is_loopback(address)), own[0])

    def begin(self, store_address: str, store_port: int) -> None:
        """Node 0: send all of them the address of the store.

        Raises:
            PeerLost: one of them has left in the meantime.
        """
        for peer in self.peers:
            if not peer.send({"store": store_port, "address": store_address}):
                raise PeerLost(_loss(peer, None))

    def watch(
        self, when_lost: Callable[[], None], when_stopped: Callable[[], None] = lambda: None
    ) -> None:
        """In background threads, call `when_lost` once if a node is lost or fails.

        And `when_stopped` once, when the first has ended because of a request to stop.
        """
        self._is_watched = True
        callbacks = (when_lost, when_stopped)
        threading.Thread(target=self._follow, args=callbacks, daemon=True).start()

    def await_news(self, seconds: float) -> None:
        """Wait until another node is lost, or all have ended, at most so long."""
        TimeLimit(seconds).wait(self._settled.wait)

    def await_ends(self, seconds: float) -> None:
        """Wait until every other node has sent its closing message or is gone, at most so long."""
        TimeLimit(seconds).wait(self._all_ended.wait)

    def leave(self, code: int, **more: bool) -> None:
        """Send the exit code of this node, and wait until the other nodes have ended as well.

        Node 0's store must outlive the processes that use it; processes do not wait for a node that
        has failed.
        """
        for peer in self.peers:
            peer.send({"end": code, **more})
        if code in GOOD_ENDS and self.lost is None and self._is_watched:
            TimeLimit(CLOSING_SECONDS).wait(self._settled.wait)
        for peer in self.peers:
            peer.close()

    def _follow(self, when_lost: Callable[[], None], when_stopped: Callable[[], None]) -> None:
        """Wait until each node has sent its closing message, or is gone."""
        stopped = False
        with selectors.DefaultSelector() as events:
            for peer in self.peers:
                events.register(peer.connection, selectors.EVENT_READ, peer)
            while len(self.closing_messages) < len(self.peers):
                unread = [peer for peer in self.peers if peer.unread]
                for peer in unread or [key.data for key, _ in events.select()]:
                    heard = peer.receive()
                    if heard == []:
                        continue
                    end = heard[0].get("end") if heard else None
                    events.unregister(peer.connection)
                    self.closing_messages[peer.index] = heard[0] if heard else None
                    if end not in GOOD_ENDS:
                        self._lose(peer, end, when_lost)
                    elif end == Stopped.exit_code and not stopped:
                        stopped = True
                        threading.Thread(target=when_stopped, daemon=True).start()
        self._settled.set()
        self._all_ended.set()

    def _lose(self, peer: Peer, end: Any, when_lost: Callable[[], None]) -> None:
        if self.lost is not None:  # only the first is the reason
            return
        self.lost, self.lost_time = _loss(peer, end), time.time()
        self._settled.set()
        for other in self.peers:  # they are connected only to node 0
            if other is not peer:  # it may hear, although it has shut down its side
                other.shut_down()
        threading.Thread(target=when_lost, daemon=True).start()


# ---- node 0


def host(
    own: JoinRequest,
    *,
    port: int,
    seconds: float,
    say: Callable[[str], None],
    secret: bytes = b"",
    address: str = "",
) -> Membership:
    """Node 0: wait until all other nodes are connected. They then wait for `Membership.begin`.

    Args:
        secret: every node must prove that it knows it; empty: any connection can be a node.
        address: the address of this node for the others; if it is local, only it is listened on.
    Raises:
        SpecError: the port is taken, or the nodes have different configurations.
        PeerLost: not all of them connected in time.
    """
    waiting = Deadline(seconds, say)
    with listen(address, port) as listener, selectors.DefaultSelector() as events:
        server = RendezvousServer(own, secret, listener, events, say)
        while len(server.peers) < own.nodes - 1:
            reason = server.missing(port)
            if not waiting.goes_on(
                f"{reason}. Check its pod or task: has it started, does its image exist"
            ):
                server.close()
                raise PeerLost(f"After {seconds:g} s {reason}.")
            server.look()
        server.close_pending()
    return Membership([server.peers[index] for index in sorted(server.peers)])


@dataclass
class _Pending:
    """A connection that has not identified itself yet."""

    connection: socket.socket
    address: str
    authenticator: Authenticator
    until: float
    lines: Lines = field(default_factory=Lines)


class RendezvousServer:
    """All connections to node 0, in one loop: nodes that wait, and those not yet identified."""

    def __init__(
        self,
        own: JoinRequest,
        secret: bytes,
        listener: socket.socket,
        events: selectors.BaseSelector,
        say: Callable[[str], None],
    ) -> None:
        self._own, self._secret, self._say = own, secret, say
        self.generation = own.generation
        """The highest that a node has belonged to."""
        self._clock = RunningClock()
        self._listener, self._events = listener, events
        self._most_pending = _room_for(own.nodes)
        self._pending: dict[socket.socket, _Pending] = {}  # ordered by arrival
        self.peers: dict[int, Peer] = {}
        self._members: dict[int, Peer] = {}
        self.dropped = 0
        """How many connections were dropped."""
        listener.setblocking(False)
        events.register(listener, selectors.EVENT_READ)

    def missing(self, port: int) -> str:
        """A description of the missing nodes."""
        missing = [str(n) for n in range(1, self._own.nodes) if n not in self.peers]
        several = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
        told = (
            f"node {', '.join(missing[:8])}{several} of {self._own.nodes} did not connect to port "
        )
        dropped = f" ({self.dropped} others connected, without its secret)" if self.dropped else ""
        return f"{told}{port}{dropped}"

    def look(self) -> None:
        """Process incoming messages for a moment."""
        for key, _ in self._events.select(_POLL_SECONDS):
            if key.fileobj is self._listener:
                self._accept()
            elif isinstance(key.data, Peer):
                # A waiting peer can send only one thing: that it leaves.
                self._forget(key.data)
            elif key.fileobj in self._pending:  # otherwise it was dropped in this round
                self._receive(key.data)
        now = self._clock()
        while self._pending and next(iter(self._pending.values())).until < now:
            self._drop(next(iter(self._pending.values())))

    def taken(self, indexes: Iterable[int]) -> list[Peer]:
        """The peers of these waiting nodes, which wait no longer."""
        found = [self.peers.pop(index) for index in sorted(indexes)]
        for peer in found:
            self._events.unregister(peer.connection)
        self._members = {peer.index: peer for peer in found}
        return found

    def close(self, **last_message: int) -> None:
        """Close all connections."""
        self.close_pending()
        for peer in self.peers.values():
            if last_message:
                peer.send(last_message)
            peer.close()

    def close_pending(self) -> None:
        """Close the unidentified connections, because all nodes are connected."""
        for pending in list(self._pending.values()):
            self._drop(pending)
        if self.dropped > 1:
            self._say(
                f"{self.dropped} connections were not from nodes of this job; they were dropped."
            )

    def _accept(self) -> None:
        for _ in range(_ACCEPTED_AT_ONCE):
            try:
                connection, address = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE) and self._pending:
                    self._drop(next(iter(self._pending.values())))
                    continue
                return  # it has disconnected
            if len(self._pending) >= self._most_pending:
                self._drop(next(iter(self._pending.values())))
            connection.setblocking(False)
            pending = _Pending(
                connection,
                str(address[0]).removeprefix("::ffff:"),
                Authenticator(self._secret),
                self._clock() + _AUTHENTICATION_SECONDS,
            )
            self._pending[connection] = pending
            self._events.register(connection, selectors.EVENT_READ, pending)
            try:
                connection.send(pending.authenticator.challenge())
            except OSError:
                self._drop(pending)

    def _receive(self, pending: _Pending) -> None:
        try:
            piece = pending.connection.recv(LINE_BYTES)
            lines = pending.lines.fed(piece)
            if not piece or len(lines) > 1:
                raise Unauthenticated("it disconnected, or sent too much")
            if not lines:
                return
            other, seal = pending.authenticator.authenticated(lines[0])
        except BlockingIOError:
            return
        except (OSError, Unauthenticated):
            self._drop(pending)
            return
        except OtherVersion as unknown:
            self._release(pending)
            peer = Peer(0, pending.connection, pending.address, unknown.seal)
            self._refuse(peer, _OF_ANOTHER_VERSION.format(f"The node at {pending.address}"))
            return
        self._admit(pending, other, seal)

    def _refuse(self, peer: Peer, difference: str) -> None:
        """Tell a node that it differs; unless the job can do without it, the job ends.

        Raises:
            SpecError: the job ends.
        """
        if self._own.is_elastic:
            self._say(f"{difference} It was refused.")
            peer.send({"refused": difference})
            peer.close()
            return
        for each in [peer, *self.peers.values()]:
            each.send({"refused": difference})
            each.close()
        self.peers.clear()
        self.close()
        raise SpecError(difference)

    def _admit(self, pending: _Pending, other: JoinRequest, seal: Seal) -> None:
        self._release(pending)
        peer = Peer(other.index, pending.connection, pending.address, seal, launcher=other.launcher)
        difference = _difference(self._own, other)
        if difference is not None:
            self._refuse(peer, difference)
            return
        if not 0 < other.index < self._own.nodes:
            peer.close()
            self._count(pending)
            return
        self._replace(peer)
        self._events.register(peer.connection, selectors.EVENT_READ, peer)
        self.generation = max(self.generation, other.generation)
        if self._own.is_elastic:
            member = self._members.get(peer.index)
            is_other = member is not None and member.launcher != peer.launcher
            held = {"member": member.in_words} if member is not None and is_other else {}
            peer.send({"waiting": True, **held})

    def _replace(self, peer: Peer) -> None:
        """Let a node wait; an earlier connection of this node ends, whose launcher has restarted.

        Another launcher that is still alive is told, or each of the two would replace the other
        again and again.
        """
        held = self.peers.get(peer.index)
        if held is not None:
            if held.launcher != peer.launcher:
                told = f"Another launcher has connected as node {peer.index}: {peer.in_words}."
                self._say(f"{told} It replaces {held.in_words}.")
                held.send({"replaced": told})
            self._forget(held)
        self.peers[peer.index] = peer

    def _forget(self, peer: Peer) -> None:
        if self.peers.get(peer.index) is peer:
            self._events.unregister(peer.connection)
            self.peers.pop(peer.index).close()

    def _release(self, pending: _Pending) -> None:
        self._events.unregister(pending.connection)
        del self._pending[pending.connection]

    def _drop(self, pending: _Pending) -> None:
        self._release(pending)
        pending.connection.close()
        self._count(pending)

    def _count(self, pending: _Pending) -> None:
        self.dropped += 1
        if self.dropped == 1:
            self._say(
                f"A connection from {pending.address} did not authenticate in time as a node of "
                f"this job, "
                "with the secret; it was dropped. Further ones are only counted."
            )


def _room_for(nodes: int) -> int:
    """The maximum number of unauthenticated connections; raises the limit of open files if needed.

    Raises:
        SpecError: the limit is too low even for the nodes.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = psutil.Process().num_fds() + nodes + _SPARE_FILES
    wanted = needed + min(nodes + _SPARE_FILES, _MOST_PENDING)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    room = _MOST_PENDING if soft == resource.RLIM_INFINITY else soft - needed
    if room < 1:
        raise SpecError(
            f"PET_NNODES={nodes}: node 0 needs a connection to each, and may open {soft} files "
            f"(ulimit -Hn). Let it open {wanted}."
        )
    return min(room, _MOST_PENDING)


def is_loopback(address: str) -> bool:
    """Whether an address is a loopback address."""
    return address in ("localhost", "::1") or address.startswith("127.")


def _own_interface(address: str) -> str:
    """The address on which node 0 listens: the given one if it is local; empty: all interfaces.

    The name may resolve to loopback on this machine, by /etc/hosts, while others resolve it to
    another address: so loopback is used only if it was given as such.
    """
    if is_loopback(address):
        return "127.0.0.1" if address == "localhost" else address
    try:
        found = [str(info[4][0]) for info in socket.getaddrinfo(address or None, 0)]
    except OSError:
        return ""  # its name may be registered later
    own = {each.address for interface in psutil.net_if_addrs().values() for each in interface}
    return next((each for each in found if each in own and not is_loopback(each)), "")


def listen(address: str, port: int) -> socket.socket:
    """The socket to which the other nodes connect.

    Args:
        address: the address of this node for the others; if it is local, only it is listened on.
    Raises:
        SpecError: the port is taken, or cannot be listened on.
    """
    address = _own_interface(address)
    both = not address and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both or ":" in address else socket.AF_INET
    try:
        return socket.create_server(
            (address, port), family=family, dualstack_ipv6=both, backlog=_MOST_PENDING
        )
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise SpecError(
                f"PET_MASTER_PORT: this machine cannot listen on port {port} of "
                f"{address or 'all its addresses'}: {error.strerror or error}. If it is the "
                "port, choose another, from 1024 on: that variable, or kubernetes.port in the spec."
            ) from error
        raise SpecError(
            f"PET_MASTER_PORT: another program listens on port {port} of this machine. Choose "
            "another: that variable, or kubernetes.port in the spec."
        ) from error


# ---- any other node


def join(
    own: JoinRequest,
    *,
    address: str,
    port: int,
    seconds: float,
    say: Callable[[str], None],
    secret: bytes = b"",
) -> tuple[Membership, tuple[str, int]]:
    """Connect to node 0 and wait for the other nodes; return where its store is.

    Raises:
        SpecError: the nodes have different configurations.
        PeerLost: node 0 was not found, or did not start, in time.
    """
    place: dict[str, Any] = {"address": address, "port": port, "secret": secret}
    peer, answer = enter(own, **place, seconds=seconds, say=say)
    return Membership([peer]), (str(answer["address"]), int(answer["store"]))


def enter(
    own: JoinRequest,
    *,
    address: str,
    port: int,
    seconds: float,
    say: Callable[[str], None],
    secret: bytes = b"",
) -> tuple[Peer, dict[str, Any]]:
    """The connection to node 0, and its message when the nodes begin, or when the job has ended.

    Once node 0 of an elastic job has let this node wait, the wait has no limit.

    Raises:
        SpecError: the nodes have different configurations.
        Replaced: another launcher has connected as this node.
        PeerLost: node 0 was not found, or did not start, in time.
    """
    waiting = Deadline(seconds, say)
    reason = ""
    while waiting.goes_on(reason):
        try:
            connection = socket.create_connection((address, port), timeout=_CONNECT_SECONDS)
        except OSError as error:
            reason = _unreachable(address, port, error)
            time.sleep(_POLL_SECONDS)
            continue
        peer = _authenticate(own, secret, connection, address, waiting.left)
        if peer is not None:
            answer = _heard(peer, waiting, own.index, say)
            if answer and "refused" in answer:
                peer.close()
                raise SpecError(str(answer["refused"]))
            if answer and "replaced" in answer:
                peer.close()
                raise Replaced(f"{printable(str(answer['replaced']))} {_ONE_EACH}")
            if answer and ("store" in answer or "end" in answer):
                return peer, answer
            peer.close()
            if answer:  # it waited, perhaps for hours, and node 0 is gone
                waiting = Deadline(seconds, say)
        reason = (
            f"node 0 at {address}:{port} closed the connection before all nodes were connected. It "
            "exited, or has another secret: give all nodes the same EVENSTEP_SECRET_FILE"
        )
        time.sleep(_POLL_SECONDS)
    raise PeerLost(f"After {seconds:g} s {reason}.")


def _authenticate(
    own: JoinRequest, secret: bytes, connection: socket.socket, address: str, seconds: float
) -> Peer | None:
    """Answer node 0's challenge; None if the listener is not node 0, or too slow."""
    lines = Lines()
    first: list[bytes] = []
    # For all of it: a listener that sends a byte now and then must not hold up this node.
    limit = TimeLimit(min(_AUTHENTICATION_SECONDS, seconds))
    try:
        while not first:
            if not limit.left:
                raise Unauthenticated("it is too slow")
            connection.settimeout(max(0.1, limit.left))
            piece = connection.recv(LINE_BYTES)
            if not piece:
                raise Unauthenticated("it closed")
            first = lines.fed(piece)
        answer, seal = answered(first[0], own, secret)
        connection.sendall(answer)
    except (OSError, Unauthenticated):
        connection.close()
        return None
    return Peer(0, connection, address, seal, lines)


def _heard(
    peer: Peer, waiting: Deadline, index: int, say: Callable[[str], None]
) -> dict[str, Any] | None:
    """The message of node 0 when all nodes are connected; None if time is up.

    If it is lost: its last message, that this node waits, if there was one.
    """
    last: dict[str, Any] | None = None
    with selectors.DefaultSelector() as events:
        events.register(peer.connection, selectors.EVENT_READ)
        while last or waiting.left:
            if not events.select(LOOK_SECONDS if last else waiting.look):
                continue
            heard = peer.receive()
            if heard is None:
                break
            while heard:
                last, *heard = heard
                if "waiting" not in last:
                    peer.unread = heard
                    return last
                if "member" in last:
                    say(
                        f"Node {index} of this job is {printable(str(last['member']))}. This "
                        f"launcher waits, and takes its place if it is lost. {_ONE_EACH}"
                    )
    return last


class Deadline:
    """A deadline, and one log line if the wait is long."""

    def __init__(self, seconds: float, say: Callable[[str], None]) -> None:
        self._limit = TimeLimit(seconds)
        self._seconds = seconds
        self._say: Callable[[str], None] | None = say

    @property
    def left(self) -> float:
        return self._limit.left

    @property
    def look(self) -> float:
        return self._limit.look

    def goes_on(self, reason: str) -> bool:
        if self._say and reason and self._seconds - self.left > _TELL_AFTER_SECONDS:
            self._say(f"Waiting: {reason}.")
            self._say = None
        return self.left > 0


_OF_ANOTHER_VERSION = "{} has another version of evenstep than node 0: install the same on all."


def _difference(own: JoinRequest, other: JoinRequest) -> str | None:
    if own.version != other.version:
        return _OF_ANOTHER_VERSION.format(f"Node {other.index}")
    for name, what in (("range", "PET_NNODES"), ("processes", "PET_NPROC_PER_NODE")):
        ours, theirs = getattr(own, name), getattr(other, name)
        if ours != theirs:
            return (
                f"{what} is {ours} on node 0 and {theirs} on node {other.index}: make them equal."
            )
    if own.spec != other.spec:
        return f"Node {other.index} has a different spec than node 0: start all with the same spec."
    if own.options != other.options:
        ours, theirs = (each.options or "no such option" for each in (own, other))
        return (
            f"Node {other.index} was started with {theirs}, and node 0 with {ours}: start all with "
            "the same command."
        )
    if own.runs != other.runs:
        kept = "in a store" if own.runs else "in a directory"
        return (
            f"--runs: node 0 keeps the runs {kept}, and node {other.index} elsewhere. Give all "
            "nodes the same --runs."
        )
    return None


def _unreachable(address: str, port: int, error: OSError) -> str:
    """Why node 0 cannot be reached, and what to check."""
    if isinstance(error, socket.gaierror):
        return (
            f"node 0's name {address} cannot be resolved ({error.strerror}). A pod's name exists "
            f"once it has "
            "an address; if this continues, check the headless Service with "
            "publishNotReadyAddresses and the Job's subdomain. Elsewhere set PET_MASTER_ADDR "
            "to a name or address that all nodes can resolve"
        )
    if isinstance(error, ConnectionRefusedError):
        return f"node 0 does not listen at {address}:{port}; check its log"
    return (
        f"node 0 does not respond at {address}:{port} ({error.strerror or error}); if its pod "
        "is running, check the NetworkPolicy"
    )


def _keep_alive(connection: socket.socket) -> None:
    """Enable keepalives, which detect a machine without power within half a minute."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, option):  # outside Linux it may be missing
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def _loss(peer: Peer, end: Any) -> str:
    if isinstance(end, int):
        return f"Node {peer.index} ({peer.address}) has ended with exit code {end}."
    return f"Node {peer.index} ({peer.address}) is gone."
