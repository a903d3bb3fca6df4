"""Where the nodes of a job meet before they train, and hold on to each other while they do.

Node 0 listens, the others come. Each says who it is; when all are there, node 0 tells them where
its store is, and stops listening: whoever comes later, a pod that replaces a lost one, finds a
closed door until there is a new meeting, and so can never join one that is breaking up. The
connections stay: one that ends without a farewell is a node that is gone, which a GPU
library alone might notice after many minutes. No torch.
"""

from __future__ import annotations

import errno
import json
import selectors
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from service.errors import PeerLost, SpecError

_LINE_BYTES = 65536
_CONNECT_SECONDS = 5.0
_POLL_SECONDS = 0.25
_TELL_AFTER_SECONDS = 10.0
_FAREWELL_SECONDS = 30.0
GOOD_ENDS = (0, 75)
"""With these a node has not failed: it is done, or stopped as all of them are stopping."""


@dataclass(frozen=True)
class Introduction:
    """What a node says of itself; everything but the index is equal on all of them."""

    index: int
    nodes: int
    processes: int
    spec: str
    """A digest."""


@dataclass
class Friend:
    """The connection to another node."""

    index: int
    connection: socket.socket
    address: str

    def say(self, message: dict[str, Any]) -> bool:
        """Send it; False when the other end is gone."""
        try:
            self.connection.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            return False
        return True

    def hear(self, seconds: float | None) -> dict[str, Any] | None:
        """The next message, or None when the other end is gone.

        Raises:
            TimeoutError: nothing came in time.
        """
        self.connection.settimeout(seconds)
        line = b""
        try:
            while not line.endswith(b"\n"):
                byte = self.connection.recv(1)
                if not byte or len(line) > _LINE_BYTES:
                    return None
                line += byte
            message = json.loads(line)
        except TimeoutError:
            raise
        except (OSError, ValueError):
            return None
        return message if isinstance(message, dict) else None

    def hang_up(self) -> None:
        """Let the other end see that this one leaves; a message of its own can still be read."""
        with suppress(OSError):  # it was faster
            self.connection.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self.connection.close()


class Company:
    """The other nodes, as long as the job runs: on node 0 all of them, elsewhere node 0 alone."""

    def __init__(self, friends: list[Friend]) -> None:
        self.friends = friends
        self.lost: str | None = None
        """Who went away first, in words."""
        self.lost_time: float | None = None
        """When that was noticed, in seconds since the epoch."""
        self._first = threading.Lock()
        self._gone = threading.Event()
        self._ends: set[int] = set()

    @property
    def own_address(self) -> str:
        """This machine's, on the interface by which the others are reached."""
        return str(self.friends[0].connection.getsockname()[0]).removeprefix("::ffff:")

    @property
    def first_address(self) -> str:
        """The other end's: node 0's, on every node but node 0."""
        return str(self.friends[0].connection.getpeername()[0]).removeprefix("::ffff:")

    def begin(self, store_port: int) -> None:
        """Node 0: tell all of them where the store is.

        Raises:
            PeerLost: one of them has left meanwhile.
        """
        for friend in self.friends:
            if not friend.say({"store": store_port}):
                raise PeerLost(_loss(friend, None))

    def watch(self, when_lost: Callable[[], None]) -> None:
        """From another thread, call `when_lost` once when a node goes away or fails."""
        for friend in self.friends:
            threading.Thread(target=self._follow, args=(friend, when_lost), daemon=True).start()

    def part(self, code: int) -> None:
        """Say with which exit code this node ends, and wait until the others have ended as well.

        Node 0's store must outlive the processes that look at it; and they wait for no one
        whose end was not a good one.
        """
        for friend in self.friends:
            friend.say({"end": code})
        if code in GOOD_ENDS and self.lost is None:
            self._gone.wait(_FAREWELL_SECONDS)
        for friend in self.friends:
            friend.close()

    def _follow(self, friend: Friend, when_lost: Callable[[], None]) -> None:
        heard = friend.hear(None)
        end = heard.get("end") if heard else None
        if end in GOOD_ENDS:
            self._ends.add(friend.index)
            if len(self._ends) == len(self.friends):
                self._gone.set()
            return
        with self._first:
            if self.lost is not None:
                return
            self.lost, self.lost_time = _loss(friend, end), time.time()
        self._gone.set()
        for other in self.friends:  # they know of each other through node 0 alone
            other.hang_up()
        when_lost()


def host(own: Introduction, *, port: int, seconds: float, say: Callable[[str], None]) -> Company:
    """Node 0: wait until all the others are there. They then wait for `Company.begin`.

    Raises:
        SpecError: the port is taken, or the nodes disagree on what they are to run.
        PeerLost: not all of them came in time.
    """
    friends: dict[int, Friend] = {}
    waiting = _Patience(seconds, say)
    with _listen(port) as door, selectors.DefaultSelector() as events:
        events.register(door, selectors.EVENT_READ)
        while len(friends) < own.nodes - 1:
            missing = [str(n) for n in range(1, own.nodes) if n not in friends]
            reason = f"node {', '.join(missing)} of {own.nodes} did not come to port {port}"
            if not waiting.goes_on(
                f"{reason}. Look at its pod: is it scheduled, is its image there"
            ):
                _hang_up(friends)
                raise PeerLost(f"After {seconds:g} s {reason}.")
            for key, _ in events.select(_POLL_SECONDS):
                friend = _welcome(door, own, friends) if key.fileobj is door else None
                # A friend that waits can say one thing, that it leaves; who comes again has died.
                gone = friends.get(friend.index if friend else (key.data or -1))
                if gone is not None:
                    events.unregister(gone.connection)
                    friends.pop(gone.index).close()
                if friend is not None:
                    friends[friend.index] = friend
                    events.register(friend.connection, selectors.EVENT_READ, friend.index)
    return Company([friends[index] for index in sorted(friends)])


def join(
    own: Introduction, *, address: str, port: int, seconds: float, say: Callable[[str], None]
) -> tuple[Company, int]:
    """Any other node: find node 0, and wait with it for the rest; returns its store's port too.

    Raises:
        SpecError: the nodes disagree on what they are to run.
        PeerLost: node 0 was not found, or did not begin, in time.
    """
    waiting = _Patience(seconds, say)
    reason = ""
    while waiting.goes_on(reason):
        try:
            connection = socket.create_connection((address, port), timeout=_CONNECT_SECONDS)
        except OSError as error:
            reason = _unreachable(address, port, error)
            time.sleep(_POLL_SECONDS)
            continue
        friend = Friend(0, connection, address)
        _keep_alive(connection)
        friend.say(asdict(own))
        try:
            answer = friend.hear(waiting.left)
        except TimeoutError:
            answer = None
        if answer and isinstance(answer.get("store"), int):
            return Company([friend]), answer["store"]
        friend.close()
        if answer and "refused" in answer:
            raise SpecError(str(answer["refused"]))
        reason = f"node 0 at {address}:{port} left before all nodes were there"
    raise PeerLost(f"After {seconds:g} s {reason}.")


class _Patience:
    """A deadline, and one line for the log when it takes its time."""

    def __init__(self, seconds: float, say: Callable[[str], None]) -> None:
        self._began = time.monotonic()
        self._seconds = seconds
        self._say: Callable[[str], None] | None = say

    @property
    def left(self) -> float:
        return max(0.0, self._began + self._seconds - time.monotonic())

    def goes_on(self, reason: str) -> bool:
        if self._say and reason and self._seconds - self.left > _TELL_AFTER_SECONDS:
            self._say(f"Waiting: {reason}.")
            self._say = None
        return self.left > 0


def _listen(port: int) -> socket.socket:
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        return socket.create_server(("", port), family=family, dualstack_ipv6=both)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        raise SpecError(
            f"PET_MASTER_PORT: another program listens on port {port} of this machine. Choose "
            "another: kubernetes.port in the spec."
        ) from error


def _welcome(door: socket.socket, own: Introduction, friends: dict[int, Friend]) -> Friend | None:
    """The node that came; None where it was somebody else, such as a scanner of ports."""
    connection, address = door.accept()
    friend = Friend(-1, connection, str(address[0]).removeprefix("::ffff:"))
    try:
        said = friend.hear(_CONNECT_SECONDS)
    except TimeoutError:
        said = None
    other = _introduced(said)
    if other is None or not 0 < other.index < own.nodes:
        friend.close()
        return None
    _keep_alive(connection)
    friend.index = other.index
    difference = _difference(own, other)
    if difference is not None:
        for each in [friend, *friends.values()]:
            each.say({"refused": difference})
            each.close()
        raise SpecError(difference)
    return friend


def _introduced(said: dict[str, Any] | None) -> Introduction | None:
    """Who speaks; None where it is nobody of ours."""
    kinds = {"index": int, "nodes": int, "processes": int, "spec": str}
    if said is None or {key: type(value) for key, value in said.items()} != kinds:
        return None
    return Introduction(**said)


def _difference(own: Introduction, other: Introduction) -> str | None:
    for name, what in (("nodes", "PET_NNODES"), ("processes", "PET_NPROC_PER_NODE")):
        ours, theirs = getattr(own, name), getattr(other, name)
        if ours != theirs:
            return (
                f"{what} is {ours} on node 0 and {theirs} on node {other.index}: make them equal."
            )
    if own.spec != other.spec:
        return f"Node {other.index} has another spec than node 0: start all of them with one."
    return None


def _hang_up(friends: dict[int, Friend]) -> None:
    for friend in friends.values():
        friend.close()


def _unreachable(address: str, port: int, error: OSError) -> str:
    """Why node 0 cannot be spoken to, and what to look at."""
    if isinstance(error, socket.gaierror):
        return (
            f"node 0's name {address} is not known ({error.strerror}). It is once its pod has an "
            "address; if it stays so, look for the headless Service with "
            "publishNotReadyAddresses and for the Job's subdomain"
        )
    if isinstance(error, ConnectionRefusedError):
        return f"node 0 does not listen at {address}:{port}; look at its pod's log"
    return (
        f"node 0 does not answer at {address}:{port} ({error.strerror or error}); if its pod "
        "runs, look at the NetworkPolicy"
    )


def _keep_alive(connection: socket.socket) -> None:
    """Notice within half a minute that a machine has lost its power, too."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, option):  # under other names, or not at all, outside Linux
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def _loss(friend: Friend, end: Any) -> str:
    if isinstance(end, int):
        return f"Node {friend.index} ({friend.address}) has ended with exit code {end}."
    return f"Node {friend.index} ({friend.address}) is gone."
