"""`batch.micro_batch: auto`: found in memory, agreed, written down, and kept."""

import json
import math
import os
import resource
from pathlib import Path

import psutil
import pytest
import torch
from commands import evenstep
from jobs import plan_of, spec_of
from torch import nn
from torch.utils.data import TensorDataset

from service.basics.errors import DataBroken, OutOfMemory
from service.basics.limits import workers_each
from service.data.loading import workers_with_room
from service.data.task import load_task, supervised
from service.plan.plan import largest_micro_batch, make_plan
from service.spec.files import load_spec
from service.training.batch_size_finder import _held_besides, _in_equal_parts, fitting_rows

MEGABYTE = 10**6


def wide():
    """One number a row, and some 8 MB of activations."""
    rows = TensorDataset(torch.randn(256, 1), torch.randint(0, 3, (256,)))
    return supervised(
        model=lambda: nn.Sequential(
            nn.Linear(1, MEGABYTE), nn.ReLU(), nn.AdaptiveAvgPool1d(9), nn.Linear(9, 3)
        ),
        train=rows,
        test=rows,
    )


def wide_spec(**batch):
    return spec_of(
        "wide", task=f"{__file__}:wide", batch={"global_batch": 200, "micro_batch": "auto"} | batch
    )


def rows_that_fit(world, spec, megabytes):
    loaded = load_spec(spec)
    return fitting_rows(
        loaded,
        task=load_task(loaded.task, loaded.task_args),
        world=world,
        processes=world.processes,
        memory_bytes=megabytes[world.index] * MEGABYTE,
    )


def test_what_does_not_fit_in_main_memory_is_not_tried(processes):
    [rows] = processes(1).run(rows_that_fit, wide_spec(), [600])
    assert 4 <= rows <= 60  # 200 rows take well over 1.6 GB
    [few] = processes(1).run(rows_that_fit, wide_spec(global_batch=10), [10_000])
    assert few == 10


def test_all_processes_take_what_fits_in_the_smallest(processes):
    rows = processes(2).run(rows_that_fit, wide_spec(), [4000, 300])
    assert rows[0] == rows[1] <= 30


def test_several_processes_reserve_one_more_set_of_gradients():
    """While DistributedDataParallel arranges its buckets anew, the old ones exist too."""
    model = nn.Linear(10, 7)
    optimizer = torch.optim.AdamW(model.parameters())
    plan = make_plan(load_spec(wide_spec()), processes=2, train_rows=256, test_rows=256)
    one, two = (_held_besides(model, optimizer, plan, processes=count) for count in (1, 2))
    assert two - one == 4 * 77


def rows_below_a_limit(world, spec):
    """With an address space that leaves room for 700 MB more; the allocator itself says no."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(
        resource.RLIMIT_AS, (psutil.Process().memory_info().vms + 700 * MEGABYTE, hard)
    )
    try:
        return unlimited(world, spec)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def test_a_pass_that_runs_out_of_memory_ends_the_search(processes):
    [rows] = processes(1).run(rows_below_a_limit, wide_spec())
    assert 1 <= rows <= 80


def rows_with_a_limit_on_one(world, spec):
    return rows_below_a_limit(world, spec) if world.index == 1 else unlimited(world, spec)


def unlimited(world, spec):
    return rows_that_fit(world, spec, [10**6] * world.processes)


SHARDED = {"exchange": {"mode": "sharded"}}


def test_a_sharded_model_takes_what_fits_in_the_smallest_process(processes):
    rows = processes(2).run(rows_that_fit, wide_spec() | SHARDED, [4000, 300])
    assert rows[0] == rows[1] <= 30


def test_one_process_that_runs_out_of_memory_leaves_no_other_in_an_exchange(processes):
    spec = wide_spec() | SHARDED
    rows = processes(2).run(rows_with_a_limit_on_one, spec)
    assert rows[0] == rows[1] <= 80
    assert processes(2).run(
        unlimited, spec | {"batch": {"global_batch": 10, "micro_batch": "auto"}}
    ) == [5, 5]


def huge():
    rows = TensorDataset(torch.randn(20, 1), torch.randint(0, 3, (20,)))

    class Huge(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(1, 3)

        def forward(self, values):
            return self.inner(values) + torch.zeros(len(values), 10**12).sum()

    return supervised(model=Huge, train=rows, test=rows)


def says_no(world, spec):
    with pytest.raises(OutOfMemory, match="one row"):
        rows_that_fit(world, spec, [10**6])
    return True


def test_a_model_too_large_for_one_row_is_reported(processes):
    spec = spec_of(
        "huge", task=f"{__file__}:huge", batch={"global_batch": 10, "micro_batch": "auto"}
    )
    assert processes(1).run(says_no, spec) == [True]


@pytest.mark.parametrize("processes_meant", [1, 2, 3, 7, 8])
@pytest.mark.parametrize("global_batch", [8, 50, 96, 517])
def test_micro_batches_are_equal_parts_for_every_process(global_batch, processes_meant):
    most = largest_micro_batch(global_batch, processes_meant)
    for fits in range(1, most + 1):
        rows = _in_equal_parts(global_batch, fits, processes_meant)
        pieces = math.ceil(global_batch / rows)
        assert 1 <= rows <= fits
        assert pieces >= processes_meant
        # No process computes longer for it: as many passes as with the largest that fits.
        largest_first = math.ceil(global_batch / fits)
        assert math.ceil(pieces / processes_meant) <= math.ceil(largest_first / processes_meant)


def test_the_run_keeps_what_was_found(tmp_path):
    auto = ("run", "digits", "batch.micro_batch=auto", "tracking.wandb=")
    first = evenstep(*auto, "--processes", 2, "--stop-at", 3, cwd=tmp_path)
    assert first.returncode == 75, first.stderr
    assert "batch.micro_batch: auto found 48 rows, for all of this run." in first.stdout
    assert "in micro-batches of 48" in first.stdout
    run = tmp_path / "runs/digits"
    assert load_spec(run / "spec.yaml").batch.micro_batch == 48
    alone = evenstep(*auto, "--stop-at", 5, cwd=tmp_path)
    assert alone.returncode == 75, alone.stderr
    assert "auto found" not in alone.stdout
    assert "in micro-batches of 48" in alone.stdout
    larger = evenstep(*auto, "batch.global_batch=100", cwd=tmp_path)
    assert larger.returncode == 64
    assert "batch.global_batch: 96 -> 100" in larger.stderr
    other = evenstep("run", "digits", "batch.micro_batch=32", cwd=tmp_path)
    assert other.returncode == 64
    assert "batch.micro_batch: 48 -> 32" in other.stderr
    attempts = json.loads((run / "run.json").read_text())["attempts"]
    assert [attempt["processes"] for attempt in attempts] == [2, 1]


def test_plan_and_check_report_the_result(tmp_path):
    plan = plan_of("digits", "batch.micro_batch=auto", runs=tmp_path / "runs", processes=2)
    assert "48 rows if they fit in memory: the run tests this" in plan
    check = evenstep("check", "digits", "batch.micro_batch=auto", cwd=tmp_path)
    assert check.returncode == 0, check.stderr
    assert "fitting     micro-batches of 96 rows" in check.stdout
    assert not Path(tmp_path / "runs").exists()


def test_workers_are_settled_with_the_run_too(tmp_path):
    done = evenstep("run", "digits", "loader.workers=auto", "--stop-at", 2, cwd=tmp_path)
    assert done.returncode == 75, done.stderr
    assert load_spec(tmp_path / "runs/digits/spec.yaml").loader.workers == workers_each(1)


class Photos:
    """Rows that are read one at a time, of 1,016 bytes with their target."""

    def __len__(self):
        return 1000

    def __getitem__(self, row):
        return torch.zeros(1008, dtype=torch.uint8), torch.tensor(row % 3)


def photos():
    return supervised(model=lambda: nn.Linear(1008, 3), train=Photos(), test=())


def test_workers_by_default_take_at_most_half_of_the_shared_memory():
    def room_for(rows, task=None):
        loaded = load_spec(spec_of("photos", batch={"global_batch": rows}))
        return workers_with_room(photos() if task is None else task, loaded)

    disk = os.statvfs("/dev/shm")
    rows = disk.f_bavail * disk.f_frsize // 2 // (2 * 1016)  # read ahead by one worker, 2 steps
    assert room_for(rows * 10 // 35) == 3
    assert room_for(rows * 2) == 0
    assert room_for(8, wide()) == 0, "rows in memory need no workers"
    with pytest.raises(DataBroken, match="the file is gone"):
        room_for(8, broken())


class Gone(Photos):
    def __getitem__(self, row):
        raise OSError("the file is gone")


def broken():
    return supervised(model=lambda: nn.Linear(1, 3), train=Gone(), test=())
