"""Small jobs for the tests: real data, awkward numbers."""

from __future__ import annotations

import io
import os
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import collector
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from service.basics.errors import Stopped
from service.data.task import Task, load_task, sampling_of, supervised
from service.distributed.world import World
from service.health.stop_request import StopRequest
from service.plan.changing import NOTHING_ACCEPTED, Accepted
from service.plan.plan import make_plan
from service.preview.plan import planned
from service.recipes import digits, find_recipe
from service.runs.tracking import read_metrics, tells_of_speed
from service.spec.files import load_spec
from service.training.worker import run

HERE = Path(__file__)


def cut_of_digits(
    rows: int = 389, test_rows: int = 131, double: bool = False, dropout: float = 0.25
) -> Task:
    """The recipe's network on its first rows, in float64 where asked."""
    kind = torch.float64 if double else torch.float32
    train, test = digits.split_by_class(*digits.load())

    def first(data: TensorDataset, count: int) -> TensorDataset:
        images, labels = data.tensors
        return TensorDataset(images[:count].to(kind), labels[:count])

    return supervised(
        model=lambda: digits.network(8, dropout).to(kind),
        train=first(train, rows),
        test=first(test, test_rows),
        measures=("accuracy",),
    )


def plain_rows(rows: int = 103, test_rows: int = 517) -> Task:
    """A linear model on rows that come one by one."""

    class Rows:
        def __init__(self, count: int) -> None:
            self.count = count

        def __len__(self) -> int:
            return self.count

        def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
            return torch.full((4,), row / self.count), row % 3

    return supervised(
        model=lambda: nn.Linear(4, 3),
        train=Rows(rows),
        test=Rows(test_rows),
        measures=("accuracy",),
    )


def spec_of(factory: str, *, name: str = "job", **sections: Any) -> dict[str, Any]:
    """A spec as plain values; sections replace the defaults."""
    values: dict[str, Any] = {
        "name": name,
        "task": f"{HERE}:{factory}",
        "seed": 7,
        "batch": {"global_batch": 50, "micro_batch": 9},  # six micro-batches, the last of 5 rows
        "length": {"steps": 40},
        "optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9},
        "schedule": {"name": "cosine", "warmup_steps": 5},
        "tracking": {"log_every_steps": 1},
        "test": {"every_steps": 20, "micro_batch": 32},
    }
    return values | sections


def plan_of(spec: str | Path, *overrides: str, runs: Path, processes: int = 1) -> str:
    """What `evenstep plan SPEC OVERRIDES` prints, without the start of a command."""
    loaded = load_spec(find_recipe(str(spec)), overrides=overrides)
    return planned(loaded, processes=processes, runs=runs)


def train_in_process(
    world: World,
    spec: dict[str, Any],
    runs: Path,
    stop_at: int | None = None,
    accepted: Accepted = NOTHING_ACCEPTED,
) -> dict[str, float] | None:
    """What `evenstep run` does in one process, in a world that is there already.

    Returns what the last step measured, or None where the run was stopped.
    """
    loaded = load_spec(spec)
    if loaded.model.precision != world.precision:
        world = World(Accelerator(), device=world.device, precision=loaded.model.precision)
    task = load_task(loaded.task, loaded.task_args, seed=loaded.seed)
    plan = make_plan(
        loaded,
        processes=world.processes,
        train_rows=task.train_rows,
        test_rows=task.test_rows,
        stop_at=stop_at,
        accepted=accepted,
        sampling=sampling_of(task),
    )
    try:
        return run(plan, task, world, runs=runs, stop=StopRequest())
    except Stopped:
        return None
    finally:
        collector.rest()


def said_in_process(world: World, spec: dict[str, Any], runs: Path) -> str:
    """What such a run prints."""
    output = io.StringIO()
    with redirect_stdout(output), redirect_stderr(output):
        train_in_process(world, spec, runs)
    return output.getvalue()


def weights(runs: Path, step: int | None = None, file: str = "model") -> dict[str, Tensor]:
    """The weights of the run `job` after a step, by name; by default its newest."""
    places = sorted((runs / "job/checkpoints").glob("step-*"))
    place = places[-1] if step is None else places[0].with_name(f"step-{step:08d}")
    return load_file(place / f"{file}.safetensors")


def difference(one: Path, other: Path, step: int | None = None) -> float:
    """How far the weights of two runs `job` are apart after a step."""
    return furthest(weights(one, step), weights(other, step))


def furthest(some: dict[str, Tensor], others: dict[str, Tensor]) -> float:
    """The largest difference of two sets of weights, which have the same names."""
    assert some.keys() == others.keys()
    return max((some[name] - others[name]).abs().max().item() for name in some)


def same_bits(some: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    """Whether two sets of weights have the same names and bits."""
    return some.keys() == others.keys() and all(torch.equal(some[n], others[n]) for n in some)


def rows_of(runs: Path) -> list[dict[str, float]]:
    """The record of the run `job`, without what tells of speed."""
    return [
        {key: value for key, value in row.items() if not tells_of_speed(key)}
        for row in read_metrics(runs / "job/metrics.jsonl")
    ]


def on_nodes(world: World, spec: dict[str, Any], runs: Path, on_node: int, stop: Any) -> None:
    """A run of processes that are on nodes of so many."""
    before = os.environ["LOCAL_WORLD_SIZE"]
    os.environ["LOCAL_WORLD_SIZE"] = str(on_node if world.index < on_node else min(on_node, 2))
    try:
        train_in_process(world, spec, runs, stop)
    finally:
        os.environ["LOCAL_WORLD_SIZE"] = before
