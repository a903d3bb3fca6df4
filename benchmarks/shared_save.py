"""Whether a save would be faster if the processes of a node shared it.

    python -m benchmarks.shared_save [--mib 1140] [--rounds 5] [--directory DIR]

So many MiB are copied, and hashed, written and synced as a checkpoint's files are: by one process,
or cut into as many files as there are processes, which begin together; seconds until the last has
ended.  Each size of team takes turns; medians, with the largest behind.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path

import torch

from service.durable import write_file

TEAMS = (1, 2, 4)
_PIECE_BYTES = 2**24


def one(mib: int, place: Path, number: int, together: Barrier) -> None:
    """Copy `mib`, then hash, write and sync them: the times of both, into a file."""
    torch.set_num_threads(1)
    held = torch.rand(mib * 2**18)
    snapshot = torch.zeros_like(held)
    together.wait()
    began = time.perf_counter()
    snapshot.copy_(held)
    copied = time.perf_counter() - began
    together.wait()
    began = time.perf_counter()
    view = memoryview(snapshot.numpy()).cast("B")
    pieces = (view[at : at + _PIECE_BYTES] for at in range(0, len(view), _PIECE_BYTES))
    write_file(place / f"part-{number}", pieces)
    written = time.perf_counter() - began
    (place / f"times-{number}").write_text(f"{copied} {written}")


def shared(mib: int, processes: int, parent: Path) -> tuple[float, float]:
    """Seconds until the last of the processes has copied its part, and has written it."""
    context = multiprocessing.get_context("spawn")
    together = context.Barrier(processes)
    with tempfile.TemporaryDirectory(dir=parent) as name:
        place = Path(name)
        team = [
            context.Process(target=one, args=(mib // processes, place, n, together))
            for n in range(processes)
        ]
        for process in team:
            process.start()
        for process in team:
            process.join()
            assert process.exitcode == 0, "a process has failed"
        times = [
            [float(t) for t in (place / f"times-{n}").read_text().split()] for n in range(processes)
        ]
    copied, written = zip(*times, strict=True)
    return max(copied), max(written)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--mib", type=int, default=1140)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", type=Path, default=None)
    told = parser.parse_args()
    found: dict[int, list[tuple[float, float]]] = {processes: [] for processes in TEAMS}
    for _ in range(told.rounds):
        for processes, values in found.items():
            values.append(
                shared(told.mib, processes, told.directory or Path(tempfile.gettempdir()))
            )
    print("| processes | copied, s | hashed, written and synced, s |")
    print("|---|---|---|")
    for processes, values in found.items():
        copied, written = zip(*values, strict=True)
        print(f"| {processes} | {figures(copied)} | {figures(written)} |")


def figures(values: tuple[float, ...]) -> str:
    return f"{statistics.median(values):.2f} ({max(values):.2f})"


if __name__ == "__main__":
    main()
