"""What is settled where processes are joined: a device for each, and how it computes."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
from commands import DEADLINE_SECONDS, ROOT, command, evenstep
from processes import Processes, ProcessesOf

from launch.rank.joining import keep_to_loopback
from launch.rank.process_group import identity_of, require_own_device
from service.basics.errors import SpecError
from service.distributed.world import World


def judged(world: World, devices: list[str]) -> str:
    try:
        require_own_device(world, devices[world.index])
    except SpecError as error:
        return str(error)
    return "accepted"


def test_two_processes_on_one_device_are_refused_on_all_of_them(processes: ProcessesOf) -> None:
    told = processes(3).run(judged, ["GPU-a", "GPU-b", "GPU-a"])
    assert told == [told[0]] * 3
    assert told[0].startswith("--processes: ranks 0, 2 compute on one device (GPU-a). Use at most")


def met_after_a_group_of_two(world: World) -> list[int]:
    if world.index < 2:
        dist.new_group([0, 1], backend="gloo", use_local_synchronization=True)
    writers = world.writers(everyone=True)
    writers.meet()
    return writers.gather(world.index)


def test_writers_meet_although_a_task_has_groups_of_some_processes() -> None:
    with Processes(3) as own:  # whose groups no other test has
        assert own.run(met_after_a_group_of_two) == [[0, 1, 2]] * 3


def test_processes_that_each_see_one_device_of_their_own_are_accepted(
    processes: ProcessesOf,
) -> None:
    assert processes(3).run(judged, ["GPU-a", "GPU-b", "GPU-c"]) == ["accepted"] * 3


def test_what_a_process_is_shown_tells_its_device_where_no_name_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = set()
    for visible in ("0", "1"):  # as under Slurm: device 0 of each is another
        monkeypatch.setitem(os.environ, "CUDA_VISIBLE_DEVICES", visible)
        found.add(identity_of(torch.device("cpu")))
    assert len(found) == 2
    assert identity_of(torch.device("cpu")) in found


def test_processes_of_one_machine_meet_on_loopback_by_its_exact_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """NCCL takes a name for a prefix unless it begins with =."""
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "")  # so that it is given back
        monkeypatch.delenv(name)
    keep_to_loopback()
    own = os.environ["GLOO_SOCKET_IFNAME"]
    assert "127.0.0.1" in {each.address for each in psutil.net_if_addrs()[own]}
    assert os.environ["NCCL_SOCKET_IFNAME"] == f"={own}"
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")
    keep_to_loopback()
    assert os.environ["NCCL_SOCKET_IFNAME"] == "ib0", "what the user has set"


BITWISE = """
import torch
from launch.environment import Environment
from launch.rank.process_group import process_group
from service.optimization.precision import multiply_in

with process_group(Environment(), bitwise=True, precision="tf32") as world:
    print(torch.are_deterministic_algorithms_enabled(), torch.get_num_threads())
    print(torch.utils.deterministic.fill_uninitialized_memory)
for precision in ("tf32", "fp32"):
    if precision == "fp32":
        multiply_in(precision)
    # Each raises if torch's older and newer names for the setting contradict each other.
    print(torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
"""


def test_bitwise_is_deterministic_fills_no_unused_memory_and_heeds_the_precision() -> None:
    words = (sys.executable, "-c", BITWISE)
    done = command(*words, cwd=ROOT, timeout=DEADLINE_SECONDS, EVENSTEP_DEVICE="cpu")
    wanted = ["True", "1", "False", "True", "True", "False", "False"]
    assert done.stdout.split() == wanted, done.stderr


# Of a shell under mpirun or in a Slurm step, of a program that `accelerate launch` has started.
OF_OTHERS = {
    "LOCAL_RANK": "1",
    "PMI_RANK": "1",
    "PMI_SIZE": "2",
    "OMPI_COMM_WORLD_SIZE": "4",
    "ACCELERATE_MIXED_PRECISION": "fp8",
    "ACCELERATE_USE_DEEPSPEED": "true",
}
IN_A_POD = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "1",
}
FROM_PYTHON = "import service; service.run('digits', quiet=True, **{'length.steps': 1})"


def test_a_process_alone_does_not_look_for_those_of_somebody_else(tmp_path: Path) -> None:
    """accelerate would: it connected, and waited, or asked for what a spec does not ask for."""
    run = evenstep("run", "digits", "length.steps=1", "--name", "a", cwd=tmp_path, **OF_OTHERS)
    assert run.returncode == 0, run.stderr
    words = (sys.executable, "-c", FROM_PYTHON)
    in_place = command(*words, cwd=tmp_path, timeout=DEADLINE_SECONDS, **OF_OTHERS)
    assert in_place.returncode == 0, in_place.stderr
    seen = evenstep("plan", "digits", cwd=tmp_path, **IN_A_POD)
    assert (seen.returncode, seen.stderr) == (0, "")
