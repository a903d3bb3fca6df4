"""Where a machine has several NUMA nodes, a process keeps to the cores of its GPU's."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from commands import CLEAN, DEADLINE_SECONDS, ROOT, command, start
from processes import ProcessesOf

from launch.environment import Environment
from launch.rank.process_group import stay_near_device
from service.basics.limits import cores_near, threads_each
from service.distributed.world import World

CARD = "0000:dc:00.0"
TWO_CORES = pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) < 2,
    reason="needs Linux and two cores",
)


def machine(place: Path, *nodes: str, card: str, other: str | None = None) -> Path:
    """What the kernel tells of a machine with these cores in each node, and a card or two."""
    for number, cores in enumerate(nodes):
        node = place / f"devices/system/node/node{number}"
        node.mkdir(parents=True)
        (node / "cpulist").write_text(f"{cores}\n")
    for name, of_node in ((CARD, card), ("0000:dd:00.0", other)):
        if of_node is not None:
            told = place / "bus/pci/devices" / name
            told.mkdir(parents=True)
            (told / "numa_node").write_text(f"{of_node}\n")
            (told / "class").write_text("0x030200\n")  # gloo looks through all of them for networks
    return place


def test_the_cores_of_the_node_are_near(tmp_path: Path) -> None:
    two = machine(tmp_path, "0-3,8-11", "4-7,12", card="1")
    assert cores_near(CARD, two) == {4, 5, 6, 7, 12}
    assert cores_near("0000:01:00.0", two) == set(), "a card that the machine does not have"


@pytest.mark.parametrize(("nodes", "card"), [(("0-7",), "0"), (("0-3", "4-7"), "-1")])
def test_no_core_is_nearer_where_the_machine_does_not_say(
    tmp_path: Path, nodes: tuple[str, ...], card: str
) -> None:
    assert cores_near(CARD, machine(tmp_path, *nodes, card=card)) == set()


STAYING = """
import os, sys, threading
from pathlib import Path
from service.basics.limits import stay_near

waits = threading.Event()
other = threading.Thread(target=waits.wait)
other.start()
own = sorted(os.sched_getaffinity(0))
stay_near("0000:dc:00.0", Path(sys.argv[1]))
seen = {tuple(os.sched_getaffinity(int(thread))) for thread in os.listdir("/proc/self/task")}
print(own[0], len(own), *seen)
waits.set()
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")
def test_every_thread_stays_near_on_cores_that_it_may_use(tmp_path: Path) -> None:
    first = min(os.sched_getaffinity(0))
    said = {}
    for name, node in (("some", f"{first},4000-4001"), ("none", "4000-4001")):
        place = machine(tmp_path / name, node, "4002", card="0")
        words = (sys.executable, "-c", STAYING, place)
        done = command(*words, cwd=ROOT, timeout=DEADLINE_SECONDS)
        assert done.returncode == 0, done.stderr
        said[name] = done.stdout.split(maxsplit=2)
    assert said["some"][2] == f"({first},)\n"
    assert said["none"][2].count(",") >= int(said["none"][1]) - 1, "nothing has changed"


def near_device(world: World, kernel: Path, processes_here: int) -> list[int]:
    """The cores of a process with its device beside so many, which it has again afterwards."""
    own = os.sched_getaffinity(0)
    os.environ["SIM_BUSES"] = "00 dc dd"  # those of the processes are the second and the third
    try:
        here = Environment(world.index, 2, world.index, processes_here)
        stay_near_device(world, here, kernel)
        return sorted(os.sched_getaffinity(0))
    finally:
        del os.environ["SIM_BUSES"]
        for thread in os.listdir("/proc/self/task"):
            os.sched_setaffinity(int(thread), own)


@TWO_CORES
def test_each_of_several_processes_of_a_machine_stays_near_its_device(
    tmp_path: Path, simulated: ProcessesOf
) -> None:
    first, second, *_ = cores = sorted(os.sched_getaffinity(0))
    kernel = machine(tmp_path, str(first), str(second), card="1", other="0")
    assert simulated(2).run(near_device, kernel, 2) == [[second], [first]]
    assert simulated(2).run(near_device, kernel, 1) == [cores, cores]


# A rank of a run, where no variable says how many threads it has. With a directory, the kernel
# tells it and nobody else of another machine.
RANK = """
import ctypes, os, runpy, sys
import torch
from service.basics.limits import threads_each

def mount(*words):
    if libc.mount(*words, None) != 0:
        raise OSError(ctypes.get_errno(), "mount")

del os.environ["OMP_NUM_THREADS"]
torch.set_num_threads(1 + threads_each(2))
if sys.argv[1]:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.unshare(0x20000)  # CLONE_NEWNS
    mount(None, b"/", None, 0x44000)  # MS_REC | MS_PRIVATE
    for place in ("bus/pci/devices", "devices/system/node"):
        mount(f"{sys.argv[1]}/{place}".encode(), f"/sys/{place}".encode(), None, 0x1000)  # MS_BIND
sys.argv[1:] = ["run", "job.yaml"]
runpy.run_module("launch", run_name="__main__")
"""
TASK = """
import os
from pathlib import Path

import torch
from service.recipes import digits

def task(width, dropout):
    made = digits.task(width, dropout)
    model = made.model

    def told():
        cores = " ".join(map(str, sorted(os.sched_getaffinity(0))))
        threads = f"{torch.get_num_threads()}, {os.environ['OMP_NUM_THREADS']}"
        Path(f"told-{os.environ['RANK']}").write_text(f"{threads}; {cores}")
        return model()

    made.model = told
    return made
"""
JOB = """
name: job
task: ./my_task.py:task
task_args: {width: 2, dropout: 0.0}
batch: {global_batch: 8, micro_batch: 4}
length: {steps: 1}
optimizer: {name: sgd, lr: 0.1}
"""


def told_by_ranks(place: Path, with_sim: dict[str, str], kernel: Path | None) -> list[str]:
    """The threads, OMP_NUM_THREADS and cores of two processes, each with its device."""
    (place / "my_task.py").write_text(TASK)
    (place / "job.yaml").write_text(JOB)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": port, "SIM_DEVICES": "2", "SIM_BUSES": "dc dd"}
    ranks = [
        start(
            [sys.executable, "-c", RANK, kernel or ""],
            cwd=place,
            env=CLEAN | with_sim | shared | {"RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in ("0", "1")
    ]
    said = [rank.communicate(timeout=DEADLINE_SECONDS)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    assert "2 processes on sim" in said[0]
    return [(place / f"told-{rank}").read_text() for rank in (0, 1)]


def test_processes_beside_devices_divide_the_cores(
    tmp_path: Path, with_sim: dict[str, str]
) -> None:
    threads = threads_each(2)
    for told in told_by_ranks(tmp_path, with_sim, None):
        assert told.startswith(f"{threads}, {threads}; ")


@TWO_CORES
@pytest.mark.skipif(
    os.geteuid() != 0 or not Path("/sys/bus/pci/devices").is_dir(),
    reason="needs root and a PCI, to mount another machine's",
)
def test_each_process_of_a_run_stays_near_its_device(
    tmp_path: Path, with_sim: dict[str, str]
) -> None:
    first, second, *_ = sorted(os.sched_getaffinity(0))
    kernel = machine(tmp_path / "sys", str(first), str(second), card="1", other="0")
    threads = threads_each(2)
    told = told_by_ranks(tmp_path, with_sim, kernel)
    assert told == [f"{threads}, {threads}; {core}" for core in (second, first)]
