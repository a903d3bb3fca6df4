"""A model of which each process holds some rows is trained as one that every process holds."""

from __future__ import annotations

import gc
import json
import math
import mmap
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import features
import numpy as np
import psutil
import pytest
import test_features
import torch
import torch.distributed as dist
from accelerate import Accelerator
from commands import evenstep
from jobs import on_nodes, same_bits, train_in_process
from processes import ProcessesFailed
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import TensorDataset

from service.basics.errors import EvenstepError, SpecError
from service.checkpoints.checkpoints import Checkpoints
from service.data.task import Task, load_task, supervised
from service.distributed.world import World
from service.health.heartbeat import Heartbeat
from service.optimization.train_state import TrainState
from service.plan.plan import make_plan
from service.plan.sampling import weighted
from service.preview.plan import planned
from service.runs.checkpoint_files import checkpoints_in, damage_of
from service.runs.receipt_file import read_receipt
from service.runs.tracking import read_metrics
from service.sharding import deferred_init
from service.sharding.cpu_exchange import GatherInPlace, ReduceScatterInPlace
from service.sharding.deferred_init import NotDeferred, made_deferred
from service.sharding.heap import Heap, Pages, populate
from service.sharding.sharding import is_sharded, own_rows, parameters_by_unit, shard, units_of
from service.spec.files import load_spec
from service.spec.models import ExchangeSpec
from service.training.setup import prepare_training

STEPS = 12
LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


class Block(nn.Module):
    def __init__(self, width: int, norm: str) -> None:
        super().__init__()
        self.inner = nn.Linear(width, 2 * width)
        self.norm = nn.BatchNorm1d(2 * width) if norm == "batch" else nn.LayerNorm(2 * width)
        self.outer = nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(0.2)

    def forward(self, rows: Tensor) -> Tensor:
        return rows + self.dropout(self.outer(torch.relu(self.norm(self.inner(rows)))))


class Net(nn.Module):
    """Blocks between an embedding and a head that share their weights; one parameter has no use."""

    def __init__(self, norm: str) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 10)
        self.scale = nn.Parameter(torch.ones(1))  # fewer rows than processes
        self.unused = nn.Parameter(torch.ones(3))
        self.blocks = nn.ModuleList(Block(10, norm) for _ in range(3))
        self.head = nn.Linear(10, 7)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        rows = self.embedding(tokens).sum(1) * self.scale
        for block in self.blocks:
            rows = block(rows)
        return self.head(rows)


def shared(
    norm: str = "layer",
    weights: bool = False,
    net: str = "Net",
    infinite: bool = False,
    double: bool = True,
) -> Task:
    """Guess the next of seven tokens; of one row the loss is not finite, if that is asked for."""
    tokens = torch.randint(0, 7, (103, 4), generator=torch.Generator().manual_seed(2))
    following = (tokens[:, 0] + tokens[:, 3]) % 7
    following[30] = -1 if infinite else following[30]
    return supervised(
        model=lambda: NETS[net](norm).to(torch.float64 if double else torch.float32),
        train=TensorDataset(tokens[21:], following[21:]),
        test=TensorDataset(tokens[:21], following[:21]),
        loss=_losses if infinite else "cross_entropy",
        measures=("accuracy",),
        weight=(lambda targets: 0.5 + targets.double()) if weights else None,
    )


def _losses(outputs: Tensor, targets: Tensor) -> Tensor:
    each = nn.functional.cross_entropy(outputs, targets.clamp(min=0), reduction="none")
    return each * torch.where(targets < 0, torch.inf, 1.0)


def job(mode: str = "sharded", **sections: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "name": "job",
        "task": f"{__file__}:shared",
        "batch": {"global_batch": 29, "micro_batch": 4},  # eight micro-batches, the last of 1 row
        "length": {"steps": STEPS},
        "optimizer": {"name": "adamw", "lr": 0.01},
        "schedule": {"name": "cosine", "warmup_steps": 3},
        "max_grad_norm": 0.5,
        "tracking": {"log_every_steps": 1},
        "test": {"every_steps": 5, "micro_batch": 6},
        "exchange": {"mode": mode},
    }
    return values | sections


def run_of(place: Path) -> tuple[dict[str, Tensor], list[float], list[float]]:
    """(weights and optimizer state, losses, test losses) of a finished run."""
    run = place / "job"
    rows = read_metrics(run / "metrics.jsonl")
    files = run / "checkpoints" / f"step-{STEPS:08d}"
    tensors = {
        f"{file}:{name}": tensor
        for file in ("model", "optimizer", "average")
        if files.joinpath(f"{file}.safetensors").exists()
        for name, tensor in load_file(files / f"{file}.safetensors").items()
    }
    losses = [row["train/loss"] for row in rows]
    return tensors, losses, [row["test/loss"] for row in rows if "test/loss" in row]


def difference(one: Path, other: Path) -> float:
    (tensors, losses, tests), (others, other_losses, other_tests) = run_of(one), run_of(other)
    assert tensors.keys() == others.keys()
    assert len(losses) == len(other_losses) == STEPS
    assert len(tests) == len(other_tests) == 3
    pairs = zip(losses + tests, other_losses + other_tests, strict=True)
    apart = [(tensors[name].double() - others[name].double()).abs().max() for name in tensors]
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    losses_apart = [abs(a - b) for a, b in pairs if math.isfinite(a) or math.isfinite(b)]
    return max(*losses_apart, *map(float, apart))


FEATURES: dict[str, dict[str, Any]] = {
    "AdamW, clipped": {},
    "SGD, clipped by value": {
        "optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 0.01},
        "max_grad_norm": None,
        "max_grad_value": 0.002,
    },
    "groups, one frozen and one for a while": {
        "optimizer": {
            "name": "adamw",
            "lr": 0.01,
            "no_decay": ["norm", "bias"],
            "groups": [
                {"match": "blocks.0.*", "freeze": True},
                {"match": "blocks.1.*", "lr": 0.001, "unfreeze_at_step": 4},
                {"match": "*"},
            ],
        },
    },
    "BatchNorm, micro": {
        "task_args": {"norm": "batch"},
        "batch": {"global_batch": 29, "micro_batch": 5},
    },
    "a step skipped": {
        "task_args": {"infinite": True},
        "faults": {"on_non_finite": "skip"},
        "max_grad_norm": None,
    },
    "parameters kept until the backward pass": {
        "exchange": {"mode": "sharded", "reshard_after_forward": False, "return_memory": False}
    },
    "gradients summed after each micro-batch": {
        "exchange": {"mode": "sharded", "sync_each_micro_batch": True}
    },
    "moving average, BatchNorm, early stopping": {
        "task_args": {"norm": "batch"},
        "batch": {"global_batch": 29, "micro_batch": 5},
        "model": {"moving_average": 0.9},
        "early_stopping": {"measure": "test/loss", "mode": "min", "patience": 5},
    },
    **{
        name: {"optimizer": {"name": name, "lr": 0.002}, "max_grad_norm": None}
        for name in ("adam", "adagrad", "adadelta", "adamax", "nadam", "radam", "rmsprop")
    },
    "weights of rows, activations computed again": {
        "task_args": {"weights": True},
        "model": {"activation_checkpointing": {"match": "blocks.*"}},
    },
}


@pytest.mark.parametrize("feature", FEATURES)
def test_it_is_the_run_of_one_process(processes, tmp_path, feature):
    spec = FEATURES[feature]
    whole = job(**spec) | {"exchange": {"mode": "ddp"}}
    processes(1).run(train_in_process, whole, tmp_path / "alone")
    processes(3).run(train_in_process, job(**spec), tmp_path / "three")
    assert difference(tmp_path / "alone", tmp_path / "three") < 1e-9
    receipts = [read_receipt(tmp_path / n / "job" / "receipt.jsonl") for n in ("alone", "three")]
    assert receipts[0] == receipts[1]
    assert len(receipts[0]) == STEPS


def test_hybrid_over_two_nodes_is_the_run_of_one_process(processes, tmp_path):
    processes(1).run(train_in_process, job("ddp"), tmp_path / "alone")
    place = tmp_path / "moved"
    each = {"mode": "hybrid", "sync_each_micro_batch": True}
    processes(4).run(on_nodes, job("hybrid") | {"exchange": each}, place, 2, 5)
    processes(3).run(train_in_process, job("sharded"), place, 8)
    processes(4).run(on_nodes, job("hybrid"), place, 2, None)
    assert difference(tmp_path / "alone", place) < 1e-9
    [checkpoint] = [c for c in checkpoints_in(place / "job" / "checkpoints") if c.step == STEPS]
    assert damage_of(checkpoint) is None


def on_own_disks(world: World, spec: dict[str, Any], runs: Path, on_node: int, stop: Any) -> None:
    """A run on nodes of so many processes, each of which has its own directory in `runs`."""
    before, node = os.environ["LOCAL_WORLD_SIZE"], world.index // on_node
    os.environ["LOCAL_WORLD_SIZE"] = str(min(on_node, world.processes - node * on_node))
    try:
        apart = World(Accelerator(cpu=True), own_disks=True)
        train_in_process(apart, spec, runs / str(node), stop)
    finally:
        os.environ["LOCAL_WORLD_SIZE"] = before


@pytest.mark.parametrize(
    ("mode", "count", "on_node"),
    [("sharded", 4, 2), ("sharded", 3, 1), ("sharded", 3, 2), ("hybrid", 4, 2)],
)
def test_nodes_without_a_shared_disk_save_on_the_first_one(
    processes, tmp_path, mode, count, on_node
):
    """What they save has the bits that it has on a shared disk, and each node can go on from it."""
    processes(count).run(on_nodes, job(mode), tmp_path / "shared", on_node, None)
    apart = tmp_path / "apart"
    processes(count).run(on_own_disks, job(mode), apart, on_node, 8)
    first, *others = (apart / str(node) for node in range(-(-count // on_node)))
    for other in others:
        assert not list(other.rglob("step-*"))
        shutil.copytree(first, other, dirs_exist_ok=True)
    processes(count).run(on_own_disks, job(mode), apart, on_node, None)
    assert same_bits(run_of(first)[0], run_of(tmp_path / "shared")[0])
    for checkpoint in checkpoints_in(first / "job/checkpoints"):
        assert damage_of(checkpoint) is None
    for other in others:
        assert max(c.step for c in checkpoints_in(other / "job/checkpoints")) == 8


def held_on_nodes(world: World, spec: dict[str, Any], on_node: int) -> tuple[int, int]:
    """As `held_numbers`, with so many processes on each node."""
    before = os.environ["LOCAL_WORLD_SIZE"]
    os.environ["LOCAL_WORLD_SIZE"] = str(on_node)
    try:
        return held_numbers(world, spec)
    finally:
        os.environ["LOCAL_WORLD_SIZE"] = before


def test_hybrid_holds_all_rows_on_each_node(processes):
    held = processes(6).run(held_on_nodes, job("hybrid"), 3)
    for node in (held[:3], held[3:]):
        assert sum(numbers for numbers, _ in node) >= node[0][1]
        assert all(numbers < whole / 2 for numbers, whole in node)


def test_hybrid_wants_equally_many_processes_on_each_node(processes, tmp_path):
    with pytest.raises(ProcessesFailed) as failed:
        processes(4).run(on_nodes, job("hybrid"), tmp_path, 3, None)
    assert "the nodes have different numbers of processes: 2, 3. Start" in str(failed.value)
    assert not list(tmp_path.iterdir())


def test_batchnorm_over_all_processes_is_that_of_ddp(processes, tmp_path):
    sync = {"task_args": {"norm": "batch"}, "model": {"batchnorm": "sync"}}
    sync["batch"] = {"global_batch": 30, "micro_batch": 5}
    for mode in ("ddp", "sharded"):
        processes(3).run(train_in_process, job(mode, **sync), tmp_path / mode)
    assert difference(tmp_path / "ddp", tmp_path / "sharded") < 1e-9


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_narrow_arithmetic_keeps_rows_and_sums_in_float32(processes, tmp_path, precision):
    narrow = {"task_args": {"double": False}, "model": {"precision": precision}}
    for count, mode in ((1, "ddp"), (3, "sharded")):
        processes(count).run(train_in_process, job(mode, **narrow), tmp_path / mode)
    assert difference(tmp_path / "ddp", tmp_path / "sharded") < 0.02
    rows, others = (
        read_metrics(tmp_path / mode / "job" / "metrics.jsonl") for mode in ("ddp", "sharded")
    )
    assert abs(rows[0]["train/loss"] - others[0]["train/loss"]) < 1e-6
    for row, other in zip(rows, others, strict=True):
        assert row.get("train/loss_scale") == other.get("train/loss_scale")
        assert row.get("train/skipped_steps") == other.get("train/skipped_steps")
    assert {t.dtype for t in run_of(tmp_path / "sharded")[0].values()} == {torch.float32}


# ---- checkpoints


def saved_files(place: Path, step: int) -> dict[str, bytes]:
    """The bytes of the tensor files of a checkpoint."""
    directory = place / "job" / "checkpoints" / f"step-{step:08d}"
    return {file.name: file.read_bytes() for file in sorted(directory.glob("*.safetensors"))}


def made_for(
    world: World, spec: dict[str, Any], *runs: Path
) -> tuple[TrainState, Sequence[Checkpoints]]:
    """A new state of a job, and the checkpoints of its runs in these directories."""
    loaded = load_spec(spec)
    task = load_task(loaded.task, loaded.task_args, seed=loaded.seed)
    plan = make_plan(
        loaded, processes=world.processes, train_rows=task.train_rows, test_rows=task.test_rows
    )
    prepared = prepare_training(plan, task, world, heartbeat=Heartbeat(), say=lambda text: None)
    made = [
        Checkpoints(
            directory / "job" / "checkpoints",
            world=world,
            spec=loaded.checkpoint,
            facts={},
            say=print,
            part_bytes=256,
        )
        for directory in runs
    ]
    return prepared.state, made


def saved_again(world: World, spec: dict[str, Any], place: Path, to: Path) -> list[str]:
    """Read the newest checkpoint of a run, save the state as it is; the names of held tensors."""
    state, (reading, writing) = made_for(world, spec, place, to)
    to.joinpath("job").mkdir(parents=True, exist_ok=True)
    assert reading.restore(state)
    writing.save(state)
    writing.finish()
    reading.close()
    writing.close()
    held = {**state.model.state_dict()}
    moments = {f"{n}": s["exp_avg"] for n, s in enumerate(state.optimizer.state.values())}
    return [
        name
        for name, tensor in {**held, **moments}.items()
        if is_sharded(tensor)
        and own_rows(tensor).numel() > -(-tensor.numel() // world.processes)
        and tensor.shape[0] % world.processes == 0
    ]


@pytest.mark.parametrize("asynchronous", [True, False], ids=["asynchronous", "blocking"])
def test_a_checkpoint_does_not_tell_how_many_processes_saved_it(processes, tmp_path, asynchronous):
    spec = job("ddp", length={"steps": 3}, checkpoint={"asynchronous": asynchronous})
    processes(1).run(train_in_process, spec, tmp_path / "alone")
    whole = saved_files(tmp_path / "alone", 3)
    assert whole
    for count in (2, 3):
        sharded = spec | {"exchange": {"mode": "sharded"}}
        place = tmp_path / str(count)
        held = processes(count).run(saved_again, sharded, tmp_path / "alone", place)
        assert held == [[]] * count, "no process holds more than its rows"
        assert saved_files(place, 3) == whole, count
        [checkpoint] = checkpoints_in(place / "job" / "checkpoints")
        assert damage_of(checkpoint) is None


def saved_after_failures(
    world: World, spec: dict[str, Any], place: Path, to: Path
) -> tuple[list[tuple[str, str]], bool]:
    """Save with a value of the last node that is not finite, then on a full disk, then well."""
    before, told = os.environ["LOCAL_WORLD_SIZE"], []
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    os.environ["LOCAL_WORLD_SIZE"] = "1"
    try:
        apart = World(Accelerator(cpu=True), own_disks=True)
        to = to / str(world.index)
        if world.is_lead:
            to.joinpath("job").mkdir(parents=True)
        state, (reading, writing) = made_for(apart, spec, place, to)
        assert reading.restore(state)
        each = (own_rows(p.detach()) for p in state.model.parameters() if is_sharded(p))
        rows = next(rows for rows in each if rows.numel())
        held = rows.clone()
        for failure in ("value", "disk", ""):
            if failure == "value" and world.index == world.processes - 1:
                rows.fill_(math.nan)
            if failure == "disk" and world.index == 0:
                resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
            try:
                writing.save(state)
                writing.finish()
            except EvenstepError as error:
                told.append((type(error).__name__, str(error)))
            rows.copy_(held)
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        reading.close()
        writing.close()
    finally:
        os.environ["LOCAL_WORLD_SIZE"] = before
    return told, to.exists()


def test_a_save_of_nodes_without_a_shared_disk_that_fails_fails_on_all(processes, tmp_path):
    """Whichever process it is: no other one waits for it, and the next save is whole."""
    spec = job("ddp", length={"steps": 3})
    processes(1).run(train_in_process, spec, tmp_path / "alone")
    sharded = spec | {"exchange": {"mode": "sharded"}}
    to = tmp_path / "to"
    ends = processes(3).run(saved_after_failures, sharded, tmp_path / "alone", to)
    for told, _ in ends:
        (value, of_value), (disk, of_disk) = told
        assert value == "Diverged"
        assert "is not finite, so the state is not saved" in of_value
        assert disk == "NotSaved"
        assert "the limit on the size of a file" in of_disk
    assert [wrote for _, wrote in ends] == [True, False, False]
    assert saved_files(to / "0", 3) == saved_files(tmp_path / "alone", 3)


def test_a_run_continues_in_any_mode_at_any_number_of_processes(processes, tmp_path):
    processes(1).run(train_in_process, job("ddp"), tmp_path / "alone")
    place = tmp_path / "moved"
    for count, mode, stop in (
        (3, "sharded", 4),
        (1, "ddp", 6),
        (2, "sharded", 9),
        (2, "ddp", None),
    ):
        processes(count).run(train_in_process, job(mode), place, stop)
    assert difference(tmp_path / "alone", place) < 1e-9


@pytest.mark.parametrize(
    "sections",
    [{}, {"task_args": {"double": False}, "model": {"precision": "fp16", "moving_average": 0.9}}],
    ids=["float64", "fp16, averaged"],
)
def test_stopped_and_resumed_it_ends_in_the_same_bits(processes, tmp_path, sections):
    for stop in (None,), (5, None):
        for at in stop:
            processes(3).run(train_in_process, job(**sections), tmp_path / str(len(stop)), at)
    assert difference(tmp_path / "1", tmp_path / "2") == 0


# ---- a model that is never whole on one process


class Initialised(Net):
    """Weights that are drawn again, cut, copied and tied after its layers have drawn theirs."""

    def __init__(self, norm: str) -> None:
        super().__init__(norm)
        self.rows = nn.LSTM(10, 10)
        self.register_buffer("mask", torch.ones(10, 10).tril())
        self.apply(self._initialise)
        with torch.no_grad():
            nn.init.orthogonal_(self.head.weight)
            self.embedding.weight[3].zero_()
            self.blocks[0].outer.weight.copy_(self.blocks[1].outer.weight / 2)
        self.blocks[1].inner.weight.requires_grad_(False)

    def _initialise(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) + 0.0 * self.rows(self.embedding(tokens).double())[0].sum()


def whole_weights(world: World, spec: dict[str, Any], least: int) -> tuple[dict[str, Tensor], str]:
    """The weights that a run begins with, and what is said to the user on the way."""
    deferred_init.LEAST_NUMBERS, before = least, deferred_init.LEAST_NUMBERS
    loaded = load_spec(spec)
    task = load_task(loaded.task, loaded.task_args, seed=loaded.seed)
    plan = make_plan(
        loaded, processes=world.processes, train_rows=task.train_rows, test_rows=task.test_rows
    )
    said: list[str] = []
    prepared = prepare_training(plan, task, world, heartbeat=Heartbeat(), say=said.append)
    deferred_init.LEAST_NUMBERS = before
    weights = prepared.state.model.state_dict()
    return {
        name: value.full_tensor() if is_sharded(value) else value for name, value in weights.items()
    }, " ".join(said)


def test_weights_that_are_made_unit_by_unit_have_the_same_bits(processes):
    spec = job(task_args={"net": "Initialised"})
    [(whole, _)] = processes(1).run(whole_weights, spec, 1)
    for weights, said in processes(3).run(whole_weights, spec, 16):
        assert said == ""
        assert weights.keys() == whole.keys()
        assert all(torch.equal(weights[name], whole[name]) for name in whole)


class Whole(TorchDispatchMode):
    """Counts, whenever something is sent, the parameters of blocks that are whole in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "c10d" in str(func):
            alive = [p for p in gc.get_objects() if type(p) is nn.Parameter and p.numel() == 242]
            self.most = max(self.most, sum(not (p.is_meta or is_sharded(p)) for p in alive))
        return func(*args, **(kwargs or {}))


def most_whole_at_once(world: World) -> int:
    """How many of the twelve matrices of six blocks are whole at one time while they are made."""

    def make() -> nn.Module:
        return nn.Sequential(*(Block(11, "layer") for _ in range(6)))

    model, deferred = made_deferred(make, least_numbers=100)
    gc.collect()  # what a test before has left
    with Whole() as whole:
        shard(model, world, spec=ExchangeSpec(mode="sharded"), deferred=deferred)
    return whole.most


def test_no_process_ever_holds_more_than_one_unit_whole(processes):
    assert processes(3).run(most_whole_at_once) == [2, 2, 2]


class Stubborn(nn.Module):
    """What it does with a large tensor while it is made needs the tensor's memory."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        if how == "numpy":
            self.layer.weight.detach().numpy()[:] = 1
        elif how == "kept aside":
            self.table = torch.zeros(8, 8)
        else:
            self.layer.weight.data = torch.from_numpy(np.ones((8, 8), np.float32))


@pytest.mark.parametrize("how", ["numpy", "kept aside", "replaced"])
def test_a_model_that_must_be_made_at_once_is_found_out(how):
    with pytest.raises(NotDeferred):
        made_deferred(lambda: Stubborn(how), least_numbers=16)


def test_deferred_weights_take_no_memory_and_leave_the_generator_as_it_would_be():
    torch.manual_seed(4)
    whole, after = Initialised("layer"), torch.get_rng_state()
    torch.manual_seed(4)
    model, deferred = made_deferred(lambda: Initialised("layer"), least_numbers=16)
    assert torch.equal(torch.get_rng_state(), after)
    large = [p for p in model.parameters() if p.numel() >= 16]
    assert len(large) > 10
    assert all(p.is_meta and deferred.holds(p) for p in large)
    for parameter, name in zip(model.parameters(), dict(whole.named_parameters()), strict=True):
        expected = whole.get_parameter(name)
        value = deferred.value(parameter) if parameter.is_meta else parameter
        assert torch.equal(value, expected), name
        assert parameter.requires_grad == expected.requires_grad
    assert torch.equal(model.mask, whole.mask)


# ---- together with other settings


def test_it_begins_with_the_weights_of_another_run(processes, tmp_path):
    from_file = {"init": {"from": str(tmp_path / "first.safetensors")}, "seed": 5}
    averaged = {"model": {"moving_average": 0.9}, "length": {"steps": 2}}
    processes(1).run(train_in_process, job("ddp", **averaged), tmp_path / "alone")
    shutil.copy(
        tmp_path / "alone/job/checkpoints/step-00000002/model.safetensors",
        tmp_path / "first.safetensors",
    )
    for count, mode in ((1, "ddp"), (3, "sharded")):
        spec = job(mode, **averaged | {"length": {"steps": STEPS}} | from_file)
        processes(count).run(train_in_process, spec, tmp_path / mode)
    assert difference(tmp_path / "ddp", tmp_path / "sharded") < 1e-9


def crowded() -> Task:
    """Two test sets, rows drawn by weights, a measure of one's own, and a hook."""
    task = shared()
    train, test = task.train_data(), task.test_data()

    def note(context: Any) -> None:
        context.log("again", context.measures["accuracy"])

    return supervised(
        model=task.model,
        train=train,
        test={"near": test, "few": TensorDataset(*(part[:5] for part in test.tensors))},
        measures={
            "accuracy": lambda outputs, targets: (outputs.argmax(1) == targets).double(),
            "size": lambda outputs, targets: outputs.abs().sum(1),
        },
        sampling=weighted(torch.arange(82) % 4),
        after_test=note,
    )


def test_test_sets_sampling_hooks_and_best_checkpoints_are_as_without(processes, tmp_path):
    spec = {
        "task": f"{__file__}:crowded",
        "length": {"steps": STEPS},
        "test": {"every_steps": 3, "micro_batch": 4, "at_start": True},
        "checkpoint": {
            "every_steps": 3,
            "keep": 1,
            "keep_best": 2,
            "best": {"measure": "test/few/size", "mode": "max"},
        },
        "early_stopping": {
            "measure": "test/near/loss",
            "mode": "min",
            "patience": 2,
            "min_delta": 5.0,
        },
    }
    found = []
    for count, mode in ((1, "ddp"), (2, "sharded"), (3, "sharded")):
        place = tmp_path / str(count)
        processes(count).run(train_in_process, job(mode, **spec), place)
        rows = read_metrics(place / "job/metrics.jsonl")
        kept = [c.step for c in checkpoints_in(place / "job/checkpoints")]
        found.append((rows, kept, read_receipt(place / "job/receipt.jsonl")))
    (rows, kept, receipt), *others = found
    measured = {k for k in rows[-1] if k.startswith(("test/", "train/loss", "train/grad", "hook"))}
    assert rows[-1]["step"] < STEPS, "stopped early"
    assert len(measured) > 8
    for other_rows, other_kept, other_receipt in others:
        assert (other_kept, other_receipt) == (kept, receipt)
        for row, other in zip(rows, other_rows, strict=True):
            pairs = [(row[k], other[k]) for k in measured & row.keys()]
            assert all(abs(a - b) < 1e-9 for a, b in pairs)


def test_a_stream_is_read_as_by_one_process(processes, tmp_path):
    spec = features.FEATURES["a stream, read whole"] | {"length": {"steps": STEPS}}
    processes(1).run(train_in_process, spec, tmp_path / "alone")
    for stop in (5, None):
        three = spec | {"exchange": {"mode": "sharded"}}
        processes(3).run(train_in_process, three, tmp_path / "three", stop)
    assert max(test_features.difference(tmp_path / "alone", tmp_path / "three")) < 1e-9


def test_it_is_traced_and_its_predictions_are_written(tmp_path):
    words = ("digits", "length.epochs=1", "tracking.wandb=", "exchange.mode=sharded")
    done = evenstep("run", *words, "--processes", 2, "--profile", "5:2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        trace = json.loads((tmp_path / f"runs/digits/profile/rank-{rank}.json").read_text())
        names = [event["name"] for event in trace["traceEvents"]]
        assert {"step 5", "step 6"} <= {*names}
        assert any(name.startswith("FSDP::all_gather") for name in names)
    for count in (1, 3):
        out = f"{count}.npy"
        done = evenstep("test", "digits", "--processes", count, "--predictions", out, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    one, three = (np.load(tmp_path / f"{count}.npy") for count in (1, 3))
    assert (one == three).all()


# ---- what cannot be sharded


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"optimizer": {"name": "lbfgs", "lr": 1.0}}, "optimizer.name: lbfgs yet: use one of sgd"),
        ({"exactness": "bitwise"}, "exactness: bitwise"),
        ({"exchange": {"mode": "ddp", "units": ["a"]}}, "exchange.units needs exchange.mode"),
        (
            {"exchange": {"mode": "ddp", "reshard_after_forward": False}},
            "exchange.reshard_after_forward needs exchange.mode",
        ),
    ],
)
def test_what_a_sharded_run_cannot_do_is_refused_with_the_spec(sections, words):
    with pytest.raises(SpecError) as refused:
        load_spec(job(**sections))
    assert words in str(refused.value)


def units_and_words(net: nn.Module, patterns: tuple[str, ...] = ()) -> tuple[list[str], str]:
    """The names of the units, and what is said of parameters that cannot be sharded."""
    units = units_of(net, patterns)
    try:
        parameters_by_unit(net, units)
    except SpecError as error:
        return list(units), str(error)
    return list(units), ""


def test_units_are_the_repeated_blocks_unless_patterns_say_otherwise():
    net = Net("layer")
    assert units_and_words(net) == (["blocks.0", "blocks.1", "blocks.2"], "")
    assert units_and_words(net, ("blocks.1", "*.outer"))[0] == [
        "blocks.0.outer",
        "blocks.1",
        "blocks.2.outer",
    ]
    assert units_of(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))) == {}
    with pytest.raises(SpecError, match=r"'layers\.\*' matches no module"):
        units_of(net, ("layers.*",))


def test_a_parameter_that_cannot_be_sharded_is_refused_by_name():
    net = Net("layer")
    net.blocks[2].outer = net.blocks[0].outer
    assert "blocks.2.outer.weight with its unit blocks.2" in units_and_words(net)[1]
    net = Net("layer")
    net.blocks[1].factor = nn.Parameter(torch.tensor(1.0))
    assert "blocks.1.factor has no dimension. Give it the shape [1]." in units_and_words(net)[1]


def sent_by_hand(world: World, numbers: int) -> dict[str, Any]:
    """Gather and sum `numbers` of each process in a forward pass, and report what was true."""
    group, count = dist.group.WORLD, numbers * world.processes
    first = world.index * numbers
    heap = Heap()
    gather, scatter = GatherInPlace(heap), ReduceScatterInPlace(heap)

    def space(comm: Any, size: int) -> Tensor:
        return comm.allocate((size,), dtype=torch.float32, device=world.device)

    before = space(gather, count)
    every = space(gather, count)
    own = every[first : first + numbers].copy_(torch.arange(first, first + numbers) % 97)
    gather(every, own, group)
    expected = torch.arange(count) % 97
    gathered = every.equal(expected.float())
    given, sums = space(scatter, count), space(scatter, numbers)
    given.copy_(expected * (world.index + 1))
    scatter(sums, given, group, dist.ReduceOp.SUM)
    factor = world.processes * (world.processes + 1) // 2
    return {
        "gathered": gathered,
        "summed": sums.equal(factor * expected[first : first + numbers].float()),
        "same memory": every.data_ptr() == before.data_ptr(),
        "kept": int(given.count_nonzero()),
        "shape": space(gather, 4).shape == (4,),
    }


@pytest.mark.parametrize("numbers", [0, 5, 400_000])
def test_units_travel_in_place_in_memory_that_is_used_again_or_freed(processes, numbers):
    for found in processes(3).run(sent_by_hand, numbers):
        kept = found.pop("kept")
        assert all(found.values()), found
        if numbers == 400_000:  # pages of 2 MiB, sent in two pieces
            assert kept == 0


def resident_bytes() -> int:
    return psutil.Process().memory_info().rss


def test_pages_are_returned_and_come_back_without_their_values():
    memory, size = Pages(48 << 20), 48 << 18
    numbers = memory.tensor(4096, size - 1024, dtype=torch.float32).fill_(3.0)
    full = resident_bytes()
    memory.give_back()
    assert full - resident_bytes() > 40 << 20
    memory.allow()
    assert int(numbers.count_nonzero()) == 0
    numbers += 1.0
    assert numbers[[0, -1]].tolist() == [1.0, 1.0]


def test_a_released_parameter_cannot_be_read(tmp_path):
    program = """
import torch
from service.sharding.heap import Pages
memory = Pages(4 << 20)
numbers = memory.tensor(0, 1 << 20, dtype=torch.float32).fill_(3.0)
memory.give_back()
print(numbers.sum())
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (-signal.SIGSEGV, "")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has this advice")
def test_memory_of_a_tensor_is_allocated_at_once_and_keeps_what_is_in_it():
    tensor = torch.empty(12 << 20)
    tensor[5:9] = 3.0
    before = resident_bytes()
    assert populate(tensor)
    assert resident_bytes() - before > 40 << 20
    assert tensor[5:9].tolist() == [3.0] * 4
    assert populate(torch.empty(3))
    assert not populate(torch.empty(0))


class Doubling(Net):
    """A state dict that holds more than the parameters as they are."""

    def __init__(self, norm: str) -> None:
        super().__init__(norm)
        self.register_state_dict_post_hook(self._doubled)
        self.register_load_state_dict_pre_hook(self._halved)

    @staticmethod
    def _doubled(module: nn.Module, values: dict[str, Tensor], prefix: str, _: Any) -> None:
        values[f"{prefix}blocks.0.inner.weight"] = values[f"{prefix}blocks.0.inner.weight"] * 2

    @staticmethod
    def _halved(module: nn.Module, values: dict[str, Tensor], prefix: str, *_: Any) -> None:
        values[f"{prefix}blocks.0.inner.weight"] = values[f"{prefix}blocks.0.inner.weight"] / 2


def test_a_state_dict_that_is_computed_from_the_parameters_is_resumed(processes, tmp_path):
    spec = job(task_args={"net": "Doubling"}, test={"every_steps": None, "micro_batch": 6})
    processes(2).run(train_in_process, spec, tmp_path / "whole")
    processes(2).run(train_in_process, spec, tmp_path / "cut", 5)
    processes(3).run(train_in_process, spec, tmp_path / "cut")
    whole, cut = (run_of(tmp_path / name)[0] for name in ("whole", "cut"))
    for name, value in whole.items():
        torch.testing.assert_close(cut[name], value, rtol=1e-9, atol=1e-9)


class Wide(nn.Module):
    """Four units of 8 MiB each, on rows of 4 KiB."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 1024)) for _ in range(4)
        )

    def forward(self, rows: Tensor) -> Tensor:
        for block in self.blocks:
            rows = block(rows)
        return rows.mean(1, keepdim=True)


def wide() -> Task:
    rows = torch.randn(64, 1024, generator=torch.Generator().manual_seed(3))
    data = TensorDataset(rows, rows[:, :1])
    return supervised(
        model=Wide, train=data, test=data, loss=lambda out, target: (out - target).square().mean(1)
    )


def faults_of_a_run(world: World, job: dict[str, Any], place: Path) -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    train_in_process(world, job, place)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.matrix
@pytest.mark.skipif(
    not LARGE_PAGES.exists() or "[never]" in LARGE_PAGES.read_text(),
    reason="needs transparent_hugepage: madvise or always",
)
def test_a_step_does_not_allocate_the_memory_of_its_units_page_by_page(processes, tmp_path):
    pool, steps = processes(2), (2, 2, 10)  # the first run of a process has more to allocate
    of_runs = []
    for number, count in enumerate(steps):
        values = job() | {
            "name": f"run-{number}",
            "task": f"{__file__}:wide",
            "batch": {"global_batch": 4, "micro_batch": 2},
            "length": {"steps": count},
            "test": {"every_steps": None, "micro_batch": 4},
            "checkpoint": {"asynchronous": False},
        }
        of_runs.append(max(pool.run(faults_of_a_run, values, tmp_path)))
    of_a_step = (of_runs[2] - of_runs[1]) / (steps[2] - steps[1])
    gathered_twice = 2 * 4 * (8 << 20) / mmap.PAGESIZE
    assert of_a_step < gathered_twice / 2


class Borrowing(Net):
    """It uses a weight of a block outside the block."""

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) + self.blocks[1].inner.weight.sum()


NETS = {"Net": Net, "Doubling": Doubling, "Borrowing": Borrowing, "Initialised": Initialised}


def test_a_torch_that_lacks_what_it_needs_is_refused(monkeypatch, alone):
    from torch.distributed.fsdp import FSDPModule

    monkeypatch.delattr(FSDPModule, "set_reduce_scatter_unused_params")
    with pytest.raises(SpecError, match=r"exchange\.mode: sharded needs torch 2\.13 or newer"):
        shard(Net("layer"), alone, spec=ExchangeSpec(mode="sharded"))


def held_numbers(world: World, spec: dict[str, Any]) -> tuple[int, int]:
    """How many numbers of the weights this process holds, and how many the model has."""
    loaded = load_spec(spec)
    task = load_task(loaded.task, loaded.task_args, seed=loaded.seed)
    plan = make_plan(
        loaded, processes=world.processes, train_rows=task.train_rows, test_rows=task.test_rows
    )
    prepared = prepare_training(plan, task, world, heartbeat=Heartbeat(), say=lambda text: None)
    held = sum(own_rows(p).untyped_storage().nbytes() for p in prepared.state.model.parameters())
    whole = sum(p.numel() for p in task.model().parameters())
    return held // 8, whole


def test_each_process_holds_its_share(processes):
    shares = processes(3).run(held_numbers, job())
    for held, whole in shares:
        assert held < whole / 2
    assert sum(held for held, _ in shares) >= whole
    assert processes(1).run(held_numbers, job()) == [(whole, whole)]


def test_a_weight_that_is_used_outside_its_unit_is_reported_by_name(processes, tmp_path):
    spec = job(task_args={"net": "Borrowing"})
    with pytest.raises(ProcessesFailed) as failed:
        processes(2).run(train_in_process, spec, tmp_path)
    assert "SpecError: exchange.mode: sharded: the parameter blocks.1.inner.weight" in str(
        failed.value
    )
    assert not list(tmp_path.iterdir())


def test_plan_shows_what_each_process_holds(tmp_path):
    told = planned(load_spec(job()), processes=3, runs=tmp_path)
    assert "sharded over the processes" in told
    row = next(line for line in told.splitlines() if line.strip().startswith("blocks.1 "))
    assert row.split()[:3] == ["blocks.1", "6", "470"]
