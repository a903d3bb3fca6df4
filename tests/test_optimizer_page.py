"""docs/reference/optimizers.md and the recipes that it speaks of."""

from __future__ import annotations

import inspect
import json
import re
import sys

import pytest
import yaml
from commands import DEADLINE_SECONDS, ROOT, command
from jobs import train_in_process

from service.optimization.optimizer_reference import with_tables
from service.optimization.optimizers import optimizer_class
from service.recipes import find_recipe
from service.recipes.optimizers import CLASSICS
from service.runs.tracking import read_metrics
from service.spec.files import load_spec
from service.spec.optimizer_options import OPTIMIZERS

PAGE = (ROOT / "docs/reference/optimizers.md").read_text()


def test_the_tables_are_those_that_the_code_makes():
    assert with_tables(PAGE) == PAGE, "run: python -m service.optimization.optimizer_reference"
    assert with_tables(PAGE.replace("| `adam` |", "| `adm` |")) == PAGE


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_defaults_shown_are_those_of_torchs_class(name):
    row = next(line for line in PAGE.splitlines() if line.startswith(f"| `{name}` |"))
    shown = dict(re.findall(r"`(\w+): ([^`]+)`", row.split("|")[2]))
    signature = inspect.signature(optimizer_class(name).__init__).parameters
    defaults = {option: signature[option].default for option in shown}
    assert shown == {
        option: default if isinstance(default, str) else json.dumps(default)
        for option, default in defaults.items()
    }


def test_every_section_that_the_page_shows_is_a_spec():
    shown = [yaml.safe_load(text) for text in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)]
    assert len(shown) == 6
    for sections in shown:
        spec = {
            "name": "shown",
            "task": "service.recipes.digits:task",
            "batch": {"global_batch": 96},
            "length": {"epochs": 1},
            "optimizer": {"name": "sgd", "lr": 0.1},
        }
        load_spec(spec | sections)


@pytest.mark.parametrize("name", CLASSICS)
def test_each_classic_optimizer_learns_the_digits(alone, tmp_path, name):
    spec = yaml.safe_load(find_recipe("optimizers").read_text())
    spec |= {"optimizer": CLASSICS[name], "tracking": {}}
    last = train_in_process(alone, spec, tmp_path)
    assert last is not None
    assert last["test/accuracy"] > 0.95


def test_the_comparison_hands_on_the_code_of_a_run_that_fails(tmp_path):
    words = (sys.executable, "-m", "service.recipes.optimizers", "--proceses", "2")
    ended = command(*words, cwd=tmp_path, timeout=DEADLINE_SECONDS)
    assert ended.returncode == 64
    assert ended.stderr.count("No such option") == 1


def test_the_regression_recipe_trains_base_and_head_at_their_own_rates(alone, tmp_path):
    spec = yaml.safe_load(find_recipe("regression").read_text())
    train_in_process(alone, spec | {"tracking": {}}, tmp_path)
    rows = read_metrics(tmp_path / "regression/metrics.jsonl")
    logged = [row for row in rows if "train/lr/0" in row]
    assert all(row["train/lr/0"] == pytest.approx(10 * row["train/lr/1"]) for row in logged)
    # Always guessing the mean is wrong by 0.62 kg.
    assert min(row["test/absolute_error"] for row in rows if "test/loss" in row) < 0.3
