"""A step of one's own as a module, so that all forward passes in it are one to DDP."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from service.data.batches import Batch
from service.data.losses import Entry, LossPart, StepContext, read_losses
from service.data.task import WithStep
from service.distributed.world import World


@dataclass
class Pass:
    """One micro-batch on its way through the step."""

    batch: Batch
    context: StepContext
    parts: Mapping[str, LossPart] | None = None
    """What the step gave, once it was taken."""
    outputs: Any = None

    def through(self, callee: nn.Module) -> Mapping[str, LossPart]:
        """The losses by name, of a forward pass of `callee`: what it gives, not what it was given.

        Args:
            callee: a `SteppedModel`, or what wraps it. With a static graph DDP waits for a gradient
                of the very tensors that its forward pass returns.
        """
        sums = callee(self)
        assert self.parts is not None, "a forward pass takes the step"
        pairs = zip(self.parts.items(), sums, strict=True)
        self.parts = {name: part._replace(sum=passed) for (name, part), passed in pairs}
        return self.parts

    def part(self, name: str) -> LossPart | None:
        """The loss of this name, where the step gave it."""
        return (self.parts or {}).get(name)

    def settle(self, name: str, share: Tensor) -> None:
        """Put the share of this micro-batch in a loss of all rows in its place."""
        assert self.parts is not None, "the step was not taken"
        self.parts = {**self.parts, name: self.parts[name]._replace(sum=share)}

    def entries(self) -> dict[str, Entry]:
        """What is recorded of it: the losses by name, then what the step logged."""
        assert self.parts is not None, "the step was not taken"
        losses = {n: (part.sum.detach(), part.weight, part.scale) for n, part in self.parts.items()}
        return losses | self.context.logged


class SteppedModel(nn.Module):
    """The model within the task's step: what is called in training in place of the model."""

    def __init__(self, model: nn.Module, task: WithStep, world: World) -> None:
        super().__init__()
        self.model = model
        self._step = task.step
        self._world = world

    def forward(self, asked: Pass) -> list[Tensor]:
        """Take the step, unless it was taken before; its sums, which have the graph."""
        if asked.parts is None:
            self.take(asked)
        assert asked.parts is not None
        return [part.sum for part in asked.parts.values()]

    def take(self, asked: Pass) -> Pass:
        """Call the task's step.

        Raises:
            SpecError: what it gives is no losses.
        """
        with self._world.autocast():
            given = self._step(self.model, asked.batch, asked.context)
        asked.parts, asked.outputs = read_losses(given, asked.batch, context=asked.context)
        return asked

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters of the model, by their names without the wrapper."""
        return self.model.named_parameters(*args, **kwargs)


def total_of(parts: Mapping[str, LossPart], *, divisors: Mapping[str, float | Tensor]) -> Tensor:
    """The share of one micro-batch in the loss of its step: a scalar with a graph.

    Args:
        divisors: what the sum of each loss is divided by. A loss that nothing counts is 0.
    """
    total: Tensor | None = None
    for name, part in parts.items():
        scaled = part.sum * (part.scale * _inverse(divisors[name], part.sum))
        total = scaled if total is None else total + scaled
    assert total is not None, "read_losses gives one loss at least"
    return total


def _inverse(divisor: float | Tensor, like: Tensor) -> float | Tensor:
    if isinstance(divisor, Tensor):
        return torch.where(divisor > 0, divisor.reciprocal(), 0.0).to(like)
    return 1.0 / divisor if divisor else 0.0


def alone(parts: Mapping[str, LossPart]) -> Tensor:
    """The loss of a step of this one micro-batch."""
    return total_of(parts, divisors={name: part.weight for name, part in parts.items()})
