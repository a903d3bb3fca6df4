"""Cost of commands and of a step as a run grows: one table.

    python -m benchmarks.growth [--turns 2] [--only runs] [--small]

Rows that are logged, runs in a directory, parameters of a model, parameter groups, and rows of a
data set. Each figure of a command is the lowest processor time of several turns and the peak
memory, with the start of Python. A step is the median of the logged steps of a run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.large_runs import cost, write_run

TASK = """
import torch
from torch import nn
from service.data.task import supervised


class Rows:
    def __init__(self, rows):
        self._rows = rows

    def __len__(self):
        return self._rows

    def __getitems__(self, rows):
        return [(torch.tensor([row % 7 / 7, 1.0]), torch.tensor(row % 2)) for row in rows]


def task(layers: int, rows: int):
    # An independent layer for each parameter group: the network is as wide as it must be, not deep.
    return supervised(model=lambda: Heads(layers), train=Rows(rows), test=Rows(64))


class Heads(nn.Module):
    def __init__(self, count):
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(2, 2) for _ in range(count))

    def forward(self, x):
        return sum(head(x) for head in self.heads) / len(self.heads)
"""
STEPS = 40

Line = tuple[str, tuple[str, ...]]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--only", default="", help="lines with this word, such as runs")
    parser.add_argument("--small", action="store_true", help="tiny sizes: checks that it runs")
    asked = parser.parse_args()
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}\n")
    print("| size | what | processor time | memory | ms a step |\n|---|---|--:|--:|--:|")
    kinds = (logged_rows, runs, parameters, groups, data_rows)
    for kind in kinds:
        for size in SMALL[kind.__name__] if asked.small else SIZES[kind.__name__]:
            with tempfile.TemporaryDirectory() as place:
                os.chdir(place)
                Path("task.py").write_text(TASK)
                for what, words in kind(size):
                    told = f"{size:,} {kind.__name__.replace('_', ' ')}"
                    if asked.only in f"{told} {what}":
                        show(told, what, words, asked.turns)
                os.chdir("/")


SIZES = {
    "logged_rows": (10_000, 100_000, 1_000_000),
    "runs": (10, 1000, 10_000),
    "parameters": (20, 1000, 10_000),
    "groups": (2, 200, 2000),
    "data_rows": (10_000, 10**7, 10**10),
}
SMALL = {
    "logged_rows": (10, 20),
    "runs": (2, 3),
    "parameters": (2, 4),
    "groups": (1, 2),
    "data_rows": (100, 10**10),
}


def logged_rows(size: int) -> Iterator[Line]:
    """Two runs of so many rows."""
    for name in ("a", "b"):
        write_run(Path("runs", name), size)
    yield "`runs`", ("runs", "runs")
    yield "`report`", ("report", "runs/a", "-o", "a.html")
    yield "`verify`", ("verify", "runs/a", "runs/b")


def runs(size: int) -> Iterator[Line]:
    """So many runs of ten rows in one directory."""
    write_run(Path("runs/run-0"), 10)
    for number in range(1, size):
        shutil.copytree("runs/run-0", f"runs/run-{number}")
    yield "`runs`", ("runs", "runs")
    if size <= 1000:  # one page with more charts cannot be read
        yield "`report` of all", ("report", *[f"runs/run-{n}" for n in range(size)], "-o", "r.html")


def parameters(size: int) -> Iterator[Line]:
    """A model of so many tensors."""
    yield from trained(layers=size // 2)


def groups(size: int) -> Iterator[Line]:
    """A spec with so many parameter groups."""
    each = [{"match": f"heads.{n}.*", "lr": 0.01 / (n + 1)} for n in range(size)]
    yield from trained(layers=size, optimizer={"name": "adamw", "lr": 0.01, "groups": each})


def data_rows(size: int) -> Iterator[Line]:
    """A data set of so many rows."""
    yield from trained(rows=size)


def trained(
    layers: int = 2, rows: int = 1000, optimizer: dict[str, object] | None = None
) -> Iterator[Line]:
    """The plan of a job, and the job."""
    spec = {
        "name": "job",
        "task": "./task.py:task",
        "task_args": {"layers": layers, "rows": rows},
        "batch": {"global_batch": 32},
        "length": {"steps": STEPS},
        "optimizer": optimizer or {"name": "adamw", "lr": 0.01},
        "tracking": {"log_every_steps": 1},
    }
    Path("job.json").write_text(json.dumps(spec))
    yield "`plan`", ("plan", "job.json")
    yield "`run`", ("run", "job.json", "--fresh")


def show(told: str, what: str, words: tuple[str, ...], turns: int) -> None:
    each = [cost(words) for _ in range(turns)]
    _, processor, memory = (min(kind) for kind in zip(*each, strict=True))
    step = f"{milliseconds():.1f}" if words[0] == "run" else ""
    print(f"| {told} | {what} | {processor:.2f} s | {memory:.0f} MiB | {step} |", flush=True)


def milliseconds() -> float:
    """The median time of a step of the job."""
    rows = [json.loads(line) for line in Path("runs/job/metrics.jsonl").read_text().splitlines()]
    rates = [row["train/rows_per_second"] for row in rows if "train/rows_per_second" in row]
    return 1e3 * statistics.median(32 / rate for rate in rates)


if __name__ == "__main__":
    main()
