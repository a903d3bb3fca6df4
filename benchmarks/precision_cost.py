"""Processor time of a training step of the digits recipe under each setting, against fp32.

OMP_NUM_THREADS=1 python -m benchmarks.precision_cost
"""

from __future__ import annotations

import contextlib
import io
import statistics
import tempfile
import time
from pathlib import Path

from accelerate import Accelerator

from benchmarks.step_calls import BARE
from service.data.task import load_task
from service.distributed.world import World
from service.health.stop_request import StopRequest
from service.plan.plan import make_plan
from service.recipes import find_recipe
from service.spec.files import load_spec
from service.training.worker import run

PLAIN = "model.precision=fp32"
SETTINGS = [
    PLAIN,
    "model.precision=bf16",
    "model.precision=fp16",
    "model.compile=true",
    "model.channels_last=true",
    "model.moving_average=0.999",
    "max_grad_norm=1.0",
    "max_grad_value=1.0",
    "faults.on_non_finite=skip",
]
SHORT, LONG, PAIRS = 20, 140, 5


def seconds(steps: int, setting: str) -> float:
    """Processor time of a whole run of `steps` steps."""
    words = [*BARE, f"length={{steps: {steps}}}", "schedule={}", setting]
    spec = load_spec(find_recipe("digits"), overrides=words)
    task = load_task(spec.task, spec.task_args)
    world = World(Accelerator(cpu=True), precision=spec.model.precision)
    plan = make_plan(spec, processes=1, train_rows=task.train_rows, test_rows=task.test_rows)
    with tempfile.TemporaryDirectory() as runs, contextlib.redirect_stdout(io.StringIO()):
        begin = time.process_time()
        run(plan, task, world, runs=Path(runs), stop=StopRequest())
        return time.process_time() - begin


def milliseconds_a_step(setting: str) -> float:
    """What one step takes: the difference of a long and a short run."""
    return 1000 * (seconds(LONG, setting) - seconds(SHORT, setting)) / (LONG - SHORT)


def cost(setting: str) -> tuple[float, float]:
    """Medians over `PAIRS`: milliseconds a step, and their ratio to those of fp32 beside them."""
    seconds(3, setting)  # what is imported, compiled or made once
    pairs = [(milliseconds_a_step(PLAIN), milliseconds_a_step(setting)) for _ in range(PAIRS)]
    milliseconds = statistics.median(found for _, found in pairs)
    return milliseconds, statistics.median(found / plain for plain, found in pairs)


if __name__ == "__main__":
    print("| setting | ms a step | against fp32 |\n|---|---|---|")
    for setting in SETTINGS:
        milliseconds, ratio = cost(setting)
        print(f"| `{setting}` | {milliseconds:.2f} | {ratio:.2f} |", flush=True)
