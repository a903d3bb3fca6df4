"""Who can reach a run, and what comes of it: its sockets, its store, and what lies in that."""

from __future__ import annotations

import pickle
import signal
import socket
import subprocess
import threading
from base64 import b64encode
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
from commands import DEADLINE_SECONDS
from injuring import descendants, injured, rows_of, started, until
from processes import Processes
from test_messages import Bomb
from torch.distributed import TCPStore

import service.distributed.world
from launch.environment import Environment
from launch.rank.attempts import of_attempt
from launch.rank.joining import wait_for_all
from launch.rank.store import own_store
from service.basics.errors import PeerLost
from service.distributed.world import World

LOOPBACK = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
STORE_OF_NODES = "127.0.0.2"


def listening(process: int) -> dict[tuple[str, int], int]:
    """Where a command and all that it has started listen, and which process does."""
    found = {}
    for each in (process, *descendants(process)):
        with suppress(psutil.NoSuchProcess):
            for connection in psutil.Process(each).net_connections(kind="tcp"):
                if connection.status == psutil.CONN_LISTEN:
                    found[connection.laddr.ip, connection.laddr.port] = each
    return found


def as_stranger(address: str, port: int) -> TCPStore:
    return TCPStore(address, port, is_master=False, timeout=timedelta(seconds=5))


@pytest.mark.parametrize("words", [(), ("--max-restarts", 1), ("--processes", 2)])
def test_the_launcher_of_one_node_listens_nowhere_and_its_ranks_only_on_loopback(
    tmp_path: Path, words: tuple[object, ...]
) -> None:
    endless = {"length": {"steps": 100_000}, "checkpoint": {"every_steps": 1000}}
    environ = injured(tmp_path, **endless, loader={"workers": 1})
    with started(*words, cwd=tmp_path, **environ) as command:
        until(lambda: rows_of(tmp_path), "a step")
        found = listening(command.pid)
        command.send_signal(signal.SIGTERM)
        _, err = command.communicate(timeout=DEADLINE_SECONDS)
    assert command.returncode == 75, err
    assert command.pid not in found.values(), "it has no store at an address"
    assert {address for address, _ in found} <= LOOPBACK, found
    assert words or not found, "a process that trains by itself talks to nobody"


@contextmanager
def two_nodes(place: Path, **sections: Any) -> Iterator[list[subprocess.Popen[str]]]:
    """A run of two nodes of one process each, which meet at an address of loopback."""
    environ = injured(place, **sections)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environ |= {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "1", "GLOO_SOCKET_IFNAME": "lo"}
    environ |= {"PET_MASTER_ADDR": STORE_OF_NODES, "PET_MASTER_PORT": str(port)}
    environ |= {"EVENSTEP_SECRET": "what both of them know"}
    with (
        started(cwd=place, PET_NODE_RANK="0", **environ) as first,
        started(cwd=place, PET_NODE_RANK="1", **environ) as second,
    ):
        until(lambda: rows_of(place), "a step")
        assert port not in {at for _, at in listening(first.pid)}, "nodes still can join"
        yield [first, second]


def store_at(found: Mapping[tuple[str, int], int], process: int) -> int:
    [port] = [at for (ip, at), own in found.items() if (ip, own) == (STORE_OF_NODES, process)]
    return port


def test_two_nodes_listen_only_where_they_met_and_run_nothing_from_their_store(
    tmp_path: Path,
) -> None:
    mark = tmp_path / "mark"
    endless = {"length": {"steps": 100_000}, "checkpoint": {"every_steps": 1000}}
    with two_nodes(tmp_path, **endless) as nodes:
        found = [listening(node.pid) for node in nodes]
        stranger = as_stranger(STORE_OF_NODES, store_at(found[0], nodes[0].pid))
        keys = stranger.list_keys()
        for key in keys:
            stranger.set(key, b64encode(pickle.dumps(Bomb(mark))).decode())
        for node in nodes:
            node.send_signal(signal.SIGTERM)
        told = [node.communicate(timeout=DEADLINE_SECONDS)[1] for node in nodes]
    assert keys, "a stranger on this machine can read and write it"
    assert not mark.exists(), "what lay in the store was run"
    assert [node.returncode for node in nodes] == [75, 75], told
    everywhere = {address for each in found for address, _ in each}
    assert everywhere <= LOOPBACK | {STORE_OF_NODES}, found


def test_a_store_whose_keys_are_gone_holds_up_no_run_and_no_end(tmp_path: Path) -> None:
    with two_nodes(tmp_path, length={"steps": 24}) as nodes:
        saved = tmp_path / "runs/job/checkpoints"
        until(lambda: saved.is_dir() and list(saved.glob("step-*")), "all groups are connected")
        stranger = as_stranger(STORE_OF_NODES, store_at(listening(nodes[0].pid), nodes[0].pid))
        for key in stranger.list_keys():  # torch's agent would wait here for others, for 300 s
            before, agents, _ = key.partition("torchelastic/")
            if agents:
                stranger.set(f"{before}torchelastic/agent/terminal_state/num_members", "5")
            stranger.delete_key(key)
        told = [node.communicate(timeout=250) for node in nodes]  # less than its 300 s
    assert [node.returncode for node in nodes] == [0, 0], told
    assert "Done after step 24" in told[0][0]


def test_a_process_that_waits_for_others_notices_who_deletes_its_word() -> None:
    store = own_store("127.0.0.1")
    stranger = as_stranger("127.0.0.1", store.port)
    told: list[str] = []

    def wait() -> None:
        try:
            wait_for_all(store, Environment(0, 2, 0, 2), seconds=60)
        except PeerLost as error:
            told.append(str(error))

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    stranger.wait(["here/0"], timedelta(seconds=30))
    stranger.set("here/0", "another's")
    waiting.join(30)
    assert told
    assert "Another program has changed what the processes of this job exchange" in told[0]


def test_processes_that_wait_for_others_write_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    """For each second of the wait, torch's client of its store would write two warnings."""
    store = own_store("127.0.0.1")
    client = TCPStore("127.0.0.1", store.port, is_master=False)
    with pytest.raises(PeerLost, match=r"After 1\.5 s only 1 of 2 processes have connected"):
        wait_for_all(client, Environment(0, 2, 0, 2), seconds=1.5)
    told = capfd.readouterr()
    assert (told.out, told.err) == ("", "")


def test_processes_that_are_not_all_there_in_time_are_counted() -> None:
    with pytest.raises(PeerLost, match=r"After 0\.1 s only 1 of 2 processes have connected"):
        wait_for_all(own_store("127.0.0.1"), Environment(0, 2, 0, 2), seconds=0.1)


def test_processes_of_an_attempt_meet_in_a_store_that_earlier_ones_have_used() -> None:
    """All of the first attempt had met; of the second one, rank 2 had only asked."""
    store = own_store("127.0.0.1")
    ranks = [Environment(rank, 3, rank, 3) for rank in range(3)]

    def attempt(rank: Environment, word: str) -> str:
        client = TCPStore("127.0.0.1", store.port, is_master=False)
        part = of_attempt(client, rank, seconds=60)
        if rank.rank == 0:
            part.set("word", word)
        return part.get("word").decode()

    with ThreadPoolExecutor(3) as threads:
        assert [*threads.map(attempt, ranks, ["first"] * 3)] == ["first"] * 3
        store.set("asks/2", "killed before it was told")
        early = threads.submit(attempt, ranks[0], "third")
        until(lambda: store.get("told/2").startswith(b"killed"), "an answer to one that is gone")
        late = [threads.submit(attempt, rank, "") for rank in ranks[1:]]
        assert [each.result(timeout=60) for each in (early, *late)] == ["third"] * 3


def test_a_rank_that_asks_for_the_attempt_notices_who_changes_its_word() -> None:
    store = own_store("127.0.0.1")
    client = TCPStore("127.0.0.1", store.port, is_master=False)  # a wait holds up all others of it
    with ThreadPoolExecutor(1) as threads:
        asking = threads.submit(of_attempt, client, Environment(1, 2, 1, 2), seconds=60)
        store.wait(["asks/1"], timedelta(seconds=30))
        store.set("asks/1", "another's")
        with pytest.raises(PeerLost, match="Another program has changed what the processes"):
            asking.result(timeout=30)


@pytest.mark.parametrize(
    ("rank", "told"),
    [(0, r"After 0\.1 s only 1 of 2 processes"), (1, r"After 0\.1 s rank 0 has not connected")],
)
def test_an_attempt_whose_processes_do_not_come_ends_in_time(rank: int, told: str) -> None:
    with pytest.raises(PeerLost, match=told):
        of_attempt(own_store("127.0.0.1"), Environment(rank, 2, rank, 2), seconds=0.1)


def connect_alone(world: World) -> str:
    if world.index == 0:
        service.distributed.world.CONNECT_SECONDS = 0.5
        try:
            world.writers().meet()
        except PeerLost as error:
            return str(error)
        return "connected"
    world.writers()
    return ""


def test_a_group_that_cannot_connect_ends_in_seconds_with_a_clear_message() -> None:
    with Processes(2) as own:  # whose groups no other test has
        told, _ = own.run(connect_alone)
    assert told.startswith("The processes of this job did not connect to each other within 0.5 s")
    assert "another program has changed the addresses in their store" in told
