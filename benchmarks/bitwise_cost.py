"""Overhead of `exactness: bitwise` over `rounding`: step time and memory per process.

python -m benchmarks.bitwise_cost

Time is measured with the digits network on 128 rows in 8 micro-batches.  Memory is measured with a
network of 8 million weights (32 MB of gradients) on the same batch: the increase of the resident
memory of the largest process during training.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import psutil
import torch
from features import FEATURES
from jobs import train_in_process
from processes import Processes
from torch import nn
from torch.utils.data import TensorDataset

from service.data.task import Task, supervised
from service.distributed.stragglers import peak_bytes
from service.distributed.world import World
from service.runs.tracking import read_metrics

STEPS, WARM, PAIRS, FRESH = 240, 40, 5, 3
WIDTH, LAYERS = 1000, 8
MIB = 1 << 20


def wide() -> Task:
    """Eight layers of a million weights each."""
    rows = TensorDataset(torch.randn(512, WIDTH), torch.arange(512) % 10)
    layers = [layer for _ in range(LAYERS) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU())]
    return supervised(model=lambda: nn.Sequential(*layers), train=rows, test=rows)


def job_of(exactness: str, **sections: Any) -> dict[str, Any]:
    return FEATURES["BatchNorm, micro"] | {
        "exactness": exactness,
        "task_args": {"double": False},
        "batch": {"global_batch": 128, "micro_batch": 16},
        "length": {"steps": STEPS},
        "tracking": {"log_every_steps": 20},
        **sections,
    }


def step_milliseconds(pool: Processes, exactness: str) -> float:
    """Median time of a step, from the rows per second of 20 steps at a time."""
    with tempfile.TemporaryDirectory() as place:
        pool.run(train_in_process, job_of(exactness), Path(place), timeout_seconds=600)
        rows = read_metrics(Path(place, "job", "metrics.jsonl"))
    rates = [row["train/rows_per_second"] for row in rows if row["step"] > WARM]
    return 1000 * 128 / statistics.median(rates)


def risen_bytes(world: World, job: dict[str, Any], runs: Path) -> int:
    """The increase of this process's resident memory during training."""
    before = psutil.Process().memory_info().rss
    train_in_process(world, job, runs)
    return peak_bytes(world.device) - before


def memory_mib(count: int, exactness: str) -> float:
    """Memory that the largest of `count` new processes needs to train the wide network (median)."""
    job = job_of(
        exactness, task=f"{Path(__file__)}:wide", task_args={}, length={"steps": 6}, tracking={}
    )
    found = []
    for _ in range(FRESH):
        with Processes(count) as fresh, tempfile.TemporaryDirectory() as place:
            found.append(max(fresh.run(risen_bytes, job, Path(place), timeout_seconds=600)))
    return statistics.median(found) / MIB


def main() -> None:
    print("| processes | a step, ms | bitwise | ratio | memory, MiB | bitwise | more gradients |")
    print("|---|---|---|---|---|---|---|")
    gradients = LAYERS * (WIDTH + 1) * WIDTH * 4 / MIB
    for count in (1, 2, 4):
        with Processes(count) as pool:
            pairs = [
                (step_milliseconds(pool, "rounding"), step_milliseconds(pool, "bitwise"))
                for _ in range(PAIRS)
            ]
        plain, ordered = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratio = statistics.median(b / a for a, b in pairs)
        small, large = memory_mib(count, "rounding"), memory_mib(count, "bitwise")
        cells = f"{plain:.2f} | {ordered:.2f} | {ratio:.2f} | {small:.0f} | {large:.0f}"
        print(f"| {count} | {cells} | {(large - small) / gradients:.1f} sets |", flush=True)


if __name__ == "__main__":
    main()
