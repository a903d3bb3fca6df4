"""Which failure is a process's own and which follows from the loss of another, in its exit code."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch.distributed as dist
from commands import BIN, CLEAN, DEADLINE_SECONDS, ROOT, command, evenstep, start

from launch.processes.agent import Rank
from launch.processes.local import root_cause
from service.distributed.world import backend_advice, lost_peer

# As torch 2.13 writes them (c10d/NCCLUtils.hpp, C10D_NCCL_CHECK) around what NCCL 2.27 says.
_NCCL = "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:94, "
_SYSTEM = (
    "unhandled system error (run with NCCL_DEBUG=INFO for details), NCCL version 2.27.5\n"
    "ncclSystemError: System call (e.g. socket, malloc) or external library call failed or device "
    "error. \nLast error:\n"
)
_REMOTE = (
    "remote process exited or there was a network error, NCCL version 2.27.5\n"
    "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting "
    "prematurely.\nLast error:\nsocketProgress: Connection closed by remote peer node-1<40711>"
)
_STORE = (
    "[1] is setting up NCCL communicator and retrieving ncclUniqueId from [0] via c10d key-value "
    "store by key '0', but store->get('0') got error: Connection reset by peer. This may indicate "
    "a possible application crash on rank 0 or a network set up issue."
)
LOSSES = {
    "a peer that exited": dist.DistBackendError(_NCCL + _REMOTE),
    "a connection that broke": dist.DistBackendError(
        f"{_NCCL}{_SYSTEM}socketProgressOpt: Call to recv from 10.0.0.2<5000> failed : "
        "Connection reset by peer"
    ),
    "a group aborted for it": dist.DistBackendError(
        f"NCCL communicator was aborted on rank 0.  Original reason for failure was: {_NCCL}"
        + _REMOTE
    ),
    "a store that is gone": dist.DistNetworkError(
        "Failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown "
        "or crash?"
    ),
    "a store that was gone before": dist.DistNetworkError(
        "The client socket has timed out after 3000ms while trying to connect to (10.0.0.1, 29744)."
    ),
    "a first process gone before they met": dist.DistBackendError(_STORE),
    "a first process that does not come": dist.DistBackendError(
        _STORE.replace("Connection reset by peer", "wait timeout after 60000ms, keys: /0//cuda//0")
    ),
    "a peer that gloo misses": RuntimeError(
        "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer "
        "[127.0.0.1]:41033. This is typically due to a remote process crash."
    ),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_the_loss_of_a_peer_is_reported_as_such(loss: str) -> None:
    lost = lost_peer(LOSSES[loss])
    assert lost is not None
    assert lost.exit_code == 76
    assert "\n" not in str(lost)


_OUT_OF_MEMORY = (
    f"{_NCCL}unhandled cuda error (run with NCCL_DEBUG=INFO for details), NCCL version 2.27.5\n"
    "ncclUnhandledCudaError: Call to CUDA function failed.\n"
    "Last error:\nCuda failure 2 'out of memory'"
)
MISTAKES = {
    f"{_NCCL}{_SYSTEM}Error while creating shared memory segment /dev/shm/nccl-cjY8K5 "
    "(size 10617216), error: No space left on device (28)": "/dev/shm is too small: raise it",
    f"{_NCCL}invalid usage (run with NCCL_DEBUG=WARN for details), NCCL version 2.27.5\n"
    "ncclInvalidUsage: This usually reflects invalid usage of NCCL library.\nLast error:\n"
    "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 50000": "Two processes compute",
    _OUT_OF_MEMORY: "",
    "[Rank 1] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=78, OpType=ALLREDUCE, "
    "NumelIn=29360128, NumelOut=29360128, Timeout(ms)=660000) ran for 660009 milliseconds before "
    "timing out.": "",
}


@pytest.mark.parametrize("message", MISTAKES)
def test_a_mistake_that_nccl_finds_is_no_lost_peer_and_says_what_helps(message: str) -> None:
    error = dist.DistBackendError(message)
    assert lost_peer(error) is None, "it would be started again for ever"
    assert MISTAKES[message] in backend_advice(error)
    assert backend_advice(error).endswith("NCCL_DEBUG=INFO shows what NCCL did before.")
    assert backend_advice(RuntimeError(message)) == ""


MISTAKEN = """
import sys
import torch.distributed as dist
from launch.rank.entry import RankContext, outcome_of
from launch.rank.exit import leave, leave_hung
from service.health.heartbeat import Heartbeat

def work():
    raise dist.DistBackendError(sys.argv[1])

end = outcome_of(work, context=RankContext(Heartbeat(), leave_hung))
print(end.message, flush=True)
leave(end.code)
"""


def test_a_mistake_that_nccl_finds_ends_with_1_and_what_helps() -> None:
    message = next(iter(MISTAKES))
    words = (sys.executable, "-c", MISTAKEN, message)  # a process of its own: it has to leave
    end = command(*words, cwd=ROOT, timeout=DEADLINE_SECONDS)
    assert end.returncode == 1, end.stderr
    for told in (end.stdout, end.stderr):
        assert "No space left on device (28)" in told
        assert "docker run --shm-size" in told
        assert told.rstrip().endswith("NCCL_DEBUG=INFO shows what NCCL did before.")


FAILING = """
import os
import signal
import time
from pathlib import Path

import torch
from torch.utils.data import TensorDataset

from service.data.task import supervised

RANK, HERE = int(os.environ["RANK"]), Path(__file__).parent


def stat_of(process):
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()


def until_gone(process):
    try:
        while stat_of(process)[0] != "Z":
            time.sleep(0.05)
    except OSError:
        pass


def fail(what):
    if what == "raise":
        raise RuntimeError("this rank fails alone")
    if what == "abort":
        os.abort()
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "lose the node":
        launcher = int(stat_of(os.getppid())[1])
        os.kill(launcher, signal.SIGKILL)
        time.sleep(600)
    if what.endswith("after the other"):
        until_gone(int((HERE / f"process-{1 - RANK}").read_text()))
        time.sleep(1)  # as long as a watchdog takes to look, and the launcher to hear of it
        if what.startswith("abort"):
            os.abort()


class Model(torch.nn.Linear):
    calls = 0

    def forward(self, rows):
        self.calls += self.training
        if self.calls == 9:
            fail(os.environ[f"FATE_{RANK}"])
        return super().forward(rows)


def task():
    (HERE / f"process-{RANK}").write_text(str(os.getpid()))
    rows = TensorDataset(torch.rand(40, 4), torch.arange(40) % 3)
    return supervised(model=lambda: Model(4, 3), train=rows, test=rows)
"""
SPEC = {
    "name": "job",
    "task": "./failing.py:task",
    "batch": {"global_batch": 8, "micro_batch": 4},
    "length": {"steps": 30},
    "optimizer": {"name": "sgd", "lr": 0.1},
}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "failing.py").write_text(FAILING)
    (tmp_path / "job.yaml").write_text(json.dumps(SPEC))
    return tmp_path


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def test_a_process_that_fails_alone_leaves_a_group_that_waits_for_its_peers(place: Path) -> None:
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    common |= {"MASTER_PORT": str(free_port()), "EVENSTEP_DEVICE": "cpu"}
    script = Path(__file__).with_name("waiting_group.py")
    with ExitStack() as stack:
        ranks = [
            start(
                [sys.executable, script, "run", "job.yaml"],
                cwd=place,
                env=CLEAN
                | common
                | {"RANK": str(rank), "LOCAL_RANK": str(rank), f"FATE_{rank}": fate},
                stderr=stack.enter_context((place / f"{rank}.err").open("w")),
                start_new_session=True,
            )
            for rank, fate in enumerate(("", "raise"))
        ]
        try:
            codes = [rank.wait(timeout=DEADLINE_SECONDS) for rank in reversed(ranks)]
        finally:
            for rank in ranks:
                if rank.poll() is None:
                    os.killpg(rank.pid, signal.SIGKILL)
                    rank.wait()
    assert codes == [1, 76], [(place / f"{n}.err").read_text() for n in (0, 1)]
    assert "this rank fails alone" in (place / "1.err").read_text()


@pytest.mark.parametrize(
    ("fates", "code", "told"),
    [
        (("abort after the other", "raise"), 1, "rank 1: RuntimeError: this rank fails alone"),
        (("abort after the other", "kill"), 137, "rank 1 was killed by SIGKILL"),
        (("", "abort"), 134, "rank 1 was killed by SIGABRT"),
    ],
)
def test_the_abort_of_a_process_whose_peer_is_gone_is_not_the_root_cause(
    place: Path, fates: tuple[str, str], code: int, told: str
) -> None:
    environ = {f"FATE_{rank}": fate for rank, fate in enumerate(fates)}
    ended = evenstep(
        "run", "job.yaml", "--processes", 2, cwd=place, EVENSTEP_DEVICE="cpu", **environ
    )
    assert ended.returncode == code, ended.stderr
    assert f"error: {told}" in ended.stderr


def test_a_kill_that_is_seen_together_with_an_abort_is_the_root_cause() -> None:
    """The agent looks at the ranks in their order: both may have ended since its last look."""
    ended = [
        Rank(number, cast(Any, None), ended=-signal_number, ended_time=1.0)
        for number, signal_number in enumerate((signal.SIGABRT, signal.SIGKILL))
    ]
    agent = cast(Any, SimpleNamespace(first_ended=ended, ranks=ended, overran=False))
    cause = root_cause(agent, [], budget_seconds=30.0)
    assert (cause.code, cause.told) == (137, "error: rank 1 was killed by SIGKILL.")


@pytest.mark.parametrize(
    ("fates", "codes"),
    [
        (("abort after the other", "lose the node"), (76, -signal.SIGKILL)),
        (("abort", "go on after the other"), (134, 76)),
    ],
)
def test_a_node_whose_process_aborts_after_another_node_is_lost_ends_with_76(
    place: Path, fates: tuple[str, str], codes: tuple[int, int]
) -> None:
    common = {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "1", "EVENSTEP_DEVICE": "cpu"}
    common |= {"PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": str(free_port())}
    common |= {f"FATE_{rank}": fate for rank, fate in enumerate(fates)}
    other = start(
        [BIN / "evenstep", "run", "job.yaml"],
        cwd=place,
        env=CLEAN | common | {"PET_NODE_RANK": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        ended = evenstep("run", "job.yaml", cwd=place, **common, PET_NODE_RANK="0")
        output, _ = other.communicate(timeout=DEADLINE_SECONDS)
    finally:
        other.kill()
        other.wait()
    assert (ended.returncode, other.returncode) == codes, (ended.stderr, output)
