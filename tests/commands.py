"""Runs the real commands, as a person would."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

BIN = Path(sys.executable).parent
ROOT = Path(__file__).parents[1]
DEADLINE_SECONDS = 300.0
"""After it something hangs, on a machine as slow and as busy as it may be."""
# A key in the environment of whoever runs the tests must not send anything anywhere.
CLEAN = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")} | {
    "WANDB_MODE": "offline",
    "OMP_NUM_THREADS": "1",
    "CI": "1",
}


def evenstep(
    *words: object, cwd: Path, timeout: float = DEADLINE_SECONDS, **environ: str
) -> subprocess.CompletedProcess[str]:
    """`evenstep WORDS`, with its output caught."""
    return command(BIN / "evenstep", *words, cwd=cwd, timeout=timeout, **environ)


def torchrun(processes: int, *words: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """`torchrun --standalone --nproc-per-node N -m launch WORDS`."""
    start = (BIN / "torchrun", "--standalone", "--nproc-per-node", processes, "-m", "launch")
    return command(*start, *words, cwd=cwd, timeout=DEADLINE_SECONDS)


def command(
    *words: object, cwd: Path, timeout: float, **environ: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in words],
        cwd=cwd,
        env=CLEAN | environ,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
