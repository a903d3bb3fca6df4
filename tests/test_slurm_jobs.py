"""Jobs that `evenstep slurm` submits to a real controller, and faults of every kind.

A job that resumes ends with the same bits as the undisturbed run in one process.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import evenstep
from slurm import Cluster, until

pytestmark = pytest.mark.cluster
# In its first attempt it stands still in the middle of step 7 until it is let go.
TASK = """
import os
import time
from pathlib import Path

from service.recipes import digits
from service.task import supervised

HERE = Path(__file__).parent
FORWARDS = 0


def held(model, inputs):
    global FORWARDS
    FORWARDS += model.training
    first = os.environ.get("SLURM_RESTART_COUNT", "0") == "0" and "SLURM_JOB_ID" in os.environ
    if (first or (HERE / "always").exists()) and FORWARDS == 14:
        for fault in HERE.glob("fault-*"):
            exec(fault.read_text(), {"rank": int(os.environ["RANK"])})
        (HERE / f"held-{os.environ['SLURM_PROCID']}").touch()
        while not (HERE / "go").exists():
            time.sleep(0.01)


def network():
    model = digits.network(8, 0.25)
    model.register_forward_pre_hook(held)
    return model


def task():
    train, test = digits.split_by_class(*digits.load())
    return supervised(model=network, train=train, test=test, measures=("accuracy",))
"""
JOB: dict[str, Any] = {
    "name": "job",
    "task": "./held.py:task",
    "batch": {"global_batch": 48, "micro_batch": 12},
    "length": {"steps": 14},
    "optimizer": {"name": "adam", "lr": 0.01},
    "exactness": "bitwise",
    "checkpoint": {"every_steps": 3, "keep": 2},
    "tracking": {"log_every_steps": 1},
    "faults": {"stop_poll_steps": 1},
    "slurm": {"nodes": 2, "gpus_per_node": 0, "options": ["--exclusive"]},
}


class Place:
    """A directory with the job, on the cluster."""

    def __init__(self, path: Path, cluster: Cluster, plain: Path) -> None:
        self.path, self.cluster, self.plain = path, cluster, plain
        write_job(path)

    def ran(self, *words: object, code: int = 0) -> str:
        """What a command of ours prints; its exit code is looked at."""
        done = self.cluster.ran("evenstep", *words, cwd=self.path)
        assert done.returncode == code, (words, done.stdout, done.stderr)
        return done.stdout + done.stderr

    def submitted(self, *overrides: str) -> str:
        """The number of the job."""
        told = self.ran("slurm", "submit", "job.yaml", *overrides)
        found = re.search(r"submitted as job (\d+)", told)
        assert found is not None, told
        return found[1]

    def until_held(self) -> None:
        for node in range(2):
            until((self.path / f"held-{node}").exists, f"step 7 on node {node}")

    def let_go(self) -> None:
        (self.path / "go").touch()

    def log(self, job: str) -> str:
        file = self.path / f"runs/.slurm/job/log-{job}"
        return file.read_text() if file.exists() else ""

    def facts(self) -> dict[str, Any]:
        facts: dict[str, Any] = json.loads((self.path / "runs/job/run.json").read_text())
        return facts

    def outcomes(self) -> list[str]:
        return [attempt["outcome"] for attempt in self.facts()["attempts"]]

    def has_the_bits_of_the_undisturbed_run(self) -> None:
        told = evenstep("verify", self.path / "runs/job", self.plain, cwd=self.path)
        assert told.returncode == 0, told.stdout
        bits = evenstep(
            "verify", self.path / "runs/job", self.plain, "--level", "bits", cwd=self.path
        )
        assert bits.returncode == 0, bits.stdout


def write_job(path: Path) -> None:
    (path / "held.py").write_text(TASK)
    (path / "job.yaml").write_text(json.dumps(JOB))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The undisturbed run in one process."""
    path = tmp_path_factory.mktemp("plain")
    write_job(path)
    done = evenstep("run", "job.yaml", cwd=path, EVENSTEP_DEVICE="cpu")
    assert done.returncode == 0, done.stderr
    return path / "runs/job"


@pytest.fixture
def place(tmp_path: Path, cluster: Cluster, plain: Path) -> Iterator[Place]:
    yield Place(tmp_path, cluster, plain)
    cluster.ran("scancel", "--user=root")
    cluster.wait_until_idle()


def test_a_job_whose_time_is_nearly_up_continues_where_it_was(place: Place) -> None:
    """As Slurm asks it by --signal=B:TERM@, here by hand."""
    job = place.submitted()
    place.until_held()
    status = place.ran("slurm", "status", "job.yaml")
    assert re.search(rf"job: job {job} is running \(2 nodes on n\[0-1\], \d:\d\d so far", status)
    assert "  step 6 of 14, loss " in status
    assert f"log: {place.path}/runs/.slurm/job/log-{job}" in status
    again = place.ran("slurm", "submit", "job.yaml", code=64)
    assert f"Job {job} of job exists already and has not ended" in again
    place.cluster.done("scancel", "--batch", "--signal=TERM", job)
    until(lambda: "SIGUSR1: saving" in place.log(job), "the launchers have heard")
    place.let_go()
    place.cluster.wait_for(job, "COMPLETED")
    assert place.cluster.restarts_of(job) == 1
    assert place.outcomes() == ["stopped", "done"]
    assert place.facts()["attempts"][1]["from_step"] == 7
    place.has_the_bits_of_the_undisturbed_run()
    assert "has ended with 0 (done)" in place.ran("slurm", "status", "job")
    assert "Done after step 14" in place.ran("slurm", "logs", "job")
    assert "Node 1 of 2" in place.ran("slurm", "logs", "job", "--node", 1)


def test_a_job_that_is_cancelled_saves_and_is_not_queued_again(place: Place) -> None:
    job = place.submitted()
    place.until_held()
    told = place.ran("slurm", "cancel", "job.yaml")
    assert "job is stopping with a checkpoint; submit it again to continue." in told
    until(lambda: "SIGUSR1: saving" in place.log(job), "the launchers have heard")
    place.let_go()
    assert place.cluster.wait_for(job, "FAILED", "COMPLETED", "PENDING") == "FAILED"
    assert place.outcomes() == ["stopped"]
    assert "has ended with 75 (stopped, its state is saved)" in place.ran("slurm", "status", "job")
    assert "There is no job of job in Slurm's queue" in place.ran("slurm", "cancel", "job", code=1)
    place.ran("slurm", "submit", "job.yaml", "--wait")
    place.has_the_bits_of_the_undisturbed_run()


def test_what_would_fail_again_is_not_queued_again(place: Place) -> None:
    """Though the other node ends with 76, which alone would be."""
    (place.path / "fault-1.py").write_text(
        "from service.basics.errors import Diverged\n"
        "if rank == 1:\n    raise Diverged('not a number')\n"
    )
    job = place.submitted()
    place.cluster.wait_for(job, "FAILED")
    assert "has ended with 42 (would fail again)" in place.ran("slurm", "status", "job")
    assert "Exited with exit code 76" in place.log(job)
    assert place.cluster.restarts_of(job) == 0


def test_a_job_that_waits_says_why(place: Place) -> None:
    place.submitted("slurm.nodes=1", "slurm.options=[--hold]")
    told = place.ran("slurm", "status", "job")
    assert re.search(
        r"job: job \d+ is pending \(JobHeldUser: you hold it: scontrol release JOB\)", told
    )
    assert "job is out of the queue" in place.ran("slurm", "cancel", "job")


def test_a_sweep_is_a_run_for_each_setting(place: Place) -> None:
    words = ("slurm.nodes=1", "slurm.options=[]", "length={steps: 3}")
    words += ("--sweep", "optimizer.lr=0.01,0.02", "--wait")
    place.ran("slurm", "submit", "job.yaml", *words)
    rates = {}
    for number in range(2):
        run = place.path / f"runs/job-{number}"
        rates[number] = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["train/lr"]
        assert json.loads((run / "run.json").read_text())["state"] == "done"
    assert rates == {0: 0.01, 1: 0.02}
    status = place.ran("slurm", "status", "job")
    assert "  job-0: done\n  job-1: done\n" in status


def test_one_job_of_a_sweep_is_queued_again_alone(place: Place) -> None:
    """Of an array: the other one, whose time is not up, goes on in its first attempt."""
    words = ("slurm.nodes=1", "slurm.processes_per_node=2", "slurm.options=[]")
    words += ("--sweep", "seed=1,2")
    told = place.ran("slurm", "submit", "job.yaml", *words)
    found = re.search(r"submitted as job (\d+)", told)
    assert found is not None, told
    jobs = [f"{found[1]}_{number}" for number in range(2)]
    until(lambda: all("step=6/14" in place.log(job) for job in jobs), "both are held")
    place.cluster.done("scancel", "--batch", "--signal=TERM", jobs[1])
    until(lambda: "SIGUSR1: saving" in place.log(jobs[1]), "the launcher has heard")
    place.let_go()
    for job in jobs:
        place.cluster.wait_for(job, "COMPLETED")
    assert [place.cluster.restarts_of(job) for job in jobs] == [0, 1]
    runs = [place.path / f"runs/job-{number}/run.json" for number in range(2)]
    attempts = [json.loads(run.read_text())["attempts"] for run in runs]
    outcomes = [[attempt["outcome"] for attempt in each] for each in attempts]
    assert outcomes == [["done"], ["stopped", "done"]]


def test_what_slurm_refuses_is_reported_in_words(place: Place) -> None:
    told = place.ran("slurm", "submit", "job.yaml", "slurm.partition=none", code=64)
    assert "Invalid partition name specified. See slurm.partition; sinfo lists them." in told


# ---- chaos


@pytest.mark.slow
@pytest.mark.parametrize("node", ["n1", "n0"])
def test_a_job_survives_the_loss_of_a_node(place: Place, node: str) -> None:
    """The second one, and the first, on which the script and srun run too."""
    job = place.submitted()
    place.until_held()
    place.cluster.kill_node(node)
    place.let_go()
    place.cluster.wait_for(job, "PENDING")
    place.cluster.start_node(node)
    place.cluster.wait_for(job, "COMPLETED")
    assert place.cluster.restarts_of(job) == 1
    assert place.outcomes()[-1] == "done"
    assert len(place.outcomes()) == 2
    place.has_the_bits_of_the_undisturbed_run()


@pytest.mark.slow
def test_a_job_survives_a_restart_of_the_controller(place: Place) -> None:
    job = place.submitted()
    place.until_held()
    place.cluster.kill_controller()
    told = place.ran("slurm", "status", "job", code=1)
    assert "Slurm's controller does not respond" in told
    place.let_go()
    until(lambda: "Done after step 14" in place.log(job), "it trains on without a controller")
    place.cluster.start_controller()
    place.cluster.wait_for(job, "COMPLETED")
    assert place.outcomes() == ["done"]
    place.has_the_bits_of_the_undisturbed_run()


@pytest.mark.slow
def test_a_preempted_job_saves_and_resumes(place: Place) -> None:
    job = place.submitted("slurm.partition=main")
    place.until_held()
    urgent = place.cluster.done(
        *("sbatch", "--parsable", "--nodes=2", "--exclusive", "--partition=urgent"),
        *("--output=/dev/null", "--wrap=true"),
    )
    until(lambda: "SIGTERM: saving" in place.log(job), "the launchers have heard")
    place.let_go()
    place.cluster.wait_for(urgent, "COMPLETED")
    place.cluster.wait_for(job, "COMPLETED")
    assert place.cluster.restarts_of(job) == 1
    assert place.outcomes() == ["stopped", "done"]
    place.has_the_bits_of_the_undisturbed_run()


@pytest.mark.slow
def test_a_time_limit_during_a_save_requeues_the_job(place: Place) -> None:
    """It is held beyond the limit and the time that Slurm then gives, and killed."""
    job = place.submitted("slurm.time=00:01:01", "slurm.stop_seconds=30")
    place.until_held()
    until(lambda: "SIGUSR1: saving" in place.log(job), "the time is nearly up")
    place.cluster.wait_for(job, "PENDING", "TIMEOUT")
    assert place.cluster.state_of(job) == "PENDING"
    place.let_go()
    place.cluster.wait_for(job, "COMPLETED")
    assert place.outcomes() == ["lost", "done"]
    assert place.facts()["attempts"][1]["from_step"] == 6
    place.has_the_bits_of_the_undisturbed_run()


@pytest.mark.slow
def test_scancel_saves_and_does_not_requeue(place: Place) -> None:
    job = place.submitted()
    place.until_held()
    place.cluster.done("scancel", job)
    until(lambda: "saving the state" in place.log(job), "the launchers have heard")
    place.let_go()
    place.cluster.wait_for(job, "CANCELLED")
    place.cluster.wait_until_idle()
    assert place.cluster.state_of(job) == "CANCELLED"
    assert place.outcomes() == ["stopped"]
    place.ran("slurm", "submit", "job.yaml", "--wait")
    place.has_the_bits_of_the_undisturbed_run()


@pytest.mark.slow
def test_repeated_crashes_end_the_job(place: Place) -> None:
    (place.path / "always").touch()
    (place.path / "fault-1.py").write_text(
        "import os, signal\nif rank == 1:\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    job = place.submitted("slurm.restarts=1")
    until(lambda: place.cluster.state_of(job) == "FAILED", "it has failed for good")
    assert place.cluster.restarts_of(job) == 1
    assert "failed 2 times, the last with 137" in place.ran("slurm", "status", "job")
