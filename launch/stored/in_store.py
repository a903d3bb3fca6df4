"""A run that lives in an object store: what its launcher does before and after the processes."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from launch.environment import Environment, Node, meeting_secret
from launch.processes.signals import heard, stop_raises
from launch.stored.following import Following
from service.basics.errors import EvenstepError, SpecError, Stopped
from service.basics.running_time import RunningClock, StandingClock
from service.health.stop_budget import GracePeriod, StopBudget, longest_save
from service.runs.directory import RunDirectory
from service.spec.models import Spec
from service.storage.address import Address
from service.storage.beside import Uploading, brought
from service.storage.scratch import scratch_runs

WITHOUT_SUCCESS_SECONDS = 600.0
"""How long the end of a run, or of a generation, waits for a store that takes nothing."""
_LAST_SECONDS = 60.0
"""How long it waits at least."""


def require_supported(
    address: Address, spec: Spec, place: Environment | None, node: Node | None
) -> None:
    """Refuse what does not work for a run that lives in a store.

    Raises:
        SpecError: names it.
    """
    if node is None or node.nodes == 1:
        return
    if node.secret_name and not meeting_secret():
        raise SpecError(
            f"--runs {address}: the nodes share no directory in which node 0 could leave a secret "
            "for the others. Give all of them the same EVENSTEP_SECRET_FILE."
        )


def followed(address: Address, spec: Spec, node: Node) -> Following:
    """What a node other than the first has of the run, as far as it is needed before the start."""
    run = address / spec.name
    following = Following(run, scratch_runs(run), node=node.index, say=say)
    with stop_raises():
        following.begin()
    return following


@contextmanager
def kept_in_store(
    address: Address, spec: Spec, *, fresh: bool, several: bool
) -> Iterator[Uploading]:
    """A context with the run brought here, for what is checked before it starts.

    Args:
        several: whether other nodes follow, which bring what this one has published.
    """
    with stop_raises():
        uploading = brought(
            address / spec.name, spec, fresh=fresh, say=say, is_stopped=lambda: heard.requested
        )
    try:
        yield uploading
        if several:
            with stop_raises():
                uploading.publish_now()
    except BaseException:
        uploading.abandon()
        raise


def uploaded(
    address: Address,
    uploading: Uploading,
    train: Callable[[], int],
    *,
    budget_seconds: Callable[[], float],
    is_fixed: bool,
    grace_periods: Sequence[GracePeriod] = (),
) -> int:
    """The exit code of the run: that of `train`, unless it is not completely in the store.

    Args:
        budget_seconds: how long a stop may take, from the request on.
        is_fixed: also if the upload still comes forward; otherwise from its last progress on.
        grace_periods: the limits of a stop of which the user is warned if they are too short.
    """
    stopping = StopBudget(grace_periods, say=say)

    def learn(upload_seconds: float) -> None:
        with suppress(EvenstepError):  # run.json cannot be read now: it can at the next upload
            takes = longest_save(RunDirectory(uploading.runs / address.name))
            if takes is not None:
                stopping.learned(takes.save_seconds, takes.how, upload_seconds=upload_seconds)

    uploading.start(
        # Two more requests do not hurt: the processes agree on one.
        when_lost=lambda: os.kill(os.getpid(), signal.SIGTERM),
        when_uploaded=learn,
    )
    try:
        code = train()
    except BaseException:
        failed = _finished(uploading, budget_seconds, is_fixed)
        if failed is not None:
            print(f"error: {failed}", file=sys.stderr, flush=True)
        raise
    failed = _finished(uploading, budget_seconds, is_fixed)
    if failed is None:
        print(f"Everything is in {address}.", flush=True)
        return code
    print(f"error: {failed}", file=sys.stderr, flush=True)
    return failed.exit_code if code in (0, Stopped.exit_code) else code


def _finished(
    uploading: Uploading, budget_seconds: Callable[[], float], is_fixed: bool
) -> EvenstepError | None:
    """Wait for the end of the upload; what is wrong if it is not complete."""
    standing, ended = StandingClock(lambda: uploading.moved), RunningClock()

    def left() -> float:
        if heard.heard_at is not None:
            waited = time.monotonic() - heard.heard_at
            return budget_seconds() - (waited if is_fixed else min(waited, standing()))
        return max(WITHOUT_SUCCESS_SECONDS - standing(), _LAST_SECONDS - ended())

    try:
        return uploading.finish(left)
    except KeyboardInterrupt:
        return EvenstepError(f"interrupted: {uploading.missing()}.")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
