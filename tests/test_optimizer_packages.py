"""Optimizers of other packages, each against a loop by hand, and those that draw random numbers."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small_regression as small
import torch
from jobs import difference, train_in_process, weights
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import TensorDataset

from service.basics import randomness
from service.basics.errors import SpecError
from service.data.task import Task, supervised
from service.preview.check import checked
from service.spec.files import load_spec

NAME = "test_optimizer_packages"
STEPS = 10


def job(optimizer: dict[str, Any], **sections: Any) -> dict[str, Any]:
    every = {"checkpoint": {"every_steps": 5}, "schedule": {}}
    spec: dict[str, Any] = small.spec_for(optimizer)
    return {**spec, **every, **sections}


def stopped_and_resumed(processes: Any, count: int, spec: dict[str, Any], runs: Path) -> None:
    for stop_at in (4, None):
        processes(count).run(in_eager_mode, spec, runs, stop_at)


def in_eager_mode(world: Any, spec: dict[str, Any], runs: Path, stop_at: int | None = None) -> Any:
    """`train_in_process` without the compiler, which torchao calls and which takes long."""
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    try:
        return train_in_process(world, spec, runs, stop_at)
    finally:
        del os.environ["TORCHDYNAMO_DISABLE"]


def by_hand(
    task: Task, make: Callable[[nn.Module], torch.optim.Optimizer], micro: int = 4
) -> dict[str, torch.Tensor]:
    """The weights after ten steps: the gradients of the micro-batches, added in their order."""
    model = small.first_model(task)
    inputs, targets = task.train_data().tensors
    optimizer: Any = make(model)
    is_modal = hasattr(optimizer, "train")
    if is_modal:
        optimizer.train()
    for step in range(STEPS):
        optimizer.zero_grad()
        for rows in torch.as_tensor(small.rows_of_step(step)).split(micro):
            losses = (model(inputs[rows]) - targets[rows]).square().flatten(1).mean(1)
            losses.sum().backward(torch.tensor(1 / 23, dtype=losses.dtype))
        optimizer.step()
    if is_modal:
        optimizer.eval()
    return model.state_dict()


# ---- a package without a schedule


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("SGDScheduleFree", {"lr": 0.4, "momentum": 0.9, "weight_decay": 0.01}),
        ("AdamWScheduleFree", {"lr": 0.05, "betas": [0.9, 0.99], "warmup_steps": 3}),
        ("RAdamScheduleFree", {"lr": 0.05}),
    ],
)
def test_schedulefree_trains_as_in_a_loop_by_hand(processes, tmp_path, name, options):
    package = pytest.importorskip("schedulefree", reason="needs the package schedulefree")
    wanted = by_hand(small.dense(), lambda m: getattr(package, name)(m.parameters(), **options))
    spec = job({"name": f"schedulefree:{name}", **options})
    for count in (1, 2):
        stopped_and_resumed(processes, count, spec, tmp_path / str(count))
        found = weights(tmp_path / str(count), STEPS)
        assert max((found[n] - wanted[n]).abs().max() for n in wanted) < 1e-14


# ---- a package whose state is of fewer bits


def wide() -> Task:
    """A model with a matrix that torchao quantizes the state of, and others that it does not."""
    generator = torch.Generator().manual_seed(5)
    rows = torch.randn(small.ROWS, 64, generator=generator)
    return supervised(
        model=lambda: nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2)),
        train=TensorDataset(rows, rows[:, :2].sin()),
        test=TensorDataset(rows, rows[:, :2].sin()),
        loss="mean_squared",
    )


LOW_BITS = ("Adam8bit", "AdamW8bit", "AdamW4bit", "AdamWFp8")


@pytest.fixture(scope="module")
def torchao():
    return pytest.importorskip("torchao.optim", reason="needs the package torchao")


def low(name: str, **sections: Any) -> dict[str, Any]:
    return job(
        {"name": f"torchao.optim:{name}", "lr": 0.01},
        task=f"{NAME}:wide",
        schedule={"name": "linear"},
        **sections,
    )


@pytest.mark.parametrize("name", LOW_BITS)
def test_torchao_trains_as_in_a_loop_by_hand(torchao, processes, tmp_path, monkeypatch, name):
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")

    class Falling(getattr(torchao, name)):  # by a linear schedule
        def step(self) -> None:
            taken = next(count)
            for group in self.param_groups:
                group["lr"].fill_(0.01 * (1 - taken / STEPS))
            super().step()

    count = itertools.count()
    wanted = by_hand(wide(), lambda model: Falling(model.parameters(), lr=0.01))
    processes(1).run(in_eager_mode, low(name), tmp_path)
    found = weights(tmp_path, STEPS)
    assert max((found[n] - wanted[n]).abs().max() for n in wanted) < 1e-5


@pytest.mark.parametrize("name", LOW_BITS)
def test_its_state_of_few_bits_is_saved_and_restored_to_the_bit(torchao, processes, tmp_path, name):
    bitwise = low(name, exactness="bitwise")
    processes(1).run(in_eager_mode, bitwise, tmp_path / "whole")
    stopped_and_resumed(processes, 2, bitwise, tmp_path / "parts")
    saved = [
        load_file(tmp_path / place / f"job/checkpoints/step-{STEPS:08d}/{file}.safetensors")
        for file in ("model", "optimizer")
        for place in ("whole", "parts")
    ]
    for one, other in (saved[:2], saved[2:]):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    codes = saved[2]["codes.exp_avg:0.weight"]
    assert codes.nbytes == 64 * 64 // (2 if "4bit" in name else 1)


def test_check_reads_it_back(torchao, alone, monkeypatch):
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    found = dict(checked(load_spec(low("AdamW8bit")), world=alone))
    assert "read back equal" in found["checkpoint"]


def test_a_class_in_a_checkpoint_is_not_imported_by_its_name(torchao, processes, tmp_path):
    processes(1).run(in_eager_mode, low("AdamW8bit"), tmp_path, 4)
    [state] = (tmp_path / "job/checkpoints").glob("*/state.json")
    assert "torchao.optim.subclass_8bit.OptimState8bit" in state.read_text()
    from service.checkpoints.packing import unpack

    with pytest.raises(SpecError, match=r"The checkpoint holds a os\.system, and the optimizer"):
        unpack({"wrapped": {"class": "os.system", "parts": {}}}, {})


# ---- an optimizer that draws


class Langevin(torch.optim.Optimizer):
    """SGD with noise. Source: Welling & Teh, ICML 2011, eq. 4, without its prior."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * p.grad).add_(0.1 * group["lr"] * torch.randn_like(p))


class TwoPasses(Langevin):
    """The same at the gradients of a point nearby, with noise after each pass."""

    takes_groups = True

    def step(self, closure: Any) -> Any:
        closure()
        super().step()
        loss = closure()
        super().step()
        return loss


@pytest.mark.parametrize("name", ["Langevin", "TwoPasses"])
def test_what_an_optimizer_draws_is_the_same_on_every_process(processes, tmp_path, name):
    spec = job({"name": f"{NAME}:{name}", "lr": 0.1})
    processes(1).run(train_in_process, spec, tmp_path / "1")
    for count in (2, 3):
        stopped_and_resumed(processes, count, spec, tmp_path / str(count))
        assert difference(tmp_path / "1", tmp_path / str(count), STEPS) < 1e-14


def test_and_is_named_by_seed_and_step(processes, tmp_path):
    drawn = itertools.count()

    class Named(Langevin):
        def step(self) -> None:
            torch.manual_seed(randomness.key(randomness.OPTIMIZER, small.SEED, next(drawn), 0, 0))
            super().step()

    wanted = by_hand(small.dense(), lambda model: Named(model.parameters(), lr=0.1))
    processes(1).run(train_in_process, job({"name": f"{NAME}:Langevin", "lr": 0.1}), tmp_path)
    found = weights(tmp_path, STEPS)
    assert max((found[n] - wanted[n]).abs().max() for n in wanted) < 1e-14
