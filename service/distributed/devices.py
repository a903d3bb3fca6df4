"""Device functions besides tensors, through torch's module for its kind, not a vendor's.

`torch.get_device_module(device)` is torch.cuda, torch.xpu, torch.mps, torch.cpu, or the module
that a vendor has registered (Ascend's torch.npu); most of their names are the same.
"""

from __future__ import annotations

import resource
import sys
from typing import Any

import torch

from service.distributed.generators import Seeded


def module_of(device: torch.device) -> Any:
    """torch's module for devices of this kind."""
    return torch.get_device_module(device)


def ready(device: torch.device) -> torch.device:
    """The same device, with its index, selected for this thread and initialized.

    Before that, a device has no generators, and its memory cannot be queried.
    """
    if device.type == "cpu":
        return device
    if device.index is None:
        current = getattr(module_of(device), "current_device", None)  # torch.mps has but one
        device = torch.device(device.type, current() if current is not None else 0)
    use(device)
    torch.empty(0, device=device)
    return device


def use(device: torch.device) -> None:
    """Make it the default device of this thread.

    A thread starts with the first device: waiting for it or pinning memory for it would create a
    context on that device, some hundred MiB in the memory of another process's device.
    """
    choose = getattr(module_of(device), "set_device", None)
    if device.type != "cpu" and choose is not None:
        choose(device)


def generators(device: torch.device) -> list[Seeded]:
    """The default generators of the CPU and of a device that is ready."""
    if device.type == "cpu":
        return [torch.default_generator]
    own = getattr(module_of(device), "default_generators", None)
    return [torch.default_generator, own[device.index] if own else _ByModule(device)]


class _ByModule:
    """The only generator of a kind of device that does not expose it."""

    def __init__(self, device: torch.device) -> None:
        self._seed = module_of(device).manual_seed

    def manual_seed(self, seed: int) -> None:
        """Seed the device's generator."""
        self._seed(seed)


def copies_late(device: torch.device) -> bool:
    """Whether copies between pinned memory and the device are asynchronous."""
    # Apple's devices share the main memory, and have no pinned memory.
    return device.type not in ("cpu", "mps")


def side_stream(device: torch.device) -> Any:
    """A new stream for asynchronous copies beside the computation; None if there is none.

    Each has a memory pool of its own.
    """
    streams = getattr(module_of(device), "Stream", None)
    return streams() if copies_late(device) and streams is not None else None


def moment(device: torch.device, *, timing: bool = False) -> Any:
    """An event after all work that was submitted to the device so far.

    With `timing`, `elapsed_time(later)` gives the milliseconds between two.
    """
    event = module_of(device).Event(enable_timing=timing)
    event.record()
    return event


def synchronize(device: torch.device) -> None:
    """Wait for all work of the device; raises the errors of that work."""
    if device.type != "cpu":
        module_of(device).synchronize()


def peak_bytes(device: torch.device) -> int:
    """The peak memory of this process: of the device, or of main memory for the CPU."""
    told = getattr(module_of(device), "max_memory_allocated", None)
    if device.type != "cpu" and told is not None:
        return int(told(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def free_bytes(device: torch.device) -> int | None:
    """Free memory of the device in bytes; None if it is unknown, or is the main memory.

    Memory that torch has cached counts as free.
    """
    module = module_of(device)
    if device.type == "cpu" or not hasattr(module, "mem_get_info"):
        return None
    free, _ = module.mem_get_info(device)
    unused = 0
    if hasattr(module, "memory_reserved"):
        unused = module.memory_reserved(device) - module.memory_allocated(device)
    return int(free + unused)


def forget_peak(device: torch.device) -> None:
    """Release torch's cached memory, and measure the peak from now on."""
    module = module_of(device)
    for name in ("empty_cache", "reset_peak_memory_stats"):
        act = getattr(module, name, None)
        if device.type != "cpu" and act is not None:
            act()


def name_of(device: torch.device) -> str:
    """The maker's name of the device, or empty if unknown."""
    name = getattr(module_of(device), "get_device_name", None)
    return str(name(device)) if device.type != "cpu" and name is not None else ""
