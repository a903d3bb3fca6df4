"""Seconds from the command to the first finished step, and rows per second, of the digits recipe.

python -m benchmarks.first_step [--runs 5]
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from service.tracking import read_metrics

EVENSTEP = Path(sys.executable).with_name("evenstep")


def one_run(processes: int) -> tuple[float, float]:
    """(seconds to the first step, median rows per second after it) of one run."""
    with tempfile.TemporaryDirectory() as runs:
        words = ["run", "digits", "--processes", str(processes), "--runs", runs]
        started = time.time()
        subprocess.run(
            [EVENSTEP, *words, "tracking.log_every_steps=1", "tracking.wandb="],
            check=True,
            stdout=subprocess.DEVNULL,
            env=os.environ | {"CI": "1"},
        )
        first = read_metrics(Path(runs, "digits", "metrics.jsonl"))[0]["time"]
        subprocess.run(
            [EVENSTEP, *words, "--fresh", "tracking.wandb="],
            check=True,
            stdout=subprocess.DEVNULL,
            env=os.environ | {"CI": "1"},
        )
        rows = read_metrics(Path(runs, "digits", "metrics.jsonl"))
    rates = [row["train/rows_per_second"] for row in rows if "train/rows_per_second" in row]
    return first - started, statistics.median(rates)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--runs", type=int, default=5)
    count = arguments.parse_args().runs
    print("| processes | command to first step | rows per second |\n|---|---|---|")
    for processes in (1, 2):
        firsts, rates = zip(*(one_run(processes) for _ in range(count)), strict=True)
        print(
            f"| {processes} | {statistics.median(firsts):.1f} s | {statistics.median(rates):,.0f} |"
        )


if __name__ == "__main__":
    main()
