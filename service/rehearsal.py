"""One throw-away forward and backward pass before the first step, for what it brings to light.

It finds a task that does not do what it promises, and the parameters no loss reaches.  Afterwards
it lets DistributedDataParallel lay out its buckets: that happens after its first backward, so
without it a resumed run would add up its first step in another order than the undisturbed one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from service.batches import Batch
from service.buffers import BufferValues, Moving
from service.errors import EvenstepError, SpecError, is_out_of_memory, told_as_mistake
from service.flops import FlopCount
from service.generators import Seeded, noticing_draws
from service.normalization import Normalization
from service.precision import computed
from service.task import Task
from service.world import World


@dataclass(frozen=True)
class FirstPass:
    """What a forward and a backward pass brought to light."""

    unreached: list[str]
    """Names of the trainable parameters that the loss does not depend on."""
    flops_a_row: float | None
    """What training on a row takes, or None where no operation of it can be counted."""
    drawn: Sequence[Seeded]
    """Global generators besides torch's that the model draws from."""
    moving: Moving
    """Buffers besides BatchNorm's that the pass has changed."""


@dataclass(frozen=True)
class Trial:
    """What a throw-away pass is made with."""

    batch: Batch
    task: Task
    world: World
    normalization: Normalization

    def unreached_parameters(self, model: nn.Module) -> list[str]:
        """Names of the trainable parameters that the loss does not depend on.

        Raises:
            SpecError: the model, the loss or a measure fails or gives another shape than it should.
        """
        return self.first(model).unreached

    def first(self, model: nn.Module) -> FirstPass:
        """What the first pass brings to light.

        Raises:
            SpecError: as above.
        """
        with self._undone(model) as before, noticing_draws() as drawn:
            flops = self._counted(model)
            if flops is None:  # a model that does not bear the counting is tried without it
                model.zero_grad(set_to_none=True)
                self._checked(model)
            missed = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
            moving = before.moved()
        return FirstPass(missed, flops / len(self.batch.rows) if flops else None, drawn, moving)

    def _counted(self, model: nn.Module) -> int | None:
        """The operations of a pass, or None where it failed: by its own fault or the counting's."""
        try:
            with FlopCount() as count:  # type: ignore[no-untyped-call]
                self._pass(model, checked=True)
        except EvenstepError:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise
            return None
        return int(count.total)

    def _checked(self, model: nn.Module) -> None:
        rows = len(self.batch.rows)
        with told_as_mistake(f"task: one forward and backward pass over {rows} rows failed"):
            self._pass(model, checked=True)

    def compile(self, wrapped: nn.Module, bare: nn.Module) -> None:
        """Have the model compiled, as it is called in training.

        Raises:
            SpecError: it cannot be.
        """
        said = told_as_mistake("model.compile: torch cannot compile this model here")
        with self._undone(bare), said:
            self._pass(wrapped)

    def settle_buckets(self, wrapped: nn.Module, bare: nn.Module) -> None:
        """Bring gradient exchange into the order that it keeps for the rest of the run."""
        if self.world.processes == 1:
            return
        with self._undone(bare):
            self._pass(wrapped)  # its backward shows DDP the order in which gradients come
            self._pass(wrapped)  # and this one begins by laying the buckets out in that order

    def _pass(self, model: nn.Module, *, checked: bool = False) -> None:
        outputs = computed(model, self.batch.inputs, self.world)
        losses = self.task.loss(outputs, self.batch.targets)
        if checked:
            measured = self.task.measure(outputs, self.batch.targets)
            require_shapes(losses, measured, self.batch, self.task)
        losses.sum().backward()  # type: ignore[no-untyped-call]

    @contextmanager
    def _undone(self, model: nn.Module) -> Iterator[BufferValues]:
        before = BufferValues(model)
        model.train()
        yield before
        before.give_back()
        model.zero_grad(set_to_none=True)
        self.normalization.forget()


def require_shapes(losses: Tensor, measured: Tensor, batch: Batch, task: Task) -> None:
    """Raise where the task does not give one value per row."""
    rows = len(batch.rows)
    if losses.dim() == 0 or losses.shape[0] != rows:
        raise SpecError(
            f"task.loss: must give one value for each row, so the shape [{rows}] or "
            f"[{rows}, tokens], but gave {list(losses.shape)}. Use reduction='none'."
        )
    if batch.weight is not None and batch.weight.shape != losses.shape:
        raise SpecError(
            f"task.weight: must have the shape of the loss, {list(losses.shape)}, but has "
            f"{list(batch.weight.shape)}."
        )
    if losses.numel() != rows and batch.weight is None:
        raise SpecError(
            f"task.weight: the loss has {losses[0].numel()} values for each row "
            f"({list(losses.shape)}), and nothing says what each of them counts. Give a weight, "
            "such as `weight=lambda targets: targets.ne(-100).float()`, or one value for each row."
        )
    wanted = [*losses.shape, len(task.measures)]
    if task.measures and list(measured.shape) != wanted:
        raise SpecError(
            f"task.measure: must have the shape {wanted}, one value for each row and measure "
            f"{list(task.measures)}, but has {list(measured.shape)}."
        )
