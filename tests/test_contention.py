"""Threads that wait for each other spin on idle cores and sleep on shared ones."""

from __future__ import annotations

import subprocess
import sys

import pytest
from commands import CLEAN, ROOT, evenstep

from service.distributed.contention import Patience

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
FREE = {
    key: value
    for key, value in CLEAN.items()
    if key not in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
}


def told_by(script: str, **variables: str) -> list[str]:
    """The words that a script of its own process prints; it computes on two threads."""
    begin = (
        "import os, threading, time, torch\n"
        "def threads(): return len(os.listdir('/proc/self/task'))\n"
        "torch.set_num_threads(2); torch.zeros(2**17); before = threads()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", begin + script],
        cwd=ROOT,
        env={**FREE, **variables},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def looked(shares: list[float], *, team: int = 2) -> list[bool]:
    """Whether threads sleep after each half second in which each waited that share of it."""
    patience, found = Patience(team, now=0.0), []
    for number, share in enumerate(shares, 1):
        patience.look(share * team / 2, now=number / 2)
        found.append(patience.sleeps)
    return found


def test_threads_sleep_from_the_first_look_at_shared_cores_on():
    assert looked([0.0, 0.05, 0.3, 0.05, 0.3]) == [False, False, True, True, True]


def test_threads_spin_again_where_the_cores_have_been_free_for_a_while():
    assert looked([0.3, *[0.0] * 6]) == [True, True, True, True, False, False, False]


def test_threads_sleep_twice_as_long_each_time_the_cores_turn_out_to_be_shared():
    patience, now, rests = Patience(2, now=0.0), 0.0, []
    for _ in range(9):
        now += 0.5
        patience.look(0.5, now=now)  # shared, whenever they spin
        assert patience.sleeps
        begun = now
        while patience.sleeps:
            now += 0.5
            patience.look(0.0, now=now)  # and not to be seen while they sleep
        rests.append(now - begun)
    assert rests == [2, 4, 8, 16, 32, 64, 120, 120, 120]


@LINUX
def test_the_writer_of_checkpoints_starts_no_threads_that_compute(tmp_path):
    script = f"""
from accelerate import Accelerator
from service.checkpoints.checkpoints import Checkpoints
from service.distributed.world import World
from service.spec.models import CheckpointSpec
from pathlib import Path
world = World(Accelerator(cpu=True))
checkpoints = Checkpoints(
    Path({str(tmp_path)!r}), world=world, spec=CheckpointSpec(), facts={{}}, say=print
)
before = threads()
checkpoints.reserve(2**20)
checkpoints._reserved.result()
print(threads() - before, torch.get_num_threads())
"""
    assert told_by(script) == ["1", "2"]  # the writer itself


@LINUX
def test_more_threads_than_cores_are_held_until_they_are_let_go():
    script = """
from service.distributed.contention import _hold_threads
let_go = _hold_threads(2)
cores = len(os.sched_getaffinity(0))
while threads() < before + cores:  # with the one that starts them; the team's second is there
    time.sleep(0.01)
def of_a_new_thread():
    found = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return found[0]
while of_a_new_thread() != 2:
    time.sleep(0.01)
let_go.set()
while threads() > before:
    time.sleep(0.01)
print(torch.get_num_threads())
"""
    assert told_by(script) == ["2"]


@LINUX
@pytest.mark.parametrize(
    ("variables", "watched"),
    [({}, "True"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "False"), ({"GOMP_SPINCOUNT": "9"}, "False")],
)
def test_cores_are_watched_unless_somebody_said_how_threads_wait(variables, watched):
    script = """
from service.distributed.contention import cores_shared
def watched(): return any(each.name == "cores" for each in threading.enumerate())
with cores_shared(torch.device("cpu")):
    print(watched())
print(watched())
"""
    assert told_by(script, **variables) == [watched, "False"]


@LINUX
def test_a_run_watches_its_cores(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import threading\nimport torch\nfrom torch import nn\n"
        "from service.task import supervised\n"
        "class Told(nn.Linear):\n"
        "    def forward(self, x):\n"
        "        print('threads', [each.name for each in threading.enumerate()], flush=True)\n"
        "        return super().forward(x)\n"
        "rows = [(torch.ones(3), 0)] * 4\n"
        "task = supervised(model=lambda: Told(3, 2), train=rows)\n"
    )
    (tmp_path / "job.yaml").write_text(
        "name: job\ntask: ./mine.py:task\nbatch: {global_batch: 4}\nlength: {steps: 1}\n"
        "optimizer: {name: sgd, lr: 0.1}\n"
    )
    ran = evenstep("run", "job.yaml", cwd=tmp_path, OMP_NUM_THREADS="2")
    assert ran.returncode == 0, ran.stderr
    assert "'cores'" in ran.stdout.rpartition("threads [")[2]


@LINUX
def test_one_thread_waits_for_none():
    script = """
from service.distributed.contention import cores_shared
torch.set_num_threads(1)
with cores_shared(torch.device("cpu")):
    print(threading.active_count())
"""
    assert told_by(script) == ["1"]


def test_the_command_leaves_the_policy_to_who_trains(tmp_path):
    script = """
from launch.processes.warm_start import warm_up
warm_up(["run", "digits"], {"RANK": "0"})
print(os.environ.get("OMP_WAIT_POLICY"), os.environ["KMP_BLOCKTIME"])
"""
    assert told_by(script) == ["None", "0"]
    assert told_by(script, OMP_WAIT_POLICY="ACTIVE", KMP_BLOCKTIME="7") == ["ACTIVE", "7"]
