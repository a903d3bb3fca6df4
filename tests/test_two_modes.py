"""Optimizers with `train()` and `eval()`, which train on other weights than they hand on."""

from __future__ import annotations

import json
from typing import Any

import pytest
import small_regression as small
import torch
from commands import evenstep
from jobs import train_in_process
from safetensors.torch import load_file

from service.basics.errors import SpecError
from service.plan.samplers import rows_at
from service.preview.check import checked
from service.runs.tracking import read_metrics
from service.spec.files import load_spec


class Averaging(torch.optim.Optimizer):
    """SGD without a schedule: trains on y, between the steps' end z and their mean x.

    Source: Defazio et al., arXiv:2405.15682, eq. 1-3, and as `schedulefree` keeps it: the
    parameters are y after `train()` and x after `eval()`.
    """

    def __init__(self, params: Any, lr: float, *, beta: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "beta": beta, "taken": 0, "training": False})

    @torch.no_grad()
    def _move(self, training: bool) -> None:
        for group in self.param_groups:
            if group["training"] != training:
                weight = 1 - group["beta"] if training else 1 - 1 / group["beta"]
                for parameter in group["params"]:
                    if "z" in self.state[parameter]:
                        parameter.lerp_(self.state[parameter]["z"], weight)
                group["training"] = training

    def train(self) -> None:
        self._move(True)

    def eval(self) -> None:
        self._move(False)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            assert group["training"], "a step is taken in training"
            group["taken"] += 1
            mean, beta, lr = 1 / group["taken"], group["beta"], group["lr"]
            for y in group["params"]:
                z = self.state[y].setdefault("z", y.clone())
                y.lerp_(z, mean).add_(y.grad, alpha=lr * (beta * (1 - mean) - 1))
                z.sub_(y.grad, alpha=lr)


RATE = 0.4
NAME = "test_two_modes:Averaging"


def job(**sections: Any) -> dict[str, Any]:
    every = {"test": {"every_steps": 3, "micro_batch": 8}, "checkpoint": {"every_steps": 5}}
    spec: dict[str, Any] = small.spec_for({"name": NAME, "lr": RATE}, schedule={})
    return {**spec, **every, **sections}


def by_hand() -> tuple[torch.nn.Module, float]:
    """The model after ten steps, in `eval()`, and its loss over all rows."""
    task = small.dense()
    model = small.first_model(task)
    inputs, targets = task.train_data().tensors
    optimizer = Averaging(model.parameters(), lr=RATE)
    optimizer.train()
    for step in range(10):
        rows = rows_at(torch.arange(step * 23, (step + 1) * 23).numpy(), rows=61, seed=small.SEED)
        optimizer.zero_grad()
        (model(inputs[rows]) - targets[rows]).square().mean().backward()
        optimizer.step()
    optimizer.eval()
    return model, float((model(inputs) - targets).square().mean().detach())


@pytest.mark.parametrize("count", [1, 2, 3])
def test_what_is_tested_and_saved_is_what_the_optimizer_means_to_be_tested(
    processes, tmp_path, count
):
    model, loss = by_hand()
    [values, *_] = processes(count).run(train_in_process, job(), tmp_path)
    assert values["test/loss"] == pytest.approx(loss, rel=1e-12)
    saved = load_file(tmp_path / "job/checkpoints/step-00000010/model.safetensors")
    for name, value in model.state_dict().items():
        torch.testing.assert_close(saved[name], value, rtol=0, atol=1e-14)


def files(run: Any) -> dict[str, dict[str, torch.Tensor]]:
    newest = max((run / "job/checkpoints").glob("step-*"))
    return {path.name: load_file(path) for path in newest.glob("*.safetensors")}


@pytest.mark.parametrize("count", [1, 3])
def test_no_test_and_no_save_and_no_resume_changes_a_bit_of_what_is_trained(
    processes, tmp_path, count
):
    plain = job(test={"every_steps": 10, "micro_batch": 8}, checkpoint={})
    processes(count).run(train_in_process, plain, tmp_path / "plain")
    processes(count).run(train_in_process, job(), tmp_path / "often")
    for stop_at in (4, 7, None):  # which saves at steps of its own
        processes(count).run(train_in_process, job(), tmp_path / "parts", stop_at)
    whole = files(tmp_path / "plain")
    for other in ("often", "parts"):
        for file, tensors in files(tmp_path / other).items():
            assert tensors.keys() == whole[file].keys()
            for name, tensor in tensors.items():
                assert torch.equal(tensor, whole[file][name]), (other, file, name)
    losses = [
        [row["train/loss"] for row in read_metrics(tmp_path / name / "job/metrics.jsonl")]
        for name in ("plain", "often", "parts")
    ]
    assert losses[0] == losses[1] == losses[2]


def test_a_run_continues_at_another_number_of_processes_and_is_tested_and_exported_by_itself(
    processes, tmp_path
):
    runs = tmp_path / "runs"
    processes(1).run(train_in_process, job(), runs, 4)
    [values, *_] = processes(3).run(train_in_process, job(), runs)
    model, loss = by_hand()
    assert values["test/loss"] == pytest.approx(loss, rel=1e-12)
    tested = evenstep("test", "job", cwd=tmp_path)
    assert tested.returncode == 0, tested.stderr
    assert json.loads(tested.stdout)["test/loss"] == values["test/loss"]
    exported = evenstep("export", "runs/job", "-o", "weights.safetensors", cwd=tmp_path)
    assert exported.returncode == 0, exported.stderr
    for name, value in load_file(tmp_path / "weights.safetensors").items():
        torch.testing.assert_close(value, model.state_dict()[name], rtol=0, atol=1e-14)


def test_such_an_optimizer_may_train_some_of_the_parameters(processes, tmp_path):
    """Beside one of torch's, as its companion."""
    muon = {"name": "muon", "lr": 0.02, "companion": {"name": NAME, "lr": RATE}}
    spec = job(optimizer=muon)
    processes(1).run(train_in_process, spec, tmp_path / "whole")
    for stop_at in (4, None):
        processes(1).run(train_in_process, spec, tmp_path / "parts", stop_at)
    whole, parts = files(tmp_path / "whole"), files(tmp_path / "parts")
    for file, tensors in whole.items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, parts[file][name]), (file, name)


def test_an_average_of_the_weights_for_training_is_refused(alone):
    """It would be tested in the place of those that the optimizer means to be tested."""
    averaged = load_spec(job(model={"moving_average": 0.9}))
    with pytest.raises(SpecError, match=r"model\.moving_average: Averaging has weights of its own"):
        list(checked(averaged, world=alone))


def test_check_tries_it_too(alone):
    found = dict(checked(load_spec(job()), world=alone))
    assert {"step", "test", "checkpoint"} <= found.keys()
