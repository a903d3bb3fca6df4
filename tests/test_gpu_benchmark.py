"""The command that is to be run once on a GPU runs here, tiny: right the first time."""

from __future__ import annotations

import sys

import pytest
from commands import ROOT, command


def benchmark(*words: str, seconds: float) -> str:
    words = (sys.executable, "-m", "benchmarks.gpu", "--small", *words)
    done = command(*words, cwd=ROOT, timeout=seconds, EVENSTEP_DEVICE="cpu")
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
