"""What a start asks of the store where the processes meet: messages and bytes, of each process.

    python -m benchmarks.rendezvous [--processes 2 3 4 6]

`evenstep run digits --processes N`, stopped after its first step, under strace: every message to
and from the launcher's TCPStore is counted, from the first process to the end of the last.  A
message is one call of the system that sends; the answers are counted in bytes alone.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

EVENSTEP = Path(sys.executable).with_name("evenstep")
STOPPED = 75
_LISTEN = re.compile(r"^(\d+) +listen\(\d+<TCPv?6?:\[.*:(\d+)\]>")
_CALL = re.compile(r"^(\d+) +(sendto|recvfrom)\(\d+<TCPv?6?:\[.*?:(\d+)->.*?:(\d+)\]>")
_RESUMED = re.compile(r"^(\d+) +<\.\.\. (?:sendto|recvfrom) resumed>")
_RESULT = re.compile(r"= (\d+)$")


@dataclass
class Traffic:
    """What some processes have exchanged with the store."""

    connections: int = 0
    messages: int = 0
    sent: int = 0
    received: int = 0


def traced(processes: int) -> list[str]:
    """What strace tells of one start."""
    with tempfile.TemporaryDirectory() as place:
        words = ["run", "digits", "--processes", str(processes), "--runs", place]
        words += ["--stop-at", "1", "tracking.wandb="]
        told = Path(place, "calls")
        strace = ["strace", "-f", "--seccomp-bpf", "-yy", "-qq", "-s", "0", "-o", str(told)]
        ended = subprocess.run(
            [*strace, "-e", "trace=listen,sendto,recvfrom", str(EVENSTEP), *words],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"CI": "1"},
        )
        assert ended.returncode == STOPPED, ended.stderr
        return told.read_text().splitlines()


def counted(lines: Iterable[str]) -> tuple[Traffic, Traffic]:
    """(the launcher's traffic with its store, that of all ranks together)."""
    launcher, ranks = Traffic(), Traffic()
    stores: set[str] = set()
    of: dict[str, Traffic] = {}
    begun: dict[str, tuple[str, Traffic]] = {}
    first = ""
    for line in lines:
        first = first or line.split()[0]
        if (listens := _LISTEN.match(line)) and listens[1] == first:
            stores.add(listens[2])
        if resumed := _RESUMED.match(line):
            call, traffic = begun.pop(resumed[1], ("", Traffic()))
        elif (found := _CALL.match(line)) and found[4] in stores:
            thread, call, port = found[1], found[2], found[3]
            if port not in of:
                of[port] = launcher if thread == first else ranks
                of[port].connections += 1
            traffic = of[port]
            if line.endswith("<unfinished ...>"):
                begun[thread] = call, traffic
                continue
        else:
            continue
        size = int(result[1]) if (result := _RESULT.search(line)) else 0
        if call == "sendto":
            traffic.messages += 1
            traffic.sent += size
        else:
            traffic.received += size
    return launcher, ranks


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--processes", type=int, nargs="+", default=[2, 3, 4, 6])
    print("| processes | | connections | messages | bytes sent | bytes received |")
    print("|--:|---|--:|--:|--:|--:|")
    for count in arguments.parse_args().processes:
        launcher, ranks = counted(traced(count))
        for name, one, by in (("launcher", launcher, 1), ("each process", ranks, count)):
            values = (one.connections, one.messages, one.sent, one.received)
            cells = " | ".join(f"{value / by:,.0f}" for value in values)
            print(f"| {count} | {name} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
