"""Optimizer values of another shape or type in a checkpoint are refused before a kernel runs."""

import pytest
import torch
from jobs import spec_of, train_in_process
from safetensors.torch import load_file, save_file
from torch import nn

from service.basics.errors import SpecError
from service.checkpoints.snapshots import load
from service.optimization.learning_rates import make_schedule
from service.optimization.train_state import TrainState
from service.plan.plan import make_plan
from service.spec.files import load_spec


@pytest.fixture(scope="module")
def checkpoint(processes, tmp_path_factory):
    place = tmp_path_factory.mktemp("adam")
    job = spec_of("plain_rows", optimizer={"name": "adam", "lr": 0.01}, length={"steps": 2})
    processes(1).run(train_in_process, job, place)
    return job, place / "job" / "checkpoints" / "step-00000002"


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("exp_avg:weight", torch.zeros(1), r"exp_avg of weight is float32 \[1\] instead of"),
        ("exp_avg:weight", torch.zeros(3, 4, dtype=torch.float16), r"is float16 \[3, 4\] instead"),
        ("exp_avg_sq:bias", torch.zeros(()), r"is float32 \[\] instead of float32 \[3\]"),
        ("step:bias", torch.zeros(3), r"step of bias is float32 \[3\] instead of one float"),
        ("step:bias", torch.zeros((), dtype=torch.int8), r"is int8 \[\] instead of one float"),
    ],
)
def test_a_value_that_does_not_fit_is_refused_by_name(checkpoint, tmp_path, key, value, told):
    job, directory = checkpoint
    for file in directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    held = load_file(directory / "optimizer.safetensors")
    assert key in held
    save_file(held | {key: value}, tmp_path / "optimizer.safetensors")
    with pytest.raises(SpecError, match=told):
        load(tmp_path, _state(job))
    load(directory, _state(job))  # and the one that fits is taken


def _state(job):
    model = nn.Linear(4, 3)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=True)
    plan = make_plan(load_spec(job), processes=1, train_rows=103, test_rows=517)
    return TrainState(model, optimizer, make_schedule(optimizer, plan))
