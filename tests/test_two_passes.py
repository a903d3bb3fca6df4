"""SAM, which computes loss and gradients twice a step, against a loop by hand."""

from __future__ import annotations

from typing import Any

import pytest
import small_regression as small
import torch
from jobs import train_in_process
from safetensors.torch import load_file

from service.data.task import load_task
from service.plan.plan import make_plan
from service.spec.files import load_spec

RHO, MOMENTUM, DECAY = 0.3, 0.9, 0.01
OPTIONS = {"lr": 0.1, "rho": RHO, "momentum": MOMENTUM, "weight_decay": DECAY}


def job(**more: Any) -> Any:
    return small.spec_for({"name": "service.recipes.optimizers:SAM", **OPTIONS, **more})


def by_hand(rho: float = RHO) -> dict[str, torch.Tensor]:
    """The weights after ten steps over whole batches, by the formulas of the paper."""
    spec = load_spec(job())
    plan = make_plan(spec, processes=1, train_rows=small.ROWS, test_rows=small.ROWS)
    model = small.first_model(load_task(spec.task, {}))
    inputs, targets = small.dense().train_data().tensors
    speeds = [torch.zeros_like(p) for p in model.parameters()]

    def gradients(rows: Any) -> list[torch.Tensor]:
        loss = (model(inputs[rows]) - targets[rows]).square().mean()
        return list(torch.autograd.grad(loss, list(model.parameters())))

    for step in range(10):
        rows, rate = small.rows_of_step(step), OPTIONS["lr"] * plan.rate(step)
        here = gradients(rows)
        length = torch.cat([g.flatten() for g in here]).norm()
        away = [rho * g / length for g in here]
        with torch.no_grad():
            for parameter, shift in zip(model.parameters(), away, strict=True):
                parameter += shift
        there = gradients(rows)
        with torch.no_grad():
            for n, parameter in enumerate(model.parameters()):
                parameter -= away[n]
                speeds[n] = MOMENTUM * speeds[n] + there[n] + DECAY * parameter
                parameter -= rate * speeds[n]
    return model.state_dict()


def weights(runs: Any) -> dict[str, torch.Tensor]:
    return load_file(runs / "job/checkpoints/step-00000010/model.safetensors")


@pytest.mark.parametrize("count", [1, 3])
def test_sam_equals_the_hand_written_loop_and_resumes_in_the_same_bits(processes, tmp_path, count):
    processes(count).run(train_in_process, job(), tmp_path / "whole")
    processes(count).run(train_in_process, job(), tmp_path / "parts", 4)
    processes(count).run(train_in_process, job(), tmp_path / "parts")
    whole, parts, expected = weights(tmp_path / "whole"), weights(tmp_path / "parts"), by_hand()
    for name, value in expected.items():
        torch.testing.assert_close(whole[name], value, rtol=0, atol=1e-12)
        assert torch.equal(whole[name], parts[name])
    assert max((by_hand(0.0)[n] - v).abs().max() for n, v in expected.items()) > 1e-4


def test_sam_takes_parameter_groups(processes, tmp_path):
    groups = [{"match": "0.*", "rho": 0.0}, {"match": "*"}]
    processes(1).run(train_in_process, job(groups=groups), tmp_path / "apart")
    processes(1).run(
        train_in_process, job(groups=[{"match": "0.*"}, {"match": "*"}]), tmp_path / "same"
    )
    expected = by_hand()
    for name, value in weights(tmp_path / "same").items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-12)
    apart = weights(tmp_path / "apart")
    assert max((apart[n] - v).abs().max() for n, v in expected.items()) > 1e-5
