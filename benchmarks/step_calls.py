"""Python calls that one training step of the digits recipe makes: cProfile, 40 steps less 10.

python -m benchmarks.step_calls [KEY=VALUE ...]
"""

from __future__ import annotations

import contextlib
import cProfile
import io
import pstats
import sys
import tempfile
from pathlib import Path

from accelerate import Accelerator

from service.data.task import load_task
from service.distributed.world import World
from service.health.stop_request import StopRequest
from service.plan.plan import make_plan
from service.recipes import find_recipe
from service.spec.files import load_spec
from service.training.worker import run

# No logging, testing, saving or polling between the two step counts: only the step.
BARE = ["tracking.log_every_steps=1000000", "tracking.wandb=", "test={}", "checkpoint={}"]
BARE += ["faults.stop_poll_steps=1000000"]


def calls(steps: int, overrides: list[str]) -> int:
    """Python calls of a complete run of `steps` steps."""
    words = [*BARE, f"length={{steps: {steps}}}", "schedule={}", *overrides]
    spec = load_spec(find_recipe("digits"), overrides=words)
    task = load_task(spec.task, spec.task_args)
    world = World(Accelerator(cpu=True), precision=spec.model.precision)
    plan = make_plan(spec, processes=1, train_rows=task.train_rows, test_rows=task.test_rows)
    with tempfile.TemporaryDirectory() as runs, contextlib.redirect_stdout(io.StringIO()):
        profile = cProfile.Profile()
        profile.runcall(run, plan, task, world, runs=Path(runs), stop=StopRequest())
    return int(pstats.Stats(profile).total_calls)  # type: ignore[attr-defined]


if __name__ == "__main__":
    overrides = sys.argv[1:]
    calls(3, overrides)  # imports and caches
    print(f"{(calls(40, overrides) - calls(10, overrides)) / 30:.1f} Python calls a step")
