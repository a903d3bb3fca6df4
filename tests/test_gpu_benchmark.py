"""The command that is to be run once on a GPU runs here, tiny: right the first time."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from commands import DEADLINE_SECONDS, ROOT, command
from injuring import until

from benchmarks import gpu


def benchmark(*words: str, seconds: float) -> str:
    words = (sys.executable, "-m", "benchmarks.gpu", "--small", *words)
    done = command(*words, cwd=ROOT, timeout=seconds, EVENSTEP_DEVICE="cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_evenstep_is_compared_with_both_hand_written_loops() -> None:
    said = benchmark("--only", "tiny", seconds=120)
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


def test_a_part_begins_with_what_it_needs(tmp_path: Path) -> None:
    """torch looks once, at the first product, whether cuBLAS is told to be deterministic.

    And a part that is a process of torchrun ends with it, when its time is over.
    Source: alertCuBLASConfigNotDeterministic in torch's aten/src/ATen/Context.cpp.
    """
    code = """
import ctypes, os, sys
from pathlib import Path
from benchmarks import gpu

def tell(*_):
    number = ctypes.c_int()
    ctypes.CDLL(None).prctl(2, ctypes.byref(number))  # PR_GET_PDEATHSIG
    print(os.environ.get("CUBLAS_WORKSPACE_CONFIG"), number.value)

for name in ("batchnorm", "bitwise"):
    gpu.PARTS[name] = gpu.Part(tell, 1)
gpu.run_parts(["batchnorm", "bitwise"], small=True, until=0.0, done=Path(sys.argv[1]))
"""
    words = (sys.executable, "-c", code, tmp_path / "done")
    done = command(*words, cwd=ROOT, timeout=120, EVENSTEP_DEVICE="cpu")
    assert re.findall("^:4.*", done.stdout, re.MULTILINE) == [":4096:8 9"] * 2, done.stderr
    assert (tmp_path / "done").read_text() == "batchnorm\nbitwise\n"


# The command with other parts.
PARTS = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
from benchmarks import gpu

def crash(*_): os.kill(os.getpid(), signal.SIGKILL)
def fail(*_): raise RuntimeError("as intended")
def work(*_): print("worked")
def hang(*_): time.sleep(1000)
def leave(*_): Path(os.environ["LEFT"]).write_text(str(subprocess.Popen(["sleep", "1000"]).pid))

gpu._PROGRAM, gpu.START_SECONDS = (__file__,), 300
acts = {"tiny": crash, "resnet50": fail, "device": work, "gpt2": hang, "save": leave}
gpu.PARTS = {name: gpu.Part(act, 1) for name, act in acts.items()}
if "--part" in sys.argv:
    gpu.main()
else:
    how = {"small": True, "shows": True, "until": time.monotonic()}
    process = gpu.Process((*acts,))
    print(json.dumps(gpu.finished(process, end=time.monotonic() + 600, **how)))
    print(json.dumps(gpu.finished(process, end=time.monotonic() + 1, **how)))
"""


def test_a_part_that_fails_or_hangs_ends_no_other_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "parts.py").write_text(PARTS)
    left = tmp_path / "left"
    environment = {"EVENSTEP_DEVICE": "cpu", "PYTHONPATH": str(ROOT), "LEFT": str(left)}
    words = (sys.executable, tmp_path / "parts.py")
    done = command(*words, cwd=tmp_path, timeout=DEADLINE_SECONDS, **environment)
    codes, late = (json.loads(line) for line in done.stdout.splitlines() if line[:1] == "{")
    assert codes == {"tiny": -9, "resnet50": 1, "device": 0, "gpt2": 1, "save": 0}, done.stderr
    assert late == dict.fromkeys(codes), "they were begun although their time was over"
    assert "RuntimeError: as intended" in done.stderr
    assert re.search(r"Timeout \(0:00:0\d\)!.* in hang", done.stderr, re.DOTALL)
    until(lambda: has_ended(left.read_text()), "what a part has left is killed")


def has_ended(process: str) -> bool:
    try:
        return ") Z " in Path("/proc", process, "stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_its_estimates_leave_a_minute_of_the_eight() -> None:
    stages = gpu.stages_of(gpu.PARTS, devices=1)
    assert gpu.estimate(stages) <= 400
    assert {name for stage in stages for parts, _ in stage for name in parts} == {*gpu.PARTS}
