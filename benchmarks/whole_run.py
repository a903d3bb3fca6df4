"""Wall time of complete commands: Evenstep compared with a hand-written script for the same job.

python -m benchmarks.whole_run [--models mlp lm] [--processes 1 2] [--pairs 3] [--busy]
python -m benchmarks.whole_run --models photos lines --workers 0 2 [--pairs 3]

Both do the same work (`benchmarks/models.py`): the same model, rows of a step, optimizer and steps,
a line every ten steps, one test and one checkpoint at the end; Evenstep by `evenstep run`, the
script (`benchmarks/plain.py`) by python or torchrun.  Both have the environment that they were
started in, and nobody says on how many threads they compute.  They take turns: medians of the
seconds, and the median of the ratios of each pair with the smallest and the largest.  `--busy` adds
two processes that keep a core busy each; `--ours NAME=VALUE` sets variables for Evenstep only, and
`--spec KEY=VALUE` changes its spec.
Peaks are the largest process's, of all that the command starts.

The second command is for rows that are expensive to read (`benchmarks/real_data.py`): for each
number of loader workers the rows per second of both, the fraction of Evenstep's step that waits for
data, and the peak use of /dev/shm of both.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import psutil

from benchmarks.models import JOBS, OF_FILES

BIN = Path(sys.executable).parent
SPEC = """
name: whole
task: benchmarks.jobs:task
task_args: {{name: {name}}}
batch: {{global_batch: {rows}, micro_batch: {each}}}
length: {{steps: {steps}}}
optimizer: {{name: adamw, lr: 0.001}}
loader: {{workers: {workers}}}
"""
BUSY = "while True: pass"


class Whole(NamedTuple):
    """Measurements of one command."""

    seconds: float
    rows_per_second: float
    """While it trained, as the command printed it."""
    peak_mib: float
    shared_mib: float = 0.0
    """Peak use of /dev/shm, above its initial use."""
    data_wait: float = 0.0
    """Fraction of its training time spent waiting for data, as the command printed it."""


def whole(
    words: Sequence[str], environ: Mapping[str, str], directory: Path
) -> tuple[float, float, float]:
    """The seconds of a command, and peak MiB of its largest process and of /dev/shm."""
    with (directory / "told.txt").open("wb") as told, Memory() as memory:
        began = time.perf_counter()
        process = subprocess.Popen(
            words, stdout=told, stderr=subprocess.STDOUT, env=environ, cwd=Path(__file__).parents[1]
        )
        memory.of = process.pid
        try:
            _, status, used = os.wait4(process.pid, 0)
        except BaseException:  # interrupted or timed out: leave no process behind
            process.terminate()
            process.wait()
            raise
        seconds = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(words)} failed:\n{(directory / 'told.txt').read_text()[-3000:]}")
    return seconds, max(used.ru_maxrss / 1024, memory.peak_mib), memory.shared_mib


class Memory:
    """Samples the use of /dev/shm, and the peaks of processes, while it is entered.

    The system tells the largest of those that a command has waited for itself, which leaves out the
    ranks that a fork server starts.
    """

    of: int | None = None
    """The process whose descendants are looked at."""

    def __init__(self) -> None:
        self._before = self._most = self._taken()
        self.peak_mib = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join()

    @property
    def shared_mib(self) -> float:
        return (self._most - self._before) / 2**20

    def _look(self) -> None:
        for number in itertools.count():
            if self._ended.wait(0.01):
                return
            self._most = max(self._most, self._taken())
            if self.of is not None and number % 20 == 0:
                self.peak_mib = max([self.peak_mib, *map(_peak_mib, _descendants(self.of))])

    @staticmethod
    def _taken() -> int:
        return shutil.disk_usage("/dev/shm").used if Path("/dev/shm").exists() else 0


def _descendants(process: int) -> list[int]:
    try:
        return [child.pid for child in psutil.Process(process).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _peak_mib(process: int) -> float:
    """The most that a process has held; 0 if it has ended."""
    try:
        text = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    found = re.search(r"VmHWM:\s+(\d+) kB", text)  # a process that is ending has none
    return int(found[1]) / 1024 if found else 0.0


def ours(
    name: str,
    processes: int,
    variables: Mapping[str, str],
    workers: int = 0,
    changes: Sequence[str] = (),
) -> Whole:
    job = (JOBS | OF_FILES)[name]
    with tempfile.TemporaryDirectory() as place:
        spec = Path(place, "job.yaml")
        text = SPEC.format(
            name=name, rows=job.batch * processes, each=job.batch, steps=job.steps, workers=workers
        )
        spec.write_text(text, encoding="utf-8")
        words = [str(BIN / "evenstep"), "run", str(spec), *changes, "--runs", place]
        many = ["--processes", str(processes)] if processes > 1 else []
        environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), **variables}
        seconds, peak, shared = whole([*words, *many], environ, Path(place))
        lines = Path(place, "whole", "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        logged = [row for row in map(json.loads, lines) if row.get("train/rows_per_second")]
        rate = statistics.median(row["train/rows_per_second"] for row in logged)
        waited = statistics.median(row["train/data_wait"] for row in logged)
        return Whole(seconds, rate, peak, shared, waited)


def plain(name: str, processes: int, workers: int = 0) -> Whole:
    with tempfile.TemporaryDirectory() as place:
        words = [sys.executable, "-m", "benchmarks.plain", name, place, str(workers)]
        if processes > 1:
            start = [str(BIN / "torchrun"), "--standalone", f"--nproc-per-node={processes}"]
            words = [*start, *words[1:]]
        seconds, peak, shared = whole(words, os.environ, Path(place))
        told = Path(place, "told.txt").read_text(encoding="utf-8").splitlines()
        rates = [float(line.split()[-2]) for line in told if line.endswith(" rows/s")]
        return Whole(seconds, rates[-1] * processes, peak, shared)


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
    arguments.add_argument("--models", nargs="+", choices=[*JOBS, *OF_FILES], default=list(JOBS))
    arguments.add_argument("--processes", nargs="+", type=int, default=[1, 2])
    arguments.add_argument("--pairs", type=int, default=3)
    arguments.add_argument(
        "--workers", nargs="+", type=int, help="measure jobs whose rows are read from files"
    )
    arguments.add_argument("--busy", action="store_true")
    arguments.add_argument("--ours", nargs="*", metavar="NAME=VALUE", default=[])
    arguments.add_argument("--spec", nargs="*", metavar="KEY=VALUE", default=[])
    asked = arguments.parse_args()
    variables = dict(each.split("=", 1) for each in asked.ours)
    if asked.workers is not None:
        of_files(asked.models, asked.workers, asked.pairs, variables)
        return
    print(
        "| job | processes | Evenstep, s | script, s | **ratio** | rows/s: Evenstep, script "
        "| MiB: Evenstep, script |\n|---|--:|--:|--:|---|--:|--:|"
    )
    for name in asked.models:
        for processes in asked.processes:
            with two_beside(asked.busy):
                pairs = [
                    (ours(name, processes, variables, changes=asked.spec), plain(name, processes))
                    for _ in range(asked.pairs)
                ]
            print(row(name, processes, pairs), flush=True)


def of_files(
    names: Sequence[str], workers: Sequence[int], pairs: int, variables: Mapping[str, str]
) -> None:
    """The table of jobs whose rows are expensive to read."""
    print(
        "| rows | workers | rows/s: Evenstep, script | **ratio** | Evenstep waits for data "
        "| MiB of /dev/shm: Evenstep, script |\n|---|--:|--:|---|--:|--:|"
    )
    for name in names:
        (JOBS | OF_FILES)[name].rows(1, 1)  # imports and caches
        for count in workers:
            runs = [(ours(name, 1, variables, count), plain(name, 1, count)) for _ in range(pairs)]
            ratios = sorted(own.rows_per_second / script.rows_per_second for own, script in runs)
            own, script = (
                [statistics.median(column) for column in zip(*side, strict=True)]
                for side in zip(*runs, strict=True)
            )
            print(
                f"| {name} | {count} | {own[1]:,.0f}, {script[1]:,.0f} "
                f"| **{statistics.median(ratios):.2f}** ({ratios[0]:.2f}-{ratios[-1]:.2f}) "
                f"| {own[4]:.0%} | {own[3]:.0f}, {script[3]:.0f} |",
                flush=True,
            )


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
