"""The bandwidth between the nodes of a job, measured once before its first step."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist

from service.distributed.world import World

RDMA_DEVICES = Path("/sys/class/infiniband")
_FIRST_BYTES = 1 << 18
_MOST_BYTES = 1 << 26
_SECONDS = 0.05
"""About how long the second sum may take; both together take less than 0.3 s on most networks."""


def bandwidth(world: World, size_bytes: int, *, rounds: int) -> float:
    """Bytes per second and process of the fastest of some sums of `size_bytes`, on this process.

    Source of the factor: NVIDIA's nccl-tests, doc/PERFORMANCE.md, "busbw" of all-reduce.
    """
    values = torch.ones(size_bytes // 4, device=world.device)
    seconds = []
    for _ in range(rounds):
        world.barrier()
        begin = time.perf_counter()
        total = float(world.sum(values)[-1])  # read, because a GPU completes the sum only then
        seconds.append(time.perf_counter() - begin)
        if total != world.processes:
            raise ArithmeticError(f"{world.processes} ones add up to {total}")
    return size_bytes / min(seconds) * 2 * (world.processes - 1) / world.processes


def bandwidth_in_words(world: World, *, processes_here: int) -> str:
    """A line about the network between the nodes; every process calls it.

    It takes a few sums: the first connects, and its time decides how large the last one is.
    """
    bandwidth(world, _FIRST_BYTES, rounds=1)
    size = _FIRST_BYTES
    rate = _of_all(world, bandwidth(world, size, rounds=1))
    while size < _MOST_BYTES and 2 * size / rate < _SECONDS / 2:
        size *= 2
    rate = _of_all(world, bandwidth(world, size, rounds=1))
    nodes = world.processes // processes_here
    return (
        f"Network: {rate / 1e9:.2f} GB/s for each process, in a sum of {size / 2**20:g} MiB over "
        f"{world.processes} processes on {nodes} nodes, by {dist.get_backend()} over "
        f"{interface_in_words(world.device.type, os.environ)}."
    )


def _of_all(world: World, rate: float) -> float:
    """The mean over the processes, which is equal on all of them."""
    one = torch.tensor([rate], dtype=world.wide, device=world.device)
    return float(world.sum(one)[0]) / world.processes


def interface_in_words(
    device: str, environ: Mapping[str, str], *, rdma: Path = RDMA_DEVICES
) -> str:
    """What the nodes talk through, as far as this process can tell."""
    variable = "GLOO_SOCKET_IFNAME" if device == "cpu" else "NCCL_SOCKET_IFNAME"
    name = environ.get(variable, "").removeprefix("=") or "the interface that it chooses"
    if device == "cpu":
        return name
    found = rdma_devices(rdma)
    if not found:
        return f"{name}; this machine has no RDMA device"
    if environ.get("NCCL_IB_DISABLE", "0") not in ("", "0"):
        return f"{name}; NCCL_IB_DISABLE keeps it from the RDMA devices {', '.join(found)}"
    return f"the RDMA devices {', '.join(found)}, or {name} if NCCL cannot use them"


def rdma_devices(place: Path = RDMA_DEVICES) -> list[str]:
    """The names of the RDMA devices of this machine, such as mlx5_0."""
    try:
        return sorted(each.name for each in place.iterdir())
    except OSError:
        return []
