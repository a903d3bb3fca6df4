"""What a run always says of itself: memory, operations a second, and which process is slow."""

import re
import subprocess
import sys
import time

import features
import pytest
import torch
from commands import CLEAN, evenstep
from jobs import cut_of_digits, spec_of, train_in_process
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from service.data.task import supervised
from service.distributed.stragglers import Stopwatch, StragglerDetector
from service.health.heartbeat import Heartbeat
from service.health.throughput import Throughput
from service.optimization.flops import FlopCount, cost_of_fp32, known_peak, peak_flops
from service.runs.tracking import read_metrics

SLOW = """
import os
import torch
from torch import nn
from service.recipes import digits
from service.data.task import supervised

class Slow(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = digits.network(8, 0.0)
    def forward(self, images):
        if os.environ.get("RANK") == "1":
            torch.linalg.svd(torch.ones(250, 250))
        return self.inner(images)

train, test = digits.split_by_class(*digits.load())
task = supervised(model=Slow, train=train, test=test, measures=("accuracy",))
"""
SPEC = """
name: slow
task: ./slow.py:task
batch: {global_batch: 96, micro_batch: 16}
length: {steps: 20}
optimizer: {name: sgd, lr: 0.05}
tracking: {log_every_steps: 4}
"""


def test_who_is_as_slow_as_half_of_the_others_is_not_the_slow_one(alone):
    throughput, stopwatch = Throughput(Heartbeat()), Stopwatch(alone.device)
    stragglers = StragglerDetector(
        alone, rounds=1, throughput=throughput, stopwatch=stopwatch, say=print
    )
    seconds = [[0.3, 0.0], [0.1, 0.0], [0.29, 0.0], [0.29, 0.0]]
    assert "system/slowest_rank" not in stragglers.reading(seconds)
    alike = [[0.3, 0.0], [0.1, 0.0], [0.11, 0.0], [0.11, 0.0]]
    found = stragglers.reading(alike)
    assert (found["system/slowest_rank"], found["system/slowest_ratio"]) == (0, 2.727)


def test_a_slow_rank_is_named_in_the_record_and_once_on_the_screen(tmp_path):
    (tmp_path / "slow.py").write_text(SLOW)
    (tmp_path / "slow.yaml").write_text(SPEC)
    done = evenstep("run", "slow.yaml", "--processes", 3, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = read_metrics(tmp_path / "runs/slow/metrics.jsonl")
    assert [row["system/slowest_rank"] for row in rows] == [1] * 5
    assert min(row["system/slowest_ratio"] for row in rows) >= 1.3
    (said,) = re.findall(r"^Rank 1 on \S+ is a straggler: .*$", done.stdout, re.M)
    assert "times as long" in said
    assert "--profile" in said


class SlowlyRead:
    """Rows that take one process long to read."""

    def __init__(self, images, labels, slow):
        self.images, self.labels, self.slow = images, labels, slow

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, row):
        if self.slow:
            time.sleep(0.02)
        return self.images[row], self.labels[row]


def slowly_read():
    import os

    images, labels = cut_of_digits().train_data().tensors
    return supervised(
        model=lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)),
        train=SlowlyRead(images, labels, os.environ.get("RANK") == "0"),
        test=torch.utils.data.TensorDataset(images[:50], labels[:50]),
    )


def test_one_who_waits_long_for_its_data_is_slow_too(processes, tmp_path):
    spec = spec_of("slowly_read", task=f"{__file__}:slowly_read", length={"steps": 2})
    processes(2).run(train_in_process, spec, tmp_path)
    rows = read_metrics(tmp_path / "job/metrics.jsonl")
    assert {row["system/slowest_rank"] for row in rows} == {0}


def test_memory_and_operations_are_in_every_row_of_training(processes, tmp_path):
    spec = spec_of("cut_of_digits", length={"steps": 3})
    processes(1).run(train_in_process, spec, tmp_path)
    rows = read_metrics(tmp_path / "job/metrics.jsonl")
    assert len(rows) == 3
    for row in rows:
        assert 0.05 < row["system/peak_memory_gib"] < 16
        a_row = row["system/tflops"] * 1e12 / row["train/rows_per_second"]
        assert a_row == pytest.approx(operations_by_torch(cut_of_digits()), rel=1e-6)
        assert "system/flop_utilization" not in row, "nobody knows what this CPU could do"
        assert "system/slowest_rank" not in row


class Uncountable(nn.Module):
    """Stands for what cannot be traced, such as a kernel of one's own."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(64, 10)

    def forward(self, images):
        assert torch.utils._python_dispatch._get_current_dispatch_mode() is None
        return self.inner(images.flatten(1))


def uncountable():
    rows = cut_of_digits().train_data()
    return supervised(model=Uncountable, train=rows, test=rows)


def test_a_model_that_does_not_bear_the_counting_is_trained_without(processes, tmp_path):
    spec = spec_of("uncountable", task=f"{__file__}:uncountable", length={"steps": 2})
    processes(1).run(train_in_process, spec, tmp_path)
    rows = read_metrics(tmp_path / "job/metrics.jsonl")
    assert len(rows) == 2
    assert not any("system/tflops" in row for row in rows)


def operations_by_torch(task):
    images, labels = task.train_data().tensors
    with FlopCounterMode(display=False) as counter:
        task.loss(task.model()(images[:5]), labels[:5]).sum().backward()
    return counter.get_total_flops() / 5


@pytest.mark.parametrize("name", ["tokens", "network"])
def test_operations_are_counted_as_torch_counts_them(name):
    task = getattr(features, name)(double=False)
    images, labels = task.train_data().tensors
    with FlopCount() as count:
        task.loss(task.model()(images[:5]), labels[:5]).sum().backward()
    assert count.total / 5 == operations_by_torch(task) > 0


def test_the_peak_of_a_device_is_known_by_its_name():
    assert known_peak("NVIDIA H100 80GB HBM3", "bf16") == 989e12
    assert known_peak("NVIDIA H100 PCIe", "bf16") == 756e12
    assert known_peak("NVIDIA A100-SXM4-80GB", "tf32") == 156e12
    assert known_peak("NVIDIA L40S", "fp16") == 362e12
    assert known_peak("Tesla V100-SXM2-32GB", "tf32") is None
    assert known_peak("NVIDIA A1000", "fp32") is None
    assert known_peak("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16") is None, "a part of an H100"
    assert peak_flops(torch.device("cpu"), "fp32") is None


def test_what_full_float32_costs_is_reported_where_it_is_known():
    told = cost_of_fp32("NVIDIA H100 80GB HBM3")
    assert told.endswith("67 TFLOP/s of float32 products, 494 in tf32, 989 in bf16.")
    assert cost_of_fp32("Tesla T4").endswith("8.1 TFLOP/s of float32 products, 65 in bf16.")
    assert cost_of_fp32("NVIDIA H100 80GB HBM3 MIG 1g.10gb") is None
    assert cost_of_fp32("") is None, "a CPU"


THREADS_OF_PASSES = """
import sys
import torch
from service.distributed.world import in_place

for flops in sys.argv[1:]:
    world = in_place(precision="fp32")
    torch.set_num_threads(2)
    world.suit_threads(*map(eval, flops.split()))
    print(torch.get_num_threads())
"""


@pytest.mark.parametrize(
    ("given", "threads"),
    [
        (None, {"3e7": 1, "3e7 1e6": 1, "3e7 4.8e6": 2, "3e9": 2, "None": 2}),
        ("2", {"3e7": 2}),
    ],
)
def test_a_small_pass_is_computed_on_one_thread_unless_somebody_said_how_many(
    tmp_path, given, threads
):
    environ = {key: value for key, value in CLEAN.items() if key != "OMP_NUM_THREADS"}
    environ |= {"EVENSTEP_DEVICE": "cpu"} | ({} if given is None else {"OMP_NUM_THREADS": given})
    words = [sys.executable, "-c", THREADS_OF_PASSES, *threads]
    done = subprocess.run(words, cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert done.stdout.split() == [str(each) for each in threads.values()], done.stderr


THREADS = """
import torch
from torch import nn
from torch.utils.data import TensorDataset

from service.data.task import supervised
from service.distributed.world import in_place
from service.health.heartbeat import Heartbeat
from service.plan.plan import make_plan
from service.spec.files import load_spec
from service.training.setup import prepare_training


class Read(TensorDataset):
    def __getitem__(self, row):
        return super().__getitem__(row)


def threads(numbers, workers):
    rows = Read(torch.zeros(4, numbers), torch.zeros(4, dtype=torch.long))
    pooled = lambda: nn.Sequential(nn.AvgPool1d(1000), nn.Linear(numbers // 1000, 2))
    task = supervised(model=pooled, train=rows, test=rows)
    spec = load_spec({
        "name": "job", "task": "here:task", "length": {"steps": 1},
        "batch": {"global_batch": 4, "micro_batch": 4}, "loader": {"workers": workers},
        "optimizer": {"name": "sgd", "lr": 0.1},
    })
    torch.set_num_threads(2)
    plan = make_plan(spec, processes=1, train_rows=4, test_rows=4)
    world = in_place(precision="fp32")
    torch.set_num_threads(2)
    prepare_training(plan, task, world, heartbeat=Heartbeat(), say=print)
    return torch.get_num_threads()


print(threads(10_000, 0), threads(1_100_000, 0), threads(1_100_000, 1))
"""


def test_inputs_of_millions_of_numbers_have_two_threads_unless_workers_need_the_cores(tmp_path):
    environ = {key: value for key, value in CLEAN.items() if key != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-c", THREADS],
        cwd=tmp_path,
        env=environ | {"EVENSTEP_DEVICE": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["1", "2", "1"], done.stderr
