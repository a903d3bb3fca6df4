"""A run that is injured again and again ends in the bits of one that is not."""

from pathlib import Path

from chaos.campaign import (
    DAMAGES,
    HANGS,
    KILLS,
    STOPS,
    differences,
    kills_on_disk,
    planned,
    run,
    wrong,
)

HOW = {"processes": 2, "steps": 110, "hang": 3.0}


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
