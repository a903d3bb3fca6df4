"""`evenstep doctor` on several nodes: real launchers measure the network between them."""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from commands import BIN, CLEAN, DEADLINE_SECONDS, evenstep, start
from injuring import until

from launch.commands.doctor import network_finding
from launch.rank.network import chosen_network, interface_in_words, leaves_rdma

MEASURED = re.compile(
    r"\d+\.\d\d GB/s for each process, in a sum of [0-9.]+ MiB over (\d) processes on 2 nodes, by "
    r"gloo over lo\w*\."
)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def doctors(
    place: Path, *environs: dict[str, str], options: tuple[str, ...] = ()
) -> list[subprocess.Popen[str]]:
    """`evenstep doctor --nodes 2` on each node, with its own variables."""
    common = CLEAN | {
        "PET_MASTER_ADDR": "127.0.0.1",
        "PET_MASTER_PORT": str(free_port()),
        "EVENSTEP_SECRET": secrets.token_hex(16),
        "EVENSTEP_DEVICE": "cpu",
    }
    pipe = subprocess.PIPE
    words = [BIN / "evenstep", "doctor", "--nodes", "2", "--json", *options]
    return [
        start(
            words,
            cwd=place,
            env=common | {"PET_NODE_RANK": str(index)} | own,
            stdout=pipe,
            stderr=pipe,
            text=True,
        )
        for index, own in enumerate(environs)
    ]


def network_of(process: subprocess.Popen[str]) -> dict[str, str]:
    """What this node says about the network, and what it is asked to check."""
    out, err = process.communicate(timeout=DEADLINE_SECONDS)
    found = {each["name"]: each for each in json.loads(out)}
    states = {each["state"] for each in found.values()}
    assert process.returncode == (2 if "failed" in states else 1 if "warning" in states else 0)
    told: dict[str, str] = found["network"]
    return told | {"log": err}


@pytest.mark.parametrize("by", ["variable", "option", "default"])
def test_two_nodes_measure_the_network_between_them(tmp_path: Path, by: str) -> None:
    two = {"PET_NPROC_PER_NODE": "2"} if by == "variable" else {}
    options = ("--processes", "2") if by == "option" else ()
    found = [network_of(each) for each in doctors(tmp_path, two, two, options=options)]
    for each in found:
        assert each["state"] == "ok", each
        measured = MEASURED.fullmatch(each["told"])
        assert measured is not None, each
        assert measured[1] == ("2" if by == "default" else "4"), "on both together"
    assert found[0]["told"] == found[1]["told"], "a mean over all of them"
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


def test_nodes_that_cannot_measure_say_why(tmp_path: Path) -> None:
    """The processes of one node fail; and nodes that differ do not begin."""
    broken = tmp_path / "site"
    broken.mkdir()
    (broken / "sitecustomize.py").write_text(
        "import os\nif os.environ.get('RANK') == '1' and os.environ['LOCAL_RANK'] == '0':\n"
        "    os.write(2, b'no fabric'); os._exit(3)"
    )
    first, second = (
        network_of(each) for each in doctors(tmp_path, {}, {"PYTHONPATH": str(broken)})
    )
    assert (first["state"], second["state"]) == ("failed", "failed")
    assert "Node 1 (127.0.0.1) has ended with exit code 1." in first["told"]
    assert "The processes of this node waited for it, and were ended." in first["told"]
    assert "no fabric" in second["told"]
    first, second = (
        network_of(each) for each in doctors(tmp_path, {}, {"PET_NPROC_PER_NODE": "3"})
    )
    for each in (first, second):
        assert "PET_NPROC_PER_NODE is 1 on node 0 and 3 on node 1" in each["told"]


ONE_OF_A_MACHINE = """
import sys
from pathlib import Path
from launch.environment import Node
from launch.nodes.measuring import measured_by

index, port = map(int, sys.argv[1:])
node = Node(index, 2, "1", "127.0.0.1", port, local_index=index, local_nodes=2)
print(measured_by(node, processes=1, runs=Path("runs")).said, end="")
"""


def test_each_of_several_launchers_of_a_machine_knows_the_result(tmp_path: Path) -> None:
    """Slurm may start one for each GPU."""
    port = str(free_port())
    environ = CLEAN | {"EVENSTEP_DEVICE": "cpu"}
    launchers = [
        start(
            [sys.executable, "-c", ONE_OF_A_MACHINE, str(index), port],
            cwd=tmp_path,
            env=environ,
            stdout=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    told = [json.loads(each.communicate(timeout=DEADLINE_SECONDS)[0]) for each in launchers]
    assert told[0] == told[1]
    assert "over 2 processes on 1 nodes" in told[0]["told"]


def test_a_stop_while_the_other_node_is_awaited_ends_it(tmp_path: Path) -> None:
    (first,) = doctors(tmp_path, {})
    assert first.stderr is not None
    until(lambda: "rendezvous at" in first.stderr.readline(), "the wait")  # type: ignore[union-attr]
    first.send_signal(signal.SIGTERM)
    found = network_of(first)
    assert found["state"] == "failed"
    assert "Stopped by SIGTERM" in found["told"]


def test_under_torchrun_it_measures_and_each_machine_tells_it_once(tmp_path: Path) -> None:
    place = ("--nnodes", "2", "--nproc-per-node", "2", "--master-addr", "127.0.0.1")
    place += ("--master-port", str(free_port()))
    environ = CLEAN | {"EVENSTEP_DEVICE": "cpu", "GLOO_SOCKET_IFNAME": "lo"}
    agents = [
        start(
            [BIN / "torchrun", *place, "--node-rank", str(index), "-m", "launch", "doctor"],
            cwd=tmp_path,
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    told = [agent.communicate(timeout=DEADLINE_SECONDS) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], told
    for out, _ in told:
        first, second = out.splitlines()
        assert re.fullmatch(r"skipped +RDMA +no GPU", first)
        measured = MEASURED.search(second)
        assert measured is not None, out
        assert measured[1] == "4"


MISTAKES: dict[str, tuple[dict[str, str], str]] = {
    "which node this is": ({"PET_MASTER_ADDR": "127.0.0.1"}, "PET_NODE_RANK is not set"),
    "another number": (
        {"PET_NNODES": "3", "PET_NODE_RANK": "0", "PET_MASTER_ADDR": "127.0.0.1"},
        "--nodes 2: the environment (PET_NNODES, or Slurm's step) says 3",
    ),
    "a range": (
        {"PET_NNODES": "1:2", "PET_NODE_RANK": "0", "PET_MASTER_ADDR": "127.0.0.1"},
        "says 1:2. doctor measures between a fixed number of nodes",
    ),
    "one machine": (
        {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"},
        "Start doctor without torchrun",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_doctor_cannot_measure_between_is_refused(tmp_path: Path, mistake: str) -> None:
    environ, message = MISTAKES[mistake]
    ended = evenstep("doctor", "--nodes", 2, cwd=tmp_path, **environ)
    assert ended.returncode == 64
    assert message in ended.stderr
    assert os.listdir(tmp_path) == []


# Lines of NCCL 2.27 and 2.30; its src/init.cc writes them.
LOG_OF_NCCL = """node-0:152:386 [0] NCCL INFO NET/IB : Using [0]mlx5_0:1/RoCE [RO]; OOB eth0
node-0:152:386 [0] NCCL INFO Assigned NET plugin {name} to comm
node-0:152:386 [0] NCCL INFO Using network {name}
node-0:152:386 [0] NCCL INFO ncclCommInitRankConfig comm 0x562b2c1973d0 rank 0 nranks 4 - Init START
"""


def test_devices_for_rdma_that_nccl_does_not_choose_are_a_warning(tmp_path: Path) -> None:
    log, rdma = tmp_path / "log", tmp_path / "infiniband"
    log.write_text("")
    assert chosen_network(log) == chosen_network(None) == ""
    (rdma / "mlx5_0").mkdir(parents=True)
    found: dict[str, tuple[bool, str]] = {}
    for name in ("IB", "AWS Libfabric", "Socket"):
        log.write_text(LOG_OF_NCCL.format(name=name))
        how: dict[str, Any] = {"chosen": chosen_network(log), "rdma": rdma}
        environ = {"NCCL_SOCKET_IFNAME": "=eth0"}
        told = interface_in_words("cuda", environ, **how)
        found[name] = (leaves_rdma("cuda", environ, **how), told)
    assert found == {
        "IB": (False, "the RDMA devices mlx5_0 (IB)"),
        "AWS Libfabric": (False, "the RDMA devices mlx5_0 (AWS Libfabric)"),
        "Socket": (True, "eth0; NCCL has not chosen the RDMA devices mlx5_0"),
    }
    assert leaves_rdma("cuda", {"NCCL_IB_DISABLE": "1"}, chosen="", rdma=rdma)
    assert not leaves_rdma("cuda", {}, chosen="Socket", rdma=tmp_path / "gone")
    assert not leaves_rdma("cpu", {}, chosen="", rdma=rdma), "gloo knows only TCP"
    told = interface_in_words("cpu", {"GLOO_SOCKET_IFNAME": "eth0"}, rdma=rdma)
    assert told == "eth0; gloo does not use the RDMA devices mlx5_0"
    warned = network_finding(told="2 GB/s", leaves_rdma=True)
    assert (warned.state, "IPC_LOCK" in warned.fix) == ("warning", True)
    assert network_finding(told="2 GB/s", leaves_rdma=False).state == "ok"
