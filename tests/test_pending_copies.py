"""Saves of a sharded state, which is copied while the next pass runs."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from jobs import train_in_process
from test_sharding import job, saved_files, shared
from torch import Tensor

from service.basics.errors import NotSaved
from service.checkpoints.pending_copies import PendingCopies, PendingCopy
from service.data.losses import Losses, StepContext
from service.data.task import Task, custom
from service.distributed.world import World
from service.health.heartbeat import WRITER
from service.runs.tracking import read_metrics

STEPS = 4


def train_with_late_writers(world: World, spec: dict[str, Any], runs: Path) -> None:
    """A run whose writer threads copy nothing before the next pass is over."""
    make = PendingCopies.make

    def late(copies: PendingCopies) -> None:
        if threading.current_thread().name.startswith(WRITER):
            time.sleep(0.3)
        make(copies)

    with patch.object(PendingCopies, "make", late):
        train_in_process(world, spec, runs)


def stepping() -> Task:
    """The same model and rows with a step of its own, which soon changes a trained weight."""
    made = shared(norm="batch")

    def step(model: Any, batch: Any, context: StepContext) -> Losses:
        if context.training and context.step:
            with torch.no_grad():
                model.blocks[0].outer.weight.mul_(0.5)
        outputs = model(batch.inputs)
        return {"loss": torch.nn.functional.cross_entropy(outputs, batch.targets, reduction="none")}

    return custom(step=step, model=made.model, train=made.train_data(), test=made.test_data())


@pytest.mark.parametrize(
    "sections",
    [
        {"task_args": {"norm": "batch"}, "model": {"moving_average": 0.9}},
        {"task": f"{__file__}:stepping", "max_grad_norm": None},
    ],
    ids=["average", "own step"],
)
def test_a_late_copy_is_the_state_of_its_step(processes, tmp_path, sections):
    saving = {"every_steps": 1, "keep": STEPS}
    spec = job(
        batch={"global_batch": 28, "micro_batch": 4},
        length={"steps": STEPS},
        test={"every_steps": 2, "micro_batch": 6},
        **sections,
    )
    blocking = spec | {"checkpoint": saving | {"asynchronous": False}}
    processes(2).run(train_in_process, blocking, tmp_path / "blocking")
    processes(2).run(train_with_late_writers, spec | {"checkpoint": saving}, tmp_path / "late")
    states = [
        [saved_files(tmp_path / how, step) for step in range(1, STEPS + 1)]
        for how in ("blocking", "late")
    ]
    assert states[0] == states[1]
    assert len({str(state) for state in states[0]}) == STEPS
    rows = read_metrics(tmp_path / "late/job/metrics.jsonl")
    told = [row for row in rows if "save/stall_seconds" in row]
    assert len(told) == STEPS - 1  # that of the last is in no row


def test_values_are_those_of_before_and_a_change_is_noticed():
    weight, moment = torch.arange(3.0, requires_grad=True), torch.ones(2, 2)
    spaces = [torch.empty(3), torch.empty(2, 2)]
    each = [
        PendingCopy("weight", weight.detach(), spaces[0], weight),
        PendingCopy("moment", moment, spaces[1], moment),
    ]
    copies = PendingCopies(each)
    copies.synchronize()
    copies.require_unchanged()
    with torch.no_grad():
        weight.add_(1)
        moment.add_(1)
    copies.require_unchanged()
    assert [space.tolist() for space in spaces] == [[0, 1, 2], [[1, 1], [1, 1]]]

    copies = PendingCopies(each)
    with torch.no_grad():
        weight.add_(1)
    copies.synchronize()
    with pytest.raises(NotSaved, match=r"^weight was changed by the forward or backward pass"):
        copies.require_unchanged()


class Slow(Tensor):
    """A tensor that takes its values only when it is let."""

    let = threading.Event()

    def copy_(self, source: Tensor, non_blocking: bool = False) -> Tensor:
        assert self.let.wait(30)
        return super().copy_(source, non_blocking)


def test_a_copy_that_another_thread_makes_is_awaited():
    space = torch.zeros(3).as_subclass(Slow)
    copies = PendingCopies([PendingCopy("weight", torch.ones(3), space, space)])
    writer = threading.Thread(target=copies.make)
    trainer = threading.Thread(target=copies.synchronize)
    writer.start()
    while copies._waiting:
        time.sleep(0.001)
    trainer.start()
    trainer.join(0.1)
    assert trainer.is_alive()
    Slow.let.set()
    for thread in (writer, trainer):
        thread.join(30)
        assert not thread.is_alive()
    assert space.tolist() == [1, 1, 1]


def test_nothing_to_copy_keeps_nobody():
    copies = PendingCopies([])
    copies.synchronize()
    copies.require_unchanged()
