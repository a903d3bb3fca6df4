"""All measurements that need a GPU, in one command.

    python -m benchmarks.gpu [--only resnet50,gpt2] [--minutes 8]
    python -m benchmarks.gpu --small      # a smoke test: every part, tiny, on the CPU

Parts share a process (`STAGES`), because each start takes seconds; those that time nothing run
side by side.  A part that fails or hangs ends its process, and the ones after it go on in a new
one.  Each has an estimate (`PARTS`), which no other part can use up: a slow one gets what the
estimates of the rest leave, and then its stacks are printed.  With a second GPU, the two models are
also trained on two.  The output is the tables of docs/explanation/performance.md.

ResNet-50 (channels_last) and a 124M-parameter GPT-2, both in bf16 with a fused optimizer, are
compared with two hand-written loops: a plain one, and the best one without compilation.  All loops
take the same micro-batches, in turns within one process; each turn ends with a synchronization of
the device: medians of the ratios of wall time.  `host ms` is the host time of a step where the
device waits for the host; memory is the peak of one side, including its rows.  The ceiling is the
median of a second of bf16 products of two square matrices of 8,192; a step's operations are
counted on the `meta` device.  The last save is not timed.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import gc
import hashlib
import io
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import count, pairwise
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, RandomSampler, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import by_hand
from launch.environment import Environment, launched
from launch.rank.process_group import process_group
from service.data.batches import Step
from service.data.task import Task, load_task, supervised
from service.distributed.devices import synchronize
from service.distributed.world import World
from service.health.stop_request import StopRequest, die_with_parent
from service.plan.plan import make_plan
from service.runs.tracking import read_metrics
from service.spec.files import load_spec
from service.training import worker

WARM, HOST_STEPS = 10, 5
MIB, GIB = 1 << 20, 1 << 30


class Bottleneck(nn.Module):
    """The block of ResNet-50. Source: He et al., arXiv:1512.03385; stride on the 3x3."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        out = 4 * width
        self.body = nn.Sequential(
            *(nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(True)),
            *(nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)),
            *(nn.ReLU(True), nn.Conv2d(width, out, 1, bias=False), nn.BatchNorm2d(out)),
        )
        self.beside: nn.Module = nn.Identity()
        if stride != 1 or channels != out:
            self.beside = nn.Sequential(
                nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out)
            )

    def forward(self, images: Tensor) -> Tensor:
        return F.relu(self.body(images) + self.beside(images))


def resnet(width: int, depths: tuple[int, ...], classes: int) -> nn.Module:
    """[B, 3, H, W] to [B, classes]; ResNet-50 is a width of 64 and depths of 3, 4, 6, 3."""
    layers: list[nn.Module] = [
        *(nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width)),
        *(nn.ReLU(True), nn.MaxPool2d(3, 2, 1)),
    ]
    channels = width
    for stage, depth in enumerate(depths):
        for block in range(depth):
            stride = 2 if stage and not block else 1
            layers.append(Bottleneck(channels, width << stage, stride))
            channels = 4 * (width << stage)
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)]
    return nn.Sequential(*layers, *head)


class Block(nn.Module):
    """The block of GPT-2. Source: Radford et al. 2019, "Language Models are Unsupervised ..."."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.look, self.mix = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.think = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width)
        )

    def forward(self, states: Tensor) -> Tensor:
        rows, length, width = states.shape
        asked = self.look(self.first(states)).view(rows, length, 3, self.heads, -1)
        q, k, v = asked.transpose(1, 3).unbind(2)  # each [B, heads, T, width / heads]
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        states = states + self.mix(seen.transpose(1, 2).reshape(rows, length, width))
        added: Tensor = states + self.think(self.second(states))
        return added


class GPT2(nn.Module):
    """[B, T] tokens to [B, words, T]; 124M is 12 layers of 768 with 12 heads and 50,304 words."""

    def __init__(self, *, layers: int, width: int, heads: int, words: int, length: int) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.last = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        states = self.last(self.blocks(self.words(tokens) + self.places(places)))
        return F.linear(states, self.words.weight).transpose(1, 2)


@dataclass(frozen=True)
class Job:
    """One model with its rows."""

    rows: int
    shape: tuple[int, ...]
    """Shape of one image, of one row of numbers, or (length,) of one text."""
    classes: int
    batch: int
    """Rows of a micro-batch; each process takes one per step."""
    window: int
    """Steps that are timed together, and between two logged ones."""
    model: dict[str, Any]
    optimizer: dict[str, Any]
    kind: str = "image"
    precision: str = "bf16"

    @property
    def is_image(self) -> bool:
        return self.kind == "image"

    @property
    def is_text(self) -> bool:
        return self.kind == "text"

    def network(self) -> nn.Module:
        if self.is_text:
            return GPT2(words=self.classes, length=self.shape[0], **self.model)
        if self.is_image:
            return resnet(classes=self.classes, **self.model)
        return by_hand.network()

    def data(self) -> TensorDataset:
        generator = torch.Generator().manual_seed(0)
        if self.is_text:
            texts = torch.randint(self.classes, (self.rows, *self.shape), generator=generator)
            return TensorDataset(texts, texts.roll(-1, dims=1))
        some = torch.randn(self.rows // 8, *self.shape, generator=generator)
        inputs = some.repeat(8, *(1 for _ in self.shape))  # a second faster than new ones
        return TensorDataset(inputs, torch.arange(self.rows) % self.classes)


class Pixels(Dataset[tuple[Tensor, Tensor]]):
    """uint8 images, one at a time, for the workers of a loader."""

    def __init__(self, job: Job) -> None:
        some = torch.randint(256, (job.rows // 8, *job.shape), dtype=torch.uint8)
        self._images = some.repeat(8, 1, 1, 1)
        self._classes = torch.arange(job.rows) % job.classes

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        return self._images[row], self._classes[row]


class OfBytes(nn.Module):
    """The same network for uint8 images, which are converted on the device."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        images = images.to(memory_format=torch.channels_last)
        outputs: Tensor = self.network(images.float().div(127.5).sub(1.0))
        return outputs


SGD = {"name": "sgd", "lr": 0.1, "momentum": 0.9}
ADAMW = {"name": "adamw", "lr": 6e-4}
RESNET = {"width": 64, "depths": (3, 4, 6, 3)}
SMALL_RESNET = {"width": 8, "depths": (1, 1, 1, 1)}
GPT = {"layers": 12, "width": 768, "heads": 12}
SMALL_GPT = {"layers": 2, "width": 32, "heads": 2}
JOBS = {
    "resnet50": Job(1024, (3, 224, 224), 1000, 256, 10, RESNET, SGD),
    "gpt2": Job(1024, (1024,), 50_304, 8, 10, GPT, ADAMW, kind="text"),
    # Compiled twice, which takes longer the more layers there are.
    "gpt2 of 6 layers": Job(1024, (1024,), 50_304, 8, 10, GPT | {"layers": 6}, ADAMW, kind="text"),
    "tiny": Job(16_384, (64,), 10, 32, 50, {}, SGD, kind="numbers", precision="fp32"),
}
SMALL = {
    "resnet50": Job(64, (3, 32, 32), 10, 8, 5, SMALL_RESNET, SGD),
    "gpt2": Job(64, (16,), 100, 8, 5, SMALL_GPT, ADAMW, kind="text"),
    "gpt2 of 6 layers": Job(64, (16,), 100, 8, 5, SMALL_GPT, ADAMW, kind="text"),
    "tiny": Job(512, (64,), 10, 32, 20, {}, SGD, kind="numbers", precision="fp32"),
}


def job_of(name: str, small: bool) -> Job:
    return (SMALL if small else JOBS)[name]


def task(name: str, small: bool, rows: str = "memory") -> Task:
    """The task that the spec names; `rows` come from memory or from the workers of a loader."""
    job = job_of(name, small)
    weight = torch.ones_like if job.is_text else None  # each token counts as 1
    if rows == "memory":
        held = job.data()
        return supervised(model=job.network, train=held, test=held, weight=weight)
    data = Pixels(job)
    return supervised(model=lambda: OfBytes(job.network()), train=data, test=data)


# ---- the hand-written loops


class ByHand:
    """The same loop, hand-written: plain, or as fast as possible without compilation."""

    def __init__(self, job: Job, world: World, *, best: bool, compiled: bool = False) -> None:
        self.job, self.device, self.best = job, world.device, best
        before = held_bytes(self.device)
        torch.manual_seed(0)
        self.model = laid_out(job, job.network().to(self.device))
        self.called: Any = torch.compile(self.model) if compiled else self.model
        if world.processes > 1:
            self.called = DistributedDataParallel(self.called, gradient_as_bucket_view=best)
        self.optimizer = optimizer_of(job, self.model)
        self.inputs, self.targets = (tensor.to(self.device) for tensor in job.data().tensors)
        if best and job.is_image:
            self.inputs = self.inputs.to(memory_format=torch.channels_last)
        self.held_bytes = held_bytes(self.device) - before
        self.loss = math.nan

    def train_steps(self, steps: int) -> None:
        """Take `steps` steps; read the loss of the last one."""
        self.called.train()
        usual, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, self.best
        try:
            order = torch.randint(self.job.rows, (steps, self.job.batch), device=self.device)
            for rows in order.unbind():
                loss = self.step(rows)
            self.loss = float(loss)
        finally:
            torch.backends.cudnn.benchmark = usual

    def step(self, rows: Tensor) -> Tensor:
        inputs, targets = self.inputs[rows], self.targets[rows]
        if self.job.is_image and not self.best:
            inputs = inputs.to(memory_format=torch.channels_last)
        self.optimizer.zero_grad()
        with autocast_of(self.job, self.device):
            outputs = self.called(inputs)
            if self.best:  # the cast to float32 is the loss's own, and fused with it
                loss = F.cross_entropy(outputs, targets)
        if not self.best:
            loss = F.cross_entropy(outputs.float(), targets)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return loss.detach()


def laid_out(job: Job, model: nn.Module) -> nn.Module:
    nhwc: Any = {"memory_format": torch.channels_last}
    return model.to(**nhwc) if job.is_image else model


def optimizer_of(job: Job, model: nn.Module) -> torch.optim.Optimizer:
    options = {key: value for key, value in job.optimizer.items() if key != "name"}
    kind: Any = torch.optim.AdamW if job.optimizer["name"] == "adamw" else torch.optim.SGD
    made: torch.optim.Optimizer = kind(model.parameters(), fused=True, **options)
    return made


def autocast_of(job: Job, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    if job.precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


# ---- measurements


def waited(device: torch.device) -> float:
    """The time after a synchronization of the device."""
    synchronize(device)
    return time.perf_counter()


def held_bytes(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def ceiling(device: torch.device, small: bool, kind: torch.dtype = torch.bfloat16) -> float:
    """Operations a second of a product of square matrices: the median of a second of them."""
    side = 256 if small else 8192
    a = torch.randn(side, side, device=device, dtype=kind)
    seconds: list[float] = []
    for _ in range(3):
        a @ a
    while sum(seconds) < 1.0:
        began = waited(device)
        a @ a
        seconds.append(waited(device) - began)
    return 2 * side**3 / statistics.median(seconds)


def operations(job: Job) -> int:
    """Floating-point operations of the forward and backward passes of one step."""
    with torch.device("meta"):
        model = job.network()
        shape = (job.batch, *job.shape)
        inputs = torch.randint(job.classes, shape) if job.is_text else torch.randn(shape)
        targets = torch.randint(job.classes, shape if job.is_text else (job.batch,))
    with FlopCounterMode(display=False) as counter:
        F.cross_entropy(model(inputs), targets).backward()  # type: ignore[no-untyped-call]
    return int(counter.get_total_flops())


@dataclass
class Side:
    """Measurements of one loop."""

    seconds: list[float] = field(default_factory=list)
    """Seconds per step, by turn."""
    host: list[float] = field(default_factory=list)
    """Host seconds per step, where the device waits for the host."""
    peak_bytes: int = 0

    def against(self, other: Side) -> float:
        """The other's time relative to this one's: above 1 where the other is slower."""
        pairs = zip(self.seconds, other.seconds, strict=True)
        return statistics.median(theirs / mine for mine, theirs in pairs)

    def cells(self) -> str:
        step, host = (1e3 * statistics.median(found) for found in (self.seconds, self.host))
        return f"{step:.2f} | {host:.2f} | {self.peak_bytes / GIB:.2f}"


class Turns:
    """Evenstep's loop and the hand-written ones, in turns of so many steps as the job says."""

    def __init__(self, rivals: dict[str, ByHand], world: World, *, turn: int, pairs: int) -> None:
        self._rivals = rivals
        self._device = world.device
        self._steps = turn
        self._pairs = pairs
        self._before = held_bytes(world.device)
        self.sides = {name: Side() for name in ("ours", *rivals)}
        self.steps = WARM + pairs * turn + HOST_STEPS + 1
        """Number of steps of Evenstep's loop; the last one, which saves, is not timed."""

    def over(self, steps: Iterable[Step]) -> Iterator[Step]:
        """Yield the same steps; between them the other loops take their turns."""
        source = iter(steps)
        for _ in range(WARM):
            yield next(source)
        mine = held_bytes(self._device) - self._before
        for rival in self._rivals.values():
            before = held_bytes(self._device)
            rival.train_steps(WARM)  # its optimizer's state comes with the first step
            rival.held_bytes += held_bytes(self._device) - before
        for _ in range(self._pairs):
            for name, rival in self._rivals.items():
                with self._turn(name, rival.held_bytes):
                    rival.train_steps(self._steps)
            with self._turn("ours", mine):
                for _ in range(self._steps):
                    yield next(source)
        for _ in range(HOST_STEPS):
            for name, rival in self._rivals.items():
                rows = torch.randint(rival.job.rows, (rival.job.batch,), device=self._device)
                with self._host(name):
                    rival.step(rows)
            step = next(source)
            with self._host("ours"):
                yield step
        yield from source

    @contextlib.contextmanager
    def _turn(self, name: str, held: int) -> Iterator[None]:
        on_gpu, side = self._device.type == "cuda", self.sides[name]
        began, before = waited(self._device), held_bytes(self._device)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self._device)
        yield
        side.seconds.append((waited(self._device) - began) / self._steps)
        if on_gpu:
            peak = torch.cuda.max_memory_allocated(self._device) - before + held
            side.peak_bytes = max(side.peak_bytes, peak)

    @contextlib.contextmanager
    def _host(self, name: str) -> Iterator[None]:
        began = waited(self._device)
        yield
        self.sides[name].host.append(time.perf_counter() - began)


def ours(
    name: str,
    world: World,
    *,
    small: bool,
    steps: int,
    over: Callable[[Iterator[Step]], Iterator[Step]],
    rows: str = "memory",
    parts: int = 1,
    **sections: Any,
) -> list[dict[str, Any]]:
    """Train `steps` steps of a job with Evenstep; return the rows of its metrics.

    Args:
        over: receives the steps and yields them to the loop.
        parts: micro-batches into which each process's rows of a step are cut.
        sections: sections of the spec in addition to those of the job.
    """
    job = job_of(name, small)
    model = {"precision": job.precision, "channels_last": job.is_image, "batchnorm": "local"}
    batch = {"global_batch": job.batch * world.processes, "micro_batch": job.batch // parts}
    spec = load_spec(
        {
            "name": "gpu",
            "task": "benchmarks.gpu:task",
            "task_args": {"name": name, "small": small, "rows": rows},
            "batch": batch,
            "length": {"steps": steps},
            "optimizer": job.optimizer,
            "tracking": {"log_every_steps": job.window},
            **sections,
            "model": model | sections.get("model", {}),
        }
    )
    trained = load_task(spec.task, spec.task_args)
    plan = make_plan(spec, processes=world.processes, train_rows=job.rows, test_rows=0)
    usual: Any = worker.train_steps
    worker.train_steps = lambda *a, **k: over(usual(*a, **k))
    place = Path(world.from_lead(tempfile.mkdtemp(prefix="evenstep-gpu-") if world.is_lead else ""))
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            worker.run(plan, trained, world, runs=place, stop=StopRequest())
        return read_metrics(place / "gpu" / "metrics.jsonl") if world.is_lead else []
    finally:
        worker.train_steps = usual
        world.barrier()
        if world.is_lead:
            shutil.rmtree(place)


def seconds_a_step(name: str, world: World, *, small: bool, windows: int, **how: Any) -> float:
    """Train a job with Evenstep; the median of its windows after the first.  See `ours`."""
    found: list[float] = []
    window = job_of(name, small).window
    steps = windows * window + 1
    ours(name, world, small=small, steps=steps, over=timed(world, found, window), **how)
    return statistics.median(found)


def timed(
    world: World, found: list[float], window: int
) -> Callable[[Iterator[Step]], Iterator[Step]]:
    """Yields the steps; appends to `found` the seconds per step of each window after the first."""

    def over(steps: Iterator[Step]) -> Iterator[Step]:
        for _ in range(window):
            yield next(steps)
        while True:
            began = waited(world.device)
            for _ in range(window):
                step = next(steps, None)
                if step is None:
                    return
                yield step
            found.append((waited(world.device) - began) / window)

    return over


# ---- the parts


def show(world: World, *lines: str) -> None:
    if world.is_lead:
        print(*lines, sep="\n", flush=True)


def part_device(world: World, small: bool) -> None:
    """The device, its throughput, and a check that a group of one process works."""
    device = world.device
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        size = f"{card.total_memory / GIB:.0f} GiB, CUDA {torch.version.cuda}"
        nccl = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
        show(world, f"{card.name}, {size}, NCCL {nccl}, torch {torch.__version__}", "")
    else:
        show(world, f"{device.type}, torch {torch.__version__}", "")
    show(world, "| product of two square matrices | TFLOP/s |", "|---|--:|")
    for name, kind, precision in (
        ("float32, TF32 off (model.precision: fp32)", torch.float32, "highest"),
        ("float32, TF32 on (model.precision: tf32)", torch.float32, "high"),
        ("bf16", torch.bfloat16, "highest"),
    ):
        torch.set_float32_matmul_precision(precision)
        show(world, f"| {name} | {ceiling(device, small, kind) / 1e12:.4g} |")
    torch.set_float32_matmul_precision("highest")
    if dist.is_initialized():
        return
    backend = dist.get_default_backend_for_device(device)
    with tempfile.TemporaryDirectory() as place:
        marks = [time.perf_counter()]
        dist.init_process_group(backend, init_method=f"file://{place}/meet", rank=0, world_size=1)
        values = torch.ones(1 << 20, device=device)
        dist.all_reduce(values)
        waited(device)
        marks.append(time.perf_counter())
        assert float(values.sum()) == 1 << 20, "a sum over one process is what it was"
        dist.destroy_process_group()
        marks.append(time.perf_counter())
    meet, part = marks[1] - marks[0], marks[2] - marks[1]
    show(
        world, "", f"A group of one by {backend}: {meet:.2f} s to meet and add, {part:.2f} to part."
    )


def against_hand(
    name: str, world: World, small: bool, *, compiled: bool = False, pairs: int = 4
) -> None:
    job = job_of(name, small)
    rivals = {"plain": ByHand(job, world, best=False, compiled=compiled)}
    if not compiled:
        rivals["best"] = ByHand(job, world, best=True)
    turns = Turns(rivals, world, turn=job.window, pairs=pairs)
    ours(name, world, small=small, steps=turns.steps, over=turns.over, model={"compile": compiled})
    mine, work = turns.sides["ours"], operations(job)
    most = ceiling(world.device, small)
    per_row = job.shape[0] if job.is_text else 1
    what = "tokens" if job.is_text else "rows"
    many = f", {world.processes} processes" if world.processes > 1 else ""
    show(
        world,
        f"| {name}{', compiled' if compiled else ''}{many} | ms a step | host ms | GiB "
        f"| {what} a second | of the ceiling | Evenstep's speed relative to it |",
        "|---|--:|--:|--:|--:|--:|--:|",
    )
    for side, found in turns.sides.items():
        seconds = statistics.median(found.seconds)
        rate = job.batch * per_row * world.processes / seconds
        used = f"{100 * work / seconds / most:.3g} %"
        ratio = "" if side == "ours" else f"{mine.against(found):.3f}"
        named = "Evenstep" if side == "ours" else f"hand-written, {side}"
        show(world, f"| {named} | {found.cells()} | {rate:,.0f} | {used} | {ratio} |")


def part_resnet50(world: World, small: bool) -> None:
    against_hand("resnet50", world, small)


def part_gpt2(world: World, small: bool) -> None:
    against_hand("gpt2", world, small)


def part_tiny(world: World, small: bool) -> None:
    """A net whose step is nothing but launches."""
    against_hand("tiny", world, small, pairs=10)


def part_compiled(world: World, small: bool) -> None:
    against_hand("gpt2 of 6 layers", world, small, compiled=True)


def part_graph(world: World, small: bool) -> None:
    """Effect of a CUDA graph on the tiny network: two hand-written loops, with and without."""
    if world.device.type != "cuda":
        show(world, "A CUDA graph needs CUDA.")
        return
    job = job_of("tiny", small)
    hand = ByHand(job, world, best=True)
    hand.train_steps(WARM)
    rows = torch.randint(job.rows, (job.batch,), device=world.device)
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            hand.step(rows)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    hand.optimizer.zero_grad()
    with torch.cuda.graph(graph):
        hand.step(rows)
    seconds: dict[str, list[float]] = {"launched": [], "replayed": []}
    for _ in range(10):
        for name, step in (("launched", lambda: hand.step(rows)), ("replayed", graph.replay)):
            began = waited(world.device)
            for _ in range(100):
                rows.copy_(torch.randint(job.rows, (job.batch,), device=world.device))
                step()
            seconds[name].append((waited(world.device) - began) / 100)
    show(world, "| a hand-written step of the tiny network | ms |", "|---|--:|")
    for name, found in seconds.items():
        show(world, f"| {name} | {1e3 * statistics.median(found):.3f} |")


def part_replayed(world: World, small: bool) -> None:
    """`model.compile` with and without CUDA graphs, for the tiny network."""
    ways: dict[str, bool | dict[str, str]] = {
        "false": False,
        "true": True,
        "{mode: reduce-overhead}": {"mode": "reduce-overhead"},
    }
    losses: dict[tuple[str, int], float] = {}
    show(world, "| model.compile, the tiny network | ms a step | against false |", "|---|--:|--:|")
    base, window = 0.0, job_of("tiny", small).window
    for name, way in ways.items():
        found: list[float] = []
        over = timed(world, found, window)
        more = {"steps": 6 * window + 1, "over": over, "model": {"compile": way}}
        losses[name, 1] = first_loss(ours("tiny", world, small=small, **more))
        seconds = statistics.median(found)
        base = base or seconds
        show(world, f"| {name} | {1e3 * seconds:.3f} | {seconds / base:.3f} |")
        if name != "true":  # gradients are accumulated
            rows = ours("tiny", world, small=small, parts=2, **more)
            losses[name, 2] = first_loss(rows)
    told = ", ".join(f"{name} {parts}: {loss:.6f}" for (name, parts), loss in losses.items())
    show(world, "", f"Loss of step {window}, by micro-batches: {told}.")
    apart = max(losses.values()) - min(losses.values())
    assert apart < 0.01 * max(losses.values()), "the ways of compiling train differently"


def first_loss(rows: list[dict[str, Any]]) -> float:
    """The first loss that the run has logged."""
    return float(next(row["train/loss"] for row in rows if "train/loss" in row))


def part_batchnorm(world: World, small: bool) -> None:
    """BatchNorm's exact ways against `local`, four micro-batches a step."""
    show(world, "| model.batchnorm, 4 micro-batches | ms a step | against local |", "|---|--:|--:|")
    base = 0.0
    for mode in ("local", "micro", "sync"):
        how = {"parts": 4, "model": {"batchnorm": mode}}
        seconds = seconds_a_step("resnet50", world, small=small, windows=3, **how)
        base = base or seconds
        _BY_BATCHNORM[mode] = seconds
        show(world, f"| {mode} | {1e3 * seconds:.2f} | {seconds / base:.3f} |")


_BY_BATCHNORM: dict[str, float] = {}
"""Seconds of a step in four micro-batches, as this process has found them."""


def part_loader(world: World, small: bool) -> None:
    """Rows from loader workers, compared with a hand-written loop."""
    job = job_of("resnet50", small)
    workers = 2 if small else max(2, min(8, (os.cpu_count() or 2) - 2))
    how = {"rows": "loader", "loader": {"workers": workers}}
    mine = seconds_a_step("resnet50", world, small=small, windows=4, **how)
    theirs = loaded_by_hand(job, world, workers)
    show(
        world,
        f"| rows of {workers} workers | ms a step | rows a second |",
        "|---|--:|--:|",
        f"| Evenstep | {1e3 * mine:.2f} | {job.batch / mine:,.0f} |",
        f"| hand-written | {1e3 * theirs:.2f} | {job.batch / theirs:,.0f} |",
    )


def loaded_by_hand(job: Job, world: World, workers: int) -> float:
    """Seconds of a step."""
    device, data = world.device, Pixels(job)
    model = laid_out(job, OfBytes(job.network()).to(device))
    optimizer = optimizer_of(job, model)
    batches = DataLoader(
        data,
        batch_size=job.batch,
        sampler=RandomSampler(data, replacement=True, num_samples=4 * job.window * job.batch),
        num_workers=workers,
        pin_memory=device.type == "cuda",
    )
    marks = []
    for number, (inputs, targets) in enumerate(batches, start=1):
        images, aims = (tensor.to(device, non_blocking=True) for tensor in (inputs, targets))
        optimizer.zero_grad()
        with autocast_of(job, device):
            outputs = model(images)
        F.cross_entropy(outputs.float(), aims).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if number % job.window == 0:
            marks.append(waited(device))
    return statistics.median(later - sooner for sooner, later in pairwise(marks)) / job.window


def part_save(world: World, small: bool) -> None:
    """How long a save blocks training, and how long until it is on disk."""
    every = 2 * job_of("gpt2", small).window
    rows = ours(
        "gpt2",
        world,
        small=small,
        steps=3 * every,
        over=lambda steps: steps,
        checkpoint={"every_steps": every, "keep": 1},
    )
    stalls = [row["save/stall_seconds"] for row in rows if "save/stall_seconds" in row]
    durable = [row["save/durable_seconds"] for row in rows if "save/durable_seconds" in row]
    job = job_of("gpt2", small)
    with torch.device("meta"):
        size = 3 * sum(p.nbytes for p in job.network().parameters())  # Adam keeps two more of each
    show(
        world,
        "| a save of GPT-2 with AdamW | MiB | stall, s: first, others | durable, s |",
        "|---|--:|--:|--:|",
        f"| asynchronous | {size / MIB:,.1f} | {stalls[0]:.3f}, {max(stalls[1:]):.3f} "
        f"| {statistics.median(durable):.2f} |",
    )


def part_bitwise(world: World, small: bool) -> None:
    """`exactness: bitwise` against `rounding`; after the first, for it changes the process."""
    model = {"batchnorm": "micro"}
    how: dict[str, Any] = {"small": small, "windows": 3, "parts": 4, "model": model}
    seconds = {"resnet50": _BY_BATCHNORM["micro"]} if "micro" in _BY_BATCHNORM else {}
    for name in ("resnet50", "gpt2"):
        if name not in seconds:
            seconds[name] = seconds_a_step(name, world, **how)
    show(world, "| 4 micro-batches | rounding, ms | bitwise, ms | ratio |", "|---|--:|--:|--:|")
    with process_group(Environment(), precision="bf16", bitwise=True) as exact:
        for name, plain in seconds.items():
            now = seconds_a_step(name, exact, exactness="bitwise", **how)
            show(world, f"| {name} | {1e3 * plain:.2f} | {1e3 * now:.2f} | {now / plain:.2f} |")


def part_waits(world: World, small: bool) -> None:
    """Between two logged steps the host never waits for the device: torch ends what does."""
    if world.device.type != "cuda":
        show(world, "Whether the host waits for the device can be asked of CUDA only.")
        return

    def over(steps: Iterator[Step], window: int) -> Iterator[Step]:
        for number in count(1):
            quiet = WARM < number <= 3 * window and number % window  # the last one saves
            torch.cuda.set_sync_debug_mode("error" if quiet else "default")
            step = next(steps, None)
            if step is None:
                return
            yield step

    try:
        for name in ("gpt2", "resnet50", "tiny"):
            window = job_of(name, small).window
            quiet = partial(over, window=window)
            ours(name, world, small=small, steps=3 * window + 1, over=quiet)
            show(world, f"{name}: the host waits for the device at logged steps only.")
    finally:
        torch.cuda.set_sync_debug_mode("default")


def part_resume(world: World, small: bool) -> None:
    """A run that is stopped and goes on ends in the bits of one that was not: real commands."""
    ways = ("rounding", "bitwise")
    with tempfile.TemporaryDirectory() as place, ThreadPoolExecutor(4) as pool:

        def run(exactness: str, name: str, *words: str) -> Future[int]:
            common = ["digits", "length={steps: 30}", "test={every_epochs: 9}"]
            common += [f"exactness={exactness}", "--name", f"{exactness}-{name}"]
            return pool.submit(command, "run", *common, *words, cwd=place)

        whole = [run(way, "whole") for way in ways]
        begun = [run(way, "cut", "--stop-at", "11") for way in ways]
        codes = [each.result() for each in (*whole, *begun)]
        codes += [each.result() for each in [run(way, "cut") for way in ways]]
        assert codes == [0, 0, 75, 75, 0, 0], f"exit codes {codes}"
        bits = {
            way: [weights_of(Path(place, "runs", f"{way}-{name}")) for name in ("whole", "cut")]
            for way in ways
        }
    show(world, "| stopped at step 11 and resumed | weights |", "|---|---|")
    for way, (one, other) in bits.items():
        told = "the same bits" if one == other else "OTHER BITS"
        show(world, f"| exactness: {way} | {told} |")
    assert len(set(bits["bitwise"])) == 1, "bitwise promises the bits on any device"


def command(*words: str, cwd: str) -> int:
    """The exit code of `python -m launch WORDS`; its output is printed where it fails."""
    done = subprocess.run(
        [sys.executable, "-m", "launch", *words],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
    )
    if done.returncode not in (0, 75):
        print(done.stdout, done.stderr, sep="\n", flush=True)
    return done.returncode


def weights_of(run: Path) -> str:
    newest = max((run / "checkpoints").glob("step-*"))
    return hashlib.sha256((newest / "model.safetensors").read_bytes()).hexdigest()


def part_tests(world: World, small: bool) -> None:
    """The tests that need a GPU."""
    words = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    words += ["-W", "default"]  # a card may warn of something that no machine without one does
    how: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    how["env"] = os.environ | {"EVENSTEP_COLD_TESTS": "1"}  # nothing that was forked
    compiled = [test for test in GPU_TESTS if "compile" in test]
    both = [compiled, [test for test in GPU_TESTS if test not in compiled]]
    root = Path(__file__).parents[1]
    running = [subprocess.Popen([*words, *tests], cwd=root, **how) for tests in both]
    for each in running:
        show(world, each.communicate()[0])
    assert [each.returncode for each in running] == [0, 0], "tests failed"


# By name: to look for them in all files takes half a minute.
GPU_TESTS = [f"tests/test_{name}.py" for name in ("carrier", "gpu_compile", "normalization")]


@dataclass(frozen=True)
class Part:
    """One table, or a few lines, of the output."""

    run: Callable[[World, bool], None]
    seconds: int
    """What it takes on an H100, estimated high, without the start of its process."""
    precision: str = "bf16"


# Estimates: 0.1 s for a step of ResNet-50 and 0.07 s for one of GPT-2, of which three loops take 56
# each; 10 s for cuDNN to time its algorithms; 2 to 4 s for what a run does before and after its
# steps, a save of 1.5 GB included; 16 s for a command; 25 s to compile six layers, twice, and 15 s
# for a small network; 12 s for pytest to begin, 45 s for nine runs of three processes that compile.
PARTS: dict[str, Part] = {
    "device": Part(part_device, 9, "fp32"),
    "tiny": Part(part_tiny, 4, "fp32"),
    "graph": Part(part_graph, 4, "fp32"),
    "resnet50": Part(part_resnet50, 38),
    "gpt2": Part(part_gpt2, 26),
    "save": Part(part_save, 18),
    "loader": Part(part_loader, 22),
    "waits": Part(part_waits, 20),
    "resume": Part(part_resume, 32),
    "tests": Part(part_tests, 70),
    "batchnorm": Part(part_batchnorm, 26),
    "bitwise": Part(part_bitwise, 26),
    "replayed": Part(part_replayed, 45, "fp32"),
    "compiled": Part(part_compiled, 60),
}
# By importance. A stage is a list of processes that run side by side; a process, a list of parts.
STAGES = (
    (("device", "tiny", "graph"),),
    (("resnet50", "gpt2", "save", "loader"),),
    (("waits",), ("resume",), ("tests",)),
    (("batchnorm", "bitwise"),),  # bitwise changes its process, and cuBLAS's setting is read once
    (("replayed", "compiled"),),
)
ON_TWO = ("resnet50", "gpt2")
START_SECONDS = 10
_LEAST_SECONDS = 10
_PROGRAM = ("-m", "benchmarks.gpu")


class Process(NamedTuple):
    """The parts of one process, or of one on each GPU."""

    parts: tuple[str, ...]
    on: int = 1

    @property
    def seconds(self) -> int:
        return START_SECONDS + sum(PARTS[name].seconds for name in self.parts)


def stages_of(names: Iterable[str], *, devices: int) -> list[list[Process]]:
    """The stages of these parts; on a second device the last ones."""
    known = set(names)
    pruned = [
        [Process(tuple(name for name in parts if name in known)) for parts in stage]
        for stage in STAGES
    ]
    if devices > 1:  # each in processes of its own: a group is joined once
        pruned += [[Process((name,), on=2)] for name in ON_TWO if name in known]
    kept = [[process for process in stage if process.parts] for stage in pruned]
    return [stage for stage in kept if stage]


def estimate(stages: Iterable[list[Process]]) -> int:
    """Seconds of all these stages."""
    return sum(max(process.seconds for process in stage) for stage in stages)


def run_part(name: str, *, small: bool) -> None:
    """One part, in this process."""
    part = PARTS[name]
    if name == "bitwise":  # cuBLAS reads it once, and the runs without it come first
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    with process_group(launched() or Environment(), precision=part.precision) as world:
        if world.device.type == "cpu" and not small:
            raise SystemExit("there is no GPU here; --small shows whether it would run")
        many = f" on {world.processes} processes" if world.processes > 1 else ""
        told = part.run.__doc__ or "Evenstep and hand-written loops"
        show(world, f"\n### {name}{many}: {told}\n")
        began = time.monotonic()
        part.run(world, small)
        show(world, f"\n({time.monotonic() - began:.0f} s)")


def run_parts(names: list[str], *, small: bool, until: float, done: Path) -> None:
    """These parts, one after the other, in this process; those that are complete are in `done`.

    Args:
        until: when the last of them must have ended, by `time.monotonic`.
    """
    die_with_parent()  # torchrun starts it in a session of its own, which `ended` does not reach
    if "bitwise" in names:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    for number, name in enumerate(names):
        later = sum(PARTS[each].seconds for each in names[number + 1 :])
        own = PARTS[name].seconds + (0 if number else START_SECONDS)
        faulthandler.dump_traceback_later(max(own, until - time.monotonic() - later), exit=True)
        run_part(name, small=small)
        faulthandler.cancel_dump_traceback_later()
        if int(os.environ.get("RANK", "0")) == 0:
            with done.open("a") as file:
                file.write(f"{name}\n")
        torch._dynamo.reset()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def run_all(names: list[str], *, small: bool, minutes: float) -> int:
    """Run the parts, stage after stage; return the number of failures."""
    began = time.monotonic()
    end = began + 60 * minutes
    stages = stages_of(names, devices=1 if small else torch.accelerator.device_count())
    print(f"Estimated: {estimate(stages)} s on an H100.", flush=True)
    codes: dict[str, int | None] = {}
    for number, stage in enumerate(stages):
        until = end - estimate(stages[number + 1 :])
        run = partial(finished, small=small, until=until, end=end, shows=len(stage) == 1)
        if len(stage) == 1:
            codes |= run(stage[0])
            continue
        with ThreadPoolExecutor(len(stage)) as pool:
            for found in pool.map(run, stage):
                codes |= found
    print(f"\nIn {time.monotonic() - began:.0f} s.", flush=True)
    skipped = [name for name, code in codes.items() if code is None]
    failed = [f"{name} ({code})" for name, code in codes.items() if code]
    if skipped:
        print(f"Skipped because of the time limit: {', '.join(skipped)}.")
    print(f"FAILED: {', '.join(failed)}." if failed else "Every part ran.")
    return len(failed)


def finished(
    process: Process, *, small: bool, until: float, end: float, shows: bool
) -> dict[str, int | None]:
    """The exit code of each part; None where it was too late to start it.

    Args:
        until: when it must have ended, so that later stages have time.
        end: when everything must have ended.
        shows: print as it comes; otherwise when it has ended.
    """
    many = f" on {process.on}" if process.on > 1 else ""
    codes: dict[str, int | None] = {}
    left = list(process.parts)
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(process.on)]
    while left:
        now = time.monotonic()
        if end - now < _LEAST_SECONDS:
            return codes | dict.fromkeys(f"{name}{many}" for name in left)
        with tempfile.TemporaryDirectory() as place, open(f"{place}/said", "w+") as said:
            done = Path(place, "done")
            words = [sys.executable, *(start if process.on > 1 else []), *_PROGRAM]
            words += ["--part", ",".join(left), "--until", str(until), "--done", str(done)]
            words += ["--small"] if small else []
            code = ended(words, seconds=end - now, out=None if shows else said)
            if not shows:
                said.seek(0)
                print(said.read(), flush=True)
            complete = done.read_text().split() if done.exists() else []
        codes |= dict.fromkeys((f"{name}{many}" for name in complete), 0)
        left = left[len(complete) :]
        if code or left:  # the next one failed; or all are complete, and the process did not end
            codes[f"{(left or complete)[0 if left else -1]}{many}"] = code or 1
            left = left[1:]
    return codes


def ended(words: list[str], *, seconds: float, out: IO[str] | None) -> int:
    """The exit code of a command; 124 where it timed out and was killed with all its children."""
    process = subprocess.Popen(words, start_new_session=True, stdout=out, stderr=out)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return 124
    finally:
        with contextlib.suppress(ProcessLookupError):  # what it has started may still run
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", help="parts, separated by commas", default=",".join(PARTS))
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--done", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.small:
        os.environ.setdefault("EVENSTEP_DEVICE", "cpu")
    names = (given.part or given.only).split(",")
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    if given.part:
        run_parts(names, small=given.small, until=given.until, done=given.done)
        return
    if not (given.small or torch.accelerator.is_available()):
        parser.error("there is no GPU here; --small shows whether it would run")
    sys.exit(min(1, run_all(names, small=given.small, minutes=given.minutes)))


if __name__ == "__main__":
    main()
