"""Buffers that change in training besides BatchNorm's are the same at any number of processes."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import evenstep
from jobs import plan_of, train_in_process
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from service.basics.errors import SpecError
from service.data.batches import Batch
from service.data.losses import Losses, StepContext
from service.data.task import Task, custom, supervised
from service.optimization.buffers import Moving as Moving_
from service.optimization.buffers import buffers_in_words

HERE = Path(__file__)
ADAM = {"name": "adam", "lr": 0.01}


class Moving(nn.Module):
    """A linear model with most kinds of buffers that a forward pass can move."""

    def __init__(self, lowest: float) -> None:
        super().__init__()
        self.linear = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 4))
        self.norm = nn.InstanceNorm1d(4, track_running_stats=True)
        self.book: Tensor
        self.teacher: Tensor
        self.passes: Tensor
        self.lowest: Tensor
        self.begun: Tensor
        self.constant: Tensor
        self.register_buffer("book", torch.zeros(4))
        self.register_buffer("teacher", torch.zeros(()))
        self.register_buffer("passes", torch.tensor(2**60))  # no float holds its next number
        self.register_buffer("lowest", torch.tensor(lowest))
        self.register_buffer("begun", torch.tensor(False))
        self.register_buffer("constant", torch.tensor([1.0, -math.inf]))

    def forward(self, x: Tensor) -> Tensor:
        z = self.linear(x)
        out = self.norm(z[:, :, None].expand(-1, -1, 2)).mean(2) + z
        if self.training:
            with torch.no_grad():
                self.book.mul_(0.9).add_(z.mean(0), alpha=0.1)
                self.teacher = 0.9 * self.teacher + 0.1 * self.linear.weight.sum()
                self.passes += 1
                self.lowest.copy_(torch.minimum(self.lowest, x.min()))
                self.begun.fill_(True)
        return out + self.book


def task(lowest: float = math.inf) -> Task:
    torch.manual_seed(1)
    rows, targets = torch.randn(210, 6).double(), torch.randn(210, 4).double()
    return supervised(
        model=lambda: Moving(lowest).double(),
        train=TensorDataset(rows[40:], targets[40:]),
        test=TensorDataset(rows[:40], targets[:40]),
        loss=lambda outputs, targets: (outputs - targets).square().mean(1),
    )


def job(rule: str, **sections: object) -> dict[str, object]:
    return {
        "name": "job",
        "task": f"{HERE}:task",
        # From infinity there is no change that could be added up.
        "task_args": {"lowest": 9.0} if rule == "sum" else {},
        "batch": {"global_batch": 50, "micro_batch": 9},  # six micro-batches, the last of 5 rows
        "length": {"steps": 12},
        "optimizer": {"name": "sgd", "lr": 0.05},
        "model": {"buffers": rule},
        "test": {"every_steps": 12},
    } | sections


def saved(runs: Path) -> dict[str, Tensor]:
    return load_file(runs / "job" / "checkpoints" / "step-00000012" / "model.safetensors")


@pytest.mark.parametrize("rule", ["mean", "sum", "first"])
def test_they_do_not_depend_on_the_number_of_processes(processes, tmp_path, rule):
    for count in (1, 3, 4):
        processes(count).run(train_in_process, job(rule), tmp_path / str(count))
    alone = saved(tmp_path / "1")
    for count in (3, 4):
        for name, value in saved(tmp_path / str(count)).items():
            torch.testing.assert_close(value, alone[name], rtol=1e-9, atol=1e-9, msg=name)
    moves = 12 * 6 if rule == "sum" else 12
    assert alone["passes"] == 2**60 + moves
    assert alone["begun"]
    assert alone["lowest"].isfinite()
    assert alone["constant"].tolist() == [1.0, -math.inf]


@pytest.mark.parametrize("rule", ["mean", "sum", "first"])
def test_bitwise_keeps_their_bits(processes, tmp_path, rule):
    for count in (1, 2, 4):
        processes(count).run(
            train_in_process, job(rule, exactness="bitwise"), tmp_path / str(count)
        )
    alone = saved(tmp_path / "1")
    for count in (2, 4):
        for name, value in saved(tmp_path / str(count)).items():
            assert value.numpy().tobytes() == alone[name].numpy().tobytes(), name


class Critic(nn.Module):
    """With the buffers that the critic of a GAN often has."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 8))
        self.last = nn.Linear(8, 1)
        self.book: Tensor
        self.register_buffer("book", torch.zeros(8))

    def forward(self, rows: Tensor) -> Tensor:
        found = self.first(rows).tanh()
        if self.training:
            with torch.no_grad():
                self.book.mul_(0.9).add_(found.mean(0), alpha=0.1)
        return self.last(found + self.book)


def gan() -> Task:
    def models() -> dict[str, nn.Module]:
        return {"critic": Critic().double(), "generator": nn.Linear(3, 6).double()}

    def step(models: Any, batch: Batch, context: StepContext) -> Losses:
        fake = models["generator"](torch.randn(len(batch.rows), 3, dtype=torch.float64))
        if context.optimizer == "generator":
            return {"generator": -models["critic"](fake).flatten()}
        return {"distance": (models["critic"](fake) - models["critic"](batch.inputs[0])).flatten()}

    torch.manual_seed(1)
    rows = TensorDataset(torch.randn(210, 6).double())
    return custom(step=step, model=models, train=rows, test=rows)


def test_those_of_a_model_that_several_optimizers_use_do_not_depend_on_it_either(
    processes, tmp_path
):
    """They move in the turn of each optimizer, whose own parameters may be elsewhere."""
    turns = {"critic": {"optimizer": ADAM}, "generator": {"every": 2, "optimizer": ADAM}}
    spec = job("mean", task=f"{HERE}:gan", task_args={}, optimizers=turns)
    del spec["optimizer"]
    sharded = spec | {"exchange": {"mode": "sharded"}}
    for count, each in ((1, spec), (3, spec), (2, sharded)):
        processes(count).run(train_in_process, each, tmp_path / str(count))
    alone = saved(tmp_path / "1")
    assert alone["critic.book"].abs().max() > 0
    for count in (2, 3):
        for name, value in saved(tmp_path / str(count)).items():
            torch.testing.assert_close(value, alone[name], rtol=1e-9, atol=1e-9, msg=name)


def test_bitwise_refuses_by_name_what_each_process_has_of_its_own(processes, tmp_path):
    with pytest.raises(Exception, match=r"bitwise cannot keep book, teacher, .*Use mean") as raised:
        processes(1).run(train_in_process, job("local", exactness="bitwise"), tmp_path)
    assert SpecError.__name__ in str(raised.value)
    assert not (tmp_path / "job").exists()


def test_local_lets_them_drift(processes, tmp_path):
    # Otherwise the tests above would prove nothing.
    for count in (1, 3):
        processes(count).run(train_in_process, job("local"), tmp_path / str(count))
    one, three = saved(tmp_path / "1"), saved(tmp_path / "3")
    assert (one["passes"], three["passes"]) == (2**60 + 72, 2**60 + 24)
    assert not torch.allclose(one["book"], three["book"], rtol=1e-3)


def test_plan_check_and_start_tell_of_them(tmp_path):
    spec = tmp_path / "job.yaml"
    spec.write_text(
        "name: job\ntask: " + f"{HERE}:task\n"
        "batch: {global_batch: 50, micro_batch: 9}\nlength: {steps: 2}\n"
        "optimizer: {name: sgd, lr: 0.05}\ntest: {micro_batch: 32}\n"
    )
    plan = plan_of(spec, runs=tmp_path)
    assert "book, teacher, passes" in plan
    assert "mean" in plan
    for verb in ("check", "run"):
        done = evenstep(verb, spec, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "book, teacher, passes" in done.stdout, verb
        assert "mean" in done.stdout, verb


class Queue(nn.Module):
    """A queue of earlier outputs and the place of the next one, beside a counter of torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.InstanceNorm1d(4, track_running_stats=True)
        self.register_buffer("queue", torch.zeros(8, 4))
        self.register_buffer("place", torch.zeros((), dtype=torch.long))


@pytest.mark.parametrize(("rule", "told"), [("mean", True), ("first", False)])
def test_a_place_in_a_queue_is_told_what_it_needs(rule, told):
    moving = Moving_(["norm.running_mean", "norm.num_batches_tracked", "queue", "place"], [])
    [line] = buffers_in_words(Queue(), moving, rule)
    assert line.endswith("If place is a place in a queue, use model.buffers: first.") == told
    counted = Moving_(["norm.running_mean", "norm.num_batches_tracked"], [])
    [line] = buffers_in_words(Queue(), counted, rule)
    assert "queue" not in line
