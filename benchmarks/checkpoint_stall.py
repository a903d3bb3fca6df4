"""Cost of a checkpoint: how long it blocks training, and how long until it is on disk.

    python -m benchmarks.checkpoint_stall [--millions 10 100] [--rounds 5] [--directory DIR]

A model of that many float32 parameters with Adam: 12 bytes per parameter.  The ways to save take
turns, with `between` seconds of training work after each save, on one thread.  `stall` is the time
until training continues, `durable` the time until the checkpoint is published; medians, with the
largest value in parentheses.  `torch.save` writes one file, with fsync and rename and without a
hash.  The copy alone is the lower bound of a snapshot.  The slowdown compares training work that
runs at the same time as the writer with the same work alone.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from service.checkpoints.checkpoints import Checkpoints
from service.checkpoints.snapshots import content_of, expected_bytes
from service.distributed.world import World
from service.optimization.learning_rates import Schedule
from service.optimization.train_state import TrainState
from service.spec.models import CheckpointSpec


def state_of(millions: int, *, stepped: bool = True) -> TrainState:
    """A model of equal square layers, after one Adam step or before the first."""
    width = 1024
    layers = max(1, round(millions * 1e6 / width**2))
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    for p in model.parameters() if stepped else ():
        p.grad = torch.randn_like(p)
    optimizer.step()
    return TrainState(model, optimizer, Schedule(optimizer, lambda step: 1.0))


def work() -> float:
    """Seconds for a fixed amount of training work: matrix products and many short calls."""
    a, b = torch.randn(384, 384), torch.randn(8)
    began = time.perf_counter()
    for _ in range(120):
        a @ a
        for _ in range(40):
            b.add(1)
    return time.perf_counter() - began


def by_torch(state: TrainState, directory: Path) -> Callable[[], None]:
    def save() -> None:
        partial = directory / "partial.pt"
        with partial.open("wb") as file:
            torch.save(
                {"model": state.model.state_dict(), "optimizer": state.optimizer.state_dict()}, file
            )
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, directory / "checkpoint.pt")

    return save


def figures(values: list[float]) -> str:
    return f"{statistics.median(values):.3f} ({max(values):.3f})"


def measure(millions: int, rounds: int, between: float, parent: Path) -> None:
    world, state = World(Accelerator(cpu=True)), state_of(millions)
    size = content_of(state).size_bytes
    quiet = statistics.median(work() for _ in range(5))
    print(f"\n{millions}M parameters, {size / 2**20:,.0f} MiB; seconds, median (largest)\n")
    print(
        "| way | stall | relative to torch.save | first stall | durable | slowdown of concurrent "
        "work |"
    )
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=parent) as place:
        save = by_torch(state, Path(place))
        taken = [timed(save) for _ in range(rounds + 1)]
        base = statistics.median(taken[1:])
        row("torch.save + fsync", taken, base, [], [], quiet)
    for name, asynchronous in (("ours, blocking", False), ("ours, asynchronous", True)):
        with tempfile.TemporaryDirectory(dir=parent) as place:
            one_way(name, state, world, Path(place), rounds, between, base, quiet, asynchronous)
    target = torch.empty(size, dtype=torch.uint8)
    source = torch.ones(size, dtype=torch.uint8)
    copies = [timed(lambda: target.copy_(source)) for _ in range(rounds + 1)]
    row("the copy alone", copies, base, [], [], quiet)


def one_way(
    name: str,
    state: TrainState,
    world: World,
    place: Path,
    rounds: int,
    between: float,
    base: float,
    quiet: float,
    asynchronous: bool,
) -> None:
    made = Checkpoints(
        place / "checkpoints",
        world=world,
        spec=CheckpointSpec(keep=1, asynchronous=asynchronous),
        facts={},
        say=print,
    )
    made.reserve(expected_bytes(state.model, state.optimizer))
    wait_for(between)  # a run takes some steps before it saves
    stalls, durables, beside = [], [], []
    for _ in range(rounds + 1):
        state.step += 1
        made.save(state)
        until = time.perf_counter() + between
        told = made.timings()
        stalls.append(told.pop("save/stall_seconds"))
        while "save/durable_seconds" not in told or time.perf_counter() < until:
            took = work()
            if "save/durable_seconds" not in told:
                beside.append(took)
            told |= made.timings()
        durables.append(told["save/durable_seconds"])
    made.finish()
    made.close()
    row(name, stalls, base, durables[1:], beside, quiet)


def wait_for(seconds: float) -> None:
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        work()


def row(
    name: str,
    stalls: list[float],
    base: float,
    durables: list[float],
    beside: list[float],
    quiet: float,
) -> None:
    slower = f"{statistics.median(beside) / quiet:.2f}x" if beside else "-"
    print(
        f"| {name} | {figures(stalls[1:])} | {statistics.median(stalls[1:]) / base:.3f}x "
        f"| {stalls[0]:.3f} | {figures(durables) if durables else '-'} | {slower} |",
        flush=True,
    )


def timed(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--millions", type=int, nargs="+", default=[10, 100])
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--between", type=float, default=2.0, help="seconds between two saves")
    arguments.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()))
    told = arguments.parse_args()
    torch.set_num_threads(1)
    for millions in told.millions:
        free = shutil.disk_usage(told.directory).free
        assert free > 60 * millions * 1e6, f"{told.directory} has only {free:,} bytes free"
        measure(millions, told.rounds, told.between, told.directory)


if __name__ == "__main__":
    main()
