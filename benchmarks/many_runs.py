"""How quick `watch --all` and `report --all --serve` are with many runs.

python -m benchmarks.many_runs [--runs 1000] [--going-on 100]

The runs are copies of one real run of 400 logged rows; some of them look as if they went on, and
one of these gets new rows. Measured are the real commands: how long `watch --all` takes until its
first line and until all lines, and `report --all --serve` until its first page, and until it has a
page with a new row. In parentheses the processor time, which other programs change less.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from urllib.request import urlopen

import psutil  # type: ignore[import-untyped]  # its wheel has no types

EVENSTEP = str(Path(sys.executable).parent / "evenstep")
JOB = ("length={steps: 400}", "tracking.log_every_steps=1", "test={every_steps: 100}")
_ROWS_OF_ONE_THAT_GOES_ON = 300
_UPDATES = 5
_FRESH_SECONDS = 1.2
"""A server looks at the files once in a second."""


def main() -> None:
    """Make the runs, measure, and print a line for each measurement."""
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--runs", type=int, default=1000)
    asked.add_argument("--going-on", type=int, default=100)
    given = asked.parse_args()
    with tempfile.TemporaryDirectory(prefix="many-runs-") as text:
        place = Path(text)
        words = [EVENSTEP, "run", "digits", *JOB, "--runs", "made", "--name", "model"]
        subprocess.run(words, cwd=place, check=True, stdout=subprocess.DEVNULL)
        for number in range(given.runs):
            _copy(
                place / "made/model",
                place / f"runs/run-{number:04d}",
                goes_on=number < given.going_on,
            )
        print(f"{given.runs:,} runs, {given.going_on:,} of them go on")
        _measure_watch(place, given.runs, given.going_on)
        _measure_report(place)


def _copy(model: Path, run: Path, *, goes_on: bool) -> None:
    """A run as this one, without its checkpoints and the lock of its process, which has ended."""
    shutil.copytree(model, run, ignore=shutil.ignore_patterns("checkpoints", ".lock"))
    facts = json.loads((run / "run.json").read_text())
    facts["id"] = run.name
    if goes_on:
        facts["state"] = "running"
        for key in ("ended", "to_step", "outcome"):
            facts["attempts"][-1].pop(key)
        rows = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
        (run / "metrics.jsonl").write_text("".join(rows[:_ROWS_OF_ONE_THAT_GOES_ON]))
    (run / "run.json").write_text(json.dumps(facts))


def _add_row(place: Path, step: int) -> None:
    row = {"step": step, "epoch": 9.0, "time": time.time(), "train/loss": 1 / step}
    with (place / "runs/run-0000/metrics.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


def _measure_watch(place: Path, runs: int, going_on: int) -> None:
    begin = time.perf_counter()
    words = [EVENSTEP, "watch", "--all"]
    with subprocess.Popen(words, cwd=place, stdout=subprocess.PIPE, text=True) as command:
        assert command.stdout is not None
        first_line = command.stdout.readline()
        first, used = time.perf_counter() - begin, _used(command)
        told = [first_line, *(command.stdout.readline() for _ in range(runs - 1))]
        last = time.perf_counter() - begin
        command.terminate()
    found = sum(" state=running " in line for line in told)
    assert found == going_on, f"{found} runs look as if they went on"
    print(f"watch --all: first line {first:.2f} s ({used:.2f} s), all lines {last:.2f} s")


def _measure_report(place: Path) -> None:
    begin = time.perf_counter()
    words = [EVENSTEP, "report", "--all", "--serve", "--port", "0"]
    with subprocess.Popen(words, cwd=place, stdout=subprocess.PIPE, text=True) as command:
        assert command.stdout is not None
        found = re.search(r"http://\S+", command.stdout.readline())
        assert found is not None, "it says where it serves"
        urlopen(found[0]).read()
        first, used = time.perf_counter() - begin, _used(command)
        print(f"report --all --serve: first page {first:.2f} s ({used:.2f} s)")
        seconds, processor = [], []
        for number in range(_UPDATES):
            _add_row(place, _ROWS_OF_ONE_THAT_GOES_ON + 1 + number)
            time.sleep(_FRESH_SECONDS)
            before = _used(command)
            seconds.append(_seconds(lambda: urlopen(f"{found[0]}state").read()))
            seconds[-1] += _seconds(lambda: urlopen(found[0]).read())
            processor.append(_used(command) - before)
        command.terminate()
    update, cost = statistics.median(seconds), statistics.median(processor)
    print(f"report --all --serve: the page with a new row {update:.2f} s ({cost:.2f} s), a median")


def _seconds(action: Callable[[], object]) -> float:
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def _used(command: subprocess.Popen[str]) -> float:
    """The processor time of a command so far."""
    times = psutil.Process(command.pid).cpu_times()
    return float(times.user + times.system)


if __name__ == "__main__":
    main()
