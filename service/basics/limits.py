"""The cores and the memory that this process may use, as a container limits them. No torch.

A container sees all cores of its node, but only its cgroup says how many of them it may use.
With one thread per visible core, the kernel would suspend them for most of each scheduling
period (a tenth of a second).
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil  # type: ignore[import-untyped]  # its wheel has no types

# The path of a socket may have 107 bytes; multiprocessing adds /pymp-xxxxxxxx/listener-xxxxxxxx.
LONGEST_TMPDIR = 107 - 32
CGROUPS = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")
_MOST_WORKERS = 8  # more workers would only wait for the disk or each other


@dataclass(frozen=True)
class Limits:
    """The limits of this process."""

    affinity: int
    """Cores it may run on."""
    quota: float | None
    """Its CPU quota in cores, or None without a quota."""
    memory_bytes: int | None
    """Memory limit of its cgroup in bytes, or None without a limit."""

    @property
    def cores(self) -> int:
        """Threads that can run at the same time without being suspended by the kernel."""
        return self.affinity if self.quota is None else max(1, min(self.affinity, int(self.quota)))


def limits(cgroups: Path = CGROUPS, own: Path = OWN) -> Limits:
    """The strictest limits of the cgroup of this process and of its parents."""
    quotas = [quota for place in _places("cpu", cgroups, own) for quota in _quota(place)]
    memory = [limit for place in _places("memory", cgroups, own) for limit in _memory(place)]
    return Limits(_affinity(), min(quotas, default=None), min(memory, default=None))


def cores_near(pci: str, system: Path = Path("/sys")) -> set[int]:
    """Cores of the NUMA node that a PCI device (`0000:dc:00.0`) belongs to.

    Empty if the machine has only one node, or does not say.
    """
    nodes = system / "devices/system/node"
    number = _text(system / "bus/pci/devices" / pci / "numa_node").strip()
    if not number.isdecimal() or len(list(nodes.glob("node[0-9]*"))) < 2:
        return set()
    found: set[int] = set()
    for part in _text(nodes / f"node{number}" / "cpulist").strip().split(","):  # "0-31,64-95"
        first, _, last = part.partition("-")
        if first.isdecimal():
            found.update(range(int(first), int(last or first) + 1))
    return found


def stay_near(pci: str, system: Path = Path("/sys")) -> None:
    """Bind this process, and the processes that it starts later, to the cores near a PCI device.

    Only cores that it may use; if none of them is near, nothing changes.
    """
    if not hasattr(os, "sched_setaffinity"):
        return
    near = cores_near(pci, system) & os.sched_getaffinity(0)
    for thread in os.listdir("/proc/self/task") if near else ():
        with suppress(ProcessLookupError):  # it has ended in the meantime
            os.sched_setaffinity(int(thread), near)


def _affinity() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _places(controller: str, cgroups: Path, own: Path) -> Iterator[Path]:
    """Directories of the cgroup of this process and of its parents; v2 and v1."""
    for line in _text(own).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = cgroups / controller if controllers else cgroups
        # In a container the path may be that of the host and not exist: then the limit is at the
        # root.
        inner = root / path.lstrip("/")
        yield from (place for place in (inner, *inner.parents) if place.is_relative_to(root))


def _quota(place: Path) -> Iterator[float]:
    words = _text(place / "cpu.max").split()  # v2: "150000 100000", or "max 100000"
    if not words:  # v1: -1 means no limit
        words = [_text(place / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
    if len(words) == 2 and words[0].isdecimal() and words[1].isdecimal() and int(words[1]):
        yield int(words[0]) / int(words[1])


def _memory(place: Path) -> Iterator[int]:
    for name in ("memory.max", "memory.limit_in_bytes"):
        text = _text(place / name).strip()
        if text.isdecimal() and int(text) < 2**60:  # v1 writes a huge number for no limit
            yield int(text)


def workers_each(processes: int) -> int:
    """Loader workers for each of `processes` training processes on this machine."""
    return min(_MOST_WORKERS, limits().cores // processes - 1) if limits().cores > processes else 0


def memory_each(processes: int, cgroups: Path = CGROUPS, own: Path = OWN) -> int:
    """Main memory in bytes that each of `processes` processes on this machine may still use."""
    free = [int(psutil.virtual_memory().available)]
    for place in _places("memory", cgroups, own):
        free += [max(0, limit - _used(place)) for limit in _memory(place)]
    return min(free) // processes


def memory_here() -> int:
    """The same for this process, if a launcher has started others on this machine."""
    return memory_each(int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _used(place: Path) -> int:
    """Memory used by a cgroup, without cached files that the kernel can drop."""
    for name, cached in (
        ("memory.current", r"^file (\d+)$"),
        ("memory.usage_in_bytes", r"^total_cache (\d+)$"),
    ):
        text = _text(place / name).strip()
        if text.isdecimal():
            found = re.search(cached, _text(place / "memory.stat"), re.MULTILINE)
            return int(text) - (int(found[1]) if found else 0)
    return 0


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""  # no cgroups, or no such file: then there is no limit


def threads_each(processes: int) -> int:
    """Threads for each of `processes` processes that compute at the same time."""
    return max(1, math.floor(limits().cores / processes))
