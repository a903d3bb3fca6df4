"""All-reduce over processes of one machine: gloo's ring, and recursive doubling.

torchrun --nproc-per-node N -m benchmarks.sums

Milliseconds of wall time, and of processor time of the first process: medians of alternating
rounds.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from service.distributed.recursive_doubling import RecursiveDoubling

KIB, ROUNDS = 1 << 10, 5


def cost(work: Callable[[], object], times: int) -> tuple[float, float]:
    """(wall, processor) milliseconds of one call."""
    dist.barrier()
    wall, own = time.perf_counter(), time.process_time()
    for _ in range(times):
        work()
    spent = time.perf_counter() - wall, time.process_time() - own
    return 1000 * spent[0] / times, 1000 * spent[1] / times


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    assert dist.group.WORLD is not None, "started by torchrun"
    pairs = RecursiveDoubling(dist.group.WORLD)
    lead = dist.get_rank() == 0
    if lead:
        print("| processes | KiB | ring, ms | pairs, ms | ring, CPU ms | pairs, CPU ms |")
        print("|--:|--:|--:|--:|--:|--:|")
    for size in (1, 8, 64, 256, 512, 1024, 4096):
        values = torch.zeros(size * KIB // 4)
        times = max(10, min(200, 100_000 // size))

        def ring(values: torch.Tensor = values) -> None:
            dist.all_reduce(values)

        def paired(values: torch.Tensor = values) -> None:
            pairs.combine(values)

        found = [(*cost(ring, times), *cost(paired, times)) for _ in range(ROUNDS)]
        a, own_a, b, own_b = (statistics.median(column) for column in zip(*found, strict=True))
        if lead:
            cells = f"{a:.2f} | {b:.2f} | {own_a:.2f} | {own_b:.2f}"
            print(f"| {dist.get_world_size()} | {size} | {cells} |", flush=True)
    dist.barrier()
    os._exit(0)  # gloo's threads sometimes abort the interpreter at exit


if __name__ == "__main__":
    main()
