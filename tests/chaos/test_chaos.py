"""A run that is injured twenty times ends in the bits of one that is not."""

from pathlib import Path

import pytest

from chaos.campaign import FROM_OUTSIDE, HANGS, differences, planned, run

HOW = {"processes": 2, "steps": 90, "hang": 3.0}


@pytest.mark.slow  # two minutes: `make test-slow`, and `make chaos` for two hundred
def test_twenty_injuries_leave_no_trace(tmp_path: Path) -> None:
    run(tmp_path, "undisturbed", [], **HOW)
    kinds = ["kill one", "kill all"] * 5 + ["raise"] * 4 + [*FROM_OUTSIDE[:3], *HANGS]
    plan = planned(20, seed=5, processes=2, kinds=kinds)
    seen = run(tmp_path, "injured", plan, **HOW)
    different = differences(tmp_path / "runs" / "injured", tmp_path / "runs" / "undisturbed")
    assert not different, (different, seen)
    struck = {n for n in range(20) if (tmp_path / "chaos-injured" / f"struck-{n}").exists()}
    assert len(struck) >= 18, f"the run ended before {20 - len(struck)} injuries had struck"
