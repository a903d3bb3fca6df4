"""N processes on this machine through torch's elastic agent; the root cause's code comes out."""

from __future__ import annotations

import faulthandler
import json
import logging
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch import fork_server
from launch.environment import launched
from launch.signals import heard
from service.errors import PeerLost, SpecError, Stopped, WillFailAgain
from service.faults import StopRequest, die_with_parent, stop_on_signals

if TYPE_CHECKING:
    from launch.agent import Agent

STOPPED, PEER_LOST = Stopped.exit_code, PeerLost.exit_code
# Starting again cannot change these.
FINAL = {0, STOPPED, SpecError.exit_code, WillFailAgain.exit_code}
_PRELOAD = ["launch.fork_server", "launch.entry", "launch.local", "launch.cli", "torch._dynamo"]
_LAST_WORDS = 4000  # characters of the output of a process that crashed


@dataclass(frozen=True)
class Ending:
    """How one process ended, as it said itself."""

    rank: int
    code: int
    message: str
    time: float
    trace: str = ""


@dataclass(frozen=True)
class Cause:
    """Why an attempt ended as it did."""

    code: int
    told: str = ""
    """For a person; empty where rank 0 has said it already."""


def run_locally(job: Any, *, processes: int, max_restarts: int = 0, elastic: bool = False) -> int:
    """Run the job in `processes` processes; the exit code of the whole.

    The processes are forked from a server that has torch imported, which saves each of them
    the import, and again at every restart. Signals reach them through this launcher alone.

    Args:
        max_restarts: how often all of them are started again after a failure.
        elastic: go on with one process fewer each time.
    """
    with stop_on_signals(heard) as stop, tempfile.TemporaryDirectory(prefix="evenstep-") as notes:
        try:
            _warm_up()
            return _attempts(job, processes, max_restarts, elastic, stop, Path(notes))
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 128 + signal.SIGINT


def _attempts(
    job: Any, processes: int, max_restarts: int, elastic: bool, stop: StopRequest, notes: Path
) -> int:
    for restart in range(max_restarts + 1):
        if stop.requested:
            print(f"Stopped by {stop.signal_name} before the first step.", file=sys.stderr)
            return STOPPED
        before = job.run_id() if max_restarts else None
        cause = _attempt(job, processes, stop, notes / str(restart))
        if cause.told:
            print(cause.told, file=sys.stderr, flush=True)
        if cause.code in FINAL or restart == max_restarts:
            return cause.code
        processes = max(1, processes - 1) if elastic else processes
        job = job.again(before)
        print(
            f"Starting again on {processes} {'process' if processes == 1 else 'processes'} from "
            f"the newest checkpoint (restart {restart + 1} of {max_restarts}).",
            file=sys.stderr,
            flush=True,
        )
    raise AssertionError("the last restart returns")


def _warm_up() -> None:
    """Start the fork server; it imports torch while this process imports the agent."""
    from multiprocessing import forkserver

    os.environ[fork_server.LAUNCHER] = str(os.getpid())
    multiprocessing.get_context("forkserver").set_forkserver_preload(_PRELOAD)
    forkserver.ensure_running()
    from launch.agent import adopt_strangers

    adopt_strangers()
    # The agent's own log repeats, in a traceback, what we say in a sentence.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)


def _attempt(job: Any, processes: int, stop: StopRequest, notes: Path) -> Cause:
    """Run all processes once, from their start to the end of the last one."""
    from launch.agent import Agent

    notes.mkdir()
    agent = Agent(
        process,
        job,
        str(notes),
        processes=processes,
        stop=stop,
        stop_budget_seconds=job.spec.faults.stop_budget_seconds,
    )
    agent.run_once()
    return root_cause(agent, _endings(notes), notes, job.spec.faults.stop_budget_seconds)


def process(environment: dict[str, str], job: Any, notes: str) -> None:
    """What each process runs; leaves a note of how it ended."""
    from launch.entry import leave, outcome_of

    die_with_parent(fork_server.PROCESS)
    # In a session of its own: Ctrl-C on the terminal then reaches it once, from the launcher.
    os.setsid()
    os.environ.update(environment)
    place = launched()
    assert place is not None, "the agent sets RANK and its kin"
    with stop_on_signals() as stop:
        if place.rank:
            _speak_into(Path(notes, f"{place.rank}.log"))
        faulthandler.enable(all_threads=True)
        # That a peer was lost is told by the launcher, after the reason why.
        work = lambda: job.work(place, stop=stop)  # noqa: E731
        end = outcome_of(work, rank=place.rank, silent=(PeerLost,))
        ending = Ending(place.rank, end.code, end.message, time.time(), end.trace)
        _write_whole(Path(notes, f"{place.rank}.json"), json.dumps(asdict(ending)))
        leave(end.code)


def root_cause(
    agent: Agent, endings: Sequence[Ending], notes: Path, budget_seconds: float
) -> Cause:
    """Why the job ended: its exit code, and what rank 0 has not said of it yet.

    A process that was killed comes first, then the earliest that failed on its own account;
    that a peer was lost is nobody's reason while there is another.
    """
    for rank in agent.first_ended:
        if rank.killed_by is not None:
            return Cause(128 + rank.killed_by, _killed(rank.number, rank.killed_by, notes))
    own = [ending for ending in endings if ending.code not in (0, STOPPED, PEER_LOST)]
    if own:
        first = min(own, key=lambda ending: ending.time)
        said = any(not e.rank and e.message == first.message for e in own)
        trace = f"{first.trace}\n" if first.trace else ""
        return Cause(
            first.code, "" if said else f"{trace}error: rank {first.rank}: {first.message}"
        )
    codes = [rank.ended for rank in agent.ranks if not rank.ended_by_us]
    if agent.overran:
        late = ", ".join(str(rank.number) for rank in agent.ranks if rank.ended_by_us)
        return Cause(
            128 + signal.SIGKILL,
            f"error: rank {late} had not stopped {budget_seconds:g} s after the request, so it was "
            "killed; the newest checkpoint is as it was. Raise faults.stop_budget_seconds.",
        )
    if STOPPED in codes:
        return Cause(STOPPED)
    for ending in endings:
        if ending.code == PEER_LOST:
            return Cause(PEER_LOST, f"error: rank {ending.rank}: {ending.message}")
    return Cause(next((code for code in codes if code), 0))


def _killed(rank: int, number: int, notes: Path) -> str:
    told = f"error: rank {rank} was killed by {signal.Signals(number).name}."
    log = notes / f"{rank}.log"
    if number in (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE) and log.exists():
        words = log.read_text(errors="replace").partition("\nExtension modules:")[0]
        told = f"{words[-_LAST_WORDS:]}\n{told}"
    return told


def _speak_into(log: Path) -> None:
    """Send what this process prints into a file: on the terminal one process speaks for all."""
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def _write_whole(path: Path, text: str) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    os.replace(partial, path)


def _endings(directory: Path) -> list[Ending]:
    return [Ending(**json.loads(path.read_text())) for path in sorted(directory.glob("*.json"))]
