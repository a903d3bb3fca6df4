"""A spec read from a file: every mistake told at its place, written back equal, compared."""

from __future__ import annotations

import inspect
import json
import math
import pickle
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launch.rank.job import Job
from service.basics.errors import SpecError
from service.in_place import _loaded
from service.plan.changing import CANNOT_CHANGE_THE_RESULT, changes
from service.spec import files
from service.spec.files import (
    dump_spec,
    load_spec,
    spec_schema,
)
from service.spec.models import Spec
from service.spec.optimizer import CustomOptimizerSpec
from service.spec.optimizer_options import OPTIMIZERS

GOOD = """\
name: digits
task: recipes.digits:task
batch: {global_batch: 128}
length: {epochs: 20}
optimizer: {name: sgd, lr: 0.1}
"""


@pytest.fixture(autouse=True)
def _in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def good(*overrides: str) -> Spec:
    Path("good.yaml").write_text(GOOD)
    return load_spec("good.yaml", overrides=overrides)


def faults_with(line: str, *overrides: str) -> str:
    """What is said of the good spec with `line` in place of the one of its key, or below it."""
    lines = GOOD.splitlines()
    keys = [each.split(":")[0] for each in lines]
    key = line.split(":")[0]
    at = keys.index(key) if key in keys else len(lines)
    lines[at : at + 1] = [line] if line else []
    Path("bad.yaml").write_text("\n".join(lines))
    with pytest.raises(SpecError, match=r".") as caught:
        load_spec("bad.yaml", overrides=overrides)
    return str(caught.value)


# The line as written, and all that is said of it.
MISTAKES = [
    # keys
    ("epoch: 3",
     "bad.yaml:6:1: epoch: unknown key; known: batch, checkpoint, early_stopping, exactness, "
     "exchange, extends, faults, init, kubernetes, length, loader, max_grad_norm, max_grad_value, "
     "model, name, optimizer, optimizers, schedule, seed, slurm, task, task_args, test, tracking"),
    ("optimiser: {}", "bad.yaml:6:1: optimiser: unknown key; did you mean 'optimizer'?"),
    ("batch: {global_batch: 1, micro: 1}",
     "bad.yaml:3:26: batch.micro: unknown key; did you mean 'micro_batch'?"),
    ("batch: {micro_batch: 1}",
     "bad.yaml:3:1: batch.global_batch: missing; add global_batch: 128"),
    ("checkpoint: {best: {measure: test/loss}}",
     "bad.yaml:6:14: checkpoint.best.mode: missing; add mode: max or min"),
    # types
    ("name: 2024", "bad.yaml:1:7: name: must be text, but is 2024; put it in quotes"),
    ("seed: 1.5", "bad.yaml:6:7: seed: must be a whole number, but is 1.5"),
    ("seed: true", "bad.yaml:6:7: seed: must be a whole number, but is true"),
    ("max_grad_norm: 1_0", "bad.yaml:6:16: max_grad_norm: must be a number, but is '1_0'"),
    ("model: {compile: yes}", "bad.yaml:6:18: model.compile: must be true or false, but is 'yes'"),
    ("batch: 128", "bad.yaml:3:8: batch: must be a mapping of keys to values, but is 128"),
    ("test:",
     "bad.yaml:6:6: test: must be a mapping of keys to values, but is null; "
     "leave the key out for its default"),
    ("task_args: [1]",
     "bad.yaml:6:12: task_args: must be a mapping of keys to values, but is a list"),
    ("tracking: {wandb: {project: a, tags: a}}",
     "bad.yaml:6:38: tracking.wandb.tags: must be a list, but is 'a'"),
    # ranges
    ("seed: -1", "bad.yaml:6:7: seed: must be at least 0, but is -1"),
    ("seed: 0x8000000000000000",
     "bad.yaml:6:7: seed: must be less than 9223372036854775808, but is 9223372036854775808"),
    ("length: {epochs: 0}", "bad.yaml:4:18: length.epochs: must be more than 0, but is 0"),
    ("model: {moving_average: 1}",
     "bad.yaml:6:25: model.moving_average: must be less than 1, but is 1"),
    ("schedule: {name: cosine, final: 2}",
     "bad.yaml:6:33: schedule.final: must be at most 1, but is 2"),
    ("optimizer: {name: sgd, lr: .inf}",
     "bad.yaml:5:28: optimizer.lr: must be a finite number, but is .inf"),
    (f"name: {'x' * 64}",
     f"bad.yaml:1:7: name: must be at most 63 characters, but is '{'x' * 55}...'"),
    # words
    ("name: my run",
     "bad.yaml:1:7: name: must be letters and digits, and after the first one . _ - too, "
     "but is 'my run'"),
    ("task: digits",
     "bad.yaml:2:7: task: must be package.module:name or ./file.py:name, but is 'digits'"),
    ("task: ./my-task:run",
     "bad.yaml:2:7: task: must be package.module:name or ./file.py:name, but is './my-task:run'"),
    ("model: {precision: bf61}",
     "bad.yaml:6:20: model.precision: must be 'fp32', 'tf32', 'bf16' or 'fp16', but is 'bf61'; "
     "did you mean 'bf16'?"),
    ("model: {batchnorm: 3}",
     "bad.yaml:6:20: model.batchnorm: must be 'micro', 'sync' or 'local', but is 3"),
    ("checkpoint: {best: {measure: accuracy, mode: max}}",
     "bad.yaml:6:30: checkpoint.best.measure: must be a measure of the test loop, such as "
     "test/accuracy, but is 'accuracy'"),
    # on a cluster
    ("kubernetes: {nodes: 2}",
     "bad.yaml:6:1: kubernetes.image: missing; add "
     "image: registry.example.com/team/evenstep:0.1.0"),
    ("kubernetes: {image: a, memory: 16GB}",
     "bad.yaml:6:32: kubernetes.memory: must be a Kubernetes quantity, such as 500m, 4 or 16Gi, "
     "but is '16GB'"),
    ("kubernetes: {image: a, memory: 2Gi}",
     "bad.yaml:6:13: kubernetes: memory must be more than shared_memory (2Gi), which it "
     "includes, but is 2Gi"),
    ("kubernetes: {image: a, mounts: [{path: /data, claim: c, secret: s}]}",
     "bad.yaml:6:33: kubernetes.mounts.0: must have one of claim, secret and config_map, "
     "but has claim and secret"),
    # a choice of types
    ("batch: {global_batch: x}",
     "bad.yaml:3:23: batch.global_batch: must be a whole number or 'all', but is 'x'"),
    ("batch: {global_batch: 0}",
     "bad.yaml:3:23: batch.global_batch: must be at least 1 or 'all', but is 0"),
    # a choice of sections
    ("optimizer: {name: sgd, learning_rate: 0.1, lr: 1}",
     "bad.yaml:5:24: optimizer.learning_rate: unknown key; did you mean 'lr'?"),
    ("optimizer: {name: adam}", "bad.yaml:5:1: optimizer.lr: missing; add lr: 0.1"),
    ("optimizer: {lr: 0.1}", "bad.yaml:5:1: optimizer.name: missing; add name: sgd"),
    ("optimizer: {name: 3, lr: 0.1}", "bad.yaml:5:19: optimizer.name: must be text, but is 3"),
    ("optimizer: sgd",
     "bad.yaml:5:12: optimizer: must be a mapping of keys to values, but is 'sgd'; "
     "write {name: sgd}"),
    ("optimizer: {name: Adamm, lr: 0.1}",
     "bad.yaml:5:19: optimizer.name: must be an optimizer of torch.optim or package.module:Class, "
     "but is 'Adamm'; did you mean 'adam'?"),
    ("optimizer: {name: 'timm.optim:', lr: 0.1}",
     "bad.yaml:5:19: optimizer.name: must be package.module:Class or "
     "./file.py:Class, but is 'timm.optim:'"),
    ("schedule: {name: cosine, cosine: 1}",
     "bad.yaml:6:26: schedule.cosine: unknown key; known: final, name, warmup_epochs, "
     "warmup_fraction, warmup_steps"),
    ("optimizer: {name: adam, lr: 1, betas: [0.9]}",
     "bad.yaml:5:39: optimizer.betas: must have 2 values, but has 1"),
    ("optimizer: {name: adam, lr: 1, betas: [0.9, 0.9, 0.9]}",
     "bad.yaml:5:39: optimizer.betas: must have 2 values, but has 3"),
    ("optimizer: {name: adam, lr: 1, betas: [0.9, a]}",
     "bad.yaml:5:45: optimizer.betas.1: must be a number, but is 'a'"),
    ("optimizer: {name: adam, lr: 1, betas: 0.9}",
     "bad.yaml:5:39: optimizer.betas: must be a list, but is 0.9"),
    ("optimizer: {name: sgd, lr: 1, no_decay: [norms]}",
     "bad.yaml:5:42: optimizer.no_decay.0: must be 'norm' or 'bias', but is 'norms'; "
     "did you mean 'norm'?"),
    ("optimizer: {name: sgd, lr: 1, groups: [{lr: 1}, {match: a, momentun: 0}]}",
     "bad.yaml:5:40: optimizer.groups.0.match: missing; add match: base.*\n"
     "bad.yaml:5:60: optimizer.groups.1.momentun: unknown key; did you mean 'momentum'?"),
    ("schedule: {name: cosin}",
     "bad.yaml:6:18: schedule.name: must be 'constant', 'linear', 'cosine', 'cosine_restarts', "
     "'polynomial', 'exponential', 'step', 'multi_step', 'one_cycle', 'inverse_sqrt', "
     "'warmup_stable_decay', 'plateau' or package.module:Class, but is 'cosin'; "
     "did you mean 'cosine'?"),
    ("schedule: {name: step, gamma: 0.5}",
     "bad.yaml:6:11: schedule: must have every_steps, every_epochs or every_fraction, "
     "but has none"),
    ("schedule: {name: 'torch.optim:', T_max: 3}",
     "bad.yaml:6:18: schedule.name: must be package.module:Class or "
     "./file.py:Class, but is 'torch.optim:'"),
    ("optimizer: {name: muon, lr: 1, companion: {name: adamm, lr: 1}}",
     "bad.yaml:5:50: optimizer.companion.name: must be an optimizer of torch.optim or "
     "package.module:Class, but is 'adamm'; did you mean 'adam'?"),
    ("optimizer: {name: Muon, lr: 1, companion: {name: AdamW, lrr: 1}}",
     "bad.yaml:5:32: optimizer.companion.lr: missing; add lr: 0.1\n"
     "bad.yaml:5:57: optimizer.companion.lrr: unknown key; did you mean 'lr'?"),
    ("early_stopping: {measure: test/loss, mode: min}",
     "bad.yaml:6:1: early_stopping.patience: missing; add patience: 5"),
    ("schedule: {warmup: 3}",
     "bad.yaml:6:12: schedule.warmup: unknown key; did you mean 'warmup_steps'?"),
    # keys that do not go together
    ("length: {}", "bad.yaml:4:9: length: must have epochs or steps, but has neither"),
    ("length: {epochs: 1, steps: 1}",
     "bad.yaml:4:9: length: must have epochs or steps, but has both; clear one, such as by "
     "length.epochs="),
    ("batch: {global_batch: 8, micro_batch: 16}",
     "bad.yaml:3:8: batch: micro_batch must be at most global_batch (8), but is 16"),
    ("schedule: {name: linear, warmup_steps: 1, warmup_fraction: 0.1}",
     "bad.yaml:6:11: schedule: must have one warmup, but has warmup_steps and warmup_fraction"),
    ("test: {every_steps: 1, every_epochs: 1}",
     "bad.yaml:6:7: test: must have every_steps or every_epochs, but has both"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "told"), MISTAKES, ids=[line for line, _ in MISTAKES])
def test_a_mistake_is_reported_with_its_place_and_what_to_do(line: str, told: str) -> None:
    assert faults_with(line) == told


def test_all_mistakes_are_reported_together_in_file_order() -> None:
    Path("bad.yaml").write_text(
        "batch:\n  global_batch: none\n"
        "optimizer:\n  name: sgd\n  learning_rate: 0.1\n"
        "length: {epoch: 3}\n"
        "task: x\n"
    )
    with pytest.raises(SpecError, match=r".") as caught:
        load_spec("bad.yaml", overrides=["optimizer.lrr=3", "seed", "test.every_epochs=-1"])
    assert str(caught.value).splitlines() == [
        "bad.yaml:1:1: name: missing; add name: digits",
        "bad.yaml:2:17: batch.global_batch: must be a whole number or 'all', but is 'none'",
        "bad.yaml:3:1: optimizer.lr: missing; add lr: 0.1",
        "bad.yaml:5:3: optimizer.learning_rate: unknown key; did you mean 'lr'?",
        "bad.yaml:6:10: length.epoch: unknown key; did you mean 'epochs'?",
        "bad.yaml:7:7: task: must be package.module:name or ./file.py:name, but is 'x'",
        "optimizer.lrr=3: optimizer.lrr: unknown key; did you mean 'lr'?",
        "test.every_epochs=-1: test.every_epochs: must be more than 0, but is -1",
        "seed: must be key=value, such as optimizer.lr=0.1",
    ]


def test_a_mapping_is_reported_without_a_place() -> None:
    with pytest.raises(SpecError, match=r".") as caught:
        load_spec({"name": "a", "task": "b:c", "length": {"steps": 1}, "optimizer": {"lr": 1}})
    assert str(caught.value).splitlines() == [
        "batch: missing; add batch: {global_batch: 128}",
        "optimizer.name: missing; add name: sgd",
    ]


def test_an_optimizer_is_known_in_any_case() -> None:
    for name in ("SGD", "sgd", "Sgd"):
        assert good(f"optimizer.name={name}") == good()
    assert good("optimizer={name: AdamW, lr: 1}").optimizer.name == "adamw"


def test_every_optimizer_of_torch_can_be_named() -> None:
    for name, known in OPTIMIZERS.items():
        spec = good(f"optimizer={{name: {known.torch_name}, lr: 1e-3}}")
        assert spec.optimizer.name == name
        assert spec.optimizer.options() == {"lr": 0.001}


def test_an_optimizer_of_ones_own_takes_any_option() -> None:
    groups = "[{match: a, trust: null}]"
    spec = good(f"optimizer={{name: 'timm.optim:Lamb', lr: 1, trust: [1, 2], groups: {groups}}}")
    assert isinstance(spec.optimizer, CustomOptimizerSpec)
    assert spec.optimizer.options() == {"lr": 1.0, "trust": [1, 2]}
    assert spec.optimizer.groups[0].options() == {"trust": None}


def test_null_is_the_default_of_an_option() -> None:
    assert good("optimizer.momentum=").optimizer.options() == {"lr": 0.1}


def test_overrides_reach_into_sections_that_are_not_there() -> None:
    spec = good(
        "schedule.warmup_steps=3", "tracking.wandb.project=p", "optimizer.groups.0.match=*.b"
    )
    assert spec.schedule.name == "constant"
    assert spec.schedule.warmup_steps == 3
    assert spec.tracking.wandb is not None
    assert spec.optimizer.groups[0].match == "*.b"


def test_a_task_in_a_file_is_found_from_where_it_was_written(tmp_path: Path) -> None:
    Path("jobs").mkdir()
    Path("jobs/a.yaml").write_text(GOOD.replace("recipes.digits", "../tasks/my.py"))
    assert load_spec("jobs/a.yaml").task == f"{tmp_path}/tasks/my.py:task"
    assert load_spec("jobs/a.yaml", overrides=["task=my.py:t"]).task == f"{tmp_path}/my.py:t"
    assert load_spec({**good().model_dump(), "task": "./my.py:t"}).task == f"{tmp_path}/my.py:t"
    assert good().task == "recipes.digits:task"


def test_json_and_toml_say_the_same_as_yaml() -> None:
    values = {
        "name": "digits",
        "task": "recipes.digits:task",
        "batch": {"global_batch": 128},
        "length": {"epochs": 20},
        "optimizer": {"name": "sgd", "lr": 0.1},
    }
    Path("a.json").write_text(json.dumps(values))
    Path("a.toml").write_text(
        'name = "digits"\ntask = "recipes.digits:task"\nlength = {epochs = 20}\n'
        '[batch]\nglobal_batch = 128\n[optimizer]\nname = "sgd"\nlr = 0.1\n'
    )
    assert load_spec(values) == load_spec("a.json") == load_spec("a.toml") == good()


def test_a_spec_is_written_as_a_person_would() -> None:
    spec = good("optimizer.groups=[{match: 'base.*', lr: 1e-5}]", "task_args.text='1e3'")
    assert dump_spec(spec).splitlines()[:14] == [
        "name: digits",
        "task: recipes.digits:task",
        "task_args:",
        '  text: "1e3"',
        "seed: 0",
        "exactness: rounding",
        "batch: {global_batch: 128}",
        "length: {epochs: 20.0}",
        "model: {batchnorm: micro, buffers: mean, precision: fp32, compile: false, "
        "cudnn_benchmark: false, channels_last: false}",
        "optimizer:",
        "  name: sgd",
        "  lr: 0.1",
        "  no_decay: []",
        "  groups:",
    ]


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20) | st.sampled_from(
    [
        *["1e3", "012", "0o7", "no", "~", "", "null", "1_0", "12:30", "=", "<<", ".nan", "a: b"],
        *["- a", " a ", "# a", "\ufeff", "\x85", "a\nb\n", "None", "!a", "&a", "*a", "\t", "'"],
        *['"', "\\"],
    ]
)
plain_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
rates = st.floats(0, 1e9)


def _of_kind(kind: Any) -> st.SearchStrategy[Any]:
    if get_origin(kind) is tuple:
        return st.tuples(*map(_of_kind, get_args(kind)))
    if get_args(kind):
        return st.none() | rates
    return {float: rates, bool: st.booleans(), int: st.integers(1, 9), str: texts}[kind]


@st.composite
def optimizers(draw: st.DrawFn) -> dict[str, Any]:
    if draw(st.integers(0, 4)) == 0:
        extra = draw(st.dictionaries(st.sampled_from(["trust", "eps"]), plain_values))
        return {"name": "my.optim:Lion", "lr": draw(rates), **extra}
    name = draw(st.sampled_from(sorted(OPTIMIZERS)))
    kinds = {key: _of_kind(kind) for key, kind in OPTIMIZERS[name].options.items()}
    options = st.fixed_dictionaries({}, optional={k: st.none() | v for k, v in kinds.items()})
    groups = st.lists(st.tuples(texts, options).map(lambda g: {"match": g[0], **g[1]}), max_size=2)
    return {"name": name, "lr": draw(rates), "groups": draw(groups), **draw(options)}


@st.composite
def specs(draw: st.DrawFn) -> Spec:
    micro = draw(st.none() | st.integers(1, 9))
    return load_spec(
        {
            "name": draw(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True)),
            "task": "recipes.digits:task",
            "task_args": draw(st.dictionaries(texts, plain_values, max_size=3)),
            "seed": draw(st.integers(0, 2**63 - 1)),
            "batch": {
                "global_batch": draw(st.just("all") | st.integers(9, 10**15)),
                "micro_batch": micro,
            },
            "length": draw(st.sampled_from([{"steps": 7}, {"epochs": 0.3}])),
            "optimizer": draw(optimizers()),
            "schedule": draw(st.sampled_from([{}, {"name": "cosine", "final": 1e-7}])),
            "tracking": draw(st.sampled_from([{}, {"wandb": {"project": "no", "tags": ["1"]}}])),
        }
    )


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(spec=specs())
def test_what_is_written_reads_back_equal(spec: Spec) -> None:
    Path("written.yaml").write_text(dump_spec(spec), encoding="utf-8")
    again = load_spec("written.yaml")
    assert again == spec
    assert again.optimizer.options() == spec.optimizer.options()
    assert dump_spec(again) == dump_spec(spec)
    assert told(spec, again) == []


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(spec=specs())
def test_every_process_and_machine_gets_the_values_of_the_spec(spec: Spec) -> None:
    received = pickle.loads(pickle.dumps(Job(spec, Path("runs")))).spec  # a rank
    submitted = load_spec(files.plain_values(spec, defaults=False))  # a job of a cluster
    given_in_python = _loaded(spec, {})
    for other in (received, submitted, given_in_python):
        assert dump_spec(other) == dump_spec(spec)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(values=st.dictionaries(texts.filter(lambda key: "." not in key), plain_values, min_size=1))
def test_a_value_from_python_is_in_the_spec_as_it_was_given(values: dict[str, Any]) -> None:
    Path("good.yaml").write_text(GOOD)
    assert _loaded("good.yaml", {"task_args": values}).task_args == values


def test_numbers_of_python_begin_a_list_where_they_are_written_with_dots_only() -> None:
    Path("good.yaml").write_text(f"{GOOD}task_args: {{held: [1, {{x: 2}}], kept: 3}}\n")
    given: dict[str, Any] = {
        "task_args": {"classes": {"0": "cat"}, "held": {"1": {"y": math.inf}}},
        "optimizer.groups.0.match": "*.bias",
        "optimizer.groups.0.lr": 0.5,
    }
    spec = _loaded("good.yaml", given)
    assert spec.task_args == {
        "classes": {"0": "cat"},
        "held": [1, {"x": 2, "y": math.inf}],
        "kept": 3,
    }
    assert spec.optimizer is not None
    assert [(group.match, group.lr) for group in spec.optimizer.groups] == [("*.bias", 0.5)]


def test_a_duration_replaces_that_of_the_file_also_where_the_override_has_dashes() -> None:
    spec = good("--length.steps=5")  # as the agents of W&B write it
    assert (spec.length.steps, spec.length.epochs) == (5, None)


LINES = [*GOOD.splitlines(), "schedule: {name: cosine}", "test: {every_steps: 3}", "model:"]
junk = st.sampled_from(
    ["[", "}", ": ", "\n  ", "- ", "1e999", "null", "'", "{a: ", "name", ".", "0"]
)


@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    lines=st.lists(st.sampled_from(LINES), unique=True),
    cuts=st.lists(st.tuples(st.integers(0, 200), st.integers(0, 6), junk), max_size=4),
    changed=st.lists(
        st.tuples(
            st.sampled_from(
                ["optimizer", "schedule.name", "batch.global_batch", "length", "test.x"]
            ),
            st.sampled_from([".0", ".name", ".lr", ""]),
            st.sampled_from(["{}", "[]", "3", "", "sgd", "[1", "9e999", "a:b", "{name: adam}"]),
        ).map(lambda words: f"{words[0]}{words[1]}={words[2]}"),
        max_size=2,
    ),
)
def test_junk_is_a_spec_or_a_spec_error(
    lines: list[str], cuts: list[tuple[int, int, str]], changed: list[str]
) -> None:
    text = "\n".join(lines)
    for at, removed, instead in cuts:
        text = text[:at] + instead + text[at + removed :]
    Path("junk.yaml").write_text(text)
    with suppress(SpecError):
        assert isinstance(load_spec("junk.yaml", overrides=changed), Spec)


def told(old: Spec, new: Spec) -> list[str]:
    return list(map(str, changes(old, new)))


def test_changes_name_the_keys_that_differ_with_both_values() -> None:
    old = good("optimizer.groups=[{match: a}]", "task_args={x: 1}")
    new = good(
        "optimizer.lr=0.2",
        "optimizer.groups=[{match: 'b.*'}]",
        "task_args={x: true}",
        "schedule={name: cosine, warmup_steps: 5}",
        "checkpoint.best={measure: test/loss, mode: min}",
    )
    assert told(old, new) == [
        "task_args.x: 1 -> true",
        "optimizer.lr: 0.1 -> 0.2",
        "optimizer.groups.0.match: a -> b.*",
        "schedule.name: constant -> cosine",
        "schedule.warmup_steps: not set -> 5",
        "schedule.final: not set -> 0.0",
        "checkpoint.best: not set -> {measure: test/loss, mode: min}",
    ]
    assert told(new, new) == []


def test_not_a_number_is_no_change() -> None:
    assert told(good("task_args.x=.nan"), good("task_args.x=.nan")) == []


def test_a_key_that_cannot_change_the_result_is_no_change() -> None:
    values = {
        "name": "other",
        "test": "{every_epochs: 2, micro_batch: 3}",
        "checkpoint.every_steps": "7",
        "checkpoint.every_epochs": "7",
        "checkpoint.keep": "9",
        "checkpoint.keep_best": "9",
        "checkpoint.rename": "{a: b}",
        "checkpoint.keep_every_steps": "9",
        "checkpoint.asynchronous": "false",
        "checkpoint.on_failure": "go_on",
        "model.activation_checkpointing": "{match: 'blocks.*'}",
        "exchange.mode": "sharded",
        "exchange.reshard_after_forward": "false",
        "exchange.offload": "true",
        "exchange.return_memory": "false",
        "exchange.sync_each_micro_batch": "true",
        "exchange.units": "['blocks.*']",
        "loader.workers": "4",
        "loader.prefetch": "4",
        "tracking": "{log_every_steps: 1, wandb: {project: p}}",
        "faults.hang_timeout_seconds": "1",
        "faults.startup_timeout_seconds": "1",
        "faults.hook_timeout_seconds": "9.0",
        "faults.on_hook_failure": "stop",
        "faults.stop_poll_steps": "1",
        "faults.stop_budget_seconds": "1",
        "faults.attempts_without_progress": "1",
        "kubernetes": "{image: 'a:1', nodes: 4}",
        "slurm": "{nodes: 4}",
    }
    assert values.keys() == CANNOT_CHANGE_THE_RESULT.keys()
    for key, value in values.items():
        sharded, best = "exchange.mode=sharded", "checkpoint.best={measure: test/a, mode: max}"
        of_sharded = key.startswith("exchange.") and key != "exchange.mode"
        needs = (sharded,) if of_sharded else (best,) if key == "checkpoint.keep_best" else ()
        other = good(f"{key}={value}", *needs)
        assert other != good(*needs)
        assert told(good(*needs), other) == []


def test_groups_in_another_order_are_no_change() -> None:
    a, b = "{match: 'a.*', lr: 0.5}", "{match: 'b.*', weight_decay: 0.1}"
    old, new = good(f"optimizer.groups=[{a}, {b}]"), good(f"optimizer.groups=[{b}, {a}]")
    assert old != new
    assert told(old, new) == []
    other = good(f"optimizer.groups=[{b}, {a}, {a}]")
    assert told(old, other) != []


def test_when_it_is_tested_is_a_change_where_the_run_waits_for_tests() -> None:
    for waiting in (
        "early_stopping={measure: test/loss, mode: min, patience: 3}",
        "schedule={name: plateau, measure: test/loss, mode: min}",
    ):
        old, new = good(waiting, "test.every_epochs=1"), good(waiting, "test.every_epochs=2")
        assert told(old, new) == ["test.every_epochs: 1.0 -> 2.0"]
        with pytest.raises(SpecError, match=r"needs tests: add test.every_epochs or test"):
            good(waiting)


def test_a_task_may_move_to_another_directory_but_not_become_another_one() -> None:
    here, there = good("task=a/my.py:t"), good("task=b/my.py:t")
    assert here != there
    assert told(here, there) == []
    assert told(here, good("task=a/my.py:u")) == ["task: my.py:t -> my.py:u"]


def test_the_schema_lets_an_editor_choose_one_section_by_its_name() -> None:
    schema = spec_schema()
    assert schema["description"] == "A training job."
    parts = schema["$defs"]
    for section in ("optimizer", "schedule"):
        members = [
            parts[each["$ref"].split("/")[-1]] for each in schema["properties"][section]["oneOf"]
        ]
        names = [part["properties"]["name"] for part in members]
        assert all("name" in part["required"] for part in members)
        own = [name["const"] for name in names if "const" in name]
        assert len(set(own)) == len(own) >= len(members) - 1
        patterns = [name["pattern"] for name in names if "const" not in name]
        assert all(":" in pattern for pattern in patterns)
        assert not any(":" in name for name in own)


def test_the_schema_describes_every_key_and_allows_no_other() -> None:
    schema = spec_schema()
    options = {option for known in OPTIMIZERS.values() for option in known.options}
    for title, part in {**schema["$defs"], "Spec": schema}.items():
        assert part["additionalProperties"] is title.startswith("Custom"), title
        described = {"description", "$ref"}  # a reference alone is described where it leads
        bare = {key for key, value in part["properties"].items() if not described & value.keys()}
        assert bare <= options, title


def _loosely(kind: Any) -> Any:
    """A type as torch writes it or as we do, without None, Tensor and the length of a tuple."""
    text = str(kind)
    for word in ("tuple", "bool", "str", "float", "int"):
        if word in text:
            return word
    return text


def test_the_table_of_optimizers_is_torchs_own() -> None:
    torch = pytest.importorskip("torch")
    kinds = [kind for kind in vars(torch.optim).values() if inspect.isclass(kind)]
    own = [kind for kind in kinds if issubclass(kind, torch.optim.Optimizer)]
    classes = {kind.__name__: kind for kind in own if kind is not torch.optim.Optimizer}
    assert {known.torch_name for known in OPTIMIZERS.values()} == set(classes)
    for name, known in OPTIMIZERS.items():
        assert name == known.torch_name.lower()
        parameters = inspect.signature(classes[known.torch_name], eval_str=False).parameters
        options = {k: p.annotation for k, p in parameters.items() if k not in ("params", "lr")}
        assert {k: _loosely(v) for k, v in known.options.items()} == {
            k: _loosely(v) for k, v in options.items()
        }


def test_a_rate_is_never_infinite() -> None:
    assert math.isinf(float("1e999"))
    assert "must be a finite number" in faults_with("optimizer: {name: sgd, lr: 1e999}")


@pytest.mark.parametrize(
    ("in_file", "words", "then"),
    [
        ("length: {epochs: 3}", ["length.steps=7"], {"steps": 7, "epochs": None}),
        ("length: {epochs: 3}", ["length.steps=7", "length.epochs=2"], None),
        ("length: {epochs: 3}", ["length.steps="], {"steps": None, "epochs": 3}),
    ],
)
def test_an_override_replaces_a_duration_in_another_unit(tmp_path, in_file, words, then):
    file = tmp_path / "job.yaml"
    file.write_text(
        f"name: a\ntask: m:t\nbatch: {{global_batch: 8}}\n{in_file}\n"
        "optimizer: {name: sgd, lr: 1}\ncheckpoint: {every_epochs: 2}\n"
        "schedule: {name: linear, warmup_epochs: 1}\n"
    )
    if then is None:
        with pytest.raises(SpecError, match="must have epochs or steps, but has both"):
            load_spec(file, overrides=words)
        return
    spec = load_spec(
        file, overrides=[*words, "checkpoint.every_steps=5", "schedule.warmup_steps=4"]
    )
    assert spec.length.model_dump() == then
    assert (spec.checkpoint.every_steps, spec.checkpoint.every_epochs) == (5, None)
    assert spec.schedule.warmup_steps == 4
    assert spec.schedule.warmup_epochs is None
