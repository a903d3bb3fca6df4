"""The JSON Schema of a spec in a real yaml-language-server: faults, completion, explanations."""

import pytest
from commands import ROOT
from language_server import Editor, needs_language_server

from launch.commands.new_job import SPEC, start

pytestmark = needs_language_server
LINE = "# yaml-language-server: $schema=evenstep.schema.json\n"
GOOD = """\
name: job
task: ./my_task.py:task
batch: {global_batch: 64}
length: {epochs: 3}
optimizer:
  name: sgd
  lr: 0.1
"""


@pytest.fixture(scope="module")
def editor(tmp_path_factory):
    place = tmp_path_factory.mktemp("editor")
    start(place)
    with Editor(place) as editor:
        yield editor


def test_the_files_that_ship_have_no_fault(editor):
    starter = (ROOT / "service/spec/starter/my_job.yaml").read_text()
    assert editor.open(SPEC, starter) == []
    recipe = (ROOT / "service/recipes/digits.yaml").read_text()
    assert editor.open("recipe.yaml", LINE + recipe) == []


@pytest.mark.parametrize(
    ("wrong", "line", "told"),
    [
        (GOOD + "  learning_rate: 3\n", 8, "Property learning_rate is not allowed"),
        (GOOD + "epoch: 3\n", 8, "Property epoch is not allowed"),
        (GOOD.replace("64", "many"), 3, "Incorrect type"),
        (GOOD.replace("name: sgd", "name: sgdd"), 6, "not accepted|Valid values|pattern"),
        (GOOD + "schedule: {name: cosine, finale: 1}\n", 8, "Property finale is not allowed"),
        (GOOD.replace("task: ./my_task.py:task\n", ""), 1, 'Missing property "task"'),
    ],
    ids=["key", "section", "type", "optimizer", "schedule", "missing"],
)
def test_a_fault_is_found_where_it_is_and_as_one(editor, wrong, line, told):
    found = editor.open(f"wrong-{line}-{len(wrong)}.yaml", LINE + wrong)
    messages = [fault["message"] for fault in found]
    assert any(word in message for message in messages for word in told.split("|")), messages
    assert not any("multiple" in message for message in messages), messages
    assert line in [fault["range"]["start"]["line"] for fault in found], found


def test_a_spec_that_extends_another_asks_for_nothing(editor):
    assert editor.open("child.yaml", LINE + "extends: base.yaml\nseed: 3\n") == []


@pytest.mark.parametrize("name", ["sgd", "adamw", "lbfgs", "muon"])
def test_an_unfinished_section_does_not_match_several(editor, name):
    text = GOOD.replace("name: sgd\n  lr: 0.1\n", f"name: {name}\n")
    found = editor.open(f"unfinished-{name}.yaml", LINE + text)
    assert [fault["message"] for fault in found] == ['Missing property "lr".']


@pytest.mark.parametrize(
    ("name", "own", "foreign"),
    [("sgd", {"momentum", "nesterov"}, "betas"), ("adamw", {"betas", "weight_decay"}, "nesterov")],
)
def test_completion_knows_the_options_of_the_optimizer(editor, name, own, foreign):
    text = LINE + GOOD.replace("sgd", name) + "  \n"
    editor.open(f"complete-{name}.yaml", text)
    offered = editor.at("completion", f"complete-{name}.yaml", 8, 2)["items"]
    labels = {item["label"] for item in offered}
    assert own <= labels
    assert foreign not in labels


def test_a_key_is_explained(editor):
    editor.open("hover.yaml", LINE + GOOD)
    said = editor.at("hover", "hover.yaml", 3, 10)["contents"]["value"]
    assert "Rows of one optimizer step over all processes" in said
