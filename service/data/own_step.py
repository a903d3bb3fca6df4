"""A task's own step as a module, so that DDP sees all its forward passes as one."""

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
    """One micro-batch in the step."""

    batch: Batch
    context: StepContext
    parts: Mapping[str, LossPart] | None = None
    """The result of the step, once it has run."""
    outputs: Any = None

    def through(self, callee: nn.Module) -> Mapping[str, LossPart]:
        """The losses by name from a forward pass of `callee`: the tensors that it returns.

        Args:
            callee: a `SteppedModel`, or its wrapper. With a static graph DDP waits for a gradient
                of exactly the tensors that its forward pass returns.
        """
        sums = callee(self)
        assert self.parts is not None, "a forward pass runs the step"
        pairs = zip(self.parts.items(), sums, strict=True)
        self.parts = {name: part._replace(sum=passed) for (name, part), passed in pairs}
        return self.parts

    def part(self, name: str) -> LossPart | None:
        """The loss of this name, if the step returned it."""
        return (self.parts or {}).get(name)

    def settle(self, name: str, share: Tensor) -> None:
        """Set the share of this micro-batch in a loss of all rows."""
        assert self.parts is not None, "the step has not run"
        self.parts = {**self.parts, name: self.parts[name]._replace(sum=share)}

    def entries(self) -> dict[str, Entry]:
        """The recorded values: the losses by name, then the values that the step logged."""
        assert self.parts is not None, "the step has not run"
        losses = {n: (part.sum.detach(), part.weight, part.scale) for n, part in self.parts.items()}
        return losses | self.context.logged


class SteppedModel(nn.Module):
    """The model within the task's step: training calls it instead of the model."""

    def __init__(self, model: nn.Module, task: WithStep, world: World) -> None:
        super().__init__()
        self.model = model
        self._step = task.step
        self._world = world

    def forward(self, asked: Pass) -> list[Tensor]:
        """Run the step, unless it has run; return its sums, which have the graph."""
        if asked.parts is None:
            self.take(asked)
        assert asked.parts is not None
        return [part.sum for part in asked.parts.values()]

    def take(self, asked: Pass) -> Pass:
        """Call the task's step.

        Raises:
            SpecError: its result is not losses.
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
        divisors: the divisor of each loss. A loss with divisor 0 is 0.
    """
    total: Tensor | None = None
    for name, part in parts.items():
        scaled = part.sum * (part.scale * _inverse(divisors[name], part.sum))
        total = scaled if total is None else total + scaled
    assert total is not None, "read_losses returns at least one loss"
    return total


def _inverse(divisor: float | Tensor, like: Tensor) -> float | Tensor:
    if isinstance(divisor, Tensor):
        return torch.where(divisor > 0, divisor.reciprocal(), 0.0).to(like)
    return 1.0 / divisor if divisor else 0.0


def alone(parts: Mapping[str, LossPart]) -> Tensor:
    """The loss of a step that consists of this micro-batch only."""
    return total_of(parts, divisors={name: part.weight for name, part in parts.items()})
