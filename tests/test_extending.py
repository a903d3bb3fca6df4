"""Specs that share: `extends`, files of overrides, and values of the environment."""

import json
import re
import sys

import pytest
import yaml
from commands import evenstep
from jsonschema import Draft202012Validator
from test_mistakes import GOOD

from service.basics.errors import SpecError
from service.plan.changing import CANNOT_CHANGE_THE_RESULT
from service.spec.extending import FROM_ENVIRONMENT
from service.spec.files import load_spec, spec_schema

BASE = """\
name: base
task: ./my_task.py:task
task_args: {root: ./data, width: 3, layers: [1, 2], depth: 5}
batch: {global_batch: 128, micro_batch: 64}
length: {epochs: 3}
optimizer:
  name: sgd
  lr: 0.1
  momentum: 0.9
  groups: [{match: "*.bias", lr: 0.2}]
test: {every_epochs: 1}
checkpoint: {every_epochs: 1, keep: 2}
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A directory with a base, one further base in a directory below it, and a current directory
    elsewhere."""
    (tmp_path / "shared").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "shared/base.yaml").write_text(BASE)
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path


def loaded(place, text, overrides=(), name="child.yaml"):
    (place / name).write_text(text)
    return load_spec(place / name, overrides=overrides)


def faults(place, text, overrides=(), name="child.yaml"):
    with pytest.raises(SpecError) as caught:
        loaded(place, text, overrides, name)
    return str(caught.value).replace(f"{place}/", "").split("\n")


def test_sections_merge_lists_replace_and_null_removes(place):
    spec = loaded(
        place,
        "extends: shared/base.yaml\nname: child\n"
        "task_args: {width: 7, layers: [9], depth: null}\n"
        "optimizer: {lr: 0.3, momentum: null, groups: [{match: '*.weight'}]}\n",
    )
    assert (spec.name, spec.seed, spec.batch.global_batch) == ("child", 0, 128)
    assert spec.task_args == {
        "root": str(place / "shared/data"),
        "width": 7,
        "layers": [9],
        "depth": None,  # an argument of the task's own, and no key to remove
    }
    assert spec.task == f"{place}/shared/my_task.py:task"
    assert (spec.optimizer.lr, spec.optimizer.momentum) == (0.3, None)
    assert [group.match for group in spec.optimizer.groups] == ["*.weight"]


def test_a_duration_in_another_unit_replaces_that_of_the_base(place):
    spec = loaded(
        place,
        "extends: shared/base.yaml\nlength: {steps: 30}\ntest: {every_steps: 7}\n"
        "checkpoint: {every_steps: 9}\n",
    )
    assert (spec.length.steps, spec.length.epochs) == (30, None)
    assert (spec.test.every_steps, spec.test.every_epochs) == (7, None)
    assert (spec.checkpoint.every_steps, spec.checkpoint.keep) == (9, 2)
    spec = loaded(place, "extends: shared/base.yaml\n", ["length.steps=4"])
    assert (spec.length.steps, spec.length.epochs) == (4, None)


def test_a_chain_of_files_of_three_kinds(place):
    (place / "middle.toml").write_text(
        'extends = "shared/base.yaml"\ntask_args = {root = "./mine", more = "./x"}\n'
        "[optimizer]\nlr = 0.5\n"
    )
    (place / "deep").mkdir()
    given = {"extends": "../middle.toml", "task_args": {"last": "./y"}, "seed": 4}
    spec = loaded(place, json.dumps(given), name="deep/last.json")
    assert (spec.seed, spec.optimizer.lr, spec.optimizer.momentum) == (4, 0.5, 0.9)
    found = {key: spec.task_args[key] for key in ("root", "more", "last")}
    assert found == {
        "root": str(place / "mine"),
        "more": str(place / "x"),
        "last": str(place / "deep/y"),
    }


def test_a_fault_is_reported_where_it_stands(place):
    wrong = BASE.replace("keep: 2", "keep: none").replace("lr: 0.1", "lr: 0.1\n  mementum: 1")
    (place / "shared/base.yaml").write_text(wrong)
    told = faults(
        place,
        "extends: shared/base.yaml\nbatch: {global_batch: x}\nlength: {epochs: null}\nseed: -1\n",
        ["optimizer.lr=fast"],
    )
    assert [line.partition(" ")[0] for line in told] == [
        "shared/base.yaml:9:3:",
        "shared/base.yaml:13:37:",
        "child.yaml:2:23:",
        "child.yaml:3:9:",
        "child.yaml:4:7:",
        "optimizer.lr=fast:",
    ]
    assert "null for it in" in told[0]
    assert "has neither" in told[3]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "extends: shared/bose.yaml",
            "child.yaml:1:10: extends: there is no file shared/bose",
        ),
        ("extends: [a, b]", "child.yaml:1:10: extends: must be the path of one spec"),
        ("extends: child.yaml", "child.yaml:1:10: extends: a file cannot extend itself"),
        ("extends: round.yaml", "round.yaml:2:10: extends: a file cannot extend itself: "),
        ("extend: shared/base.yaml", "child.yaml:1:1: extend: unknown key; did you mean 'extends'"),
    ],
)
def test_what_cannot_be_extended(place, text, told):
    (place / "round.yaml").write_text("seed: 1\nextends: ./child.yaml\n")
    assert any(line.startswith(told) for line in faults(place, text + "\n"))


def test_extends_is_no_override(place):
    told = faults(place, "extends: shared/base.yaml\n", ["extends=other.yaml"])
    assert told == [
        "extends=other.yaml: extends belongs in the file; use --set-file to add another one"
    ]


def test_a_file_of_overrides_counts_between_the_spec_and_the_words(place):
    (place / "more.yaml").write_text(
        "length: {steps: 9}\noptimizer: {lr: 0.7, momentum: null}\ntask_args: {root: ./there}\n"
    )
    given = [place / "more.yaml", "optimizer.lr=0.8"]
    spec = loaded(place, BASE, given)
    assert (spec.length.steps, spec.length.epochs) == (9, None)
    assert (spec.optimizer.lr, spec.optimizer.momentum) == (0.8, None)
    assert spec.task_args["root"] == str(place / "there")
    # Where it gives a duration, that of the words in another unit replaces it; and what it clears
    # need not be there.
    (place / "more.yaml").write_text("test: {every_epochs: 2}\nslurm: null\n")
    spec = loaded(place, BASE, [place / "more.yaml", "test.every_steps=5"])
    assert (spec.test.every_steps, spec.test.every_epochs, spec.slurm) == (5, None, None)
    (place / "more.yaml").write_text("extends: shared/base.yaml\nseed: 1\n")
    assert faults(place, BASE, given)[0].startswith("more.yaml:1:1: extends: belongs in the spec")
    (place / "more.yaml").write_text("seed: one\nfoo: 1\n")
    told = faults(place, BASE, given)
    assert [line.partition(": ")[0] for line in told] == ["more.yaml:1:7", "more.yaml:2:1"]


def test_an_editor_asks_only_a_spec_of_its_own_for_an_optimizer():
    schema = Draft202012Validator(spec_schema())
    whole = yaml.safe_load(BASE)
    assert schema.is_valid({"extends": "base.yaml", "seed": 3})
    assert schema.is_valid(whole)
    del whole["optimizer"]
    assert not schema.is_valid(whole)


# ---- the environment


def test_the_environment_gives_what_cannot_change_the_result(place, monkeypatch):
    monkeypatch.setenv("TEAM", "vision")
    monkeypatch.setenv("CORES", "3")
    spec = loaded(
        place,
        "extends: shared/base.yaml\nname: of-${env:TEAM}\nloader: {workers: '${env:CORES}'}\n"
        "tracking: {wandb: {project: '${env:CORES}', tags: ['${env:TEAM}-${env:CORES}']}}\n",
    )
    assert (spec.name, spec.loader.workers) == ("of-vision", 3)
    assert (spec.tracking.wandb.project, spec.tracking.wandb.tags) == ("3", ("vision-3",))


def test_the_environment_gives_nothing_else(place, monkeypatch):
    monkeypatch.delenv("NOWHERE_SET", raising=False)
    monkeypatch.setenv("LR", "0.2")
    monkeypatch.setenv("SOME_TOKEN", "very-secret-words")
    told = faults(
        place,
        "extends: shared/base.yaml\nname: of-${env:NOWHERE_SET}\noptimizer: {lr: '${env:LR}'}\n"
        "tracking: {wandb: {project: '${env:SOME_TOKEN}'}}\nslurm: {account: '${env:}'}\n"
        "test: {every_steps: '${env:LR}'}\n",
    )
    assert told[0] == ("child.yaml:2:7: name: the environment variable NOWHERE_SET is not set")
    found = "\n".join(told)
    assert 'command line: optimizer.lr="$NAME"' in found
    assert "child.yaml:4:29: tracking.wandb.project: SOME_TOKEN is the name of a secret" in found
    assert "child.yaml:5:18: slurm.account: '' is not the name of an environment" in found
    assert "child.yaml:6:21: test.every_steps: ${env:...} is only allowed in keys" in found


def test_the_keys_of_the_environment_are_those_that_change_no_result():
    assert set(FROM_ENVIRONMENT) == set(CANNOT_CHANGE_THE_RESULT) - {"test"}


# ---- the real commands


def test_a_run_keeps_the_merged_spec_and_resumes_by_it(tmp_path):
    (tmp_path / "base.yaml").write_text(GOOD)
    (tmp_path / "child.yaml").write_text(
        "extends: base.yaml\nname: child\nlength: {steps: 3}\nschedule: null\n"
        "slurm: {nodes: 1, gpus_per_node: 0, time: '1:00:00'}\n"
        "kubernetes: {image: example.com/evenstep, storage_claim: runs, device: cpu}\n"
    )
    done = evenstep("run", "child.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    kept = yaml.safe_load((tmp_path / "runs/child/spec.yaml").read_text())
    assert kept["length"] == {"steps": 3}
    assert "extends" not in kept
    for engine in ("slurm", "kubernetes"):  # what the cluster gets needs no other file
        done = evenstep(engine, "render", "child.yaml", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "extends" not in done.stdout
        assert re.search(r"steps: 3\b", done.stdout)
        assert re.search(r"global_batch: \d+", done.stdout)

    (tmp_path / "base.yaml").write_text(GOOD.replace("lr: 0.1", "lr: 0.07"))
    done = evenstep("run", "child.yaml", cwd=tmp_path)
    assert done.returncode == 64
    assert "optimizer.lr: 0.1 -> 0.07" in done.stderr
    (tmp_path / "more.yaml").write_text("length: {steps: 5}\noptimizer: {lr: 0.07}\n")
    words = ("run", "child.yaml", "--change", "--set-file", "more.yaml")
    done = evenstep(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    facts = json.loads((tmp_path / "runs/child/run.json").read_text())
    changed = {change["key"] for change in facts["changes"][0]["keys"]}
    assert changed == {"length.steps", "optimizer.lr"}
    for file in ("base.yaml", "child.yaml", "more.yaml"):
        (tmp_path / file).unlink()
    done = evenstep("test", "child", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_long_list_is_replaced_in_a_time_of_its_length(place):
    def calls(length):
        made = 0

        def count(frame, event, argument):
            nonlocal made
            made += event == "call"

        paths = [f"rows-{n}" for n in range(length)]
        base = yaml.safe_load(BASE) | {"task_args": {"files": paths}}
        (place / "long.json").write_text(json.dumps(base))
        (place / "more.json").write_text(json.dumps({"task_args": {"files": paths}}))
        sys.setprofile(count)
        try:
            load_spec(place / "long.json", overrides=[place / "more.json"])
        finally:
            sys.setprofile(None)
        return made

    assert calls(800) < 3 * calls(400)
