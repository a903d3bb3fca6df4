"""Parameters by pattern, layer and step; their state by name."""

from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_regression as small
import torch
from jobs import plan_of, train_in_process
from safetensors.torch import load_file
from torch import nn

from service.basics.errors import SpecError
from service.checkpoints.snapshots import load
from service.data.task import Task, supervised
from service.optimization.learning_rates import Schedule
from service.optimization.optimizers import (
    frozen_until,
    layer_of_parameter,
    make_optimizer,
    parameter_groups,
)
from service.optimization.train_state import TrainState
from service.plan.plan import make_plan
from service.plan.schedules import Length, multiplier
from service.spec.files import load_spec

HERE = Path(__file__)
STREAM: dict[str, Any] = {"processes": 1, "train_rows": None, "test_rows": 1}


class Net(nn.Module):
    """Two layers whose order of definition, and names, may change without changing the model."""

    def __init__(self, backwards: bool, base: str) -> None:
        super().__init__()
        self._base = base
        made: dict[str, nn.Module] = {base: nn.Linear(5, 4), "head": nn.Linear(4, 2)}
        for name in reversed(made) if backwards else made:
            self.add_module(name, made[name])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(torch.tanh(getattr(self, self._base)(x)))
        return out


def net(backwards: bool = False, base: str = "base") -> Task:
    rows = small.dense().train_data()
    return supervised(
        model=lambda: Net(backwards, base).double(),
        train=rows,
        test=rows,
        loss="mean_squared",
    )


def job(optimizer: dict[str, Any], **sections: Any) -> dict[str, Any]:
    return small.spec_for(optimizer, task=f"{HERE}:net") | sections


def weights(runs: Path, step: int = 10) -> dict[str, torch.Tensor]:
    return load_file(runs / f"job/checkpoints/step-{step:08d}/model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def groups_of(optimizer: dict[str, Any], model: nn.Module | None = None) -> list[Any]:
    spec = load_spec(job({"name": "adamw", "lr": 1.0} | optimizer))
    return parameter_groups(model or Net(False, "base"), spec.optimizer)


# ---- who is in which group


def test_any_option_may_differ_by_group(alone):
    optimizer = {
        "name": "adamw",
        "lr": 0.1,
        "weight_decay": 0.3,
        "groups": [
            {"match": "head.*", "lr": 0.01, "betas": [0.5, 0.6], "amsgrad": True},
            {"match": "*", "eps": 1e-3},
        ],
    }
    model = Net(False, "base")
    spec = load_spec(job(optimizer))
    made = make_optimizer(model, spec.optimizer, parameter_groups(model, spec.optimizer))
    head, rest = made.param_groups
    assert (head["lr"], head["betas"], head["amsgrad"]) == (0.01, (0.5, 0.6), True)
    assert (head["eps"], head["weight_decay"]) == (1e-8, 0.3)
    assert (rest["lr"], rest["betas"], rest["eps"]) == (0.1, (0.9, 0.999), 1e-3)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(3), nn.Linear(3, 3)


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(3))
        self.embed = nn.Embedding(7, 3)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(3, 2)


def test_a_layer_is_a_numbered_block_or_else_a_module():
    layers = layer_of_parameter(Transformer())
    assert layers == {
        "token": 0,
        "embed.weight": 1,
        **{f"blocks.{n}.norm.{kind}": 2 + n for n in range(3) for kind in ("weight", "bias")},
        **{f"blocks.{n}.mix.{kind}": 2 + n for n in range(3) for kind in ("weight", "bias")},
        "head.weight": 5,
        "head.bias": 5,
    }


def test_layer_decay_multiplies_what_the_groups_say():
    groups = groups_of(
        {
            "layer_decay": 0.5,
            "no_decay": ["norm", "bias"],
            "groups": [{"match": "blocks.*", "lr": 8.0}, {"match": "*"}],
        },
        Transformer(),
    )
    rates = {name: group.options["lr"] for group in groups for name in group.names}
    assert rates["head.weight"] == rates["head.bias"] == 1.0
    assert [rates[f"blocks.{n}.mix.weight"] for n in (2, 1, 0)] == [4.0, 2.0, 1.0]
    assert (rates["embed.weight"], rates["token"]) == (1 / 16, 1 / 32)
    spared = {name for group in groups if "weight_decay" in group.options for name in group.names}
    assert spared == {n for n in rates if n.endswith(".bias") or ".norm." in n}
    assert sum(len(group.names) for group in groups) == len(rates) == 16


def test_every_parameter_is_in_exactly_one_group_or_the_spec_is_wrong():
    with pytest.raises(
        SpecError, match=r"optimizer.groups: head.weight, head.bias are in no group"
    ):
        groups_of({"groups": [{"match": "base.*"}]})
    with pytest.raises(SpecError, match=r"groups.1.match: 'head.bias' matches no parameter"):
        groups_of({"groups": [{"match": "head.*"}, {"match": "head.bias"}, {"match": "*"}]})


def test_plan_prints_the_groups_and_that_none_is_left_out(tmp_path):
    (tmp_path / "job.yaml").write_text(
        json.dumps(
            job(
                {
                    "name": "adamw",
                    "lr": 0.1,
                    "no_decay": ["bias"],
                    "groups": [{"match": "base.*", "unfreeze_at_step": 4}, {"match": "*"}],
                },
                schedule={"name": "one_cycle"},
            )
        )
    )
    plan = plan_of(tmp_path / "job.yaml", runs=tmp_path)
    assert re.search(r"base\.\* +1 +20 +0\.1 +trained_after_step=4 +base\.weight", plan)
    assert re.search(r"\* +1 +2 +0\.1 +weight_decay=0\.0 +head\.bias", plan)
    assert "4 tensors in 4 groups, each in exactly one" in plan
    assert len(re.findall(r"^  step \d+ ", plan, re.MULTILINE)) == 5


# ---- frozen


@pytest.mark.parametrize(
    ("count", "until", "first"),
    # Two epochs end within the sixth step, so the seventh is the first without their rows.
    [
        (1, {"unfreeze_at_step": 6}, 6),
        (3, {"unfreeze_at_epoch": 2}, math.ceil(2 * small.ROWS / 23)),
    ],
)
def test_a_group_may_be_frozen_for_ever_or_until_a_step_or_an_epoch(
    processes, tmp_path, count, until, first
):
    adam = {"name": "adamw", "lr": 0.05}
    groups = [{"match": "base.weight", "freeze": True}, {"match": "base.bias"}, {"match": "*"}]
    groups[1] |= until
    spec = job(
        {**adam, "groups": groups}, checkpoint={"every_steps": 1, "keep": 10}, max_grad_norm=0.1
    )
    processes(count).run(train_in_process, spec, tmp_path / "whole")
    processes(count).run(train_in_process, spec, tmp_path / "parts", 4)
    processes(count).run(train_in_process, spec, tmp_path / "parts")
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    by_step = [weights(tmp_path / "whole", step) for step in range(1, 11)]
    moved = {
        name: [not torch.equal(a[name], b[name]) for a, b in itertools.pairwise(by_step)]
        for name in by_step[0]
    }
    assert not any(moved["base.weight"])
    assert moved["base.bias"] == [False] * (first - 1) + [True] * (10 - first)
    assert all(moved["head.weight"])


def test_a_group_is_unfrozen_by_steps_or_by_epochs():
    both = {"match": "*", "unfreeze_at_step": 6, "unfreeze_at_epoch": 2}
    with pytest.raises(SpecError, match="unfreeze_at_step or unfreeze_at_epoch, but has both"):
        groups_of({"groups": [both]})
    [group] = groups_of({"groups": [{"match": "*", "unfreeze_at_epoch": 0.5}]})
    stream = make_plan(load_spec(job({"name": "sgd", "lr": 1.0})), **STREAM)
    with pytest.raises(SpecError, match=r"'\*' has unfreeze_at_epoch, .* a stream"):
        frozen_until(group, stream)


# ---- by name


@pytest.mark.parametrize("name", ["adam", "lbfgs"])
def test_another_order_in_the_models_code_does_not_break_a_resume(alone, tmp_path, name):
    spec = job({"name": name, "lr": 0.1})
    for place in ("whole", "parts"):
        train_in_process(alone, spec, tmp_path / place, 6)
    train_in_process(alone, spec, tmp_path / "whole")
    # The checkpoint of step 6 is taken up by a model that defines its layers the other way round.
    here = tmp_path / "parts/job"
    text = (here / "spec.yaml").read_text()
    (here / "spec.yaml").write_text(text.replace("task_args: {}", "task_args: {backwards: true}"))
    train_in_process(alone, spec | {"task_args": {"backwards": True}}, tmp_path / "parts")
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    for key in whole:
        np.testing.assert_allclose(whole[key], parts[key], rtol=0, atol=1e-13)


def test_groups_in_another_order_do_not_break_a_resume(alone, tmp_path):
    groups = [{"match": "base.*", "lr": 0.01}, {"match": "head.*", "weight_decay": 0.5}]
    ways = [{"name": "adamw", "lr": 0.1, "groups": way} for way in (groups, groups[::-1])]
    train_in_process(alone, job(ways[0]), tmp_path / "whole")
    train_in_process(alone, job(ways[0]), tmp_path / "parts", 6)
    train_in_process(alone, job(ways[1]), tmp_path / "parts")
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))


def test_an_order_that_puts_parameters_elsewhere_is_refused(alone, tmp_path):
    groups = [{"match": "base.*", "lr": 0.01}, {"match": "*.weight"}, {"match": "*"}]
    orders = [groups, [groups[1], groups[0], groups[2]]]
    ways = [{"name": "sgd", "lr": 0.1, "groups": order} for order in orders]
    train_in_process(alone, job(ways[0]), tmp_path, 6)
    with pytest.raises(SpecError, match=r"made with other parameter groups: 'base.weight' shared"):
        train_in_process(alone, job(ways[1]), tmp_path)


@pytest.mark.parametrize("name", ["adam", "lbfgs"])
def test_a_renamed_module_is_reported_and_can_be_mapped(alone, tmp_path, name):
    spec = job({"name": name, "lr": 0.1})
    train_in_process(alone, spec, tmp_path / "whole")
    train_in_process(alone, spec, tmp_path / "parts", 6)
    here = tmp_path / "parts/job"
    text = (here / "spec.yaml").read_text()
    (here / "spec.yaml").write_text(text.replace("task_args: {}", "task_args: {base: trunk}"))
    renamed = spec | {"task_args": {"base": "trunk"}}
    with pytest.raises(SpecError, match=r"lacks \['trunk.bias', .*has \['base.bias'.*") as told:
        train_in_process(alone, renamed, tmp_path / "parts")
    assert 'checkpoint.rename={"base.bias": "trunk.bias"}' in str(told.value)
    train_in_process(
        alone, renamed | {"checkpoint": {"rename": {"base": "trunk"}}}, tmp_path / "parts"
    )
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert same(whole, {key.replace("trunk", "base"): value for key, value in parts.items()})


def test_a_parameter_that_is_missing_is_reported(alone, tmp_path):
    spec = job({"name": "adam", "lr": 0.1})
    train_in_process(alone, spec, tmp_path, 6)
    (step,) = (tmp_path / "job/checkpoints").glob("step-*")
    model = nn.Sequential(nn.Linear(5, 4)).double()
    optimizer = torch.optim.Adam(model.parameters())
    rate = multiplier(load_spec(spec).schedule, Length(10))
    with pytest.raises(
        SpecError, match=r"belongs to another model: it lacks \['0.bias', '0.weight'\]"
    ):
        load(step, TrainState(model, optimizer, Schedule(optimizer, rate)))
