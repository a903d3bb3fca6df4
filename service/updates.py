"""From gradients to weights: unscale, clip, decide, step; and what is done about a NaN.

A loss that is not finite makes the gradients of its process so (`exchange`), and their exchange
tells all the others: whatever is decided from the gradients after it is decided by every process
alike, with nothing asked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from service.errors import Diverged, SpecError
from service.normalization import Normalization
from service.plan import Plan
from service.precision import SMALLEST_SCALE
from service.samplers import rows_at
from service.state import TrainState
from service.vitals import Vitals
from service.world import World

_HELD_AT_MOST = 1000  # steps whose losses wait on the device to be looked at
_TOLD_AT_MOST = 8


@dataclass(frozen=True, slots=True)
class _Taken:
    """What one step leaves to be looked at later; its tensors are on the device."""

    step: int
    losses: Mapping[int, Tensor]
    """This process's summed losses, by micro-batch."""
    weight: float | Tensor
    """Weight of the whole step, over all processes."""
    norm: Tensor | None
    """The gradient's length before clipping, where it was worked out."""
    broken: Tensor | None
    """1 where the step was not taken, where that can be."""


@dataclass(frozen=True)
class _Fault:
    """A loss that is not finite."""

    step: int
    micro_batch: int
    rank: int
    value: float


class Updates:
    """Turns the gradients of each step into new weights or, on all processes alike, into none."""

    def __init__(
        self,
        state: TrainState,
        *,
        plan: Plan,
        world: World,
        normalization: Normalization,
        say: Callable[[str], None],
    ) -> None:
        """`say` tells a person which steps were skipped.

        Raises:
            SpecError: the spec asks for a skip that this optimizer or BatchNorm cannot do.
        """
        self._state = state
        self._plan = plan
        self._world = world
        self._normalization = normalization
        self._say = say
        self._parameters = [p for p in state.model.parameters() if p.requires_grad]
        self._skips = plan.spec.faults.on_non_finite == "skip"
        self._by_kernel = getattr(state.optimizer, "_step_supports_amp_scaling", False)
        self._has_stepped = bool(state.optimizer.state)
        self._held: list[_Taken] = []
        if self._skips or state.scaler is not None:
            _require_skippable(state.optimizer, normalization, asked=self._skips)

    def divisor(self, weight: float | Tensor) -> float | Tensor:
        """What the backward passes of a step of this weight divide their gradients by."""
        scaler = self._state.scaler
        return weight if scaler is None else scaler.divisor(weight)

    def apply(
        self,
        losses: Mapping[int, Tensor],
        weight: float | Tensor,
        *,
        logging: bool,
        closure: Callable[[], Any] | None = None,
    ) -> None:
        """Take the optimizer step for the gradients that are there, and count it.

        A step that is not taken leaves no trace but in the count: not in weights, optimizer or
        running statistics.  So the schedule and the rows stay functions of the step alone.

        Args:
            losses: this process's summed losses, by micro-batch.
            weight: weight of the whole step, over all processes.
            logging: whether the gradient's length is asked for.
        """
        state = self._state
        broken = None if state.scaler is None else state.scaler.unscale(state.optimizer)
        norm = self._norm(needed=logging or self._skips)
        if self._skips and broken is None and norm is not None:
            broken = norm.isfinite().logical_not().float()
        self._normalization.finish_step(broken)
        norm = self._clip(norm)
        self._step(broken, closure)
        if state.scaler is not None:
            state.scaler.update()
        state.step += 1
        if state.average is not None:
            state.average.move(state.step)
        if len(self._held) == _HELD_AT_MOST:
            self.look()
        self._held.append(_Taken(state.step, losses, weight, norm, broken))

    def forget(self) -> None:
        """Drop what a forward pass that does not count as a step's has gathered."""
        self._normalization.forget()

    def _norm(self, *, needed: bool) -> Tensor | None:
        if needed or self._plan.spec.max_grad_norm is not None:
            return nn.utils.get_total_norm(gradient_values(self._parameters))
        return None

    def _clip(self, norm: Tensor | None) -> Tensor | None:
        """Each number first, then the length; returns the length there was before either."""
        spec = self._plan.spec
        longest = norm
        if spec.max_grad_value is not None:
            nn.utils.clip_grad_value_(self._parameters, spec.max_grad_value)
            if spec.max_grad_norm is not None:
                longest = self._norm(needed=True)
        if spec.max_grad_norm is not None and longest is not None:
            nn.utils.clip_grads_with_norm_(self._parameters, spec.max_grad_norm, longest)
        return norm

    def _step(self, broken: Tensor | None, closure: Callable[[], Any] | None) -> None:
        """Take the step, unless `broken` is 1."""
        optimizer: Any = self._state.optimizer
        if closure is not None:
            optimizer.step(closure)
        elif broken is None:
            optimizer.step()
        elif self._by_kernel and self._has_stepped:
            # The kernel reads the flag where it lies, and nobody waits for the device.
            optimizer.grad_scale, optimizer.found_inf = None, broken
            optimizer.step()
            del optimizer.grad_scale, optimizer.found_inf
        elif not broken:
            # The first step too is decided here: where its kernel skips it, torch's SGD takes
            # whatever is in its new buffers for momentum.
            optimizer.step()
            self._has_stepped = True

    # ---- looking back, where the plan waits for the device anyway

    def look(self, vitals: Vitals | None = None) -> dict[str, float]:
        """What the steps since the last look have come to; every process calls it.

        Args:
            vitals: what the processes tell of themselves along with it.

        Returns:
            The latest step's `train/loss` and `train/grad_norm`, and in the modes that skip, how
            many steps were; empty where there was no step since.
        Raises:
            Diverged: something was not finite that may not be; on every process, in the same words.
        """
        held, self._held = self._held, []
        if not held:
            return {}
        faults = [*self._faults(held)]
        last = held[-1]
        own = vitals.own() if vitals is not None else []
        loss_sum, faulty, told = self._sum_over_processes(last.losses, len(faults), own)
        skipped = _where([(taken.step, taken.broken) for taken in held], lambda value: value > 0)
        norms = [] if self._state.scaler else [(taken.step, taken.norm) for taken in held]
        endless = _where(norms, lambda value: ~value.isfinite())
        self._state.skipped_steps += len(skipped)
        if faulty:
            faults = [fault for found in self._world.gather(faults) for fault in found]
        if faulty or endless:
            self._answer(faults, endless)
        values = {"train/loss": loss_sum / float(last.weight), **self._reading(last)}
        return values if vitals is None else values | vitals.reading(told)

    def _faults(self, held: Sequence[_Taken]) -> list[_Fault]:
        places = [(taken.step, number) for taken in held for number in taken.losses]
        values = torch.stack([loss for taken in held for loss in taken.losses.values()])
        if bool(values.isfinite().all()):
            return []
        return [
            _Fault(step, number, self._world.index, value)
            for (step, number), value in zip(places, values.tolist(), strict=True)
            if not math.isfinite(value)
        ]

    def _sum_over_processes(
        self, losses: Mapping[int, Tensor], faults: int, own: Sequence[float]
    ) -> tuple[float, float, list[list[float]]]:
        """(the summed loss, in the order of the micro-batches; faults; each process's `own`)."""
        world, count = self._world, self._plan.micro_batches
        told = torch.zeros(world.processes, len(own), dtype=world.wide)
        told[world.index] = torch.tensor(own, dtype=world.wide)
        each = torch.zeros(count + 1, dtype=world.wide)  # 0 for what others computed
        for number, loss in losses.items():
            if number < count:
                each[number] = loss
        each[count] = faults
        total = world.sum(torch.cat([each, told.flatten()]).to(world.device))
        all_told = total[count + 1 :].view_as(told).tolist()
        return float(total[:count].sum()), float(total[count]), all_told

    def _reading(self, last: _Taken) -> dict[str, float]:
        state, reading = self._state, dict[str, float]()
        if last.norm is not None:
            reading["train/grad_norm"] = float(last.norm)
        if self._skips or state.scaler is not None:
            reading["train/skipped_steps"] = state.skipped_steps
        if state.scaler is not None:
            scale = reading["train/loss_scale"] = state.scaler.get_scale()
            if scale < SMALLEST_SCALE:
                raise Diverged(
                    f"The gradients are not finite at any scale (it fell to {scale:.3g} by step "
                    f"{state.step}): this is not fp16's range. Try model.precision=bf16, or look "
                    "for what has no gradient at 0 (a square root, a logarithm, a norm)."
                )
        return reading

    def _answer(self, faults: Sequence[_Fault], endless: Sequence[int]) -> None:
        """Tell what was not finite, and raise where that is the end."""
        state, allowed = self._state, self._plan.spec.faults.skips_allowed
        steps = sorted({fault.step for fault in faults} | set(endless))
        if not self._skips:
            raise Diverged(
                f"{self._told(steps[0], faults)} Look at train/grad_norm before it, lower "
                "optimizer.lr or set max_grad_norm."
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
            return f"The gradients of step {step} are not finite, though every loss is."
        told = "; ".join(
            f"micro-batch {fault.micro_batch} on rank {fault.rank}: {fault.value}, "
            f"rows {self._rows(fault)}"
            for fault in here[:_TOLD_AT_MOST]
        )
        text = f"The loss is not finite at step {step} ({told})."
        if len(here) == self._plan.micro_batches > 1:
            text += " It is so in every micro-batch: the weights were spoilt in the step before."
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
        rows = rows_at(positions, rows=plan.train_rows, seed=plan.spec.seed).tolist()
        return ", ".join(map(str, rows[:_TOLD_AT_MOST])) + (
            f" and {len(rows) - _TOLD_AT_MOST} more" if len(rows) > _TOLD_AT_MOST else ""
        )


def gradient_values(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Every number in the gradients: of a sparse one those it holds, each place once."""
    for parameter in parameters:
        if parameter.grad is not None and parameter.grad.is_sparse:
            parameter.grad = parameter.grad.coalesce()
    found = [p.grad for p in parameters if p.grad is not None]
    return [grad.values() if grad.is_sparse else grad for grad in found]


def _where(
    values: Sequence[tuple[int, Tensor | None]], asked: Callable[[Tensor], Tensor]
) -> list[int]:
    """The steps at which it is so, of those that have a value; one wait for the device."""
    present = [(step, value) for step, value in values if value is not None]
    if not present:
        return []
    answers = asked(torch.stack([value for _, value in present])).tolist()
    return [step for (step, _), yes in zip(present, answers, strict=True) if yes]


def _require_skippable(
    optimizer: torch.optim.Optimizer, normalization: Normalization, *, asked: bool
) -> None:
    what = "faults.on_non_finite: skip" if asked else "model.precision: fp16"
    if isinstance(optimizer, torch.optim.LBFGS):
        raise SpecError(f"{what} may skip a step, and LBFGS takes several at once. Use another.")
    if asked and normalization.layers and normalization.mode != "micro":
        raise SpecError(
            f"{what} needs model.batchnorm: micro. In {normalization.mode} the running statistics "
            "move in the forward pass, before anybody knows whether the step will be skipped."
        )
