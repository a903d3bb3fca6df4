"""`exactness: bitwise`: the same bits at 1, 2 and 4 processes."""

from pathlib import Path

import pytest
from jobs import spec_of, train_in_process

from service.basics.errors import SpecError
from service.plan.plan import make_plan
from service.runs.tracking import read_metrics, tells_of_speed
from service.spec.files import load_spec

JOB = spec_of(
    "cut_of_digits",
    exactness="bitwise",
    max_grad_norm=0.5,
    optimizer={"name": "adamw", "lr": 0.01},
)


def everything(runs: Path) -> dict[str, bytes]:
    checkpoint = runs / "job" / "checkpoints" / "step-00000040"
    return {p.name: p.read_bytes() for p in checkpoint.glob("*.safetensors")}


def measured(runs: Path):
    rows = read_metrics(runs / "job" / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not tells_of_speed(k)} for row in rows]


@pytest.fixture(scope="module")
def alone(processes, tmp_path_factory):
    place = tmp_path_factory.mktemp("alone")
    processes(1).run(train_in_process, JOB, place)
    return place


@pytest.mark.parametrize("count", [2, 4])
def test_weights_optimizer_and_every_measure_have_the_same_bits(processes, alone, tmp_path, count):
    processes(count).run(train_in_process, JOB, tmp_path)
    assert everything(tmp_path) == everything(alone)
    assert measured(tmp_path) == measured(alone)


def test_the_number_of_processes_may_change_on_the_way(processes, alone, tmp_path):
    for count, stop_at in ((4, 9), (1, 13), (2, 31), (4, None)):
        processes(count).run(train_in_process, JOB, tmp_path, stop_at)
    assert everything(tmp_path) == everything(alone)
    assert measured(tmp_path) == measured(alone)


def test_without_it_the_bits_differ(processes, alone, tmp_path):
    # Otherwise the tests above would prove nothing.
    processes(4).run(train_in_process, JOB | {"exactness": "rounding"}, tmp_path)
    assert everything(tmp_path) != everything(alone)


def test_three_processes_are_refused_with_the_nearest_that_work():
    with pytest.raises(SpecError, match=r"not for 3\. Use 2\."):
        make_plan(load_spec(JOB), processes=3, train_rows=389, test_rows=131)
