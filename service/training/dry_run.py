"""The dry run: one forward and backward pass before the first step, to find errors.

It finds errors of the task, and parameters without a gradient.  Afterwards
it lets DistributedDataParallel arrange its buckets: DDP does so after its first backward pass, and
without this, a resumed run would sum its first step in another order than an undisturbed one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from service.basics.errors import (
    EvenstepError,
    SpecError,
    is_out_of_memory,
    place_of,
    told_as_mistake,
)
from service.data.batches import Batch
from service.data.losses import StepContext, require_weights
from service.data.own_step import Pass, SteppedModel, alone, leaves_of
from service.data.shapes import require_loss_shape, require_measured_shape
from service.data.task import Task, metrics_of, step_of, with_loss
from service.distributed.batchnorm import Normalization
from service.distributed.devices import synchronize
from service.distributed.generators import Seeded, noticing_draws
from service.distributed.world import World
from service.evaluation.own_step_test import entries_of_test
from service.evaluation.test_loop import in_eval_mode
from service.optimization.buffers import (
    BufferValues,
    Moving,
    PlainState,
    WrittenWeights,
    written_in_words,
)
from service.optimization.compilation import require_compiled
from service.optimization.flops import FlopCount
from service.optimization.moving_average import MovingAverage
from service.optimization.optimizers import Turns, told_of_turn
from service.optimization.precision import computed
from service.spec.models import Spec
from service.training.train_step import is_with_loss, summed_loss, summed_within

T = TypeVar("T")


@dataclass(frozen=True)
class FirstPass:
    """The findings of a forward and backward pass."""

    unreached: list[str]
    """Names of the trainable parameters on which the loss does not depend."""
    flops_a_row: float | None
    """Operations of training on one row, or None if they cannot be counted."""
    drawn: Sequence[Seeded]
    """Global generators, other than torch's, that the model uses."""
    moving: Moving
    """Buffers that the pass has changed, except BatchNorm's."""
    own_weights: Sequence[str] = ()
    """Losses of a task's own step that have their own weight."""
    across: Sequence[str] = ()
    """Losses over all rows of a step."""
    tested: Sequence[str] | None = None
    """Names of the values that such a step returns in a test; None if the task declares them."""
    nested: Sequence[str] = ()
    """Parameters with gradients from a backward pass within the backward pass, which
    DistributedDataParallel cannot track without `exchange.static_graph`."""
    written: Sequence[str] = ()
    """Parameters that the forward pass changes itself."""
    touched: Sequence[str] = ()
    """Trained parameters that a pass writes to, perhaps the values that they have."""
    plain_state: Sequence[str] = ()
    """Numbers and tensors in attributes of modules that it changes."""


@dataclass(frozen=True)
class DryRun:
    """The parts for the dry run."""

    batch: Batch
    task: Task
    world: World
    normalization: Normalization
    two_rows: Batch | None = None
    """Used for a batch of one row, in which a broadcast shape cannot be recognized."""
    average: nn.Module | None = None
    """The moving average that a task's own step gets."""
    turn: str | None = None
    """The optimizer whose turn it is, if there are several."""
    place: str = ""
    """The position of the batch in a step, for messages; empty if it does not matter."""

    def first(self, model: nn.Module) -> FirstPass:
        """The results of the first pass.

        Raises:
            SpecError: the model, the loss or a measure fails or returns a wrong shape.
        """
        weights, plain = WrittenWeights(model), PlainState(model)
        with (
            self._undone(model) as before,
            noticing_draws() as drawn,
            _arrivals_of(model) as arrivals,
        ):
            callee = self.callee(model)
            counted = self._counted(callee)
            if counted is None:  # the model does not support counting: try without it
                model.zero_grad(set_to_none=True)
                arrivals.clear()
                counted = None, self._checked(callee)
            flops, loss = counted
            missed = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
            nested = _nested(model, loss, arrivals, unreached=missed)
            self._shaped(model)
            moving = before.moved()
            written, touched = weights.written(model), weights.touched(model)
            plain_state = plain.changed(model)
            own_weights, across, tested = self._named(callee)
        a_row = flops / len(self.batch.rows) if flops else None
        names = own_weights, across, tested, nested, written, touched, plain_state
        return FirstPass(missed, a_row, drawn, moving, *names)

    def _counted(self, model: nn.Module) -> tuple[int | None, Tensor] | None:
        """(the operations of a pass, its loss), or None if the pass or the counting failed."""
        try:
            with FlopCount() as count:  # type: ignore[no-untyped-call]
                loss = self._pass(model, checked=True)
        except EvenstepError:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise
            return None
        return int(count.total), loss

    def _checked(self, model: nn.Module) -> Tensor:
        rows = len(self.batch.rows)
        over = f"{rows} {'row' if rows == 1 else 'rows'}{self.place}"
        with told_as_mistake(f"task: one forward and backward pass over {over} failed"):
            return self._pass(model, checked=True)

    def compile(
        self,
        wrapped: nn.Module,
        bare: nn.Module,
        parts: Mapping[str, nn.Module],
        *,
        replays: bool = False,
    ) -> None:
        """Compile the model, with a call as in training.

        Args:
            parts: the compiled modules by name, of which a call must reach at least one.
            replays: also record the CUDA graphs, in a second pass, and replay them, in a third.
        Raises:
            SpecError: that fails.
        """
        said = told_as_mistake("model.compile: torch cannot compile this model here")
        whose = nullcontext() if self.turn is None else told_of_turn(self.turn)
        called = nullcontext() if is_with_loss(wrapped) else require_compiled(parts)
        with whose, self._undone(bare), said, called:
            for _ in range(3 if replays else 1):
                bare.zero_grad(set_to_none=True)
                self._pass(wrapped)

    def settle_buckets(self, wrapped: nn.Module, bare: nn.Module, *, is_static: bool) -> None:
        """Let gradient exchange settle into the order that it keeps for the rest of the run.

        The backward pass shows DDP the order of the gradients. The next forward pass, which may be
        that of the first step, begins by arranging the buckets in that order.

        Args:
            is_static: with a static graph, the first pass of DDP exchanges in yet another way.
        """
        if self.world.processes == 1:
            return
        with self._undone(bare):
            for _ in range(1 + is_static):
                self._pass(wrapped)

    def _pass(self, callee: nn.Module, *, checked: bool = False) -> Tensor:
        """The loss of a forward pass, after its backward pass."""
        try:
            loss = self.loss(callee, checked=checked)
            loss.backward()  # type: ignore[no-untyped-call]
            if checked:  # at the latest then a device reports an index out of range
                synchronize(self.world.device)
        except RuntimeError as error:
            told = _asserted(self.batch, error) or _unordered(error, self.world)
            if told is None:
                raise
            raise SpecError(told) from error
        return loss

    def loss(self, callee: nn.Module, *, checked: bool = False) -> Tensor:
        """The summed loss of the batch; of an own step, the loss of a step of this batch only.

        Args:
            callee: the model as training calls it.
            checked: check the shapes of the loss and of the measures.
        """
        if step_of(self.task) is not None:
            return alone(self._taken(callee, training=True).parts or {})
        if not checked:
            summed = summed_within if is_with_loss(callee) else summed_loss
            return summed(callee, self.batch, task=self.task, world=self.world)
        return self._losses(computed(callee, self.batch.inputs, self.world), self.batch).sum()

    def forward(self, model: nn.Module) -> None:
        """Only a forward pass; for a task's own step, the whole step."""
        if step_of(self.task) is not None:
            self._taken(self.callee(model), training=True)
        else:
            computed(model, self.batch.inputs, self.world)

    def _named(
        self, callee: nn.Module
    ) -> tuple[Sequence[str], Sequence[str], Sequence[str] | None]:
        """(losses with their own weight, losses of all rows, values of a test) of an own step.

        Raises:
            SpecError: a weight is negative or not a number, or the step fails in a test.
        """
        own = step_of(self.task)
        if own is None:
            return (), (), None
        trained = self._taken(callee, training=True)
        with (
            told_as_mistake("task.step: a pass without gradients, as in a test, failed"),
            in_eval_mode(callee),
            torch.no_grad(),
        ):
            entries = entries_of_test(own, self._taken(callee, training=False))
        require_weights(trained.entries() | entries)
        parts = (trained.parts or {}).items()
        weighed = [name for name, part in parts if part.divided_by == "own"]
        across = [name for name, part in parts if part.across is not None]
        return weighed, across, ["loss", *entries, *metrics_of(own)]

    def _taken(self, callee: nn.Module, *, training: bool) -> Pass:
        turn = self.turn if training else None
        context = StepContext(
            0, 0.0, training, self.batch.key, average=self.average, optimizer=turn
        )
        asked = Pass(self.batch, context)
        asked.through(callee)
        return asked

    def callee(self, model: nn.Module) -> nn.Module:
        """The module that training calls: the model, or the model within the task's own step."""
        own = step_of(self.task)
        return model if own is None else SteppedModel.of(model, own, self.world)

    def _losses(self, outputs: Any, batch: Batch) -> Tensor:
        task = with_loss(self.task)
        losses = task.loss(outputs, batch.targets)
        require_loss_shape(losses, batch)
        measured = task.measure(outputs, batch.targets)
        require_measured_shape(measured, losses, self.task.measures)
        return losses

    @torch.no_grad()
    def _shaped(self, model: nn.Module) -> None:
        """Check only the shapes, with two rows, if the batch has only one."""
        if self.two_rows is None or step_of(self.task) is not None:
            return
        with told_as_mistake("task: a forward pass over 2 rows failed"):
            self._losses(computed(model, self.two_rows.inputs, self.world), self.two_rows)

    @contextmanager
    def _undone(self, model: nn.Module) -> Iterator[BufferValues]:
        before = BufferValues(model)
        model.train()
        yield before
        before.give_back()
        model.zero_grad(set_to_none=True)
        self.normalization.forget()
        callee = self.callee(model)
        if isinstance(callee, SteppedModel):
            callee.let_go()


@dataclass(frozen=True)
class Rehearsed:
    """The results of the passes before the first step for one optimizer, or its turn."""

    turn: str | None
    """Its name, if there are several."""
    dry_run: DryRun
    found: FirstPass


def rehearsed(
    dry_run: DryRun, model: nn.Module, optimizer: torch.optim.Optimizer
) -> list[Rehearsed]:
    """The first pass of each turn; a single one if there is one optimizer.

    Raises:
        SpecError: see `DryRun.first`.
    """
    if not isinstance(optimizer, Turns):
        return [Rehearsed(None, dry_run, dry_run.first(model))]
    each = []
    for turn in optimizer.by_name:
        optimizer.begin(turn)
        of_turn = replace(dry_run, turn=turn)
        with told_of_turn(turn):
            each.append(Rehearsed(turn, of_turn, of_turn.first(model)))
    optimizer.end()
    return each


def together_found(each: Sequence[Rehearsed], spec: Spec) -> FirstPass:
    """The results of all turns as those of one step."""
    first = each[0].found
    if len(each) == 1:
        return first
    every = [spec.optimizers[str(part.turn)].every for part in each]
    flops = [part.found.flops_a_row for part in each]
    counted = [count / n for count, n in zip(flops, every, strict=True) if count is not None]

    def listed(names: Callable[[FirstPass], Sequence[T]]) -> list[T]:
        return list(dict.fromkeys(name for part in each for name in names(part.found)))

    return replace(
        first,
        unreached=listed(lambda found: found.unreached),
        flops_a_row=sum(counted) if len(counted) == len(each) else None,
        drawn=listed(lambda found: found.drawn),
        moving=Moving(
            listed(lambda found: found.moving.kept), listed(lambda found: found.moving.reshaped)
        ),
        own_weights=listed(lambda found: found.own_weights),
        across=listed(lambda found: found.across),
        nested=listed(lambda found: found.nested),
        written=listed(lambda found: found.written),
        touched=listed(lambda found: found.touched),
        plain_state=listed(lambda found: found.plain_state),
    )


@contextmanager
def _arrivals_of(model: nn.Module) -> Iterator[Counter[str]]:
    """A context that counts how often each parameter gets a gradient."""
    arrivals: Counter[str] = Counter()

    def counter_of(name: str) -> Callable[[Tensor], None]:
        return lambda _: arrivals.update([name])

    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    register: Any = Tensor.register_post_accumulate_grad_hook  # it has no type annotations
    hooks = [register(p, counter_of(name)) for name, p in trained]
    try:
        yield arrivals
    finally:
        for hook in hooks:
            hook.remove()


def _nested(
    model: nn.Module, loss: Tensor, arrivals: Counter[str], *, unreached: Sequence[str]
) -> list[str]:
    """Names of the parameters whose gradients DistributedDataParallel could not track.

    It expects one gradient of each parameter in a backward pass.  And if it searches for parameters
    on which the loss does not depend (some are `unreached`), it treats all parameters that are not
    in the graph of the loss as such.  A reentrant checkpoint computes its part of the graph in the
    backward
    pass: its parameters are not in the graph, and get one gradient per checkpoint that contains
        them.
    """
    twice = [name for name, _ in model.named_parameters() if arrivals[name] > 1]
    if twice or not unreached:
        return twice
    in_graph = leaves_of(loss)
    came = [(name, p) for name, p in model.named_parameters() if arrivals[name]]
    return [name for name, parameter in came if id(parameter) not in in_graph]


def require_followed(found: FirstPass, spec: Spec, *, processes: int) -> None:
    """Check that several processes, if used, can follow the gradients and keep the weights equal.

    Raises:
        SpecError: they cannot; says what to do.
    """
    told = nested_in_words(found, spec)
    if told is not None and processes > 1:
        raise SpecError(f"exchange.static_graph: {told}")
    told = written_in_words(found.written)
    if told is not None and processes > 1:
        raise SpecError(f"task: {told}")


def nested_in_words(found: FirstPass, spec: Spec) -> str | None:
    """The reason why the job cannot use several processes, and what to do; None if it can."""
    by_ddp = not spec.exchange.shards and spec.exactness != "bitwise"
    if not found.nested or not by_ddp or spec.exchange.static_graph:
        return None
    names = ", ".join(found.nested[:8])
    return (
        f"the gradients of {names} come from backward passes within the backward pass, as in "
        "reentrant activation checkpoints (torch.utils.checkpoint with use_reentrant=True, "
        "gradient_checkpointing of transformers). DistributedDataParallel cannot track them on "
        "several processes. Use use_reentrant=False, or model.activation_checkpointing of the spec "
        "instead, or, if every step trains the same parameters, exchange.static_graph=true."
    )


def teacher_of(
    model: nn.Module, task: Task, spec: Spec, *, twin: nn.Module | None = None
) -> nn.Module | None:
    """The moving average that a task's own step gets before the first step, if there is one.

    Args:
        twin: the model for the average, if it is sharded.
    """
    decay = spec.model.moving_average
    if step_of(task) is None or decay is None:
        return None
    return MovingAverage(model, decay, twin=twin).model


def _asserted(batch: Batch, error: RuntimeError) -> str | None:
    """A device's message about an index, and what to do; None if it is another error."""
    if "device-side assert" not in str(error):
        return None
    rows = ", ".join(map(str, batch.rows[:8].tolist()))
    return (
        f"task: one forward and backward pass over {len(batch.rows)} rows ({rows} ...) failed on "
        f"the device: {str(error).splitlines()[0]}. An index is out of range: most often a "
        "label that is not a class, or a token that the embedding does not have. "
        "With EVENSTEP_DEVICE=cpu, the same command names the value."
    )


def _unordered(error: RuntimeError, world: World) -> str | None:
    """torch's refusal of an operation that gives other bits each time; None if it is another error.

    Source of its words: `Context::alertNotDeterministic` in torch's aten/src/ATen/Context.cpp.
    """
    operation, found, _ = str(error).partition(" does not have a deterministic implementation")
    if not found:
        return None
    return (
        f"exactness: bitwise: torch has no deterministic implementation of {operation} on "
        f"{world.device.type}, and a forward and backward pass of the task uses it"
        f"{place_of(error)}. Use another operation in its place, such as MaxPool2d or AvgPool2d "
        "instead of AdaptiveMaxPool2d or AdaptiveAvgPool2d; the documentation of "
        "torch.use_deterministic_algorithms lists all of these operations. Or use "
        "exactness=rounding."
    )
