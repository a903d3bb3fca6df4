"""`evenstep verify`: two runs took the same steps, or the first that differs is named."""

import json
import shutil

import pytest
from commands import evenstep
from features import FEATURES
from jobs import train_in_process

from service.runs.receipt_file import read_weights

JOB = FEATURES["dropout"] | {"length": {"steps": 20}, "tracking": {"log_every_steps": 3}}


@pytest.fixture(scope="module")
def runs(processes, tmp_path_factory):
    """The same job on 1 and 3 processes, and with another seed."""
    place = tmp_path_factory.mktemp("runs")
    for name, count, more in (("one", 1, {}), ("three", 3, {}), ("other", 1, {"seed": 8})):
        processes(count).run(train_in_process, JOB | {"name": name} | more, place)
    return place


def test_runs_at_two_process_counts_are_equal_up_to_rounding(runs):
    done = evenstep("verify", "one", "three", "--tolerance", "1e-9", cwd=runs)
    assert done.returncode == 0, done.stdout
    assert "rows: the same in 20 steps from 1 to 20" in done.stdout
    assert "losses: the same in 7 steps from 3 to 20" in done.stdout


def test_their_bits_are_not(runs):
    done = evenstep("verify", "one", "three", "--level", "bits", cwd=runs)
    assert done.returncode == 1
    assert "differs" in done.stdout


def test_another_order_of_rows_is_found_at_its_first_step(runs):
    done = evenstep("verify", "one", "other", "--level", "rows", cwd=runs)
    assert done.returncode == 1
    assert "rows: step 1 is the first with different rows" in done.stdout


def test_one_swapped_row_is_found_at_its_step(runs, tmp_path):
    shutil.copytree(runs / "one", tmp_path / "bent")
    lines = (tmp_path / "bent/receipt.jsonl").read_text().splitlines()
    bent = json.loads(lines[2])
    assert bent["from"] == 7
    bent["rows"][1] = f"{int(bent['rows'][1], 16) ^ 1:016x}"
    lines[2] = json.dumps(bent)
    (tmp_path / "bent/receipt.jsonl").write_text("\n".join(lines) + "\n")
    done = evenstep("verify", runs / "one", "bent", cwd=tmp_path)
    assert done.returncode == 1
    assert "rows: step 8 is the first" in done.stdout


def test_a_directory_that_is_not_a_run_is_reported(runs):
    told = evenstep("verify", "one", "nothing", cwd=runs)
    assert told.returncode == 64
    assert "error: There is no run nothing" in told.stderr


def test_weights_are_compared_at_checkpoints_that_are_gone(processes, tmp_path):
    job = FEATURES["dropout"] | {
        "length": {"steps": 9},
        "checkpoint": {"every_steps": 2, "keep": 1},
    }
    for name in ("a", "b"):
        processes(1).run(train_in_process, job, tmp_path / name)
    equal = evenstep("verify", "a/job", "b/job", "--level", "bits", cwd=tmp_path)
    assert "weights: the same bits at 5 steps from 2 to 9" in equal.stdout, equal.stdout

    receipt = tmp_path / "b" / "job" / "receipt.jsonl"
    lines = [json.loads(line) for line in receipt.read_text().splitlines()]
    for line in lines:
        if line.get("step") == 4:
            line["weights"]["model.safetensors"] = "0" * 64
    receipt.write_text("".join(json.dumps(line) + "\n" for line in lines))
    other = evenstep("verify", "a/job", "b/job", "--level", "bits", cwd=tmp_path)

    assert other.returncode == 1
    assert "weights: model.safetensors differs at step 4" in other.stdout

    for line in lines:
        if line.get("step") == 4:
            known = read_weights(tmp_path / "a/job/receipt.jsonl")[4]
            line["weights"] = {**known, "average.safetensors": "0" * 64}
    receipt.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for pair in (("a/job", "b/job"), ("b/job", "a/job")):
        one_more = evenstep("verify", *pair, "--level", "bits", cwd=tmp_path)
        assert one_more.returncode == 1
        assert "weights: at step 4, only one of them has average.safetensors" in one_more.stdout


def test_what_is_taken_again_after_a_stop_is_sealed_once(processes, tmp_path):
    job = FEATURES["dropout"] | {"length": {"steps": 9}, "checkpoint": {"every_steps": 2}}
    processes(1).run(train_in_process, job, tmp_path / "whole")
    processes(1).run(train_in_process, job, tmp_path / "cut", 5)
    processes(1).run(train_in_process, job, tmp_path / "cut")

    ended = evenstep("verify", "whole/job", "cut/job", "--level", "bits", cwd=tmp_path)

    assert ended.returncode == 0, ended.stdout
    sealed = read_weights(tmp_path / "cut" / "job" / "receipt.jsonl")
    assert sorted(sealed) == [2, 4, 5, 6, 8, 9]


def _with_gaps(run, place, gaps):
    """A copy of the run whose logged training losses differ by these, in order."""
    shutil.copytree(run, place)
    lines = (place / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    logged = [row for row in rows if "train/loss" in row]
    for row, gap in zip(logged, gaps, strict=True):
        row["train/loss"] += gap * max(1.0, abs(row["train/loss"]))
    (place / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    ("gaps", "grew"),
    [
        ((0.0, 1e-7, 3e-7, 2e-6, 3e-5, 5e-4, 2e-2), True),
        ((0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 2e-2), False),  # at once, from nothing
        ((1e-7, 1e-7, 2e-7, 1e-7, 2e-7, 2e-2, 3e-2), False),  # another cause beside rounding
        ((1e-4, 2e-4, 4e-4, 8e-4, 1e-3, 2e-3, 2e-2), False),  # never of the size of rounding
    ],
)
def test_a_difference_that_grew_from_rounding_is_distinguished_from_others(
    runs, tmp_path, gaps, grew
):
    _with_gaps(runs / "one", tmp_path / "apart", gaps)
    done = evenstep("verify", runs / "one", "apart", "--tolerance", "1e-3", cwd=tmp_path)
    assert done.returncode == 1, done.stdout
    assert "is the first that differs" in done.stdout
    assert ("train/loss: grew from rounding: 1.0e-07 apart at step 6" in done.stdout) is grew
    assert ("grew" in done.stdout) is grew
