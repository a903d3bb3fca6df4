"""Joins this process to the others, on the device it computes on, and hands out a `World`."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import Accelerator

from launch.environment import Environment
from launch.joining import keep_to_loopback, on_one_node, store_of, wait_for_all
from service.errors import SpecError
from service.limits import threads_each
from service.world import World, be_patient, connect_patience, unconnected

# Groups that are done with stay until the process leaves. An exception's traceback may hold the
# model with its exchange of gradients: were that the last to hold the group, it would be freed
# with the interpreter's lock held, and wait there for gloo's threads to end, of which one may wait
# for that lock to free a tensor. Now and then a run that was stopped hung so.
_KEPT: list[object] = []


@contextmanager
def process_group(
    environment: Environment,
    *,
    precision: str = "fp32",
    bitwise: bool = False,
    timeout_seconds: float = 300.0,
) -> Iterator[World]:
    """All processes of the job, joined for as long as it lasts.

    NCCL on NVIDIA GPUs, gloo on CPU, and what accelerate knows for others.

    Args:
        bitwise: compute so that the same rows give the same bits, whatever else is different.
    Raises:
        SpecError: there are more processes than devices on this machine.
        PeerLost: the processes did not come together.
    """
    device = _device(environment)
    free = not bitwise and "OMP_NUM_THREADS" not in os.environ
    if bitwise:
        _compute_in_one_order()
    elif free:
        _share_cores(environment, device)
    _multiply_in(precision)
    accelerator = _accelerator(environment, device, timeout_seconds)
    world = World(accelerator, precision=precision, may_set_threads=free)
    # Left to itself under torchrun on CPU, accelerate trains every rank alone, and says nothing.
    assert world.processes == environment.world_size, "accelerate joined another group"
    assert world.index == environment.rank, "accelerate took another rank"
    assert world.device.type == device, "accelerate chose another device"
    try:
        yield world
    finally:
        if dist.is_initialized():
            _KEPT.append(dist.group.WORLD)
            dist.destroy_process_group()


def _device(environment: Environment) -> str:
    if os.environ.get("EVENSTEP_DEVICE") == "cpu":
        return "cpu"
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return "cpu"
    if environment.local_world_size > torch.accelerator.device_count():
        # accelerate would let several processes share one, silently.
        raise SpecError(
            f"--processes: {environment.local_world_size} processes on a machine with "
            f"{torch.accelerator.device_count()} {accelerator.type} devices. Use at most "
            "that many, or EVENSTEP_DEVICE=cpu."
        )
    return accelerator.type


def _share_cores(environment: Environment, device: str) -> None:
    """Divide the cores this container gets among its processes."""
    if device == "cpu":
        threads = threads_each(environment.local_world_size)
        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)


def _multiply_in(precision: str) -> None:
    """Let a GPU round the factors of float32 products to 10 bits for tf32, and only for it."""
    # Left alone, torch allows it in convolutions and forbids it in matrix products.
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"


def _compute_in_one_order() -> None:
    # Threads divide a sum among themselves, so their number is in its bits.
    torch.set_num_threads(1)
    # cuBLAS reads it when it is loaded, and torch refuses its other ways of working.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)


def _accelerator(environment: Environment, device: str, timeout_seconds: float) -> Accelerator:
    with warnings.catch_warnings():
        # A notice that it takes the CPU, which is what it was told.
        warnings.simplefilter("ignore", UserWarning)
        if not environment.is_alone and not dist.is_initialized():
            _join(environment, dist.get_default_backend_for_device(device), timeout_seconds)
        return Accelerator(cpu=device == "cpu", gradient_accumulation_steps=1)


def _join(environment: Environment, backend: str, timeout_seconds: float) -> None:
    """Connect this process to the others.

    Raises:
        PeerLost: they did not come, or somebody else changed what they told each other.
    """
    if on_one_node(environment):
        keep_to_loopback()
    patience = timedelta(seconds=timeout_seconds)
    store = store_of(environment, seconds=timeout_seconds)
    if store is None:
        dist.init_process_group(backend, timeout=patience)
        return
    wait_for_all(store, environment, seconds=timeout_seconds)
    bounded = backend in ("gloo", "nccl")  # torch can give these another limit later
    brief = connect_patience(environment.world_size)
    try:
        dist.init_process_group(
            backend,
            store=store,
            rank=environment.rank,
            world_size=environment.world_size,
            timeout=brief if bounded else patience,
        )
        if backend == "gloo":  # who stands in another's place is silent here
            dist.barrier()
    except (RuntimeError, ValueError) as error:
        lost = unconnected(error)
        if lost is None:
            raise
        raise lost from error
    if bounded:
        be_patient(patience, None)
