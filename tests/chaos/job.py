"""The job that is injured: the digits, cut small, in a task that carries the injuries out itself.

It is user code, so every injury strikes the real command at an exact moment: in start-up, in a
forward or backward pass, in the test loop, in a save, at one operation of the writer on the file
system, on the way out.
"""

from __future__ import annotations

import atexit
import ctypes
import errno
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from service.checkpoints.checkpoints import Checkpoints
from service.data.task import Task, supervised
from service.health.heartbeat import WRITER
from service.recipes import digits
from service.training import attempt

sys.path.append(str(Path(__file__).parents[1]))
from saves import watched

PLACE = os.environ.get("CHAOS")
DAMAGE = ("cut a file", "flip a bit")
_seen: Counter[str] = Counter()
_counting = threading.Lock()
# So that the save of a small state is shared by threads and processes, as that of a large one is.
attempt.Checkpoints = partial(Checkpoints, part_bytes=1 << 10)  # type: ignore[assignment,misc]
# As they are without the injuries, which use files themselves.
_open, _write, _close = os.open, os.write, os.close
_for_good = ExitStack()
_slow: list[float] = []
_slow_test: list[float] = []


def task(rows: int = 389, test_rows: int = 131, double: bool = False) -> Task:
    """389 rows to train on and 131 to test on, of the recipe's kind; in float64 where asked."""
    if PLACE is not None:
        _note("start")
        _for_good.enter_context(watched(_on_disk))
        atexit.register(moment, "exit")
    moment("start-up")
    images, labels = digits.load()
    kind = torch.float64 if double else torch.float32
    train, test = digits.split_by_class(images.to(kind), labels)
    return supervised(
        model=lambda: Network().to(kind),
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
        moment(self._pass())
        if PLACE is not None and self.training:
            time.sleep(_plan()["pause_seconds"])
        if _slow_test and not self.training:
            time.sleep(_slow_test[0])
        outputs = self.layers(images)
        if outputs.requires_grad and _seen["forward"]:
            outputs.register_hook(_in_backward)
        return outputs

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        # The first time it is asked how large it is, after the rehearsal and before any step.
        moment("save" if _seen["forward"] else "size")
        return super().state_dict(*args, **kwargs)

    def _pass(self) -> str:
        if not self.training:
            return "test"
        if not _seen["size"]:
            return "rehearsal"
        if PLACE is not None and not _seen["forward"]:
            _note(f"steps {_facts()['attempts'][-1]['from_step']}")
        return "forward"


def _in_backward(gradient: torch.Tensor) -> None:
    moment("backward")


def _on_disk(operation: str, words: tuple[Any, ...]) -> None:
    """Called before each operation on the file system; those for checkpoints are counted."""
    by_the_writer = threading.current_thread().name.startswith(WRITER)
    at = os.readlink(f"/proc/self/fd/{words[0]}") if isinstance(words[0], int) else str(words[0])
    if by_the_writer or "/checkpoints" in at:
        moment("disk", (operation, words))
        # Others than the lead have little to sync: whatever they do takes its time.
        if _slow and (operation == "fsync" or os.environ.get("RANK", "0") != "0"):
            time.sleep(_slow[0])
    if operation == "open" and at.endswith(".run.json.partial"):
        moment("run.json", (operation, words))


def moment(name: str, doing: tuple[str, tuple[Any, ...]] | None = None) -> None:
    """Do what is planned for this moment; each injury strikes once, in the order of the plan."""
    with _counting:
        _seen[name] += 1
        count = _seen[name]
    if PLACE is None:
        return
    pending = _next_injury(Path(PLACE))
    if pending is None or pending["moment"] != name or count < pending["count"]:
        return
    if pending["rank"] != int(os.environ.get("RANK", "0")) or _step() < pending["step"]:
        return
    if pending["kind"] in DAMAGE and len(_checkpoints()) < 2:
        return
    if pending["kind"] == "disk full" and (doing is None or doing[0] not in ("open", "write")):
        return
    if doing is not None and doing[0] == "write" and pending["kind"].startswith("kill"):
        _write(doing[1][0], doing[1][1][: len(doing[1][1]) // 2])
    if pending["delay"]:  # strikes wherever the process is by then: between two files of a save
        threading.Timer(pending["delay"], _strike, [pending]).start()
    else:
        _strike(pending)


def _plan() -> dict[str, Any]:
    assert PLACE is not None
    plan: dict[str, Any] = json.loads(Path(PLACE, "plan.json").read_text())
    return plan


def _next_injury(place: Path) -> dict[str, Any] | None:
    injuries = _plan()["injuries"]
    return next((i for i in injuries if not (place / f"struck-{i['number']}").exists()), None)


def _facts() -> dict[str, Any]:
    facts: dict[str, Any] = json.loads(Path(_plan()["run"], "run.json").read_text())
    return facts


def _step() -> int:
    """The last step that the run has logged."""
    metrics = Path(_plan()["run"], "metrics.jsonl")
    whole = metrics.read_bytes().split(b"\n")[:-1] if metrics.exists() else []
    return int(json.loads(whole[-1])["step"]) if whole else 0


def _checkpoints() -> list[Path]:
    return sorted(Path(_plan()["run"], "checkpoints").glob("step-*"))


def _strike(injury: dict[str, Any]) -> None:
    assert PLACE is not None
    try:
        marker = _open(Path(PLACE, f"struck-{injury['number']}"), os.O_CREAT | os.O_EXCL)
    except FileExistsError:
        return
    _close(marker)
    _note(f"struck {injury['number']} {_step()}")
    INJURIES[injury["kind"]](injury)


def _note(what: str) -> None:
    """Enter into the log of the campaign: when, which rank, of which attempt, by whom started."""
    assert PLACE is not None
    attempt = os.environ.get("TORCHELASTIC_RUN_ID", "-")[-8:]
    words = (f"{time.time():.4f}", os.environ.get("RANK", "0"), attempt, _launcher(), what)
    log = _open(Path(PLACE, "log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    _write(log, f"{' '.join(map(str, words))}\n".encode())
    _close(log)


def _parent(process: int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


def _launcher() -> int:
    """The process that started the fork server that this process was forked from; 0 for none."""
    return _parent(os.getppid()) if os.getppid() else 0  # process 1 of a container has none


def _kill_all(injury: dict[str, Any]) -> None:
    children = Path(f"/proc/{os.getppid()}/task/{os.getppid()}/children").read_text().split()
    for process in [p for p in map(int, children) if p != os.getpid()] + [os.getpid()]:
        os.kill(process, signal.SIGKILL)


def _kill_self(injury: dict[str, Any]) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _freeze(injury: dict[str, Any]) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _kill_launcher(injury: dict[str, Any]) -> None:
    os.kill(_launcher(), signal.SIGKILL)
    time.sleep(3600)  # what this process goes on to do must not matter: it is to be dead


def _terminate(injury: dict[str, Any]) -> None:
    os.kill(_launcher(), signal.SIGTERM)


def _terminate_a_slow_test(injury: dict[str, Any]) -> None:
    """The passes of this rank's test now take as long as those of a large model."""
    _slow_test.append(0.1)
    _terminate(injury)


def _interrupt(injury: dict[str, Any]) -> None:
    os.kill(_launcher(), signal.SIGINT)


def _terminate_the_tree(injury: dict[str, Any]) -> None:
    """As systemd does: the launcher and, at the same time, every rank."""
    for process in (_launcher(), os.getpid()):
        os.kill(process, signal.SIGTERM)


def _raise(injury: dict[str, Any]) -> None:
    raise RuntimeError("chaos: this rank fails")


def _ask_for_too_much(injury: dict[str, Any]) -> None:
    torch.empty(2**50)


def _hang(injury: dict[str, Any]) -> None:
    time.sleep(3600)


def _hang_with_the_lock(injury: dict[str, Any]) -> None:
    ctypes.PyDLL(None).sleep(3600)  # PyDLL: no thread of this process runs Python meanwhile


def _fill_the_disk(injury: dict[str, Any]) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def _filler() -> Path:
    return Path(_plan()["run"]).parent / "filler"


def _take_all_room(injury: dict[str, Any]) -> None:
    """Really fill the file system that the run is on."""
    with suppress(OSError), _filler().open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass


def _give_room_back(injury: dict[str, Any]) -> None:
    _filler().unlink()


def _remove_the_scratch(injury: dict[str, Any]) -> None:
    """As a cleaner of temporary files does: TMPDIR is the test's own."""
    for scratch in Path(os.environ["TMPDIR"]).glob("evenstep-*"):
        shutil.rmtree(scratch)


def _remove_temporary_files(injury: dict[str, Any]) -> None:
    for path in Path(os.environ["TMPDIR"]).iterdir():
        shutil.rmtree(path)


def _slow_the_disk(injury: dict[str, Any]) -> None:
    """From now on it takes as long to sync a few bytes as it takes elsewhere for a gigabyte."""
    _slow.append(0.5)


def _damage(injury: dict[str, Any]) -> None:
    """Cut a file of the newest checkpoint in half, or turn one of its bits, and kill all."""
    files = sorted(_checkpoints()[-1].iterdir())
    path = files[injury["number"] % len(files)]
    raw = bytearray(path.read_bytes())
    if injury["kind"] == "cut a file":
        del raw[len(raw) // 2 :]
    else:
        raw[len(raw) // 2] ^= 1 << injury["number"] % 8
    path.write_bytes(raw)
    _kill_all(injury)


INJURIES = {
    "kill one": _kill_self,
    "kill all": _kill_all,
    "kill launcher": _kill_launcher,
    "SIGTERM": _terminate,
    "SIGTERM, slow test": _terminate_a_slow_test,
    "SIGINT": _interrupt,
    "SIGTERM to all": _terminate_the_tree,
    "raise": _raise,
    "out of memory": _ask_for_too_much,
    "SIGSTOP": _freeze,
    "hang": _hang,
    "hang, lock held": _hang_with_the_lock,
    "disk full": _fill_the_disk,
    "no room": _take_all_room,
    "room again": _give_room_back,
    "no scratch": _remove_the_scratch,
    "no temporary files": _remove_temporary_files,
    "slow disk": _slow_the_disk,
    "cut a file": _damage,
    "flip a bit": _damage,
}
