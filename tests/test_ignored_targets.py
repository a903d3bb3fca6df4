"""Targets that a loss ignores, and classes that weigh: divided as torch's own mean divides."""

from __future__ import annotations

from itertools import islice
from typing import Any

import pytest
import torch
from jobs import spec_of, train_in_process
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from service.basics.errors import SpecError
from service.data.batches import Batch
from service.data.loading import train_steps
from service.data.losses import StepContext
from service.data.task import custom, new_model, supervised
from service.plan.plan import make_plan
from service.runs.tracking import read_metrics
from service.spec.files import load_spec

ROWS, STEPS, RATE = 61, 4, 0.3
CLASSES = torch.tensor([0.5, 3.0, 1.25])


def points() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(5)
    inputs = torch.randn(ROWS, 4, generator=draw, dtype=torch.float64)
    targets = inputs[:, :3].argmax(1)
    targets[::3] = -100  # no two micro-batches hold as many
    targets[40:50] = -100
    return inputs, targets


def network() -> nn.Module:
    model = nn.Linear(4, 3).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.linspace(-0.5, 0.7, parameter.numel()).view_as(parameter))
    return model


def losses(kind: str) -> dict[str, Any]:
    """What `supervised` is given, by kind; and torch's own mean."""
    return {
        "named": "cross_entropy",
        "module": nn.CrossEntropyLoss(reduction="none"),
        "another ignored": nn.CrossEntropyLoss(reduction="none", ignore_index=2),
        "weighted": nn.CrossEntropyLoss(weight=CLASSES.double(), reduction="none"),
        "nll": nn.NLLLoss(weight=CLASSES.double(), reduction="none", ignore_index=2),
    }[kind]


def classes(kind: str, one_by_one: bool = False, weigh: bool = False) -> supervised:
    inputs, targets = points()
    if kind in ("another ignored", "nll"):
        targets = targets.abs() % 3  # 2 is ignored, and 1 stands where -100 did
    rows: Any = TensorDataset(inputs, targets)
    if one_by_one:
        rows = list(zip(inputs, targets.tolist(), strict=True))
    return supervised(
        model=lambda: nn.Sequential(network(), nn.LogSoftmax(1)) if kind == "nll" else network(),
        train=rows,
        test=rows,
        loss=losses(kind),
        measures=("accuracy",),
        weight=(lambda targets: targets.ne(-100).double()) if weigh else None,
    )


def job(**arguments: Any) -> dict[str, Any]:
    return spec_of("") | {
        "task": f"{__file__}:classes",
        "task_args": arguments,
        "batch": {"global_batch": "all", "micro_batch": 7},
        "length": {"steps": STEPS},
        "optimizer": {"name": "sgd", "lr": RATE},
        "schedule": {},
        "test": {"every_steps": STEPS, "micro_batch": 8},
    }


def by_torch(kind: str) -> tuple[list[float], float, float, nn.Module]:
    """The loss of each step, the test's loss and accuracy, and the model, by torch's own mean."""
    task = classes(kind)
    inputs, targets = task.train_data().tensors
    model, ignored = task.model(), 2 if kind in ("another ignored", "nll") else -100
    weights = CLASSES.double() if kind in ("weighted", "nll") else None
    optimizer, found = torch.optim.SGD(model.parameters(), lr=RATE), []
    for step in range(STEPS + 1):
        loss = F.cross_entropy(model(inputs), targets, weights, ignore_index=ignored)
        found.append(float(loss.detach()))
        if step < STEPS:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    counts = torch.ones(4).double() if weights is None else weights
    counts = counts[targets.clamp(min=0)] * targets.ne(ignored)
    right = (model(inputs).argmax(1) == targets).double()
    return found[:-1], found[-1], float((right * counts).sum() / counts.sum()), model


CASES = [
    {"kind": "named"},
    {"kind": "module"},
    {"kind": "another ignored"},
    {"kind": "weighted"},
    {"kind": "nll"},
    {"kind": "named", "one_by_one": True, "weigh": True},
    {"kind": "weighted", "one_by_one": True},
]


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(map(str, case.values())))
def test_a_step_and_a_test_are_divided_as_torch_divides(processes, tmp_path, case, count):
    steps, tested, accuracy, model = by_torch(case["kind"])
    processes(count).run(train_in_process, job(**case), tmp_path)
    rows = read_metrics(tmp_path / "job/metrics.jsonl")
    assert [row["train/loss"] for row in rows] == pytest.approx(steps, rel=1e-6)
    assert rows[-1]["test/loss"] == pytest.approx(tested, rel=1e-6)
    assert rows[-1]["test/accuracy"] == pytest.approx(accuracy, rel=1e-6)
    weights = load_file(tmp_path / f"job/checkpoints/step-{STEPS:08}/model.safetensors")
    for name, value in model.state_dict().items():
        torch.testing.assert_close(weights[name], value, rtol=1e-6, atol=1e-7)


def tested_one_by_one() -> supervised:
    inputs, targets = points()
    rows = list(zip(inputs, targets.tolist(), strict=True))
    known = [row for row in rows if row[1] != -100]
    return supervised(model=network, train=known, test=rows, measures=("accuracy",))


@pytest.mark.parametrize("count", [1, 3])
def test_test_rows_that_come_one_by_one_are_counted_as_they_come(processes, tmp_path, count):
    spec = job() | {"task": f"{__file__}:tested_one_by_one", "optimizer": {"name": "sgd", "lr": 0}}
    [values, *_] = processes(count).run(train_in_process, spec, tmp_path)
    inputs, targets = points()
    outputs = network()(inputs).detach()
    assert values["test/loss"] == pytest.approx(float(F.cross_entropy(outputs, targets)))
    right = (outputs.argmax(1) == targets)[targets != -100]
    assert values["test/accuracy"] == pytest.approx(float(right.double().mean()))


def test_training_rows_that_come_one_by_one_ask_for_a_weight(alone, tmp_path):
    told = r"ignores targets of -100, .* weight=lambda targets: targets.ne\(-100\).float\(\), or"
    with pytest.raises(SpecError, match=told):
        train_in_process(alone, job(kind="named", one_by_one=True), tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    held = job(kind="named", one_by_one=True) | {"loader": {"in_memory": True}}
    train_in_process(alone, held, tmp_path)
    steps, *_ = by_torch("named")
    rows = read_metrics(tmp_path / "job/metrics.jsonl")
    assert [row["train/loss"] for row in rows] == pytest.approx(steps, rel=1e-6)


class OneToken(nn.Module):
    """Outputs of one token a row: [B, classes, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.inner(inputs).unsqueeze(-1)


def one_token() -> supervised:
    inputs, targets = points()
    rows = TensorDataset(inputs, targets.unsqueeze(-1))
    return supervised(model=OneToken, train=rows, test=rows)


def test_targets_in_a_column_are_ignored_as_those_in_a_row(processes, tmp_path):
    """An ignored row counted as a row with the loss 0."""
    column = job() | {"task": f"{__file__}:one_token"}
    [values, *_] = processes(2).run(train_in_process, column, tmp_path / "column")
    [others, *_] = processes(2).run(train_in_process, job(kind="named"), tmp_path / "row")
    assert values["test/loss"] == others["test/loss"]
    assert values["train/loss"] == pytest.approx(others["train/loss"], rel=1e-12)


def missing(own: bool) -> supervised | custom:
    """Rows without a target, which is not a number, have weight 0."""
    inputs, _ = points()
    targets = inputs.sum(1, keepdim=True)
    targets[::3] = float("nan")

    def weight(targets: Tensor) -> Tensor:
        return targets.isnan().logical_not().flatten()

    def errors(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).square().flatten()

    known = targets.isnan().logical_not().flatten()
    parts: dict[str, Any] = {
        "model": lambda: nn.Linear(4, 1).double(),
        "train": TensorDataset(inputs[known], targets[known]),
        "test": TensorDataset(inputs, targets),
        "measures": {"size": lambda outputs, targets: errors(outputs, targets).sqrt()},
        "weight": weight,
    }
    if not own:
        return supervised(loss="mean_squared", **parts)

    def step(model: nn.Module, batch: Batch, context: StepContext) -> Any:
        outputs = model(batch.inputs)
        return {"squared": errors(outputs, batch.targets)}, outputs

    return custom(step=step, **parts)


@pytest.mark.parametrize("own", [False, True], ids=["supervised", "custom"])
def test_a_row_of_weight_zero_may_have_no_value(processes, tmp_path, own):
    """NaN times 0 made the whole test NaN."""
    sections = {"optimizer": {"name": "sgd", "lr": 0}, "task_args": {"own": own}}
    spec = job() | {"task": f"{__file__}:missing"} | sections
    [values, *_] = processes(2).run(train_in_process, spec, tmp_path)
    task = missing(own)
    model = new_model(task, seed=load_spec(spec).seed)
    inputs, targets = task.train_data().tensors
    off = (model(inputs) - targets).abs().detach()
    assert values["test/loss"] == pytest.approx(float(off.square().mean()))
    assert values["test/size"] == pytest.approx(float(off.mean()))


def test_weights_of_classes_that_belong_to_no_value_are_refused():
    smoothed = nn.CrossEntropyLoss(weight=CLASSES, label_smoothing=0.1, reduction="none")
    rows = TensorDataset(*points())
    with pytest.raises(SpecError, match="no value has its own weight"):
        supervised(model=network, train=rows, loss=smoothed)
    weighted = nn.CrossEntropyLoss(weight=CLASSES, reduction="none")
    task = supervised(model=network, train=rows, loss=weighted)
    with pytest.raises(SpecError, match="need class indices as targets, but these are"):
        task.weight(torch.rand(6, 3))


@pytest.mark.parametrize("weighted", [False, True])
def test_no_class_of_small_integers_is_taken_for_an_ignored_one(alone, weighted):
    targets = torch.tensor([156, 3, 0, 199], dtype=torch.uint8)  # in uint8, -100 is 156
    classes = torch.linspace(0.5, 2.0, 200)
    rows = TensorDataset(torch.randn(4, 5), targets)
    task = supervised(
        model=lambda: nn.Linear(5, 200),
        train=rows,
        test=rows,
        loss=nn.CrossEntropyLoss(weight=classes if weighted else None, reduction="none"),
    )
    spec = load_spec(spec_of("task") | {"batch": {"global_batch": 4}})
    plan = make_plan(spec, processes=1, train_rows=4, test_rows=4)
    [step] = islice(train_steps(rows, task=task, plan=plan, world=alone, start=0), 1)
    [batch] = step.micro_batches
    if not weighted:
        assert batch.weight is None
        assert step.weight == 4
    else:
        assert batch.weight.tolist() == classes[batch.targets.long()].tolist()
