"""Joins this process to the others on its device, and provides the `World`."""

from __future__ import annotations

import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator

from launch.environment import Environment
from launch.rank.joining import keep_to_loopback, on_one_node, store_of, wait_for_all
from service.basics.errors import SpecError, Stopped
from service.basics.limits import stay_near, threads_each
from service.distributed.world import BOUNDED, World, be_patient, connect_patience, unconnected
from service.optimization.precision import multiply_in

# Groups that are done with stay until the process leaves. An exception's traceback may hold the
# model with its exchange of gradients: were that the last to hold the group, it would be freed
# with the interpreter's lock held, and wait there for gloo's threads to end, of which one may wait
# for that lock to free a tensor. Now and then a run that was stopped hung so.
_KEPT: list[object] = []
# These variables restrict the devices that a process sees.
_VISIBLE = (
    "CUDA_VISIBLE_DEVICES",
    "HIP_VISIBLE_DEVICES",
    "ROCR_VISIBLE_DEVICES",
    "ZE_AFFINITY_MASK",
    "ASCEND_RT_VISIBLE_DEVICES",
)


@contextmanager
def process_group(
    environment: Environment,
    *,
    precision: str = "fp32",
    bitwise: bool = False,
    timeout_seconds: float = 300.0,
) -> Iterator[World]:
    """A context with all processes of the job connected.

    NCCL on NVIDIA GPUs, gloo on CPU, and what accelerate knows for others.

    Args:
        bitwise: compute so that the same rows give the same bits, whatever else is different.
    Raises:
        SpecError: two processes would compute on one device.
        PeerLost: the processes did not come together.
    """
    device = _device()
    free = not bitwise and "OMP_NUM_THREADS" not in os.environ
    if bitwise:
        _compute_in_one_order()
    elif free:
        _share_cores(environment)
    multiply_in(precision)
    accelerator = _accelerator(environment, device, timeout_seconds)
    own = _own(environment, device, accelerator)
    world = World(accelerator, device=own, precision=precision, may_set_threads=free)
    # By default, accelerate under torchrun on CPU silently trains every rank alone.
    assert world.processes == environment.world_size, "accelerate joined another group"
    assert world.index == environment.rank, "accelerate took another rank"
    assert world.device.type == device, "accelerate chose another device"
    together = True
    try:
        if device != "cpu" and world.processes > 1:
            require_own_device(world, identity_of(world.device))
        yield world
    except BaseException as error:
        together = isinstance(error, Stopped)
        raise
    finally:
        if dist.is_initialized():
            _KEPT.append(dist.group.WORLD)
            # A group of GPUs is destroyed by all its processes together: NCCL waits for what its
            # peers have not done yet. One that fails alone leaves without it, and they notice.
            if together or dist.get_backend() == "gloo":
                dist.destroy_process_group()


def _device() -> str:
    if os.environ.get("EVENSTEP_DEVICE") == "cpu":
        return "cpu"
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if accelerator is None else accelerator.type


def _own(environment: Environment, device: str, accelerator: Accelerator) -> torch.device:
    """The device of this process, among the visible devices of its machine."""
    if environment.is_alone and accelerator.device.type == device:
        chosen: torch.device = accelerator.device  # perhaps by ACCELERATE_TORCH_DEVICE
        return chosen
    if environment.is_alone or device == "cpu":
        return torch.device(device)
    return torch.device(device, environment.local_rank % torch.accelerator.device_count())


def require_own_device(world: World, own: str) -> None:
    """Refuse two processes on one device, which accelerate silently allows.

    How many a process sees says nothing: under Slurm, with `torchrun --virtual-local-rank` or on a
    MIG slice each sees one, its own.  Every process calls it.

    Args:
        own: which device this process computes on, as `identity_of` tells.
    Raises:
        SpecError: it names the ranks; on every process.
    """
    ranks: dict[str, list[int]] = {}
    for rank, device in enumerate(world.gather(own)):
        ranks.setdefault(device, []).append(rank)
    for device, sharing in ranks.items():
        if len(sharing) > 1:
            raise SpecError(
                f"--processes: ranks {', '.join(map(str, sharing))} compute on one device "
                f"({device}). Use at most as many processes as there are devices, show each rank "
                "one of its own (CUDA_VISIBLE_DEVICES), or use EVENSTEP_DEVICE=cpu. NCCL joins no "
                "two MIG slices of one GPU."
            )


def identity_of(device: torch.device) -> str:
    """A text that is equal for two processes if and only if they use the same device."""
    module = torch.get_device_module(device)
    told = getattr(module, "get_device_properties", None)
    properties: Any = None if told is None else told(device)
    name: str = getattr(properties, "name", device.type)
    # A MIG slice is its GPU: what NCCL compares is the place on the PCI bus.
    if hasattr(properties, "uuid") and "MIG" not in name.split():
        return f"{name} {properties.uuid}"
    if hasattr(properties, "pci_bus_id"):
        bus = f"{properties.pci_domain_id:04x}:{properties.pci_bus_id:02x}"
        return f"{name} on PCI {bus}:{properties.pci_device_id:02x} of {_machine()}"
    visible = [f"{each}={os.environ[each]}" for each in _VISIBLE if each in os.environ]
    return " ".join([f"{name} {device.index or 0} of {_machine()}", *visible])


def stay_near_device(world: World, environment: Environment) -> None:
    """Bind each of several processes of a machine to the cores of its GPU's NUMA node.

    Called once it is known how many cores each process gets, for it changes what this one sees.
    """
    if world.device.type != "cuda" or environment.local_world_size == 1:
        return
    card: Any = torch.cuda.get_device_properties(world.device)
    if hasattr(card, "pci_bus_id"):
        bus = f"{card.pci_domain_id:04x}:{card.pci_bus_id:02x}:{card.pci_device_id:02x}"
        stay_near(f"{bus}.0")


def _machine() -> str:
    """The name of the device and its identity, as NCCL knows it."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()} {boot.read_text()[:8] if boot.exists() else ''}".strip()


def _share_cores(environment: Environment) -> None:
    """Divide the cores of this container among its processes, also with GPUs.

    Left alone, each would compute on the host with a thread for every core of the machine.
    """
    threads = threads_each(environment.local_world_size)
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)


def _compute_in_one_order() -> None:
    # Threads divide a sum, so its bits depend on their number.
    torch.set_num_threads(1)
    # cuBLAS reads it when it is loaded, and torch refuses its other ways of working.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # It would first fill all new memory with NaN, which only helps to find uninitialized reads.
    kept: Any = torch.utils.deterministic  # whose types do not tell its property
    kept.fill_uninitialized_memory = False


def _accelerator(environment: Environment, device: str, timeout_seconds: float) -> Accelerator:
    with warnings.catch_warnings():
        # It warns that it uses the CPU, which is what it was asked to do.
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
    bounded = backend in BOUNDED
    brief = connect_patience(environment.world_size)
    try:
        dist.init_process_group(
            backend,
            store=store,
            rank=environment.rank,
            world_size=environment.world_size,
            timeout=brief if bounded else patience,
        )
        if backend == "gloo":  # a process in the place of another does not answer here
            dist.barrier()
    except (RuntimeError, ValueError) as error:
        lost = unconnected(error)
        if lost is None:
            raise
        raise lost from error
    if bounded:
        be_patient(patience, None)
