"""A run whose spec the user has changed: the effect on its state, and the messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from service.basics.errors import EvenstepError, SpecError
from service.optimization.train_state import TrainState
from service.plan.changing import Change, told_of_lines
from service.plan.plan import Plan, make_plan
from service.runs.directory import OpenRun, changes_in
from service.spec.models import Spec

Options = Sequence[Mapping[str, Any]]

# The schedule sets the rates from the new spec; the others are not options of the optimizer.
_NOT_IN_GROUPS = {"lr", "match", "no_decay", "layer_decay", "unfreeze_at_step", "unfreeze_at_epoch"}


def options_of(optimizer: torch.optim.Optimizer) -> Options:
    """The current options of each parameter group, such as the weight decay."""
    return [
        {key: value for key, value in group.items() if key not in ("params", "param_names")}
        for group in optimizer.param_groups
    ]


def changes_since(opened: OpenRun | None, step: int) -> list[Change]:
    """The changes of the spec that the checkpoint of `step` does not include yet; on rank 0."""
    if opened is None:
        return []
    known = [Change(**k) for e in changes_in(opened.facts) if e["step"] >= step for k in e["keys"]]
    return [*known, *opened.changed]


def follow(state: TrainState, asked: Options, changes: Sequence[Change]) -> None:
    """Set the changed options in the optimizer's groups, instead of those of the checkpoint.

    Args:
        asked: the options of the groups according to the spec, from before the state was loaded.
    Raises:
        SpecError: the optimizer does not keep an option in its groups.
    """
    named = {change.key: change.key.rpartition(".")[2] for change in changes}
    for key, option in named.items():
        if not key.startswith("optimizer.") or option in _NOT_IN_GROUPS:
            continue
        if not any(option in group for group in asked):
            raise SpecError(
                f"{key} cannot be changed in a run: {type(state.optimizer).__name__} does not keep "
                f"{option!r} in its parameter groups. Start a new run."
            )
        for group, wanted in zip(state.optimizer.param_groups, asked, strict=True):
            if option in wanted:
                group[option] = wanted[option]


def require_something_left(state: TrainState, plan: Plan, changes: Sequence[Change]) -> None:
    """Refuse a change after which the run would not take another step.

    Raises:
        SpecError: says how far the run is, and how to extend it.
    """
    if not changes:
        return
    if state.ended_early and state.step < plan.steps:
        raise SpecError(
            f"The run has ended early, after step {state.step:,}: no other change has an "
            "effect. Raise early_stopping.patience, or remove it with early_stopping=."
        )
    if state.step >= plan.steps:
        key = "length.steps" if plan.spec.length.steps is not None else "length.epochs"
        raise SpecError(
            f"{key}: the run has taken {state.step:,} steps, and would end after {plan.steps:,} "
            f"steps, so no step would be taken with the changed spec. Extend it with a larger "
            f"{key}."
        )


def in_words(changes: Sequence[Change], *, old: Spec, plan: Plan, step: int) -> str:
    """The changes from `step` on, and their effect on the learning rate."""
    told = f"Changed from step {step + 1:,} on:{told_of_lines(changes)}"
    before = _rate(old, plan, step)
    now = plan.rate(step)
    if before is not None and before != now:
        keys = {change.key.partition(".")[0] for change in changes}
        because = " depends on the length of the run, so it changes too"
        if "schedule" in keys:
            because = " has changed"
        told += (
            f"\nThe schedule {plan.spec.schedule.name}{because}: at step {step + 1:,} the learning "
            f"rate's multiplier is {now:.4g} instead of {before:.4g}."
        )
    return told


def _rate(old: Spec, plan: Plan, step: int) -> float | None:
    """The old schedule's multiplier after `step` steps; None if unknown."""
    # With the current batch, so that it can be planned on these processes.
    spec = old.model_copy(update={"batch": plan.spec.batch, "exactness": plan.spec.exactness})
    try:
        before = make_plan(
            spec, processes=plan.processes, train_rows=plan.train_rows, test_rows=plan.test_rows
        )
    except EvenstepError:
        return None
    return before.rate(min(step, before.steps - 1))
