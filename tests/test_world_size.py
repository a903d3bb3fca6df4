"""The number of processes is not part of the experiment."""

from pathlib import Path

import pytest
from jobs import spec_of, train_in_process
from safetensors.torch import load_file

from service.runs.receipt_file import read_receipt
from service.runs.tracking import read_metrics

STEPS = 40


def final(runs: Path, name: str = "job"):
    checkpoint = runs / name / "checkpoints" / f"step-{STEPS:08d}"
    return load_file(checkpoint / "model.safetensors")


def largest_difference(a, b):
    assert a.keys() == b.keys()
    return max((a[k].double() - b[k].double()).abs().max().item() for k in a)


def losses(runs: Path, name: str = "job"):
    rows = read_metrics(runs / name / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    return [row["train/loss"] for row in rows]


@pytest.fixture(scope="module", params=["float64", "float32"])
def precision(request):
    return request.param


@pytest.fixture(scope="module")
def runs(precision, processes, tmp_path_factory):
    """The same job at 1, 2, 3 and 5 processes, dropout and BatchNorm included."""
    spec = spec_of("cut_of_digits", task_args={"double": precision == "float64"})
    places = {}
    for count in (1, 2, 3, 5):
        places[count] = tmp_path_factory.mktemp(f"{precision}-{count}")
        processes(count).run(train_in_process, spec, places[count])
    return places


@pytest.mark.parametrize("count", [2, 3, 5])
def test_every_step_takes_the_same_rows(runs, count):
    alone = read_receipt(runs[1] / "job" / "receipt.jsonl")
    assert len(alone) == STEPS
    assert len(set(alone.values())) == STEPS
    assert read_receipt(runs[count] / "job" / "receipt.jsonl") == alone


@pytest.mark.parametrize("count", [2, 3, 5])
def test_losses_and_weights_agree(runs, count, precision):
    bound = {"float64": 1e-9, "float32": 1e-4}[precision]
    assert (
        max(abs(a - b) for a, b in zip(losses(runs[1]), losses(runs[count]), strict=True)) < bound
    )
    assert largest_difference(final(runs[1]), final(runs[count])) < bound


@pytest.mark.parametrize("count", [2, 3, 5])
def test_the_test_measures_agree(runs, count, precision):
    def measures(place):
        last = read_metrics(place / "job" / "metrics.jsonl")[-1]
        return last["test/loss"], last["test/accuracy"]

    loss, accuracy = measures(runs[count])
    assert (loss, accuracy) == pytest.approx(measures(runs[1]), abs=1e-4)


def test_stopped_on_one_process_it_continues_on_three(runs, precision, processes, tmp_path):
    spec = spec_of("cut_of_digits", task_args={"double": precision == "float64"})
    assert processes(1).run(train_in_process, spec, tmp_path, 13) == [None]
    processes(3).run(train_in_process, spec, tmp_path)

    bound = {"float64": 1e-9, "float32": 1e-4}[precision]
    assert read_receipt(tmp_path / "job" / "receipt.jsonl") == read_receipt(
        runs[1] / "job" / "receipt.jsonl"
    )
    assert largest_difference(final(runs[1]), final(tmp_path)) < bound
    assert max(abs(a - b) for a, b in zip(losses(runs[1]), losses(tmp_path), strict=True)) < bound


@pytest.mark.parametrize("count", [1, 3])
def test_stopped_and_resumed_at_one_size_it_ends_in_the_same_bits(
    runs, precision, processes, tmp_path, count
):
    spec = spec_of("cut_of_digits", task_args={"double": precision == "float64"})
    assert processes(count).run(train_in_process, spec, tmp_path, 13) == [None] * count
    processes(count).run(train_in_process, spec, tmp_path)

    assert largest_difference(final(runs[count]), final(tmp_path)) == 0
    assert losses(tmp_path) == losses(runs[count])


def test_each_test_row_counts_once_when_rows_do_not_divide(processes, tmp_path):
    # The measure is 1 for one row in three, by its id: only an exact count gives this fraction.
    spec = spec_of("plain_rows", length={"steps": 3}, test={"micro_batch": 100})
    for count in (1, 3):
        processes(count).run(train_in_process, spec, tmp_path / str(count))
    rows = [read_metrics(tmp_path / str(n) / "job" / "metrics.jsonl")[-1] for n in (1, 3)]
    assert rows[0]["test/accuracy"] * 517 == pytest.approx(
        round(rows[0]["test/accuracy"] * 517), abs=1e-9
    )
    assert rows[0]["test/accuracy"] == rows[1]["test/accuracy"]
