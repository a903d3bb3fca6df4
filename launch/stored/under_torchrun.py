"""A run in a store that torchrun has started: rank 0 trains in a child, and its parent uploads.

On several machines, the first process of each other one brings what rank 0 has published.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from launch.environment import (
    SHUTDOWN_TIMEOUT,
    TORCHRUN_BEGAN,
    Environment,
    torchrun_began,
    torchrun_grace,
)
from launch.processes.signals import heard
from launch.stored.following import Following, runs_of_node
from service.basics.errors import EvenstepError, Stopped
from service.health.stop_request import PARENT, stop_on_signals
from service.storage.address import Address
from service.storage.scratch import scratch_runs

_BROUGHT = "EVENSTEP_BROUGHT_TO"
"""Set for the child of rank 0: the directory of runs to which its parent has brought the run."""
_LOOK_SECONDS = 0.1
_LEAVING_SECONDS = 1.0


def on_several(place: Environment) -> bool:
    """Whether torchrun has started the job on several machines."""
    return place.local_world_size < place.world_size


def trained_in(run: Address, place: Environment) -> Path | None:
    """The directory of runs in which this process trains; None if its child does.

    The ranks other than 0 need nothing there before all of them have connected, and rank 0
    connects when the run has been brought.
    """
    brought = os.environ.pop(_BROUGHT, None)
    if brought is not None:
        return Path(brought)
    if not place.rank:
        return None
    scratch = scratch_runs(run)
    node = _node(place)
    return runs_of_node(scratch, node) if node else scratch


def when_connected(
    run: Address, place: Environment, *, say: Callable[[str], None]
) -> Callable[[], None] | None:
    """What each process does when all of them have connected; None on one machine.

    The first one of each machine but that of rank 0 brings the run, which rank 0 has published.
    """
    if not on_several(place):
        return None
    held: list[Following] = []  # with their locks, as long as this process works

    def bring() -> None:
        node = _node(place)
        if node and place.local_rank == 0:
            following = Following(run, scratch_runs(run), node=node, say=say)
            held.append(following)
            following.begin()
            following.bring()

    return bring


def _node(place: Environment) -> int:
    """The number of this machine: 0 for that of rank 0."""
    first = place.rank - place.local_rank
    return int(os.environ.get("GROUP_RANK", first)) if first else 0


def train_in_child(runs: Path) -> int:
    """Run this command again in a child that trains in this directory; its exit code.

    So rank 0 never waits for an upload: the threads that upload are in another process.

    Raises:
        EvenstepError: it cannot be started.
    """
    variables = {PARENT: str(os.getpid()), _BROUGHT: str(runs)}
    # The child could not ask torchrun.
    variables[SHUTDOWN_TIMEOUT] = str(torchrun_grace().seconds)
    variables[TORCHRUN_BEGAN] = str(torchrun_began() or "")
    with stop_on_signals(heard):
        if heard.requested:
            return Stopped.exit_code
        try:
            child = subprocess.Popen(
                [sys.executable, *sys.orig_argv[1:]],
                env=os.environ | variables,
                start_new_session=True,  # a signal to the whole group reaches it once, from here
            )
        except OSError as error:
            raise EvenstepError(f"this machine starts no process: {error.strerror}.") from error
        try:
            return _end_of(child)
        except KeyboardInterrupt:
            child.send_signal(signal.SIGINT)
            child.wait()
            return 128 + signal.SIGINT


def _end_of(child: subprocess.Popen[bytes]) -> int:
    """Wait for its end, and hand on a request to stop; its exit code as in a shell."""
    handed_on: int | None = None
    while child.poll() is None:
        if handed_on is None and heard.signal_name is not None:
            handed_on = signal.Signals[heard.signal_name]
            child.send_signal(handed_on)
        with suppress(subprocess.TimeoutExpired):
            child.wait(_LOOK_SECONDS)
    if handed_on is not None and child.returncode == -handed_on:  # before it could handle it
        return Stopped.exit_code
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


def seconds_to_stop() -> float:
    """How long the whole stop of this process may take before torchrun kills it."""
    return max(0.0, torchrun_grace().seconds - _LEAVING_SECONDS)
