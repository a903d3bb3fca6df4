"""What `exactness: bitwise` costs: time of a step and memory for gradients, against `rounding`.

python -m benchmarks.bitwise_cost
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from features import FEATURES
from jobs import train_in_process
from processes import Processes

from service.tracking import read_metrics

STEPS, WARM = 240, 40


def step_milliseconds(pool: Processes, exactness: str) -> float:
    """Median time of a step, from the rows per second of 20 steps at a time."""
    job: dict[str, Any] = FEATURES["BatchNorm, micro"] | {
        "exactness": exactness,
        "task_args": {"double": False},
        "batch": {"global_batch": 128, "micro_batch": 16},
        "length": {"steps": STEPS},
        "tracking": {"log_every_steps": 20},
    }
    with tempfile.TemporaryDirectory() as place:
        pool.run(train_in_process, job, Path(place), timeout_seconds=600)
        rows = read_metrics(Path(place, "job", "metrics.jsonl"))
    rates = [row["train/rows_per_second"] for row in rows if row["step"] > WARM]
    return 1000 * 128 / statistics.median(rates)


def main() -> None:
    print("| processes | rounding, ms a step | bitwise, ms a step | ratio |\n|---|---|---|---|")
    for count in (1, 2, 4):
        with Processes(count) as pool:
            pairs = [
                (step_milliseconds(pool, "rounding"), step_milliseconds(pool, "bitwise"))
                for _ in range(5)
            ]
        plain, ordered = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratio = statistics.median(b / a for a, b in pairs)
        print(f"| {count} | {plain:.2f} | {ordered:.2f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
