"""A sharded model whose units are compiled trains as one that is not compiled."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import compiled_nets
import jobs
import pytest
import sharded_steps
import test_sharding
from commands import evenstep
from jobs import train_in_process
from processes import Processes
from test_several_models import job as job_of_several
from test_sharded_steps import DEEP
from test_sharding import difference

from service.optimization.compilation import parts_to_compile
from service.plan.changing import Accepted, changes
from service.preview.check import checked
from service.runs.tracking import read_metrics
from service.sharding.sharding import units_of
from service.spec.files import load_spec

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles for the CPU with g++"),
    # Of the compiler's own. It hides the second by itself, where warnings are no errors.
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]
CHANGED = Accepted(keys=("model.compile", "exchange.mode"))


def job(compiled: bool, mode: str = "sharded", **sections: Any) -> dict[str, Any]:
    model = sections.pop("model", {}) | {"compile": compiled}
    task = f"{compiled_nets.__file__}:blocks"
    return test_sharding.job(mode, task=task, model=model, **sections)


def graphs(place: Path) -> list[float]:
    return [row["train/compiled_graphs"] for row in read_metrics(place / "job/metrics.jsonl")]


FEATURES: dict[str, dict[str, Any]] = {
    "ten blocks": {"task_args": {"count": 10}},
    "activations computed again": {
        "model": {"activation_checkpointing": {"match": "blocks.*"}},
    },
    "averaged, one block frozen for a while, gradients summed each time": {
        "model": {"moving_average": 0.9},
        "exchange": {
            "mode": "sharded",
            "sync_each_micro_batch": True,
            "units": ["blocks.*", "head"],
        },
        "task_args": {"tied": False},
        "optimizer": {
            "name": "adamw",
            "lr": 0.01,
            "groups": [{"match": "blocks.1.*", "unfreeze_at_step": 7}, {"match": "*"}],
        },
    },
    "no blocks": {"task_args": {"count": 0}},
}


@pytest.mark.slow
@pytest.mark.parametrize("feature", FEATURES)
def test_it_is_the_run_of_one_process_that_compiles_nothing(processes, tmp_path, feature):
    sections = FEATURES[feature]
    whole = job(False, **sections) | {"exchange": {"mode": "ddp"}}
    processes(1).run(train_in_process, whole, tmp_path / "eager")
    for count in (1, 3):
        processes(count).run(train_in_process, job(True, **sections), tmp_path / str(count))
        assert difference(tmp_path / "eager", tmp_path / str(count)) < 1e-12
        compiled = graphs(tmp_path / str(count))
        assert compiled[0] >= 1
        assert compiled[-1] == compiled[-2], "steps after the first test compile nothing"


@pytest.mark.slow
def test_equal_blocks_are_compiled_once(tmp_path):
    with Processes(2) as fresh:  # torch counts the graphs of a process
        fresh.run(train_in_process, job(True, task_args={"count": 10}), tmp_path)
    compiled = graphs(tmp_path)
    assert compiled[0] <= 2, "one graph, and one more for micro-batches of another size"
    assert compiled[-1] <= 3, "and one for tests"


@pytest.mark.slow
def test_dropout_does_not_depend_on_the_number_of_processes(processes, tmp_path):
    spec = job(True, task_args={"dropout": 0.3})
    for count in (1, 2, 3):
        processes(count).run(train_in_process, spec, tmp_path / str(count))
    assert difference(tmp_path / "1", tmp_path / "2") < 1e-12
    assert difference(tmp_path / "1", tmp_path / "3") < 1e-12
    inert = job(True, task_args={"dropout": 0.0})
    processes(1).run(train_in_process, inert, tmp_path / "inert")
    assert difference(tmp_path / "1", tmp_path / "inert") > 0.01


@pytest.mark.slow
def test_a_run_continues_compiled_or_not(processes, tmp_path):
    processes(1).run(train_in_process, job(False, "ddp"), tmp_path / "eager")
    place = tmp_path / "moved"
    for count, compiled, mode, stop in (
        (2, True, "sharded", 4),
        (3, False, "sharded", 6),
        (1, True, "ddp", 9),
        (3, True, "sharded", None),
    ):
        processes(count).run(train_in_process, job(compiled, mode), place, stop, CHANGED)
    assert difference(tmp_path / "eager", place) < 1e-12


@pytest.mark.slow
def test_stopped_and_resumed_it_ends_in_the_same_bits(processes, tmp_path):
    for stop in (None,), (5, None):
        for at in stop:
            processes(2).run(train_in_process, job(True), tmp_path / str(len(stop)), at)
    assert difference(tmp_path / "1", tmp_path / "2") == 0


@pytest.mark.slow
def test_units_of_several_models_are_compiled(processes, tmp_path):
    spec = job_of_several("gan", **DEEP)
    processes(1).run(train_in_process, spec, tmp_path / "eager")
    spec |= {"exchange": {"mode": "sharded"}, "model": {"compile": True}}
    processes(2).run(train_in_process, spec, tmp_path / "compiled")
    assert jobs.difference(tmp_path / "eager", tmp_path / "compiled") < 1e-9
    assert graphs(tmp_path / "compiled")[0] >= 2


def test_of_a_sharded_model_each_unit_is_compiled_and_a_model_without_units_as_a_whole():
    net = compiled_nets.Net(count=2, dropout=0.0)
    assert list(parts_to_compile(net)) == [""]
    assert list(parts_to_compile(net, units_of(net))) == ["blocks.0", "blocks.1"]
    assert list(parts_to_compile(net, units_of(net, ["head"]))) == ["head"]
    flat = compiled_nets.Net(count=0, dropout=0.0)
    assert list(parts_to_compile(flat, units_of(flat))) == [""]


def test_of_several_models_those_without_units_are_compiled_as_a_whole():
    models = sharded_steps.nn.ModuleDict(sharded_steps.deep_models())
    units = units_of(models, ["critic.blocks.*"])
    expected = ["critic.blocks.0", "critic.blocks.1", "generator"]
    assert list(parts_to_compile(models, units)) == expected


def test_what_becomes_one_graph_changes_only_with_consent():
    """It decides which numbers dropout draws."""
    whole, units = load_spec(job(True, "ddp")), load_spec(job(True))
    nodes = load_spec(job(True, "hybrid"))
    head = load_spec(job(True, exchange={"mode": "sharded", "units": ["head"]}))
    assert [change.key for change in changes(whole, units)] == ["exchange.mode"]
    assert [change.key for change in changes(nodes, whole)] == ["exchange.mode"]
    assert [change.key for change in changes(units, head)] == ["exchange.units"]
    assert changes(units, nodes) == []
    assert changes(load_spec(job(False, "ddp")), load_spec(job(False))) == []


def test_check_compiles_the_units(alone):
    found = dict(checked(load_spec(job(True, task_args={"count": 2})), world=alone))
    assert "forward and a backward pass" in found["compile"]


def test_a_unit_that_cannot_be_compiled_is_named_before_anything_is_written(tmp_path):
    """Torch finds no C++ compiler on this machine."""
    spec = f"task={compiled_nets.__file__}:blocks"
    done = evenstep(
        "run", "digits", spec, "task_args={count: 2, dropout: 0.0}", "model.compile=true",
        "exchange.mode=sharded", "--processes", 2, "--name", "job", cwd=tmp_path, timeout=300,
        CXX=str(tmp_path / "nowhere"), TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"),
    )  # fmt: skip
    assert done.returncode == 64, done.stderr
    assert "model.compile: torch cannot compile blocks.0 here: " in done.stderr
    assert not (tmp_path / "runs").exists()
