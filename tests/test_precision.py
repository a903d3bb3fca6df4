"""Every precision trains alike at any number of processes, and what is not finite is answered."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from jobs import spec_of, train_in_process
from precisions import BAD_ROW, ended, job
from safetensors.torch import load_file

from service.plan.samplers import rows_at, share_of
from service.runs.tracking import read_metrics


def weights(runs: Path, step: int, file: str = "model"):
    return load_file(runs / "job" / "checkpoints" / f"step-{step:08d}" / f"{file}.safetensors")


def stored(runs: Path, step: int):
    place = runs / "job" / "checkpoints" / f"step-{step:08d}"
    return json.loads((place / "state.json").read_text())


def metrics(runs: Path):
    return read_metrics(runs / "job" / "metrics.jsonl")


def farthest(a, b):
    assert a.keys() == b.keys()
    return max((a[k].double() - b[k].double()).abs().max().item() for k in a)


def first_step_with(row: int, *, epoch: int = 0) -> int:
    """The step, counted from 1, whose rows hold `row` for that time."""
    order = rows_at(np.arange(500), rows=103, seed=3)
    return int(np.flatnonzero(order == row)[epoch]) // 50 + 1


@pytest.mark.parametrize("precision", ["tf32", "bf16", "fp16"])
def test_a_precision_trains_alike_on_one_process_and_on_three(processes, tmp_path, precision):
    spec = spec_of("cut_of_digits", model={"precision": precision}, length={"steps": 20})
    for count in (1, 3):
        processes(count).run(train_in_process, spec, tmp_path / str(count))
    alone, together = (metrics(tmp_path / n) for n in ("1", "3"))
    assert alone[-1]["train/loss"] < 0.6 * alone[0]["train/loss"]
    for a, b in zip(alone, together, strict=True):
        assert a["train/loss"] == pytest.approx(b["train/loss"], abs=1e-2)
        assert a.get("train/loss_scale") == b.get("train/loss_scale")
        assert a.get("train/skipped_steps") == b.get("train/skipped_steps")
    assert all(t.dtype != torch.float16 for t in weights(tmp_path / "1", 20).values())


def test_bf16_is_really_computed_in_bf16(processes, tmp_path):
    for precision in ("fp32", "bf16"):
        spec = spec_of("cut_of_digits", model={"precision": precision}, length={"steps": 1})
        processes(1).run(train_in_process, spec, tmp_path / precision)
    full, half = (metrics(tmp_path / p)[0]["train/loss"] for p in ("fp32", "bf16"))
    assert 1e-6 < abs(full - half) / full < 1e-2


@pytest.mark.parametrize("count", [1, 3])
def test_fp16_skips_an_overflow_on_every_process_alike(processes, tmp_path, count):
    spec = job("steep", model={"precision": "fp16"}, length={"steps": 12})
    processes(count).run(train_in_process, spec, tmp_path)
    rows = metrics(tmp_path)
    first = first_step_with(BAD_ROW)
    assert [row["train/skipped_steps"] for row in rows[:first]] == [0] * (first - 1) + [1]
    assert rows[first - 1]["train/loss_scale"] == 2.0**15
    assert math.isinf(rows[first - 1]["train/grad_norm"])
    assert farthest(weights(tmp_path, first - 1), weights(tmp_path, first)) == 0
    # Whoever has the row, the scale falls until it fits, and training goes on from there.
    assert rows[-1]["train/skipped_steps"] < len(rows)
    assert farthest(weights(tmp_path, first), weights(tmp_path, 12)) > 0
    kept = stored(tmp_path, 12)
    assert kept["scaler"]["scale"] == rows[-1]["train/loss_scale"]
    assert kept["skipped_steps"] == rows[-1]["train/skipped_steps"]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_stopped_and_resumed_it_ends_in_the_same_bits(processes, tmp_path, precision):
    task = "steep" if precision == "fp16" else "images"
    model = {"precision": precision, "moving_average": 0.9}
    spec = job(task, model=model, length={"steps": 12})
    processes(2).run(train_in_process, spec, tmp_path / "whole")
    for stop_at in (4, 7, None):
        processes(2).run(train_in_process, spec, tmp_path / "parts", stop_at)
    for file in ("model", "average", "optimizer"):
        pair = [weights(tmp_path / place, 12, file) for place in ("whole", "parts")]
        assert farthest(*pair) == 0, file
    assert stored(tmp_path / "whole", 12) == stored(tmp_path / "parts", 12)


OPTIMIZERS = {
    "decided by the kernel": {"name": "sgd", "lr": 0.05, "momentum": 0.9},
    "decided by the kernel, Adam": {"name": "adam", "lr": 0.01},
    "decided by the host": {"name": "sgd", "lr": 0.05, "momentum": 0.9, "foreach": True},
}


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_skipped_step_leaves_no_trace(processes, tmp_path, optimizer, count):
    spec = job(
        "nan_row",
        optimizer=OPTIMIZERS[optimizer],
        faults={"on_non_finite": "skip", "skips_allowed": 4},
    )
    processes(count).run(train_in_process, spec, tmp_path)
    bad = first_step_with(BAD_ROW)
    skipped = [row["step"] for row in metrics(tmp_path) if math.isnan(row["train/loss"])]
    assert skipped[0] == bad
    assert len(skipped) == 4
    for step in range(2, 9):
        moved = farthest(weights(tmp_path, step - 1), weights(tmp_path, step))
        assert (moved == 0) == (step in skipped), step  # BatchNorm's statistics are among them
        pair = [weights(tmp_path, s, "optimizer") for s in (step - 1, step)]
        if step in skipped and step - 1 >= bad:
            assert farthest(*pair) == 0
    assert all(t.isfinite().all() for t in weights(tmp_path, 8).values())
    assert stored(tmp_path, 8)["faulty_steps"] == 4


def test_a_first_step_that_is_skipped_leaves_no_momentum(processes, tmp_path):
    # torch's fused SGD would go on from an uninitialised buffer.
    spec = job(
        "steep",
        model={"precision": "fp16"},
        length={"steps": 2},
        batch={"global_batch": 103, "micro_batch": 9},
    )
    processes(1).run(train_in_process, spec, tmp_path)
    assert metrics(tmp_path)[0]["train/skipped_steps"] == 1
    assert weights(tmp_path, 1, "optimizer") == {}


def test_a_step_that_is_skipped_when_a_layer_is_unfrozen_leaves_no_momentum(processes, tmp_path):
    bad = first_step_with(BAD_ROW)
    late = {"match": "0.*", "unfreeze_at_step": bad - 1}
    spec = job(
        "nan_row",
        optimizer=OPTIMIZERS["decided by the kernel"] | {"groups": [late, {"match": "*"}]},
        faults={"on_non_finite": "skip", "skips_allowed": 4},
    )
    processes(1).run(train_in_process, spec, tmp_path)
    names = [set(weights(tmp_path, step, "optimizer")) for step in (bad - 1, bad, bad + 1)]
    assert names[0] == names[1] < names[2]


@pytest.mark.parametrize("count", [1, 3])
def test_a_loss_that_is_not_finite_stops_with_its_place(processes, tmp_path, count):
    spec = job("nan_row", tracking={"log_every_steps": 100}, checkpoint={"every_steps": 4})
    endings = processes(count).run(ended, spec, tmp_path)
    assert len(set(endings)) == 1, "all processes say the same"
    code, told = endings[0]
    assert code == 42
    bad = first_step_with(BAD_ROW)
    found = re.match(
        rf"The loss is not finite at step {bad} "
        r"\(micro-batch (\d) on rank (\d): nan, rows (.*)\)\.",
        told,
    )
    assert found, told
    micro_batch, rank = int(found[1]), int(found[2])
    assert micro_batch in share_of(6, index=rank, of=count)
    order = rows_at(np.arange(200), rows=103, seed=3).tolist()
    first = (bad - 1) * 50 + micro_batch * 9
    rows = order[first : min(first + 9, bad * 50)]
    assert BAD_ROW in rows
    assert found[3].startswith(", ".join(map(str, rows[:8])))
    # It is looked for before anything is saved.
    assert not list((tmp_path / "job" / "checkpoints").glob("step-*"))


@pytest.mark.parametrize("answer", ["stop", "skip"])
def test_a_gradient_that_is_not_finite_is_named_though_every_loss_is(processes, tmp_path, answer):
    spec = job("root_of_zero", faults={"on_non_finite": answer, "skips_allowed": 1})
    endings = processes(2).run(ended, spec, tmp_path)
    assert len(set(endings)) == 1
    code, told = endings[0]
    assert code == 42
    first = first_step_with(BAD_ROW)
    second = first_step_with(BAD_ROW, epoch=1)
    where = first if answer == "stop" else second
    assert f"The gradients of step {where} are not finite, although every loss is." in told
    if answer == "skip":
        assert told.startswith("2 steps were skipped, and faults.skips_allowed is 1.")
        assert all(t.isfinite().all() for t in weights(tmp_path, second - 1).values())


def test_fp16_whose_gradients_are_never_finite_ends(processes, tmp_path):
    spec = job(
        "root_of_zero",
        model={"precision": "fp16"},
        length={"steps": 200},
        checkpoint={},
        batch={"global_batch": 103, "micro_batch": 50},
    )
    ((code, told),) = processes(1).run(ended, spec, tmp_path)
    assert code == 42
    assert "not finite at any scale" in told


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_steps_without_any_gradient_are_logged_and_clipped(processes, tmp_path, precision):
    late = {"name": "sgd", "lr": 0.1, "groups": [{"match": "*", "unfreeze_at_step": 3}]}
    spec = job("images", optimizer=late, max_grad_norm=1.0, model={"precision": precision})
    processes(1).run(train_in_process, spec, tmp_path)
    first, *_, last = read_metrics(tmp_path / "job/metrics.jsonl")
    assert (first["train/grad_norm"], last["train/grad_norm"] > 0) == (0, True)


def test_a_step_without_weight_has_no_mean_loss_and_is_not_skipped(processes, tmp_path):
    faults = {"on_non_finite": "skip", "skips_allowed": 100}
    ((code, _),) = processes(1).run(ended, job("weightless", faults=faults), tmp_path)
    assert code == 0
    rows = list(read_metrics(tmp_path / "job/metrics.jsonl"))
    assert not any("train/loss" in row for row in rows)
    assert {row.get("train/skipped_steps") for row in rows} == {0}


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        (
            {"model": {"batchnorm": "local"}, "faults": {"on_non_finite": "skip"}},
            "faults.on_non_finite: skip needs model.batchnorm: micro",
        ),
        (
            {"optimizer": {"name": "lbfgs", "lr": 1.0}, "faults": {"on_non_finite": "skip"}},
            "faults.on_non_finite: skip may skip a step, and LBFGS evaluates the loss several",
        ),
    ],
)
def test_what_cannot_be_skipped_is_refused(processes, tmp_path, sections, told):
    ((code, said),) = processes(1).run(ended, job("images", **sections), tmp_path)
    assert code == 64
    assert said.startswith(told)
    assert not (tmp_path / "job").exists()


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_gradients_are_clipped_by_their_true_length(processes, tmp_path, precision):
    spec = job(
        "images",
        model={"precision": precision},
        optimizer={"name": "sgd", "lr": 1.0},
        max_grad_norm=0.01,
        length={"steps": 2},
    )
    processes(2).run(train_in_process, spec, tmp_path)
    norms = [row["train/grad_norm"] for row in metrics(tmp_path)]
    assert all(1.0 < norm < 100 for norm in norms), "the length before clipping, without a scale"
    assert length_of_update(tmp_path, 2) == pytest.approx(0.01, rel=1e-3)


def test_gradients_are_clipped_by_value_and_then_by_length(processes, tmp_path):
    spec = job("images", optimizer={"name": "sgd", "lr": 1.0}, length={"steps": 2})
    for count in (1, 3):
        runs = tmp_path / str(count)
        processes(count).run(train_in_process, spec | {"max_grad_value": 1e-3}, runs)
        assert farthest(*parameters(runs, 2)) == pytest.approx(1e-3, rel=1e-3)
    assert farthest(weights(tmp_path / "1", 2), weights(tmp_path / "3", 2)) < 1e-5
    both = spec | {"max_grad_value": 1e-3, "max_grad_norm": 1e-3}
    processes(1).run(train_in_process, both, tmp_path / "both")
    assert length_of_update(tmp_path / "both", 2) == pytest.approx(1e-3, rel=1e-3)
    assert metrics(tmp_path / "both")[1]["train/grad_norm"] > 0.1


def parameters(runs: Path, step: int):
    """(before, after) the step, without BatchNorm's statistics."""
    return [
        {k: v for k, v in weights(runs, s).items() if "running" not in k and "tracked" not in k}
        for s in (step - 1, step)
    ]


def length_of_update(runs: Path, step: int) -> float:
    before, after = parameters(runs, step)
    return math.sqrt(sum((after[k] - before[k]).double().square().sum().item() for k in after))
