"""Seconds from the command to the first finished step, and rows per second, of the digits recipe.

python -m benchmarks.first_step [--runs 5]

Each start of ours is followed by one of a bare script (benchmarks/bare.py), by `python` or by
torchrun: medians, and the median of the ratios.
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


def bare(processes: int) -> float:
    """Seconds to the first step of a bare script."""
    program = [sys.executable]
    if processes > 1:
        torchrun = EVENSTEP.with_name("torchrun")
        program = [str(torchrun), "--standalone", f"--nproc-per-node={processes}"]
    started = time.time()
    done = subprocess.run(
        [*program, "-m", "benchmarks.bare"],
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    return float(done.stdout.split()[-1]) - started


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--runs", type=int, default=5)
    count = arguments.parse_args().runs
    print("| processes | command to first step | a bare script | ratio | rows per second |")
    print("|---|---|---|---|---|")
    for processes in (1, 2):
        found = [(*one_run(processes), bare(processes)) for _ in range(count)]
        first, rate, by_hand = (statistics.median(column) for column in zip(*found, strict=True))
        ratio = statistics.median(ours / theirs for ours, _, theirs in found)
        print(
            f"| {processes} | {first:.1f} s | {by_hand:.1f} s | {ratio:.2f} | {rate:,.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
