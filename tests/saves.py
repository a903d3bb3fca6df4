"""A small state with everything a checkpoint must hold, and hands that write under injury."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from service.basics.multipart import PART_BYTES
from service.checkpoints.checkpoints import Checkpoints
from service.distributed.world import World
from service.optimization.learning_rates import Schedule
from service.optimization.train_state import Best, TrainState
from service.spec.models import CheckpointSpec


class Net(nn.Module):
    """Tied weights, BatchNorm, a mask of infinities, half precision, a number without a shape."""

    def __init__(self, width: int = 7) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 3)
        self.norm = nn.BatchNorm2d(width)
        self.embed = nn.Embedding(11, width)
        self.head = nn.Linear(width, 11, bias=False)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.brief = nn.Parameter(torch.randn(5, dtype=torch.bfloat16))
        self.register_buffer("mask", torch.full((3, 3), -torch.inf).triu(1))
        self.register_buffer("empty", torch.empty(0, 4))
        self.register_buffer("seen", torch.tensor([True, False, True]))


def new_state(seed: int = 0, **options: Any) -> TrainState:
    torch.manual_seed(seed)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, amsgrad=True, **options)
    return TrainState(model, optimizer, Schedule(optimizer, lambda step: 1.0))


def take_step(state: TrainState) -> None:
    """A step whose gradients follow from its number."""
    generator = torch.Generator().manual_seed(state.step)
    for p in state.model.parameters():
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
    state.model.norm.running_mean += 1  # type: ignore[operator, union-attr]
    state.optimizer.step()
    state.step += 1


def at_step(step: int) -> TrainState:
    state = new_state()
    while state.step < step:
        take_step(state)
    return state


def content(state: TrainState) -> dict[str, Tensor | float]:
    """Copies of every number in the state, by name."""
    found: dict[str, Tensor | float] = {k: v.clone() for k, v in state.model.state_dict().items()}
    for name, parameter in state.model.named_parameters():
        for key, value in state.optimizer.state[parameter].items():
            found[f"{key} of {name}"] = value.clone() if isinstance(value, Tensor) else value
    return found | {"step": state.step}


def same(a: TrainState | dict[str, Any], b: TrainState | dict[str, Any]) -> bool:
    """Whether all numbers of two states have the same type and the same bits."""
    one, other = (x if isinstance(x, dict) else content(x) for x in (a, b))
    return one.keys() == other.keys() and all(
        torch.equal(v, other[k]) and v.dtype == other[k].dtype
        if isinstance(v, Tensor)
        else v == other[k]
        for k, v in one.items()
    )


def checkpoints(
    directory: Path, world: World, *, part_bytes: int = PART_BYTES, **options: Any
) -> Checkpoints:
    return Checkpoints(
        directory,
        world=world,
        spec=CheckpointSpec(**options),
        facts={"processes": world.processes, "train_rows": 103},
        say=print,
        part_bytes=part_bytes,
    )


def saved(directory: Path, world: World, *steps: int, **options: Any) -> Checkpoints:
    """Checkpoints of these steps, on disk."""
    made = checkpoints(directory, world, **options)
    for step in steps:
        made.save(at_step(step))
    made.finish()
    return made


def best(state: TrainState, value: float) -> TrainState:
    state.bests = [Best(step=state.step, measure="test/accuracy", value=value)]
    return state


# ---- injuries


OPERATIONS = ("open", "write", "fsync", "mkdir", "rename", "replace", "unlink", "rmdir")


@contextmanager
def watched(notice: Callable[[str, tuple[Any, ...]], None]) -> Iterator[None]:
    """Calls `notice` before each operation on the file system, in this process."""
    real = {name: getattr(os, name) for name in OPERATIONS}

    def wrapped(name: str) -> Callable[..., Any]:
        def operation(*words: Any, **options: Any) -> Any:
            notice(name, words)
            return real[name](*words, **options)

        return operation

    for name in OPERATIONS:
        setattr(os, name, wrapped(name))
    try:
        yield
    finally:
        for name, operation in real.items():
            setattr(os, name, operation)


def die_at(number: int) -> Callable[[str, tuple[Any, ...]], None]:
    """Kills this process at its operation of that number; a write is cut in half first."""
    count = 0
    write, one_at_a_time = os.write, threading.Lock()

    def notice(name: str, words: tuple[Any, ...]) -> None:
        nonlocal count
        with one_at_a_time:
            count += 1
            if count == number:
                if name == "write":
                    write(words[0], words[1][: len(words[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)

    return notice
