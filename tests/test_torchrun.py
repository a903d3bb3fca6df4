"""Under somebody else's torchrun: nodes come and go, and a request to stop saves at once."""

import json
import os
import re
import signal
import socket
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from commands import BIN, CLEAN, DEADLINE_SECONDS, command, evenstep, start
from injuring import descendants, is_alive, until
from jobs import spec_of

from launch.environment import _started
from service.runs.directory import RunDirectory
from service.runs.receipt_file import read_receipt
from service.runs.verification import compare

ELASTIC = ("--nnodes", "1:2", "--nproc-per-node", "1", "--max-restarts", "3", "--rdzv-id", "job")
QUICK = "last_call_timeout=3,keep_alive_interval=1,keep_alive_max_attempt=3"


def node(place: Path, name: str, port: int) -> subprocess.Popen[str]:
    """One agent of an elastic job, its output in a file."""
    rendezvous = ("--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}")
    words = (BIN / "torchrun", *ELASTIC, *rendezvous, "--rdzv-conf", QUICK, "-m", "launch", "run")
    # Without it, torch 2.13 keeps the address of its store when another node becomes the first one.
    environ = CLEAN | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with (place / name).open("w") as output:
        return subprocess.Popen(
            [*map(str, words), "job.yaml"],
            cwd=place,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            text=True,
            start_new_session=True,
        )


@pytest.mark.slow
def test_an_elastic_job_continues_with_the_nodes_that_are_left_and_stops_with_its_state(tmp_path):
    job = spec_of("plain_rows", length={"steps": 3000}, checkpoint={"every_steps": 10})
    (tmp_path / "job.yaml").write_text(json.dumps(job | {"test": {"every_steps": 1000}}))
    directory = RunDirectory(tmp_path / "runs/job")

    def attempts() -> list[dict[str, float]]:
        return directory.read_facts()["attempts"] if directory.facts.exists() else []

    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    first, second = (node(tmp_path, name, port) for name in ("first", "second"))
    try:
        until(lambda: attempts() and attempts()[-1]["processes"] == 2, "a run on two nodes")
        until(lambda: list(directory.checkpoints.glob("step-*")), "a checkpoint")
        # The one that hosts the rendezvous must stay: without it the other leaves as well.
        hosts = b"second" if b":%d" % port in listening(second.pid) else b"first"
        lost, left = (first, second) if hosts == b"second" else (second, first)
        below = descendants(lost.pid)
        for process in (lost.pid, *below):
            os.kill(process, signal.SIGKILL)
        until(lambda: attempts()[-1]["processes"] == 1, "a run on the node that is left")
        began = attempts()[-1]["from_step"]
        assert began >= 10
        until(lambda: max(read_receipt(directory.receipt)) > began + 20, "twenty steps")
        below = descendants(left.pid)
        left.terminate()
        left.wait(timeout=60)
        until(lambda: not any(map(is_alive, below)), "the end of all that it started")
    finally:
        for agent in (first, second):
            if agent.poll() is None:
                os.killpg(agent.pid, signal.SIGKILL)
            agent.wait()
    told = (tmp_path / hosts.decode()).read_text()
    assert "may take 30 s, which is its --shutdown-timeout" in told
    assert "the state is saved in" in told
    assert directory.read_facts()["state"] == "stopped"
    stopped = attempts()[-1]["to_step"]
    assert (directory.checkpoints / f"step-{stopped:08d}").is_dir()
    rows = read_receipt(directory.receipt)
    assert sorted(rows) == [*range(1, stopped + 1)]
    words = ("--name", "whole", "--stop-at", stopped)
    assert evenstep("run", "job.yaml", *words, cwd=tmp_path).returncode == 75
    assert rows == read_receipt(tmp_path / "runs/whole/receipt.jsonl"), "on exactly the same rows"


FAILS_TWICE = """
import os
from pathlib import Path
import torch
from torch import nn
from service.data.task import supervised

PASSES = 0

class Fails(nn.Linear):
    def forward(self, inputs):
        global PASSES
        PASSES += self.training
        if PASSES == 12 and os.environ.get("RANK") == os.environ.get("FAILING_RANK"):
            left = Path("failures")
            count = int(left.read_text())
            if count:
                left.write_text(str(count - 1))
                raise RuntimeError("as asked")
        return super().forward(inputs)

class Rows:
    def __len__(self):
        return 43

    def __getitem__(self, row):
        return torch.full((4,), row / 43), row % 3

def task():
    return supervised(model=lambda: Fails(4, 3), train=Rows(), test=Rows())
"""


def job_that_fails(directory, times=1, **values):
    """Write a job whose rank FAILING_RANK fails so many times, in its twelfth pass."""
    (directory / "job.py").write_text(FAILS_TWICE)
    values = {"batch": {"global_batch": 7}, "checkpoint": {"every_steps": 2}} | values
    job = spec_of("", task="./job.py:task", length={"steps": 30}, **values)
    (directory / "job.yaml").write_text(json.dumps(job))
    (directory / "failures").write_text(str(times))


def from_steps(directory):
    return [attempt["from_step"] for attempt in RunDirectory(directory).read_facts()["attempts"]]


def test_a_restart_of_torchrun_does_not_start_over_again_with_fresh(tmp_path):
    job_that_fails(tmp_path, times=2)
    words = ("-m", "launch", "run", "job.yaml", "--fresh")
    agent = (BIN / "torchrun", "--standalone", "--nproc-per-node", 1, "--max-restarts", 2)
    earlier = evenstep("run", "job.yaml", cwd=tmp_path, FAILING_RANK="none")
    assert earlier.returncode == 0, earlier.stderr
    done = command(*agent, *words, cwd=tmp_path, timeout=DEADLINE_SECONDS, FAILING_RANK="0")
    assert done.returncode == 0, done.stderr
    steps = from_steps(tmp_path / "runs/job")
    assert len(steps) == 3, steps
    assert 0 == steps[0] < steps[1] < steps[2]
    aside = [found.parent for found in tmp_path.glob("runs/.job-*/run.json")]
    assert len(aside) == 1, "the earlier run"
    assert RunDirectory(aside[0]).read_facts()["state"] == "done"


# Each of two processes has two micro-batches: twelve passes are three steps.
SHARED = {"batch": {"global_batch": 8, "micro_batch": 2}}


def test_torchrun_restarts_several_processes_which_meet_no_dead_ones(tmp_path):
    """torch keeps one store for all attempts, with the addresses of processes that have ended."""
    job_that_fails(tmp_path, times=2, **SHARED)
    agent = (BIN / "torchrun", "--standalone", "--nproc-per-node", 2, "--max-restarts", 2)
    words = ("-m", "launch", "run", "job.yaml")
    done = command(*agent, *words, cwd=tmp_path, timeout=DEADLINE_SECONDS, FAILING_RANK="1")
    assert done.returncode == 0, done.stderr
    assert len(from_steps(tmp_path / "runs/job")) == 3
    whole = evenstep("run", "job.yaml", "--name", "whole", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    ends = [RunDirectory(tmp_path / "runs" / name) for name in ("job", "whole")]
    compared = compare(*ends, level="losses", tolerance=1e-5)
    assert compared.equal, compared.lines


@pytest.mark.parametrize("backend", ["c10d", pytest.param("static", marks=pytest.mark.slow)])
def test_torchrun_restarts_the_processes_of_two_nodes_after_a_failure_on_one(tmp_path, backend):
    """Only the agent of that node counts it as a restart."""
    job_that_fails(tmp_path, **SHARED)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    job = ("--nnodes", 2, "--nproc-per-node", 1, "--max-restarts", 3, "--rdzv-id", "job")
    meeting = ("--rdzv-backend", backend, "--rdzv-endpoint", f"localhost:{port}")
    words = ("--monitor-interval", 0.1, "-m", "launch", "run", "job.yaml")
    nodes = [
        start(
            (BIN / "torchrun", *job, *meeting, "--node-rank", index, *words),
            cwd=tmp_path,
            env=CLEAN | {"FAILING_RANK": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in (0, 1)
    ]
    try:
        told = [node.communicate(timeout=DEADLINE_SECONDS)[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], told
    assert len(from_steps(tmp_path / "runs/job")) == 2, told


def test_the_start_of_a_process_is_told_to_hundredths_of_a_second():
    before = time.time()
    with subprocess.Popen(["sleep", "60"]) as started:
        after = time.time()
        told = _started(psutil.Process(started.pid))
        started.kill()
    assert before - 0.03 <= told <= after + 0.03


def listening(process: int) -> bytes:
    """Ports on which the process listens, as `:port` words."""
    found = psutil.Process(process).net_connections(kind="tcp")
    return b" ".join(b":%d" % c.laddr.port for c in found if c.status == psutil.CONN_LISTEN)


def test_a_torchrun_that_nodes_may_join_is_told_what_it_needs(tmp_path):
    job_that_fails(tmp_path, times=0)
    meeting = ("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0")
    agent = (BIN / "torchrun", "--nnodes", "1:2", *meeting, "--rdzv-conf", "last_call_timeout=1")
    words = ("-m", "launch", "run", "job.yaml", "--stop-at", "2")
    done = command(*agent, *words, cwd=tmp_path, timeout=DEADLINE_SECONDS)
    advice = "--nnodes 1:2: when a node joins, or the first one is lost, torchrun itself may end"
    assert advice in done.stderr, done.stderr


def test_processes_that_torchrun_starts_with_other_settings_are_refused(tmp_path):
    """With another rate they trained apart; with another --stop-at one ended by SIGABRT."""
    job_that_fails(tmp_path, times=0, **SHARED)
    others = "--runs two optimizer.lr=0.2 --stop-at 2"
    chosen = f"if [ $RANK = 0 ]; then set -- --runs one; else set -- {others}; fi"
    script = f'{chosen}; exec "$0" -m launch run job.yaml "$@"'
    agent = (BIN / "torchrun", "--standalone", "--nproc-per-node", 2, "--no-python")
    words = (*agent, "sh", "-c", script, BIN / "python")
    done = command(*words, cwd=tmp_path, timeout=DEADLINE_SECONDS)
    assert done.returncode == 1, done.stderr
    assert "error: rank 1 was started with other settings than rank 0" in done.stderr
    assert "  --runs: one on rank 0, two on rank 1\n" in done.stderr
    assert "  --stop-at: not set on rank 0, 2 on rank 1\n" in done.stderr
    assert re.search(r"  optimizer\.lr: \S+ on rank 0, 0\.2 on rank 1\n", done.stderr)
    assert "exitcode  : 64" in done.stderr
    assert not list(tmp_path.glob("*/job/checkpoints/step-*"))
