"""The loop asks the plan one question: what is due next.  It has to name no step too few."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jobs import plan_of

from service.basics.errors import SpecError
from service.plan import plan as plans
from service.plan.plan import make_plan, window_of
from service.spec.files import load_spec

EVERY = st.one_of(
    st.just({}),
    st.builds(lambda n: {"every_steps": n}, st.integers(1, 9)),
    st.builds(lambda n: {"every_epochs": n}, st.sampled_from([0.1, 0.25, 0.7, 1, 1.5])),
)


@settings(deadline=None)
@given(
    steps=st.integers(1, 60),
    log=st.integers(1, 20),
    test=EVERY,
    save=EVERY,
    stop=st.one_of(st.none(), st.integers(1, 70)),
    batch=st.integers(1, 40),
    test_rows=st.sampled_from([0, 7]),
)
def test_what_is_due_is_what_the_plan_does(steps, log, test, save, stop, batch, test_rows):
    spec = load_spec(
        {
            "name": "due",
            "task": "x:y",
            "batch": {"global_batch": batch},
            "length": {"steps": steps},
            "optimizer": {"name": "sgd", "lr": 0.1},
            "tracking": {"log_every_steps": log},
            "test": test,
            "checkpoint": save,
        }
    )
    plan = make_plan(spec, processes=1, train_rows=41, test_rows=test_rows, stop_at=stop)
    asked = (plan.logs_at, plan.tests_at, plan.saves_at, plan.stops_at)
    happens = [step for step in range(1, steps + 1) if any(at(step) for at in asked)]

    due, step = [], 0
    while step < steps:
        step = plan.next_due(step)
        due.append(step)

    assert [step for step in happens if step not in due] == []
    assert [step for step in due if step not in happens and step != stop] == []

    for happens_at, interval in (
        (plan.tests_at, plan.test_every),
        (plan.saves_at, plan.save_every),
    ):
        known = [step for step in range(1, steps + 1) if happens_at(step)]
        if test_rows or happens_at == plan.saves_at:
            assert plans.due(interval, steps=steps) == (len(known), known[:4])


def test_the_plan_of_a_long_run_counts_all_tests_and_checkpoints(tmp_path):
    changed = ("length.steps=1000000000000", "test.every_steps=250000", "checkpoint.every_epochs=")
    told = " ".join(plan_of("digits", *changed, runs=tmp_path).split())
    assert "tests 4,000,000, after steps 250,000, 500,000, 750,000 ..." in told
    assert "checkpoints 1, after steps 1,000,000,000,000" in told
    assert "step 500,000,000,000 0.0" in told


@pytest.mark.parametrize("exactness", ["rounding", "bitwise"])
@pytest.mark.parametrize("micro_batch", [1, 3, 8, 16])
def test_the_most_processes_of_a_plan_are_possible_and_one_more_is_not(exactness, micro_batch):
    spec = load_spec(
        {
            "name": "most",
            "task": "x:y",
            "batch": {"global_batch": 19, "micro_batch": micro_batch},
            "length": {"steps": 1},
            "optimizer": {"name": "sgd", "lr": 0.1},
            "exactness": exactness,
        }
    )
    most = make_plan(spec, processes=1, train_rows=41, test_rows=0).most_processes
    assert make_plan(spec, processes=most, train_rows=41, test_rows=0).processes == most
    with pytest.raises(SpecError, match="Use "):
        make_plan(spec, processes=most + 1, train_rows=41, test_rows=0)


@pytest.mark.parametrize("text", ["0:3", "3:0", "3", "-1:2", "1:2:3", "9" * 5000 + ":1", ""])
def test_what_is_no_window_of_steps_is_told_in_one_line(text):
    with pytest.raises(SpecError, match=r"^--profile: must be START:STEPS.{,90}$"):
        window_of(text)
    assert window_of("020:5") == (20, 5)
