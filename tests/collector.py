"""Keeps the garbage collector away from what is loaded where one test runs after the other.

A run collects garbage before it trains. In a command that takes little; among the million objects
of a process with torch and all tests it takes longer than the run of a test.
"""

from __future__ import annotations

import gc

_MANY_OBJECTS = 50_000
_RUNS_BETWEEN_COLLECTIONS = 20
_runs = 0


def rest() -> None:
    """Let the collector ignore all existing objects, again where a run has ended that.

    What a run has left in cycles would stay for ever, so from time to time it is collected.
    """
    global _runs
    if len(gc.get_objects(generation=2)) < _MANY_OBJECTS:
        return  # nobody has ended it
    _runs += 1
    if _runs % _RUNS_BETWEEN_COLLECTIONS == 0:
        gc.collect()
    gc.freeze()
