"""Optimizer values of another shape or type in a checkpoint are refused before a kernel runs."""

import json

import pytest
import test_several_models
import test_sharding
import torch
from jobs import spec_of, train_in_process
from processes import ProcessesFailed
from safetensors.torch import load_file, save_file
from test_checkpoints import reseal
from torch import nn

from service.basics.errors import NoCheckpoint, SpecError
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


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("betas", {"tuple": [{"value": 0.9}]}, r"betas of a group is \(0\.9,\), and now \(0\.9, "),
        ("betas", {"value": "x"}, "betas of a group is 'x', and now"),
        ("eps", {"value": float("nan")}, "eps of a group is nan, and now 1e-08"),
        ("lr", {"value": []}, r"lr of a group is \[\], and now"),
        ("amsgrad", {"value": 1}, "amsgrad of a group is 1, and now False"),
        ("weight_decay", {"dtype": "X"}, "does not have the format of this version .*KeyError"),
        ("weight_decay", {"tuple": 3}, "does not have the format of this version .*TypeError"),
    ],
)
def test_an_option_that_does_not_fit_is_refused_by_name(checkpoint, tmp_path, key, value, told):
    job, directory = checkpoint
    for file in directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    state = json.loads((directory / "state.json").read_text())
    state["optimizer"]["groups"][0]["values"][key] = value
    (tmp_path / "state.json").write_text(json.dumps(state))
    with pytest.raises((SpecError, NoCheckpoint), match=told):
        load(tmp_path, _state(job))


@pytest.mark.parametrize("key", ["exp_avg_sq", "step"])
def test_a_value_that_is_missing_is_named(checkpoint, tmp_path, key):
    job, directory = checkpoint
    for file in directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    state = json.loads((directory / "state.json").read_text())
    del state["optimizer"]["state"]["bias"][key]
    (tmp_path / "state.json").write_text(json.dumps(state))
    with pytest.raises(SpecError, match=f"does not match the optimizer: {key} of bias is missing"):
        load(tmp_path, _state(job))


def test_no_parameter_of_adagrad_is_without_state(processes, tmp_path):
    job = spec_of("plain_rows", optimizer={"name": "adagrad", "lr": 0.01})
    processes(1).run(train_in_process, job, tmp_path, 3)
    [directory] = (tmp_path / "job/checkpoints").glob("step-*")
    state = json.loads((directory / "state.json").read_text())
    del state["optimizer"]["state"]["bias"]
    (directory / "state.json").write_text(json.dumps(state))
    reseal(directory)
    with pytest.raises(ProcessesFailed, match=r"SpecError.* of bias is missing"):
        processes(1).run(train_in_process, job, tmp_path)


def _state(job):
    model = nn.Linear(4, 3)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=True)
    plan = make_plan(load_spec(job), processes=1, train_rows=103, test_rows=517)
    return TrainState(model, optimizer, make_schedule(optimizer, plan))


class OwnAdam(torch.optim.Adam):
    """A class of the user's that has torch's fused kernel."""

    def __init__(self, params, lr, fused=True):
        super().__init__(params, lr=lr, fused=fused)


ADAM = {"name": "adam", "lr": 0.01}
TRAINED = {
    "several optimizers": (1, test_several_models.job("gan")),
    "a companion": (
        1,
        spec_of(
            "cut_of_digits",
            task_args={"double": True},
            optimizer={"name": "muon", "lr": 0.01, "companion": ADAM},
        ),
    ),
    "a class of the user's": (
        1,
        spec_of("plain_rows", optimizer=ADAM | {"name": f"{__name__}:OwnAdam"}),
    ),
    "several optimizers, sharded": (
        2,
        test_several_models.job("gan", exchange={"mode": "sharded"}),
    ),
    "sharded": (2, test_sharding.job("sharded", optimizer=ADAM)),
}


@pytest.mark.parametrize("way", TRAINED)
def test_it_is_refused_whoever_steps_the_parameter(processes, tmp_path, way):
    count, job = TRAINED[way]
    processes(count).run(train_in_process, job, tmp_path, 3)
    [directory] = (tmp_path / "job/checkpoints").glob("step-*")
    held = load_file(directory / "optimizer.safetensors")
    key = max((k for k in held if k.startswith("exp_avg:")), key=lambda k: held[k].numel())
    forged = torch.zeros(1, dtype=held[key].dtype)
    save_file(held | {key: forged}, directory / "optimizer.safetensors")
    reseal(directory)
    with pytest.raises(ProcessesFailed, match=r"SpecError.* does not match the optimizer: exp_avg"):
        processes(count).run(train_in_process, job, tmp_path)
