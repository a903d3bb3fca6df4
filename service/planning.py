"""What `evenstep plan` shows: the plan of a job in words, with the table of its parameters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from service.normalization import prepare
from service.optimizers import ParameterGroup, parameter_groups
from service.plan import Plan, make_plan
from service.spec import Spec
from service.task import load_task
from service.world import alone


def planned(spec: Spec, *, processes: int) -> str:
    """The plan of `spec` on `processes` processes, as text.

    Raises:
        SpecError: the task cannot be loaded, or does not go together with the spec.
    """
    task = load_task(spec.task, spec.task_args)
    plan = make_plan(
        spec, processes=processes, train_rows=task.train_rows, test_rows=task.test_rows
    )
    model = task.model()
    groups = parameter_groups(model, spec.optimizer)
    return "\n\n".join(
        [
            _aligned(_arithmetic(plan)),
            "learning rate\n" + _aligned(_rates(plan)),
            "parameters\n" + _aligned(_parameters(model, groups, spec), header=True),
            "batch normalisation\n" + _aligned(_normalization(model, plan)),
        ]
    )


def _arithmetic(plan: Plan) -> list[tuple[str, str]]:
    shares = [len(plan.share(process)) for process in range(plan.processes)]
    return [
        ("run", plan.spec.name),
        ("rows", f"{_rows(plan)}, {plan.test_rows:,} to test on"),
        (
            "steps",
            f"{plan.steps:,} of {plan.global_batch:,} rows: {plan.epoch(plan.steps):.2f} epochs",
        ),
        ("micro-batches", f"{plan.micro_batches} a step, of {plan.micro_batch} rows"),
        ("processes", f"{plan.processes}, computing {_counted(shares)} micro-batches each"),
        ("most processes", f"{plan.micro_batches}"),
        ("tests", _every(plan.tests_at, plan)),
        ("checkpoints", _every(plan.saves_at, plan)),
    ]


def _rows(plan: Plan) -> str:
    if plan.train_rows is not None:
        return f"{plan.train_rows:,} to train on"
    if plan.spec.loader.stream == "whole":
        return (
            "a stream to train on, read whole by every process: the same rows at any number of "
            "processes, resumed exactly at any other"
        )
    return (
        "a stream to train on, split among the processes: which rows meet in a step depends on "
        "their number, and so does the result; resumed exactly at the same number only"
    )


def _rates(plan: Plan) -> list[tuple[str, str]]:
    last = plan.steps - 1
    marks = sorted(
        {0, plan.warmup, last // 4, last // 2, 3 * last // 4, last} & set(range(plan.steps))
    )
    return [
        (f"step {step + 1:,}", f"{plan.spec.optimizer.lr * plan.rate(step):.6g}") for step in marks
    ]


def _parameters(
    model: nn.Module, groups: Sequence[ParameterGroup], spec: Spec
) -> list[tuple[str, ...]]:
    parameters = dict(model.named_parameters())
    table: list[tuple[str, ...]] = [("match", "tensors", "numbers", "lr", "options", "names")]
    for group in groups:
        options = dict(group.options)
        rate = "frozen" if group.frozen else f"{options.pop('lr', spec.optimizer.lr):g}"
        numbers = sum(parameters[name].numel() for name in group.names)
        names = ", ".join(group.names[:3]) + (" ..." if len(group.names) > 3 else "")
        told = " ".join(f"{key}={value}" for key, value in options.items()) or "-"
        table.append((group.match, str(len(group.names)), f"{numbers:,}", rate, told, names))
    return table


def _normalization(model: nn.Module, plan: Plan) -> list[tuple[str, str]]:
    layers = prepare(model, plan.spec.model.batchnorm, alone())
    return layers.table(micro_batch=plan.micro_batch, processes=plan.processes)


def _counted(shares: Iterable[int]) -> str:
    sizes = sorted(set(shares), reverse=True)
    return " or ".join(str(size) for size in sizes)


def _every(happens_at: object, plan: Plan) -> str:
    assert callable(happens_at)
    steps = [step for step in range(1, min(plan.steps, 100_000) + 1) if happens_at(step)]
    if not steps:
        return "never"
    shown = ", ".join(f"{step:,}" for step in steps[:3])
    return f"{len(steps):,}, after steps {shown}{' ...' if len(steps) > 3 else ''}"


def _aligned(rows: Sequence[Sequence[str]], *, header: bool = False) -> str:
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    lines = [
        "  " + "  ".join(f"{c:{w}}" for c, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    if header:
        lines.insert(1, "  " + "  ".join("-" * width for width in widths))
    return "\n".join(lines)
