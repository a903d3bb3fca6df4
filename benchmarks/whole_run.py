"""Wall time of whole commands: a run of ours against the script that a person writes for the job.

python -m benchmarks.whole_run [--models mlp lm] [--processes 1 2] [--pairs 3] [--busy]

Both do the same work (`benchmarks/models.py`): the same model, rows of a step, optimizer and steps,
a line every ten steps, one test and one checkpoint at the end; ours by `evenstep run`, the script
(`benchmarks/plain.py`) by python or torchrun.  Both have the environment that they were started in,
and nobody says on how many threads they compute.  They take turns: medians of the seconds, and the
median of the ratios of each pair with the smallest and the largest.  `--busy` has two jobs beside
them that keep a core busy each; `--ours NAME=VALUE` sets variables for ours alone.  Peaks are the
largest process's.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from benchmarks.models import JOBS, Job

BIN = Path(sys.executable).parent
SPEC = """
name: whole
task: benchmarks.jobs:task
task_args: {{name: {name}}}
batch: {{global_batch: {rows}}}
length: {{steps: {steps}}}
optimizer: {{name: adamw, lr: 0.001}}
"""
BUSY = "while True: pass"


class Whole(NamedTuple):
    """What one whole command took."""

    seconds: float
    rows_per_second: float
    """While it trained, as it said itself."""
    peak_mib: float


def whole(words: Sequence[str], environ: Mapping[str, str], directory: Path) -> tuple[float, float]:
    """The seconds of a command, and what the largest of its processes held at most in MiB."""
    with (directory / "told.txt").open("wb") as told:
        began = time.perf_counter()
        process = subprocess.Popen(
            words, stdout=told, stderr=subprocess.STDOUT, env=environ, cwd=Path(__file__).parents[1]
        )
        try:
            _, status, used = os.wait4(process.pid, 0)
        except BaseException:  # interrupted, or out of time: nothing is left behind
            process.terminate()
            process.wait()
            raise
        seconds = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(words)} failed:\n{(directory / 'told.txt').read_text()[-3000:]}")
    return seconds, used.ru_maxrss / 1024


def ours(name: str, job: Job, processes: int, variables: Mapping[str, str]) -> Whole:
    with tempfile.TemporaryDirectory() as place:
        spec = Path(place, "job.yaml")
        text = SPEC.format(name=name, rows=job.batch * processes, steps=job.steps)
        spec.write_text(text, encoding="utf-8")
        words = [str(BIN / "evenstep"), "run", str(spec), "--runs", place]
        many = ["--processes", str(processes)] if processes > 1 else []
        environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), **variables}
        seconds, peak = whole([*words, *many], environ, Path(place))
        lines = Path(place, "whole", "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        rates = [json.loads(line).get("train/rows_per_second") for line in lines]
        return Whole(seconds, statistics.median(rate for rate in rates if rate), peak)


def plain(name: str, processes: int) -> Whole:
    with tempfile.TemporaryDirectory() as place:
        words = [sys.executable, "-m", "benchmarks.plain", name, place]
        if processes > 1:
            start = [str(BIN / "torchrun"), "--standalone", f"--nproc-per-node={processes}"]
            words = [*start, *words[1:]]
        seconds, peak = whole(words, os.environ, Path(place))
        told = Path(place, "told.txt").read_text(encoding="utf-8").splitlines()
        rates = [float(line.split()[-2]) for line in told if line.endswith(" rows/s")]
        return Whole(seconds, rates[-1] * processes, peak)


@contextmanager
def two_beside(wanted: bool) -> Iterator[None]:
    """Two processes that keep a core busy each."""
    beside = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(2 if wanted else 0)]
    try:
        yield
    finally:
        for process in beside:
            process.kill()
            process.wait()


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--models", nargs="+", choices=JOBS, default=list(JOBS))
    arguments.add_argument("--processes", nargs="+", type=int, default=[1, 2])
    arguments.add_argument("--pairs", type=int, default=3)
    arguments.add_argument("--busy", action="store_true")
    arguments.add_argument("--ours", nargs="*", metavar="NAME=VALUE", default=[])
    asked = arguments.parse_args()
    variables = dict(each.split("=", 1) for each in asked.ours)
    print(
        "| job | processes | ours, s | the script, s | **ratio** | rows/s: ours, the script "
        "| MiB: ours, the script |\n|---|--:|--:|--:|---|--:|--:|"
    )
    for name in asked.models:
        for processes in asked.processes:
            with two_beside(asked.busy):
                pairs = [
                    (ours(name, JOBS[name], processes, variables), plain(name, processes))
                    for _ in range(asked.pairs)
                ]
            print(row(name, processes, pairs), flush=True)


def row(name: str, processes: int, pairs: Sequence[tuple[Whole, Whole]]) -> str:
    ratios = sorted(own.seconds / script.seconds for own, script in pairs)
    own, script = ([pair[side] for pair in pairs] for side in (0, 1))

    def median(of: Sequence[Whole], what: str) -> float:
        return statistics.median(getattr(each, what) for each in of)

    seconds = f"{median(own, 'seconds'):.1f} | {median(script, 'seconds'):.1f}"
    ratio = f"**{statistics.median(ratios):.2f}** ({ratios[0]:.2f}-{ratios[-1]:.2f})"
    rates = f"{median(own, 'rows_per_second'):,.0f}, {median(script, 'rows_per_second'):,.0f}"
    peaks = f"{median(own, 'peak_mib'):.0f}, {median(script, 'peak_mib'):.0f}"
    return f"| {name} | {processes} | {seconds} | {ratio} | {rates} | {peaks} |"


if __name__ == "__main__":
    main()
