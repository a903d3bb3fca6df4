"""What a module computes twice comes to the same bits as what it computes once."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jobs import train_in_process
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from service.basics.errors import SpecError
from service.data.task import Task, supervised
from service.optimization.activation_checkpointing import checkpoint_activations
from service.optimization.flops import FlopCount
from service.preview.check import checked
from service.runs.tracking import read_metrics
from service.spec.files import load_spec
from service.spec.models import ActivationCheckpointingSpec

EVERY_BLOCK = {"activation_checkpointing": {"match": "blocks.*"}}


class Block(nn.Module):
    """Draws from torch's, numpy's and Python's generators, and has a BatchNorm."""

    def __init__(self, width: int, counts: bool) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.Linear(width, 4 * width), nn.BatchNorm1d(4 * width), nn.GELU(), nn.Dropout(0.2)
        )
        self.outer = nn.Linear(4 * width, width)
        self.counts = counts
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, rows: Tensor) -> Tensor:
        if self.training:
            rows = rows * (1 + 0.1 * random.random() + 0.1 * np.random.rand())
            if self.counts:
                self.seen += 1
        return rows + self.outer(self.inner(rows))


class Net(nn.Module):
    def __init__(self, counts: bool) -> None:
        super().__init__()
        self.first = nn.Linear(5, 11)
        self.blocks = nn.ModuleList(Block(11, counts) for _ in range(3))
        self.last = nn.Linear(11, 3)

    def forward(self, rows: Tensor) -> Tensor:
        rows = self.first(rows)
        for block in self.blocks:
            rows = block(rows)
        return self.last(rows)


def blocks(counts: bool = False) -> Task:
    """A net of three blocks on random rows."""
    random_rows = torch.randn(97, 5, generator=torch.Generator().manual_seed(3))
    labels = random_rows[:, 0].gt(0).long() + random_rows[:, 1].gt(0).long()
    return supervised(
        model=lambda: Net(counts),
        train=TensorDataset(random_rows[20:], labels[20:]),
        test=TensorDataset(random_rows[:20], labels[:20]),
        measures=("accuracy",),
    )


def job(**sections: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "name": "job",
        "task": f"{__file__}:blocks",
        "batch": {"global_batch": 22, "micro_batch": 4},
        "length": {"steps": 6},
        "optimizer": {"name": "adamw", "lr": 0.01},
        "tracking": {"log_every_steps": 1},
        "test": {"every_steps": 3},
    }
    return values | sections


def trained(place: Path) -> tuple[dict[str, Tensor], list[float]]:
    """(weights and buffers, losses) of a finished run."""
    run = place / "job"
    losses = [row["train/loss"] for row in read_metrics(run / "metrics.jsonl")]
    return load_file(run / "checkpoints" / "step-00000006" / "model.safetensors"), losses


@pytest.mark.parametrize(
    ("count", "model"),
    [
        (1, {"moving_average": 0.9}),
        (2, {}),
        (2, {"batchnorm": "sync"}),
        (1, {"batchnorm": "local"}),
    ],
    ids=str,
)
def test_it_has_the_same_bits_as_without(processes, tmp_path, count, model):
    for name, more in (("without", {}), ("with", EVERY_BLOCK)):
        processes(count).run(train_in_process, job(model=model | more), tmp_path / name)

    (weights, losses), (others, other_losses) = (trained(tmp_path / n) for n in ("without", "with"))
    assert losses == other_losses
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)


def test_less_is_kept_and_no_more_operations_are_counted(alone):
    kept, counted = {}, {}
    for name, model in (("without", {}), ("with", EVERY_BLOCK)):
        spec = load_spec(job(model=model))
        [told] = [words for what, words in checked(spec, world=alone) if what == "memory"]
        number, unit = told.rsplit("activations ", 1)[1].split()
        kept[name] = float(number) * {"B": 1, "kB": 1000}[unit]
        net = Net(False)
        checkpoint_activations(net, spec.model.activation_checkpointing)
        with FlopCount() as count:
            net(torch.zeros(4, 5)).sum().backward()
        counted[name] = count.total
    assert kept["with"] < kept["without"] / 3
    assert counted["with"] == counted["without"]


def test_a_module_inside_a_chosen_one_is_not_chosen_again():
    net = Net(False)
    names = checkpoint_activations(net, ActivationCheckpointingSpec(match="blocks*"))
    assert names == ["blocks.0", "blocks.1", "blocks.2"]
    assert type(net.blocks[0].inner) is nn.Sequential
    assert isinstance(net.blocks[0], Block)


@pytest.mark.parametrize(
    ("match", "counts", "words"),
    [
        ("layers.*", False, "'layers.*' matches no module. The model has first, blocks.0"),
        ("*.inner.1", False, "chooses blocks.0.inner.1 of class BatchNorm1d"),
        ("blocks.*", True, "the buffer blocks.0.seen changes in the forward pass"),
    ],
)
def test_what_cannot_be_computed_twice_is_refused_before_the_start(
    alone, tmp_path, match, counts, words
):
    spec = job(task_args={"counts": counts}, model={"activation_checkpointing": {"match": match}})
    with pytest.raises(SpecError) as refused:
        train_in_process(alone, spec, tmp_path)
    assert str(refused.value).startswith("model.activation_checkpointing.match: ")
    assert words in str(refused.value)
    assert not list(tmp_path.iterdir())
    with pytest.raises(SpecError) as checked_too:
        list(checked(load_spec(spec), world=alone))
    assert str(checked_too.value) == str(refused.value)
