"""Goodput: steps done, steps repeated, and the seconds of each kind of work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

# The states of the heartbeat, in words.
KINDS = {
    "start-up": ("starting",),
    "training": ("forward", "exchange", "update", "log", "agree"),
    "waiting for data": ("data",),
    "testing": ("test",),
    "saving": ("save",),
}


def account_of(attempts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The time accounting of a run from its finished attempts.

    `goodput` is the time of the steps in the final result, without waiting for data, divided by the
    time since the first start. A repeated step counts once.
    """
    if not attempts:
        return {}
    done = [attempt["to_step"] - attempt["from_step"] for attempt in attempts]
    kept = [max(0, step - attempt["from_step"]) for attempt, step in _until(attempts)]
    seconds = {kind: sum(_seconds(a, kind) for a in attempts) for kind in KINDS}
    useful = sum(
        _seconds(attempt, "training") * min(k, d) / d
        for attempt, k, d in zip(attempts, kept, done, strict=True)
        if d
    )
    wall = attempts[-1]["ended"] - attempts[0]["started"]
    seconds["stopped"] = sum(max(0.0, b["started"] - a["ended"]) for a, b in pairwise(attempts))
    return {
        "attempts": len(attempts),
        "steps": attempts[-1]["to_step"],
        "steps_again": sum(done) - (attempts[-1]["to_step"] - attempts[0]["from_step"]),
        "wall_seconds": round(wall, 3),
        "seconds": {kind: round(value, 3) for kind, value in seconds.items()},
        "goodput": round(useful / wall, 4) if wall > 0 else 0.0,
    }


def each_of(attempts: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """For each finished attempt: its steps, how many were repeated later, and its seconds."""
    ended = [attempt for attempt in attempts if "to_step" in attempt]
    return [
        {
            "steps": attempt["to_step"] - attempt["from_step"],
            "taken again": max(0, attempt["to_step"] - step),
            **{kind: _seconds(attempt, kind) for kind in KINDS},
        }
        for attempt, step in _until(ended)
    ]


def failures_in_a_row(attempts: Sequence[Mapping[str, Any]], step: int) -> int:
    """How many of the last attempts, one after the other, also started at `step` and failed."""
    count = 0
    for attempt in reversed(attempts):
        if attempt["outcome"] not in ("failed", "lost") or attempt["from_step"] != step:
            break
        count += 1
    return count


def _until(attempts: Sequence[Mapping[str, Any]]) -> list[tuple[Mapping[str, Any], int]]:
    """Each attempt with the step from which the next one continued."""
    nexts = [attempt["from_step"] for attempt in attempts[1:]]
    nexts += [attempt["to_step"] for attempt in attempts[-1:]]
    return list(zip(attempts, nexts, strict=True))


def _seconds(attempt: Mapping[str, Any], kind: str) -> float:
    told = attempt.get("seconds", {})
    return float(sum(told.get(work, 0.0) for work in KINDS[kind]))
