"""One optimizer step: its forward and backward passes, and the update."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from service.data.batches import Batch, Step
from service.data.shapes import require_loss_shape
from service.data.task import Task
from service.distributed.gradient_sync import GradientSync
from service.distributed.world import World
from service.health.heartbeat import Heartbeat
from service.optimization.buffers import BufferValues
from service.optimization.optimizers import asks_before_it_moves
from service.optimization.precision import computed
from service.optimization.train_state import TrainState
from service.optimization.updates import Updates
from service.plan.plan import Plan
from service.training.receipts import Receipt


def summed_loss(model: nn.Module, batch: Batch, *, task: Task, world: World) -> Tensor:
    """Weighted sum of the losses of one micro-batch: a scalar with a graph."""
    outputs = computed(model, batch.inputs, world)
    summed = getattr(task, "summed_loss", None)
    if summed is not None and batch.weight is None:
        total: Tensor = summed(outputs, batch.targets)
        return total
    # A task without a loss has its own step, which is handled elsewhere.
    losses: Tensor = task.loss(outputs, batch.targets)  # type: ignore[attr-defined]  # [B] or [B, T]
    require_loss_shape(losses, batch)
    return losses.sum() if batch.weight is None else (losses * batch.weight).sum()


class ModelWithLoss(nn.Module):
    """The model and its loss as one module, which torch compiles as one graph."""

    def __init__(self, model: nn.Module, task: Task, world: World) -> None:
        super().__init__()
        self.model = model
        self._task = task
        self._world = world

    def forward(self, inputs: Any, targets: Any, weight: Tensor | None, rows: int) -> Tensor:
        """`summed_loss` of a micro-batch of so many rows."""
        ids: Any = [0] * rows  # the compiler knows lists, and no arrays of numpy or ranges
        batch = Batch(0, ids, inputs, targets, weight, 0)
        return summed_loss(self.model, batch, task=self._task, world=self._world)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters of the model, by their names without the wrapper."""
        return self.model.named_parameters(*args, **kwargs)


def summed_within(model: nn.Module, batch: Batch, *, task: Task, world: World) -> Tensor:
    """`summed_loss` by a `ModelWithLoss`, which may be wrapped."""
    total: Tensor = model(batch.inputs, batch.targets, batch.weight, len(batch.rows))
    return total


def is_with_loss(model: nn.Module) -> bool:
    """Whether this is a `ModelWithLoss`, or one in DistributedDataParallel."""
    return isinstance(getattr(model, "module", model), ModelWithLoss)


@dataclass(frozen=True)
class TrainStep:
    """The parts that every optimizer step of a run uses."""

    summed_loss: ClassVar[Callable[..., Tensor]] = staticmethod(summed_loss)
    """The pass of a micro-batch through the model for training."""

    weighs: ClassVar[bool] = True
    """Whether losses are sums, divided by the weight of the step; otherwise they are divided."""

    task: Task
    world: World
    plan: Plan
    exchange: GradientSync
    """The model for training, and its gradient synchronization."""
    updates: Updates
    receipt: Receipt
    """The receipt, which records the rows of each step."""
    heartbeat: Heartbeat

    def backpropagate(self, state: TrainState, step: Step) -> dict[int, Tensor]:
        """Compute the gradients of the step, divided by the weight of the step.

        Returns:
            The summed loss of each micro-batch that this process computed.
        """
        divisor = self.updates.divisor(step.weight)
        exchange, world, enter = self.exchange, self.world, self.heartbeat.enter
        losses: dict[int, Tensor] = {}
        last = step.micro_batches[-1]
        state.zero_grad()
        for batch in exchange.over(step.micro_batches):
            enter("exchange" if batch is last else "forward", state.step, batch.number)
            world.seed(batch.key)
            loss_sum = self.summed_loss(exchange.model, batch, task=self.task, world=world)
            exchange.backward(loss_sum, divisor)
            losses[batch.number] = loss_sum.detach()
        if state.frozen:
            state.drop_frozen_gradients()
        return losses

    def update(
        self, state: TrainState, step: Step, losses: Mapping[int, Tensor], *, logging: bool
    ) -> None:
        """Update the weights, count the step, and set the learning rates of the next one."""
        self.receipt.note(state.step, self.consumed(step))
        again = self._closure(state, step, losses) if self.updates.asks_again else None
        self.heartbeat.enter("update")
        weight = step.weight if self.weighs else 1.0
        self.updates.apply(losses, weight, logging=logging, closure=again)
        state.schedule.set(state.step)

    def consumed(self, step: Step) -> Sequence[Batch]:
        """The micro-batches of this process that count."""
        batches = step.micro_batches
        if batches[-1].number >= self.plan.micro_batches:  # only for a collective
            return batches[:-1]
        return batches

    def named(self) -> dict[str, float]:
        """The values that a custom step reports; a loss reports none."""
        return {}

    def _closure(
        self, state: TrainState, step: Step, losses: Mapping[int, Tensor]
    ) -> Callable[[], Tensor]:
        """The closure that returns loss and gradients at each point that an optimizer evaluates.

        LBFGS first evaluates the current weights, whose loss and gradients are known; others may
        change the weights first.  At every other point the same micro-batches are
        computed with the same random numbers, and the buffers that a forward pass changes
        (BatchNorm's statistics) keep the values of the first one.  Loss and gradients are sums over
        all processes, so each process makes the same decisions.
        """
        known = [losses] if asks_before_it_moves(state.optimizer) else []

        def loss() -> Tensor:
            if known:
                return self._mean_loss(known.pop(), step)
            with unmoved_buffers(state.model), torch.enable_grad():
                here = self.backpropagate(state, step)
            self.updates.forget()
            return self._mean_loss(here, step)

        return loss

    def _mean_loss(self, losses: Mapping[int, Tensor], step: Step) -> Tensor:
        """The mean loss of the step, summed in the order of its micro-batches: a scalar."""
        world, count = self.world, self.plan.micro_batches
        each = torch.zeros(count, dtype=world.wide)  # 0 for micro-batches of other processes
        for number, loss in losses.items():
            if number < count:
                each[number] = float(loss)
        weight = step.weight if self.weighs else 1.0
        return world.sum(each.to(world.device)).sum() / weight


@dataclass(frozen=True)
class CompiledTrainStep(TrainStep):
    """The same for a compiled `ModelWithLoss`."""

    summed_loss: ClassVar[Callable[..., Tensor]] = staticmethod(summed_within)


@contextmanager
def unmoved_buffers(model: nn.Module) -> Iterator[None]:
    """A context that restores the values of the buffers at its end."""
    before = BufferValues(model)
    yield
    before.give_back()
