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


def test_ours_is_held_against_both_loops_by_hand() -> None:
    said = benchmark("--part", "tiny", seconds=120)
    assert said.count("\n| by hand, ") == 2
    assert "\n| ours | " in said


@pytest.mark.slow
def test_every_part_runs() -> None:
    said = benchmark("--minutes", "30", seconds=1800)
    assert "Every part ran." in said
    assert "Left out" not in said
