"""Runs the real commands, as a person would."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import warm

BIN = Path(sys.executable).parent
ROOT = Path(__file__).parents[1]
DEADLINE_SECONDS = 300.0
"""After it something hangs, on a machine as slow and as busy as it may be."""
# A key in the environment of whoever runs the tests must not send anything anywhere. W&B takes a
# second of each run of the digits: OFFLINE is for those that are about it.
CLEAN = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")} | {
    "WANDB_MODE": "disabled",
    "OMP_NUM_THREADS": "1",
    "CI": "1",
}
OFFLINE = {"WANDB_MODE": "offline"}


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
    pipe = subprocess.PIPE
    with start(words, cwd=cwd, env=CLEAN | environ, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def start(
    words: Sequence[object], *, cwd: Path, env: Mapping[str, str] = CLEAN, **how: Any
) -> subprocess.Popen[Any]:
    """`subprocess.Popen(WORDS)` without its imports, where that makes no difference."""
    how.setdefault("stdin", subprocess.DEVNULL)
    return warm.popen([str(word) for word in words], cwd=cwd, env=env, clean=CLEAN, **how)
