"""`evenstep plan`: the plan of a job in words, with the table of its parameters."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import nn

from service.checkpoints.initial_weights import initial_weights
from service.checkpoints.snapshots import expected_bytes
from service.data.loaders import require_batch
from service.data.loading import way_of_rows
from service.data.task import Task, load_task, new_model, sampling_of
from service.distributed.batchnorm import prepare
from service.distributed.world import alone
from service.evaluation.hooks import require_hooks
from service.health.stop_budget import estimated, longest_save, stop_in_words
from service.optimization.activation_checkpointing import checkpoint_activations
from service.optimization.buffers import buffers_besides_batchnorm
from service.optimization.learning_rates import make_schedule
from service.optimization.optimizers import (
    ParameterGroup,
    Turns,
    frozen_until,
    require_its_loss,
    trained_by,
)
from service.optimization.train_state import require_measures
from service.plan.plan import Plan, due, make_plan
from service.runs.checkpoint_files import in_words, saving_in_words
from service.runs.directory import RunDirectory
from service.sharding.sharding import held_bytes, parameters_by_unit, units_of
from service.spec.models import Spec
from service.spec.schedule import PlateauSpec
from service.training.setup import require_replayable, require_shardable


def planned(spec: Spec, *, processes: int, runs: Path) -> str:
    """The plan of `spec` on `processes` processes, as text.

    Args:
        runs: the directory of runs; the duration of saves is read from the run, or tested on this
            disk.

    Raises:
        SpecError: the task cannot be loaded, or does not match the spec.
    """
    task = load_task(spec.task, spec.task_args, seed=spec.seed)
    plan = make_plan(
        spec,
        processes=processes,
        train_rows=task.train_rows,
        test_rows=task.test_rows,
        sampling=sampling_of(task),
    )
    require_batch(task, plan)
    require_measures(spec, task)
    require_hooks(task, plan)
    require_replayable(spec, task)
    model = new_model(task, seed=spec.seed)
    if spec.exchange.shards:
        require_shardable(model, spec)
    kept = [name for name, p in model.named_parameters() if not p.requires_grad]
    trained = trained_by(model, spec, task)
    groups, optimizer = trained.groups, trained.optimizer
    parameters = _parameters(model, groups, plan, kept)
    require_its_loss(optimizer, spec)
    size = expected_bytes(model, optimizer, averaged=spec.model.moving_average is not None)
    takes = longest_save(RunDirectory(runs / spec.name)) or estimated(size, runs)
    saving = [
        ("a checkpoint", saving_in_words(size, spec.checkpoint)),
        ("a stop takes", stop_in_words(spec, takes)),
    ]
    return "\n\n".join(
        [
            _aligned([*_arithmetic(plan), *_data(plan, task), *saving]),
            *_turns(plan, optimizer),
            "learning rate\n" + _aligned(_rates(plan, optimizer)),
            "parameters\n" + _aligned(parameters, header=True) + "\n  " + _each_in_one(groups),
            *_initial(model, plan.spec),
            "batch normalisation\n" + _aligned(_normalization(model, plan)),
            *_buffers(model, plan.spec),
            *_checkpointed(model, plan.spec),
            *_units(model, plan, size),
        ]
    )


def checkpoint_bytes(spec: Spec) -> int | None:
    """The size of a checkpoint of the job; None if it is known only after a step."""
    task = load_task(spec.task, spec.task_args, seed=spec.seed)
    model = new_model(task, seed=spec.seed)
    optimizer = trained_by(model, spec, task).optimizer
    return expected_bytes(model, optimizer, averaged=spec.model.moving_average is not None)


def _arithmetic(plan: Plan) -> list[tuple[str, str]]:
    shares = [len(plan.share(process)) for process in range(plan.processes)]
    return [
        ("run", plan.spec.name),
        ("rows", f"{_rows(plan)}, {plan.test_rows:,} to test on"),
        (
            "steps",
            f"{plan.steps:,} of {plan.global_batch:,} rows: {plan.epoch(plan.steps):.2f} epochs",
        ),
        ("micro-batches", f"{plan.micro_batches} a step, of {_micro_batch(plan)}"),
        ("processes", f"{plan.processes}, computing {_counted(shares)} micro-batches each"),
        ("most processes", f"{plan.most_processes}"),
        ("tests", _every(plan.test_every, plan) if plan.test_rows else "never"),
        ("checkpoints", _every(plan.save_every, plan)),
        *_waiting(plan.spec),
        *_narrowed(plan),
    ]


def _data(plan: Plan, task: Task) -> list[tuple[str, str]]:
    way = way_of_rows(task.train_data(), task=task, spec=plan.spec.loader)
    lines = [("rows come", way)]
    if plan.sampling is not None:
        drawn = plan.steps * plan.global_batch
        said = plan.sampling.in_words(drawn, global_batch=plan.global_batch)
        lines += [("in the run" if n == 0 else "", line) for n, line in enumerate(said)]
    return lines


def _rows(plan: Plan) -> str:
    if plan.train_rows is not None:
        return f"{plan.train_rows:,} to train on"
    if plan.spec.loader.stream == "whole":
        return (
            "a stream to train on, read completely by every process: the same rows at any number "
            "of "
            "processes, resumed exactly at any other"
        )
    return (
        "a stream to train on, split among the processes: the rows of a step, and so the result, "
        "depend on their number; resumed exactly at the same number only"
    )


def _micro_batch(plan: Plan) -> str:
    if plan.spec.batch.micro_batch != "auto":
        return f"{plan.micro_batch} rows"
    return f"{plan.micro_batch} rows if they fit in memory: the run tests this when it starts"


def _waiting(spec: Spec) -> list[tuple[str, str]]:
    """What depends on future measures."""
    told = []
    stopping = spec.early_stopping
    for key, plateau in spec.schedules.items():
        if isinstance(plateau, PlateauSpec):
            patience = f"has not improved in {plateau.patience} tests"
            rate = "rate" if spec.optimizer is not None else f"rate of {key.split('.')[1]}"
            told.append((rate, f"times {plateau.gamma:g} when {plateau.measure} {patience}"))
    if stopping is not None:
        patience = f"has not improved in {stopping.patience} tests"
        told.append(("ends early", f"when {stopping.measure} {patience}"))
    return told


def _narrowed(plan: Plan) -> list[tuple[str, str]]:
    if plan.spec.exchange.precision == "full" or plan.processes == 1:
        return []
    told = (
        f"in {plan.spec.exchange.precision}: half the bytes, and the result depends on the number"
    )
    return [("gradients", f"exchanged {told} of processes")]


def _rates(plan: Plan, optimizer: torch.optim.Optimizer) -> list[tuple[str, ...]]:
    """The rate of every group at the first and last step, at the quarters and after the warmup."""
    last = plan.steps - 1
    warmups = [pace.warmup for pace in plan.paces.values()] or [plan.warmup]
    marks = {0, *warmups, last // 4, last // 2, 3 * last // 4, last}
    schedule = make_schedule(optimizer, plan)
    several = isinstance(optimizer, Turns)
    each = optimizer.by_name if isinstance(optimizer, Turns) else {"": optimizer}
    table: list[tuple[str, ...]] = [("", *each)] if several else []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's: a scheduler steps without its optimizer
        for step in sorted(mark for mark in marks if mark < plan.steps):
            schedule.set(step)
            rates = [
                ", ".join(dict.fromkeys(f"{group['lr']:.6g}" for group in one.param_groups))
                for one in each.values()
            ]
            table.append((f"step {step + 1:,}", *rates))
    return table


def _turns(plan: Plan, optimizer: torch.optim.Optimizer) -> list[str]:
    """The turns of the optimizers, if there are several."""
    if not isinstance(optimizer, Turns):
        return []
    table = [("turn", "optimizer", "steps", "trains")]
    for name, turn in plan.spec.optimizers.items():
        steps = plan.steps // turn.every
        every = "every step" if turn.every == 1 else f"every {turn.every} steps"
        match = ", ".join(turn.patterns(name))
        table.append((name, turn.optimizer.name, f"{steps:,}, {every}", match))
    return ["optimizers, in their order\n" + _aligned(table, header=True)]


def _parameters(
    model: nn.Module, groups: Sequence[ParameterGroup], plan: Plan, kept: Sequence[str]
) -> list[tuple[str, ...]]:
    spec = plan.spec
    table: list[tuple[str, ...]] = [("match", "tensors", "numbers", "lr", "options", "names")]
    parameters = dict(model.named_parameters())
    for group in groups:
        options = dict(group.options)
        turn = spec.optimizers.get(group.optimizer)
        trainer: Any = spec.optimizer if turn is None else turn.optimizer
        match = group.match if turn is None else f"{group.optimizer}: {group.match}"
        if group.companion:
            trainer = trainer.companion
            options = {"optimizer": trainer.name, **options}
        rate = f"{options.pop('lr', trainer.lr):g}"
        rate = "frozen" if group.frozen else rate
        if until := frozen_until(group, plan):
            options["trained_after_step"] = until
        table.append(_row(parameters, match, group.names, rate, options))
    home = {name for group in groups for name in group.names}
    left = [name for name in parameters if name not in home and name not in kept]
    if kept:
        table.append(_row(parameters, "-", kept, "frozen", {"by": "the task"}))
    if left:
        table.append(_row(parameters, "-", left, "frozen", {"taken_by": "no optimizer"}))
    return table


def _row(
    parameters: Mapping[str, nn.Parameter],
    match: str,
    names: Sequence[str],
    rate: str,
    options: dict[str, object],
) -> tuple[str, ...]:
    numbers = sum(parameters[name].numel() for name in names)
    shown = ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")
    told = " ".join(f"{key}={value}" for key, value in options.items()) or "-"
    return match, str(len(names)), f"{numbers:,}", rate, told, shown


def _each_in_one(groups: Sequence[ParameterGroup]) -> str:
    # `parameter_groups` has checked this.
    tensors = sum(len(group.names) for group in groups)
    places = "1 group" if len(groups) == 1 else f"{len(groups)} groups, each in exactly one"
    return f"{tensors} tensors in {places}"


def _normalization(model: nn.Module, plan: Plan) -> list[tuple[str, str]]:
    layers = prepare(model, plan.spec.model.batchnorm, alone())
    last = plan.global_batch - (plan.micro_batches - 1) * plan.micro_batch
    return layers.table(micro_batch=plan.micro_batch, last=last, processes=plan.processes)


def _initial(model: nn.Module, spec: Spec) -> list[str]:
    """The weights that the model loads before the first step."""
    if spec.init is None:
        return []
    return [_aligned(initial_weights(spec.init, model).table(), header=True)]


def _buffers(model: nn.Module, spec: Spec) -> list[str]:
    """The rule for buffers besides BatchNorm's: a plan computes nothing, so all are listed."""
    names = buffers_besides_batchnorm(model)
    if not names:
        return []
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    how = f"{spec.model.buffers}; `evenstep check` and the start of the run list those that change"
    return ["other buffers\n" + _aligned([("names", shown), ("those that change", how)])]


def _checkpointed(model: nn.Module, spec: Spec) -> list[str]:
    """The modules that recompute their activations in the backward pass."""
    names = checkpoint_activations(model, spec.model.activation_checkpointing)
    if not names:
        return []
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return ["activation checkpointing\n" + _aligned([("computed again", shown)])]


def _units(model: nn.Module, plan: Plan, saved_bytes: int | None) -> list[str]:
    """The units of a sharded model, and what each process has of them."""
    if not plan.spec.exchange.shards:
        return []
    units = parameters_by_unit(model, units_of(model, plan.spec.exchange.units))
    table = [("unit", "tensors", "numbers", "whole", "a process holds")]
    largest = held_of_all = trained = summed = 0
    for name, parameters in units.items():
        whole = sum(p.nbytes for p in parameters.values())
        held = sum(held_bytes(p, plan.processes) for p in parameters.values())
        # Unless they are exchanged after each micro-batch, they are whole until the last.
        at_once = plan.rounds == 1 or plan.spec.exchange.sync_each_micro_batch
        parts = plan.processes if at_once else 1
        trained += sum(held_bytes(p, parts) for p in parameters.values() if p.requires_grad)
        summed += sum(held_bytes(p, plan.processes) for p in parameters.values() if p.requires_grad)
        largest, held_of_all = max(largest, whole), held_of_all + held
        numbers = f"{sum(p.numel() for p in parameters.values()):,}"
        table.append((name, str(len(parameters)), numbers, in_words(whole), in_words(held)))
    weights = sum(p.nbytes for p in model.parameters())
    kept = 0 if saved_bytes is None else max(0, saved_bytes - weights) * held_of_all // weights
    state = "as much as the optimizer keeps" if saved_bytes is None else in_words(kept)
    told = (
        f"  Of all units a process holds at most {in_words(held_of_all)} of weights, "
        f"{in_words(trained)} of gradients and {state} of optimizer state; "
        f"and the largest unit whole at one time, {in_words(largest)}."
    )
    if plan.spec.exchange.offload:
        waiting = "" if trained == summed else f" and {in_words(trained)} of gradients"
        told = (
            f"  In main memory a process holds at most {in_words(held_of_all)} of weights, "
            f"{in_words(summed)} of gradients and {state} of optimizer state.\n"
            f"  On the device it holds the units that are gathered, the largest of "
            f"{in_words(largest)}{waiting}; and all activations and buffers."
        )
    over = "the processes"
    if plan.spec.exchange.mode == "hybrid":
        over = f"the processes of each node, if one has {plan.processes}"
    return [f"sharded over {over}\n" + _aligned(table, header=True) + "\n" + told]


def _counted(shares: Iterable[int]) -> str:
    sizes = sorted(set(shares), reverse=True)
    return " or ".join(str(size) for size in sizes)


def _every(interval: Fraction | None, plan: Plan) -> str:
    count, first = due(interval, steps=plan.steps)
    shown = ", ".join(f"{step:,}" for step in first[:3])
    return f"{count:,}, after steps {shown}{' ...' if len(first) > 3 else ''}"


def _aligned(rows: Sequence[Sequence[str]], *, header: bool = False) -> str:
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    lines = [
        "  " + "  ".join(f"{c:{w}}" for c, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    if header:
        lines.insert(1, "  " + "  ".join("-" * width for width in widths))
    return "\n".join(lines)
