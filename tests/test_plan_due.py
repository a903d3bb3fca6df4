"""The loop asks the plan one question: what is due next.  It has to name no step too few."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from service.plan.plan import make_plan
from service.spec.files import load_spec

EVERY = st.one_of(
    st.just({}),
    st.builds(lambda n: {"every_steps": n}, st.integers(1, 9)),
    st.builds(lambda n: {"every_epochs": n}, st.sampled_from([0.1, 0.25, 0.7, 1, 1.5])),
)


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
