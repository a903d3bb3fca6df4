"""What `evenstep check` calls ready runs; what cannot run is refused by check and run alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ready_tasks
from jobs import furthest, spec_of, train_in_process, weights
from torch import Tensor, nn

from service.basics.errors import SpecError
from service.distributed.world import World
from service.plan.plan import make_plan
from service.preview.check import checked
from service.preview.plan import planned
from service.runs.tracking import read_metrics
from service.spec.files import load_spec
from service.training.setup import build_model

TASKS = Path(ready_tasks.__file__)


def job(factory: str, **sections: Any) -> dict[str, Any]:
    return spec_of(factory, **sections) | {"task": f"{TASKS}:{factory}", "length": {"steps": 5}}


def findings(spec: dict[str, Any], world: World, processes: int = 1) -> list[tuple[str, str]]:
    return list(checked(load_spec(spec), world=world, processes=processes))


def refused_by_check(world: World, spec: dict[str, Any], processes: int) -> str:
    with pytest.raises(SpecError) as told:
        findings(spec, world, processes)
    return str(told.value)


def refused_by_run(world: World, spec: dict[str, Any], runs: Path) -> str:
    with pytest.raises(SpecError) as told:
        train_in_process(world, spec, runs)
    return str(told.value)


# ---- the last micro-batch of a step


def test_a_last_micro_batch_of_one_row_is_refused_by_check_as_by_run(alone, tmp_path):
    spec = job("normalised", batch={"global_batch": 17, "micro_batch": 16})
    told = refused_by_check(alone, spec, 1)
    assert told == refused_by_run(alone, spec, tmp_path)
    assert told.startswith(
        "task: one forward and backward pass over 1 row, the last micro-batch of each step "
        "(batch.micro_batch: 9 has none of fewer than 8), failed: ValueError: Expected more than 1"
    )
    shown = planned(load_spec(spec), processes=1, runs=tmp_path)
    assert "last micro-batch of a step  1 row: fails in a layer that has one value" in shown


def test_its_advice_runs(alone, tmp_path):
    spec = job("normalised", batch={"global_batch": 17, "micro_batch": 9})
    assert findings(spec, alone)[-1][0] == "memory"
    assert train_in_process(alone, spec, tmp_path) is not None


def test_where_no_smaller_micro_batch_helps_the_global_batch_does(alone):
    spec = job("normalised", batch={"global_batch": 3, "micro_batch": 2})
    assert "(batch.global_batch: 4 makes all equal)" in refused_by_check(alone, spec, 1)


# ---- reentrant activation checkpoints


def outcome(world: World, spec: dict[str, Any], runs: str) -> str | None:
    try:
        train_in_process(world, spec, Path(runs))
    except SpecError as error:
        return str(error)
    return None


@pytest.mark.parametrize("factory", ["twice", "spare"])
def test_gradients_that_ddp_cannot_follow_name_the_cure(processes, alone, tmp_path, factory):
    spec = job(factory, test={"micro_batch": 9})
    told = processes(2).run(outcome, spec, str(tmp_path / "two"))
    assert told == [refused_by_check(alone, spec, 2)] * 2
    assert told[0].startswith("exchange.static_graph: the gradients of again.weight, again.bias")
    assert "exchange.static_graph=true" in told[0]
    assert "several processes" in dict(findings(spec, alone))["warning"]

    cured = spec | {"exchange": {"static_graph": True}}
    findings(cured, alone, 2)
    assert processes(2).run(outcome, cured, str(tmp_path / "two")) == [None, None]
    assert processes(1).run(outcome, cured, str(tmp_path / "one")) == [None]
    assert furthest(weights(tmp_path / "two"), weights(tmp_path / "one")) < 1e-12


@pytest.mark.parametrize(
    "sections", [{}, {"exactness": "bitwise"}, {"exchange": {"mode": "sharded"}}]
)
def test_those_that_can_be_followed_are(processes, alone, tmp_path, sections):
    factory = "twice" if "exactness" in sections else "once"
    spec = job(factory, test={"micro_batch": 9}) | sections
    assert "warning" not in dict(findings(spec, alone, 2))
    assert processes(2).run(outcome, spec, str(tmp_path / "two")) == [None, None]
    assert processes(1).run(outcome, spec, str(tmp_path / "one")) == [None]
    assert furthest(weights(tmp_path / "two"), weights(tmp_path / "one")) < 1e-12


# ---- rows with names


@pytest.mark.parametrize("arguments", [{}, {"lazy": True}])
def test_a_column_that_the_model_does_not_take_is_named(alone, tmp_path, arguments):
    spec = job("with_text", task_args=arguments, test={"micro_batch": 9})
    told = refused_by_check(alone, spec, 1)
    assert told == refused_by_run(alone, spec, tmp_path)
    model = "NamedLazily" if arguments else "Named"
    assert told == (
        f"task: the rows contain 'text', which {model}.forward(points, scale) does not accept. "
        f"Remove it "
        "from the rows, in the data set or in `collate` (then only ['points'] of the inputs would "
        "remain), or add a parameter of that name to forward."
    )


def test_a_column_that_the_model_lacks_is_named(alone):
    told = refused_by_check(alone, job("renamed", test={"micro_batch": 9}), 1)
    assert "the rows contain 'pixels', which Named.forward(points, scale) does not accept" in told
    assert "And Named.forward(points, scale) needs 'points', which the rows do not contain" in told


def test_a_column_of_the_test_rows_alone_is_named(alone, tmp_path):
    spec = job("with_other_tests")
    assert "the rows contain 'id'" in refused_by_check(alone, spec, 1)
    assert "the rows contain 'id'" in refused_by_run(alone, spec, tmp_path)


def test_the_advice_of_leaving_it_out_runs(alone, tmp_path):
    spec = job("without_text", test={"micro_batch": 9})
    findings(spec, alone)
    assert train_in_process(alone, spec, tmp_path) is not None


# ---- optimizers that ask for the loss


def sam(**options: Any) -> dict[str, Any]:
    # The whole data set is each step's batch: the loop by hand needs no order of rows.
    return job(
        "plain",
        optimizer={"name": f"{TASKS}:Sam", "lr": 0.3, **options},
        schedule={"name": "constant"},
        batch={"global_batch": 103, "micro_batch": 20},
    )


def sam_by_hand(world: World, steps: int) -> dict[str, Tensor]:
    spec = load_spec(sam())
    plan = make_plan(spec, processes=1, train_rows=103, test_rows=17)
    model = build_model(plan, ready_tasks.plain(), world).module
    optimizer = ready_tasks.Sam(model.parameters(), lr=0.3)
    points, labels = ready_tasks.rows().tensors

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = nn.functional.cross_entropy(model(points), labels)
        value.backward()
        return value

    for _ in range(steps):
        loss()
        optimizer.step(loss)
    return model.state_dict()


@pytest.mark.parametrize("count", [1, 2])
def test_an_optimizer_that_moves_before_its_closure_equals_the_hand_written_loop(
    processes, alone, tmp_path, count
):
    processes(count).run(train_in_process, sam(), tmp_path)
    assert furthest(weights(tmp_path), sam_by_hand(alone, 5)) < 1e-12
    processes(count).run(train_in_process, sam(), tmp_path / "again", 2)
    processes(count).run(train_in_process, sam(), tmp_path / "again")
    assert furthest(weights(tmp_path / "again"), weights(tmp_path)) == 0


def test_check_and_plan_take_the_same_optimizer(alone, tmp_path):
    assert "of Sam" in dict(findings(sam(), alone))["model"]
    assert "parameters" in planned(load_spec(sam()), processes=1, runs=tmp_path)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"max_grad_norm": 1.0}, "max_grad_norm: Sam compares losses along the unclipped gradient"),
        ({"faults": {"on_non_finite": "skip"}}, "may skip a step, and Sam evaluates the loss"),
    ],
)
def test_what_such_an_optimizer_cannot_do_is_refused_everywhere(alone, tmp_path, sections, message):
    spec = sam() | sections
    assert message in refused_by_check(alone, spec, 1)
    assert message in refused_by_run(alone, spec, tmp_path)


ALONE = "Sam evaluates a step several times"


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {
                "optimizers": {
                    "all": {"match": ["*"], "optimizer": {"name": f"{TASKS}:Sam", "lr": 1}}
                },
                "task": f"{TASKS}:own_step",
            },
            ALONE,
        ),
        (
            {
                "optimizer": {
                    "name": "muon",
                    "lr": 0.02,
                    "companion": {"name": f"{TASKS}:Sam", "lr": 0.3},
                }
            },
            ALONE,
        ),
    ],
    ids=["of several", "companion"],
)
def test_an_optimizer_whose_step_needs_the_loss_is_refused_among_several(
    alone, tmp_path, sections, message
):
    spec = {key: value for key, value in sam().items() if key != "optimizer"} | sections
    told = refused_by_check(alone, spec, 1)
    assert message in told
    assert told == refused_by_run(alone, spec, tmp_path)


def test_it_takes_groups_the_second_time_as_the_first(alone, tmp_path):
    grouped = sam(groups=[{"match": "0.*", "lr": 0.1}, {"match": "*"}])
    for runs in (tmp_path / "first", tmp_path / "second"):
        assert train_in_process(alone, grouped, runs) is not None


def test_an_inner_optimizer_that_no_checkpoint_would_hold_is_refused(alone, tmp_path):
    spec = sam(share=False)
    told = refused_by_check(alone, spec, 1)
    assert told == refused_by_run(alone, spec, tmp_path)
    assert "optimizer.name: Sam keeps another optimizer, base, whose state" in told
    assert "self.base.state = self.state" in told


def test_the_losses_of_such_a_run_are_those_before_the_move(processes, tmp_path):
    processes(1).run(train_in_process, sam(), tmp_path)
    first, *_, last = read_metrics(tmp_path / "job/metrics.jsonl")
    assert last["train/loss"] < first["train/loss"]


# ---- what the check builds as a run does


def test_a_loader_of_other_batches_is_refused_by_check_as_by_run(alone, tmp_path):
    spec = job("from_loader", batch={"global_batch": 17})
    told = refused_by_check(alone, spec, 1)
    assert told.startswith("batch.global_batch: 17 rows, but the task's DataLoader makes batches")
    assert told == refused_by_run(alone, spec, tmp_path)


def test_a_hook_that_no_test_calls_is_refused_by_check_as_by_run(alone, tmp_path):
    spec = job("hooked_without_tests")
    told = refused_by_check(alone, spec, 1)
    assert "has no test rows" in told
    assert told == refused_by_run(alone, spec, tmp_path)


def test_a_temporary_directory_too_deep_for_workers_is_refused_by_check_as_by_run(
    alone, tmp_path, monkeypatch
):
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    spec = job("without_text", loader={"workers": 1})
    told = refused_by_check(alone, spec, 1)
    assert "Set TMPDIR to a shorter" in told
    assert told == refused_by_run(alone, spec, tmp_path)


def test_what_follows_an_update_is_called_by_check_as_by_run(alone, tmp_path):
    told = refused_by_check(alone, job("broken_after_update"), 1)
    assert "task.after_update" in told
    assert told == refused_by_run(alone, job("broken_after_update"), tmp_path)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # of the compiler's own
def test_a_step_of_ones_own_with_a_compiled_model_is_ready(alone):
    found = dict(findings(job("own_step", model={"compile": True}), alone))
    assert "forward and a backward pass" in found["compile"]
