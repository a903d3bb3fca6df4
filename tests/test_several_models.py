"""Several models and optimizers: the same as a loop by hand, at any number of processes."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import several_models
from jobs import difference, plan_of, rows_of, same_bits, spec_of, train_in_process, weights
from processes import Processes, ProcessesFailed
from test_fitting import rows_that_fit
from test_own_steps import assert_same_rows

from service.basics.errors import SpecError
from service.distributed.world import alone
from service.runs.tracking import read_metrics
from service.spec.files import dump_spec, load_spec

HERE = Path(several_models.__file__)
STEPS = 12
TASKS: dict[str, tuple[dict[str, Any], Any]] = {
    "gan": ({"optimizers": several_models.GAN}, several_models.gan_by_hand),
    "distillation": (
        {"optimizers": several_models.STUDENT},
        several_models.distillation_by_hand,
    ),
    "byol": (
        {"optimizer": {"name": "adamw", "lr": 0.01, "weight_decay": 0.1}},
        several_models.byol_by_hand,
    ),
}


def job(factory: str, **sections: Any) -> dict[str, Any]:
    values = spec_of("") | {
        "task": f"{HERE}:{factory}",
        "batch": {"global_batch": several_models.GLOBAL, "micro_batch": several_models.MICRO},
        "length": {"steps": STEPS},
        "test": {"every_steps": 6, "micro_batch": 7},
    }
    del values["optimizer"], values["schedule"]
    return values | TASKS.get(factory, ({}, None))[0] | sections


@pytest.mark.parametrize("factory", list(TASKS))
def test_it_trains_as_a_hand_written_loop_at_any_world_size(processes, tmp_path, factory):
    wanted = TASKS[factory][1](STEPS)
    for count in (1, 2, 3):
        processes(count).run(train_in_process, job(factory), tmp_path / str(count))
        found = weights(tmp_path / str(count))
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert (found[name] - tensor).abs().max() < 1e-12, name
    for count in (2, 3):
        assert_same_rows(tmp_path / "1", tmp_path / str(count))


@pytest.mark.parametrize("late", ["every", "unfreeze_at_step"])
@pytest.mark.parametrize("name", ["adagrad", f"{HERE}:Slow"])
def test_state_that_a_constructor_makes_is_there_before_the_first_turn(
    processes, tmp_path, name, late
):
    more = {"initial_accumulator_value": 0.3} if name == "adagrad" else {}
    groups = {"groups": [{"match": "*", "unfreeze_at_step": 4}]} if late != "every" else {}
    turns = {
        "critic": {"optimizer": {"name": "sgd", "lr": 0.02}},
        "generator": {
            "every": 3 if late == "every" else 1,
            "optimizer": {"name": name, "lr": 0.05} | more | groups,
        },
    }
    for stop in (2, 7, None):
        processes(2).run(train_in_process, job("gan", optimizers=turns), tmp_path / "cut", stop)
    processes(2).run(train_in_process, job("gan", optimizers=turns), tmp_path / "whole")
    for file in ("model", "optimizer"):
        whole, cut = (weights(tmp_path / name, file=file) for name in ("whole", "cut"))
        assert same_bits(whole, cut)


@pytest.fixture(scope="module")
def gans(processes, tmp_path_factory):
    """The GAN without a stop, at 1 and 3 processes."""
    places = {count: tmp_path_factory.mktemp(f"gan-{count}") for count in (1, 3)}
    for count, place in places.items():
        processes(count).run(train_in_process, job("gan"), place)
    return places


def test_it_resumes_in_the_same_bits(processes, tmp_path, gans):
    for stop in (4, 7):  # before and after the generator's first turn
        assert processes(3).run(train_in_process, job("gan"), tmp_path, stop) == [None] * 3
    processes(3).run(train_in_process, job("gan"), tmp_path)
    assert difference(gans[3], tmp_path) == 0
    assert rows_of(gans[3]) == rows_of(tmp_path)


def test_stopped_on_three_processes_it_goes_on_on_one(processes, tmp_path, gans):
    assert processes(3).run(train_in_process, job("gan"), tmp_path, 7) == [None] * 3
    processes(1).run(train_in_process, job("gan"), tmp_path)
    assert difference(gans[1], tmp_path) < 1e-12
    assert_same_rows(gans[1], tmp_path)


def test_a_teacher_that_follows_resumes_in_the_same_bits(processes, tmp_path):
    processes(3).run(train_in_process, job("byol"), tmp_path / "whole")
    processes(3).run(train_in_process, job("byol"), tmp_path / "stopped", 5)
    processes(3).run(train_in_process, job("byol"), tmp_path / "stopped")
    assert difference(tmp_path / "whole", tmp_path / "stopped") == 0


def test_bitwise_is_bitwise_in_turns(processes, tmp_path):
    for count in (1, 2):
        spec = job("gan", exactness="bitwise", model={"moving_average": 0.9})
        processes(count).run(train_in_process, spec, tmp_path / str(count))
    assert difference(tmp_path / "1", tmp_path / "2") == 0


def test_a_static_graph_is_static_in_each_turn(processes, tmp_path, gans):
    spec = job("gan", exchange={"static_graph": True})
    for stop in (7, None):
        processes(3).run(train_in_process, spec, tmp_path, stop)
    assert difference(gans[3], tmp_path) < 1e-12


COMPILES = pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles with g++")


@COMPILES
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # of the compiler's own
@pytest.mark.parametrize("factory", ["distillation", "gan"])
def test_each_model_is_compiled(processes, tmp_path, factory):
    args = {"task_args": {"penalty": False}} if factory == "gan" else {}
    processes(1).run(train_in_process, job(factory, **args), tmp_path / "eager")
    for count in (1, 2):
        spec = job(factory, model={"compile": True}, **args)
        processes(count).run(train_in_process, spec, tmp_path / str(count))
        assert difference(tmp_path / "eager", tmp_path / str(count)) < 1e-12
        last = read_metrics(tmp_path / str(count) / "job/metrics.jsonl")[-1]
        assert last["train/compiled_graphs"] >= 2


PARTS = "model.compile: the task's step does not call the model, but parts of it"


@COMPILES
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize(
    ("factory", "said"),
    [
        pytest.param(
            "gan",
            r"optimizers\.critic: model\.compile: torch cannot .* double backward",
            marks=pytest.mark.slow,
        ),
        ("by_parts", PARTS),
        ("by_parts to the bit", PARTS),
    ],
)
def test_what_cannot_be_compiled_is_one_sentence(tmp_path, factory, said):
    factory, to_the_bit, _ = factory.partition(" to the bit")
    spec = job(factory, model={"compile": True}, **({"exactness": "bitwise"} if to_the_bit else {}))
    if factory == "by_parts":
        spec |= TASKS["byol"][0]
    with pytest.raises(SpecError, match=said):
        train_in_process(alone(), spec, tmp_path)


def test_micro_batches_are_found_for_the_turn_that_takes_the_most():
    """A row takes 8 MB in the critic's turn, and next to nothing in the generator's."""
    spec = job("wide_critic", batch={"global_batch": 200, "micro_batch": "auto"})
    spec |= {"optimizers": several_models.GAN}
    with Processes(1) as fresh:  # memory that other tests have freed would fit more
        [rows] = fresh.run(rows_that_fit, spec, [700])
    assert 4 <= rows <= 60


def test_each_turn_is_clipped_by_itself(processes, tmp_path):
    wanted = several_models.gan_by_hand(STEPS, max_norm=0.5)
    processes(3).run(train_in_process, job("gan", max_grad_norm=0.5), tmp_path)
    found = weights(tmp_path)
    assert max((found[name] - wanted[name]).abs().max() for name in wanted) < 1e-12


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_turn_is_skipped_by_itself(processes, tmp_path, precision):
    sections = {"faults": {"on_non_finite": "skip"}, "model": {"precision": precision}}
    spec = job(
        "spoilt_gan",
        optimizers=several_models.GAN,
        test={},
        checkpoint={"every_steps": 1, "keep": 20},
        **sections,
    )
    processes(3).run(train_in_process, spec, tmp_path)
    before, after = weights(tmp_path, 4), weights(tmp_path, 5)
    for name in (name for name in before if name.endswith("weight")):
        assert before[name].equal(after[name]) == name.startswith("generator"), name
    last = rows_of(tmp_path)[-1]
    assert last["train/skipped_steps"] == 1
    assert not weights(tmp_path, 9)["generator.0.weight"].equal(
        weights(tmp_path, 10)["generator.0.weight"]
    )


def test_each_optimizer_has_its_groups_and_its_schedule(processes, tmp_path):
    plateau = {"name": "plateau", "measure": "test/distance", "mode": "min", "patience": 1}
    groups = [{"match": "critic.0.*", "unfreeze_at_step": 4}, {"match": "*", "lr": 0.02}]
    optimizers = {
        "generator": {
            "optimizer": {"name": "muon", "lr": 0.01, "companion": {"name": "adamw", "lr": 0.001}},
            "schedule": plateau,
        },
        "critic": {"every": 2, "optimizer": {"name": "adamw", "lr": 0.01, "groups": groups}},
    }
    spec = job("gan", optimizers=optimizers)
    for place, stops in (("whole", [None]), ("stopped", [7, None])):
        for stop in stops:
            processes(2).run(train_in_process, spec, tmp_path / place, stop)
    assert difference(tmp_path / "whole", tmp_path / "stopped") == 0
    assert rows_of(tmp_path / "whole") == rows_of(tmp_path / "stopped")
    assert {f"train/lr/{name}/{n}" for name in optimizers for n in (0, 1)} <= rows_of(
        tmp_path / "whole"
    )[-1].keys()


def test_the_plan_says_who_trains_what(tmp_path):
    spec = tmp_path / "job.yaml"
    spec.write_text(json.dumps(job("distillation")))
    told = plan_of(spec, runs=tmp_path)
    assert re.search(r"student +sgd +12, every step +student\.\*", told)
    assert re.search(r"- +6 +\d+ +frozen +taken_by=no optimizer +teacher\.0\.weight", told)


# ---- mistakes


def test_a_run_keeps_the_order_of_its_optimizers(tmp_path):
    train_in_process(alone(), job("gan"), tmp_path, 2)
    swapped = dict(reversed(several_models.GAN.items()))
    with pytest.raises(SpecError, match="optimizers: critic, generator -> generator, critic"):
        train_in_process(alone(), job("gan", optimizers=swapped), tmp_path)


def test_what_follows_an_update_is_the_same_on_every_process(processes, tmp_path):
    spec = job("changed_by", **TASKS["byol"][0], task_args={"what": "process"})
    with pytest.raises(ProcessesFailed, match=r"it leaves target\.0\.weight different"):
        processes(2).run(train_in_process, spec, tmp_path)


SGD = {"optimizer": {"name": "sgd", "lr": 0.1}}


@pytest.mark.parametrize(
    ("factory", "sections", "said"),
    [
        ("by_loss", {"optimizers": {"all": SGD}}, "a task with one loss cannot train with"),
        ("two_by_loss", {}, r"returned several models \(critic, generator\)"),
        ("named", {"task_args": {"name": "a.b"}}, "but is 'a.b'"),
        ("named", {"task_args": {"name": "keys"}}, "invalid name of a model"),
        ("same_name", {}, "'a' is used in the turns of several optimizers"),
        ("gan", {"optimizers": {"kritic": SGD}}, r"'kritic\.\*' matches no trainable parameter"),
        (
            "gan",
            {"optimizers": {"critic": SGD, "all": {"match": ["*.0.*"], **SGD}}},
            r"optimizers\.all\.match: '\*\.0\.\*' matches critic\.0\.weight, which critic trains",
        ),
        (
            "gan",
            {"optimizers": {"some": {"match": ["critic.0.*"], **SGD}}},
            r"critic\.2\.weight, critic\.2\.bias are trained by none, while some trains others",
        ),
        (
            "gan",
            {"optimizers": {"critic": {"optimizer": {"name": "lbfgs", "lr": 0.1}}}},
            r"optimizers\.critic: optimizer\.name: lbfgs evaluates a step several times",
        ),
        (
            "changed_by",
            {**TASKS["byol"][0], "task_args": {"what": "log"}},
            "'seen' cannot be logged",
        ),
    ],
)
def test_a_mistake_in_a_job_is_one_sentence(tmp_path, factory, sections, said):
    optimizers = {} if factory == "changed_by" else {"optimizers": several_models.GAN}
    with pytest.raises(SpecError, match=said):
        train_in_process(alone(), job(factory, **(optimizers | sections)), tmp_path)


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({}, "2:1: must have optimizer or optimizers, but has both; remove one"),
        (
            {"optimizers": {}, "optimizer": None},
            "must have optimizer or optimizers, but has neither",
        ),
        (
            {"optimizer": None, "schedule": {"name": "linear"}},
            "each of them has its own schedule",
        ),
        ({"optimizers": {"a-b": SGD}}, "optimizers: a name must be letters, digits and _"),
        (
            {"optimizers": {"a": {"every": 2, **SGD}}},
            "optimizers: one of them must step in every step",
        ),
        ({"optimizers": {"a": {"evry": 2, **SGD}}}, "optimizers.a.evry: unknown key; did you mean"),
        (
            {"optimizers": {"a": {"optimizer": {"name": "adam", "lr": 0.1, "beta": 1}}}},
            "optimizers.a.optimizer.beta: unknown key; did you mean 'betas'",
        ),
    ],
)
def test_a_mistake_in_a_spec_is_one_sentence(tmp_path, sections, said):
    values = {"name": "a", "task": "a:b", "batch": {"global_batch": 4}, "length": {"steps": 2}}
    values |= {"optimizers": {"a": SGD}, **SGD} | sections
    (tmp_path / "a.yaml").write_text(
        "\n" + json.dumps({k: v for k, v in values.items() if v is not None})
    )
    if "neither" in said:
        (tmp_path / "a.yaml").write_text("\n" + json.dumps(values))
    with pytest.raises(SpecError, match=re.escape(said)):
        load_spec(tmp_path / "a.yaml")


def test_a_resolved_spec_reads_back_equal(tmp_path):
    (tmp_path / "a.yaml").write_text(json.dumps(job("gan")))
    spec = load_spec(tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_text(dump_spec(spec))
    assert load_spec(tmp_path / "b.yaml") == spec
    assert list(spec.optimizers) == ["critic", "generator"]
