"""Several test sets by name, and a test before the first step."""

import json

import numpy as np
import own_steps
import pytest
import torch
from commands import evenstep
from jobs import rows_of, train_in_process, weights
from test_own_steps import job
from torch.nn import functional as F

from service.basics.errors import SpecError
from service.data.task import custom, supervised
from service.distributed.world import alone
from service.runs.checkpoint_files import best_of
from service.runs.tracking import read_metrics

BEST = {"best": {"measure": "test/ood/accuracy", "mode": "max"}}


@pytest.fixture(scope="module")
def runs(processes, tmp_path_factory):
    """The same job at 1 and 3 processes."""
    places = {count: tmp_path_factory.mktemp(f"tests-{count}") for count in (1, 3)}
    sections = {"checkpoint": BEST, "test": {"every_steps": 6, "micro_batch": 7, "at_start": True}}
    for count, place in places.items():
        processes(count).run(train_in_process, job("two_tests", **sections), place / "runs")
    return places


def test_each_set_has_its_measures_at_any_number_of_processes(runs):
    first, second = (rows_of(runs[count] / "runs") for count in (1, 3))
    for one, other in zip(first, second, strict=True):
        assert one == pytest.approx(other, rel=1e-9, abs=1e-9)
    tested = {key for key in first[-1] if key.startswith("test/")}
    assert tested == {f"test/{s}/{m}" for s in ("val", "ood") for m in ("loss", "accuracy")}


def test_a_set_is_measured_by_its_own_rows(runs):
    model = own_steps.classifier()
    model.load_state_dict(weights(runs[3] / "runs"))
    data = own_steps.two_tests().test_data()
    for name in ("val", "ood"):
        images, labels = data[name].tensors
        expected = F.cross_entropy(model.eval()(images), labels).item()
        assert rows_of(runs[3] / "runs")[-1][f"test/{name}/loss"] == pytest.approx(expected)


def test_the_first_row_is_a_test_before_the_first_step(runs):
    rows = read_metrics(runs[3] / "runs/job/metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(13))
    assert {"test/val/loss", "test/ood/loss"} <= rows[0].keys()
    assert "train/loss" not in rows[0]


def test_the_best_checkpoint_is_that_of_the_set_it_names(runs):
    rows = {row["step"]: row for row in read_metrics(runs[1] / "runs/job/metrics.jsonl")}
    best = max((6, 12), key=lambda step: (rows[step]["test/ood/accuracy"], -step))
    assert best_of(runs[1] / "runs/job/checkpoints") == best


def test_the_command_tests_one_set_or_all(runs):
    done = evenstep("test", "job", "--data", "ood", "--predictions", "far.npy", cwd=runs[1])
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    last = rows_of(runs[1] / "runs")[-1]
    assert told == {k: pytest.approx(v) for k, v in last.items() if k.startswith("test/ood/")}
    assert np.load(runs[1] / "far.npy").shape == (11, 3)
    wrong = evenstep("test", "job", "--data", "odd", cwd=runs[1])
    assert wrong.returncode == 64
    assert "there is no test set 'odd'; did you mean 'ood'?" in wrong.stderr


def test_predictions_name_a_set(runs):
    done = evenstep("test", "job", "--predictions", "all.npy", cwd=runs[1])
    assert done.returncode == 64
    assert "Add --data val or ood" in done.stderr


def test_a_measure_that_fails_ends_the_run_before_its_first_step(tmp_path):
    with pytest.raises(ZeroDivisionError):
        train_in_process(
            alone(), job("broken_test", test={"at_start": True, "micro_batch": 7}), tmp_path
        )
    assert read_metrics(tmp_path / "job/metrics.jsonl") == []


def test_a_step_of_its_own_has_several_tests(tmp_path):
    spec = job("two_tests_by_step", test={}, length={"steps": 2})
    values = train_in_process(alone(), spec, tmp_path)
    assert values is not None
    assert {"test/val/loss", "test/ood/loss"} <= values.keys()


ROWS = torch.utils.data.TensorDataset(torch.zeros(4, 6), torch.zeros(4, dtype=torch.long))


@pytest.mark.parametrize(
    ("tests", "said"),
    [
        ({"a": ROWS, "b": []}, "the test set 'b' is empty"),
        ({"a/b": ROWS}, "but is 'a/b'"),
        ({"a": iter([])}, "can only be iterated"),
    ],
)
def test_a_mistake_in_test_sets_is_one_sentence(tests, said):
    with pytest.raises(SpecError, match=said):
        supervised(model=own_steps.classifier, train=ROWS, test=tests)


def test_no_test_sets_are_no_test():
    task = custom(step=own_steps.each_step, model=own_steps.classifier, train=ROWS, test={})
    assert task.test_rows == 0


def test_a_measure_of_no_set_is_refused(tmp_path):
    best = {"best": {"measure": "test/accuracy", "mode": "max"}}
    with pytest.raises(SpecError, match="the test has no 'test/accuracy'"):
        train_in_process(alone(), job("two_tests", checkpoint=best), tmp_path)
