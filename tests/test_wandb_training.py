"""A real run beside an ill W&B: the same bits, the right exit code, an end within its bound."""

from __future__ import annotations

import signal
import subprocess
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import commands
import psutil
import pytest
from commands import BIN, CLEAN
from wandb_server import WandBServer

from service.runs.tracking import read_metrics

ILLS = ("unreachable", "no key", "refusing key", "failing", "hanging", "SIGSTOP", "SIGKILL")
FINISH_SECONDS = 3.0
END_SECONDS = FINISH_SECONDS + 6.0
"""What the end may take: some for W&B, and 5 s to end its child."""
SPEC = ("length.epochs=6", "tracking.log_every_steps=1")
STEPS = 90  # of the digits' six epochs


@dataclass
class Ended:
    run: Path
    code: int
    output: str
    seconds: float


def start(place: Path, environ: dict[str, str]) -> subprocess.Popen[str]:
    place.mkdir()
    clean = {key: value for key, value in CLEAN.items() if key != "WANDB_MODE"}
    return commands.start(
        [
            BIN / "evenstep",
            "run",
            "digits",
            *SPEC,
            f"tracking.wandb.finish_seconds={FINISH_SECONDS}",
        ],
        cwd=place,
        env=clean | {"HOME": str(place)} | environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def environment(ill: str, server: WandBServer) -> dict[str, str]:
    quiet = {"WANDB_ERROR_REPORTING": "false"}
    if ill in ("refusing key", "failing", "hanging"):
        server.mode = ill  # type: ignore[assignment]  # one of its modes
        return quiet | server.environment()
    if ill == "unreachable":
        return quiet | server.environment() | {"WANDB_BASE_URL": "http://127.0.0.1:9"}
    return quiet | ({} if ill == "no key" else {"WANDB_MODE": "offline"})


def injure(process: subprocess.Popen[str], name: str) -> list[str]:
    """Signal its wandb-core as soon as W&B has the run; what was said until then."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if "upload the run with" in line:
            break
    for child in psutil.Process(process.pid).children(recursive=True):
        if child.name() == "wandb-core":
            child.send_signal(getattr(signal, name))
    return lines


@pytest.fixture(scope="module")
def ended(tmp_path_factory) -> dict[str, Ended]:
    """All of them at once: most of their time they wait."""
    place, found = tmp_path_factory.mktemp("ill"), {}
    with ExitStack() as stack:
        started = time.monotonic()
        running = {"well": start(place / "well", {"WANDB_MODE": "disabled"})}
        for ill in ILLS:
            server = stack.enter_context(WandBServer())
            running[ill] = start(place / ill, environment(ill, server))
        for process in running.values():
            stack.callback(_kill_tree, process.pid)
        said = {name: injure(running[name], name) for name in ("SIGSTOP", "SIGKILL")}
        for name, process in running.items():
            with process:
                assert process.stdout is not None
                output = "".join([*said.get(name, []), *process.stdout])
            seconds = time.monotonic() - started
            found[name] = Ended(place / name / "runs/digits", process.returncode, output, seconds)
    return found


def _kill_tree(pid: int) -> None:
    with suppress(psutil.NoSuchProcess):
        for process in [*psutil.Process(pid).children(recursive=True), psutil.Process(pid)]:
            with suppress(psutil.NoSuchProcess):
                process.kill()


@pytest.mark.parametrize("ill", ILLS)
def test_the_training_is_the_same_to_the_bit_and_ends_in_time(ended, ill):
    well, here = ended["well"], ended[ill]
    assert (well.code, here.code) == (0, 0), here.output
    for name in ("model", "optimizer"):
        path = f"checkpoints/step-{STEPS:08d}/{name}.safetensors"
        assert (here.run / path).read_bytes() == (well.run / path).read_bytes()
    losses = [
        [r["train/loss"] for r in read_metrics(e.run / "metrics.jsonl")] for e in (well, here)
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == STEPS
    # Eight of them share the machine: the bound on what W&B adds leaves room for that.
    assert here.seconds < 1.5 * well.seconds + END_SECONDS
    assert "Traceback" not in here.output, here.output
    assert f"Done after step {STEPS}" in here.output
