"""Memory of the largest process of a digits run, and of a plain PyTorch script for the same task.

python -m benchmarks.memory

Both take one step, alone and as two processes under torchrun; peak resident memory in MiB.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(sys.executable).parent
PEAK = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def mebibytes(*words: str) -> float:
    """Peak resident memory of the largest process of a command."""
    environ = os.environ | {"OMP_NUM_THREADS": "1", "CI": "1"}
    asked = [sys.executable, "-c", PEAK, *words]
    done = subprocess.run(asked, check=True, capture_output=True, text=True, env=environ)
    return int(done.stdout) / 1024  # Linux counts in KiB


def main() -> None:
    print("| digits | Evenstep, MiB | a plain script, MiB |")
    print("|---|--:|--:|")
    two = [str(HERE / "torchrun"), "--standalone", "--nproc-per-node=2", "-m"]
    for name, ours, bare in (
        ("1 process", [str(HERE / "evenstep")], [sys.executable, "-m", "benchmarks.bare"]),
        ("2 processes of torchrun", [*two, "launch"], [*two, "benchmarks.bare"]),
    ):
        with tempfile.TemporaryDirectory() as runs:
            job = ["run", "digits", "length={steps: 1}", "schedule={}", "tracking.wandb="]
            own = mebibytes(*ours, *job, "--runs", runs)
        print(f"| {name} | {own:.0f} | {mebibytes(*bare):.0f} |", flush=True)


if __name__ == "__main__":
    main()
