"""How the nodes of a job end together: each by a real command, and real sockets between them."""

from __future__ import annotations

import hashlib
import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
from commands import BIN, CLEAN, DEADLINE_SECONDS, start
from injuring import until

from launch.environment import RUN_OF_STORE, STORE_FILE, Environment
from launch.nodes.handshake import JoinRequest
from launch.nodes.node_part import kill_each
from launch.nodes.rendezvous import host, join
from launch.rank.process_group import _join
from launch.rank.store import own_store
from service.basics.errors import PeerLost, Stopped
from service.runs.checkpoint_files import checkpoints_in
from service.spec.files import dump_spec, load_spec

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are found by /proc")

TASK = """
import os
import threading
import time
from pathlib import Path

import torch
from torch.utils.data import TensorDataset

from service.data.task import supervised

RANK, HERE = os.environ["RANK"], Path(__file__).parent


class Model(torch.nn.Linear):
    calls = 0

    def forward(self, rows):
        self.calls += self.training
        out = super().forward(rows)
        return out * torch.nan if self.calls > int(os.environ.get("GOOD_PASSES", 100)) else out


def slow(descriptor, sync=os.fsync):
    if threading.current_thread().name.startswith("checkpoints"):
        time.sleep(float(os.environ.get("SYNC_SECONDS", 0)))  # as if the state were large
    sync(descriptor)


def task():
    (HERE / f"process-{RANK}").write_text(str(os.getpid()))
    os.fsync = slow
    rows = TensorDataset(torch.rand(40, 4), torch.arange(40) % 3)
    return supervised(model=lambda: Model(4, 3), train=rows, test=rows)
"""
SPEC = {
    "name": "job",
    "task": "./job.py:task",
    "batch": {"global_batch": 8, "micro_batch": 2},
    "length": {"steps": 30},
    "optimizer": {"name": "sgd", "lr": 0.1},
    "checkpoint": {"every_steps": 4},
    "test": {"every_steps": 30},
}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "job.py").write_text(TASK)
    (tmp_path / "job.yaml").write_text(json.dumps(SPEC))
    return tmp_path


@contextmanager
def nodes(place: Path, *indexes: int, processes: int = 1, **more: str) -> Iterator[list[Node]]:
    """The commands of these of two nodes; killed at the end."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    variables = {"PET_NNODES": "2", "PET_NPROC_PER_NODE": str(processes), "EVENSTEP_DEVICE": "cpu"}
    variables |= {"PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": port, **more}
    found = []
    with ExitStack() as stack:
        for index in indexes:
            node = Node(place, index, variables)
            stack.callback(node.kill)
            found.append(node)
        yield found


class Node:
    """One of the commands; its output goes to a file."""

    def __init__(self, place: Path, index: int, variables: dict[str, str]) -> None:
        self.port = int(variables["PET_MASTER_PORT"])
        self._log = place / f"node-{index}-{self.port}.log"
        with self._log.open("wb") as log:
            self.process = start(
                [BIN / "evenstep", "run", "job.yaml"],
                cwd=place,
                env=CLEAN | variables | {"PET_NODE_RANK": str(index)},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        return self._log.read_text()

    def end(self) -> int:
        return self.process.wait(timeout=DEADLINE_SECONDS)

    def kill(self) -> None:
        self.process.send_signal(signal.SIGCONT)
        self.process.kill()
        self.process.wait()


def process_of(place: Path, rank: int) -> int:
    """The process of a rank, as soon as it has loaded the task."""
    path = place / f"process-{rank}"
    return int(until(lambda: path.exists() and path.read_text(), f"rank {rank} has the task"))


def test_a_save_is_finished_although_all_ranks_fail_meanwhile(place: Path) -> None:
    """Rank 1 waits for nothing, and node 1 neither: their launchers let rank 0 finish."""
    slow = {"GOOD_PASSES": "8", "SYNC_SECONDS": "1.7"}
    with nodes(place, 0, 1, processes=2, **slow) as both:
        codes = [node.end() for node in both]
        output = [node.output for node in both]
    assert codes == [42, 42], output
    assert [saved.step for saved in checkpoints_in(place / "runs/job/checkpoints")] == [4], output


def test_a_node_that_is_stopped_before_its_first_step_stops_the_others(place: Path) -> None:
    digest = hashlib.sha256(dump_spec(load_spec(place / "job.yaml")).encode()).hexdigest()
    with nodes(place, 0) as [node]:
        wanted = JoinRequest(1, 2, 1, digest)
        membership, _ = join(wanted, address="127.0.0.1", port=node.port, seconds=60, say=print)
        membership.peers[0].send({"end": Stopped.exit_code})  # as `Membership.leave` does
        code = node.end()
        output = node.output
        membership.peers[0].close()
    assert code == Stopped.exit_code, output
    assert "before the first step" in output


def test_a_node_ends_with_76_if_the_first_is_lost_while_the_processes_connect(place: Path) -> None:
    """It would otherwise count as a failure of its own, of which a cluster allows only a few."""
    digest = hashlib.sha256(dump_spec(load_spec(place / "job.yaml")).encode()).hexdigest()
    with nodes(place, 1) as [node]:
        own = JoinRequest(0, 2, 1, digest)
        membership = host(own, address="127.0.0.1", port=node.port, seconds=60, say=print)
        store = own_store("127.0.0.1")
        membership.begin("127.0.0.1", store.port)
        store.wait([f"nodes-{store.port}/here/1"], timedelta(seconds=DEADLINE_SECONDS))
        del store  # it closes all connections, as the kernel does for a killed process
        membership.peers[0].close()
        code = node.end()
        output = node.output
    assert code == PeerLost.exit_code, output
    assert "Node 0 (127.0.0.1) is gone" in output


def test_a_store_that_does_not_listen_belongs_to_a_lost_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    variables = {RUN_OF_STORE: "run", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    variables |= {STORE_FILE: "", "GLOO_ENABLE_STORE_V2_API": "1"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(PeerLost, match="client socket has timed out"):
        _join(Environment(1, 2, 0, 1), "gloo", 0.5)


def test_every_request_to_stop_is_followed_while_the_nodes_connect(place: Path) -> None:
    """SIGUSR1 is what a Slurm script hands on; SIGHUP comes when a terminal is closed."""
    with ExitStack() as stack:
        alone = {s: stack.enter_context(nodes(place, 0))[0] for s in ("SIGUSR1", "SIGHUP")}
        waits = "rendezvous at"
        for name, node in alone.items():
            until(lambda node=node: waits in node.output, waits, of=node.process)
            node.process.send_signal(signal.Signals[name])
        ends = {name: (node.end(), node.output) for name, node in alone.items()}
    for name, (code, output) in ends.items():
        assert code == Stopped.exit_code, output
        assert f"Stopped by {name}" in output


def unread_bytes(port: int) -> int:
    """Bytes that a process connected to this port has received and not read."""
    found = 0
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        _, _, remote, _, queues, *_ = line.split()
        if int(remote.rpartition(":")[2], 16) == port:
            found += int(queues.rpartition(":")[2], 16)
    return found


def test_a_request_to_stop_changes_nothing_at_the_end_of_a_finished_run(place: Path) -> None:
    with nodes(place, 0, 1) as [first, last]:
        process_of(place, 1)
        last.process.send_signal(signal.SIGSTOP)  # its launcher alone, so the first waits for it
        until(lambda: unread_bytes(first.port), "node 0 says that it has ended")
        first.process.terminate()
        last.process.send_signal(signal.SIGCONT)
        codes = [first.end(), last.end()]
        output = first.output
    assert codes == [0, 0], output


def test_a_process_that_is_gone_already_does_not_save_the_others() -> None:
    with subprocess.Popen(["sleep", "600"]) as first, subprocess.Popen(["sleep", "600"]) as last:
        found = [psutil.Process(first.pid), psutil.Process(last.pid)]
        first.kill()
        first.wait()
        kill_each(found)
        assert last.wait(DEADLINE_SECONDS) == -signal.SIGKILL
