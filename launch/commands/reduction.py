"""One process of a test all-reduce: `python -m launch.commands.reduction BYTES|nodes`.

It needs torchrun's variables. With BYTES, rank 0 prints the device, and the bytes per second that
each process sent, by NCCL's formula for a ring. With `nodes`, each process prints a `Measured` as
JSON.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

from launch.environment import Environment, launched
from launch.rank.exit import leave
from launch.rank.network import Measured, bandwidth, log_of_nccl, measured
from launch.rank.process_group import process_group

ROUNDS = 4
NODES = "nodes"
CONNECT_SECONDS = 30
CONNECT_NODES_SECONDS = 90
"""One of them may import torch from a slow disk."""


def between_nodes(environment: Environment) -> Measured:
    """What the network between the machines can do; every process of each of them calls it.

    Raises:
        PeerLost: the processes did not connect, or one is gone.
    """
    with (
        log_of_nccl() as log,
        process_group(environment, timeout_seconds=CONNECT_NODES_SECONDS) as world,
    ):
        return measured(world, processes_here=environment.local_world_size, log=log)


def main() -> None:
    """Take part in the sum."""
    environment = launched()
    assert environment is not None, "doctor sets RANK and the related variables"
    if sys.argv[1] == NODES:
        print(json.dumps(asdict(between_nodes(environment))), flush=True)
        leave(0)
    with process_group(environment, timeout_seconds=CONNECT_SECONDS) as world:
        rate = bandwidth(world, int(sys.argv[1]), rounds=ROUNDS)
        if world.is_lead:
            print(f"{world.device.type} {rate:.0f}", flush=True)
    leave(0)


if __name__ == "__main__":
    main()
