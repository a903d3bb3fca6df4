"""Where a machine has several NUMA nodes, a process keeps to the cores of its GPU's."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from commands import DEADLINE_SECONDS, ROOT, command

from service.basics.limits import cores_near

CARD = "0000:dc:00.0"


def machine(place: Path, *nodes: str, card: str) -> Path:
    """What the kernel tells of a machine with these cores in each node, and a card in one."""
    for number, cores in enumerate(nodes):
        node = place / f"devices/system/node/node{number}"
        node.mkdir(parents=True)
        (node / "cpulist").write_text(f"{cores}\n")
    (place / "bus/pci/devices" / CARD).mkdir(parents=True)
    (place / "bus/pci/devices" / CARD / "numa_node").write_text(f"{card}\n")
    return place


def test_the_cores_of_the_node_are_near(tmp_path: Path) -> None:
    two = machine(tmp_path, "0-3,8-11", "4-7,12", card="1")
    assert cores_near(CARD, two) == {4, 5, 6, 7, 12}
    assert cores_near("0000:01:00.0", two) == set(), "a card that the machine does not have"


@pytest.mark.parametrize(("nodes", "card"), [(("0-7",), "0"), (("0-3", "4-7"), "-1")])
def test_no_core_is_nearer_where_the_machine_does_not_say(
    tmp_path: Path, nodes: tuple[str, ...], card: str
) -> None:
    assert cores_near(CARD, machine(tmp_path, *nodes, card=card)) == set()


STAYING = """
import os, sys, threading
from pathlib import Path
from service.basics.limits import stay_near

waits = threading.Event()
other = threading.Thread(target=waits.wait)
other.start()
own = sorted(os.sched_getaffinity(0))
stay_near("0000:dc:00.0", Path(sys.argv[1]))
seen = {tuple(os.sched_getaffinity(int(thread))) for thread in os.listdir("/proc/self/task")}
print(own[0], len(own), *seen)
waits.set()
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")
def test_every_thread_stays_near_on_cores_that_it_may_use(tmp_path: Path) -> None:
    first = min(os.sched_getaffinity(0))
    said = {}
    for name, node in (("some", f"{first},4000-4001"), ("none", "4000-4001")):
        place = machine(tmp_path / name, node, "4002", card="0")
        words = (sys.executable, "-c", STAYING, place)
        done = command(*words, cwd=ROOT, timeout=DEADLINE_SECONDS)
        assert done.returncode == 0, done.stderr
        said[name] = done.stdout.split(maxsplit=2)
    assert said["some"][2] == f"({first},)\n"
    assert said["none"][2].count(",") >= int(said["none"][1]) - 1, "nothing has changed"
