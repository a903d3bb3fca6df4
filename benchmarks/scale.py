"""Cost of the plan, the rows and the receipt per process at large process counts, simulated.

python -m benchmarks.scale

Computes the share of one step of every process of the job, one after the other; compares their
union with the rows of the step, and their digests with those of one process.
10^12 rows, four micro-batches of 8 rows a process.
"""

from __future__ import annotations

import statistics
import time
from typing import NamedTuple

import numpy as np

from service.data.loading import _train_blocks
from service.plan.plan import Plan, make_plan
from service.spec.files import load_spec
from service.training.receipts import micro_batch_digest

ROWS, EACH, SIZE, STEP = 10**12, 4, 8, 1_000_000


class Share(NamedTuple):
    """One process's share of one step."""

    rows: list[int]
    digest: int
    seconds: float


def planned(processes: int, of: int) -> Plan:
    """The plan of a job for at most `of` processes, at `processes`."""
    spec = load_spec(
        {
            "name": "scale",
            "task": "service.recipes.digits:task",
            "batch": {"global_batch": of * EACH * SIZE, "micro_batch": SIZE},
            "length": {"steps": STEP + 1},
            "optimizer": {"name": "sgd", "lr": 0.1},
        }
    )
    return make_plan(spec, processes=processes, train_rows=ROWS, test_rows=0)


def share(plan: Plan, process: int) -> Share:
    """The rows of one process in step `STEP`, and the sum of their digests."""
    began = time.perf_counter()
    block = next(_train_blocks(plan, process, STEP, ahead=1))
    numbers, _, rows = block.parts()
    digest = sum(
        micro_batch_digest(STEP, number, ids) for number, ids in zip(numbers, rows, strict=True)
    )
    seconds = time.perf_counter() - began
    return Share(np.concatenate(rows).tolist(), digest % 2**64, seconds)


def main() -> None:
    share(planned(1, of=1), 0)  # warm up caches
    print("| processes | rows a step | plan, ms | a process's share of a step, us | same rows |")
    print("|--:|--:|--:|--:|---|")
    for processes in (1, 8, 64, 512, 4096):
        began = time.perf_counter()
        plan = planned(processes, of=processes)
        milliseconds = 1000 * (time.perf_counter() - began)
        shares = [share(plan, process) for process in range(processes)]
        whole = share(planned(1, of=processes), 0)
        together = [row for each in shares for row in each.rows]
        same = together == whole.rows and sum(s.digest for s in shares) % 2**64 == whole.digest
        median = statistics.median(share(plan, processes - 1).seconds for _ in range(31))
        print(
            f"| {processes:,} | {plan.global_batch:,} | {milliseconds:.1f} | {median * 1e6:.0f} "
            f"| {'yes' if same else 'NO'} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
