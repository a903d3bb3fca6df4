"""Schedules are functions of the step: checked against torch's own, in every unit of time."""

from __future__ import annotations

import math
import warnings
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import small_regression as small
import torch
from jobs import train_in_process
from torch.optim import lr_scheduler

from service.basics.errors import SpecError
from service.optimization.learning_rates import make_schedule
from service.plan.early_stopping import EarlyStopping
from service.plan.plan import Plan, make_plan
from service.plan.schedules import Length, multiplier
from service.runs.tracking import read_metrics
from service.spec.files import load_spec
from service.spec.models import EarlyStoppingSpec
from service.spec.schedule import SCHEDULES

STEPS = 37


def ours(schedule: dict[str, Any], steps: int = STEPS) -> list[float]:
    """The multiplier at every step; an epoch has 61/23 of them."""
    spec = load_spec(
        small.spec_for(
            {"name": "sgd", "lr": 1.0},
            schedule=schedule,
            length={"steps": steps},
            test={"every_epochs": 1},
        )
    )
    rate = multiplier(spec.schedule, Length(steps, Fraction(61, 23)))
    return [rate(step) for step in range(steps)]


def torchs(make: Any, steps: int = STEPS, **options: Any) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0, momentum=0.9)
    scheduler, rates = make(optimizer, **options), []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


PAIRS: list[tuple[dict[str, Any], Any, dict[str, Any]]] = [
    ({"name": "constant"}, lr_scheduler.ConstantLR, {"factor": 1.0}),
    (
        {"name": "linear", "final": 0.2},
        lr_scheduler.LinearLR,
        {"start_factor": 1.0, "end_factor": 0.2, "total_iters": STEPS},
    ),
    (
        {"name": "cosine", "final": 0.1},
        lr_scheduler.CosineAnnealingLR,
        {"T_max": STEPS, "eta_min": 0.1},
    ),
    (
        {"name": "cosine_restarts", "cycle_steps": 5, "growth": 2, "final": 0.05},
        lr_scheduler.CosineAnnealingWarmRestarts,
        {"T_0": 5, "T_mult": 2, "eta_min": 0.05},
    ),
    (
        {"name": "cosine_restarts", "cycle_steps": 7},
        lr_scheduler.CosineAnnealingWarmRestarts,
        {"T_0": 7},
    ),
    (
        {"name": "polynomial", "power": 2.5},
        lr_scheduler.PolynomialLR,
        {"total_iters": STEPS, "power": 2.5},
    ),
    (
        {"name": "exponential", "gamma": 0.9, "every_steps": 1},
        lr_scheduler.ExponentialLR,
        {"gamma": 0.9},
    ),
    (
        {"name": "step", "gamma": 0.5, "every_steps": 6},
        lr_scheduler.StepLR,
        {"step_size": 6, "gamma": 0.5},
    ),
    (
        {"name": "multi_step", "gamma": 0.3, "at_steps": [4, 11, 30]},
        lr_scheduler.MultiStepLR,
        {"milestones": [4, 11, 30], "gamma": 0.3},
    ),
    (
        {"name": "one_cycle"},
        lr_scheduler.OneCycleLR,
        {"max_lr": 1.0, "total_steps": STEPS},
    ),
    (
        {"name": "one_cycle", "shape": "linear", "rise_fraction": 0.4, "start": 0.1, "final": 0.01},
        lr_scheduler.OneCycleLR,
        {
            "max_lr": 1.0,
            "total_steps": STEPS,
            "pct_start": 0.4,
            "anneal_strategy": "linear",
            "div_factor": 10,
            "final_div_factor": 10,
        },
    ),
    (
        {"name": "constant", "warmup_steps": 8},
        lr_scheduler.LinearLR,
        {"start_factor": 1 / 8, "total_iters": 7},
    ),
]


@pytest.mark.parametrize(("schedule", "make", "options"), PAIRS, ids=lambda part: str(part)[:50])
def test_the_rate_of_every_step_is_torchs(schedule, make, options):
    assert ours(schedule) == pytest.approx(torchs(make, **options), rel=1e-12, abs=1e-15)


def test_inverse_sqrt_is_that_of_the_transformer():
    rates = ours({"name": "inverse_sqrt", "warmup_steps": 4})
    paper = [min(n**-0.5, n * 4**-1.5) * 4**0.5 for n in range(1, STEPS + 1)]
    assert rates == pytest.approx(paper, rel=1e-12)
    assert ours({"name": "inverse_sqrt"})[15] == pytest.approx(17**-0.5)


def test_a_decay_that_would_begin_in_the_warmup_begins_after_it():
    schedule = {"name": "warmup_stable_decay", "warmup_steps": 20, "decay_steps": 30}
    rates = ours(schedule)
    assert rates[19:] == pytest.approx([1.0] + [1 - step / 17 for step in range(17)])


@pytest.mark.parametrize(
    ("shape", "half"), [("linear", 0.5), ("cosine", 0.5), ("sqrt", 1 - math.sqrt(0.5))]
)
def test_warmup_stable_decay_is_flat_until_the_decay(shape, half):
    schedule = {"name": "warmup_stable_decay", "warmup_steps": 5, "decay_steps": 8, "shape": shape}
    rates = ours(schedule)
    assert rates[:5] == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert rates[5:30] == [1.0] * 25
    assert rates[33] == pytest.approx(half)  # four of eight steps down
    assert rates[29:] == sorted(set(rates[29:]), reverse=True)
    assert ours({"name": "warmup_stable_decay"}) == ours(
        {"name": "warmup_stable_decay", "decay_fraction": 0.2}
    )


def shapes() -> list[dict[str, Any]]:
    return [schedule for schedule, _, _ in PAIRS] + [
        {"name": "inverse_sqrt"},
        {"name": "warmup_stable_decay"},
        {"name": "plateau", "measure": "test/loss", "mode": "min"},
    ]


def test_every_schedule_is_tried():
    named = {schedule["name"] for schedule in shapes()}
    assert named == {kind.model_fields["name"].annotation.__args__[0] for kind in SCHEDULES}


@pytest.mark.parametrize("schedule", shapes(), ids=lambda part: str(part)[:50])
def test_each_has_a_warmup_and_stays_between_nothing_and_the_whole_rate(schedule):
    rates = ours(schedule | {"warmup_steps": 6})
    assert rates[:6] == pytest.approx([(n + 1) / 6 for n in range(6)])
    assert all(0 <= rate <= 1 for rate in rates)


@pytest.mark.parametrize(
    ("word", "schedule"),
    [
        ("warmup", {"name": "cosine"}),
        ("cycle", {"name": "cosine_restarts"}),
        ("every", {"name": "step", "gamma": 0.5}),
        ("every", {"name": "exponential", "gamma": 0.5}),
        ("rise", {"name": "one_cycle"}),
        ("timescale", {"name": "inverse_sqrt"}),
        ("decay", {"name": "warmup_stable_decay"}),
    ],
)
def test_a_duration_may_be_given_in_steps_epochs_or_a_fraction(word, schedule):
    # An epoch is 61 rows and a step 23 of them: 46 epochs are 122 steps, and half of 244.
    in_steps = ours(schedule | {f"{word}_steps": 122}, steps=244)
    assert ours(schedule | {f"{word}_epochs": 46}, steps=244) == in_steps
    assert ours(schedule | {f"{word}_fraction": 0.5}, steps=244) == in_steps
    assert len(set(in_steps)) > 1


def test_moments_may_be_given_in_steps_epochs_or_fractions():
    in_steps = ours({"name": "multi_step", "at_steps": [61, 122]}, steps=244)
    assert ours({"name": "multi_step", "at_epochs": [23, 46]}, steps=244) == in_steps
    assert ours({"name": "multi_step", "at_fraction": [0.25, 0.5]}, steps=244) == in_steps


# ---- what a schedule remembers


def plan_of(schedule: dict[str, Any], **sections: Any) -> Plan:
    spec = load_spec(small.spec_for({"name": "sgd", "lr": 1.0}, schedule=schedule, **sections))
    return make_plan(spec, processes=1, train_rows=small.ROWS, test_rows=small.ROWS)


def test_plateau_lowers_the_rate_when_torchs_does():
    measured = [5, 4, 4, 4, 3.95, 4, 4, 4, 4, math.nan, 4, 1, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 0.5, 9]
    schedule = {"name": "plateau", "measure": "test/loss", "mode": "min", "gamma": 0.5}
    schedule |= {"patience": 3, "min_delta": 0.1, "cooldown": 2, "final": 0.1}
    rates = {}
    for kind in ("ours", "torchs"):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        rates[kind] = []
        if kind == "ours":
            ours = make_schedule(optimizer, plan_of(schedule, test={"every_steps": 1}))
        else:
            theirs = lr_scheduler.ReduceLROnPlateau(
                optimizer, factor=0.5, patience=2, threshold=0.1, threshold_mode="abs",
                cooldown=2, min_lr=0.1, eps=0,
            )  # fmt: skip
        for step, value in enumerate(measured):
            ours.learn({"test/loss": value}, step) if kind == "ours" else theirs.step(value)
            rates[kind].append(optimizer.param_groups[0]["lr"])
    assert rates["ours"] == rates["torchs"]
    assert len(set(rates["ours"])) == 5


def rates_of_run(runs: Path) -> list[float]:
    return [row["train/lr"] for row in read_metrics(runs / "job/metrics.jsonl")]


REMEMBERING: dict[str, dict[str, Any]] = {
    "plateau": {
        "name": "plateau",
        "measure": "test/loss",
        "mode": "max",  # the loss falls, so every test but the first is one without improvement
        "patience": 2,
        "gamma": 0.5,
        "warmup_steps": 3,
    },
    "cyclic": {
        "name": "torch.optim.lr_scheduler:CyclicLR",
        "base_lr": 0.01,
        "max_lr": 0.1,
        "step_size_up": 2,
        "warmup_steps": 2,
    },
    "milestones": {
        "name": "torch.optim.lr_scheduler:MultiStepLR",
        "milestones": [2, 7],
    },
}


@pytest.mark.parametrize("kind", REMEMBERING)
def test_what_a_schedule_remembers_is_in_the_checkpoint_at_any_number_of_processes(
    processes, tmp_path, kind
):
    spec = small.spec_for(
        {"name": "sgd", "lr": 0.1, "momentum": 0.9},
        schedule=REMEMBERING[kind],
        test={"every_steps": 1},
    )
    for count in (1, 3):
        processes(count).run(train_in_process, spec, tmp_path / f"whole-{count}")
    processes(1).run(train_in_process, spec, tmp_path / "parts", 5)
    processes(3).run(train_in_process, spec, tmp_path / "parts")
    rates = rates_of_run(tmp_path / "whole-1")
    assert rates_of_run(tmp_path / "whole-3") == rates
    assert rates_of_run(tmp_path / "parts") == rates
    expected = {
        "plateau": [1 / 30, 2 / 30, 0.1, 0.05, 0.05, 0.025, 0.025, 0.0125, 0.0125, 0.00625],
        "cyclic": [0.005, 0.01, 0.01, 0.055, 0.1, 0.055, 0.01, 0.055, 0.1, 0.055],
        "milestones": [0.1] * 2 + [0.01] * 5 + [0.001] * 3,
    }
    assert rates == pytest.approx(expected[kind])


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({"name": "torch.optim.lr_scheduler:StepLRR"}, "cannot import torch.*StepLRR"),
        ({"name": "torch.optim.lr_scheduler:StepLR"}, "StepLR says: TypeError: .*step_size"),
        (
            {"name": "torch.optim.lr_scheduler:StepLR", "stepsize": 3},
            "schedule.stepsize: StepLR has no such option; did you mean 'step_size'",
        ),
        ({"name": "torch.optim.lr_scheduler:ReduceLROnPlateau"}, "use name: plateau"),
        ({"name": "collections:Counter"}, "collections:Counter"),
        (
            {"name": "torch.optim.lr_scheduler:OneCycleLR", "max_lr": 0.1, "total_steps": 3},
            "OneCycleLR ends after 3 steps, and the run takes",
        ),
    ],
)
def test_a_wrong_scheduler_is_reported(schedule, message):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(SpecError, match=message):
            make_schedule(optimizer, plan_of(schedule))


def failing_at_the_third(optimizer: torch.optim.Optimizer) -> lr_scheduler.LambdaLR:
    return lr_scheduler.LambdaLR(optimizer, lambda step: [1.0, 0.5][step])


def test_a_scheduler_that_fails_in_the_run_is_reported_with_the_step_and_the_line():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = make_schedule(optimizer, plan_of({"name": f"{__name__}:failing_at_the_third"}))
    optimizer.step()
    schedule.set(1)
    with pytest.raises(SpecError, match=r"says at step 2: IndexError.*test_schedules.py:\d+"):
        schedule.set(2)


# ---- early stopping


def test_early_stopping_ends_the_run_as_done_on_every_process_and_after_a_resume(
    processes, tmp_path
):
    stopping = {"measure": "test/loss", "mode": "max", "patience": 4}  # it only ever falls
    spec = small.spec_for(
        {"name": "sgd", "lr": 0.05}, test={"every_steps": 1}, early_stopping=stopping
    )
    for count in (1, 3):
        done = processes(count).run(train_in_process, spec, tmp_path / f"{count}")
        assert all(values is not None for values in done), "done, and not stopped"
    processes(3).run(train_in_process, spec, tmp_path / "parts", 3)
    processes(1).run(train_in_process, spec, tmp_path / "parts")
    for place in ("1", "3", "parts"):
        run = tmp_path / place / "job"
        assert [row["step"] for row in read_metrics(run / "metrics.jsonl")] == [1, 2, 3, 4, 5]
        assert (run / "checkpoints/step-00000005/manifest.json").exists()
    assert processes(1).run(train_in_process, spec, tmp_path / "1") == [{}], "nothing to do"


def test_a_small_improvement_does_not_count():
    spec = EarlyStoppingSpec(measure="test/a", mode="max", patience=2, min_delta=0.1)
    patience = EarlyStopping(spec)
    seen = []
    for value in (math.nan, 0.5, 0.55, 0.65, 0.7, 0.74, 0.99):
        assert patience.tested({"test/a": value})
        seen.append(patience.waited)
    assert seen == [1, 0, 1, 0, 1, 2, 0]
    assert not patience.tested({"test/b": 1.0})


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"early_stopping": {"measure": "test/lss", "mode": "min", "patience": 1}},
            "early_stopping.measure: the test has no 'test/lss'; did you mean 'test/loss'",
        ),
        (
            {"schedule": {"name": "plateau", "measure": "test/accuracy", "mode": "max"}},
            "schedule.measure: the test has no 'test/accuracy'",
        ),
    ],
)
def test_a_measure_that_is_not_measured_is_reported(alone, tmp_path, sections, message):
    spec = small.spec_for({"name": "sgd", "lr": 0.1}, test={"every_steps": 1}) | sections
    with pytest.raises(SpecError, match=message):
        train_in_process(alone, spec, tmp_path)
