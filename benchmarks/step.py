"""Cost of a training step and a test pass, relative to the same hand-written loops.

    python -m benchmarks.step [--pairs 12]
    torchrun --nproc-per-node 2 -m benchmarks.step [--pairs 12]

Within each process, epochs of Evenstep and of the hand-written loop alternate, so that a busy
machine slows both: medians of the ratios of their processor times, with the quartiles.  Evenstep
logs every 50 steps, writes receipts and polls for stop requests; a hand-written loop only reads its
loss.  The second hand-written loop, without a DataLoader, is compared with the first in the same
way.  Python calls are counted by cProfile over 400 steps; they do not depend on machine load.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import io
import os
import pstats
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.by_hand import ROWS, ByHand
from launch.environment import Environment, launched
from launch.rank.process_group import process_group
from service.data import loading
from service.data.batches import Step
from service.data.task import load_task
from service.distributed.world import World
from service.evaluation import test_loop
from service.health.stop_request import StopRequest
from service.plan.plan import Plan, make_plan
from service.spec.files import load_spec
from service.training import worker

BATCH = 32
COUNTED = 400  # steps


@dataclass
class Times:
    """Processor seconds of each epoch, one list for each loop."""

    ours: list[float] = field(default_factory=list)
    by_loader: list[float] = field(default_factory=list)
    by_index: list[float] = field(default_factory=list)
    calls: dict[str, float] = field(default_factory=dict)
    """Python calls of one step."""


class Paired:
    """Wraps the steps of Evenstep's loop, and pauses it for the turns of the other loops."""

    def __init__(self, times: Times, *, pairs: int) -> None:
        self.times, self.pairs = times, pairs
        self.per_epoch = 0

    def steps(self, steps: Iterable[Step], world: World) -> Iterator[Step]:
        """Yields the same steps; between two epochs it trains and times the hand-written loops."""
        self.per_epoch = ROWS // (BATCH * world.processes)
        source = iter(steps)
        loader, index = ByHand(batch=BATCH, loader=True), ByHand(batch=BATCH, loader=False)
        turns: list[tuple[ByHand, Iterator[list[torch.Tensor]], list[float]]] = [
            (loader, loader.batches(), self.times.by_loader),
            (index, index.batches(), self.times.by_index),
        ]
        yield from self._counted(source, "ours")
        for name, (hand, batches, _) in zip(("by loader", "by index"), turns, strict=True):
            with self._counting(name):
                hand.train_steps(batches, COUNTED)
        for _ in range(self.pairs):
            for hand, batches, kept in turns:
                began = time.process_time()
                hand.train_steps(batches, self.per_epoch)
                kept.append(time.process_time() - began)
            began = time.process_time()
            for _ in range(self.per_epoch):
                yield next(source)
            self.times.ours.append(time.process_time() - began)

    def _counted(self, source: Iterator[Step], name: str) -> Iterator[Step]:
        for _ in range(100):  # warm up caches
            yield next(source)
        with self._counting(name):
            for _ in range(COUNTED):
                yield next(source)

    @contextlib.contextmanager
    def _counting(self, name: str) -> Iterator[None]:
        profile = cProfile.Profile()
        profile.enable()
        yield
        profile.disable()
        stats: Any = pstats.Stats(profile, stream=io.StringIO())
        self.times.calls[name] = stats.total_calls / COUNTED
        if os.environ.get("SHOW") == name:
            show(stats)


def show(stats: Any) -> None:
    """Print every function called at least once in twenty steps, the most frequent first."""
    rows = sorted(((v[1], v[2], k) for k, v in stats.stats.items()), reverse=True)
    for count, seconds, (file, line, function) in rows:
        if count >= COUNTED / 20:
            where = f"{Path(file).parent.name}/{Path(file).name}:{line}" if line else ""
            print(f"{count / COUNTED:7.2f} {seconds / COUNTED * 1e6:8.1f} us {function} {where}")


def trained(world: World, *, pairs: int) -> Times:
    """The times of a run in which the loops take turns."""
    times = Times()
    paired = Paired(times, pairs=pairs)
    per_epoch = ROWS // (BATCH * world.processes)
    plan, task = planned(world, steps=100 + COUNTED + pairs * per_epoch)
    usual: Any = worker.train_steps
    worker.train_steps = lambda *a, **k: paired.steps(usual(*a, **k), world)
    with tempfile.TemporaryDirectory() as own:
        runs = Path(world.from_lead(own))
        worker.run(plan, task, world, runs=runs, stop=StopRequest())
        world.barrier()
    worker.train_steps = usual
    return times


def planned(world: World, *, steps: int) -> tuple[Plan, Any]:
    """Evenstep's plan and task."""
    spec = load_spec(
        {
            "name": "step",
            "task": "benchmarks.by_hand:task",
            "batch": {"global_batch": BATCH * world.processes, "micro_batch": BATCH},
            "length": {"steps": steps},
            "optimizer": {"name": "adamw", "lr": 1e-3, "weight_decay": 1e-2},
            "test": {"micro_batch": 256},
            "tracking": {"log_every_steps": 50},
        }
    )
    task = load_task(spec.task, spec.task_args)
    return make_plan(spec, processes=world.processes, train_rows=ROWS, test_rows=0), task


def tested(world: World, *, pairs: int) -> list[float]:
    """Evenstep's test pass relative to the hand-written exact one, as ratios of processor time."""
    hand = ByHand(batch=256, loader=False)
    _, task = planned(world, steps=1)
    spec = planned(world, steps=1)[0].spec
    plan = make_plan(
        spec, processes=world.processes, train_rows=ROWS, test_rows=len(hand.test.tensors[0])
    )
    data = task.test_data()

    def ours() -> dict[str, float]:
        batches = loading.test_batches(data, task=task, plan=plan, world=world)
        counted = test_loop.Counted(task, plan=plan, world=world)
        return test_loop.test(hand.model, batches, world=world, counted=counted)

    assert abs(ours()["test/accuracy"] - hand.tested(256)[1]) < 1e-12
    return [seconds(ours) / seconds(lambda: hand.tested(256)) for _ in range(pairs)]


def seconds(work: Callable[[], object]) -> float:
    """Processor seconds of five calls."""
    began = time.process_time()
    for _ in range(5):
        work()
    return time.process_time() - began


def ratio(ours: list[float], theirs: list[float]) -> str:
    """`1.02 (1.00-1.04)`: the median of the ratios and their quartiles."""
    return quartiles([a / b for a, b in zip(ours, theirs, strict=True)])


def quartiles(values: list[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.3f} ({low:.3f}-{high:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=12)
    pairs = parser.parse_args().pairs
    os.environ.setdefault("EVENSTEP_DEVICE", "cpu")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    with process_group(launched() or Environment()) as world:
        times = trained(world, pairs=pairs)
        tests = tested(world, pairs=pairs)
        if world.is_lead:
            steps = ROWS // (BATCH * world.processes)
            microseconds = statistics.median(times.by_index) / steps * 1e6
            print(f"{world.processes} process(es), torch {torch.__version__}, one thread each")
            print(f"hand-written step, rows by index     {microseconds:.0f} us of processor time")
            print(f"hand-written step, with a DataLoader {ratio(times.by_loader, times.by_index)}")
            print(f"Evenstep's step                      {ratio(times.ours, times.by_index)}")
            print(f"  relative to that with a DataLoader {ratio(times.ours, times.by_loader)}")
            print(f"Evenstep's test pass                 {quartiles(tests)}")
            counted = ", ".join(f"{name} {calls:.0f}" for name, calls in times.calls.items())
            print(f"Python calls a step: {counted}")


if __name__ == "__main__":
    main()
