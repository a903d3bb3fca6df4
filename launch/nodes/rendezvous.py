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
    Doorkeeper,
    Foreign,
    JoinRequest,
    Lines,
    Seal,
    answered,
)
from service.basics.errors import PeerLost, SpecError, Stopped
from service.basics.running_time import LOOK_SECONDS, RunningClock, TimeLimit

_CONNECT_SECONDS = 5.0
_INTRODUCTION_SECONDS = 10.0
"""Time limit for a connection to identify itself."""
_SEND_SECONDS = 5.0
_POLL_SECONDS = 0.25
_TELL_AFTER_SECONDS = 10.0
FAREWELL_SECONDS = 30.0
_ACCEPTED_AT_ONCE = 256
_MOST_UNKNOWN = 4096
_SPARE_FILES = 64
GOOD_ENDS = (0, 75)
"""Exit codes without a failure: the node is done, or stopped together with all others."""


@dataclass
class Peer:
    """The connection to another node."""

    index: int
    connection: socket.socket
    address: str
    seal: Seal
    lines: Lines = field(default_factory=Lines)
    unread: list[dict[str, Any]] = field(default_factory=list)
    """Messages that arrived together with an earlier one, for the next `hear`."""

    def __post_init__(self) -> None:
        self.connection.settimeout(_SEND_SECONDS)
        _keep_alive(self.connection)

    def say(self, message: dict[str, Any]) -> bool:
        """Send it; False if the other end is gone."""
        try:
            self.connection.sendall(self.seal.sealed(message))
        except OSError:
            return False
        return True

    def hear(self) -> list[dict[str, Any]] | None:
        """The received messages, when there is something to read; None if the other end is gone."""
        if self.unread:
            messages, self.unread = self.unread, []
            return messages
        try:
            piece = self.connection.recv(LINE_BYTES)
            return [self.seal.opened(line) for line in self.lines.fed(piece)] if piece else None
        except TimeoutError:
            return []
        except (OSError, Foreign):
            return None

    @property
    def own_address(self) -> str:
        """Address of this machine, on the interface to the other end."""
        return str(self.connection.getsockname()[0]).removeprefix("::ffff:")

    def hang_up(self) -> None:
        """Tell the other end that this one closes; its last message can still be read."""
        with suppress(OSError):  # the other end has already closed it
            self.connection.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self.connection.close()


class Membership:
    """The other nodes while the job runs: on node 0 all of them, on the others only node 0."""

    def __init__(self, friends: list[Peer]) -> None:
        self.friends = friends
        self.lost: str | None = None
        """A description of the node that was lost first."""
        self.lost_time: float | None = None
        """The time when this was detected, in seconds since the epoch."""
        self.farewells: dict[int, dict[str, Any] | None] = {}
        """The closing message of each node that has ended; None of one that is gone."""
        self._settled = threading.Event()
        self._all_ended = threading.Event()

    @property
    def own_address(self) -> str:
        """Address of this machine, on the interface to the other nodes.

        A node on the same machine may have connected through loopback, on which others cannot reach
        this one.
        """
        ends = [str(friend.connection.getsockname()[0]) for friend in self.friends]
        own = [end.removeprefix("::ffff:") for end in ends]
        return next((address for address in own if not is_loopback(address)), own[0])

    def begin(self, store_address: str, store_port: int) -> None:
        """Node 0: send all of them the address of the store.

        Raises:
            PeerLost: one of them has left in the meantime.
        """
        for friend in self.friends:
            if not friend.say({"store": store_port, "address": store_address}):
                raise PeerLost(_loss(friend, None))

    def watch(
        self, when_lost: Callable[[], None], when_stopped: Callable[[], None] = lambda: None
    ) -> None:
        """In background threads, call `when_lost` once if a node is lost or fails.

        And `when_stopped` once, when the first has ended because of a request to stop.
        """
        callbacks = (when_lost, when_stopped)
        threading.Thread(target=self._follow, args=callbacks, daemon=True).start()

    def await_ends(self, seconds: float) -> None:
        """Wait until every other node has sent its closing message or is gone, at most so long."""
        TimeLimit(seconds).wait(self._all_ended.wait)

    def part(self, code: int, **more: bool) -> None:
        """Send the exit code of this node, and wait until the other nodes have ended as well.

        Node 0's store must outlive the processes that use it; processes do not wait for a node that
        has failed.
        """
        for friend in self.friends:
            friend.say({"end": code, **more})
        if code in GOOD_ENDS and self.lost is None:
            TimeLimit(FAREWELL_SECONDS).wait(self._settled.wait)
        for friend in self.friends:
            friend.close()

    def _follow(self, when_lost: Callable[[], None], when_stopped: Callable[[], None]) -> None:
        """Wait until each node has sent its closing message, or is gone."""
        stopped = False
        with selectors.DefaultSelector() as events:
            for friend in self.friends:
                events.register(friend.connection, selectors.EVENT_READ, friend)
            while len(self.farewells) < len(self.friends):
                unread = [friend for friend in self.friends if friend.unread]
                for friend in unread or [key.data for key, _ in events.select()]:
                    heard = friend.hear()
                    if heard == []:
                        continue
                    end = heard[0].get("end") if heard else None
                    events.unregister(friend.connection)
                    self.farewells[friend.index] = heard[0] if heard else None
                    if end not in GOOD_ENDS:
                        self._lose(friend, end, when_lost)
                    elif end == Stopped.exit_code and not stopped:
                        stopped = True
                        threading.Thread(target=when_stopped, daemon=True).start()
        self._settled.set()
        self._all_ended.set()

    def _lose(self, friend: Peer, end: Any, when_lost: Callable[[], None]) -> None:
        if self.lost is not None:  # only the first is the reason
            return
        self.lost, self.lost_time = _loss(friend, end), time.time()
        self._settled.set()
        for other in self.friends:  # they are connected only to node 0
            if other is not friend:  # it may hear, although it has hung up
                other.hang_up()
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
    waiting = Patience(seconds, say)
    with listen(address, port) as door, selectors.DefaultSelector() as events:
        hall = Hall(own, secret, door, events, say)
        while len(hall.friends) < own.nodes - 1:
            reason = hall.missing(port)
            if not waiting.goes_on(
                f"{reason}. Check its pod or task: has it started, does its image exist"
            ):
                hall.close()
                raise PeerLost(f"After {seconds:g} s {reason}.")
            hall.look()
        hall.send_away()
    return Membership([hall.friends[index] for index in sorted(hall.friends)])


@dataclass
class _Unknown:
    """A connection that has not identified itself yet."""

    connection: socket.socket
    address: str
    doorkeeper: Doorkeeper
    until: float
    lines: Lines = field(default_factory=Lines)


class Hall:
    """All connections to node 0, in one loop: nodes that wait, and those not yet identified."""

    def __init__(
        self,
        own: JoinRequest,
        secret: bytes,
        door: socket.socket,
        events: selectors.BaseSelector,
        say: Callable[[str], None],
    ) -> None:
        self._own, self._secret, self._say = own, secret, say
        self.generation = own.generation
        """The highest that a node has belonged to."""
        self._clock = RunningClock()
        self._door, self._events = door, events
        self._most_unknown = _room_for(own.nodes)
        self._unknown: dict[socket.socket, _Unknown] = {}  # ordered by arrival
        self.friends: dict[int, Peer] = {}
        self.strangers = 0
        """How many connections were dropped."""
        door.setblocking(False)
        events.register(door, selectors.EVENT_READ)

    def missing(self, port: int) -> str:
        """A description of the missing nodes."""
        missing = [str(n) for n in range(1, self._own.nodes) if n not in self.friends]
        several = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
        told = (
            f"node {', '.join(missing[:8])}{several} of {self._own.nodes} did not connect to port "
        )
        dropped = (
            f" ({self.strangers} others connected, without its secret)" if self.strangers else ""
        )
        return f"{told}{port}{dropped}"

    def look(self) -> None:
        """Process incoming messages for a moment."""
        for key, _ in self._events.select(_POLL_SECONDS):
            if key.fileobj is self._door:
                self._let_in()
            elif isinstance(key.data, Peer):
                # A waiting peer can send only one thing: that it leaves.
                self._forget(key.data)
            elif key.fileobj in self._unknown:  # otherwise it was dropped in this round
                self._hear(key.data)
        now = self._clock()
        while self._unknown and next(iter(self._unknown.values())).until < now:
            self._drop(next(iter(self._unknown.values())))

    def taken(self, indexes: Iterable[int]) -> list[Peer]:
        """The peers of these waiting nodes, which wait no longer."""
        found = [self.friends.pop(index) for index in sorted(indexes)]
        for friend in found:
            self._events.unregister(friend.connection)
        return found

    def close(self, **last_message: int) -> None:
        """Close all connections."""
        self.send_away()
        for friend in self.friends.values():
            if last_message:
                friend.say(last_message)
            friend.close()

    def send_away(self) -> None:
        """Close the unidentified connections, because all nodes are connected."""
        for unknown in list(self._unknown.values()):
            self._drop(unknown)
        if self.strangers > 1:
            self._say(
                f"{self.strangers} connections were not from nodes of this job; they were dropped."
            )

    def _let_in(self) -> None:
        for _ in range(_ACCEPTED_AT_ONCE):
            try:
                connection, address = self._door.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE) and self._unknown:
                    self._drop(next(iter(self._unknown.values())))
                    continue
                return  # it has disconnected
            if len(self._unknown) >= self._most_unknown:
                self._drop(next(iter(self._unknown.values())))
            connection.setblocking(False)
            unknown = _Unknown(
                connection,
                str(address[0]).removeprefix("::ffff:"),
                Doorkeeper(self._secret),
                self._clock() + _INTRODUCTION_SECONDS,
            )
            self._unknown[connection] = unknown
            self._events.register(connection, selectors.EVENT_READ, unknown)
            try:
                connection.send(unknown.doorkeeper.challenge())
            except OSError:
                self._drop(unknown)

    def _hear(self, unknown: _Unknown) -> None:
        try:
            piece = unknown.connection.recv(LINE_BYTES)
            lines = unknown.lines.fed(piece)
            if not piece or len(lines) > 1:
                raise Foreign("it disconnected, or sent too much")
            if not lines:
                return
            other, seal = unknown.doorkeeper.introduced(lines[0])
        except BlockingIOError:
            return
        except (OSError, Foreign):
            self._drop(unknown)
            return
        self._welcome(unknown, other, seal)

    def _welcome(self, unknown: _Unknown, other: JoinRequest, seal: Seal) -> None:
        self._release(unknown)
        friend = Peer(other.index, unknown.connection, unknown.address, seal)
        difference = _difference(self._own, other)
        if difference is not None and self._own.is_elastic:  # the job can do without it
            self._say(f"{difference} It was refused.")
            friend.say({"refused": difference})
            friend.close()
            return
        if difference is not None:
            for each in [friend, *self.friends.values()]:
                each.say({"refused": difference})
                each.close()
            self.friends.clear()
            self.close()
            raise SpecError(difference)
        if not 0 < other.index < self._own.nodes:
            friend.close()
            self._count(unknown)
            return
        if other.index in self.friends:  # a node that connects again has restarted
            self._forget(self.friends[other.index])
        self.friends[other.index] = friend
        self._events.register(friend.connection, selectors.EVENT_READ, friend)
        self.generation = max(self.generation, other.generation)
        if self._own.is_elastic:
            friend.say({"waiting": True})

    def _forget(self, friend: Peer) -> None:
        if self.friends.get(friend.index) is friend:
            self._events.unregister(friend.connection)
            self.friends.pop(friend.index).close()

    def _release(self, unknown: _Unknown) -> None:
        self._events.unregister(unknown.connection)
        del self._unknown[unknown.connection]

    def _drop(self, unknown: _Unknown) -> None:
        self._release(unknown)
        unknown.connection.close()
        self._count(unknown)

    def _count(self, unknown: _Unknown) -> None:
        self.strangers += 1
        if self.strangers == 1:
            self._say(
                f"A connection from {unknown.address} did not authenticate in time as a node of "
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
    wanted = needed + min(nodes + _SPARE_FILES, _MOST_UNKNOWN)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    room = _MOST_UNKNOWN if soft == resource.RLIM_INFINITY else soft - needed
    if room < 1:
        raise SpecError(
            f"PET_NNODES={nodes}: node 0 needs a connection to each, and may open {soft} files "
            f"(ulimit -Hn). Let it open {wanted}."
        )
    return min(room, _MOST_UNKNOWN)


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
            (address, port), family=family, dualstack_ipv6=both, backlog=_MOST_UNKNOWN
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
    friend, answer = enter(own, **place, seconds=seconds, say=say)
    return Membership([friend]), (str(answer["address"]), int(answer["store"]))


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
        PeerLost: node 0 was not found, or did not start, in time.
    """
    waiting = Patience(seconds, say)
    reason = ""
    while waiting.goes_on(reason):
        try:
            connection = socket.create_connection((address, port), timeout=_CONNECT_SECONDS)
        except OSError as error:
            reason = _unreachable(address, port, error)
            time.sleep(_POLL_SECONDS)
            continue
        friend = _introduce(own, secret, connection, address, waiting.left)
        if friend is not None:
            answer = _heard(friend, waiting)
            if answer and "refused" in answer:
                friend.close()
                raise SpecError(str(answer["refused"]))
            if answer and ("store" in answer or "end" in answer):
                return friend, answer
            friend.close()
            if answer:  # it waited, perhaps for hours, and node 0 is gone
                waiting = Patience(seconds, say)
        reason = (
            f"node 0 at {address}:{port} closed the connection before all nodes were connected. It "
            "exited, or has another secret: give all nodes the same EVENSTEP_SECRET_FILE"
        )
        time.sleep(_POLL_SECONDS)
    raise PeerLost(f"After {seconds:g} s {reason}.")


def _introduce(
    own: JoinRequest, secret: bytes, connection: socket.socket, address: str, seconds: float
) -> Peer | None:
    """Answer node 0's challenge; None if the listener is not node 0, or too slow."""
    lines = Lines()
    first: list[bytes] = []
    # For all of it: a listener that sends a byte now and then must not hold up this node.
    limit = TimeLimit(min(_INTRODUCTION_SECONDS, seconds))
    try:
        while not first:
            if not limit.left:
                raise Foreign("it is too slow")
            connection.settimeout(max(0.1, limit.left))
            piece = connection.recv(LINE_BYTES)
            if not piece:
                raise Foreign("it closed")
            first = lines.fed(piece)
        answer, seal = answered(first[0], own, secret)
        connection.sendall(answer)
    except (OSError, Foreign):
        connection.close()
        return None
    return Peer(0, connection, address, seal, lines)


def _heard(friend: Peer, waiting: Patience) -> dict[str, Any] | None:
    """The message of node 0 when all nodes are connected; None if time is up.

    If it is lost: its last message, that this node waits, if there was one.
    """
    last: dict[str, Any] | None = None
    with selectors.DefaultSelector() as events:
        events.register(friend.connection, selectors.EVENT_READ)
        while last or waiting.left:
            if not events.select(LOOK_SECONDS if last else waiting.look):
                continue
            heard = friend.hear()
            if heard is None:
                break
            while heard:
                last, *heard = heard
                if "waiting" not in last:
                    friend.unread = heard
                    return last
    return last


class Patience:
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


def _difference(own: JoinRequest, other: JoinRequest) -> str | None:
    for name, what in (("range", "PET_NNODES"), ("processes", "PET_NPROC_PER_NODE")):
        ours, theirs = getattr(own, name), getattr(other, name)
        if ours != theirs:
            return (
                f"{what} is {ours} on node 0 and {theirs} on node {other.index}: make them equal."
            )
    if own.spec != other.spec:
        return f"Node {other.index} has a different spec than node 0: start all with the same spec."
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


def _loss(friend: Peer, end: Any) -> str:
    if isinstance(end, int):
        return f"Node {friend.index} ({friend.address}) has ended with exit code {end}."
    return f"Node {friend.index} ({friend.address}) is gone."
