"""Seconds from the command to the first finished step, and rows per second, of the digits recipe.

python -m benchmarks.first_step [--runs 5]

Each start of Evenstep is followed by one of a plain PyTorch script (benchmarks/bare.py), with
`python` or torchrun: medians, and the medians of the ratios of each pair.  Processor time is that
of all processes until the command ends; Evenstep also writes a checkpoint after the first step.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from service.runs.tracking import read_metrics

BIN = Path(sys.executable).parent
STOPPED = 75
_PR_SET_CHILD_SUBREAPER = 36


class Start(NamedTuple):
    """Durations of one start, in seconds."""

    wall: float
    """From the command to the first finished step."""
    processor: float
    """Processor time of all processes, to the end."""


class Way(NamedTuple):
    """A way to start a job."""

    name: str
    ours: tuple[str, ...]
    bare: tuple[str, ...]


def ways() -> list[Way]:
    evenstep, torchrun = str(BIN / "evenstep"), str(BIN / "torchrun")
    two = (torchrun, "--standalone", "--nproc-per-node=2", "-m")
    module = (*two, "benchmarks.bare")
    return [
        Way("`evenstep run`", (evenstep, "run"), (sys.executable, "-m", "benchmarks.bare")),
        Way("`evenstep run --processes 2`", (evenstep, "run", "--processes", "2"), module),
        Way("2 processes by `torchrun -m launch run`", (*two, "launch", "run"), module),
    ]


def started(words: Sequence[str]) -> Start:
    """One start of Evenstep, stopped after its first step."""
    with tempfile.TemporaryDirectory() as runs:
        words = [*words, "digits", "--runs", runs, "--stop-at", "1", "tracking.wandb="]
        begun, before = time.time(), processor_seconds()
        ended = subprocess.run(
            [*words, "tracking.log_every_steps=1"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"CI": "1"},
        )
        reap()
        # torchrun exits with 1 whatever the exit codes of its processes are.
        assert ended.returncode in (STOPPED, 1), ended
        first = read_metrics(Path(runs, "digits", "metrics.jsonl"))[0]["time"]
        return Start(first - begun, processor_seconds() - before)


def bare(words: Sequence[str]) -> Start:
    """One start of the plain script, which prints the time of its first step."""
    begun, before = time.time(), processor_seconds()
    done = subprocess.run(
        words, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    reap()
    return Start(float(done.stdout.split()[-1]) - begun, processor_seconds() - before)


def rate(words: Sequence[str]) -> float:
    """Median rows per second of one complete run."""
    with tempfile.TemporaryDirectory() as runs:
        subprocess.run(
            [*words, "digits", "--runs", runs, "tracking.wandb="],
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"CI": "1"},
        )
        rows = read_metrics(Path(runs, "digits", "metrics.jsonl"))
    name = "train/rows_per_second"
    return statistics.median(row[name] for row in rows if name in row)


def adopt() -> None:
    """Become the parent of orphaned processes, so that the time of every process is counted."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def reap() -> None:
    while True:
        try:
            os.wait()
        except ChildProcessError:
            return


def processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--runs", type=int, default=5)
    count = arguments.parse_args().runs
    adopt()
    print(
        "| digits | command to first step | a plain script | ratio | of processor time "
        "| rows per second |\n|---|---|---|---|---|---|"
    )
    for way in ways():
        bare(way.bare)  # warm up the page cache
        pairs = [(started(way.ours), bare(way.bare)) for _ in range(count)]
        walls = [[start.wall for start in column] for column in zip(*pairs, strict=True)]
        ratio = statistics.median(ours.wall / theirs.wall for ours, theirs in pairs)
        cost = statistics.median(ours.processor / theirs.processor for ours, theirs in pairs)
        rows = statistics.median(rate(way.ours) for _ in range(count))
        seconds = " | ".join(f"{statistics.median(column):.1f} s" for column in walls)
        print(f"| {way.name} | {seconds} | {ratio:.2f} | {cost:.2f} | {rows:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
