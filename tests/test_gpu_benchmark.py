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


def test_a_part_begins_with_what_it_needs() -> None:
    """torch looks once, at the first product, whether cuBLAS is told to be deterministic.

    And a part that is a process of torchrun ends with it, when its time is over.
    Source: alertCuBLASConfigNotDeterministic in torch's aten/src/ATen/Context.cpp.
    """
    code = """
import ctypes, os
from benchmarks import gpu

def tell(*_):
    number = ctypes.c_int()
    ctypes.CDLL(None).prctl(2, ctypes.byref(number))  # PR_GET_PDEATHSIG
    print(os.environ.get("CUBLAS_WORKSPACE_CONFIG"), number.value)

gpu.PARTS["bitwise"] = tell, 1
gpu.run_part("bitwise", small=True)
"""
    done = command(sys.executable, "-c", code, cwd=ROOT, timeout=120, EVENSTEP_DEVICE="cpu")
    assert done.stdout == ":4096:8 9\n", done.stderr
