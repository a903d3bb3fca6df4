"""Joins this process to the others on its device, and provides the `World`."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator

from launch.environment import Environment
from launch.rank.joining import (
    connect_in_few_requests,
    keep_to_loopback,
    on_one_node,
    store_of,
    wait_for_all,
)
from service.basics.errors import SpecError, Stopped
from service.basics.limits import stay_near, threads_each
from service.distributed.devices import module_of
from service.distributed.recursive_doubling import meet
from service.distributed.world import (
    BOUNDED,
    World,
    accelerator_for,
    be_patient,
    connect_patience,
    lost_peer,
    unconnected,
)
from service.optimization.precision import multiply_in

# Keep finished groups until the process exits. An exception's traceback may refer to the
# model with its gradient synchronization: if it were the last reference to the group, the group
# would be freed with the interpreter's lock held, and wait for gloo's threads, one of which may
# wait for that lock to free a tensor. A run that was stopped sometimes hung because of this.
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
    own_disks: bool = False,
) -> Iterator[World]:
    """A context with all processes of the job connected.

    NCCL on NVIDIA GPUs, gloo on CPU, and accelerate's choice for other devices.

    Args:
        bitwise: compute so that the same rows give the same bits, whatever else differs.
        own_disks: see `World`.
    Raises:
        SpecError: two processes would compute on one device.
        PeerLost: the processes did not connect.
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
    world = World(
        accelerator,
        device=own,
        precision=precision,
        may_set_threads=free,
        own_disks=own_disks,
    )
    # By default, accelerate under torchrun on CPU silently trains every rank alone.
    assert world.processes == environment.world_size, "accelerate joined another group"
    assert world.index == environment.rank, "accelerate took another rank"
    assert world.device.type == device, "accelerate chose another device"
    together = True
    try:
        if device != "cpu" and world.processes > 1:
            require_own_device(world, identity_of(world.device))
            world.connect_devices()
        yield world
    except BaseException as error:
        together = isinstance(error, Stopped)
        raise
    finally:
        if dist.is_initialized():
            _KEPT.append(dist.group.WORLD)
            # A group of GPUs is destroyed by all its processes together: NCCL waits for the pending
            # work of its peers. A process that fails alone exits without it, and the others detect
            # this.
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

    The number of visible devices does not matter: under Slurm, with `torchrun --virtual-local-rank`
    or on a MIG slice each process sees one, its own.  Every process calls it.

    Args:
        own: the device of this process, from `identity_of`.
    Raises:
        SpecError: names the ranks; on every process.
    """
    ranks: dict[str, list[int]] = {}
    for rank, device in enumerate(world.gather(own)):
        ranks.setdefault(device, []).append(rank)
    for device, sharing in ranks.items():
        if len(sharing) > 1:
            raise SpecError(
                f"--processes: ranks {', '.join(map(str, sharing))} compute on one device "
                f"({device}). Use at most as many processes as there are devices, give each rank "
                "its own (CUDA_VISIBLE_DEVICES), or use EVENSTEP_DEVICE=cpu. NCCL cannot connect "
                "two MIG slices of one GPU."
            )


def identity_of(device: torch.device) -> str:
    """A text that is equal for two processes if and only if they use the same device."""
    properties = _properties_of(device)
    name: str = getattr(properties, "name", device.type)
    # A MIG slice counts as its GPU: NCCL compares the PCI address.
    if hasattr(properties, "uuid") and "MIG" not in name.split():
        return f"{name} {properties.uuid}"
    if hasattr(properties, "pci_bus_id"):
        bus = f"{properties.pci_domain_id:04x}:{properties.pci_bus_id:02x}"
        return f"{name} on PCI {bus}:{properties.pci_device_id:02x} of {_machine()}"
    visible = [f"{each}={os.environ[each]}" for each in _VISIBLE if each in os.environ]
    return " ".join([f"{name} {device.index or 0} of {_machine()}", *visible])


def _properties_of(device: torch.device) -> Any:
    """What the maker tells of a device; None if nothing."""
    told = getattr(module_of(device), "get_device_properties", None)
    return None if told is None else told(device)


def stay_near_device(world: World, environment: Environment, system: Path = Path("/sys")) -> None:
    """Bind each of several processes of a machine to the cores of its device's NUMA node.

    Called when the number of cores of each process is known, because it changes the visible cores.
    """
    card = _properties_of(world.device)
    if environment.local_world_size > 1 and hasattr(card, "pci_bus_id"):
        bus = f"{card.pci_domain_id:04x}:{card.pci_bus_id:02x}:{card.pci_device_id:02x}"
        stay_near(f"{bus}.0", system)


def _machine() -> str:
    """The name of the device and its identity, as NCCL knows it."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()} {boot.read_text()[:8] if boot.exists() else ''}".strip()


def _share_cores(environment: Environment) -> None:
    """Divide the cores of this container among its processes, also with GPUs.

    By default, each would use one thread for every core of the machine.
    """
    threads = threads_each(environment.local_world_size)
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)


def _compute_in_one_order() -> None:
    # Threads divide a sum, so its bits depend on their number.
    torch.set_num_threads(1)
    # cuBLAS reads it when it is loaded, and torch refuses the nondeterministic modes.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # It would first fill all new memory with NaN, which only helps to find uninitialized reads.
    kept: Any = torch.utils.deterministic  # its property is not in the type annotations
    kept.fill_uninitialized_memory = False


def _accelerator(environment: Environment, device: str, timeout_seconds: float) -> Accelerator:
    if not environment.is_alone and not dist.is_initialized():
        _join(environment, dist.get_default_backend_for_device(device), timeout_seconds)
    return accelerator_for(device)


def _join(environment: Environment, backend: str, timeout_seconds: float) -> None:
    """Connect this process to the others.

    Raises:
        PeerLost: they did not connect, or another program changed the store.
    """
    if on_one_node(environment):
        keep_to_loopback()
    connect_in_few_requests(environment)
    patience = timedelta(seconds=timeout_seconds)
    bounded = backend in BOUNDED
    brief = connect_patience(environment.world_size)
    try:
        store = store_of(environment, seconds=timeout_seconds)
        if store is None:
            dist.init_process_group(backend, timeout=patience)
            return
        wait_for_all(store, environment, seconds=timeout_seconds)
        dist.init_process_group(
            backend,
            store=store,
            rank=environment.rank,
            world_size=environment.world_size,
            timeout=brief if bounded else patience,
        )
        if backend == "gloo":
            meet(dist.group.WORLD)  # an impostor does not answer here
    except (RuntimeError, ValueError) as error:
        lost = lost_peer(error) or unconnected(error)
        if lost is None:
            raise
        raise lost from error
    if bounded:
        be_patient(patience, None)
