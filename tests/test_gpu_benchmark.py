"""The command that is to be run once on a GPU runs here, tiny: right the first time."""

from __future__ import annotations

import subprocess
import sys

import pytest
from commands import CLEAN, ROOT


def benchmark(*words: str, seconds: float) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--small", *words],
        cwd=ROOT,
        env=CLEAN | {"EVENSTEP_DEVICE": "cpu"},
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_evenstep_is_compared_with_both_hand_written_loops() -> None:
    said = benchmark("--part", "tiny", seconds=120)
    assert said.count("\n| hand-written, ") == 2
    assert "\n| Evenstep | " in said


@pytest.mark.slow
def test_every_part_runs() -> None:
    said = benchmark("--minutes", "30", seconds=1800)
    assert "Every part ran." in said
    assert "Skipped because" not in said
