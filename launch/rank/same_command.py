"""Whether all processes of a job were started by the same command."""

from __future__ import annotations

import os
from typing import Any

from launch.environment import RUN_OF_STORE
from launch.rank.job import Job, TestJob
from service.basics.errors import SpecError
from service.distributed.world import World
from service.plan.changing import NOT_SET, Change, as_text, differences
from service.training.setup import together

_SHOWN = 8


def require_same_command(job: Job | TestJob, world: World) -> None:
    """Refuse processes with different settings: they would wait for each other, or train apart.

    Every process calls it. A launcher of ours starts all of its processes with one job, and nodes
    compare what they were given before they connect.

    Raises:
        SpecError: names the settings, on every process.
    """
    if RUN_OF_STORE in os.environ:
        return
    own: dict[str, Any] = {"settings": job.settings, "spec": as_text(job.spec)}
    lead = world.from_lead(own)
    together(world, lambda: _compare(lead, own, rank=world.index))


def _compare(lead: dict[str, Any], own: dict[str, Any], *, rank: int) -> None:
    """Compare what this process was given with what rank 0 was given.

    Raises:
        SpecError: names the difference.
    """
    names = {**lead["settings"], **own["settings"]}
    pairs = ((k, *(each["settings"].get(k, NOT_SET) for each in (lead, own))) for k in names)
    found = [Change(*pair) for pair in pairs if pair[1] != pair[2]]
    found += differences(lead["spec"], own["spec"])
    if not found:
        return
    lines = [f"  {each.key}: {each.was} on rank 0, {each.now} on rank {rank}" for each in found]
    more = [f"  and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
    raise SpecError(
        f"rank {rank} was started with other settings than rank 0. Start all processes of a job "
        "with the same command:\n" + "\n".join(lines[:_SHOWN] + more)
    )
