"""Short-lived processes of a test all-reduce, started together and killed together. No torch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from service.basics.running_time import TimeLimit

LOST_SECONDS = 10
"""Time for the processes to say what has failed here, when others are lost."""


@dataclass(frozen=True)
class TrialEnd:
    """How the processes ended."""

    code: int | None
    """0, or that of the first which failed; None: they were killed at the time limit."""
    said: str
    """What the first process wrote."""
    wrong: str
    """The error output of the one that failed."""

    @property
    def last_line(self) -> str:
        """The last line of the error output."""
        return (self.wrong.strip().splitlines() or ["no message"])[-1]


def tried(
    argument: str,
    variables: Sequence[Mapping[str, str]],
    *,
    seconds: float,
    lost: Callable[[], bool] = lambda: False,
) -> TrialEnd:
    """Run `launch.commands.reduction ARGUMENT` once for each of these environments.

    Args:
        lost: whether processes elsewhere have ended, for which these would wait in vain.
    """
    with tempfile.TemporaryDirectory(prefix="evenstep-doctor-") as place, ExitStack() as stack:
        processes = [
            subprocess.Popen(
                [sys.executable, "-P", "-m", "launch.commands.reduction", argument],
                env={**os.environ, "OMP_NUM_THREADS": "1", **own},
                stdout=stack.enter_context(Path(place, f"{number}.out").open("w")),
                stderr=stack.enter_context(Path(place, f"{number}.err").open("w")),
                start_new_session=True,
            )
            for number, own in enumerate(variables)
        ]
        failed = _first_failure(processes, seconds, lost)
        said = Path(place, "0.out").read_text()
        wrong = Path(place, f"{failed}.err").read_text() if failed is not None else ""
        code = 0 if failed is None else processes[failed].returncode
    return TrialEnd(None if code == -signal.SIGKILL else code, said, wrong)


def _first_failure(
    processes: list[subprocess.Popen[bytes]], seconds: float, lost: Callable[[], bool]
) -> int | None:
    """The index of the first process that failed, or of one that was killed at the time limit."""
    limit, is_lost = TimeLimit(seconds), False
    failed: list[int] = []
    try:
        while any(process.poll() is None for process in processes):
            failed = [n for n, process in enumerate(processes) if process.poll()]
            if failed or not limit.left:
                break  # its peers would wait for it
            if lost() and not is_lost:
                limit, is_lost = TimeLimit(min(limit.left, LOST_SECONDS)), True
            time.sleep(0.02)
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return next(iter(failed or [n for n, process in enumerate(processes) if process.poll()]), None)
