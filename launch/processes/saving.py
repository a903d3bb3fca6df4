"""Finds the ranks of this machine that are writing a checkpoint, so that they may finish it."""

from __future__ import annotations

import time
from collections.abc import Collection
from typing import Any

from service.runs.directory import read_beat

_BEAT_SECONDS = 5.0
"""A rank writes its heartbeat every second; if it is older, the rank is frozen or exiting."""


def some_save(job: Any, ranks: Collection[int], processes: Collection[int | None]) -> bool:
    """Whether at least one of these ranks is writing a checkpoint and makes progress.

    Args:
        processes: their process ids, because a heartbeat can be from an earlier attempt.
    """
    return any(_saves(job, rank, processes) for rank in ranks)


def _saves(job: Any, rank: int, processes: Collection[int | None]) -> bool:
    beat = read_beat(job.directory().logs, rank)
    if beat is None or beat.get("process") not in processes:
        return False
    standing, timeout = beat.get("save_standing_seconds"), job.spec.faults.hang_timeout_seconds
    is_alive = time.time() - beat["time"] < _BEAT_SECONDS
    return is_alive and isinstance(standing, int | float) and standing < timeout
