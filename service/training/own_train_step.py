"""One optimizer step of a task with its own step, with one optimizer or with several in turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from service.basics import randomness
from service.basics.errors import SpecError, told_as_mistake
from service.data.batches import Batch, Step
from service.data.losses import Across, LossPart, StepContext, values_across
from service.data.own_step import Pass, SteppedModel, total_of
from service.data.task import Task, after_update_of
from service.distributed.batchnorm import Normalization
from service.distributed.world import World
from service.evaluation.named_sums import Ledger
from service.optimization.optimizers import Turns
from service.optimization.train_state import TrainState
from service.plan.plan import Plan
from service.sharding.row_updates import as_on_one_process
from service.sharding.sharding import holds_rows
from service.training.dry_run import FirstPass
from service.training.train_step import TrainStep

_LATE = (
    "task.step: the loss {name!r} came {what}, but not in the dry run before the first step, "
    "which decides this for the whole run. Return it from the first step on, with scale=0 as long "
    "as it has no effect."
)


@dataclass(frozen=True)
class OwnTrainStep(TrainStep):
    """The same for named losses, each divided by its own weight over the whole step.

    If the weight of the batch is known in advance, each backward pass follows its forward pass. A
    loss with its own weight has a divisor only after all forward passes of the step, on all
    processes: then these run first, and their graphs are kept. The same applies to a loss over all
    rows.
    """

    weighs: ClassVar[bool] = False
    own_weights: Sequence[str]
    """Names of the losses with their own weight, from the dry run."""
    across: Sequence[str]
    """Names of the losses over all rows, from the dry run."""
    stepped: SteppedModel
    """The model within the task's step, not wrapped."""
    turn: str | None = None
    """The name of the optimizer, if there are several."""
    place: int = 0
    """Its index among them, on which its random numbers depend."""
    _latest: list[Ledger] = field(default_factory=lambda: [Ledger()])

    def backpropagate(self, state: TrainState, step: Step) -> dict[int, Tensor]:
        """Leave the gradients of the step's loss in the parameters.

        Returns:
            The contribution of each micro-batch of this process to the loss of the step.
        """
        exchange, enter = self.exchange, self.heartbeat.enter
        if not self.plan.spec.exchange.shards:
            # The one without rows would be for BatchNorm, which `require_own_step` excludes.
            step = step._replace(micro_batches=self.consumed(step))
        divisor = self.updates.divisor(1.0)
        ledger = self._latest[0] = Ledger()
        losses: dict[int, Tensor] = {}
        state.zero_grad()
        before, weights = self._taken_before(state, step)
        last = step.micro_batches[-1]
        for batch in exchange.over(step.micro_batches):
            asked = before.pop(batch.number, None)
            if asked is None:
                asked = self._begun(state, batch)
            enter("exchange" if batch is last else "forward", state.step, batch.number)
            parts = asked.through(exchange.model)
            total = total_of(parts, divisors=self._divisors(parts, step, weights))
            exchange.backward(total, divisor)
            losses[batch.number] = total.detach()
            if batch.number < self.plan.micro_batches:  # another is only for a collective
                ledger.add(asked.entries())
        self.stepped.let_go()
        if state.frozen:
            state.drop_frozen_gradients()
        return losses

    @property
    def _holds(self) -> bool:
        """Whether all forward passes of a step run before its backward passes."""
        return bool(self.own_weights or self.across)

    def _begun(self, state: TrainState, batch: Batch) -> Pass:
        """A pass to run, with its random numbers."""
        key = batch.key
        if self.place:  # otherwise all turns would use the same random numbers
            key = randomness.key(randomness.FORWARD, key, self.place)
        self.world.seed(key)
        average = state.average.model if state.average is not None else None
        epoch = self.plan.epoch(state.step)
        context = StepContext(state.step, epoch, True, key, self._holds, average, self.turn)
        return Pass(batch, context)

    def _taken_before(
        self, state: TrainState, step: Step
    ) -> tuple[dict[int, Pass], dict[str, Tensor]]:
        """The passes by micro-batch, and the weight in the step of each loss that has its own."""
        if not self._holds:
            return {}, {}
        taken: dict[int, Pass] = {}
        size = len(self.own_weights), self.plan.micro_batches
        # 0 for those of other processes; made on the device, because the host waits for a copy
        table = torch.zeros(size, dtype=self.world.wide, device=self.world.device)
        # The one that is only for a collective comes first: then what it left can be forgotten.
        only = self.plan.micro_batches
        for batch in sorted(step.micro_batches, key=lambda each: each.number != only):
            self.heartbeat.enter("forward", state.step, batch.number)
            asked = taken[batch.number] = self._begun(state, batch)
            self.stepped(asked)
            assert asked.parts is not None, "it has just run"
            if batch.number == only:
                self.updates.forget()
                continue
            for place, name in enumerate(self.own_weights):
                if name in asked.parts:
                    table[place, batch.number] = asked.parts[name].weight
        for number, name in enumerate(self.across):
            # The forward passes leave the generators of each process in another state.
            seed = self.plan.spec.seed
            self.world.seed(randomness.key(randomness.ACROSS, seed, state.step, self.place, number))
            self._bring_together(name, taken)
        if not self.own_weights:
            return taken, {}
        sums = self.world.sum(table).sum(1)
        return taken, dict(zip(self.own_weights, sums.unbind(), strict=True))

    def _bring_together(self, name: str, taken: Mapping[int, Pass]) -> None:
        """Replace a loss of all rows by its share for each micro-batch, with its gradient.

        Every process computes the loss of all rows, and continues from its gradient by the features
        through its own micro-batches. The gradient by parameters that the loss itself uses, such as
        the temperature of a contrastive loss, is in the share of the first micro-batch.
        """
        parts = {number: asked.part(name) for number, asked in taken.items()}
        found = {number: part.across for number, part in parts.items() if part and part.across}
        if len(found) < len(taken):  # the others wait for these rows, and end with this process
            raise SpecError(
                f"task.step: the loss {name!r} is over all rows, so each micro-batch must return "
                f"it."
            )
        [*_, any_across] = found.values()
        whole = [self._of_all(found, place) for place in range(len(any_across.features))]
        with torch.enable_grad():
            values = values_across(any_across, whole, f"task.step: the loss {name!r}")
            total = values.sum()
            used = self.stepped.trained_in(total)
            needed = [feature for feature in whole if feature.requires_grad]
            # A parameter may come from the forward pass of a micro-batch, whose graph is kept.
            grads = torch.autograd.grad(total, [*needed, *used], retain_graph=bool(used))
        of_features = iter(grads)
        slopes = [next(of_features) if feature.requires_grad else None for feature in whole]
        own = list(zip(used, grads[len(needed) :], strict=True))
        for number, across in found.items():
            if number == self.plan.micro_batches:  # only for a collective, with weight zero
                share = torch.stack([f.sum() for f in across.features if f.requires_grad]).sum()
                taken[number].settle(name, share)
                continue
            rows = self._rows(number)
            pairs = zip(across.features, slopes, strict=True)
            pulled = sum((f * g[rows]).sum() for f, g in pairs if g is not None)
            assert isinstance(pulled, Tensor), "read_losses requires a gradient"
            # The others get zeros: DistributedDataParallel waits for the gradient of every process.
            for parameter, grad in own:
                pulled = pulled + (parameter * (grad if number == 0 else grad * 0)).sum()
            share = pulled + (values[rows].sum() - pulled).detach()
            taken[number].settle(name, share)

    def _rows(self, number: int) -> slice:
        """The rows of a micro-batch within the global batch."""
        first = number * self.plan.micro_batch
        return slice(first, min(first + self.plan.micro_batch, self.plan.global_batch))

    def _of_all(self, found: Mapping[int, Across], place: int) -> Tensor:
        """One of the features for all rows, in their order: a leaf that gets a gradient."""
        one = next(iter(found.values())).features[place]
        table = one.new_zeros(self.plan.global_batch, *one.shape[1:])
        for number, across in found.items():
            if number < self.plan.micro_batches:
                table[self._rows(number)] = across.features[place].detach()
        if table.is_floating_point() or table.is_complex():
            table += 0.0  # -0 becomes 0, as when other processes add their zeros
        return self.world.sum(table).requires_grad_(one.requires_grad)

    def _divisors(
        self, parts: Mapping[str, LossPart], step: Step, weights: Mapping[str, Tensor]
    ) -> dict[str, float | Tensor]:
        known = {"rows": float(self.plan.global_batch), "batch": step.weight}
        divisors: dict[str, float | Tensor] = {}
        for name, part in parts.items():
            if part.across is not None and name not in self.across:
                raise SpecError(_LATE.format(name=name, what="of all rows"))
            if part.divided_by != "own":
                divisors[name] = known[part.divided_by]
            elif name in weights:
                divisors[name] = weights[name]
            else:
                raise SpecError(_LATE.format(name=name, what="with a weight of its own"))
        return divisors

    def named(self) -> dict[str, float]:
        """`train/NAME` of each loss and each logged value of the latest step; all call it.

        A value with weight 0 in this step is omitted.
        """
        totals = self._latest[0].totals(self.world)
        whole = "loss" if self.turn is None else f"loss/{self.turn}"
        values = {
            f"train/{whole if name == 'loss' else name}": total.sum / total.weight
            for name, total in totals.items()
            if total.weight
        }
        values.pop("train/loss", None)  # this is the sum of all losses
        return values


@dataclass(frozen=True)
class TurnsTrainStep(TrainStep):
    """One step of several optimizers: those that are due, one after the other, on the same rows.

    Each has its own forward and backward passes, with the weights that the previous one left.
    """

    turns: Sequence[OwnTrainStep]
    """In their order; they share everything except the exchange."""
    optimizers: Turns
    _due: list[OwnTrainStep] = field(default_factory=list)

    def backpropagate(self, state: TrainState, step: Step) -> dict[int, Tensor]:
        """Take the turns of this step, except the update of the last one.

        Returns:
            The contribution of each micro-batch to the loss of the last turn.
        """
        number, logging = state.step + 1, self.plan.logs_at(state.step + 1)
        every = self.plan.spec.optimizers
        self._due[:] = [turn for turn in self.turns if number % every[str(turn.turn)].every == 0]
        *before, last = self._due
        for turn in before:
            losses = self._gradients(turn, state, step)
            self.heartbeat.enter("update")
            self.updates.apply(losses, 1.0, logging=logging, turn=turn.turn, ends=False)
        return self._gradients(last, state, step)

    def _gradients(self, turn: OwnTrainStep, state: TrainState, step: Step) -> dict[int, Tensor]:
        self.optimizers.begin(str(turn.turn))
        return turn.backpropagate(state, step)

    def update(
        self, state: TrainState, step: Step, losses: Mapping[int, Tensor], *, logging: bool
    ) -> None:
        """Take the update of the last turn and count the step; then set the learning rates."""
        self.receipt.note(state.step, self.consumed(step))
        self.heartbeat.enter("update")
        self.updates.apply(losses, 1.0, logging=logging, turn=self._due[-1].turn)
        state.schedule.set(state.step)

    def named(self) -> dict[str, float]:
        """The same for every turn of the latest step."""
        values: dict[str, float] = {}
        for turn in self._due:
            own = turn.named()
            if twice := sorted(set(own) & set(values)):
                raise SpecError(
                    f"task.step: {twice[0].removeprefix('train/')!r} is used in the turns of "
                    "several optimizers. Give it another name in each."
                )
            values |= own
        return values


def after_update_by(
    task: Task, state: TrainState, *, plan: Plan, world: World
) -> Callable[[str | None], None] | None:
    """The task's function for after an update, as a function of the optimizer's name, or None.

    After the first update of each optimizer it is checked that all processes have the same
    weights, unless each has other rows; if it raises, this is an error of the task.
    """
    act = after_update_of(task)
    if act is None:
        return None
    places = {name: place for place, name in enumerate(plan.spec.optimizers)}
    unchecked: set[str | None] = set(places or [None])
    sharded = holds_rows(state.model)

    def follow(turn: str | None) -> None:
        step = state.step
        key = randomness.key(randomness.UPDATE, plan.spec.seed, step, places.get(turn or "", 0))
        world.seed(key)
        average = state.average.model if state.average is not None else None
        context = StepContext(step, plan.epoch(step), True, key, False, average, turn)
        first = turn in unchecked
        failing = told_as_mistake("task.after_update: failed") if first else nullcontext()
        with torch.no_grad(), failing, as_on_one_process() if sharded else nullcontext():
            act(state.model, context)
        if context.logged:
            name = next(iter(context.logged))
            raise SpecError(f"task.after_update: {name!r} cannot be logged here; log it in step.")
        unchecked.discard(turn)
        if first and world.processes > 1 and not sharded:
            _require_equal(state, world)

    return follow


def _require_equal(state: TrainState, world: World) -> None:
    """Check that all processes have the same parameters.

    Raises:
        SpecError: they do not; on every process.
    """
    named = dict(state.model.named_parameters())
    sums = [p.detach().to(world.wide).sum() for p in named.values()]
    found = world.stack(torch.stack(sums))  # [processes, parameters]
    differs = ((found != found[0]) & ~(found.isnan() & found[0].isnan())).any(0).tolist()
    if any(differs):
        name = next(n for n, apart in zip(named, differs, strict=True) if apart)
        raise SpecError(
            f"task.after_update: it leaves {name} different on the processes. It may use only the "
            "weights and the context, not the rows or values of this process."
        )


def require_own_step(
    plan: Plan, found: FirstPass, normalization: Normalization, *, moving: bool
) -> None:
    """Check that the spec is compatible with a task's own step.

    Raises:
        SpecError: it is not.
    """
    spec, names = plan.spec, ", ".join([*found.own_weights, *found.across])
    uneven = plan.micro_batches % plan.processes != 0
    if spec.model.batchnorm == "sync" and normalization.layers and uneven:
        raise SpecError(
            f"model.batchnorm: sync with a task's own step needs the same number of micro-batches "
            f"on "
            f"each process, but {plan.micro_batches} cannot be divided by {plan.processes} "
            f"processes. "
            "Use batchnorm: micro."
        )
    if names and moving:
        raise SpecError(
            f"task.step: {names} is known only after all forward passes of a step, and the model "
            "has buffers that change in each of them. Use Loss.each or Loss.mean without a weight, "
            "or model.buffers: local."
        )
    if names and normalization.layers and spec.exactness == "bitwise":
        raise SpecError(
            f"exactness: bitwise with BatchNorm needs losses whose weight is known before the "
            f"forward pass, but {names} have their own. Use Loss.each, or Loss.mean without "
            "a weight."
        )
