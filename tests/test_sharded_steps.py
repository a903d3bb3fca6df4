"""Steps of a task's own, with sharded models: the run of one process that has them all."""

import re
from pathlib import Path
from typing import Any

import pytest
import several_models
import sharded_steps
from jobs import difference, on_nodes, rows_of, train_in_process, weights
from processes import ProcessesFailed
from test_own_steps import assert_same_rows
from test_own_steps import job as step_job
from test_several_models import STEPS, TASKS, job

from service.basics.errors import SpecError
from service.data.task import load_task
from service.distributed.world import World
from service.runs.receipt_file import read_receipt
from service.spec.files import load_spec
from service.training.batch_size_finder import fitting_rows

HERE = Path(sharded_steps.__file__)
SHARDED = {"exchange": {"mode": "sharded"}}
DEEP = {"task": f"{HERE}:deep", "optimizers": several_models.GAN}


def assert_same_run(one: Path, other: Path) -> None:
    assert difference(one, other) < 1e-9
    assert_same_rows(one, other)
    receipts = [read_receipt(place / "job" / "receipt.jsonl") for place in (one, other)]
    assert receipts[0] == receipts[1]
    assert len(receipts[0]) == STEPS


@pytest.mark.parametrize("factory", list(TASKS))
def test_several_models_train_as_in_a_hand_written_loop(processes, tmp_path, factory):
    wanted = TASKS[factory][1](STEPS)
    processes(1).run(train_in_process, job(factory), tmp_path / "1")
    for count in (2, 3):
        processes(count).run(train_in_process, job(factory) | SHARDED, tmp_path / str(count))
        found = weights(tmp_path / str(count))
        assert found.keys() == wanted.keys()
        assert max((found[name] - wanted[name]).abs().max() for name in wanted) < 1e-9
        assert_same_run(tmp_path / "1", tmp_path / str(count))


@pytest.mark.parametrize(
    "factory", ["vae", "hard", "contrast", "tokens", "noisy_update", "two_tests_by_step"]
)
def test_a_step_of_its_own_is_that_of_one_process(processes, tmp_path, factory):
    """Of five micro-batches the last process has one, and computes another that does not count."""
    processes(1).run(train_in_process, step_job(factory), tmp_path / "1")
    processes(3).run(train_in_process, step_job(factory) | SHARDED, tmp_path / "3")
    assert_same_run(tmp_path / "1", tmp_path / "3")


def test_models_with_units_are_called_in_any_order(processes, tmp_path):
    processes(1).run(train_in_process, job("gan", **DEEP), tmp_path / "1")
    kept = {"reshard_after_forward": False, "sync_each_micro_batch": True}
    for name, exchange in {"units": {}, "kept": kept}.items():
        spec = job("gan", **DEEP, exchange={"mode": "sharded"} | exchange)
        processes(3).run(train_in_process, spec, tmp_path / name)
        assert_same_run(tmp_path / "1", tmp_path / name)


def test_several_models_on_two_nodes_of_two_processes(processes, tmp_path):
    processes(1).run(train_in_process, job("gan", **DEEP), tmp_path / "1")
    spec = job("gan", **DEEP, exchange={"mode": "hybrid"})
    processes(4).run(on_nodes, spec, tmp_path / "4", 2, None)
    assert_same_run(tmp_path / "1", tmp_path / "4")


@pytest.mark.parametrize("factory", ["gan", "byol"])
def test_stopped_and_resumed_it_ends_in_the_same_bits(processes, tmp_path, factory):
    if factory == "gan":
        spec = job("gan", **DEEP, exchange={"mode": "sharded"})
    else:  # a student of its own average
        spec = step_job("byol", model={"moving_average": 0.9}) | SHARDED
        processes(1).run(train_in_process, spec, tmp_path / "1")
    for place, stops in (("whole", [None]), ("stopped", [7, None])):
        for stop in stops:
            processes(3).run(train_in_process, spec, tmp_path / place, stop)
    assert difference(tmp_path / "whole", tmp_path / "stopped") == 0
    assert rows_of(tmp_path / "whole") == rows_of(tmp_path / "stopped")
    if factory == "byol":
        assert_same_run(tmp_path / "1", tmp_path / "whole")


def test_any_mode_continues_what_another_began(processes, tmp_path):
    processes(1).run(train_in_process, job("gan", **DEEP), tmp_path / "1")
    for count, mode, stop in ((3, "sharded", 4), (2, "ddp", 7), (2, "sharded", None)):
        spec = job("gan", **DEEP, exchange={"mode": mode})
        processes(count).run(train_in_process, spec, tmp_path / "moved", stop)
    assert difference(tmp_path / "1", tmp_path / "moved") < 1e-9
    assert_same_rows(tmp_path / "1", tmp_path / "moved")


def test_each_turn_is_clipped_and_skipped_by_itself(processes, tmp_path):
    spec = job(
        "spoilt_gan",
        optimizers=several_models.GAN,
        test={},
        max_grad_norm=0.5,
        faults={"on_non_finite": "skip"},
        checkpoint={"every_steps": 1, "keep": 20},
    )
    processes(1).run(train_in_process, spec, tmp_path / "1")
    processes(3).run(train_in_process, spec | SHARDED, tmp_path / "3")
    assert difference(tmp_path / "1", tmp_path / "3") < 1e-9
    before, after = weights(tmp_path / "3", 4), weights(tmp_path / "3", 5)
    for name in (name for name in before if name.endswith("weight")):
        assert before[name].equal(after[name]) == name.startswith("generator"), name
    assert rows_of(tmp_path / "3")[-1]["train/skipped_steps"] == 1


# ---- mistakes

BYOL = TASKS["byol"][0]


@pytest.mark.parametrize(
    ("factory", "sections", "said"),
    [
        (
            "inner_backward",
            {"optimizers": several_models.GAN},
            r"runs a backward pass \(torch\.autograd\.grad\) through critic\.blocks\.1, whose",
        ),
        (
            "changed_by",
            BYOL | {"task_args": {"what": "tensor"}},
            "task.after_update combines a parameter, of which each process has only some rows",
        ),
        (
            "changed_by",
            BYOL | {"task_args": {"what": "draws"}},
            "task.after_update draws random numbers by aten.bernoulli_",
        ),
        (
            "of_two_types",
            BYOL,
            r"of one type, but wide\.0\.weight has float64 and narrow\.0\.weight float32",
        ),
    ],
)
def test_what_cannot_be_sharded_is_one_sentence(processes, tmp_path, factory, sections, said):
    spec = job("", **SHARDED, **sections) | {"task": f"{HERE}:{factory}", "test": {}}
    with pytest.raises(ProcessesFailed) as failed:
        processes(2).run(train_in_process, spec, tmp_path)
    assert re.search(f"SpecError: .*{said}", str(failed.value))


def test_an_optimizer_that_sees_whole_parameters_is_refused_with_the_spec():
    optimizers = {
        "critic": several_models.GAN["critic"],
        "generator": {"optimizer": {"name": "lbfgs", "lr": 1.0}},
    }
    with pytest.raises(SpecError, match=r"optimizers\.generator\.optimizer\.name: lbfgs yet: use"):
        load_spec(job("gan", optimizers=optimizers) | SHARDED)


# ---- micro_batch: auto


def rows_found(world: World, spec: dict[str, Any]) -> int:
    """What `micro_batch: auto` finds with all of this machine's memory."""
    loaded = load_spec(spec)
    task = load_task(loaded.task, loaded.task_args, seed=loaded.seed)
    return fitting_rows(
        loaded, task=task, world=world, processes=world.processes, memory_bytes=10**11
    )


def test_steps_are_tried_without_exchanges(processes):
    """Also those that call units in any order, and the average."""
    auto = {"batch": {"global_batch": 30, "micro_batch": "auto"}} | SHARDED
    deep = job("gan", **DEEP) | auto
    follows = step_job("byol", model={"moving_average": 0.9}) | auto
    for spec in (deep, follows):
        assert processes(3).run(rows_found, spec) == [10, 10, 10]
