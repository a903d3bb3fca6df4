"""A task's own step as a module, so that DDP sees all its forward passes as one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from service.data.batches import Batch
from service.data.losses import Entry, LossPart, StepContext, read_losses
from service.data.task import WithStep
from service.distributed.world import World
from service.sharding.sharding import release


class Pass:
    """One micro-batch in the step."""

    # Not a dataclass: torch's FSDP2 looks for tensors in these, and replaces them by copies.

    def __init__(self, batch: Batch, context: StepContext) -> None:
        self.batch = batch
        self.context = context
        self.parts: Mapping[str, LossPart] | None = None
        """The result of the step, once it has run."""
        self.outputs: Any = None

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
    """The model within the task's step: training calls it instead of the model.

    If the model is sharded, this is the root of its units: during the step, all parameters that are
    in no other unit are gathered, whatever the step calls.
    """

    def __init__(self, model: nn.Module, task: WithStep, world: World) -> None:
        super().__init__()
        self.model = model
        self._step = task.step
        self._world = world
        self._beside: list[SteppedModel] = []  # not a list of submodules

    @classmethod
    def of(cls, model: nn.Module, task: WithStep, world: World) -> SteppedModel:
        """The one with which this model was sharded, or a new one."""
        return cls._root_of(model) or cls(model, task, world)

    @classmethod
    def root(cls, model: nn.Module, task: WithStep, world: World) -> SteppedModel:
        """A new one, which `of` returns from now on."""
        made = vars(model)[_ROOT] = cls(model, task, world)  # not a submodule of its own submodule
        return made

    @staticmethod
    def _root_of(model: nn.Module) -> SteppedModel | None:
        found: SteppedModel | None = vars(model).get(_ROOT)
        return found

    def forward(self, asked: Pass | None) -> list[Tensor]:
        """Run the step, unless it has run; return its sums, which have the graph.

        Args:
            asked: None runs nothing; if the model is sharded, its parameters that are in no other
                unit stay gathered.
        Raises:
            SpecError: the result of the step is not losses.
        """
        if asked is None:
            return []
        if asked.parts is None:
            average = asked.context.average
            root = None if average is None else self._root_of(average)
            if root is not None and average is not self.model and not self._beside:
                root(None)
                self._beside.append(root)
            with self._world.autocast():
                given = self._step(self.model, asked.batch, asked.context)
            asked.parts, asked.outputs = read_losses(given, asked.batch, context=asked.context)
        # FSDP2 registers a hook on each result, which it cannot do on a view of another tensor.
        return [p.sum.clone() if p.sum._is_view() else p.sum for p in asked.parts.values()]

    def trained_in(self, value: Tensor) -> list[nn.Parameter]:
        """The parameters in the graph of `value` that are trained, in the order of the model."""
        leaves = leaves_of(value)
        return [p for p in self.model.parameters() if p.requires_grad and id(p) in leaves]

    def let_go(self) -> None:
        """After the backward passes: release the parameters of a sharded moving average."""
        while self._beside:
            release(self._beside.pop())

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters of the model, by their names without the wrapper."""
        if not recurse:  # it has none of its own
            return iter(())
        return self.model.named_parameters(prefix, True, remove_duplicate)


_ROOT = "_evenstep_root"
"""The attribute of a sharded model for its root."""


def leaves_of(value: Tensor) -> set[int]:
    """The ids of the parameters and other leaves in the graph of `value`."""
    leaves, seen, ahead = set[int](), set[Any](), [value.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaves.add(id(getattr(node, "variable", None)))
        ahead += [following for following, _ in node.next_functions]
    return leaves


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
