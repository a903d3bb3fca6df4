"""Overhead of synchronized BatchNorm on this machine's CPU, with one thread per process.

python benchmarks/batchnorm_cost.py
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from processes import Processes

from service.distributed.batchnorm import Mode, prepare
from service.distributed.world import World

LAYERS = 53  # the number of layers and the mean width of a ResNet-50
CHANNELS = 512
SHAPES = {
    "[64, 128]": (64, 128),
    "[32, 64, 28, 28]": (32, 64, 28, 28),
    "[32, 256, 7, 7]": (32, 256, 7, 7),
}


def microseconds(call: Callable[[], object], *, repeats: int = 30) -> float:
    """The lowest of several means: other work on the machine can only add time."""
    call()
    fastest = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        fastest = min(fastest, (time.perf_counter() - start) / repeats)
    return fastest * 1e6


def finish_step(world: World) -> float:
    model = nn.Sequential(*(nn.BatchNorm1d(CHANNELS) for _ in range(LAYERS)))
    normalization = prepare(model, "micro", world)
    model(torch.randn(4, CHANNELS))
    return microseconds(normalization.finish_step)


def forward_and_backward(
    world: World, mode: Mode, shape: tuple[int, ...], channels_last: bool
) -> float:
    kind = nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d
    layer = kind(shape[1])
    prepare(layer, mode, world)
    rows = torch.randn(shape)
    if channels_last and len(shape) == 4:
        rows = rows.to(memory_format=torch.channels_last)
    grad = torch.randn_like(rows)
    rows.requires_grad_()

    def once() -> None:
        rows.grad = None
        output: Tensor = layer(rows)
        output.backward(grad)  # type: ignore[no-untyped-call]

    return microseconds(once, repeats=10)


def main() -> None:
    with Processes(1) as one, Processes(2) as two:
        print(f"finish_step, {LAYERS} layers of {CHANNELS} channels, micro:")
        for pool in (one, two):
            print(f"  {pool.count} processes {max(pool.run(finish_step)):8.0f} us")
        print("forward and backward of one layer, us:")
        heads = ["plain, 1", "micro, 1", "plain, 2", "micro, 2", "sync, 2"]
        print(f"  {'rows of one process':34}" + "".join(f"{head:>10}" for head in heads))
        for name, shape in SHAPES.items():
            for channels_last in (False, True)[: len(shape) // 2]:
                runs: list[tuple[Processes, Mode]] = [
                    (one, "local"),
                    (one, "micro"),
                    (two, "local"),
                    (two, "micro"),
                    (two, "sync"),
                ]
                took = [
                    max(pool.run(forward_and_backward, mode, shape, channels_last))
                    for pool, mode in runs
                ]
                label = name + (" channels_last" if channels_last else "")
                print(f"  {label:34}" + "".join(f"{us:10.0f}" for us in took))


if __name__ == "__main__":
    main()
