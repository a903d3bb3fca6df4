"""A run that is injured twenty times ends in the bits of one that is not."""

from pathlib import Path

from chaos.campaign import EXPECTED, STOPS, differences, planned, run, wrong

HOW = {"processes": 2, "steps": 110, "hang": 3.0}
FROM_OUTSIDE = (*STOPS, "kill launcher", "disk full")
"""After these the command is entered again, which loads torch again."""


def test_twenty_injuries_leave_no_trace(tmp_path: Path) -> None:
    run(tmp_path, "undisturbed", [], **HOW)
    quick = [kind for kind in EXPECTED if kind not in FROM_OUTSIDE]
    kinds = [*quick, "kill one", "kill all", "kill one", "SIGTERM to all", "kill launcher"]
    plan = planned(20, seed=5, processes=2, steps=HOW["steps"], kinds=kinds)
    seen = run(tmp_path, "injured", plan, **HOW)
    different = differences(tmp_path / "runs" / "injured", tmp_path / "runs" / "undisturbed")
    assert not different, (different, seen)
    assert not wrong(seen), wrong(seen)
    assert all(one.struck for one in seen[:18]), "the run ended before they had struck"
