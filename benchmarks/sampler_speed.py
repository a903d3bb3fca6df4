"""Cost of computing the rows of a step: nanoseconds per row by data set size and by step number.

python -m benchmarks.sampler_speed
"""

from __future__ import annotations

import time
from collections.abc import Callable

from service.basics.randomness import ROW, key
from service.plan.samplers import rounds_for, rows_of, sides_of


def seconds(call: Callable[[], object], *, repeats: int = 15) -> float:
    """The lowest of several times: the one least affected by other work on the machine."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def of_step(step: int, *, rows: int, global_batch: int) -> float:
    """Seconds to compute the rows of one step."""
    return seconds(lambda: rows_of(step, rows=rows, global_batch=global_batch, seed=0))


def main() -> None:
    """Print two tables and the cost of a key."""
    sizes = (128, 4096, 65_536)
    print("| rows | rounds |", *(f"ns a row, {size:,} rows a step |" for size in sizes))
    print("|--:|--:|" + "--:|" * len(sizes))
    for rows in (10**3, 10**6, 10**9, 10**12):
        each = (of_step(10, rows=rows, global_batch=size) / size * 1e9 for size in sizes)
        print(f"| {rows:,} | {rounds_for(sides_of(rows))} |", *(f"{ns:.0f} |" for ns in each))

    print("\n| rows | step 10, us | step 10^9, us | (4,096 rows a step)\n|--:|--:|--:|")
    for rows in (10**3, 10**6, 10**9, 10**12):
        near, far = (of_step(step, rows=rows, global_batch=4096) * 1e6 for step in (10, 10**9))
        print(f"| {rows:,} | {near:.0f} | {far:.0f} |")

    a_key = seconds(lambda: [key(ROW, 0, 3, row) for row in range(10_000)]) / 10_000
    print(f"\na key of a domain and three parts: {a_key * 1e6:.2f} us")


if __name__ == "__main__":
    main()
