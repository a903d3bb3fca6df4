"""Models, steps and streams that draw, change or use something only later or elsewhere."""

import json
import random
import re
from functools import partial
from pathlib import Path

import own_steps
import pytest
import test_own_steps
import torch
import unusual_models
from commands import evenstep
from jobs import difference, furthest, rows_of, same_bits, train_in_process, weights
from processes import ProcessesFailed

import service
from service.basics.errors import SpecError
from service.distributed.world import alone

job = partial(test_own_steps.job, of=Path(unusual_models.__file__))


UNUSUAL = [
    ("late_draws", {}),
    ("random_update", {}),
    *(("stream", {"kind": kind}) for kind in ("shuffled", "by_epoch", "in_set_epoch")),
    *(("stream", {"kind": kind}) for kind in ("with_state", "skipping", "noisy")),
    ("learned_temperature", {}),
    ("supervised_contrast", {}),
    ("buffer_of_update", {}),
]


@pytest.mark.parametrize(("factory", "arguments"), UNUSUAL)
def test_neither_the_number_of_processes_nor_a_stop_changes_anything(
    processes, tmp_path, factory, arguments
):
    spec = job(factory, task_args=arguments)
    for count in (1, 3):
        processes(count).run(train_in_process, spec, tmp_path / str(count))
    assert difference(tmp_path / "1", tmp_path / "3") < 1e-12
    test_own_steps.assert_same_rows(tmp_path / "1", tmp_path / "3")
    for count, of in ((1, 1), (3, 3)):
        for stop in (5, None):
            processes(count).run(train_in_process, spec, tmp_path / f"cut-{of}", stop)
        whole, cut = weights(tmp_path / str(of)), weights(tmp_path / f"cut-{of}")
        assert same_bits(whole, cut)


@pytest.mark.parametrize("sections", [{"exactness": "bitwise"}, {"exchange": {"mode": "sharded"}}])
def test_a_parameter_that_only_a_loss_of_all_rows_uses_is_trained(processes, tmp_path, sections):
    spec = job("learned_temperature", task_args={"shape": [1]}, **sections)
    for count in (1, 2):
        processes(count).run(train_in_process, spec, tmp_path / str(count))
    assert difference(tmp_path / "1", tmp_path / "2") < 1e-12
    assert abs(weights(tmp_path / "1")["scale"].item() - 1) > 1e-3


def test_its_gradient_does_not_depend_on_how_the_batch_is_divided(processes, tmp_path):
    for size in (5, 23):
        batch = {"global_batch": 23, "micro_batch": size}
        spec = job("learned_temperature", batch=batch)
        processes(1).run(train_in_process, spec, tmp_path / str(size))
    assert difference(tmp_path / "5", tmp_path / "23") < 1e-12


@pytest.mark.parametrize("factory", ["fourier", "noisy_in_numpy"])
def test_a_test_of_a_run_measures_what_the_run_did(processes, tmp_path, factory):
    processes(1).run(train_in_process, job(factory), tmp_path / "runs")
    done = evenstep("test", "job", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    measured = {k: v for k, v in rows_of(tmp_path / "runs")[-1].items() if k.startswith("test/")}
    assert json.loads(done.stdout.splitlines()[-1]) == pytest.approx(measured)


def test_a_model_of_a_run_is_the_one_that_was_trained(processes, tmp_path):
    processes(1).run(train_in_process, job("fourier"), tmp_path)
    before = random.getstate(), torch.get_rng_state()
    model = service.read_history(tmp_path / "job").model()
    assert (random.getstate(), torch.get_rng_state().tolist()) == (before[0], before[1].tolist())
    rows, labels = own_steps.classified()[1].tensors
    with torch.no_grad():
        accuracy = model(rows).argmax(1).eq(labels).double().mean().item()
    assert accuracy == pytest.approx(rows_of(tmp_path)[-1]["test/accuracy"])


@pytest.mark.parametrize(
    ("factory", "arguments", "told"),
    [
        ("late_buffer", {}, "The buffers mean began to change after the first pass of the run"),
        ("taught", {}, "the forward pass itself changes teacher.0.weight, teacher.0.bias"),
        ("taught", {"hidden": True}, "the forward pass itself changes teacher.0.weight"),
        ("drifting", {}, "the forward pass itself changes head.bias"),
        ("limited_embedding", {}, "the forward pass itself changes 0.weight"),
    ],
)
def test_what_several_processes_cannot_keep_equal_is_refused_by_name(
    processes, tmp_path, factory, arguments, told
):
    spec = job(factory, task_args=arguments)
    with pytest.raises(ProcessesFailed, match=re.escape(told)) as failed:
        processes(2).run(train_in_process, spec, tmp_path / "2")
    assert str(failed.value).count(told) >= 2, "both processes end with it"
    for stop in (5, None):
        processes(1).run(train_in_process, spec, tmp_path / "1", stop)
    processes(1).run(train_in_process, spec, tmp_path / "whole")
    assert same_bits(weights(tmp_path / "1"), weights(tmp_path / "whole"))


def test_what_every_process_writes_in_the_same_way_is_not_refused(processes, tmp_path, capsys):
    for count in (1, 3):
        processes(count).run(train_in_process, job("rewriting"), tmp_path / str(count))
    found = [weights(tmp_path / str(count)) for count in (1, 3)]
    for of_count in found:
        del of_count["tests"]  # counts the passes of each process's tests
    assert furthest(*found) < 1e-12
    train_in_process(alone(), job("rewriting", length={"steps": 1}), tmp_path / "told")
    assert "is an attribute" not in capsys.readouterr().out


def test_a_buffer_of_each_process_may_begin_to_change_at_any_time(processes, tmp_path):
    spec = job("late_buffer", model={"buffers": "local"})
    processes(2).run(train_in_process, spec, tmp_path)
    assert len(rows_of(tmp_path)) == 12


def test_a_check_tells_what_needs_one_process(tmp_path):
    (tmp_path / "job.yaml").write_text(json.dumps(job("taught")))
    looked = evenstep("check", "job.yaml", cwd=tmp_path)
    assert looked.returncode == 0, looked.stderr
    assert "the forward pass itself changes teacher.0.weight" in looked.stdout + looked.stderr


def test_attributes_that_change_are_told_of(tmp_path, capsys):
    train_in_process(alone(), job("counting", length={"steps": 2}), tmp_path)
    told = capsys.readouterr().out
    assert "WARNING: calls, mean changes in training, and is an attribute" in told, told


def test_a_pass_that_is_only_for_a_collective_leaves_no_statistics(processes, tmp_path):
    spec = job("normalized_hard", exchange={"mode": "sharded"})  # 3 and 2 micro-batches
    for count in (1, 2):
        processes(count).run(train_in_process, spec, tmp_path / str(count))
    assert difference(tmp_path / "1", tmp_path / "2") < 1e-12


def test_a_mean_over_nothing_is_refused(tmp_path):
    with pytest.raises(SpecError, match="the loss 'some' is a mean over nothing: its weight is 0"):
        train_in_process(alone(), job("mean_over_nothing"), tmp_path)


def test_a_device_is_not_waited_for_to_find_a_mean_over_nothing(simulated, tmp_path):
    with pytest.raises(ProcessesFailed, match=r"The gradients of step \d+ are not finite"):
        simulated(1).run(train_in_process, job("mean_over_nothing"), tmp_path)


def test_a_step_of_which_no_row_counts_changes_nothing(processes, tmp_path):
    few = {"global_batch": 2, "micro_batch": 1}
    spec = job("few_that_count", batch=few, optimizer={"name": "sgd", "lr": 0.1})
    spec["checkpoint"] = {"every_steps": 1, "keep": 50}
    for count in (1, 2):
        processes(count).run(train_in_process, spec, tmp_path / str(count))
    assert difference(tmp_path / "1", tmp_path / "2") < 1e-12
    losses = [row.get("train/loss") for row in rows_of(tmp_path / "1")]
    nothing = [step for step, loss in enumerate(losses, start=1) if loss is None and step > 1]
    assert 0 < len(nothing) < len(losses)
    for step in nothing:
        before, after = weights(tmp_path / "1", step - 1), weights(tmp_path / "1", step)
        assert same_bits(before, after)


@pytest.mark.parametrize("factory", ["whole_rows", "collated_by_name"])
def test_rows_in_memory_have_any_form(processes, tmp_path, factory):
    for kept in (False, True):
        spec = job(factory, loader={"in_memory": kept})
        processes(1).run(train_in_process, spec, tmp_path / str(kept))
    assert difference(tmp_path / "True", tmp_path / "False") < 1e-12


def test_values_of_sparse_gradients_are_clipped(processes, tmp_path):
    for count, most in ((1, 0.01), (2, 0.01), (1, 1000.0)):
        spec = job("bags", max_grad_value=most, optimizer={"name": "sgd", "lr": 0.1})
        processes(count).run(train_in_process, spec, tmp_path / f"{count}-{most}")
    assert difference(tmp_path / "1-0.01", tmp_path / "2-0.01") < 1e-12
    assert difference(tmp_path / "1-0.01", tmp_path / "1-1000.0") > 1e-3
