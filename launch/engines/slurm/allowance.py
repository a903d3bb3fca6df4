"""How long Slurm lets this attempt run, and whether the rest of the run fits into it."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping

from service.basics.errors import EvenstepError
from service.runs.directory import RunDirectory
from service.runs.history import History, read_history

_NO_LIMIT_SECONDS = 300 * 86_400
"""Slurm gives a job without a limit one year."""


def allowance(directory: RunDirectory, variables: Mapping[str, str] | None = None) -> str | None:
    """One line for the start of an attempt; None if its limit is unknown."""
    variables = os.environ if variables is None else variables
    told = variables.get("EVENSTEP_ENDS") or variables.get("SLURM_JOB_END_TIME", "")
    if not told.isdecimal():
        return None
    left = max(0.0, int(told) - time.time())
    if left > _NO_LIMIT_SECONDS:
        return None
    return f"Slurm's time limit: {clock(left)} left. {_rest(_history(directory), left)}"


def _history(directory: RunDirectory) -> History | None:
    if not os.path.exists(directory.facts):
        return None
    try:
        return read_history(directory.path)
    except EvenstepError:
        return None  # opening the run reports the error


def _rest(history: History | None, left: float) -> str:
    each = seconds_of_a_step(history) if history is not None else None
    if history is None or each is None or history.steps is None:
        return "The time of a step is known once an attempt has ended."
    steps = max(0, history.steps - history.step)
    needs = steps * each
    fits = (
        "so they fit"
        if needs <= left
        else "so they do not fit: the run saves before the limit and resumes in the next attempt"
    )
    return (
        f"{steps:,} steps remain; at {each:.3g} s per step, measured in this run, they take "
        f"{clock(needs)}, {fits}."
    )


def seconds_of_a_step(history: History) -> float | None:
    """The mean time of a step so far, including its part of tests and saves, without the start."""
    ended = [each for each in history.attempts if each.get("to_step", 0) > each["from_step"]]
    steps = sum(each["to_step"] - each["from_step"] for each in ended)
    spent = sum(
        seconds
        for each in ended
        for kind, seconds in each.get("seconds", {}).items()
        if kind != "starting"
    )
    return spent / steps if steps and spent else None


def clock(seconds: float) -> str:
    """A duration in Slurm's format: `1-02:03:04`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    told = f"{hours:02}:{minutes:02}:{rest:02}"
    return f"{days}-{told}" if days else told
