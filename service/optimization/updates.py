"""From gradients to weights: unscale, clip, decide, step; and what happens after a NaN.

If steps may be skipped, a loss that is not finite makes the gradients of its process not finite
(`exchange`), and synchronization spreads this to all processes: every decision after it depends
on equal gradients and is equal on all processes, without further communication.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from service.basics import randomness
from service.basics.errors import Diverged, SpecError, WillFailAgain
from service.distributed.batchnorm import Normalization
from service.distributed.stragglers import StragglerDetector
from service.distributed.world import World
from service.optimization.buffers import Buffers, StillBuffers, WrittenWeights, written_in_words
from service.optimization.optimizers import Turns, may_draw, needs_closure
from service.optimization.precision import SMALLEST_SCALE
from service.optimization.train_state import TrainState
from service.plan.plan import Plan
from service.sharding.sharding import OwnRows, copies_of_rows, holds_rows, keep_freed_blocks

_HELD_AT_MOST = 1000  # steps whose losses wait on the device to be checked
_TOLD_AT_MOST = 8


class _Taken(NamedTuple):
    """The values of one step that are checked later; its tensors are on the device."""

    step: int
    losses: Mapping[int, Tensor]
    """The summed losses of this process, by micro-batch."""
    weight: float | Tensor
    """Weight of the whole step, over all processes."""
    norm: Tensor | None
    """The gradient norm before clipping, if it was computed."""
    broken: Tensor | None
    """1 if the step was skipped; None if steps cannot be skipped."""
    turn: str | None
    """The optimizer that took it, if there are several."""


class _Fault(NamedTuple):
    """A loss that is not finite."""

    step: int
    micro_batch: int
    rank: int
    value: float
    turn: str | None


class Updates:
    """Updates the weights with the gradients of each step, or skips it on all processes."""

    def __init__(
        self,
        state: TrainState,
        *,
        plan: Plan,
        world: World,
        normalization: Normalization,
        buffers: Buffers | None = None,
        say: Callable[[str], None],
        after_update: Callable[[str | None], None] | None = None,
        still: StillBuffers | None = None,
    ) -> None:
        """The updates of this run.

        Args:
            still: the buffers that must not change.
            say: reports the skipped steps.
            after_update: the task's function that is called after each update, with the optimizer's
                name.

        Raises:
            SpecError: the spec asks for a skip that this optimizer or BatchNorm cannot do.
        """
        self._state = state
        self._plan = plan
        self._world = world
        self._normalization = normalization
        self._buffers = buffers
        self._say = say
        self._after_update = after_update
        self._still = still
        self._frozen: WrittenWeights | None = None
        """The frozen parameters at the begin of this attempt, until a look after two steps: one
        that follows another parameter is first moved after an update of that."""
        self._began_at = 0
        trained = [p for p in state.model.parameters() if p.requires_grad]
        self._is_sharded = holds_rows(state.model)
        self._copies = copies_of_rows(state.model)
        self._parameters: list[Any] = list(map(OwnRows, trained)) if self._is_sharded else trained
        self._skips = plan.spec.faults.on_non_finite == "skip"
        self._clips = plan.spec.max_grad_norm is not None or plan.spec.max_grad_value is not None
        self.asks_again = needs_closure(type(state.optimizer))
        """Whether one step of the optimizer computes the gradients several times."""
        self._draws = may_draw(state.optimizer)
        by_kernel = getattr(state.optimizer, "_step_supports_amp_scaling", False)
        self._by_kernel = by_kernel and not self._is_sharded
        self._held: list[_Taken] = []
        self.weight: float | None = None
        """Of the latest step that was looked at, where the task gives weights."""
        if self._skips or state.scaler is not None:
            _require_skippable(state.optimizer, normalization, asked=self._skips)

    def begin(self) -> None:
        """Start to watch the buffers: the state is now that of the first step to train."""
        if self._still is not None:
            self._still.begin_again()
        if self._world.processes > 1 and self._after_update is None:
            self._frozen = WrittenWeights(self._state.model, only_frozen=True)
            self._began_at = self._state.step

    def divisor(self, weight: float | Tensor) -> float | Tensor:
        """The divisor of the gradients in the backward passes of a step of this weight."""
        scaler = self._state.scaler
        return weight if scaler is None else scaler.divisor(weight)

    def apply(
        self,
        losses: Mapping[int, Tensor],
        weight: float | Tensor,
        *,
        logging: bool,
        closure: Callable[[], Any] | None = None,
        turn: str | None = None,
        ends: bool = True,
    ) -> None:
        """Take the optimizer step for the current gradients, and count it.

        A skipped step changes only the count: not the weights, the optimizer or
        running statistics.  So the schedule and the rows remain functions of the step.

        Args:
            losses: this process's summed losses, by micro-batch.
            weight: weight of the whole step, over all processes.
            logging: whether the gradient norm is needed.
            turn: the name of the optimizer, if there are several.
            ends: whether the step ends with it; otherwise the turn of another optimizer follows.
        """
        state = self._state
        broken = None if state.scaler is None else state.scaler.unscale(state.optimizer)
        norm = self._norm() if logging or self._skips or self._clips else None
        if self._skips and broken is None and norm is not None:
            broken = norm.isfinite().logical_not().float()
        self._normalization.finish_step(broken)
        if self._buffers is not None:
            self._buffers.finish_step(broken)
        if self._clips:
            self._clip(norm)
        self._step(broken, self._seeded(closure, turn) if self._draws else closure)
        if state.scaler is not None:
            state.scaler.update()
        if self._after_update is not None:
            with self.buffers_ignored():  # it does the same on every process
                self._after_update(turn)
        if len(self._held) >= _HELD_AT_MOST and self._held[-1].step <= state.step:
            self.look()
        self._held.append(_Taken(state.step + 1, losses, weight, norm, broken, turn))
        if self._is_sharded:
            state.zero_grad()  # a test gathers units and needs the memory
            keep_freed_blocks(self._world)  # the optimizer's state exists now
        if not ends:
            return
        state.step += 1
        if state.average is not None:
            state.average.move(state.step)

    def buffers_ignored(self) -> AbstractContextManager[None]:
        """A context in which a buffer may begin to change."""
        return nullcontext() if self._still is None else self._still.ignored()

    def forget(self) -> None:
        """Discard everything that a forward pass outside of a step has collected."""
        self._normalization.forget()
        if self._buffers is not None:
            self._buffers.forget()

    def _norm(self) -> Tensor:
        norm = nn.utils.get_total_norm(gradient_values(self._parameters))
        norm = norm.to(self._world.device)  # without any gradient, torch gives one on the CPU
        if not self._is_sharded:
            return norm
        square = norm.to(self._world.wide).square()
        square /= self._copies
        return self._world.sum(square).sqrt().to(norm.dtype)

    def _clip(self, norm: Tensor | None) -> None:
        """Clip the values first, then the norm, which was `norm` before both."""
        spec = self._plan.spec
        if spec.max_grad_value is not None:
            if values := gradient_values(self._parameters):
                torch._foreach_clamp_min_(values, -spec.max_grad_value)
                torch._foreach_clamp_max_(values, spec.max_grad_value)
            norm = None
        if spec.max_grad_norm is not None:
            norm = self._norm() if norm is None else norm
            nn.utils.clip_grads_with_norm_(self._parameters, spec.max_grad_norm, norm)

    def _seeded(
        self, closure: Callable[[], Any] | None, turn: str | None
    ) -> Callable[[], Any] | None:
        """Seed what the optimizer draws, at the start of its step and after each of its passes.

        The forward passes leave another state of the generators on each process.
        """
        optimizer, seed, step = self._state.optimizer, self._plan.spec.seed, self._state.step
        place = list(optimizer.by_name).index(str(turn)) if isinstance(optimizer, Turns) else 0
        passes = itertools.count()

        def reseed() -> None:
            self._world.seed(randomness.key(randomness.OPTIMIZER, seed, step, place, next(passes)))

        reseed()
        if closure is None:
            return None

        def seeded() -> Any:
            loss = closure()
            reseed()
            return loss

        return seeded

    def _step(self, broken: Tensor | None, closure: Callable[[], Any] | None) -> None:
        """Take the step, unless `broken` is 1."""
        optimizer: Any = self._state.optimizer
        self._state.permit_update()
        if closure is not None:
            optimizer.step(closure)
        elif broken is None:
            self._state.take_step()
        elif self._by_kernel and not _begins_momentum(optimizer):
            # The kernel reads the flag on the device, so the host does not wait.
            optimizer.grad_scale, optimizer.found_inf = None, broken
            optimizer.step()
            del optimizer.grad_scale, optimizer.found_inf
        elif not float(broken):  # waits for the device, so the watchdog must recognize the line
            optimizer.step()

    # ---- checks at the steps in which the plan waits for the device anyway

    def look(self, stragglers: StragglerDetector | None = None) -> dict[str, float]:
        """The results of the steps since the last check; every process calls it.

        Args:
            stragglers: collects the times of the processes in the same exchange.

        Returns:
            The latest step's `train/loss` and `train/grad_norm`, and in the modes that skip, the
            number of skipped steps; empty if there was no step since.
        Raises:
            Diverged: a value is not finite and must be; on every process, with the same message.
            WillFailAgain: a buffer began to differ between processes, the forward pass changes
                frozen weights, or a step has a negative weight; on every process.
        """
        held, self._held = self._held, []
        if not held:
            return {}
        losses = _by_place(held)
        faults = [
            _Fault(held[at].step, number, self._world.index, value, held[at].turn)
            for (at, number), value in losses.items()
            if number < self._plan.micro_batches and not math.isfinite(value)
        ]
        last = held[-1]
        latest = [at for at, taken in enumerate(held) if taken.step == last.step]
        mine = {number: sum(losses[at, number] for at in latest) for number in last.losses}
        own = stragglers.own() if stragglers is not None else []
        changed = self._still.changed() if self._still is not None else []
        written = self._frozen.written(self._state.model) if self._frozen is not None else []
        if self._state.step >= self._began_at + 2:
            self._frozen = None
        counts = len(faults), len(changed), len(written)
        loss_sum, (faulty, begun, moved), told = self._sum_over_processes(mine, counts, own)
        if moved:
            names = [name for each in self._world.gather(written) for name in each]
            raise WillFailAgain(f"task: {written_in_words(list(dict.fromkeys(names)))}")
        if begun and self._still is not None:
            self._still.require_equal(changed, self._world)
        skipped = _where([(taken.step, taken.broken) for taken in held], lambda value: value > 0)
        norms = [] if self._state.scaler else [(taken.step, taken.norm) for taken in held]
        endless = _where(norms, lambda value: not math.isfinite(value))
        self._state.skipped_steps += len(skipped)
        if faulty:
            faults = [fault for found in self._world.gather(faults) for fault in found]
        if faulty or endless:
            self._answer(faults, endless)
        self._require_weight(held)
        # A skipped step may have no weight at all, and then it has no mean loss.
        weight = float(last.weight)
        self.weight = weight if isinstance(last.weight, Tensor) else None
        values = {"train/loss": loss_sum / weight} if weight else {}
        values |= self._reading([held[at] for at in latest])
        return values if stragglers is None else values | stragglers.reading(told)

    def _require_weight(self, held: Sequence[_Taken]) -> None:
        """Refuse a step of negative weight, whose gradients were 0; the same on every process."""
        weights = [(t.step, t.weight) for t in held if isinstance(t.weight, Tensor)]
        if below := _where(weights, lambda weight: weight < 0):
            raise WillFailAgain(
                f"task.weight: the weights of step {below[0]} sum to less than 0, so it has no "
                "mean loss. A weight is what a value counts, from 0 up. To train against some "
                "rows, let the loss change its sign."
            )

    def _sum_over_processes(
        self, losses: Mapping[int, float], counts: Sequence[int], own: Sequence[float]
    ) -> tuple[float, list[float], list[list[float]]]:
        """(the summed loss, rounded once; all processes' `counts`; each process's `own`)."""
        world, count, width = self._world, self._plan.micro_batches, len(own)
        each = [
            losses.get(number, 0.0) for number in range(count)
        ]  # 0 for those of other processes
        told = [0.0] * (width * world.processes)
        told[width * world.index : width * (world.index + 1)] = own
        values = torch.tensor([*each, *counts, *told], dtype=world.wide).to(world.device)
        total = world.sum(values).tolist()
        found, of_counts = total[:count], total[count : count + len(counts)]
        all_told = total[count + len(counts) :]
        loss = math.fsum(found) if all(map(math.isfinite, found)) else sum(found)
        by_rank = [all_told[at : at + width] for at in range(0, len(all_told), width or 1)]
        return loss, of_counts, by_rank

    def _reading(self, latest: Sequence[_Taken]) -> dict[str, float]:
        state, reading = self._state, dict[str, float]()
        for taken in latest:
            if taken.norm is not None:
                of_turn = "" if taken.turn is None else f"/{taken.turn}"
                reading[f"train/grad_norm{of_turn}"] = float(taken.norm)
        if self._skips or state.scaler is not None:
            reading["train/skipped_steps"] = state.skipped_steps
        if state.scaler is not None:
            scale = reading["train/loss_scale"] = state.scaler.get_scale()
            if scale < SMALLEST_SCALE:
                raise Diverged(
                    f"The gradients are not finite at any scale (it fell to {scale:.3g} by step "
                    f"{state.step}): this is not fp16's range. Try model.precision=bf16, or look "
                    "for an operation without a gradient at 0 (a square root, a logarithm, a norm)."
                )
        return reading

    def _answer(self, faults: Sequence[_Fault], endless: Sequence[int]) -> None:
        """Report values that are not finite, and raise if the run must end."""
        state, allowed = self._state, self._plan.spec.faults.skips_allowed
        steps = sorted({fault.step for fault in faults} | set(endless))
        if not self._skips:
            rate = "optimizers.NAME.optimizer.lr" if self._plan.paces else "optimizer.lr"
            raise Diverged(
                f"{self._told(steps[0], faults)} Look at train/grad_norm before it, lower "
                f"{rate} or set max_grad_norm."
            )
        for step in steps[:_TOLD_AT_MOST]:
            self._say(f"WARNING: {self._told(step, faults)} The step was skipped.")
        if len(steps) > _TOLD_AT_MOST:
            self._say(f"WARNING: {len(steps) - _TOLD_AT_MOST} more steps were skipped.")
        state.faulty_steps += len(steps)
        if state.faulty_steps > allowed:
            raise Diverged(
                f"{state.faulty_steps} steps were skipped, and faults.skips_allowed is {allowed}. "
                f"The last: {self._told(steps[-1], faults)}"
            )

    def _told(self, step: int, faults: Sequence[_Fault]) -> str:
        here = sorted(
            (fault for fault in faults if fault.step == step), key=lambda fault: fault.micro_batch
        )
        if not here:
            return f"The gradients of step {step} are not finite, although every loss is."
        told = "; ".join(
            f"micro-batch {fault.micro_batch} on rank {fault.rank}{_in_turn(fault.turn)}: "
            f"{fault.value}, rows {self._rows(fault)}"
            for fault in here[:_TOLD_AT_MOST]
        )
        text = f"The loss is not finite at step {step} ({told})."
        if len({fault.micro_batch for fault in here}) == self._plan.micro_batches > 1:
            text += " It is so in every micro-batch: the weights became invalid in the step before."
        return text

    def _rows(self, fault: _Fault) -> str:
        """The rows of a micro-batch: a function of the seed, the step and its number."""
        plan = self._plan
        if plan.train_rows is None:
            return "of a stream"
        first = (fault.step - 1) * plan.global_batch
        span = range(
            fault.micro_batch * plan.micro_batch,
            min((fault.micro_batch + 1) * plan.micro_batch, plan.global_batch),
        )
        positions = np.arange(first + span.start, first + span.stop)
        rows = plan.rows_at(positions).tolist()
        return ", ".join(map(str, rows[:_TOLD_AT_MOST])) + (
            f" and {len(rows) - _TOLD_AT_MOST} more" if len(rows) > _TOLD_AT_MOST else ""
        )


def _in_turn(turn: str | None) -> str:
    return "" if turn is None else f" in the turn of {turn}"


def gradient_values(parameters: Sequence[nn.Parameter | OwnRows]) -> list[Tensor]:
    """All values of the gradients: of a sparse one the stored values, each position once."""
    for parameter in parameters:
        if isinstance(parameter, OwnRows):  # which has no sparse gradients
            continue
        if parameter.grad is not None and parameter.grad.is_sparse:
            parameter.grad = parameter.grad.coalesce()
    found = [p.grad for p in parameters if p.grad is not None]
    return [grad.values() if grad.is_sparse else grad for grad in found]


def _begins_momentum(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a parameter takes its first step with momentum, such as one that is unfrozen now.

    If the kernel skipped it, torch's SGD would go on from an uninitialized buffer.
    """
    return isinstance(optimizer, torch.optim.SGD) and any(
        p.grad is not None and optimizer.state.get(p, {}).get("momentum_buffer") is None
        for group in optimizer.param_groups
        if group["momentum"]
        for p in group["params"]
    )


def _by_place(held: Sequence[_Taken]) -> dict[tuple[int, int], float]:
    """Every summed loss by its index in `held` and its micro-batch; one wait for the device."""
    places = [(at, number) for at, taken in enumerate(held) for number in taken.losses]
    losses = [loss for taken in held for loss in taken.losses.values()]
    return dict(zip(places, torch.stack(losses).tolist(), strict=True))


def _where(
    values: Sequence[tuple[int, Tensor | None]], asked: Callable[[float], bool]
) -> list[int]:
    """The steps at which a flag is set, of those that have one; one wait for the device."""
    present = [(step, value) for step, value in values if value is not None]
    if not present:
        return []
    found = torch.stack([value for _, value in present]).tolist()
    return [step for (step, _), value in zip(present, found, strict=True) if asked(value)]


def _require_skippable(
    optimizer: torch.optim.Optimizer, normalization: Normalization, *, asked: bool
) -> None:
    what = "faults.on_non_finite: skip" if asked else "model.precision: fp16"
    if needs_closure(type(optimizer)):
        name = type(optimizer).__name__
        raise SpecError(
            f"{what} may skip a step, and {name} evaluates the loss several times in each. "
            "Use another."
        )
    if asked and normalization.layers and normalization.mode != "micro":
        raise SpecError(
            f"{what} needs model.batchnorm: micro. In {normalization.mode} the running statistics "
            "change in the forward pass, before it is known whether the step will be skipped."
        )
