"""The simulated device catches what a GPU would punish, and a run comes out on it as on the CPU."""

import gc
import json
import linecache
import re
import socket
import subprocess
import sys
import threading
from types import SimpleNamespace

import features
import own_steps
import pytest
import simulated_device
import test_fitting
import torch
import torch.distributed as dist
from commands import BIN, CLEAN, DEADLINE_SECONDS, command, evenstep, start
from features import PLAIN
from jobs import spec_of, train_in_process
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import TensorDataset

from launch.rank.process_group import identity_of
from service.basics.errors import NotSaved, SpecError, is_out_of_memory
from service.basics.limits import workers_each
from service.checkpoints.pending_copies import DeviceCopies, PendingCopy
from service.checkpoints.shards import Snapshot
from service.checkpoints.snapshots import Content
from service.data.task import custom, load_task, supervised
from service.distributed.devices import free_bytes
from service.evaluation.metrics import Gathered
from service.health.watchdog import _line_of, waits_for_device
from service.plan.plan import make_plan
from service.recipes import digits
from service.runs.checkpoint_files import saving_in_words
from service.runs.directory import RunDirectory
from service.runs.tracking import read_metrics
from service.spec.files import load_spec
from service.spec.models import CheckpointSpec
from service.training import worker
from service.training.batch_size_finder import fitting_rows, settled
from service.training.worker import observed

FEATURES = str(spec_of.__globals__["HERE"].with_name("features.py"))


# ---- the device itself


def late(world):
    """(what the host reads before it has waited, and after it)"""
    value = torch.full((3,), 7.0, device="sim")
    here = torch.empty(3, pin_memory=True).copy_(value, non_blocking=True)
    event = torch.sim.Event()
    event.record()
    before = here.tolist()
    event.synchronize()
    return before, here.tolist()


def overwritten(world):
    """What the device gets of a pinned buffer that is filled anew before anybody waited."""
    buffer = torch.ones(2).pin_memory()
    sent = buffer.to("sim", non_blocking=True)
    space = torch.empty(2, device="sim").copy_(buffer, non_blocking=True)
    buffer.fill_(2)
    return sent.tolist(), space.tolist()


def waits(world):
    """Why the host waited, one by one."""
    values = torch.ones(4, device="sim")
    del simulated_device.WAITS[:]
    values * 2 + 1
    values[torch.tensor([1, 2]).to("sim", non_blocking=True)]
    torch.where(values > 0, values, 0.0) * torch.tensor(2.0)
    none = list(simulated_device.WAITS)
    values[0].item(), values.tolist(), values.cpu(), bool(values.sum() > 1), values[values > 2]
    torch.tensor([1.0, 2.0]).to("sim"), torch.tensor(1.0, device="sim")
    values[torch.tensor([1, 2])], torch.where(values > 0, values, torch.tensor(0.0))
    return none, list(simulated_device.WAITS)


def refused(act, kind, words):
    with pytest.raises(kind, match=words):
        act()


def mixed(world):
    refused(lambda: torch.ones(2, device="sim").numpy(), TypeError, "can't convert")
    refused(
        lambda: torch.empty(2**32, device="sim", dtype=torch.uint8).zero_(),
        torch.OutOfMemoryError,
        "out of memory",
    )
    return True


def timed(world):
    """The time between two events is told of events that are complete, and were to be timed."""
    first, last, other = (torch.sim.Event(enable_timing=timing) for timing in (True, True, False))
    refused(lambda: first.elapsed_time(last), ValueError, "must be recorded")
    for event in (first, last, other):
        event.record()
        torch.ones(1, device="sim")
    refused(lambda: first.elapsed_time(last), RuntimeError, "must be completed")
    refused(lambda: first.elapsed_time(other), ValueError, "enable_timing=True")
    last.synchronize()
    return first.elapsed_time(last) > 0


TWO = "found at least two devices, sim:0 and cpu!"
BY_NAME = (
    "Expected all tensors to be on the same device, but got {} is on {}, different from other "
)
INDEX = "indices should be either on cpu or on the same device as the indexed tensor \\(cpu\\)"
# By what a line of Python does with tensors of the device (x, i, mask) and of the host (those with
# h): what CUDA says of it.
REFUSED = {
    "x + hx": TWO,
    "hx * x.sum()": TWO,
    "hx.sum().add_(x.sum())": TWO,
    "hx[i]": INDEX,
    "hx[mask]": INDEX,
    "hx.index_put_((i,), x[i])": INDEX,
    "hx.index_put_((i,), torch.tensor(1.0))": INDEX,
    "hx.index_put_((hi,), x[i])": TWO,
    "x.index_put_((i,), hx[hi])": TWO,
    "x.index_put_((hi,), hx[hi], accumulate=True)": TWO,
    "x.gather(0, hi)": BY_NAME.format("index", "cpu"),
    "hx.gather(0, i)": BY_NAME.format("index", "sim:0"),
    "x.index_select(0, hi)": BY_NAME.format("index", "cpu"),
    "x.index_select(0, hi[0])": BY_NAME.format("index", "cpu"),
    "hx.index_select(0, i)": BY_NAME.format("index", "sim:0"),
    "F.embedding(hi, x[:, None])": "got ind[a-z]* is on cpu",
    "F.embedding(hi[0], x[:, None])": "got ind[a-z]* is on cpu",
    "F.embedding(i, hx[:, None])": "got ind[a-z]* is on sim:0",
    "torch.where(mask, x, hx)": "to be on the same device",
    "torch.where(mask.cpu(), x, x)": "to be on the same device",
    "torch.cat([x, hx])": BY_NAME.format("tensors", "cpu"),
    "torch.stack([x.sum(), hx.sum()])": BY_NAME.format("tensors", "cpu"),
    "x @ hx": "to be on the same device",
    "x.masked_fill(mask.cpu(), 0.0)": "expected self and mask to be on the same device, but got m",
    "x.clamp(hx.min(), hx.max())": "Trying to pass too many CPU scalars to non-CPU kernel!",
    "F.cross_entropy(x[None], hi[:1])": BY_NAME.format("target", "cpu"),
    "F.cross_entropy(x[None], i[:1], weight=hx)": BY_NAME.format("weight", "cpu"),
}
TAKEN = (
    *("x[hi]", "x[mask.cpu()]", "x.index_put_((hi,), x[i])", "x.index_put_((i,), hx.sum())"),
    *("x * hx.sum()", "torch.where(mask, hx.sum(), hx.min())", "x.masked_fill(mask, hx.sum())"),
    *("x.fill_(hx.sum())", "x.clamp(hx.min())", "x.copy_(hx)", "hx.copy_(x)"),
    *("torch._foreach_mul([x, x], hx.sum())", "x.requires_grad_()[hi].sum().backward()"),
)


def said_of(world, lines):
    """What the device says of each: an error, or nothing."""
    said = []
    for line in lines:
        x, hx = torch.ones(3, device="sim"), torch.ones(3)
        hi = torch.tensor([1, 2])
        names = {"x": x, "hx": hx, "i": hi.to("sim"), "hi": hi, "mask": x > 0}
        try:
            eval(line, {"torch": torch, "F": nn.functional} | names)
            said.append("")
        except RuntimeError as error:
            said.append(str(error))
    return said


def number_of_device_in_tensor_of_host(world):
    here = torch.zeros(3)
    put = here.index_put_((torch.tensor([1]),), torch.tensor(7.0).to("sim"))
    return put is here, type(here) is torch.Tensor, here.tolist()


def test_tensors_of_two_devices_are_refused_where_cuda_refuses_them(simulated):
    one = simulated(1)
    for line, said in zip(REFUSED, one.run(said_of, list(REFUSED))[0], strict=True):
        assert re.search(REFUSED[line], said), f"{line}: {said}"
    assert one.run(said_of, list(TAKEN)) == [[""] * len(TAKEN)]
    assert one.run(number_of_device_in_tensor_of_host) == [(True, True, [0.0, 7.0, 0.0])]


def raced(world):
    """What another stream made is read too early, written to too early, given back too early."""
    side, module = torch.sim.Stream(), torch.sim

    def on_side(act):
        with module.stream(side):
            return act()

    held = [on_side(lambda: torch.ones(3, device="sim"))]
    refused(lambda: held[0] + 1, simulated_device.Race, "has not waited")
    module.current_stream().wait_stream(side)
    held[0] + 1
    refused(lambda: on_side(held[0].zero_), simulated_device.Race, "still reads")
    held.clear()
    gc.collect()  # what was raised above holds it too
    refused(
        lambda: on_side(lambda: torch.ones(1, device="sim")), simulated_device.Race, "no record_"
    )
    held.append(on_side(lambda: torch.ones(3, device="sim")))
    module.current_stream().wait_stream(side)
    held[0] + 1
    held.clear()
    side.wait_stream(module.current_stream())  # before it uses the memory again
    on_side(lambda: torch.ones(1, device="sim"))
    kept = on_side(lambda: torch.ones(3, device="sim"))
    module.current_stream().wait_stream(side)
    kept + 1
    kept.record_stream(module.current_stream())
    del kept
    torch.ones(1, device="sim")
    return True


def brought_beside_the_work(world):
    """Batches brought one after the other, each dropped while the device may still read it."""
    from service.data.batches import carrier

    bring = carrier(world.device)
    for _ in range(3):
        batch = bring({"x": torch.ones(4).pin_memory(), "pair": [torch.zeros(2).pin_memory()]})
        batch["x"] + 1, batch["pair"][0] + 1
        del batch
        gc.collect()
    return torch.ones(1, device="sim").tolist()  # where a race has been noted, this raises it


def without_record_stream(world):
    """The same where `record_stream` does nothing."""
    kept = simulated_device.Sim.record_stream
    simulated_device.Sim.record_stream = lambda tensor, stream: None
    try:
        refused(lambda: brought_beside_the_work(world), simulated_device.Race, "no record_stream")
    finally:
        simulated_device.Sim.record_stream = kept
        gc.collect()
        simulated_device.PENDING.clear()
    return True


def test_a_batch_stays_until_the_device_has_read_it(simulated):
    one = simulated(1)
    assert one.run(brought_beside_the_work) == [[1.0]]
    assert one.run(without_record_stream) == [True]


def read_while_another_thread_waits(world):
    """What is read of a copy that another thread, which waits for the device, is about to receive.

    So waits the thread that writes a checkpoint, beside the one that trains.
    """
    begun, go_on = threading.Event(), threading.Event()
    memory = torch.zeros(3, dtype=torch.int64, device="sim")
    memory.copy_(torch.arange(3).pin_memory(), non_blocking=True)
    (copy,) = memory.home.due

    def slow():
        begun.set()
        go_on.wait(DEADLINE_SECONDS)
        copy()

    memory.home.due[:] = [slow]
    other = threading.Thread(target=simulated_device.synchronize)
    other.start()
    begun.wait(DEADLINE_SECONDS)
    threading.Timer(0.2, go_on.set).start()  # the read below must wait for it, and cannot set it
    try:
        return memory.tolist()
    finally:
        other.join()


def test_a_copy_that_another_thread_receives_is_waited_for(simulated):
    assert simulated(1).run(read_while_another_thread_waits) == [[0, 1, 2]]


def test_the_device_behaves_as_a_gpu_does(simulated):
    one = simulated(1)
    before, after = one.run(late)[0]
    assert all(value != value for value in before), "NaN until it is waited for"
    assert after == [7.0, 7.0, 7.0]
    assert one.run(overwritten) == [([2.0, 2.0], [2.0, 2.0])]
    none, some = one.run(waits)[0]
    assert none == []
    assert len(some) == 9
    assert one.run(mixed) == [True]
    assert one.run(raced) == [True]
    assert one.run(timed) == [True]


def exchanged(world):
    values = torch.full((2,), 1.0 + world.index, device=world.device)
    dist.all_reduce(values)
    refused(lambda: dist.all_reduce(torch.ones(2)), RuntimeError, "device type cpu")
    return values.tolist(), world.highest([world.index]), dist.get_backend()


def merged(world):
    """A torchmetrics object whose states have a dimension, over all processes."""
    from torchmetrics.classification import MulticlassRecall

    measures = Gathered({"recall": MulticlassRecall(3, average="micro")}, world)
    outputs = torch.eye(3).to(world.device)
    measures.add(outputs, torch.tensor([0, 1, world.index], device=world.device))
    return measures.values()


@pytest.mark.parametrize("count", [1, 2])
def test_torchmetrics_objects_are_merged_on_the_host(simulated, count):
    right = (2, 4)[count - 1]
    assert (
        simulated(count).run(merged) == [{"test/recall": pytest.approx(right / 3 / count)}] * count
    )


def test_its_processes_also_have_a_host_group(simulated):
    assert simulated(2).run(exchanged) == [([3.0, 3.0], [1], "simccl")] * 2


# ---- what a run does, held against the CPU


def job(task="network", arguments=None, **sections):
    base = {
        "task": task if ":" in task else f"{FEATURES}:{task}",
        "task_args": {"double": False} | (arguments or {}),
        "length": {"steps": 6},
        "test": {"every_steps": 3, "micro_batch": 32},
        "checkpoint": {"every_steps": 2},
    }
    return spec_of("none", **(base | sections))


def class_weights(double):
    train, test = features._digits(torch.float32)
    loss = nn.CrossEntropyLoss(weight=torch.arange(1.0, 11.0), reduction="none")

    def look(context):
        weights = context.model[0].weight  # on the device
        context.log_histogram("weights", weights)
        context.log_image("kernel", weights[0].clamp(0, 1))
        context.log("first", weights.flatten()[0])

    return supervised(
        model=lambda: digits.network(8, 0.0), train=train, test=test, loss=loss, after_test=look
    )


class ByClass(nn.Module):
    """A loss, or a measure, with a tensor of its own, as BCEWithLogitsLoss(pos_weight=...) has."""

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.linspace(0.5, 1.5, 10))

    def forward(self, outputs, targets):
        return nn.functional.cross_entropy(outputs * self.scale, targets, reduction="none")


def loss_with_tensors(double):
    train, test = features._digits(torch.float32)
    return supervised(
        model=lambda: digits.network(8, 0.0),
        train=train,
        test=test,
        loss=ByClass(),
        measures={"accuracy": ByClass()},
    )


def own_step(double):
    return own_steps.by_step("counted", dropout=0.0)


def contrast(double):
    return own_steps.contrast(dropout=0.0)


def two_models_step(models, batch, context):
    [real] = batch.inputs
    fake = models["generator"](torch.randn(len(real), 3, device=real.device))
    if context.optimizer == "generator":
        return {"generator": -models["critic"](fake).flatten()}
    return {"distance": (models["critic"](fake) - models["critic"](real)).flatten()}


def two_models(double):
    rows = own_steps.points()
    return custom(
        step=two_models_step,
        model=lambda: {"critic": nn.Linear(6, 1), "generator": nn.Linear(3, 6)},
        train=TensorDataset(rows[:71]),
        test=TensorDataset(rows[71:]),
    )


TURNS = {
    "critic": {"optimizer": {"name": "adam", "lr": 0.02}},
    "generator": {"every": 2, "optimizer": {"name": "rmsprop", "lr": 0.01}},
}
FUSED = {"name": "adamw", "lr": 0.003, "fused": True}
JOBS = {
    "dropout and BatchNorm": job(),
    "fp16": job(arguments=PLAIN, model={"precision": "fp16"}),
    "bf16": job(arguments=PLAIN, model={"precision": "bf16"}),
    "clipping, a moving average, AdamW": job(
        arguments=PLAIN,
        max_grad_norm=0.5,
        max_grad_value=0.1,
        model={"moving_average": 0.9},
        optimizer={"name": "adamw", "lr": 0.003},
    ),
    # As without the word on a real one; the kernels keep the number of the step on the device.
    "fused AdamW": job(arguments=PLAIN, optimizer=FUSED),
    "fused AdamW in fp16": job(arguments=PLAIN, optimizer=FUSED, model={"precision": "fp16"}),
    "skip": job(arguments=PLAIN, faults={"on_non_finite": "skip"}),
    "bitwise": job(exactness="bitwise"),
    "LBFGS": job(arguments=PLAIN, optimizer={"name": "lbfgs", "lr": 0.1, "max_iter": 4}),
    "weights of rows, waiting for each save": job(
        "weighted_rows", checkpoint={"every_steps": 2, "asynchronous": False}
    ),
    "rows from workers": job(arguments=PLAIN | {"augmented": True}, loader={"workers": 2}),
    "rows held in memory": job(
        arguments=PLAIN | {"augmented": True}, loader={"in_memory": True, "workers": 1}
    ),
    "class weights, a hook": job(f"{__file__}:class_weights", faults={"on_hook_failure": "stop"}),
    "a loss with tensors": job(f"{__file__}:loss_with_tensors"),
    "a step of one's own": job(f"{__file__}:own_step"),
    "a loss over all rows": job(f"{__file__}:contrast"),
    "several optimizers": job(f"{__file__}:two_models", optimizers=TURNS),
}
del JOBS["several optimizers"]["optimizer"], JOBS["several optimizers"]["schedule"]
ROUNDED = {
    "fp16": 0.02,
    "fused AdamW in fp16": 0.02,
    "bf16": 0.05,
}  # elsewhere float32's own rounding


def same(one, other, tolerance):
    """Whether two runs measured the same and ended with the same weights."""
    rows = [list(read_metrics(RunDirectory(run).metrics)) for run in (one, other)]
    assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]]
    for name in ("train/loss", "train/grad_norm", "test/loss", "test/accuracy"):
        values = [[row[name] for row in side if name in row] for side in rows]
        assert values[0] == pytest.approx(values[1], rel=tolerance, abs=tolerance), name
    newest = [max((run / "checkpoints").glob("step-*")) for run in (one, other)]
    for path in newest[0].glob("*.safetensors"):
        tensors = [load_file(place / path.name) for place in newest]
        for name, value in tensors[0].items():
            torch.testing.assert_close(
                value, tensors[1][name], rtol=tolerance, atol=tolerance, msg=name
            )


def unknown_waits(world, spec, runs, stop_at=None):
    """Train; the lines at which the host waited for the device, unknown to the watchdog."""
    simulated_device.WAITED_AT.clear()
    train_in_process(world, spec, runs, stop_at)
    places = [(file, linecache.getline(file, line)) for file, line in simulated_device.WAITED_AT]
    return [place for place in places if "/tests/" not in place[0] and not waits_for_device(*place)]


@pytest.mark.parametrize("name", JOBS)
def test_a_run_on_a_device_is_the_run_on_the_cpu(processes, simulated, tmp_path, name):
    processes(1).run(train_in_process, JOBS[name], tmp_path / "cpu")
    # Stopped and resumed, so that a checkpoint is read back onto the device as well.
    assert simulated(1).run(unknown_waits, JOBS[name], tmp_path / "sim", 3) == [[]]
    assert simulated(1).run(unknown_waits, JOBS[name], tmp_path / "sim") == [[]]
    same(tmp_path / "cpu" / "job", tmp_path / "sim" / "job", ROUNDED.get(name, 2e-5))


def waits_of_run(world, spec, runs, steps):
    """How often the host waits for the device in a run of so many steps, that logs at its end.

    And how many copies to the device came from memory that is not pinned; and how many to the host
    it waited for, which those of a checkpoint are not.
    """
    ends = {"length": {"steps": steps}, "test": {}, "checkpoint": {}}
    del simulated_device.WAITS[:], simulated_device.PAGEABLE[:]
    train_in_process(world, spec | ends | {"tracking": {"log_every_steps": 1000}}, runs)
    waits = simulated_device.WAITS
    return len(waits), len(simulated_device.PAGEABLE), waits.count("copy to the host")


@pytest.mark.parametrize("name", sorted({*JOBS} - {"LBFGS", "bf16", "skip", "rows held in memory"}))
def test_the_host_does_not_wait_in_a_step_that_is_not_logged(simulated, tmp_path, name):
    short, long = (
        simulated(1).run(waits_of_run, JOBS[name], tmp_path / str(steps), steps)[0]
        for steps in (4, 8)  # several optimizers: in the last one both have their turn
    )
    # Here no kernel reads the flag that a step is skipped: torch has fused ones for some devices.
    waits_a_step = 1 if name == "fp16" else 0
    assert long[0] - short[0] == 4 * waits_a_step
    assert long[2] <= 5, "of the first rows and for a hook: a checkpoint has more tensors"
    if name == "rows from workers":  # those that a process reads itself are not pinned
        assert long[1] == short[1]


class Writing(nn.Module):
    """A network that changes its weights in each pass."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.inner = nn.Linear(64, 8)
        self.outer = nn.Linear(8, 10)

    def forward(self, images):
        if self.kind == "limited":  # at first to the values that they have
            with torch.no_grad():
                self.inner.weight.clamp_(-0.2, 0.2)
        if self.kind == "decayed":  # which counts as no change of the tensor
            self.inner.weight.data.mul_(0.99)
        return self.outer(self.inner(images.flatten(1)).relu())


def writing(double, kind):
    train, test = features._digits(torch.float32)
    loss = nn.CrossEntropyLoss(reduction="none")
    return supervised(model=lambda: Writing(kind), train=train, test=test, loss=loss)


def saved_when(simulated, kind, runs, **checkpoint):
    """The bits of the checkpoint of each step of such a network."""
    wanted = job(
        f"{__file__}:writing",
        {"kind": kind},
        length={"steps": 4},
        checkpoint={"every_steps": 1, "keep": 4} | checkpoint,
    )
    simulated(1).run(train_in_process, wanted, runs)
    steps = sorted((runs / "job" / "checkpoints").glob("step-*"))
    assert len(steps) == 4
    return [{path.name: path.read_bytes() for path in step.glob("*.safe*")} for step in steps]


@pytest.mark.parametrize("kind", ["limited", "decayed"])
def test_weights_that_a_pass_changes_are_saved_as_they_were(simulated, tmp_path, kind):
    waiting = saved_when(simulated, kind, tmp_path / "waiting", asynchronous=False)
    assert saved_when(simulated, kind, tmp_path / "late") == waiting


def copies_in_order(world):
    """How much work a snapshot is for the stream of the computation, until an update and after."""
    names = ("weight", "frozen", "running_mean")
    weights = {name: torch.ones(2, device="sim") for name in names}
    held = {"exp_avg:weight": torch.ones(2, device="sim")}
    content = Content(
        {"model.safetensors": weights, "optimizer.safetensors": held},
        {},
        frozenset(names[:2]),
        still=frozenset(["weight"]),
    )
    snapshot, stream = Snapshot(world.device), torch.sim.current_stream()
    began = stream.now
    _, copies = snapshot.whole(content)
    beside = snapshot._stream
    before = stream.follows(beside, beside.now)
    copies.permit_change()
    return stream.now - began, (before, stream.follows(beside, beside.now))


def test_only_what_a_pass_may_change_is_copied_before_it(simulated):
    work, (before, after) = simulated(1).run(copies_in_order)[0]
    assert work == 2, "a frozen weight and a buffer; the rest is copied on another stream"
    assert (before, after) == (False, True), "which the update waits for, and nothing before it"


def changed_while_copied(world):
    """What is copied of a weight, and what is said of its changes before and after an update."""
    weight = torch.arange(3.0, device="sim").requires_grad_()
    told = []
    for permitted in (True, False):
        space = torch.empty(3, pin_memory=True)
        copies = DeviceCopies(
            [PendingCopy("weight", weight.detach(), space, weight)],
            world.device,
            torch.sim.Stream(),
        )
        if permitted:
            copies.permit_change()
        else:  # in the order of the device it is too late, which the host cannot know
            torch.sim.current_stream().wait_event(copies._arrived)
        with torch.no_grad():
            weight.add_(1)
        copies.synchronize()
        told.append(space.tolist())
        if permitted:
            copies.require_unchanged()
        else:
            refused(copies.require_unchanged, NotSaved, "weight was changed by the forward or back")
    return told


def test_a_change_of_a_weight_before_the_update_is_noticed(simulated):
    assert simulated(1).run(changed_while_copied) == [[[0, 1, 2], [1, 2, 3]]]


def contexts(world):
    """On which devices the threads of this process have opened a context."""
    return sorted(simulated_device.CONTEXTS)


@pytest.mark.parametrize("name", ["dropout and BatchNorm", "bf16", "bitwise"])
@pytest.mark.parametrize("count", [2, 3])
def test_several_devices_train_as_one_does(processes, simulated, tmp_path, name, count):
    if name == "bitwise" and count == 3:
        pytest.skip("bitwise takes a power of two of processes")
    chosen = JOBS[name]
    processes(count).run(train_in_process, chosen, tmp_path / "cpu")
    simulated(count).run(train_in_process, chosen, tmp_path / "sim")
    same(tmp_path / "cpu" / "job", tmp_path / "sim" / "job", ROUNDED.get(name, 2e-5))
    assert simulated(count).run(contexts) == [[rank + 1] for rank in range(count)]


# ---- what it has no room for, and what it finds out late


KEPT = []


def kept_rows(double):
    """Data sets that stay, so that it can be seen afterwards which of them lay on the device."""
    KEPT.append(features.network(double, **PLAIN))
    return KEPT[-1]


def held_on_device(world, spec, runs):
    """Rows of the data sets that lay on a device with 300 kB left, and copies not from pinned."""
    from service.data import in_memory

    in_memory._RESIDENT.clear()
    simulated_device.OTHERS = simulated_device.mem_get_info()[0] - 300_000
    try:
        del simulated_device.PAGEABLE[:]
        train_in_process(world, spec, runs)
        return [len(rows) for rows in in_memory._RESIDENT.values()], simulated_device.PAGEABLE
    finally:
        simulated_device.OTHERS = 0
        in_memory._RESIDENT.clear()


def test_rows_that_take_a_quarter_of_what_is_free_stay_on_the_host(processes, simulated, tmp_path):
    chosen = job(f"{__file__}:kept_rows", model={"batchnorm": "local"})
    chosen["batch"] = {"global_batch": 20, "micro_batch": 5}
    processes(1).run(train_in_process, chosen, tmp_path / "cpu")
    # Of 103 kB of training rows and 35 kB of test rows only the latter fit.
    [(found, pageable)] = simulated(1).run(held_on_device, chosen, tmp_path / "sim")
    assert found == [features.TEST_ROWS]
    assert pageable.count(5 * 64 * 4) == 1, "of the dry run only"
    same(tmp_path / "cpu" / "job", tmp_path / "sim" / "job", 2e-5)


def free_with_a_cache(world):
    """Free memory before and after torch keeps some of it for itself."""
    before = free_bytes(world.device)
    simulated_device.CACHED = 5000
    try:
        return before, free_bytes(world.device), simulated_device.mem_get_info()[0]
    finally:
        simulated_device.CACHED = 0


def test_memory_that_torch_keeps_for_itself_counts_as_free(simulated):
    [(before, after, of_driver)] = simulated(1).run(free_with_a_cache)
    assert before == after == of_driver + 5000


def brought_twice(world):
    """Rows brought to the device for two test passes, and how much of it they take."""
    from service.data.in_memory import in_memory, near

    data = TensorDataset(torch.ones(1000, 4), torch.arange(1000))
    free = torch.sim.mem_get_info()[0]
    one, other = (near(data, in_memory(data), world.device) for _ in range(2))
    assert one is other
    taken = free - torch.sim.mem_get_info()[0]
    del one, other, data
    return taken, free - torch.sim.mem_get_info()[0]


def test_rows_are_brought_once_and_go_with_their_data_set(simulated):
    assert simulated(1).run(brought_twice) == [(1000 * (16 + 8), 0)]


def advice_out_of_memory(world):
    """What is said of a device that is full while rows lie on it, and after they are gone."""
    from launch.rank.entry import _out_of_memory
    from service.data.in_memory import in_memory, near

    plan = make_plan(load_spec(job()), processes=1, train_rows=20, test_rows=9)
    error = RuntimeError("CUDA out of memory")
    data = TensorDataset(torch.ones(2**18, 4), torch.arange(2**18))
    rows = near(data, in_memory(data), world.device)
    full = str(_out_of_memory(plan, error))
    del rows, data
    return full, str(_out_of_memory(plan, error))


def test_the_advice_on_a_full_device_names_the_rows_on_it(simulated):
    [(full, empty)] = simulated(1).run(advice_out_of_memory)
    assert "Rows kept on the device take 6 MiB of it" in full
    assert "Rows kept" not in empty


def mislabelled():
    """Rows of which one has a label that is no class."""
    rows = TensorDataset(torch.ones(20, 4), torch.arange(20) % 3 + (torch.arange(20) == 2))
    return supervised(model=lambda: nn.Linear(4, 3), train=rows, test=rows)


def told_of_label(world, runs, soon):
    simulated_device.SOON[:] = [True] if soon else []
    spec = spec_of("none", task=f"{__file__}:mislabelled", batch={"global_batch": 20})
    try:
        with pytest.raises(SpecError) as told:
            train_in_process(world, spec, runs)
        return str(told.value)
    finally:
        simulated_device.ASSERTED.clear()
        simulated_device.SOON.clear()


@pytest.mark.parametrize("soon", [False, True], ids=["when waited for", "by the next operator"])
def test_a_label_out_of_range_is_reported_before_the_first_step(simulated, tmp_path, soon):
    [told] = simulated(1).run(told_of_label, tmp_path, soon)
    assert "device-side assert triggered" in told
    assert "a label that is not a class" in told
    assert "EVENSTEP_DEVICE=cpu" in told
    assert not (tmp_path / "job").exists()


class Repeated(nn.Module):
    """Whose passes take some 200 kB for each row, however long the rows are."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(20_000))

    def forward(self, rows):
        return (rows[:, :1] * self.weight).relu().view(len(rows), 2, -1).mean(2)


def of_length(double, numbers):
    """Rows of so many numbers."""
    rows = TensorDataset(torch.ones(200, numbers), torch.arange(200) % 2)
    return supervised(model=Repeated, train=rows, test=())


def rows_of_length(numbers):
    arguments = {"task": f"{__file__}:of_length", "task_args": {"double": 0, "numbers": numbers}}
    return test_fitting.wide_spec(global_batch=64) | arguments


def rows_that_fit(world, megabytes, chosen=None):
    """Rows of `micro_batch: auto` on a device of so much memory."""
    before = simulated_device.BYTES
    simulated_device.BYTES = int(simulated_device.memory_allocated() + megabytes * 10**6)
    spec = load_spec(chosen or test_fitting.wide_spec(global_batch=64))
    try:
        task = load_task(spec.task, spec.task_args)
        return fitting_rows(spec, task=task, world=world, processes=world.processes, memory_bytes=0)
    finally:
        simulated_device.BYTES = before


def tested_again(world, spec, runs):
    """What a new process measures of a run."""
    loaded = load_spec(spec)
    task = load_task(loaded.task, loaded.task_args)
    return worker.test_run(loaded, task, world, run=runs / loaded.name)


def test_a_loss_with_tensors_is_brought_wherever_it_is_used(simulated, tmp_path):
    spec = JOBS["a loss with tensors"]
    simulated(1).run(train_in_process, spec, tmp_path)
    last = list(read_metrics(RunDirectory(tmp_path / spec["name"]).metrics))[-1]
    [again] = simulated(1).run(tested_again, spec, tmp_path)
    assert again["test/loss"] == pytest.approx(last["test/loss"], rel=1e-5)
    auto = spec | {"batch": {"global_batch": 64, "micro_batch": "auto"}}
    assert simulated(1).run(rows_that_fit, 200, auto) == [64]


def test_the_largest_micro_batch_is_what_the_device_holds(simulated):
    rows = simulated(1).run(rows_that_fit, 200)[0]
    assert 2 <= rows <= 16
    assert simulated(2).run(rows_that_fit, 200)[0] <= rows


def test_rows_that_will_lie_on_the_device_leave_less_for_a_micro_batch(simulated):
    [few] = simulated(1).run(rows_that_fit, 8.5, rows_of_length(1))
    [many] = simulated(1).run(rows_that_fit, 8.5, rows_of_length(1500))  # 1.2 MB
    assert (few, many) == (32, 16)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError("MPS backend out of memory (MPS allocated: 8.97 GB)"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED"),
        RuntimeError(
            "level_zero backend failed with error: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)"
        ),
        dist.DistBackendError("NCCL error: unhandled cuda error\nCuda failure 2 'out of memory'"),
        dist.DistBackendError("ncclSystemError: Failed to CUDA calloc async 608 bytes"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
    ids=lambda error: str(error)[:40],
)
def test_every_message_for_out_of_memory_is_recognized(error):
    assert is_out_of_memory(error)


def test_other_errors_are_not_out_of_memory():
    assert not is_out_of_memory(RuntimeError("CUDA error: device-side assert triggered"))
    assert not is_out_of_memory(ValueError("the shop is out of memory cards"))


def test_a_host_that_reads_a_value_waits_for_the_device():
    lock = threading.Lock()
    lock.acquire()
    value = SimpleNamespace(tolist=lock.acquire)  # no frame of Python's, as torch's own
    reader = threading.Thread(target=lambda: value.tolist())
    reader.start()
    try:
        frames = sys._current_frames()
        while ".tolist()" not in _line_of(frames[reader.ident])[0]:
            frames = sys._current_frames()
        assert _line_of(frames[reader.ident], on_device=True)[1]
        assert not _line_of(frames[reader.ident])[1], "on a CPU nothing is waited for there"
    finally:
        lock.release()
        reader.join()


def test_pinned_memory_is_reported_as_what_it_takes():
    told = saving_in_words(1100 * 2**20, CheckpointSpec(), pinned=True)
    assert "1.07 GiB each on disk" in told
    assert "the next power of two, 2 GiB, once in pinned main memory" in told


# ---- the commands, as they are


COMMON = ("tracking.wandb=", "length={steps: 24}", "schedule={}", "test={}")


def waits_of(trace):
    """Why the host waited within the steps that were traced."""
    events = json.loads(trace.read_text())["traceEvents"]
    events = [event for event in events if event.get("ph") == "X"]
    assert "aten::convolution_backward" in {event["name"] for event in events}
    steps = [event for event in events if event["name"].startswith("step ")]
    assert len(steps) == 8
    found = [event for event in events if event["name"].startswith("the host waits")]
    return {
        event["name"]
        for event in found
        if any(step["ts"] <= event["ts"] < step["ts"] + step["dur"] for step in steps)
    }


def test_the_commands_find_the_device_and_no_step_waits_for_it(with_sim, tmp_path):
    def on_sim(*words):
        done = evenstep(*words, cwd=tmp_path, **with_sim)
        assert done.returncode in (0, 75), done.stderr
        return done.stdout

    auto = on_sim(
        "run", "digits", *COMMON, "batch.micro_batch=auto", "--profile", "12:8", "--stop-at", 20
    )
    assert "batch.micro_batch: auto found 96 rows" in auto
    assert "1 process on sim" in auto
    assert "once in pinned main memory" in auto
    assert waits_of(tmp_path / "runs/digits/profile/rank-0.json") == set()
    assert "convolution" in (tmp_path / "runs/digits/profile/rank-0.txt").read_text()
    told = on_sim("test", "runs/digits", "--predictions", "said.npy")
    assert json.loads(told.splitlines()[-1])["test/accuracy"] > 0.3
    assert "step        loss" in on_sim("check", "digits")
    assert "measured" in on_sim("check", "digits")


IN_PLACE = """
import service, torch

torch.manual_seed(5)  # of the device too
torch.backends.cudnn.allow_tf32 = False

def settings():
    return [
        torch.get_num_threads(), torch.get_float32_matmul_precision(),
        torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark,
        torch.sim.get_rng_state().tolist(), torch.get_rng_state().tolist(),
    ]

before = settings()
tracking = {"wandb": None}
model = {"precision": "tf32", "cudnn_benchmark": True}
length = {"steps": 3}
service.run("digits", tracking=tracking, model=model, length=length, schedule={}, test={})
print("changed:", [one for one, other in zip(before, settings()) if one != other])
"""


def test_a_run_from_python_takes_the_device_and_gives_its_settings_back(with_sim, tmp_path):
    done = command(
        sys.executable, "-c", IN_PLACE, cwd=tmp_path, timeout=DEADLINE_SECONDS, **with_sim
    )
    assert "1 process on sim" in done.stdout, done.stderr
    assert done.stdout.endswith("changed: []\n")


def places_of_a_sweep(world):
    from launch.commands.sweep import _places

    return [len(_places(jobs, 1, 9)) for jobs in (None, 2)], simulated_device.device_count()


def test_a_sweep_gives_each_run_a_device(simulated):
    [(places, devices)] = simulated(1).run(places_of_a_sweep)
    assert places == [devices, 2]


def test_several_processes_each_take_their_own_device(with_sim, tmp_path):
    words = ("run", "digits", *COMMON, "--processes", "auto", "--profile", "12:8")
    done = evenstep(*words, cwd=tmp_path, **with_sim | {"SIM_DEVICES": "2"})
    assert done.returncode == 0, done.stderr
    assert "2 processes on sim" in done.stdout
    for rank in (0, 1):
        assert waits_of(tmp_path / f"runs/digits/profile/rank-{rank}.json") == set()


SMALL = ("run", "digits", "tracking.wandb=", "length={steps: 3}", "schedule={}", "test={}")


def test_two_processes_on_one_device_are_refused(with_sim, tmp_path):
    with_one = with_sim | {"SIM_DEVICES": "1"}
    done = evenstep(*SMALL, "--processes", 2, cwd=tmp_path, **with_one)
    assert done.returncode == 64, done.stderr
    assert "--processes: ranks 0, 1 compute on one device (Simulated device 0 of " in done.stderr


# A task that takes long to load on one process: by then the devices have connected.
SLOW_TASK = """
import simulated_device
from service.recipes.digits import task

assert simulated_device.EXCHANGED, "a process would wait for the others in its first exchange"
"""


def test_processes_that_are_shown_one_device_each_are_accepted(with_sim, tmp_path):
    (tmp_path / "slow.py").write_text(SLOW_TASK)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    common |= {"MASTER_PORT": str(port), "SIM_DEVICES": "1"}  # as under Slurm: each sees its own
    ranks = [
        start(
            [BIN / "evenstep", *SMALL, "task=./slow.py:task"],
            cwd=tmp_path,
            env=CLEAN
            | with_sim
            | common
            | {"RANK": str(rank), "LOCAL_RANK": str(rank), "CUDA_VISIBLE_DEVICES": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    said = [rank.communicate(timeout=DEADLINE_SECONDS)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    assert "2 processes on sim" in said[0]


def identities(world, names, uuids):
    """What tells the device of a process from others, where its card calls itself so."""
    kept, found = simulated_device._Properties.name, []
    try:
        for name, uuid in zip(names, uuids, strict=True):
            told = {"name": name, "uuid": uuid}
            told |= {"pci_domain_id": 0, "pci_bus_id": 220, "pci_device_id": 1}
            for key, value in told.items():
                setattr(simulated_device._Properties, key, value)
            found.append(identity_of(world.device))
    finally:
        simulated_device._Properties.name = kept
        for key in set(told) - {"name"}:
            delattr(simulated_device._Properties, key)
    return found


def test_slices_of_one_card_count_as_one_device(simulated):
    names = ["Card", "Card", "Card MIG 1g.10gb", "Card MIG 1g.10gb"]
    [found] = simulated(1).run(identities, names, ["GPU-1", "GPU-2", "MIG-1", "MIG-2"])
    assert found[:2] == ["Card GPU-1", "Card GPU-2"]
    assert found[2] == found[3]
    assert found[2].startswith("Card MIG 1g.10gb on PCI 0000:dc:01 of ")


def is_watched_as_device(world):
    return observed(None, world).device_waits


def test_the_watchdog_is_told_that_a_process_computes_on_a_device(simulated, processes):
    assert simulated(1).run(is_watched_as_device) == [True]
    assert processes(1).run(is_watched_as_device) == [False]


def test_the_doctor_sees_it(with_sim, tmp_path):
    told = evenstep("doctor", cwd=tmp_path, **with_sim).stdout
    assert "4 of sim (Simulated device, 1 GiB)" in told
    assert "2 processes on sim by simccl" in told


def settled_rows(world, micro_batch, place):
    """Rows of a micro-batch of a new job of 100 rows that may have four processes later."""
    batch = {"global_batch": 100} | ({"micro_batch": micro_batch} if micro_batch else {})
    spec = load_spec(spec_of("none", batch=batch, task=f"{FEATURES}:network"))
    task = load_task(spec.task, spec.task_args)
    found = settled(
        spec, task=task, world=world, runs=place, fresh=False, processes=4, processes_here=1,
        say=print,
    )  # fmt: skip
    return found.batch.micro_batch


class OneByOne(torch.utils.data.Dataset):
    def __len__(self):
        return 100

    def __getitem__(self, row):
        return torch.rand(3), torch.tensor(row % 2)


def one_by_one():
    return supervised(model=lambda: nn.Linear(3, 2), train=OneByOne(), test=())


def workers_of(world, task, place):
    spec = load_spec(spec_of("none", batch={"global_batch": 10, "micro_batch": 5}))
    made = load_task(task, {})
    found = settled(
        spec, task=made, world=world, runs=place, fresh=False, processes=1, processes_here=1,
        say=print,
    )  # fmt: skip
    return found.loader.workers


def test_rows_are_read_by_workers_beside_a_device_only(simulated, processes, tmp_path):
    task = f"{__file__}:one_by_one"
    assert simulated(1).run(workers_of, task, tmp_path) == [workers_each(1)]
    assert processes(1).run(workers_of, task, tmp_path) == [0]


def test_elastic_nodes_leave_a_micro_batch_for_each_process_to_come(simulated, tmp_path):
    assert simulated(1).run(settled_rows, None, tmp_path) == [25]
    assert simulated(1).run(settled_rows, "auto", tmp_path) == [25]


def test_by_default_a_process_computes_its_share_in_one_pass(with_sim, tmp_path):
    def run(*words, code=0, device=with_sim):
        words = (
            "run",
            "digits",
            "tracking.wandb=",
            "batch={global_batch: 96}",
            "schedule={}",
            "test={}",
            *words,
        )
        done = evenstep(*words, cwd=tmp_path, **device)
        assert done.returncode == code, done.stderr
        return done.stdout + done.stderr

    begun = run("length={steps: 4}", "--stop-at", 2, "--processes", 2, code=75)
    assert "batch.micro_batch: 48 rows, the share of a process on a device" in begun
    recorded = load_spec(tmp_path / "runs/digits/spec.yaml")
    assert recorded.batch.micro_batch == 48
    # On other devices and at other numbers of processes the run keeps it.
    too_few = run("length={steps: 4}", "--processes", 3, code=64)
    assert "2 micro-batches of 48" in too_few
    assert "batch.micro_batch=32" in too_few
    assert "the share of" not in run("length={steps: 4}", device={})
    assert (tmp_path / "runs/digits/checkpoints/step-00000004").is_dir()
    assert load_spec(tmp_path / "runs/digits/spec.yaml").batch.micro_batch == 48
