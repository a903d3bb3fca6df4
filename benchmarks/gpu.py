"""ResNet-50 and a 124M-parameter GPT-2 on one GPU: our loop against the same loop by hand.

    python -m benchmarks.gpu [--model resnet50|gpt2] [--pairs 6] [--compile]
    python -m benchmarks.gpu --small          # both, tiny, wherever there is no GPU: does it run?

Both in bf16, ResNet-50 in channels_last, with a fused optimizer.  Within one process the two loops
take turns of `STEPS` steps, each ended by a wait for the device: medians of the ratios of wall
time.  Utilisation is the operations of the forward and backward passes, as torch counts them, over
what a bf16 product of two square matrices of 8,192 reaches on the same device.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from launch.environment import Environment, launched
from launch.process_group import process_group
from service import worker
from service.batches import Step
from service.faults import StopRequest
from service.plan import make_plan
from service.spec_file import load_spec
from service.task import Task, load_task, supervised
from service.world import World

WARM, STEPS = 20, 40


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
    """Of one image, or (length,) of one text."""
    classes: int
    batch: int
    model: dict[str, Any]
    optimizer: dict[str, Any]

    @property
    def is_text(self) -> bool:
        return len(self.shape) == 1

    def network(self) -> nn.Module:
        if self.is_text:
            return GPT2(words=self.classes, length=self.shape[0], **self.model)
        return resnet(classes=self.classes, **self.model)

    def data(self) -> TensorDataset:
        generator = torch.Generator().manual_seed(0)
        if self.is_text:
            texts = torch.randint(self.classes, (self.rows, *self.shape), generator=generator)
            return TensorDataset(texts, texts.roll(-1, dims=1))
        images = torch.randn(self.rows, *self.shape, generator=generator)
        return TensorDataset(images, torch.arange(self.rows) % self.classes)


SGD = {"name": "sgd", "lr": 0.1, "momentum": 0.9}
ADAMW = {"name": "adamw", "lr": 6e-4}
JOBS = {
    "resnet50": Job(2048, (3, 224, 224), 1000, 256, {"width": 64, "depths": (3, 4, 6, 3)}, SGD),
    "gpt2": Job(2048, (1024,), 50_304, 32, {"layers": 12, "width": 768, "heads": 12}, ADAMW),
    "small resnet50": Job(64, (3, 32, 32), 10, 8, {"width": 8, "depths": (1, 1, 1, 1)}, SGD),
    "small gpt2": Job(64, (16,), 100, 8, {"layers": 2, "width": 32, "heads": 2}, ADAMW),
}


def task(name: str) -> Task:
    """What the spec of ours names."""
    job = JOBS[name]
    data = job.data()
    weight = torch.ones_like if job.is_text else None  # each token counts as 1
    return supervised(model=job.network, train=data, test=data, weight=weight)


class ByHand:
    """The same loop, written by hand."""

    def __init__(self, job: Job, device: torch.device, *, compiled: bool) -> None:
        self.job, self.device = job, device
        torch.manual_seed(0)
        self.model = job.network().to(device)
        if not job.is_text:
            self.model = self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.called = torch.compile(self.model) if compiled else self.model
        options = {key: value for key, value in job.optimizer.items() if key != "name"}
        kind = torch.optim.AdamW if job.is_text else torch.optim.SGD
        self.optimizer: torch.optim.Optimizer = kind(self.model.parameters(), fused=True, **options)
        self.inputs, self.targets = (tensor.to(device) for tensor in job.data().tensors)

    def train_steps(self, steps: int) -> None:
        self.called.train()
        for _ in range(steps):
            rows = torch.randint(self.job.rows, (self.job.batch,), device=self.device)
            inputs, targets = self.inputs[rows], self.targets[rows]
            if not self.job.is_text:
                inputs = inputs.to(memory_format=torch.channels_last)
            self.optimizer.zero_grad()
            with torch.autocast(self.device.type, torch.bfloat16):
                outputs = self.called(inputs)
            loss = F.cross_entropy(outputs.float(), targets)
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()

    def operations(self) -> int:
        """Floating-point operations of the forward and backward passes of one step."""
        with FlopCounterMode(display=False) as counter:
            outputs = self.model(self.inputs[: self.job.batch])
            F.cross_entropy(outputs, self.targets[: self.job.batch]).backward()  # type: ignore[no-untyped-call]
        self.optimizer.zero_grad()
        return int(counter.get_total_flops())


def waited(device: torch.device) -> float:
    """Now, when the device has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def ceiling(device: torch.device) -> float:
    """Operations a second of a bf16 product of square matrices; the best of ten."""
    side = 8192 if device.type != "cpu" else 512
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    seconds = []
    for _ in range(10):
        began = waited(device)
        a @ a
        seconds.append(waited(device) - began)
    return 2 * side**3 / min(seconds)


def taking_turns(
    steps: Iterable[Step], hand: ByHand, found: list[tuple[float, float]], *, pairs: int
) -> Iterator[Step]:
    """The same steps; between `STEPS` of them the loop by hand takes as many."""
    source = iter(steps)
    for _ in range(WARM):
        yield next(source)
    hand.train_steps(WARM)
    for _ in range(pairs):
        began = waited(hand.device)
        hand.train_steps(STEPS)
        between = waited(hand.device)
        for _ in range(STEPS):
            yield next(source)
        found.append((waited(hand.device) - between, between - began))


def row(name: str, world: World, *, pairs: int, compiled: bool) -> str:
    """One line of the table."""
    job, device = JOBS[name], world.device
    spec = load_spec(
        {
            "name": "gpu",
            "task": "benchmarks.gpu:task",
            "task_args": {"name": name},
            "batch": {"global_batch": job.batch},
            "length": {"steps": WARM + pairs * STEPS},
            "optimizer": job.optimizer,
            "model": {
                "precision": "bf16",
                "compile": compiled,
                "channels_last": not job.is_text,
                "batchnorm": "local",
            },
            "tracking": {"log_every_steps": STEPS},
        }
    )
    ours = load_task(spec.task, spec.task_args)
    plan = make_plan(spec, processes=1, train_rows=job.rows, test_rows=0)
    hand, found = ByHand(job, device, compiled=compiled), list[tuple[float, float]]()
    usual: Any = worker.train_steps
    worker.train_steps = lambda *a, **k: taking_turns(usual(*a, **k), hand, found, pairs=pairs)
    with tempfile.TemporaryDirectory() as runs, contextlib.redirect_stdout(io.StringIO()):
        worker.run(plan, ours, world, runs=Path(runs), stop=StopRequest())
    worker.train_steps = usual
    seconds = statistics.median(mine for mine, _ in found) / STEPS
    ratio = statistics.median(theirs / mine for mine, theirs in found)
    per_row = job.shape[0] if job.is_text else 1
    used = hand.operations() / seconds / ceiling(device)
    return (
        f"| {name} | {job.batch * per_row / seconds:,.0f} {'tokens' if job.is_text else 'images'} "
        f"| {1000 * seconds:.1f} | {ratio:.3f} | {100 * used:.0f} % |"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", choices=["resnet50", "gpt2"])
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--small", action="store_true")
    given = parser.parse_args()
    if given.small:
        os.environ.setdefault("EVENSTEP_DEVICE", "cpu")
    names = [given.model] if given.model else ["resnet50", "gpt2"]
    with process_group(launched() or Environment(), precision="bf16") as world:
        kind = world.device.type
        if kind == "cpu" and not given.small:
            parser.error("there is no GPU here; --small shows whether it would run")
        device = torch.cuda.get_device_name() if kind == "cuda" else kind
        print(f"{device}, torch {torch.__version__}, bf16, compile={given.compile}\n")
        print("| model | a second | ms a step | speed against by hand | of the ceiling |")
        print("|---|---|---|---|---|")
        for name in names:
            named = f"small {name}" if given.small else name
            print(row(named, world, pairs=given.pairs, compiled=given.compile), flush=True)


if __name__ == "__main__":
    main()
