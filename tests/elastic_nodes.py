"""Nodes of an elastic job on this machine: real launchers that a test kills and starts again."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from commands import BIN, CLEAN, DEADLINE_SECONDS, evenstep
from commands import start as start_command
from injuring import until
from stored import newest_step

from service.basics.errors import Stopped
from service.runs.checkpoint_files import checkpoints_in
from service.storage.address import Address

TASK = """
import os
import threading
import time
from pathlib import Path

import torch
from torch.utils.data import TensorDataset

from service.data.task import supervised

HOLD = Path(os.environ.get("HOLD_FILE", Path(__file__).with_name("hold")))
PAUSE = float(os.environ.get("PAUSE_SECONDS", 0.08))
ASKED, SENDING = (Path(__file__).with_name(name) for name in ("stop-sending", "sending"))
before, really_send = [None], torch.distributed.send


# If it is asked for, the writer stops where it has sent the place of some rows, and not the rows.
def send(numbers, *told, **named):
    if threading.current_thread() is not threading.main_thread() and ASKED.exists():
        if numbers.dtype == torch.uint8 and before[0] == torch.int64:
            SENDING.touch()
            time.sleep(3600)
        before[0] = numbers.dtype
    return really_send(numbers, *told, **named)


torch.distributed.send = send


class Model(torch.nn.Linear):
    def forward(self, rows):
        if self.training and HOLD.exists():
            time.sleep(PAUSE)  # so that there are steps left when nodes come and go
        return super().forward(rows)


def task():
    made = torch.Generator().manual_seed(5)
    rows = torch.rand(97, 4, generator=made, dtype=torch.float64)
    rows = TensorDataset(rows, torch.arange(97) % 3)
    return supervised(model=lambda: Model(4, 3, dtype=torch.float64), train=rows, test=rows)
"""
STEPS = 400
SPEC: dict[str, Any] = {
    "name": "job",
    "task": "./job.py:task",
    "batch": {"global_batch": 10, "micro_batch": 3},  # 4 micro-batches, the last of 1 row
    "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9},
    "checkpoint": {"every_steps": 3},
    "test": {"every_steps": 200},
    "tracking": {"log_every_steps": 1},
    "faults": {"stop_poll_steps": 1},
}


class Nodes:
    """The launchers of one job; each has a log file, and is killed at the end."""

    def __init__(
        self,
        place: Path,
        nodes: str,
        *,
        wait_seconds: int = 60,
        steps: int = STEPS,
        sections: Mapping[str, Any] | None = None,
        address: Address | None = None,
        **more: str,
    ) -> None:
        """With an `address` the runs live there, and each node has a scratch directory."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = int(free.getsockname()[1])
        self.nodes, self.steps, self.address = nodes, steps, address
        self.place, self.hold = place, place / "hold"
        self.stop_sending, self.sending = place / "stop-sending", place / "sending"
        self._variables = {
            "PET_NPROC_PER_NODE": "1",
            "PET_MASTER_ADDR": "127.0.0.1",
            "PET_MASTER_PORT": str(self.port),
            "EVENSTEP_SECRET": secrets.token_hex(16),
            "EVENSTEP_DEVICE": "cpu",
            **more,
        }
        least, _, most = nodes.partition(":")
        asked = {"least": int(least), "most": int(most or 0), "wait_seconds": wait_seconds}
        cluster = {"image": "example.com/x:1", "nodes": asked if most else int(least)}
        cluster["meeting_seconds"] = 120
        (place / "job.py").write_text(TASK)
        (place / "job.yaml").write_text(
            json.dumps(
                {**SPEC, "length": {"steps": steps}, "kubernetes": cluster, **(sections or {})}
            )
        )
        self.hold.touch()
        self.client = {name: value for name, value in more.items() if name.startswith("AWS_")}
        self._started: list[subprocess.Popen[bytes]] = []

    def start(self, index: int, *, name: str = "", **more: str) -> subprocess.Popen[bytes]:
        """Start the launcher of a node; its log goes on where that of an earlier one ended."""
        runs = () if self.address is None else ("--runs", str(self.address))
        scratch = {"EVENSTEP_SCRATCH": str(self.place / f"disk-{index}")}
        with self._log(name or str(index)).open("ab") as log:
            process = start_command(
                [BIN / "evenstep", "run", "job.yaml", "--nodes", self.nodes, *runs],
                cwd=self.place,
                env=CLEAN | self._variables | scratch | {"PET_NODE_RANK": str(index)} | more,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self._started.append(process)
        return process

    def output(self, name: int | str) -> str:
        """What the launchers of a node have written."""
        return self._log(str(name)).read_text()

    def _log(self, name: str) -> Path:
        return self.place / f"node-{name}.log"

    @property
    def saved_step(self) -> int:
        """The step of the newest checkpoint, in the store if there is one; 0 before the first."""
        if self.address is not None:
            return newest_step(self.address)
        saved = checkpoints_in(self.place / "runs/job/checkpoints")
        return saved[-1].step if saved else 0

    def until_said(self, text: str, *, by: int | str = 0, times: int = 1) -> None:
        """Wait until a node has written this."""

        def said() -> bool:
            known = (None, -signal.SIGKILL, Stopped.exit_code)  # alive, lost, drained
            ended = [each.returncode for each in self._started if each.poll() not in known]
            assert not ended or text in self.output(by), f"{ended}\n{self.everything()}"
            return self.output(by).count(text) >= times

        until(said, text)

    def until_saved(self, more: int = 1) -> None:
        """Wait until a checkpoint that is newer by at least this number of steps is complete."""
        before = self.saved_step
        until(lambda: self.saved_step >= before + more, f"a checkpoint after step {before}")

    def kill_in_the_midst_of_a_save(self, sender: subprocess.Popen[bytes]) -> None:
        """Kill a node while its process sends rows of a checkpoint to node 0."""
        self.stop_sending.touch()
        until(self.sending.exists, "rows of a checkpoint on their way", of=sender)
        partial = "disk-0/*/job/checkpoints/.step-*.partial-*"
        assert list(self.place.glob(partial)), "node 0 waits for them"
        sender.kill()
        sender.wait()
        self.stop_sending.unlink()

    def release(self) -> None:
        """Let the steps that are left be taken at full speed."""
        self.hold.unlink()

    def everything(self) -> str:
        """All logs, for the message of a test that fails."""
        logs = sorted(self.place.glob("node-*.log"))
        told = []
        for log in logs:
            lines = log.read_text().splitlines()
            told += [f"== {log.name}", *(line for line in lines if "grad_norm=" not in line)]
        return "\n".join(told)

    def end(self) -> None:
        """Kill what is left."""
        for process in self._started:
            if process.poll() is None:
                os.kill(process.pid, signal.SIGCONT)
                process.kill()
            process.wait()


@contextmanager
def elastic_nodes(place: Path, nodes: str, **how: Any) -> Iterator[Nodes]:
    """The nodes of a job; all of them are killed at the end."""
    found = Nodes(place, nodes, **how)
    try:
        yield found
    finally:
        found.end()


def ended(process: subprocess.Popen[bytes]) -> int:
    """The exit code of a launcher."""
    return process.wait(timeout=DEADLINE_SECONDS)


def require_undisturbed(nodes: Nodes, *, bits: bool = False) -> None:
    """The same run on one process has the same rows, and in float64 the same losses.

    Args:
        bits: with `exactness: bitwise`, also equal bits of the losses and the weights.
    """
    nodes.hold.unlink(missing_ok=True)
    alone = evenstep("run", "job.yaml", "--name", "alone", cwd=nodes.place)
    assert alone.returncode == 0, alone.stderr
    level = ("--level", "bits") if bits else ("--tolerance", "1e-9")
    run = "runs/job" if nodes.address is None else f"{nodes.address}/job"
    words = ("verify", run, "runs/alone", *level)
    compared = evenstep(*words, cwd=nodes.place, **nodes.client)
    assert compared.returncode == 0, (compared.stdout, nodes.everything())
    assert f"{nodes.steps:,} steps" in compared.stdout, compared.stdout
