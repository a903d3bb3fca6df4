"""Every optimizer: one process, three processes and a reference agree, and it resumes exactly."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy_optimizers
import pytest
import small_regression as small
import torch
from jobs import spec_of, train_in_process
from safetensors.torch import load_file
from torch import nn

from service.basics.errors import SpecError
from service.checkpoints.snapshots import expected_bytes
from service.data.task import load_task
from service.optimization.optimizers import make_optimizer, parameter_groups
from service.plan.plan import make_plan
from service.plan.samplers import rows_at
from service.runs.tracking import read_metrics
from service.spec.files import load_spec
from service.spec.optimizer_options import OPTIMIZERS

# Options away from the defaults, so that each one's term is seen.
BY_NUMPY: dict[str, dict[str, Any]] = {
    "sgd": {"lr": 0.05},
    "sgd momentum": {"lr": 0.05, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01},
    "sgd nesterov": {"lr": 0.05, "momentum": 0.8, "nesterov": True},
    "asgd": {"lr": 0.05, "lambd": 0.01, "t0": 4.0, "weight_decay": 0.02},
    "adagrad": {"lr": 0.1, "lr_decay": 0.1, "weight_decay": 0.01, "initial_accumulator_value": 0.3},
    "adadelta": {"lr": 1.0, "rho": 0.8, "weight_decay": 0.01},
    "rmsprop": {"lr": 0.02, "alpha": 0.9, "momentum": 0.5, "centered": True},
    "rprop": {"lr": 0.01, "etas": [0.4, 1.3]},
    "adam": {"lr": 0.03, "betas": [0.8, 0.95], "weight_decay": 0.01, "amsgrad": True},
    "adamw": {"lr": 0.03, "weight_decay": 0.1},
    "adamax": {"lr": 0.03, "weight_decay": 0.01},
    "nadam": {"lr": 0.03, "weight_decay": 0.01},
    "radam": {"lr": 0.03, "betas": [0.9, 0.9]},
}
# Arithmetic too intricate to be written twice: torch's own class on the whole batch at once.
BY_TORCH: dict[str, dict[str, Any]] = {
    "adafactor": {"lr": 0.05, "weight_decay": 0.1},
    "sparseadam": {"lr": 0.05},
    "muon": {"lr": 0.02, "momentum": 0.9},
    "lbfgs": {"lr": 0.5, "max_iter": 5},
    "lbfgs wolfe": {"lr": 0.9, "max_iter": 6, "history_size": 3, "line_search_fn": "strong_wolfe"},
}
CASES = BY_NUMPY | BY_TORCH
# One process, three and the reference differ by the rounding of sums in float64, and by what
# torch itself keeps more coarsely: ASGD's and NAdam's scalars in float32, and in bfloat16 the
# matrix that Muon orthogonalises.  A line search magnifies it.
BOUNDS = {"asgd": 1e-9, "nadam": 1e-9, "lbfgs": 1e-12, "lbfgs wolfe": 1e-8, "muon": 1e-3}


def job(case: str) -> Any:
    name = case.split()[0]
    factory = "sparse" if name == "sparseadam" else "dense"
    arguments = {"bias": False} if name == "muon" else {}
    return small.spec_for({"name": name, **CASES[case]}, factory=factory, task_args=arguments)


def weights(runs: Path) -> dict[str, np.ndarray]:
    """What the last checkpoint of a run holds."""
    newest = sorted((runs / "job" / "checkpoints").glob("step-*"))[-1]
    return {name: value.numpy() for name, value in load_file(newest / "model.safetensors").items()}


def difference(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
    assert a.keys() == b.keys()
    return max(float(np.abs(a[name] - b[name]).max()) for name in a)


def rates(case: str) -> list[float]:
    spec = load_spec(job(case))
    plan = make_plan(spec, processes=1, train_rows=small.ROWS, test_rows=small.ROWS)
    return [spec.optimizer.lr * plan.rate(step) for step in range(10)]


def by_numpy(case: str) -> dict[str, np.ndarray]:
    options = {key: value for key, value in CASES[case].items() if key != "lr"}
    update = getattr(numpy_optimizers, case.split()[0])
    now = small.first_weights(small.dense())
    states: dict[str, Any] = {name: {} for name in now}
    for step, rate in enumerate(rates(case)):
        by_name = small.gradients(now, small.rows_of_step(step))
        for name, weight in now.items():
            update(weight, by_name[name], states[name], step + 1, rate, **options)
    return now


def by_torch(case: str) -> dict[str, np.ndarray]:
    spec = load_spec(job(case))
    task = load_task(spec.task, spec.task_args)
    model, data = small.first_model(task), task.train_data()
    known = OPTIMIZERS[spec.optimizer.name]
    optimizer = getattr(torch.optim, known.torch_name)(model.parameters(), **CASES[case])
    for step, rate in enumerate(rates(case)):
        inputs, targets = data[torch.from_numpy(small.rows_of_step(step))]
        optimizer.param_groups[0]["lr"] = rate

        def closure(inputs=inputs, targets=targets):
            optimizer.zero_grad()
            loss = torch.nn.functional.mse_loss(model(inputs), targets)
            loss.backward()
            return loss

        optimizer.step(closure)
    return {name: p.detach().numpy() for name, p in model.named_parameters()}


def train_all(world, place: Path, stop_at: int | None) -> None:
    """Every case in one call: one process and then three start only once."""
    for case in CASES:
        train_in_process(world, job(case), place / case.replace(" ", "-"), stop_at)


@pytest.fixture(scope="module", params=[1, 3])
def trained(request, processes, tmp_path_factory):
    place = tmp_path_factory.mktemp(f"on-{request.param}")
    processes(request.param).run(train_all, place, None)
    return place, request.param


def test_every_optimizer_of_torch_is_among_the_cases():
    assert {case.split()[0] for case in CASES} == set(OPTIMIZERS)


@pytest.mark.parametrize("case", CASES)
def test_the_groups_are_those_that_torch_would_make(case):
    """torch's own way compares each group with all before it, so ours does without."""
    spec = load_spec(job(case))
    model = load_task(spec.task, spec.task_args).model()
    groups = parameter_groups(model, spec.optimizer)
    if spec.optimizer.name != "lbfgs":  # which takes one group only
        (group,) = groups
        groups = [replace(group, names=(name,)) for name in group.names]
    made = make_optimizer(model, spec.optimizer, groups)
    parameters = dict(model.named_parameters())
    options = spec.optimizer.options() | ({"fused": True} if made.defaults.get("fused") else {})
    settings = [{"params": [parameters[name] for name in g.names], **g.options} for g in groups]
    expected = type(made)(settings, **options)
    assert len(made.param_groups) == len(groups)
    assert made.param_groups == expected.param_groups
    assert made.defaults == expected.defaults
    assert vars(made).keys() == vars(expected).keys()


def test_thousands_of_groups_are_not_compared_with_each_other():
    def hashed(groups: int) -> int:
        """How often a parameter is looked up in a set while the optimizer is made."""
        model = nn.Sequential(*(nn.Linear(1, 1) for _ in range(groups)))
        rates = [{"match": f"{n}.*", "lr": 1 / (n + 1)} for n in range(groups)]
        spec = load_spec(small.spec_for({"name": "adamw", "lr": 1.0, "groups": rates}))
        found = []

        def count(frame: Any, event: str, argument: Any) -> None:
            if event == "call" and frame.f_code is torch.Tensor.__hash__.__code__:
                found.append(frame)

        sys.setprofile(count)
        try:
            make_optimizer(model, spec.optimizer, parameter_groups(model, spec.optimizer))
        finally:
            sys.setprofile(None)
        return len(found)

    assert hashed(80) <= 2 * hashed(40) + 8


@pytest.mark.parametrize("case", CASES)
def test_ten_steps_are_those_of_the_reference(trained, case):
    place, _ = trained
    expected = by_numpy(case) if case in BY_NUMPY else by_torch(case)
    got = weights(place / case.replace(" ", "-"))
    start = small.first_weights(load_task(load_spec(job(case)).task, job(case)["task_args"]))
    assert difference(got, start) > 1e-2, "it has moved at all"
    assert difference(got, expected) < BOUNDS.get(case, 1e-14)


@pytest.fixture(scope="module")
def resumed(trained, processes, tmp_path_factory):
    _, count = trained
    place = tmp_path_factory.mktemp(f"resumed-on-{count}")
    processes(count).run(train_all, place, 5)
    processes(count).run(train_all, place, None)
    return place


@pytest.mark.parametrize("case", CASES)
def test_a_resume_in_the_middle_ends_in_the_same_bits(trained, resumed, case):
    folder = case.replace(" ", "-")
    assert difference(weights(trained[0] / folder), weights(resumed / folder)) == 0


def test_lbfgs_looks_at_each_point_with_the_same_dropout_and_moves_batchnorm_once(
    processes, tmp_path
):
    spec = spec_of(
        "cut_of_digits",
        task_args={"double": True},
        length={"steps": 6},
        optimizer={"name": "lbfgs", "lr": 0.5, "max_iter": 4, "line_search_fn": "strong_wolfe"},
    )
    for count in (1, 3):
        processes(count).run(train_in_process, spec, tmp_path / str(count))
    alone, three = (weights(tmp_path / str(count)) for count in (1, 3))
    assert difference(alone, three) < 1e-9
    assert alone["1.num_batches_tracked"] == 6
    first, *_, last = read_metrics(tmp_path / "1/job/metrics.jsonl")
    assert last["train/loss"] < first["train/loss"]


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (
            {"max_grad_norm": 1.0},
            "max_grad_norm: LBFGS compares losses along the unclipped",
        ),
        ({"model": {"precision": "fp16"}}, "model.precision: LBFGS cannot work with scaled losses"),
        (
            {"optimizer": {"name": "lbfgs", "lr": 1.0, "layer_decay": 0.5}},
            "optimizer.groups: LBFGS changes all parameters along one search direction, so",
        ),
    ],
)
def test_lbfgs_refuses_what_would_part_its_loss_from_its_gradient(
    alone, tmp_path, mistake, message
):
    spec = small.spec_for({"name": "lbfgs", "lr": 1.0}) | mistake
    with pytest.raises(SpecError, match=message):
        train_in_process(alone, spec, tmp_path)


def test_a_companion_trains_what_muon_and_sparseadam_cannot(processes, tmp_path):
    muon = {"name": "muon", "lr": 0.02, "companion": {"name": "adamw", "lr": 0.01}}
    sparse = {"name": "sparseadam", "lr": 0.05, "companion": {"name": "sgd", "lr": 0.1}}
    jobs = {
        "muon": small.spec_for(muon),
        "sparse": small.spec_for(
            sparse, factory="sparse", task_args={"head": True}, max_grad_norm=0.1
        ),
    }
    for name, spec in jobs.items():
        for count in (1, 3):
            processes(count).run(train_in_process, spec, tmp_path / f"{name}-{count}")
            processes(count).run(train_in_process, spec, tmp_path / f"again-{count}-{name}", 5)
            processes(count).run(train_in_process, spec, tmp_path / f"again-{count}-{name}")
        one, three = (weights(tmp_path / f"{name}-{count}") for count in (1, 3))
        assert difference(one, three) < (1e-3 if name == "muon" else 1e-14)
        assert difference(one, weights(tmp_path / f"again-1-{name}")) == 0
        assert difference(three, weights(tmp_path / f"again-3-{name}")) == 0


def test_a_companion_works_as_the_optimizer_would_alone():
    spec = load_spec(
        small.spec_for(
            {
                "name": "muon",
                "lr": 0.02,
                "companion": {"name": "adamw", "lr": 0.01, "no_decay": ["bias"]},
                "companion_takes": ["2.weight"],
            }
        )
    )
    model, twin = small.first_model(small.dense()), small.first_model(small.dense())
    groups = parameter_groups(model, spec.optimizer)
    assert [(g.names, g.companion) for g in groups] == [
        (("0.weight",), False),
        (("2.weight",), True),
        (("0.bias", "2.bias"), True),
    ]
    together = make_optimizer(model, spec.optimizer, groups)
    named = dict(twin.named_parameters())
    apart = [
        torch.optim.Muon([named["0.weight"]], lr=0.02),
        torch.optim.AdamW(
            [
                {"params": [named["2.weight"]]},
                {"params": [named["0.bias"], named["2.bias"]], "weight_decay": 0.0},
            ],
            lr=0.01,
        ),
    ]
    for _ in range(3):
        for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            ours.grad = torch.ones_like(ours) * ours.detach().sin()
            theirs.grad = torch.ones_like(theirs) * theirs.detach().sin()
        together.step()
        for optimizer in apart:
            optimizer.step()
        together.load_state_dict(together.state_dict())  # its members go on with what is loaded
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("factory", "optimizer", "message"),
    [
        (
            "dense",
            {"name": "muon"},
            r"muon trains only matrices.*0.bias \[4\], 2.bias \[2\] are in the model",
        ),
        (
            "sparse",
            {"name": "sparseadam"},
            r"sparseadam trains only embeddings.*head.weight.*companion",
        ),
        (
            "dense",
            {"name": "muon", "companion": {"name": "sgd", "lr": 1.0}, "companion_takes": ["3.*"]},
            r"companion_takes: '3.\*' matches no parameter",
        ),
    ],
)
def test_what_an_optimizer_cannot_train_is_named(factory, optimizer, message):
    spec = load_spec(small.spec_for({"lr": 0.1, **optimizer}))
    task = small.dense() if factory == "dense" else small.sparse(head=True)
    with pytest.raises(SpecError, match=message):
        parameter_groups(task.model(), spec.optimizer)


def test_sparse_gradients_that_cannot_be_added_up_are_refused(alone, tmp_path):
    spec = small.spec_for({"name": "sparseadam", "lr": 0.1}, factory="sparse")
    spec["batch"] = {"global_batch": 24, "micro_batch": 6}
    message = r"words.weight is sparse in the gradient, and exactness: bitwise can sum only"
    with pytest.raises(SpecError, match=message):
        train_in_process(alone, spec | {"exactness": "bitwise"}, tmp_path)


class Strange(torch.optim.SGD):
    """Remembers in its group how far it has come, as schedule-free optimizers do."""

    def __init__(self, params, lr, *, strength=1.0):
        super().__init__(params, lr)
        for group in self.param_groups:
            group.update(strength=strength, taken=0)

    def step(self, closure=None):
        for group in self.param_groups:
            group["taken"] += 1
            group["lr"] = group["lr"] * group["strength"] / group["taken"]
        super().step(closure)


def test_any_optimizer_by_import_string_resumes_with_what_its_groups_remember(alone, tmp_path):
    spec = small.spec_for({"name": "test_optimizers:Strange", "lr": 0.1, "strength": 2.0})
    train_in_process(alone, spec, tmp_path / "whole")
    train_in_process(alone, spec, tmp_path / "parts", 4)
    train_in_process(alone, spec, tmp_path / "parts")
    assert difference(weights(tmp_path / "whole"), weights(tmp_path / "parts")) == 0


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (
            {"name": "test_optimizers:Strnge"},
            "optimizer.name: cannot import test_optimizers:Strnge",
        ),
        (
            {"strenght": 1.0},
            "optimizer.strenght: Strange has no such option; did you mean 'strength'",
        ),
        (
            {"groups": [{"match": "*", "strenght": 1}]},
            "optimizer.groups.strenght: Strange has no such option; did you mean 'strength'",
        ),
        ({"name": "collections:Counter"}, "collections:Counter is not a torch.optim.Optimizer"),
        (
            {"name": "adam", "betas": [2.0, 0.9]},
            "optimizer: torch.optim.adam.Adam says: Invalid beta",
        ),
        ({"name": "rprop", "no_decay": ["bias"]}, "optimizer.no_decay: rprop has no weight_decay"),
    ],
)
def test_a_wrong_optimizer_is_reported(optimizer, message):
    spec = load_spec(small.spec_for({"name": "test_optimizers:Strange", "lr": 0.1} | optimizer))
    model = small.dense().model()
    with pytest.raises(SpecError, match=message):
        make_optimizer(model, spec.optimizer, parameter_groups(model, spec.optimizer))


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        ({"name": "lbfgs", "line_search_fn": "weak"}, "LBFGS says: only 'strong_wolfe'"),
        ({"name": "adam", "differentiable": True}, "Adam says: a leaf Variable that requires grad"),
        (
            {"name": "adam", "groups": [{"match": "0.*"}, {"match": "*", "eps": -1.0}]},
            "Adam says: Invalid epsilon value: -1.0",
        ),
    ],
)
def test_what_torch_finds_in_the_first_step_is_reported_before_it(optimizer, message):
    spec = load_spec(small.spec_for({"lr": 0.1} | optimizer))
    model = small.dense().model()
    with pytest.raises(SpecError, match=message):
        make_optimizer(model, spec.optimizer, parameter_groups(model, spec.optimizer))


def test_an_optimizer_for_gpus_alone_can_still_be_planned():
    spec = load_spec(small.spec_for({"name": "adam", "lr": 0.1, "capturable": True}))
    model = small.dense().model()
    optimizer = make_optimizer(model, spec.optimizer, parameter_groups(model, spec.optimizer))
    assert expected_bytes(model, optimizer) is None


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # torch's, in its own Adagrad
@pytest.mark.parametrize("name", ["sgd", "adagrad"])
def test_sparse_gradients_train_without_the_fused_kernel(alone, tmp_path, name):
    spec = small.spec_for({"name": name, "lr": 0.1}, length={"steps": 2})
    train_in_process(alone, spec | {"task": f"{small.HERE}:sparse"}, tmp_path)
    assert read_metrics(tmp_path / "job/metrics.jsonl")[-1]["step"] == 2


def test_an_optimizer_without_sparse_gradients_is_refused_them():
    spec = load_spec(small.spec_for({"name": "rmsprop", "lr": 0.1}))
    model = small.sparse().model()
    with pytest.raises(SpecError, match="RMSprop does not support sparse gradients"):
        make_optimizer(model, spec.optimizer, parameter_groups(model, spec.optimizer))


def test_lbfgs_cannot_be_a_companion():
    muon = {"name": "muon", "lr": 0.1, "companion": {"name": "lbfgs", "lr": 1.0}}
    spec = load_spec(small.spec_for(muon))
    model = small.dense().model()
    with pytest.raises(SpecError, match=r"companion\.name: lbfgs evaluates a step"):
        make_optimizer(model, spec.optimizer, parameter_groups(model, spec.optimizer))


@pytest.mark.parametrize(("rows", "steps"), [(1, 61), (23, 3), ("all", 1)])
def test_the_three_classic_regimes_are_specs(alone, tmp_path, rows, steps):
    """Stochastic, mini-batch and batch gradient descent: one epoch of each, as by hand."""
    batch = {"global_batch": rows, "micro_batch": 1 if rows == 1 else 4}
    spec = small.spec_for({"name": "sgd", "lr": 0.1}, batch=batch, length={"epochs": 1})
    train_in_process(alone, spec | {"schedule": {}}, tmp_path)
    now, size = small.first_weights(small.dense()), small.ROWS if rows == "all" else rows
    for step in range(steps):
        positions = np.arange(step * size, (step + 1) * size)
        ids = rows_at(positions, rows=small.ROWS, seed=small.SEED)
        for name, gradient in small.gradients(now, ids).items():
            now[name] -= 0.1 * gradient
    assert difference(weights(tmp_path), now) < 1e-14
    assert read_metrics(tmp_path / "job/metrics.jsonl")[-1]["step"] == steps
