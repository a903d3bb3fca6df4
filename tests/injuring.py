"""Runs the real command on the job of `chaos`, and injures it at a planned moment."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from chaos.campaign import Injury, spec_of, write_plan
from commands import BIN, CLEAN, DEADLINE_SECONDS, start

ENDLESS_STEPS = 100_000


def injured(
    place: Path,
    *injuries: tuple[str, str, int, int],
    pause: float | None = None,
    **changed: Any,
) -> dict[str, str]:
    """Write the job and the plan of its injuries; what the command needs to know of them.

    A run that a test ends pauses in each pass: it needs no core for itself while the test waits.

    Args:
        pause: seconds in each pass.
    """
    plan = [Injury(number, *injury) for number, injury in enumerate(injuries)]
    spec = spec_of("job", steps=12, hang_seconds=60)
    for section, values in changed.items():
        spec[section] = {**spec.get(section, {}), **values}
    if pause is None:
        pause = 0.01 if spec["length"]["steps"] >= ENDLESS_STEPS else 0.0
    write_plan(place, place / "runs/job", plan, pause_seconds=pause)
    (place / "job.yaml").write_text(json.dumps(spec))
    return {"CHAOS": str(place)}


@contextmanager
def started(
    *words: object, cwd: Path, before: tuple[str, ...] = (), **environ: str
) -> Iterator[subprocess.Popen[str]]:
    """`evenstep run job.yaml WORDS`, in a session of its own; killed with it at the end."""
    process = start(
        [*before, BIN / "evenstep", "run", "job.yaml", *words],
        cwd=cwd,
        env=CLEAN | environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def ended(*words: object, cwd: Path, **environ: str) -> tuple[int, str, str]:
    """(exit code, output, errors) of the whole command."""
    with started(*words, cwd=cwd, **environ) as process:
        out, err = process.communicate(timeout=DEADLINE_SECONDS)
        return process.returncode, out, err


def until(
    happened: Callable[[], Any],
    what: str,
    seconds: float = DEADLINE_SECONDS,
    *,
    of: subprocess.Popen[Any] | None = None,
) -> Any:
    """Wait for a condition; its first true value. It may need the process `of` to be alive."""
    deadline = time.monotonic() + seconds
    while not (value := happened()):
        assert of is None or of.poll() is None, f"ended with {of.returncode} before: {what}"
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(0.01)
    return value


def facts_of(place: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((place / "runs/job/run.json").read_text())
    return facts


def rows_of(place: Path) -> int:
    path = place / "runs/job/metrics.jsonl"
    return len(path.read_bytes().splitlines()) if path.exists() else 0


def descendants(process: int) -> set[int]:
    """The processes below this one, however deep."""
    found: set[int] = set()
    for task in Path(f"/proc/{process}/task").glob("*"):
        try:
            children = (task / "children").read_text()
        except (FileNotFoundError, ProcessLookupError):  # a thread that has just ended
            continue
        for child in children.split():
            found |= {int(child)} | descendants(int(child))
    return found


def is_alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
