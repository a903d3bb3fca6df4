"""A run that is injured again and again ends in the bits of one that is not."""

import json
from pathlib import Path
from typing import Any

import pytest

from chaos.campaign import (
    DAMAGES,
    HANGS,
    KILLS,
    STOPS,
    Injury,
    differences,
    kills_on_disk,
    planned,
    run,
    wrong,
)

HOW: dict[str, Any] = {"processes": 2, "steps": 110, "hang": 3.0}


def test_twenty_injuries_leave_no_trace(tmp_path: Path) -> None:
    run(tmp_path, "undisturbed", [], **HOW)
    kinds = [*KILLS, *KILLS[:2], *KILLS[:2], *HANGS, *DAMAGES, *STOPS]
    kinds += ["kill launcher", "disk full", "raise"]
    plan = planned(20, seed=5, processes=2, steps=HOW["steps"], kinds=kinds)
    seen = run(tmp_path, "injured", plan, **HOW)
    different = differences(tmp_path / "runs" / "injured", tmp_path / "runs" / "undisturbed")
    assert not different, (different, seen)
    assert not wrong(seen), wrong(seen)
    assert all(one.struck for one in seen[:18]), "the run ended before they had struck"


def test_killed_at_operations_of_its_saves_a_run_leaves_no_trace(tmp_path: Path) -> None:
    how = {"processes": 1, "steps": 130, "hang": 30.0}
    run(tmp_path, "undisturbed", [], **how)
    seen = run(tmp_path, "injured", kills_on_disk(every=3), **how)  # `make chaos`: at every one
    different = differences(tmp_path / "runs" / "injured", tmp_path / "runs" / "undisturbed")
    assert not different, different
    assert not wrong(seen), wrong(seen)
    assert all(one.struck for one in seen)


@pytest.mark.matrix
def test_a_sharded_run_is_injured_and_leaves_no_trace(tmp_path: Path) -> None:
    how: dict[str, Any] = {"processes": 2, "steps": 46, "hang": 3.0, "mode": "sharded"}
    run(tmp_path, "undisturbed", [], **how)
    plan = [
        Injury(0, "kill one", "disk", rank=1, count=3, step=6),  # in the midst of its rows
        Injury(1, "kill all", "save", rank=0, count=1, delay=0.01, step=14),
        Injury(2, "hang", "backward", rank=1, count=2, step=20),
        Injury(3, "flip a bit", "forward", rank=0, count=1, step=27),
        Injury(4, "kill one", "disk", rank=0, count=12, step=33),
    ]
    seen = run(tmp_path, "injured", plan, **how)
    different = differences(tmp_path / "runs" / "injured", tmp_path / "runs" / "undisturbed")
    assert not different, (different, seen)
    assert not wrong(seen), wrong(seen)
    assert all(one.struck for one in seen)
    reports = (tmp_path / "runs" / "injured" / "failures").glob("*.json")
    told = {json.loads(report.read_text())["last_collective"] for report in reports}
    assert "parameters and gradients of a backward pass" in told, told  # of the hang


@pytest.mark.matrix
def test_a_run_that_moves_whenever_it_is_stopped_stays_the_same(tmp_path: Path) -> None:
    how: dict[str, Any] = {"processes": 1, "steps": 34, "hang": 30.0, "mode": "moved"}
    run(tmp_path, "undisturbed", [], **how)
    plan = [
        Injury(0, "kill launcher", "disk", rank=0, count=7, step=6),
        Injury(1, "SIGTERM", "forward", rank=0, count=2, step=13),
        Injury(2, "kill launcher", "save", rank=0, count=1, delay=0.01, step=19),
    ]
    seen = run(tmp_path, "injured", plan, **how)
    runs = tmp_path / "runs"
    different = differences(runs / "injured", runs / "undisturbed", mode="moved")
    assert not different, (different, seen)
    assert not wrong(seen), wrong(seen)
    assert all(one.struck for one in seen)
