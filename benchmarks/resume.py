"""Cost of resuming from a checkpoint, relative to torch.load of the same state.

    python -m benchmarks.resume [--millions 10 100] [--rounds 5] [--directory DIR]

A model of that many float32 parameters with Adam: 12 bytes per parameter, in the page
cache.  Each round loads it with torch.load and `load_state_dict`, and with Evenstep, each in a new
process that has the model: seconds, and medians of the ratios of each round.  Evenstep's time is
split into the verification of the hashes, which torch.load does not do, and loading.  Memory is the
peak above the initial memory, including the optimizer state, which stays.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.checkpoint_stall import by_torch, state_of
from service.checkpoints.checkpoints import Checkpoints
from service.checkpoints.snapshots import content_of, load
from service.distributed.world import alone
from service.optimization.train_state import TrainState
from service.runs.checkpoint_files import checkpoints_in, damage_of
from service.spec.models import CheckpointSpec


class Memory:
    """Peak of this process's anonymous memory above its initial value, in MiB."""

    def __enter__(self) -> Memory:
        self._over = threading.Event()
        self._before = self.most = anonymous()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    @property
    def grown(self) -> float:
        return self.most - self._before

    def _watch(self) -> None:
        while not self._over.wait(0.002):
            self.most = max(self.most, anonymous())


def anonymous() -> float:
    """Anonymous memory in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    raise AssertionError("Linux tells RssAnon")


def by_torch_load(state: TrainState, path: Path) -> None:
    held = torch.load(path, weights_only=True)
    state.model.load_state_dict(held["model"])
    state.optimizer.load_state_dict(held["optimizer"])


def taken(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def write(millions: int, place: Path) -> int:
    """Save the same state in both ways; return its size in bytes."""
    state = state_of(millions)
    state.step = 1
    ours = Checkpoints(
        place / "checkpoints",
        world=alone(),
        spec=CheckpointSpec(asynchronous=False),
        facts={},
        say=print,
    )
    ours.save(state)
    ours.close()
    by_torch(state, place)()
    return content_of(state).size_bytes


def one(way: str, millions: int, place: Path) -> tuple[float, float]:
    """(seconds, MiB) of one way, in a separate process."""
    state = state_of(millions, stepped=False)
    (checkpoint,) = checkpoints_in(place / "checkpoints")
    actions: dict[str, Callable[[], object]] = {
        "torch.load": lambda: by_torch_load(state, place / "checkpoint.pt"),
        "check": lambda: damage_of(checkpoint, quick=True),
        "load": lambda: load(checkpoint.path, state),
    }
    with Memory() as memory:
        seconds = taken(actions[way])
    return seconds, memory.grown


def measure(millions: int, rounds: int, parent: Path) -> None:
    context = multiprocessing.get_context("fork")  # nothing has been computed in this process
    found: dict[str, list[tuple[float, float]]] = {"torch.load": [], "check": [], "load": []}
    with tempfile.TemporaryDirectory(dir=parent) as place:
        with context.Pool(1) as pool:
            size = pool.apply(write, (millions, Path(place)))
        with context.Pool(1, maxtasksperchild=1) as pool:
            for _ in range(rounds + 1):
                for way, values in found.items():
                    values.append(pool.apply(one, (way, millions, Path(place))))
    table(millions, size, {way: values[1:] for way, values in found.items()})


def table(millions: int, size: int, found: dict[str, list[tuple[float, float]]]) -> None:
    print(f"\n{millions}M parameters, {size / 2**20:,.0f} MiB\n")
    print("| | seconds | relative to torch.load | memory, MiB |\n|---|---|---|---|")
    base = found["torch.load"]
    both = [
        (one[0] + other[0], max(one[1], other[1]))
        for one, other in zip(found["check"], found["load"], strict=True)
    ]
    named = {
        "torch.load and load_state_dict": base,
        "ours: load": found["load"],
        "Evenstep: verify": found["check"],
        "ours: both": both,
    }
    for name, values in named.items():
        seconds = statistics.median(value[0] for value in values)
        ratio = statistics.median(v[0] / b[0] for v, b in zip(values, base, strict=True))
        memory = max(value[1] for value in values)
        print(f"| {name} | {seconds:.3f} | {ratio:.2f}x | {memory:,.0f} |", flush=True)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--millions", type=int, nargs="+", default=[10, 100])
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()))
    told = arguments.parse_args()
    for millions in told.millions:
        measure(millions, told.rounds, told.directory)


if __name__ == "__main__":
    main()
