"""What a task of Slurm knows of its step, and what is no task though the variables are set."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from commands import BIN, CLEAN, evenstep, start

from launch.nodes.secret_file import folder_in
from launch.slurm_step import hosts_of, node_of, slurm_grace, step_here, step_of, tasks_of
from service.basics.errors import SpecError
from service.health.stop_budget import GracePeriod, StopBudget, grace_periods
from service.recipes import find_recipe
from service.spec.files import load_spec

# As srun of Slurm 22.05 sets them in task 3 of 4 on two machines with two GPUs each.
TASK = {
    "SLURM_JOB_ID": "5",
    "SLURM_STEP_ID": "2",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "gpu[08-09]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_GPUS_ON_NODE": "2",
}
WORDS = ("run", "digits", "length={steps: 3}", "schedule={name: constant}")


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("n0", ["n0"]),
        ("login1.example.com", ["login1.example.com"]),
        ("n[0-2]", ["n0", "n1", "n2"]),
        ("gpu[08-10,12],login1", ["gpu08", "gpu09", "gpu10", "gpu12", "login1"]),
        ("r[1-2]n[01,03]", ["r1n01", "r1n03", "r2n01", "r2n03"]),
        ("a[1-2]-ib,b7", ["a1-ib", "a2-ib", "b7"]),
        ("n[99-101]", ["n99", "n100", "n101"]),
    ],
)
def test_a_list_of_machines_is_read_as_slurm_writes_it(text: str, hosts: list[str]) -> None:
    assert list(hosts_of(text)) == hosts


@pytest.mark.parametrize("text", ["", "n[0-2", "n0,", "n[a-b]", "n[5-1]", "n]0["])
def test_what_is_no_list_of_machines_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"not a (list|range) of machines|invalid literal"):
        list(hosts_of(text))


def test_a_list_of_tasks_is_read_as_slurm_writes_it() -> None:
    assert tasks_of("2(x3),1") == [2, 2, 2, 1]
    assert tasks_of("4") == [4]
    with pytest.raises(ValueError, match="not a list of tasks"):
        tasks_of("2(x")


def node(processes: str | None = None, **changed: str) -> Any:
    return node_of(step_of(TASK | changed), processes=processes, variables=changed)


def test_one_task_for_each_gpu_is_a_rank() -> None:
    found = node()
    assert (found.index, found.nodes, found.processes) == (3, 4, "1")
    assert (found.local_index, found.local_nodes) == (1, 2)
    assert found.address == "gpu08"


def test_one_task_for_each_machine_starts_a_process_for_each_gpu() -> None:
    one = {"SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}
    found = node(**one)
    assert (found.index, found.nodes, found.processes) == (1, 2, "2")
    assert (found.local_index, found.local_nodes) == (0, 1)
    assert node("3", **one).processes == "3", "the command may ask for another number"
    assert node(**one, EVENSTEP_DEVICE="cpu").processes == "1"
    assert node(**one, SLURM_GPUS_ON_NODE="").processes == "1", "none were asked for"


def test_the_place_of_the_meeting_can_be_chosen() -> None:
    found = node(PET_MASTER_ADDR="gpu08-ib", PET_MASTER_PORT="29511")
    assert (found.address, found.port) == ("gpu08-ib", 29511)


def test_concurrent_steps_use_different_ports() -> None:
    ports = {
        node(SLURM_JOB_ID=str(job), SLURM_STEP_ID=str(step)).port
        for job in range(400, 420)
        for step in range(5)
    }
    assert len(ports) == 100
    assert all(15000 <= port < 30000 for port in ports)


def test_a_job_that_is_queued_again_meets_with_another_secret() -> None:
    assert node().secret_name != node(SLURM_RESTART_COUNT="1").secret_name


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"SLURM_STEP_TASKS_PER_NODE": "2,1"}, "Slurm started 2, 1 tasks on the machines"),
        ({"SLURM_GPUS_ON_NODE": "8"}, r"started 2 tasks on a machine with 8 GPUs.*per-node=8\)"),
        ({"SLURM_STEP_NODELIST": "n[0"}, "do not tell which one .*unset SLURM_STEP_ID"),
        ({"SLURM_PROCID": "first"}, "do not tell which one"),
        ({"SLURM_STEP_NODELIST": "n[5-1]"}, "do not tell which one .*5-1"),
    ],
)
def test_what_is_neither_kind_of_step_is_refused(changed: dict[str, str], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        step_of(TASK | changed)


def test_the_port_of_a_step_is_checked() -> None:
    with pytest.raises(SpecError, match="PET_MASTER_PORT must be a whole number, but is 'abc'"):
        node(PET_MASTER_PORT="abc")


def test_processes_that_slurm_has_started_are_not_asked_for_again() -> None:
    with pytest.raises(SpecError, match="Slurm has started 2 tasks on each machine"):
        node("2")


def test_variables_of_another_process_are_no_step() -> None:
    with subprocess.Popen(["sleep", "60"]) as other:
        assert step_here(TASK | {"SLURM_TASK_PID": str(other.pid)}) is None
        other.kill()
    assert step_here(TASK) is None, "no task is told"
    assert step_here({"SLURM_JOB_ID": "5", "SLURM_PROCID": "0"}) is None, "the shell of salloc"


def test_a_command_with_leaked_variables_runs_as_without_them(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "60"]) as other:
        leaked = TASK | {"SLURM_TASK_PID": str(other.pid)}
        done = evenstep(*WORDS, cwd=tmp_path, **leaked)
        other.kill()
    assert done.returncode == 0, done.stderr
    assert "digits: 1 process on cpu" in done.stdout
    assert not folder_in(tmp_path / "runs").exists()


def test_tasks_of_one_step_train_together(tmp_path: Path) -> None:
    """By the variables that srun gives two tasks on one machine, and a parent that is the task."""
    both = TASK | {"SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_STEP_NODELIST": "n0"}
    both |= {"SLURM_TASK_PID": str(os.getpid()), "EVENSTEP_DEVICE": "cpu"}
    both |= {"SLURM_JOB_ID": str(os.getpid())}  # and so a port of its own
    (tmp_path / "told.py").write_text(
        "import os\nfrom service.recipes import digits\n\n\ndef task(**arguments):\n"
        "    names = ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'LOCAL_WORLD_SIZE')\n"
        "    print('place', *(os.environ[name] for name in names))\n"
        "    return digits.task(**arguments)\n"
    )
    words = [str(BIN / "evenstep"), *WORDS, "task=./told.py:task"]
    tasks = [
        start(
            words,
            cwd=tmp_path,
            env=CLEAN | both | {"SLURM_PROCID": str(task), "SLURM_LOCALID": str(task)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for task in range(2)
    ]
    told = [task.communicate(timeout=100)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], told
    assert "digits: 2 processes on cpu" in told[0]
    assert "place 0 2 0 2" in told[0]
    assert "place 1 2 1 2" in told[1]
    assert "WARNING: no secret" not in "".join(told)
    assert list(folder_in(tmp_path / "runs").iterdir()) == [], "the secret is gone"


def test_saves_that_take_longer_than_slurm_gives_a_stop_are_warned_of() -> None:
    spec = load_spec(find_recipe("digits"))
    given = slurm_grace(spec, {"EVENSTEP_STOP_SECONDS": "150"})
    assert given == GracePeriod(150.0, "slurm.stop_seconds")
    said: list[str] = []
    budget = StopBudget(grace_periods(spec, launcher=given), say=said.append)
    budget.learned(60.0, "as measured in this run")
    assert said == []
    budget.learned(90.0, "as measured in this run")
    assert "slurm.stop_seconds allows 150 s. Raise it to 190" in said[0]
    assert slurm_grace(spec, {}) is None
