"""Which node of how many this is, and how the nodes meet: real sockets, and two real commands."""

from __future__ import annotations

import json
import os
import re
import resource
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from commands import BIN, CLEAN, DEADLINE_SECONDS, ROOT, evenstep, start
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.environment import (
    RUN_OF_STORE,
    Environment,
    Group,
    first_address,
    meeting_secret,
    node_here,
    read_secrets,
)
from launch.nodes import secret_file
from launch.nodes.handshake import Authenticator, JoinRequest, Seal, Unauthenticated, answered
from launch.nodes.node_part import _Watch, check_interfaces, take_interface
from launch.nodes.rendezvous import CLOSING_SECONDS, Membership, Peer, host, join, listen
from launch.rank.network import interface_in_words
from service.basics.atomic_files import replace_file
from service.basics.errors import EvenstepError, PeerLost, SpecError, Stopped

PET = {"PET_NNODES": "3", "PET_NPROC_PER_NODE": "4", "PET_NODE_RANK": "2"} | {
    "PET_MASTER_ADDR": "run-0.run",
    "PET_MASTER_PORT": "23456",
}
OWN = JoinRequest(0, 3, 4, "digest")


@dataclass(frozen=True)
class LaterRequest(JoinRequest):
    """What nodes of another version send."""

    more: str = ""


def test_the_five_variables_name_the_node() -> None:
    node = node_here(PET)
    assert node is not None
    assert (node.index, node.nodes, node.processes) == (2, 3, "4")
    assert (node.address, node.port) == ("run-0.run", 23456)


def test_the_index_may_be_the_jobs_own_and_the_address_the_pods_own() -> None:
    variables = {"PET_NNODES": "3:3", "JOB_COMPLETION_INDEX": "1", "PET_MASTER_ADDR": "a"}
    node = node_here(variables)
    assert node is not None
    assert (node.index, node.nodes) == (1, 3)
    assert first_address("run-11.run.ml.svc.cluster.local", 11) == "run-0.run.ml.svc.cluster.local"
    with pytest.raises(SpecError, match="of an Indexed Job with a subdomain is <job>-1"):
        first_address("run-1", 1)


def test_without_the_variables_there_is_no_node() -> None:
    assert node_here({}) is None


MISTAKES = {
    "an index of nobody knows how many": (
        {"JOB_COMPLETION_INDEX": "1"},
        "this is node 1, but not of how many: set PET_NNODES",
    ),
    "a name that no machine can have": (
        {**PET, "PET_MASTER_ADDR": "node-0..lan"},
        r"PET_MASTER_ADDR=node-0\.\.lan: is no name",
    ),
    "an index too many": (
        PET | {"PET_NODE_RANK": "3"},
        "PET_NODE_RANK=3 of PET_NNODES=3 is not possible",
    ),
    "no index": ({"PET_NNODES": "2", "PET_MASTER_ADDR": "a"}, "PET_NODE_RANK is not set"),
    "a range without its end": (PET | {"PET_NNODES": "1:"}, "PET_NNODES must be a whole number"),
    "no node at all": (PET | {"PET_NNODES": "0"}, "PET_NNODES must be from 1 to"),
    "a port too large": (
        PET | {"PET_MASTER_PORT": "70000"},
        "PET_MASTER_PORT must be from 1 to 65535, but is 70000",
    ),
    "port 0": (PET | {"PET_MASTER_PORT": "0"}, "PET_MASTER_PORT must be from 1 to 65535"),
    "a number without end": (
        PET | {"PET_NNODES": "9" * 5000},
        r"PET_NNODES must be from 1 to 1000000000, but is 9{40}\.",
    ),
    "processes in words": (
        PET | {"PET_NPROC_PER_NODE": "many"},
        "PET_NPROC_PER_NODE must be a whole number, but is 'many'",
    ),
    "a port in words": (PET | {"PET_MASTER_PORT": "any"}, "PET_MASTER_PORT must be a whole"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_variables_that_cannot_be_are_refused(mistake: str) -> None:
    variables, message = MISTAKES[mistake]
    with pytest.raises(SpecError, match=message):
        node_here(variables)


def test_the_processes_of_a_node_may_have_torchruns_words() -> None:
    for word, processes in (("gpu", "auto"), ("auto", "auto"), ("cpu", str(os.cpu_count()))):
        node = node_here(PET | {"PET_NPROC_PER_NODE": word})
        assert node is not None
        assert node.processes == processes


def test_ranks_run_on_from_node_to_node() -> None:
    group = Group(index=2, nodes=3, processes=4, address="10.0.0.1", port=7)
    found = group.variables(Environment(rank=1, world_size=4, local_rank=1, local_world_size=4))
    assert (found["RANK"], found["WORLD_SIZE"]) == ("9", "12")
    assert (found["LOCAL_RANK"], found["LOCAL_WORLD_SIZE"]) == ("1", "4")
    assert (found["MASTER_ADDR"], found["MASTER_PORT"]) == ("10.0.0.1", "7")
    assert found[RUN_OF_STORE] == "nodes-7", "and none of its own node's"


def test_the_secret_of_a_meeting_is_in_a_file_or_a_variable(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("0123456789abcdef\n")
    file = {"EVENSTEP_SECRET_FILE": str(tmp_path / "secret")}
    assert meeting_secret(file) == b"0123456789abcdef"
    assert meeting_secret({"EVENSTEP_SECRET": " fedcba9876543210"}) == b"fedcba9876543210"
    assert meeting_secret({}) == b""
    (tmp_path / "secret").write_text("hunter2")
    for variables in (file, {"EVENSTEP_SECRET": "hunter2"}):
        with pytest.raises(SpecError, match="a secret of 7 bytes can be guessed"):
            meeting_secret(variables)
    with pytest.raises(SpecError, match=r"EVENSTEP_SECRET_FILE: /none cannot be read"):
        meeting_secret({"EVENSTEP_SECRET_FILE": "/none"})


def test_node_0_keeps_the_secret_that_it_has_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a stranger may write among the runs, and puts another in its place at once."""

    def replaced(path: Path, text: str, *, mode: int) -> None:
        replace_file(path, text, mode=mode)
        made.append(text)
        path.unlink()
        path.write_text("the secret of a stranger")

    made: list[str] = []
    monkeypatch.setattr(secret_file, "replace_file", replaced)
    with secret_file.secret_in(tmp_path, "job", makes=True, seconds=1) as secret:
        assert secret == made[0].encode()
    assert not (secret_file.folder_in(tmp_path) / "job").exists()


BY_A_USER = """
import os
import sys
from pathlib import Path
from launch.nodes.secret_file import secret_in

os.seteuid(int(sys.argv[1]))
with secret_in(Path("runs"), "job", makes=True, seconds=1) as secret:
    print(secret.decode())
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become two users")
def test_users_who_share_a_runs_directory_each_write_their_secret(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs").chmod(0o1777)
    words = [sys.executable, "-c", BY_A_USER]
    for user in ("65533", "65534"):
        done = subprocess.run([*words, user], cwd=tmp_path, capture_output=True, text=True)
        assert len(done.stdout.strip()) == 64, done.stderr


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/etc/hostname")])
def test_a_pipe_or_a_link_in_the_place_of_a_secret_is_reported(
    tmp_path: Path, make: Callable[[Path], None]
) -> None:
    secret_file.folder_in(tmp_path).mkdir()
    make(secret_file.folder_in(tmp_path) / "job")
    waits = secret_file.secret_in(tmp_path, "job", makes=False, seconds=60)
    with pytest.raises(EvenstepError, match="job"), waits:
        pass


def test_a_key_in_a_file_becomes_the_variable(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("secret\n")
    file = {"WANDB_API_KEY_FILE": str(tmp_path / "key")}
    assert read_secrets(file) == {"WANDB_API_KEY": "secret"}
    assert read_secrets({**file, "WANDB_API_KEY": "own"}) == {}, "what is set wins"
    assert read_secrets({"WANDB_API_KEY_FILE": str(tmp_path / "none")}) == {}
    assert read_secrets({}) == {}


def test_an_interface_that_is_not_there_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "^docker")
    check_interfaces()
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "=eth77")
    with pytest.raises(SpecError, match=r"NCCL_SOCKET_IFNAME==eth77: .* no such .*, but .*lo"):
        check_interfaces()


def test_an_interface_that_the_user_chose_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0,ib1")
    take_interface("127.0.0.1")
    assert os.environ["NCCL_SOCKET_IFNAME"] == "ib0,ib1"
    assert os.environ["GLOO_SOCKET_IFNAME"].startswith("lo")


def test_the_interface_is_that_of_the_first_address_of_this_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "=lo")
    take_interface("198.51.100.1", "127.0.0.1")  # the store is on another machine
    assert os.environ["GLOO_SOCKET_IFNAME"].startswith("lo")


# ---- the meeting


class Meeting:
    """Nodes that meet on this machine, each in a thread of its own."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.secret = b""
        self.ends: dict[int, Any] = {}
        self.said: list[str] = []
        self._threads: list[threading.Thread] = []

    def host(self, own: JoinRequest = OWN, seconds: float = 20) -> None:
        place: dict[str, Any] = {"address": "127.0.0.1", "port": self.port, "secret": self.secret}

        def work() -> Membership:
            membership = host(own, **place, seconds=seconds, say=self.said.append)
            membership.begin("127.0.0.1", 4321)
            return membership

        self._start(0, work)

    def join(self, own: JoinRequest, seconds: float = 20) -> None:
        place: dict[str, Any] = {"address": "127.0.0.1", "port": self.port, "secret": self.secret}
        self._start(own.index, lambda: join(own, **place, seconds=seconds, say=self.said.append))

    def end(self) -> dict[int, Any]:
        for thread in self._threads:
            thread.join(30)
            assert not thread.is_alive()
        return self.ends

    def _start(self, index: int, work: Callable[[], Any]) -> None:
        def run() -> None:
            try:
                self.ends[index] = work()
            except EvenstepError as error:
                self.ends[index] = error

        self._threads.append(threading.Thread(target=run, daemon=True))
        self._threads[-1].start()


@pytest.fixture
def meeting() -> Meeting:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    return Meeting(port)


def test_nodes_connect_in_any_order_and_learn_where_the_store_is(meeting: Meeting) -> None:
    meeting.join(replace(OWN, index=2))  # nobody listens yet
    meeting.host()
    meeting.join(replace(OWN, index=1))
    ends = meeting.end()
    assert [peer.index for peer in ends[0].peers] == [1, 2]
    assert ends[1][1] == ends[2][1] == ("127.0.0.1", 4321)
    for membership in (ends[0], ends[1][0], ends[2][0]):
        membership.leave(1)


def test_a_node_that_is_stopped_before_its_processes_start_waits_for_nobody(
    meeting: Meeting,
) -> None:
    """Such as one that brings the run from a store: it has little time to end."""
    meeting.host(replace(OWN, nodes=2))
    meeting.join(replace(OWN, nodes=2, index=1))
    ends = meeting.end()
    leaving = threading.Thread(target=ends[1][0].leave, args=(75,), daemon=True)
    leaving.start()
    leaving.join(CLOSING_SECONDS / 3)
    assert not leaving.is_alive()
    assert ends[0].peers[0].receive() == [{"end": 75}]
    ends[0].leave(1)


def test_the_door_is_closed_once_all_are_there(meeting: Meeting) -> None:
    meeting.host(replace(OWN, nodes=2))
    meeting.join(replace(OWN, nodes=2, index=1))
    ends = meeting.end()
    late = replace(OWN, nodes=2, index=1)
    with pytest.raises(PeerLost, match=r"After 1 s node 0 does not listen at 127\.0\.0\.1"):
        join(late, address="127.0.0.1", port=meeting.port, seconds=1, say=meeting.said.append)
    ends[0].leave(1), ends[1][0].leave(1)


def test_a_node_that_dies_while_it_waits_may_come_again(meeting: Meeting) -> None:
    meeting.host()
    first = connected(meeting.port)
    answer, _ = answered(first.recv(4096).strip(), replace(OWN, index=1), b"")
    first.sendall(answer)
    first.close()
    meeting.join(replace(OWN, index=1))
    meeting.join(replace(OWN, index=2))
    ends = meeting.end()
    assert [peer.index for peer in ends[0].peers] == [1, 2]
    for membership in (ends[0], ends[1][0], ends[2][0]):
        membership.leave(1)


SECRET = b"what all nodes of this job know"
TOLD = b'{"index": 1, "nodes": 2, "processes": 4, "spec": "digest"}\n'
SENT = {
    "the line of a node": TOLD,
    "the line of a node of another job": TOLD.replace(b'"nodes": 2', b'"nodes": 99'),
    "brackets": b"[" * 60_000 + b"\n",
    "brackets in a line short enough": b"[" * 4000 + b"\n",
    "a number of many digits": b"9" * 4090 + b"\n",
    "a proof that is none": b'{"said": "{}", "proof": "00", "nonce": "00"}\n',
    "a proof that is no text": b'{"said": 1, "proof": [], "nonce": {}}\n',
    "a browser": b"GET / HTTP/1.1\r\n\r\n",
    "bytes": b"\xff\xfe\0\n",
    "nothing": b"",
}


def test_other_connections_are_dropped_and_the_nodes_connect(meeting: Meeting) -> None:
    meeting.secret = SECRET
    two = replace(OWN, nodes=2)
    meeting.host(two)
    strangers = [connected(meeting.port) for _ in SENT]
    for stranger, sent in zip(strangers, SENT.values(), strict=True):
        with suppress(ConnectionError):  # it may be dropped before all of it is sent
            stranger.sendall(sent)
    knows_the_spec = connected(meeting.port)
    answer, _ = answered(knows_the_spec.recv(4096).strip(), replace(two, index=1), b"")
    knows_the_spec.sendall(answer)
    assert knows_the_spec.recv(4096) == b"", "no seat, and not the store's port"
    for name, stranger in zip(SENT, strangers, strict=True):
        assert name == "nothing" or is_closed(stranger), name
    meeting.join(replace(two, index=1))
    ends = meeting.end()
    assert [peer.index for peer in ends[0].peers] == [1]
    assert ends[1][1] == ("127.0.0.1", 4321)
    assert "A connection from 127.0.0.1 did not authenticate in time" in meeting.said[0]
    assert meeting.said[1:] == [
        f"{len(SENT) + 1} connections were not from nodes of this job; they were dropped."
    ]
    ends[0].leave(1), ends[1][0].leave(1)
    for each in (*strangers, knows_the_spec):
        each.close()


def is_closed(connection: socket.socket) -> bool:
    """Whether the other end closes it without a word beyond its challenge."""
    said = b""
    with suppress(ConnectionError):
        while piece := connection.recv(4096):
            said += piece
    return said.count(b"\n") <= 1


def test_more_unknown_connections_than_open_files_do_not_block_a_node(meeting: Meeting) -> None:
    """They say nothing, or a byte now and then, and the node that comes last is let in at once."""
    meeting.secret = SECRET
    two = replace(OWN, nodes=2)
    with ExitStack() as stack:
        connections = [stack.enter_context(socket.socket()) for _ in range(1000)]
        most = max(connection.fileno() for connection in connections) + 150
        with fewer_files(most):
            meeting.host(two)
            connected(meeting.port).close()
            for number, connection in enumerate(connections):
                connection.connect(("127.0.0.1", meeting.port))
                if number % 2:
                    connection.send(b"x")
            meeting.join(replace(two, index=1), seconds=8)  # less than one may take to speak
            ends = meeting.end()
        assert [peer.index for peer in ends[0].peers] == [1], ends
        ends[0].leave(1), ends[1][0].leave(1)


@contextmanager
def fewer_files(most: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_node_with_another_secret_hears_what_to_look_at(meeting: Meeting) -> None:
    meeting.secret = SECRET
    meeting.host(replace(OWN, nodes=2), seconds=2)
    connected(meeting.port).close()
    meeting.secret = b"another, also long enough"
    meeting.join(replace(OWN, nodes=2, index=1), seconds=1)
    ends = meeting.end()
    assert isinstance(ends[1], PeerLost)
    assert "has another secret: give all nodes the same EVENSTEP_SECRET_FILE" in str(ends[1])
    assert re.search(
        r"node 1 of 2 did not connect to port \d+ \(\d+ others connected", str(ends[0])
    )


def test_another_listener_is_not_mistaken_for_node_0(meeting: Meeting) -> None:
    with socket.create_server(("127.0.0.1", meeting.port)) as door:
        meeting.secret = SECRET
        meeting.join(replace(OWN, nodes=2, index=1), seconds=1)
        connection, _ = door.accept()
        connection.sendall(b'{"challenge": "00"}\n')
        connection.recv(4096)
        connection.sendall(b'{"said": "{\\"store\\": 1}", "proof": "00"}\n{"store": 1}\n')
        ends = meeting.end()
        connection.close()
    assert isinstance(ends[1], PeerLost)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["said", "proof", "nonce", "challenge", "index", "x"]),
            inner,
            max_size=5,
        )
    ),
    max_leaves=8,
)


@settings(deadline=None)
@given(st.binary(max_size=100) | anything.map(lambda value: json.dumps(value).encode()))
def test_whatever_is_sent_is_a_message_or_foreign(line: bytes) -> None:
    with suppress(Unauthenticated):
        answered(
            line, OWN, SECRET
        )  # of node 0: any challenge is answered, without the secret in it
    for read in (Authenticator(SECRET).authenticated, Seal(b"key", own="0", other="node").opened):
        with pytest.raises(Unauthenticated):
            read(line)


def test_a_recorded_message_is_of_no_use() -> None:
    """Sent again, in another meeting of the same job, in another order, or back to its sender."""
    keeper = Authenticator(SECRET)
    answer, node = answered(keeper.challenge(), replace(OWN, index=1), SECRET)
    request, host_seal = keeper.authenticated(answer)
    assert request == replace(OWN, index=1)
    with pytest.raises(Unauthenticated):
        Authenticator(SECRET).authenticated(answer)
    first, second = host_seal.sealed({"store": 1}), host_seal.sealed({"end": 0})
    with pytest.raises(Unauthenticated):
        node.opened(second)
    assert node.opened(first) == {"store": 1}
    with pytest.raises(Unauthenticated):
        node.opened(first)
    with pytest.raises(Unauthenticated):
        node.opened(node.sealed({"end": 0}))
    with pytest.raises(Unauthenticated):
        host_seal.opened(second)


def test_a_listener_that_speaks_too_slowly_does_not_hold_up_a_node(meeting: Meeting) -> None:
    """It sends a byte of its challenge now and then, for ever."""
    ended = threading.Event()

    def speak(door: socket.socket) -> None:
        with door.accept()[0] as connection, suppress(OSError):
            while not ended.wait(0.2):
                connection.send(b"x")

    with socket.create_server(("127.0.0.1", meeting.port)) as door:
        speaking = threading.Thread(target=speak, args=(door,), daemon=True)
        speaking.start()
        meeting.join(replace(OWN, nodes=2, index=1), seconds=1)
        ends = meeting.end()  # within 30 s; all of it would take 800
        ended.set()
        speaking.join(30)
    assert isinstance(ends[1], PeerLost)


def connected(port: int) -> socket.socket:
    """A connection to node 0, once it listens."""
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=10)
        except ConnectionRefusedError:
            continue


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"processes": 5}, "PET_NPROC_PER_NODE is 4 on node 0 and 5 on node 2"),
        ({"nodes": 4}, "PET_NNODES is 3 on node 0 and 4 on node 2"),
        ({"spec": "another"}, "Node 2 has a different spec than node 0"),
        ({"runs": "a digest"}, "node 0 keeps the runs in a directory, and node 2 elsewhere"),
        ({"version": "0.0.7"}, "Node 2 has another version of evenstep than node 0"),
    ],
)
def test_nodes_that_disagree_all_hear_of_it(
    meeting: Meeting, other: dict[str, Any], message: str
) -> None:
    meeting.host()
    meeting.join(replace(OWN, index=2, **other))
    ends = meeting.end()
    for index in (0, 2):
        assert isinstance(ends[index], SpecError)
        assert message in str(ends[index])


def test_a_node_of_a_version_with_other_messages_hears_of_it(meeting: Meeting) -> None:
    """It knows the secret, so it is no stranger."""
    meeting.secret = SECRET
    meeting.host(replace(OWN, nodes=2))
    with connected(meeting.port) as connection:
        later = LaterRequest(1, 2, 4, "digest")
        answer, seal = answered(connection.recv(4096).strip(), later, SECRET)
        connection.sendall(answer)
        told = seal.opened(connection.recv(4096).strip())
    [end] = meeting.end().values()
    assert isinstance(end, SpecError)
    assert "The node at 127.0.0.1 has another version of evenstep than node 0" in str(end)
    assert told == {"refused": str(end)}


def test_nodes_that_do_not_come_are_named(meeting: Meeting) -> None:
    meeting.host(seconds=1)
    ends = meeting.end()
    assert isinstance(ends[0], PeerLost)
    assert "node 1, 2 of 3 did not connect" in str(ends[0])


def test_a_name_that_is_not_known_is_reported(meeting: Meeting) -> None:
    with pytest.raises(PeerLost, match=r"run-0\.invalid cannot be resolved.*headless Service"):
        join(OWN, address="run-0.invalid", port=1, seconds=0.5, say=meeting.said.append)


def test_a_port_in_use_is_reported(meeting: Meeting) -> None:
    with (
        socket.create_server(("", meeting.port)),
        pytest.raises(SpecError, match=f"another program listens on port {meeting.port}"),
    ):
        host(OWN, port=meeting.port, seconds=1, say=meeting.said.append)


def test_a_port_that_cannot_be_listened_on_is_reported(meeting: Meeting) -> None:
    """Here no file can be opened; a user who is not root gets the same for port 80."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        with pytest.raises(SpecError, match=r"cannot listen on port .*: Too many open files"):
            listen("127.0.0.1", meeting.port)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_the_loss_of_one_node_is_known_to_all(meeting: Meeting) -> None:
    meeting.host()
    meeting.join(replace(OWN, index=1))
    meeting.join(replace(OWN, index=2))
    ends = meeting.end()
    first, last, lost = ends[0], ends[2][0], ends[1][0]
    heard = {name: threading.Event() for name in ("first", "last")}
    first.watch(heard["first"].set)
    last.watch(heard["last"].set)
    lost.peers[0].close()
    assert heard["first"].wait(10)
    assert heard["last"].wait(10)
    assert first.lost == "Node 1 (127.0.0.1) is gone."
    first.leave(76), last.leave(76)


def test_a_loss_that_the_processes_of_a_node_notice_first_is_told(
    meeting: Meeting, capfd: pytest.CaptureFixture[str]
) -> None:
    """What the node does next depends on how the other one has ended."""
    meeting.host()
    meeting.join(replace(OWN, index=1))
    meeting.join(replace(OWN, index=2))
    first, (last, _), (lost, _) = (meeting.end()[index] for index in (0, 2, 1))
    unused: Any = None  # while no other node is lost before its own processes
    watch = _Watch(first, unused, [0], kill=lambda: None, stop=lambda: None)
    threading.Timer(0.2, lost.peers[0].close).start()
    assert watch.outcome(PeerLost.exit_code) == PeerLost.exit_code
    assert first.closing_messages == {1: None}
    assert capfd.readouterr().err == "Node 1 (127.0.0.1) is gone.\n"
    first.leave(PeerLost.exit_code), last.leave(PeerLost.exit_code)


def test_a_node_hears_a_stop_that_comes_with_the_address_of_the_store(meeting: Meeting) -> None:
    """Both messages of node 0 may arrive in one piece."""
    with socket.create_server(("127.0.0.1", meeting.port)) as door:
        meeting.join(replace(OWN, nodes=2, index=1))
        connection, _ = door.accept()
        with connection:
            authenticator = Authenticator(b"")
            connection.sendall(authenticator.challenge())
            _, seal = authenticator.authenticated(connection.recv(4096).strip())
            place = seal.sealed({"store": 4321, "address": "127.0.0.1"})
            connection.sendall(place + seal.sealed({"end": Stopped.exit_code}))
            membership, found = meeting.end()[1]
            stopped = threading.Event()
            membership.watch(lambda: None, stopped.set)
            assert stopped.wait(DEADLINE_SECONDS)
    assert found == ("127.0.0.1", 4321)
    membership.leave(Stopped.exit_code)
    assert membership.lost is None


def test_the_store_listens_where_other_machines_reach_it() -> None:
    """Tasks on the machine of node 0 connect by its name, which may be 127.0.1.1 there."""
    own = [each for found in psutil.net_if_addrs().values() for each in found]
    real = [each.address for each in own if each.family == socket.AF_INET]
    real = [address for address in real if not address.startswith("127.")]
    if not real:
        pytest.skip("needs an address of this machine that is not loopback")
    with ExitStack() as stack:
        ends = [connection_to(address, stack) for address in ("127.0.1.1", real[0])]
        seal = Seal(b"key", own="0", other="node")
        peers = [Peer(n, end, "", seal) for n, (end, _) in enumerate(ends, start=1)]
        assert Membership(peers).own_address == real[0]
        assert Membership(peers[:1]).own_address == "127.0.1.1", "all are on this machine"


def connection_to(address: str, stack: ExitStack) -> tuple[socket.socket, socket.socket]:
    """The end of a connection that listened at the address, and the end that connected."""
    with socket.create_server(("", 0)) as door:
        other = stack.enter_context(socket.create_connection((address, door.getsockname()[1])))
        return stack.enter_context(door.accept()[0]), other


LOUD = """
import os
from service.recipes import digits

def task(**arguments):
    print("this is", os.environ["RANK"], "of", os.environ["WORLD_SIZE"])
    print("by", os.environ.get("GLOO_SOCKET_IFNAME"), os.environ.get("NCCL_SOCKET_IFNAME"))
    return digits.task(**arguments)
"""


def test_two_nodes_on_one_machine_train_as_one(meeting: Meeting, tmp_path: Path) -> None:
    variables = {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "1", "EVENSTEP_DEVICE": "cpu"} | {
        "PET_MASTER_ADDR": "127.0.0.1",
        "PET_MASTER_PORT": str(meeting.port),
    }
    (tmp_path / "loud.py").write_text(LOUD)
    words = ["run", "digits", "length={steps: 12}", "schedule={name: constant}"]
    words += ["task=./loud.py:task"]

    def trained(*more: str) -> tuple[str, str]:
        """What both nodes say about it."""
        other = start(
            [BIN / "evenstep", *words, *more],
            cwd=tmp_path,
            env=CLEAN | variables | {"PET_NODE_RANK": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        done = evenstep(*words, *more, cwd=tmp_path, **variables, PET_NODE_RANK="0")
        output, _ = other.communicate(timeout=60)
        assert (done.returncode, other.returncode) == (0, 0), (done.stderr, output)
        return done.stdout, output

    def late(*more: str) -> subprocess.CompletedProcess[str]:
        return evenstep(*words, *more, cwd=tmp_path, **variables, PET_NODE_RANK="1")

    first, second = trained()
    assert "digits: 2 processes on cpu" in first
    assert re.match(
        r"Network: \d+\.\d\d GB/s for each process, in a sum of [0-9.]+ MiB over 2 processes on "
        r"2 nodes, by gloo over lo\w*\.\n",
        first,
    ), "the first line"
    assert "Done after step 12" in first
    assert "step=" not in second, "one node speaks for all"
    assert second.count("[rank 1] this is 1 of 2\n") == 1, second
    assert "this is 0 of 2\n" in first
    for told in (first, second):
        assert re.search(r"by (lo\w*) =\1\n", told), "the one by which they met, exactly"
    assert "Nothing to do" in late().stderr

    longer = ("--change", "length.steps=15")
    assert "Done after step 15" in trained(*longer)[0], "a finished run is extended"
    again = late(*longer)
    assert again.returncode == 0
    assert "Nothing to do" in again.stderr


def test_one_node_of_its_own_tells_what_its_ranks_write(tmp_path: Path) -> None:
    (tmp_path / "loud.py").write_text(LOUD)
    words = ["run", "digits", "length={steps: 3}", "schedule={name: constant}"]
    variables = {"PET_NNODES": "1", "PET_NPROC_PER_NODE": "2", "PET_NODE_RANK": "0"}
    done = evenstep(*words, "task=./loud.py:task", cwd=tmp_path, **variables)
    assert done.returncode == 0, done.stderr
    assert "this is 0 of 2\n" in done.stdout
    assert "Network:" not in done.stdout
    assert done.stderr.count("[rank 1] this is 1 of 2\n") == 1, done.stderr


def test_the_line_about_the_network_names_what_it_goes_through(tmp_path: Path) -> None:
    chosen = {"GLOO_SOCKET_IFNAME": "eth1", "NCCL_SOCKET_IFNAME": "=eth2"}
    assert interface_in_words("cpu", chosen, rdma=tmp_path) == "eth1"
    assert interface_in_words("cpu", {}, rdma=tmp_path) == "the interface that it chooses"
    none = "eth2; this machine has no RDMA device"
    assert interface_in_words("cuda", chosen, rdma=tmp_path / "gone") == none
    (tmp_path / "mlx5_0").mkdir()
    assert interface_in_words("cuda", chosen, rdma=tmp_path) == (
        "the RDMA devices mlx5_0, or eth2 if NCCL cannot use them"
    )
    assert "NCCL_IB_DISABLE keeps it from the RDMA devices mlx5_0" in interface_in_words(
        "cuda", {"NCCL_IB_DISABLE": "1"}, rdma=tmp_path
    )


def test_what_the_environment_says_twice_is_refused(tmp_path: Path) -> None:
    ended = evenstep("run", "digits", "--processes", 2, cwd=tmp_path, **PET)
    assert ended.returncode == 64
    assert "PET_NPROC_PER_NODE already sets it" in ended.stderr
    assert not re.search("meeting", ended.stderr)
    assert os.listdir(tmp_path) == []


STOPPED_WHILE_IT_WAITS = """
import signal, time
from launch.processes.signals import heard, stop_raises
from service.basics.errors import Stopped

before = time.monotonic()
try:
    with stop_raises():
        signal.raise_signal(signal.SIGTERM)
except Stopped as error:
    assert before <= heard.heard_at <= time.monotonic()
    print(heard.signal_name, error)
"""


def test_the_time_of_a_stop_begins_while_a_node_waits_for_others() -> None:
    """What is to be done before the end, such as an upload, has the seconds after that moment."""
    words = [sys.executable, "-c", STOPPED_WHILE_IT_WAITS]
    process = start(words, cwd=ROOT, env=CLEAN, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    out, _ = process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == 0, out
    assert out.decode().startswith("SIGTERM Stopped by SIGTERM before training started"), out
