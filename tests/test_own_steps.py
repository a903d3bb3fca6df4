"""A step of the task's own: named losses, the same at any number of processes."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import own_steps
import pytest
import torch
from commands import evenstep
from jobs import difference, rows_of, spec_of, train_in_process, weights
from torch.nn import functional as F

from service.basics.errors import DataBroken, SpecError
from service.data.batches import Batch
from service.data.losses import Loss, StepContext, read_losses
from service.distributed.world import alone

HERE = Path(own_steps.__file__)
STEPS = 12


def job(factory: str, *, of: Path = HERE, **sections: Any) -> dict[str, Any]:
    """A job of a factory in the module `of`, with five micro-batches, the last of 3 rows."""
    return (
        spec_of("")
        | {
            "task": f"{of}:{factory}",
            "batch": {"global_batch": 23, "micro_batch": 5},
            "length": {"steps": STEPS},
            "test": {"every_steps": 6, "micro_batch": 7},
        }
        | sections
    )


def assert_same_rows(one: Path, other: Path) -> None:
    first, second = rows_of(one), rows_of(other)
    assert [row.keys() for row in first] == [row.keys() for row in second]
    for a, b in zip(first, second, strict=True):
        assert a == pytest.approx(b, rel=1e-9, abs=1e-9)


@pytest.fixture(scope="module")
def hard_runs(processes, tmp_path_factory):
    """One job with all ways of weighing a loss, at 1 and 3 processes."""
    places = {count: tmp_path_factory.mktemp(f"hard-{count}") for count in (1, 3)}
    for count, place in places.items():
        processes(count).run(train_in_process, job("hard"), place)
    return places


@pytest.mark.parametrize("factory", ["vae", "distillation", "tokens", "noisy_update", "detector"])
def test_the_number_of_processes_changes_nothing(processes, tmp_path, factory):
    for count in (1, 2, 3):
        processes(count).run(train_in_process, job(factory), tmp_path / str(count))
    for count in (2, 3):
        assert difference(tmp_path / "1", tmp_path / str(count)) < 1e-12
        assert_same_rows(tmp_path / "1", tmp_path / str(count))


def test_nor_where_only_the_forward_pass_shows_the_weights(hard_runs):
    assert difference(hard_runs[1], hard_runs[3]) < 1e-12
    assert_same_rows(hard_runs[1], hard_runs[3])
    assert {"train/hard", "train/size", "train/first", "test/hard"} <= rows_of(hard_runs[1])[
        -1
    ].keys()


def test_nor_with_a_static_graph(processes, tmp_path, hard_runs):
    """It waits for gradients of what the wrapped model returns: the losses have to be those."""
    spec = job("hard", exchange={"static_graph": True})
    for stop in (5, None):
        processes(2).run(train_in_process, spec, tmp_path, stop)
    assert difference(hard_runs[1], tmp_path) < 1e-12


def test_a_loss_for_which_no_row_of_a_test_set_counts_has_no_value(processes, tmp_path):
    for count in (1, 3):
        processes(count).run(train_in_process, job("by_kind"), tmp_path / str(count))
    assert_same_rows(tmp_path / "1", tmp_path / "3")
    last = rows_of(tmp_path / "1")[-1]
    measured = {name for name in last if name.startswith("test/")}
    assert measured == {
        "test/first/first", "test/first/margin", "test/first/loss",
        "test/second/second", "test/second/loss",
    }  # fmt: skip
    assert last["test/second/loss"] == last["test/second/second"]


def test_a_test_set_that_counts_for_no_loss_is_an_error(tmp_path):
    with pytest.raises(DataBroken, match="Nothing in the test set counts for any loss"):
        train_in_process(alone(), job("by_kind", task_args={"all_of_none": True}), tmp_path)


def test_the_loss_of_a_test_is_its_parts_by_their_scales(hard_runs):
    last = rows_of(hard_runs[3])[-1]
    parts = last["test/hard"] + 0.01 * last["test/size"] + 0.5 * last["test/first"]
    assert last["test/loss"] == pytest.approx(parts, rel=1e-12)


def test_a_named_value_is_computed_over_all_test_rows(hard_runs):
    model = own_steps.classifier()
    model.load_state_dict(weights(hard_runs[3]))
    images, labels = own_steps.classified()[1].tensors
    losses = F.cross_entropy(model.eval()(images), labels, reduction="none")
    expected = losses[losses > 0.9].mean().item()
    assert rows_of(hard_runs[3])[-1]["test/hard"] == pytest.approx(expected, rel=1e-12)


def test_stopped_on_three_processes_it_continues_on_one(processes, tmp_path, hard_runs):
    assert processes(3).run(train_in_process, job("hard"), tmp_path, 5) == [None] * 3
    processes(1).run(train_in_process, job("hard"), tmp_path)
    assert difference(hard_runs[1], tmp_path) < 1e-12
    assert_same_rows(hard_runs[1], tmp_path)


def test_a_student_of_its_own_average_resumes_in_the_same_bits(processes, tmp_path):
    spec = job("byol", model={"moving_average": 0.9})
    for count in (1, 3):
        processes(count).run(train_in_process, spec, tmp_path / str(count))
    assert difference(tmp_path / "1", tmp_path / "3") < 1e-12
    assert_same_rows(tmp_path / "1", tmp_path / "3")
    assert processes(3).run(train_in_process, spec, tmp_path / "stopped", 5) == [None] * 3
    processes(3).run(train_in_process, spec, tmp_path / "stopped")
    assert difference(tmp_path / "3", tmp_path / "stopped") == 0


def test_bitwise_is_bitwise_with_weights_of_its_own(processes, tmp_path):
    for factory in ("hard", "contrast"):
        places = [tmp_path / f"{factory}-{count}" for count in (1, 2)]
        for count, place in zip((1, 2), places, strict=True):
            processes(count).run(train_in_process, job(factory, exactness="bitwise"), place)
        assert difference(*places) == 0


def test_rows_that_see_each_other_do_so_at_any_number_of_processes(processes, tmp_path):
    for count in (1, 3):
        processes(count).run(train_in_process, job("contrast"), tmp_path / str(count))
    assert difference(tmp_path / "1", tmp_path / "3") < 1e-12
    assert_same_rows(tmp_path / "1", tmp_path / "3")


def test_a_loss_of_all_rows_may_draw_random_numbers(processes, tmp_path):
    for count in (1, 3):
        processes(count).run(train_in_process, job("random_contrast"), tmp_path / str(count))
    assert difference(tmp_path / "1", tmp_path / "3") < 1e-12
    assert_same_rows(tmp_path / "1", tmp_path / "3")
    last = rows_of(tmp_path / "1")[-1]
    assert last["train/near"] != last["train/far"], "each loss has its own"


def test_statistics_over_all_processes_cost_a_model_without_batchnorm_nothing(processes, tmp_path):
    """Five micro-batches on two processes: one of them has an additional one without rows."""
    spec = job("by_step", task_args={"step": "weighed"}, model={"batchnorm": "sync"})
    for count in (1, 2):
        processes(count).run(train_in_process, spec, tmp_path / str(count))
    assert difference(tmp_path / "1", tmp_path / "2") < 1e-12
    assert_same_rows(tmp_path / "1", tmp_path / "2")


def test_rows_that_see_each_other_do_so_across_micro_batches(processes, tmp_path):
    arguments = {"task_args": {"dropout": 0.0}, "test": {"micro_batch": 7}}
    processes(2).run(train_in_process, job("contrast", **arguments), tmp_path / "apart")
    whole = job("whole_batch", batch={"global_batch": 23, "micro_batch": 23}, **arguments)
    processes(1).run(train_in_process, whole, tmp_path / "whole")
    assert difference(tmp_path / "apart", tmp_path / "whole") < 1e-12
    assert_same_rows(tmp_path / "apart", tmp_path / "whole")


@pytest.mark.parametrize("step", ["each", "mean", "weighed", "counted"])
def test_a_step_trains_as_the_loss_does_that_it_computes(processes, tmp_path, step):
    by_loss = job("by_loss", task_args={"weight": step == "counted"})
    processes(1).run(train_in_process, by_loss, tmp_path / "loss")
    processes(1).run(train_in_process, job("by_step", task_args={"step": step}), tmp_path / "step")
    assert difference(tmp_path / "loss", tmp_path / "step") < 1e-12
    assert_same_rows(tmp_path / "loss", tmp_path / "step")


def test_the_micro_batch_changes_nothing_where_rows_do_not_see_each_other(processes, tmp_path):
    for size in (5, 23):
        batch = {"global_batch": 23, "micro_batch": size}
        arguments = {"step": "weighed", "dropout": 0.0}
        spec = job("by_step", task_args=arguments, batch=batch, test={"micro_batch": size})
        processes(1).run(train_in_process, spec, tmp_path / str(size))
    assert difference(tmp_path / "5", tmp_path / "23") < 1e-12


def test_a_class_with_a_step_needs_no_loss(processes, tmp_path):
    processes(1).run(train_in_process, job("OwnClass", test={}), tmp_path)
    assert rows_of(tmp_path)[-1]["train/loss"] > 0


def test_the_commands_know_a_step(processes, tmp_path):
    processes(1).run(train_in_process, job("tokens"), tmp_path / "runs")
    (tmp_path / "job.yaml").write_text(json.dumps(job("tokens")))
    looked = evenstep("check", "job.yaml", cwd=tmp_path)
    assert looked.returncode == 0, looked.stderr
    done = evenstep("test", "job", "--predictions", "said.npy", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    last = rows_of(tmp_path / "runs")[-1]
    assert told == pytest.approx({k: v for k, v in last.items() if k.startswith("test/")})
    assert np.load(tmp_path / "said.npy").shape == (32, 7, 9)


# ---- mistakes

ROWS = 4
BATCH = Batch(0, np.arange(ROWS), torch.zeros(ROWS, 2), torch.zeros(ROWS), None, 0)
PARAMETER = torch.ones(ROWS, requires_grad=True)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (PARAMETER.mean(), "must return losses by name"),
        ({}, "returned none"),
        ({"a": PARAMETER.mean()}, "is a single number, a mean or a sum of unknown weight"),
        ({"a": PARAMETER[:, None] * PARAMETER}, r"the shape \[4\], but has \[4, 4\]"),
        ({"a": torch.ones(ROWS)}, "has no gradient"),
        ({"a": 0.5}, "must be a tensor or a Loss, but is a float"),
        ({"a": Loss(PARAMETER.sum(), "rows")}, "weight must be one number, but is 'rows'"),
        ({"a": Loss(PARAMETER.sum(), math.nan)}, "finite number from 0 up, but is nan"),
        ({"a": Loss(PARAMETER.sum(), -1)}, "finite number from 0 up, but is -1"),
        ({"a": Loss(PARAMETER.sum(), PARAMETER.sum())}, "has a gradient"),
        ({"a": Loss(PARAMETER.sum(), None)}, "weight must be one number, but is None"),
        ({"a": Loss(PARAMETER, 4)}, r"must be a single number if it has a weight, .* \[4\]"),
        ({"a": Loss.mean(PARAMETER.mean(), scale=math.inf)}, "scale must be a finite number"),
        ({"a": Loss.of_all_rows(torch.mean, PARAMETER)}, r"so the shape \[4\], but returned \[\]"),
        (
            {"a": Loss.of_all_rows(torch.abs, PARAMETER[:2])},
            r"micro-batch, but one is \[2\]",
        ),
        ({"a b": PARAMETER}, "but is 'a b'"),
        ({"loss": PARAMETER, "b": PARAMETER}, "none may be named 'loss'"),
    ],
)
def test_a_mistake_in_a_loss_is_one_sentence(given, said):
    with pytest.raises(SpecError, match=said):
        read_losses(given, BATCH, context=StepContext(0, 0.0, True, 0))


def test_a_value_is_logged_once_and_is_one_number():
    context = StepContext(0, 0.0, True, 0)
    context.log("seen", torch.tensor(3.0), 4)
    with pytest.raises(SpecError, match="given twice"):
        context.log("seen", 1, 1)
    with pytest.raises(SpecError, match=r"must be one number, but is a tensor of shape \[4\]"):
        context.log("other", torch.ones(4), 4)
    with pytest.raises(SpecError, match="is the name of a loss and of"):
        read_losses({"seen": PARAMETER}, BATCH, context=context)


@pytest.mark.parametrize(
    ("factory", "sections", "said"),
    [
        (
            "vae",
            {"checkpoint": {"best": {"measure": "test/divergense", "mode": "min"}}},
            "did you mean 'test/divergence'",
        ),
        ("late", {}, "came with a weight of its own, but not in the dry run"),
        ("unseen", {}, "accuracy needs the model's outputs"),
        ("taken", {}, "train/lr is a name that Evenstep logs itself"),
        ("lopsided", {}, "the weight of 'a' must be a finite number from 0 up, but is -71"),
    ],
)
def test_a_mistake_in_a_job_is_one_sentence(tmp_path, factory, sections, said):
    with pytest.raises(SpecError, match=said):
        train_in_process(alone(), job(factory, **sections), tmp_path)
