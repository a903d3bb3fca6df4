"""Gradient synchronization: how the gradients of the micro-batches of a step are summed.

`OverlappedSync`  DistributedDataParallel exchanges them during the last backward pass.
`OrderedSync`     Each micro-batch's gradient is computed separately, and they are added in a fixed
              order, so that every number of processes gets the same bits.
`ReplayedSync`    The gradients of a CUDA graph, which the next replay would overwrite, are copied.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from service.distributed.stragglers import Stopwatch
from service.distributed.world import World, graph_changed, graph_grew
from service.spec.models import ExchangeSpec

T = TypeVar("T")


class GradientSync(Protocol):
    """The interface for the train loop."""

    model: nn.Module
    """The model for training."""

    def over(self, micro_batches: Sequence[T]) -> Iterable[T]:
        """The micro-batches in order; after the last one every process has the step's gradient.

        The backward pass of each must have run before the next one is requested.
        """

    def backward(self, loss_sum: Tensor, step_weight: float | Tensor) -> None:
        """The backward pass of one micro-batch, whose losses sum to `loss_sum`.

        Args:
            step_weight: weight of the whole step over all processes; the gradient is divided by it.
        """


class OverlappedSync(GradientSync):
    """Summed by DistributedDataParallel in the backward pass of the last micro-batch."""

    def __init__(
        self,
        model: nn.Module,
        world: World,
        *,
        unreached: Sequence[str] = (),
        spec: ExchangeSpec,
        telling: bool = False,
        stopwatch: Stopwatch | None = None,
    ) -> None:
        """Exchange the gradients of `model`.

        Args:
            unreached: names of the parameters on which the loss did not depend in the dry run. If
                there are any, they are searched for after each forward pass; with a static graph,
                no loss may depend on them.
            spec: the number format of the messages, and when they are sent.
            telling: let a non-finite loss make the gradients of all processes non-finite.
            stopwatch: times the forward passes.
        """
        self.model = world.wrap(model, find_unused=bool(unreached), spec=spec)
        self._exchanges = self.model is not model
        named = dict(model.named_parameters())
        is_static = self._exchanges and spec.static_graph
        self._never_used = [named[name] for name in unreached] if is_static else []
        self._world = world
        self._seed = Seed(telling)
        self._stopwatch = stopwatch

    def over(self, micro_batches: Sequence[T]) -> Iterable[T]:
        passes = self._world.exchange_on_last(self.model, micro_batches)
        return passes if self._stopwatch is None else self._stopwatch.over(passes)

    def backward(self, loss_sum: Tensor, step_weight: float | Tensor) -> None:
        if self._stopwatch is not None:
            self._stopwatch.end()
        # DDP averages gradients over processes: their number turns the mean back into the sum.
        try:
            self._seed.backward(loss_sum, per_weight(self._world.processes, step_weight))
        except RuntimeError as error:
            changed = graph_changed(error)
            if changed is None:
                raise
            raise changed from error
        # With a static graph, DDP itself checks this in the last pass only. A gradient of an
        # earlier pass would be exchanged by this process and not by the others.
        if self._never_used and any(each.grad is not None for each in self._never_used):
            raise graph_grew()
        if self._exchanges:
            self._world.require_exchanged(self.model)


class OrderedSync(GradientSync):
    """Summed in a binary tree over the micro-batches of the step.

    Each process adds up the branch of its own share, and the branches are combined in pairs.
    Whichever process has which leaves, every addition has the same two operands.
    """

    def __init__(
        self,
        model: nn.Module,
        world: World,
        *,
        unreached: Sequence[str] = (),
        gathered: Sequence[Tensor] = (),
        telling: bool = False,
        stopwatch: Stopwatch | None = None,
    ) -> None:
        """Exchange the gradients of `model`.

        Args:
            telling, stopwatch: as above.
            unreached: names of the parameters on which no loss depends; they get no gradient.
            gathered: tensors to which forward passes add, such as BatchNorm's statistics; after
                a step they have the sums over all processes.
        """
        self.model = model
        self._world = world
        self._seed = Seed(telling)
        self._parameters = [
            parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and name not in unreached
        ]
        self._gathered = list(gathered)
        self._stopwatch = stopwatch

    def over(self, micro_batches: Sequence[T]) -> Iterator[T]:
        passes = self._passes(micro_batches)
        return passes if self._stopwatch is None else self._stopwatch.over(passes)

    def _passes(self, micro_batches: Sequence[T]) -> Iterator[T]:
        total = yield from self._branch(micro_batches)
        total = self._world.sum_in_pairs(total)
        for parameter, grad in zip(self._parameters, total, strict=False):
            parameter.grad = grad
        if self._gathered:
            torch._foreach_copy_(self._gathered, total[len(self._parameters) :])

    def backward(self, loss_sum: Tensor, step_weight: float | Tensor) -> None:
        if self._stopwatch is not None:
            self._stopwatch.end()
        self._seed.backward(loss_sum, per_weight(1.0, step_weight))

    def _branch(self, micro_batches: Sequence[T]) -> Generator[T, None, list[Tensor]]:
        """The sums of one branch; it keeps one set of gradients for each level of the tree."""
        if len(micro_batches) == 1:
            yield micro_batches[0]
            return self._take()
        middle = (len(micro_batches) + 1) // 2
        left = yield from self._branch(micro_batches[:middle])
        right = yield from self._branch(micro_batches[middle:])
        torch._foreach_add_(left, right)
        return left

    def _take(self) -> list[Tensor]:
        """Move the gradients of the last pass out of the parameters."""
        grads = []
        for parameter in self._parameters:
            grads.append(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
            parameter.grad = None
        gathered = [tensor.clone() for tensor in self._gathered]
        if gathered:
            torch._foreach_zero_(self._gathered)
        return grads + gathered


class ReplayedSync(GradientSync):
    """Gradient synchronization whose backward passes are replays of a CUDA graph.

    torch makes the memory that the graph writes the `grad` of a parameter that has none. The next
    replay would write the gradient of the next micro-batch there, before it is added to it.
    Source: pytorch/pytorch#169545.
    """

    def __init__(self, inner: GradientSync, *, exchanges: bool) -> None:
        """Copy the gradients of `inner`.

        Args:
            exchanges: the last pass of a step leaves its gradients in buckets of its own.
        """
        self.model = inner.model
        self._inner, self._exchanges = inner, exchanges
        self._parameters = list(inner.model.parameters())

    def over(self, micro_batches: Sequence[T]) -> Iterator[T]:
        last = len(micro_batches) - 1
        for place, batch in enumerate(self._inner.over(micro_batches)):
            yield batch
            # All further ones are added to the copies. An optimizer may keep the gradients too.
            if place == 0 and not (self._exchanges and place == last):
                self._copy()

    def backward(self, loss_sum: Tensor, step_weight: float | Tensor) -> None:
        self._inner.backward(loss_sum, step_weight)

    def _copy(self) -> None:
        held = [p for p in self._parameters if p.grad is not None]
        grads = [p.grad for p in held if p.grad is not None]
        if not grads:
            return
        sparse = any(grad.is_sparse for grad in grads)
        copies = [g.clone() for g in grads] if sparse else torch._foreach_clone(grads)
        for parameter, copied in zip(held, copies, strict=True):
            parameter.grad = copied


def per_weight(scale: float, weight: float | Tensor) -> float | Tensor:
    """`scale / weight`; 0 in a step of which no row counts, whose gradients are 0 then."""
    if isinstance(weight, Tensor):
        return torch.where(weight > 0, scale / weight, 0.0)
    return scale / weight


class Seed:
    """The initial gradient of a backward pass: this way the scale needs no multiplication."""

    def __init__(self, telling: bool) -> None:
        self._telling = telling
        self._scale = math.nan
        self._tensor = torch.empty(0)

    def backward(self, loss_sum: Tensor, scale: float | Tensor) -> None:
        """The backward pass of `loss_sum` times `scale`."""
        seed = self._on(loss_sum, scale)
        if self._telling:  # 0 times the loss is NaN if the loss is not finite
            seed = torch.add(seed, loss_sum.detach(), alpha=0)
        loss_sum.backward(seed)  # type: ignore[no-untyped-call]

    def _on(self, loss_sum: Tensor, scale: float | Tensor) -> Tensor:
        """The scale as a tensor like the loss; a constant scale is created once."""
        if isinstance(scale, Tensor):
            return scale.to(loss_sum)
        if scale != self._scale:
            self._scale, self._tensor = scale, loss_sum.new_full((), scale)
        return self._tensor
