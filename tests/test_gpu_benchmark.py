"""The command that is to be run once on a GPU runs here, tiny: right the first time."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from commands import ROOT, command

from benchmarks import gpu


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


def test_it_runs_the_tests_that_need_a_gpu() -> None:
    tests = (ROOT / "tests").glob("test_*.py")
    marked = [f"tests/{test.name}" for test in tests if "pytest.mark.gpu" in test.read_text()]
    assert sorted({*marked} - {f"tests/{Path(__file__).name}"}) == gpu.GPU_TESTS


def test_the_part_that_ends_in_fixed_bits_begins_with_their_workspace() -> None:
    """torch looks once, at the first product, whether cuBLAS is told to be deterministic.

    Source: alertCuBLASConfigNotDeterministic in torch's aten/src/ATen/Context.cpp.
    """
    code = """
import os
from benchmarks import gpu
gpu.PARTS["bitwise"] = (lambda *_: print(os.environ.get("CUBLAS_WORKSPACE_CONFIG")), 1)
gpu.run_part("bitwise", small=True)
"""
    done = command(sys.executable, "-c", code, cwd=ROOT, timeout=120, EVENSTEP_DEVICE="cpu")
    assert done.stdout == ":4096:8\n", done.stderr
