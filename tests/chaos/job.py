"""The job that is injured: the digits, cut small, in a task that carries the injuries out itself.

It is user code, so every injury strikes the real command at an exact moment: in start-up, in a
forward or backward pass, in the test loop, in a save, on the way out.
"""

from __future__ import annotations

import atexit
import ctypes
import json
import os
import signal
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import nn

from service.recipes import digits
from service.task import Task, supervised

PLACE = os.environ.get("CHAOS")
_seen: Counter[str] = Counter()


def task(rows: int = 389, test_rows: int = 131) -> Task:
    """389 rows to train on and 131 to test on, of the recipe's kind."""
    moment("start-up")
    atexit.register(moment, "exit")
    train, test = digits.split_by_class(*digits.load())
    return supervised(
        model=Network,
        train=torch.utils.data.TensorDataset(*(t[:rows] for t in train.tensors)),
        test=torch.utils.data.TensorDataset(*(t[:test_rows] for t in test.tensors)),
        measures=("accuracy",),
    )


class Network(nn.Module):
    """The recipe's network, which says what is being done to it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = digits.network(8, 0.25)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.training:
            _note("forward")
            moment("forward")
        else:
            moment("test")
        outputs = self.layers(images)
        if outputs.requires_grad:
            outputs.register_hook(_in_backward)
        return outputs

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        moment("save")
        return super().state_dict(*args, **kwargs)


def _in_backward(gradient: torch.Tensor) -> None:
    moment("backward")


def moment(name: str) -> None:
    """Do what is planned for this moment; each injury strikes once, in the order of the plan."""
    if PLACE is None:
        return
    _seen[name] += 1
    pending = _next_injury(Path(PLACE))
    if pending is None or pending["moment"] != name or _seen[name] < pending["count"]:
        return
    if pending["rank"] != int(os.environ.get("RANK", "0")):
        return
    if pending["delay"]:  # strikes wherever the process is by then: between two files of a save
        threading.Timer(pending["delay"], _strike, [pending]).start()
    else:
        _strike(pending)


def _next_injury(place: Path) -> dict[str, Any] | None:
    plan = json.loads((place / "plan.json").read_text())
    return next((i for i in plan if not (place / f"struck-{i['number']}").exists()), None)


def _strike(injury: dict[str, Any]) -> None:
    assert PLACE is not None
    try:
        marker = os.open(Path(PLACE, f"struck-{injury['number']}"), os.O_CREAT | os.O_EXCL)
    except FileExistsError:
        return
    os.close(marker)
    _note(f"struck {injury['number']}")
    INJURIES[injury["kind"]]()


def _note(what: str) -> None:
    assert PLACE is not None or what == "forward"
    if PLACE is not None:
        line = f"{time.time():.4f} {os.environ.get('RANK', '0')} {os.getpid()} {what}\n"
        log = os.open(Path(PLACE, "log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(log, line.encode())
        os.close(log)


def _parent(process: int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


def _launcher() -> int:
    """The process that started the fork server that this process was forked from."""
    return _parent(os.getppid())


def _kill_all() -> None:
    children = Path(f"/proc/{os.getppid()}/task/{os.getppid()}/children").read_text().split()
    for process in [p for p in map(int, children) if p != os.getpid()] + [os.getpid()]:
        os.kill(process, signal.SIGKILL)


def _kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _freeze() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _kill_launcher() -> None:
    os.kill(_launcher(), signal.SIGKILL)
    time.sleep(3600)  # what this process goes on to do must not matter: it is to be dead


def _terminate() -> None:
    os.kill(_launcher(), signal.SIGTERM)


def _interrupt() -> None:
    os.kill(_launcher(), signal.SIGINT)


def _terminate_the_tree() -> None:
    """As systemd does: the launcher and, at the same time, every rank."""
    for process in (_launcher(), os.getpid()):
        os.kill(process, signal.SIGTERM)


def _raise() -> None:
    raise RuntimeError("chaos: this rank fails")


def _ask_for_too_much() -> None:
    torch.empty(2**50)


def _hang() -> None:
    time.sleep(3600)


def _hang_with_the_lock() -> None:
    ctypes.PyDLL(None).sleep(3600)  # PyDLL: no thread of this process runs Python meanwhile


INJURIES = {
    "kill one": _kill_self,
    "kill all": _kill_all,
    "kill launcher": _kill_launcher,
    "SIGTERM": _terminate,
    "SIGINT": _interrupt,
    "SIGTERM to all": _terminate_the_tree,
    "raise": _raise,
    "out of memory": _ask_for_too_much,
    "SIGSTOP": _freeze,
    "hang": _hang,
    "hang, lock held": _hang_with_the_lock,
}
