"""The bandwidth between the nodes of a job: before its first step, and for `evenstep doctor`."""

from __future__ import annotations

import os
import re
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from service.distributed.world import World

RDMA_DEVICES = Path("/sys/class/infiniband")
SOCKET = "Socket"
"""NCCL's name of TCP."""
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


@dataclass(frozen=True)
class Measured:
    """What a process knows about the network between the nodes."""

    told: str
    leaves_rdma: bool
    """Whether NCCL uses TCP although this machine has RDMA devices."""


def measured(world: World, *, processes_here: int, log: Path | None = None) -> Measured:
    """What the network between the nodes can do; every process calls it.

    It takes a few sums: the first connects, and its time decides how large the last one is.

    Args:
        log: what NCCL has written, see `log_of_nccl`.
    """
    bandwidth(world, _FIRST_BYTES, rounds=1)
    size = _FIRST_BYTES
    rate = _of_all(world, bandwidth(world, size, rounds=1))
    while size < _MOST_BYTES and 2 * size / rate < _SECONDS / 2:
        size *= 2
    rate = _of_all(world, bandwidth(world, size, rounds=1))
    nodes = world.processes // processes_here
    device, chosen = world.device.type, chosen_network(log)
    told = (
        f"{rate / 1e9:.2f} GB/s for each process, in a sum of {size / 2**20:g} MiB over "
        f"{world.processes} processes on {nodes} nodes, by {dist.get_backend()} over "
        f"{interface_in_words(device, os.environ, chosen=chosen)}."
    )
    return Measured(told, leaves_rdma(device, os.environ, chosen=chosen))


def _of_all(world: World, rate: float) -> float:
    """The mean over the processes, which is equal on all of them."""
    one = torch.tensor([rate], dtype=world.wide, device=world.device)
    return float(world.sum(one)[0]) / world.processes


def interface_in_words(
    device: str, environ: Mapping[str, str], *, chosen: str = "", rdma: Path = RDMA_DEVICES
) -> str:
    """What the nodes talk through, as far as this process can tell.

    Args:
        chosen: the network that NCCL has chosen, by its own log; empty: not known.
    """
    variable = "GLOO_SOCKET_IFNAME" if device == "cpu" else "NCCL_SOCKET_IFNAME"
    name = environ.get(variable, "").removeprefix("=") or "the interface that it chooses"
    found = rdma_devices(rdma)
    if device == "cpu":
        unused = f"; gloo does not use the RDMA devices {', '.join(found)}"
        return f"{name}{unused if found else ''}"
    if not found:
        return f"{name}; this machine has no RDMA device"
    if _is_disabled(environ):
        return f"{name}; NCCL_IB_DISABLE keeps it from the RDMA devices {', '.join(found)}"
    if chosen == SOCKET:
        return f"{name}; NCCL has not chosen the RDMA devices {', '.join(found)}"
    if chosen:
        return f"the RDMA devices {', '.join(found)} ({chosen})"
    return f"the RDMA devices {', '.join(found)}, or {name} if NCCL cannot use them"


def leaves_rdma(
    device: str, environ: Mapping[str, str], *, chosen: str, rdma: Path = RDMA_DEVICES
) -> bool:
    """Whether NCCL uses TCP although this machine has RDMA devices."""
    if device == "cpu" or not rdma_devices(rdma):
        return False
    return _is_disabled(environ) or chosen == SOCKET


def _is_disabled(environ: Mapping[str, str]) -> bool:
    """Whether a variable keeps NCCL from RDMA."""
    return environ.get("NCCL_IB_DISABLE", "0") not in ("", "0")


@contextmanager
def log_of_nccl() -> Iterator[Path]:
    """A context in which NCCL, if it begins in it, writes what it does to this file.

    What the user has set wins; then the file stays empty.
    """
    with tempfile.TemporaryDirectory(prefix="evenstep-nccl-") as place:
        path = Path(place, "log")
        path.touch()
        wanted = {"NCCL_DEBUG": "INFO", "NCCL_DEBUG_FILE": str(path)}
        if not any(name in os.environ for name in wanted):
            os.environ |= wanted
        yield path


def chosen_network(log: Path | None) -> str:
    """The network that NCCL says it uses, such as `IB` or `Socket`; empty if it does not say so.

    Source: NCCL's src/init.cc, `INFO(NCCL_INIT, "Using network %s", ...)`.
    """
    text = log.read_text(encoding="utf-8", errors="replace") if log is not None else ""
    found = re.findall(r"Using network (\S.*)", text)
    return str(found[-1]).strip() if found else ""


def rdma_devices(place: Path = RDMA_DEVICES) -> list[str]:
    """The names of the RDMA devices of this machine, such as mlx5_0."""
    try:
        return sorted(each.name for each in place.iterdir())
    except OSError:
        return []
