"""Under somebody else's torchrun: nodes come and go, and a request to stop saves at once."""

import json
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from commands import BIN, CLEAN, DEADLINE_SECONDS, command, evenstep
from injuring import descendants, is_alive, until
from jobs import spec_of

from launch.environment import _started
from service.runs.directory import RunDirectory
from service.runs.receipt_file import read_receipt

ELASTIC = ("--nnodes", "1:2", "--nproc-per-node", "1", "--max-restarts", "3", "--rdzv-id", "job")
QUICK = "last_call_timeout=3,keep_alive_interval=1,keep_alive_max_attempt=3"


def node(place: Path, name: str, port: int) -> subprocess.Popen[str]:
    """One agent of an elastic job, its output in a file."""
    rendezvous = ("--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}")
    words = (BIN / "torchrun", *ELASTIC, *rendezvous, "--rdzv-conf", QUICK, "-m", "launch", "run")
    # With it, torch 2.13 gives each attempt a store of its own: a rank must not meet dead ones.
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
from pathlib import Path
import torch
from torch import nn
from service.data.task import supervised

PASSES = 0

class Fails(nn.Linear):
    def forward(self, inputs):
        global PASSES
        PASSES += self.training
        if PASSES == 12 and Path("failures").exists():
            with open("failures", "r+") as left:
                count = int(left.read())
                if count:
                    left.seek(0)
                    left.write(str(count - 1))
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


def test_a_restart_of_torchrun_does_not_start_over_again_with_fresh(tmp_path):
    (tmp_path / "job.py").write_text(FAILS_TWICE)
    values = spec_of("", task="./job.py:task", batch={"global_batch": 7}, length={"steps": 30})
    (tmp_path / "job.yaml").write_text(json.dumps(values | {"checkpoint": {"every_steps": 2}}))
    words = ("-m", "launch", "run", "job.yaml", "--fresh")
    agent = (BIN / "torchrun", "--standalone", "--nproc-per-node", 1, "--max-restarts", 2)
    earlier = evenstep("run", "job.yaml", cwd=tmp_path)
    assert earlier.returncode == 0, earlier.stderr
    (tmp_path / "failures").write_text("2")
    done = command(*agent, *words, cwd=tmp_path, timeout=DEADLINE_SECONDS)
    assert done.returncode == 0, done.stderr
    facts = RunDirectory(tmp_path / "runs/job").read_facts()
    steps = [attempt["from_step"] for attempt in facts["attempts"]]
    assert len(steps) == 3, steps
    assert 0 == steps[0] < steps[1] < steps[2]
    aside = [found.parent for found in tmp_path.glob("runs/.job-*/run.json")]
    assert len(aside) == 1, "the earlier run"
    assert RunDirectory(aside[0]).read_facts()["state"] == "done"


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
