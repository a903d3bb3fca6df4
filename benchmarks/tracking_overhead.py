"""Cost of logging one row for the training thread, by tracking backend.

    python -m benchmarks.tracking_overhead [--between 10] [--turns 10]

Between two rows the thread works for some milliseconds like a training loop: many short calls that
release the GIL. The longer it works, the fewer of the lines that logging needs remain in the core's
caches, and the more a row costs. Time that W&B's thread takes meanwhile shows as slower work. CPU
is the thread's own time; the rest of the wall time is waiting for a core, which depends on the load
of the machine. The speed of the machine varies over time, so the cases take turns.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple, TextIO

from service.distributed.stragglers import Stopwatch, StragglerDetector
from service.distributed.world import alone
from service.health.heartbeat import Heartbeat
from service.health.throughput import Throughput
from service.observability.background_writer import BackgroundWriter, TrackerBackend
from service.observability.console import console
from service.observability.tensorboard_backend import TensorBoard
from service.observability.trackio_backend import Trackio
from service.observability.wandb_writer import WandB
from service.runs.tracking import MetricsFile, Tracker, Writer
from service.spec.models import TrackioSpec, WandBSpec
from service.training.worker import collector_at_rest

VALUES = {
    "train/loss": 0.31214,
    "train/lr": 9.4e-4,
    "train/grad_norm": 1.0213,
    "train/rows_per_second": 1480.2,
    "train/data_wait": 0.031,
    "test/loss": 0.28,
    "test/accuracy": 0.976,
    "test/top5": 0.998,
}
KERNEL = bytes(200_000)  # hashing it takes about 0.1 ms, with the GIL released
KERNELS_A_MS = 10
Build = Callable[[Path], list[Writer]]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--between", type=int, default=10, help="milliseconds of work between rows")
    parser.add_argument("--turns", type=int, default=10, help="of 50 rows for each case")
    told = parser.parse_args()
    rows = 50
    os.environ["WANDB__STATS_COREWEAVE_METADATA_BASE_URL"] = "http://127.0.0.1:9"
    with open(os.devnull, "w") as nowhere, a_terminal() as terminal:
        cases: dict[str, Build] = {
            "nothing": lambda _: [],
            "file": lambda run: [metrics(run)],
            "file, plain console": lambda run: [metrics(run), console(rows, stream=nowhere)],
            "file, live console": lambda run: [metrics(run), live(rows, terminal)],
            "file, plain console, W&B": lambda run: [
                metrics(run),
                console(rows, stream=nowhere),
                wandb(run),
            ],
            "all of these, TensorBoard": lambda run: [
                metrics(run),
                console(rows, stream=nowhere),
                wandb(run),
                second("TensorBoard", lambda: TensorBoard.open(run / "tensorboard"), run),
            ],
            "all of these, trackio": lambda run: [
                metrics(run),
                console(rows, stream=nowhere),
                wandb(run),
                second("TensorBoard", lambda: TensorBoard.open(run / "tensorboard"), run),
                second("trackio", lambda: trackio(run), run),
            ],
        }
        kernels = told.between * KERNELS_A_MS
        taken = {name: Taken(kernels, [], [], []) for name in [*cases, "what the row is made of"]}
        for _ in range(told.turns):
            for name, build in cases.items():
                with tempfile.TemporaryDirectory() as run:
                    measure(build(Path(run)), rows, taken[name])
            stragglers(rows, taken["what the row is made of"])
    print(f"{'microseconds a row':28} {'CPU':>8} {'median':>8} {'wall':>8} {'99 %':>8}  work, ms")
    for name, times in taken.items():
        print(f"{name:28} {figures(times)}")


class Taken(NamedTuple):
    """Per row: microseconds of processor and wall time, and milliseconds of work before it."""

    kernels: int
    thinking: list[float]
    wall: list[float]
    working: list[float]

    def add(self, work: Callable[[], object]) -> None:
        begin = time.perf_counter()
        for _ in range(self.kernels):
            hashlib.sha256(KERNEL)
        middle, before = time.perf_counter(), time.thread_time()
        work()
        self.thinking.append((time.thread_time() - before) * 1e6)
        self.wall.append((time.perf_counter() - middle) * 1e6)
        self.working.append((middle - begin) * 1e3)


def measure(writers: list[Writer], rows: int, taken: Taken) -> None:
    tracker = Tracker(writers, epoch_at=lambda step: step / 96)
    with collector_at_rest():  # as in a run
        for step in range(1, rows + 1):
            taken.add(partial(tracker.log, step, VALUES))
    tracker.close("done")


def stragglers(rows: int, taken: Taken) -> None:
    """Cost of publishing a status, of comparing it with 7 others, and of reading the clock."""
    heartbeat, world = Heartbeat(), alone()
    throughput = Throughput(heartbeat, flops_a_row=1e6, peak_flops=1e12)
    of_all = StragglerDetector(
        world, rounds=1, throughput=throughput, stopwatch=Stopwatch(world.device), say=print
    )

    def read() -> None:
        _, memory = of_all.own()
        of_all.reading([[0.01, memory]] * 8)
        throughput.reading(rows_per_step=96)

    for step in range(rows):
        heartbeat.enter("log", step)
        taken.add(read)


def figures(taken: Taken) -> str:
    mean, at_99 = statistics.mean, statistics.quantiles(taken.wall, n=100)[98]
    told = [mean(taken.thinking), statistics.median(taken.thinking), mean(taken.wall), at_99]
    return " ".join(f"{figure:8.1f}" for figure in told) + f"  {mean(taken.working):8.2f}"


def metrics(run: Path) -> Writer:
    return MetricsFile(run / "metrics.jsonl")


def live(rows: int, terminal: TextIO) -> Writer:
    return console(rows, stream=terminal, environ={"TERM": "xterm-256color"})


def wandb(run: Path) -> Writer:
    """W&B, offline and already started."""
    started = threading.Event()
    spec = WandBSpec(project="overhead", mode="offline")
    writer = WandB(
        spec, run_id="a", name="a", directory=run, config={}, say=lambda _: started.set()
    ).start()
    started.wait()
    return writer


def second(name: str, opened: Callable[[], TrackerBackend], run: Path) -> Writer:
    """A backend in a thread, already started."""
    started = threading.Event()

    def open_place() -> TrackerBackend:
        place = opened()
        started.set()
        return place

    metrics = run / "metrics.jsonl"
    writer = BackgroundWriter(name, open_place, metrics=metrics, resume_step=None, say=print)
    started.wait()
    return writer


def trackio(run: Path) -> TrackerBackend:
    with redirect_stdout(None):
        return Trackio.open(TrackioSpec(project="overhead"), name=run.name, config={})


def a_terminal() -> TextIO:
    """A pseudo-terminal with a reader."""
    ours, theirs = os.openpty()

    def read() -> None:
        with suppress(OSError):  # no process has it open any more
            while os.read(ours, 65536):
                pass

    threading.Thread(target=read, daemon=True).start()
    return os.fdopen(theirs, "w")


if __name__ == "__main__":
    main()
