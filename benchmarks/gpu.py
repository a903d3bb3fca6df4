"""All measurements that need a GPU, in one command.

    python -m benchmarks.gpu [--only resnet50,gpt2] [--minutes 8]
    python -m benchmarks.gpu --small      # a smoke test: every part, tiny, on the CPU

Each part is a separate process with a time limit, so that one that fails or hangs does not affect
the others; a part that would start too late is skipped and reported.  With a second GPU, the two
models are also trained on two.  The output is the tables of docs/explanation/performance.md.

ResNet-50 (channels_last) and a 124M-parameter GPT-2, both in bf16 with a fused optimizer, are
compared with two hand-written loops: a plain one, and the best one without compilation.  All loops
take the same micro-batches, in turns within one process; each turn ends with a synchronization of
the device: medians of the ratios of wall time.  `host ms` is the host time of a step where the
device waits for the host; memory is the peak of one side, including its rows.  The ceiling is the
median of a second of bf16 products of two square matrices of 8,192; a step's operations are counted
on the `meta` device.  The last save is not timed.
"""

from __future__ import annotations

import argparse
import contextlib
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
from dataclasses import dataclass, field
from itertools import count, pairwise
from pathlib import Path
from typing import Any

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

WARM, STEPS, HOST_STEPS = 20, 20, 5
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
        inputs = torch.randn(self.rows, *self.shape, generator=generator)
        return TensorDataset(inputs, torch.arange(self.rows) % self.classes)


class Pixels(Dataset[tuple[Tensor, Tensor]]):
    """uint8 images, one at a time, for the workers of a loader."""

    def __init__(self, job: Job) -> None:
        size = (job.rows, *job.shape)
        self._images = torch.randint(256, size, dtype=torch.uint8)
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
    "resnet50": Job(1024, (3, 224, 224), 1000, 256, RESNET, SGD),
    "gpt2": Job(1024, (1024,), 50_304, 16, GPT, ADAMW, kind="text"),
    "tiny": Job(16_384, (64,), 10, 32, {}, SGD, kind="numbers", precision="fp32"),
}
SMALL = {
    "resnet50": Job(64, (3, 32, 32), 10, 8, SMALL_RESNET, SGD),
    "gpt2": Job(64, (16,), 100, 8, SMALL_GPT, ADAMW, kind="text"),
    "tiny": Job(512, (64,), 10, 32, {}, SGD, kind="numbers", precision="fp32"),
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
    """Evenstep's loop and the hand-written ones, in turns of `STEPS` steps."""

    def __init__(self, rivals: dict[str, ByHand], world: World, *, pairs: int) -> None:
        self._rivals = rivals
        self._device = world.device
        self._pairs = pairs
        self._before = held_bytes(world.device)
        self.sides = {name: Side() for name in ("ours", *rivals)}
        self.steps = WARM + pairs * STEPS + HOST_STEPS + 1
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
                    rival.train_steps(STEPS)
            with self._turn("ours", mine):
                for _ in range(STEPS):
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
        side.seconds.append((waited(self._device) - began) / STEPS)
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
            "tracking": {"log_every_steps": STEPS},
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


def timed(world: World, found: list[float]) -> Callable[[Iterator[Step]], Iterator[Step]]:
    """Yields the steps; appends to `found` the seconds per step of each `STEPS` after the first."""

    def over(steps: Iterator[Step]) -> Iterator[Step]:
        for _ in range(STEPS):
            yield next(steps)
        while True:
            began = waited(world.device)
            for _ in range(STEPS):
                step = next(steps, None)
                if step is None:
                    return
                yield step
            found.append((waited(world.device) - began) / STEPS)

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
    turns = Turns(rivals, world, pairs=pairs)
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
    against_hand("gpt2", world, small, compiled=True)


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
            for _ in range(STEPS * 5):
                rows.copy_(torch.randint(job.rows, (job.batch,), device=world.device))
                step()
            seconds[name].append((waited(world.device) - began) / STEPS / 5)
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
    base = 0.0
    for name, way in ways.items():
        found: list[float] = []
        more = {"steps": 6 * STEPS + 1, "over": timed(world, found), "model": {"compile": way}}
        losses[name, 1] = first_loss(ours("tiny", world, small=small, **more))
        seconds = statistics.median(found)
        base = base or seconds
        show(world, f"| {name} | {1e3 * seconds:.3f} | {seconds / base:.3f} |")
        if name != "true":  # gradients are accumulated
            rows = ours("tiny", world, small=small, parts=2, **more)
            losses[name, 2] = first_loss(rows)
    told = ", ".join(f"{name} {parts}: {loss:.6f}" for (name, parts), loss in losses.items())
    show(world, "", f"Loss of step {STEPS}, by micro-batches: {told}.")
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
        found: list[float] = []
        ours(
            "resnet50",
            world,
            small=small,
            steps=3 * STEPS + 1,
            over=timed(world, found),
            parts=4,
            model={"batchnorm": mode},
        )
        seconds = statistics.median(found)
        base = base or seconds
        show(world, f"| {mode} | {1e3 * seconds:.2f} | {seconds / base:.3f} |")


def part_loader(world: World, small: bool) -> None:
    """Rows from loader workers, compared with a hand-written loop."""
    job = job_of("resnet50", small)
    workers = 2 if small else max(2, min(8, (os.cpu_count() or 2) - 2))
    found: list[float] = []
    loader = {"workers": workers}
    ours(
        "resnet50",
        world,
        small=small,
        steps=3 * STEPS + 1,
        over=timed(world, found),
        rows="loader",
        loader=loader,
    )
    mine = statistics.median(found)
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
        sampler=RandomSampler(data, replacement=True, num_samples=3 * STEPS * job.batch),
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
        if number % STEPS == 0:
            marks.append(waited(device))
    return statistics.median(later - sooner for sooner, later in pairwise(marks)) / STEPS


def part_save(world: World, small: bool) -> None:
    """How long a save blocks training, and how long until it is on disk."""
    rows = ours(
        "gpt2",
        world,
        small=small,
        steps=4 * STEPS,
        over=lambda steps: steps,
        checkpoint={"every_steps": STEPS, "keep": 1},
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
    seconds = {}
    for name in ("resnet50", "gpt2"):
        found: list[float] = []
        way = timed(world, found)
        ours(name, world, small=small, steps=3 * STEPS + 1, over=way, parts=4, model=_MICRO)
        seconds[name] = statistics.median(found)
    show(world, "| 4 micro-batches | rounding, ms | bitwise, ms | ratio |", "|---|--:|--:|--:|")
    with process_group(Environment(), precision="bf16", bitwise=True) as exact:
        for name, plain in seconds.items():
            found = []
            way = timed(exact, found)
            more = {"exactness": "bitwise", "model": _MICRO}
            ours(name, exact, small=small, steps=3 * STEPS + 1, over=way, parts=4, **more)
            now = statistics.median(found)
            show(world, f"| {name} | {1e3 * plain:.2f} | {1e3 * now:.2f} | {now / plain:.2f} |")


_MICRO = {"batchnorm": "micro"}


def part_waits(world: World, small: bool) -> None:
    """Between two logged steps the host never waits for the device: torch ends what does."""
    if world.device.type != "cuda":
        show(world, "Whether the host waits for the device can be asked of CUDA only.")
        return

    def over(steps: Iterator[Step]) -> Iterator[Step]:
        for number in count(1):
            quiet = WARM < number <= 3 * STEPS and number % STEPS  # the last one saves
            torch.cuda.set_sync_debug_mode("error" if quiet else "default")
            step = next(steps, None)
            if step is None:
                return
            yield step

    try:
        for name in ("gpt2", "resnet50", "tiny"):
            ours(name, world, small=small, steps=3 * STEPS + 1, over=over)
            show(world, f"{name}: the host waits for the device at logged steps only.")
    finally:
        torch.cuda.set_sync_debug_mode("default")


def part_resume(world: World, small: bool) -> None:
    """A run that is stopped and goes on ends in the bits of one that was not: real commands."""
    show(world, "| stopped at step 11 and resumed | weights |", "|---|---|")
    for exactness in ("rounding", "bitwise"):
        with tempfile.TemporaryDirectory() as place:
            words = ["digits", "length={steps: 30}", f"exactness={exactness}"]
            words += ["test={every_epochs: 9}"]
            codes = [
                command("run", *words, "--name", "whole", cwd=place),
                command("run", *words, "--name", "cut", "--stop-at", "11", cwd=place),
                command("run", *words, "--name", "cut", cwd=place),
            ]
            assert codes == [0, 75, 0], f"exit codes {codes}"
            whole, cut = (weights_of(Path(place, "runs", name)) for name in ("whole", "cut"))
        told = "the same bits" if whole == cut else "OTHER BITS"
        show(world, f"| exactness: {exactness} | {told} |")
        assert whole == cut or exactness == "rounding", "bitwise promises the bits on any device"


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
    root = Path(__file__).parents[1]
    words = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    words += ["-W", "default"]  # a card may warn of something that no machine without one does
    assert subprocess.run([*words, *GPU_TESTS], cwd=root).returncode == 0, "tests failed"


# By name: to look for them in all files takes half a minute.
GPU_TESTS = [f"tests/test_{name}.py" for name in ("carrier", "gpu_compile", "normalization")]


PARTS: dict[str, tuple[Callable[[World, bool], None], int]] = {
    "device": (part_device, 60),
    "waits": (part_waits, 90),
    "resnet50": (part_resnet50, 120),
    "gpt2": (part_gpt2, 120),
    "tiny": (part_tiny, 60),
    "save": (part_save, 90),
    "resume": (part_resume, 150),
    "bitwise": (part_bitwise, 120),
    "batchnorm": (part_batchnorm, 90),
    "loader": (part_loader, 120),
    "tests": (part_tests, 180),
    "replayed": (part_replayed, 120),
    "graph": (part_graph, 60),
    "compiled": (part_compiled, 180),
}
"""The parts, and their time limits in seconds."""
ON_TWO = ("resnet50", "gpt2")
_LEAST_SECONDS = 20


def run_part(name: str, *, small: bool) -> None:
    """One part, in this process."""
    die_with_parent()  # torchrun starts it in a session of its own, which `ended` does not reach
    if name == "bitwise":  # cuBLAS reads it once, and the runs without it come first
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    precision = "fp32" if name in ("tiny", "graph", "device", "replayed") else "bf16"
    with process_group(launched() or Environment(), precision=precision) as world:
        if world.device.type == "cpu" and not small:
            raise SystemExit("there is no GPU here; --small shows whether it would run")
        PARTS[name][0](world, small)


def run_all(names: list[str], *, small: bool, minutes: float) -> int:
    """Run each part in a separate process, one after the other; return the number of failures."""
    began, failed, left_out = time.monotonic(), list[str](), list[str]()
    todo = [(name, 1) for name in names]
    if torch.accelerator.device_count() > 1 and not small:
        todo += [(name, 2) for name in ON_TWO if name in names]
    for name, processes in todo:
        left = 60 * minutes - (time.monotonic() - began)
        if left < _LEAST_SECONDS:
            left_out.append(name)
            continue
        start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        words = [sys.executable, *(start if processes > 1 else []), "-m", "benchmarks.gpu"]
        words += ["--part", name, *(["--small"] if small else [])]
        on = " on two processes" if processes > 1 else ""
        print(
            f"\n### {name}{on}: {PARTS[name][0].__doc__ or 'Evenstep and hand-written loops'}\n",
            flush=True,
        )
        at = time.monotonic()
        code = ended(words, seconds=min(left, PARTS[name][1]))
        if code:
            failed.append(f"{name}{on} ({code})")
        print(f"\n({time.monotonic() - at:.0f} s)", flush=True)
    print(f"\nIn {time.monotonic() - began:.0f} s.", flush=True)
    if left_out:
        print(f"Skipped because of the time limit: {', '.join(left_out)}.")
    print(f"FAILED: {', '.join(failed)}." if failed else "Every part ran.")
    return len(failed)


def ended(words: list[str], *, seconds: float) -> int:
    """The exit code of a command; 124 where it timed out and was killed with all its children."""
    process = subprocess.Popen(words, start_new_session=True)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return 124
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", help="parts, separated by commas", default=",".join(PARTS))
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.small:
        os.environ.setdefault("EVENSTEP_DEVICE", "cpu")
    if given.part:
        run_part(given.part, small=given.small)
        return
    names = given.only.split(",")
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    if not (given.small or torch.accelerator.is_available()):
        parser.error("there is no GPU here; --small shows whether it would run")
    sys.exit(min(1, run_all(names, small=given.small, minutes=given.minutes)))


if __name__ == "__main__":
    main()
