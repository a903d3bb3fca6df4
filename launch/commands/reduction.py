"""One process of a test all-reduce: `python -m launch.commands.reduction BYTES`.

It needs torchrun's variables.
Prints the gigabytes per second that each process sent, by NCCL's formula for a ring.
"""

from __future__ import annotations

import sys

from launch.environment import launched
from launch.rank.exit import leave
from launch.rank.network import bandwidth
from launch.rank.process_group import process_group

ROUNDS = 4


def main() -> None:
    """Take part in the sum; rank 0 prints."""
    environment = launched()
    assert environment is not None, "doctor sets RANK and the related variables"
    with process_group(environment, timeout_seconds=30) as world:
        rate = bandwidth(world, int(sys.argv[1]), rounds=ROUNDS)
        if world.is_lead:
            print(f"{world.device.type} {rate:.0f}", flush=True)
    leave(0)


if __name__ == "__main__":
    main()
