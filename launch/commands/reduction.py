"""One process of a test all-reduce: `python -m launch.commands.reduction BYTES`.

It needs torchrun's variables.
Prints the gigabytes per second that each process sent, by NCCL's formula for a ring.
"""

from __future__ import annotations

import sys
import time

import torch

from launch.environment import launched
from launch.rank.exit import leave
from launch.rank.process_group import process_group
from service.distributed.world import World

ROUNDS = 4


def bandwidth(world: World, size_bytes: int) -> float:
    """Bytes per second and process of the fastest of a few sums of `size_bytes`.

    Source of the factor: NVIDIA's nccl-tests, doc/PERFORMANCE.md, "busbw" of all-reduce.
    """
    values = torch.ones(size_bytes // 4, device=world.device)
    seconds = []
    for _ in range(ROUNDS):
        world.barrier()
        begin = time.perf_counter()
        total = float(world.sum(values)[-1])  # read, because a GPU completes the sum only then
        seconds.append(time.perf_counter() - begin)
        if total != world.processes:
            raise ArithmeticError(f"{world.processes} ones add up to {total}")
    return size_bytes / min(seconds) * 2 * (world.processes - 1) / world.processes


def main() -> None:
    """Take part in the sum; rank 0 prints."""
    environment = launched()
    assert environment is not None, "doctor sets RANK and the related variables"
    with process_group(environment, timeout_seconds=30) as world:
        rate = bandwidth(world, int(sys.argv[1]))
        if world.is_lead:
            print(f"{world.device.type} {rate:.0f}", flush=True)
    leave(0)


if __name__ == "__main__":
    main()
