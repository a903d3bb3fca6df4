"""A sharded run on a device is the run on the CPU, with its rows on the device or in main memory.

FSDP2 uses streams, events and late copies on a device, and none of them on a CPU.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import compiled_nets
import jobs
import pytest
import simulated_device
import torch
from accelerate import Accelerator
from processes import Processes, ProcessesOf
from test_own_steps import job as job_with_step
from test_sharding import FEATURES, STEPS, difference, job, saved_again, saved_files

from service.basics.errors import SpecError
from service.data.loading import sample
from service.data.task import load_task
from service.distributed.world import World
from service.health.heartbeat import Heartbeat
from service.plan.plan import make_plan
from service.preview.plan import planned
from service.runs.checkpoint_files import checkpoints_in, damage_of
from service.sharding.sharding import own_rows
from service.spec.files import load_spec
from service.training.batch_size_finder import fitting_rows
from service.training.setup import prepare_training
from service.training.train_step import summed_loss

OFFLOADED = {"mode": "sharded", "offload": True}


@pytest.fixture(scope="module")
def devices() -> Iterator[ProcessesOf]:
    """As `simulated`, for processes that then see one device each."""
    pools: dict[int, Processes] = {}
    yield lambda count: pools.setdefault(count, Processes(count, device="sim"))
    for pool in pools.values():
        pool.close()


def on_device(world: World, act: Callable[..., Any], *args: Any) -> Any:
    """The result on the first device: FSDP2 compares its index with that of each tensor."""
    torch.sim.set_device(0)
    return act(World(Accelerator(), device=torch.device("sim", 0)), *args)


def trained(world: World, *args: Any) -> Any:
    return on_device(world, jobs.train_in_process, *args)


SHOWN = (
    "AdamW, clipped",
    "SGD, clipped by value",
    "groups, one frozen and one for a while",
    "a step skipped",
    "parameters kept until the backward pass",
    "gradients summed after each micro-batch",
    "moving average, BatchNorm, early stopping",
    "weights of rows, activations computed again",
)


@pytest.mark.parametrize("feature", SHOWN)
def test_it_is_the_run_of_one_process_on_the_cpu(processes, devices, tmp_path, feature):
    spec = job(**FEATURES[feature])
    processes(1).run(jobs.train_in_process, spec | {"exchange": {"mode": "ddp"}}, tmp_path / "cpu")
    devices(2).run(trained, spec, tmp_path / "sim")
    assert difference(tmp_path / "cpu", tmp_path / "sim") < 1e-9
    spec["exchange"] = spec["exchange"] | {"offload": True}
    devices(2).run(trained, spec, tmp_path / "offloaded")
    assert difference(tmp_path / "cpu", tmp_path / "offloaded") < 1e-9


# Both compute the optimizer's updates by the same kernels: the fused ones are for CPUs only.
SAME_KERNELS: dict[str, dict[str, Any]] = {
    "AdamW, clipped": {"optimizer": {"name": "adamw", "lr": 0.01, "fused": False}},
    "SGD, clipped by value, averaged": {
        "optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9, "fused": False},
        "max_grad_norm": None,
        "max_grad_value": 0.002,
        "model": {"moving_average": 0.9},
    },
    "fp16, BatchNorm, averaged": {
        "task_args": {"double": False, "norm": "batch"},
        "batch": {"global_batch": 29, "micro_batch": 5},
        "optimizer": {"name": "adamw", "lr": 0.01, "fused": False},
        "model": {"precision": "fp16", "moving_average": 0.9},
    },
    "a step skipped": {
        "task_args": {"infinite": True},
        "optimizer": {"name": "adamw", "lr": 0.01, "fused": False},
        "faults": {"on_non_finite": "skip"},
        "max_grad_norm": None,
    },
}


@pytest.mark.parametrize("name", SAME_KERNELS)
def test_offloaded_it_ends_in_the_same_bits(devices, tmp_path, name):
    spec = job(**SAME_KERNELS[name])
    devices(2).run(trained, spec, tmp_path / "device")
    devices(2).run(trained, spec | {"exchange": OFFLOADED}, tmp_path / "host")
    files = saved_files(tmp_path / "device", STEPS)
    assert "model.safetensors" in files
    assert saved_files(tmp_path / "host", STEPS) == files


def test_noise_on_offloaded_weights_is_drawn_as_on_the_device(devices, tmp_path):
    """By the task's `after_update`, with the generator of the device."""
    for place, exchange in (("device", {"mode": "sharded"}), ("host", OFFLOADED)):
        devices(2).run(trained, job_with_step("noisy_update", exchange=exchange), tmp_path / place)
    assert jobs.difference(tmp_path / "device", tmp_path / "host") < 1e-9


def test_hybrid_is_offloaded_too(processes, devices, tmp_path):
    spec = job(**SAME_KERNELS["AdamW, clipped"])
    processes(1).run(jobs.train_in_process, spec | {"exchange": {"mode": "ddp"}}, tmp_path / "cpu")
    hybrid = spec | {"exchange": {"mode": "hybrid", "offload": True}}
    devices(4).run(on_device, jobs.on_nodes, hybrid, tmp_path / "nodes", 2, None)
    assert difference(tmp_path / "cpu", tmp_path / "nodes") < 1e-9


def test_a_run_continues_with_its_rows_in_another_memory(processes, devices, tmp_path):
    spec = job(**SAME_KERNELS["SGD, clipped by value, averaged"])
    devices(2).run(trained, spec, tmp_path / "device")
    place = tmp_path / "moved"
    for exchange, stop in (({"mode": "sharded"}, 4), (OFFLOADED, 7), ({"mode": "sharded"}, None)):
        devices(2).run(trained, spec | {"exchange": exchange}, place, stop)
    assert saved_files(place, STEPS) == saved_files(tmp_path / "device", STEPS)
    place = tmp_path / "elsewhere"
    devices(2).run(trained, spec | {"exchange": OFFLOADED}, place, 4)
    processes(1).run(jobs.train_in_process, job("ddp", **_without_exchange(spec)), place, 6)
    devices(3).run(trained, spec | {"exchange": OFFLOADED}, place)
    assert difference(place, tmp_path / "device") < 1e-9


def _without_exchange(spec: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in spec.items() if key != "exchange"}


@pytest.mark.parametrize("asynchronous", [True, False], ids=["asynchronous", "blocking"])
def test_a_checkpoint_does_not_tell_where_the_rows_were(processes, devices, tmp_path, asynchronous):
    spec = job("ddp", length={"steps": 3}, checkpoint={"asynchronous": asynchronous})
    processes(1).run(jobs.train_in_process, spec, tmp_path / "alone")
    whole = saved_files(tmp_path / "alone", 3)
    assert whole
    again = tmp_path / "again"
    offloaded = spec | {"exchange": OFFLOADED}
    held = devices(2).run(on_device, saved_again, offloaded, tmp_path / "alone", again)
    assert held == [[]] * 2
    assert saved_files(again, 3) == whole
    [checkpoint] = checkpoints_in(again / "job" / "checkpoints")
    assert damage_of(checkpoint) is None


def held_on_device(world: World, spec: dict[str, Any]) -> tuple[int, int, set[str]]:
    """(bytes on the device before it trains, the most in a step, where rows and state are)."""
    loaded = load_spec(spec)
    task = load_task(loaded.task, loaded.task_args, seed=loaded.seed)
    plan = make_plan(
        loaded, processes=world.processes, train_rows=task.train_rows, test_rows=task.test_rows
    )
    gc.collect()
    empty = simulated_device.memory_allocated()
    prepared = prepare_training(plan, task, world, heartbeat=Heartbeat(), say=lambda text: None)
    state = prepared.state
    gc.collect()
    before = simulated_device.memory_allocated() - empty
    simulated_device.reset_peak_memory_stats()
    [exchange] = prepared.exchanges
    batch = sample(prepared.rows.train, task=task, plan=plan, world=world)
    for passed in exchange.sync.over([batch]):
        loss = summed_loss(exchange.sync.model, passed, task=task, world=world)
        exchange.sync.backward(loss, 1.0)
    state.take_step()
    most = simulated_device.max_memory_allocated() - empty
    tensors = list(state.model.parameters())
    tensors += [t for s in state.optimizer.state.values() for t in s.values() if t.dim()]
    return before, most, {own_rows(tensor).device.type for tensor in tensors}


def test_offloaded_rows_take_no_memory_of_the_device(devices):
    net = {"count": 6, "width": 128}
    spec = job(task=f"{compiled_nets.__file__}:blocks", task_args=net)
    [kept, _] = devices(2).run(on_device, held_on_device, spec)
    [gone, _] = devices(2).run(on_device, held_on_device, spec | {"exchange": OFFLOADED})
    model = compiled_nets.Net(6, 0.0, width=128).double()
    rows = sum(p.nbytes for p in model.parameters()) / 2
    unit = sum(p.nbytes for p in model.blocks[0].parameters())
    assert kept[2] == {"sim"}
    assert kept[0] >= rows
    assert kept[1] > 4 * rows, "weights, gradients and the two moments of AdamW"
    assert gone[2] == {"cpu"}
    assert gone[0] == 0
    # Gathered twice, in the message and as parameters; while the next one is fetched ahead.
    assert gone[1] < 4.2 * unit


def rows_that_fit(world: World, spec: dict[str, Any], room: list[int]) -> int:
    """What `micro_batch: auto` finds where each device has so much room."""
    loaded = load_spec(spec)
    task = load_task(loaded.task, loaded.task_args, seed=loaded.seed)
    with of_size(room[world.index]):
        return fitting_rows(
            loaded, task=task, world=world, processes=world.processes, memory_bytes=0
        )


@contextmanager
def of_size(room: int) -> Iterator[None]:
    gc.collect()
    before, held = simulated_device.BYTES, simulated_device.memory_allocated()
    simulated_device.BYTES = held + room
    try:
        yield
    finally:
        simulated_device.BYTES = before


def trained_in(world: World, spec: dict[str, Any], room: list[int], place: Path) -> None:
    with of_size(room[world.index]):
        jobs.train_in_process(world, spec, place)


@pytest.mark.parametrize(
    ("exchange", "room"),
    [({"mode": "sharded"}, 11_200_000), (OFFLOADED, 5_500_000)],
    ids=["device", "host"],
)
def test_a_micro_batch_that_fits_all_devices_is_found_and_trains(devices, tmp_path, exchange, room):
    """The second device runs out of memory in a pass, and the first one does not."""
    spec = job(
        task=f"{compiled_nets.__file__}:blocks",
        task_args={"count": 6, "width": 128},
        batch={"global_batch": 64, "micro_batch": "auto"},
        length={"steps": 2},
        exchange=exchange,
    )
    rooms = [10 * room, room]
    found = devices(2).run(on_device, rows_that_fit, spec, rooms)
    assert found[0] == found[1]
    assert 1 < found[0] < 32
    spec["batch"]["micro_batch"] = found[0]
    devices(2).run(on_device, trained_in, spec, rooms, tmp_path)
    assert (
        devices(2).run(on_device, rows_that_fit, job(**auto_of(spec)), [10 * room] * 2) == [32] * 2
    )


def auto_of(spec: dict[str, Any]) -> dict[str, Any]:
    return spec | {"batch": {"global_batch": 64, "micro_batch": "auto"}}


def test_plan_shows_what_is_held_where(tmp_path):
    one = {"batch": {"global_batch": 29, "micro_batch": 10}}
    told = planned(load_spec(job(exchange=OFFLOADED, **one)), processes=3, runs=tmp_path)
    assert "In main memory a process holds at most 4.38 KiB of weights, 4.38 KiB of grad" in told
    assert "On the device it holds the units that are gathered, the largest of 3.67 KiB; " in told
    told = planned(load_spec(job(exchange=OFFLOADED)), processes=3, runs=tmp_path)
    assert "the largest of 3.67 KiB and 11.6 KiB of gradients; and all activations" in told


def said_before_training(world: World, spec: dict[str, Any]) -> list[str]:
    loaded = load_spec(spec)
    task = load_task(loaded.task, loaded.task_args, seed=loaded.seed)
    plan = make_plan(loaded, processes=1, train_rows=task.train_rows, test_rows=task.test_rows)
    said: list[str] = []
    prepare_training(plan, task, world, heartbeat=Heartbeat(), say=said.append)
    return said


def test_a_single_process_says_that_nothing_is_offloaded(devices):
    [said] = devices(1).run(on_device, said_before_training, job(exchange=OFFLOADED))
    assert said == [
        "WARNING: exchange.offload: a single process shards nothing, so nothing is offloaded."
    ]


def test_main_memory_is_refused_where_weights_are_in_it_anyway(alone, tmp_path):
    with pytest.raises(SpecError, match=r"exchange\.offload: .*computes on the CPU\. Leave it out"):
        jobs.train_in_process(alone, job(exchange=OFFLOADED), tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(SpecError, match=r"exchange\.offload needs exchange\.mode"):
        load_spec(job(exchange={"offload": True}))
