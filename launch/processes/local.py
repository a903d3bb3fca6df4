"""Runs N processes on this machine and returns the exit code of the root cause."""

from __future__ import annotations

import faulthandler
import json
import logging
import math
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from launch.environment import launched
from launch.processes.saving import some_save
from launch.processes.signals import STARTED, heard
from launch.processes.terminal import outlive_readers, require_reader
from launch.processes.warm_start import begin_server, collect_garbage, set_since
from launch.rank.exit import leave, tell
from launch.rank.job import TestJob
from service.basics.atomic_files import (
    make_directory,
    plain,
    replace_unsynced,
    told_of,
    told_when_unwritten,
)
from service.basics.errors import PeerLost, SpecError, Stopped, WillFailAgain
from service.health.heartbeat import Heartbeat
from service.health.stop_budget import budget_seconds
from service.health.stop_request import StopRequest, die_with_parent, stop_on_signals
from service.health.watchdog import HUNG
from service.plan.plan import possible_processes
from service.runs.directory import RunDirectory, read_beat
from service.runs.failure_reports import write_failure

if TYPE_CHECKING:
    from launch.processes.agent import Agent

STOPPED, PEER_LOST = Stopped.exit_code, PeerLost.exit_code
# A restart cannot change these.
FINAL = {0, STOPPED, SpecError.exit_code, WillFailAgain.exit_code}
# Open files of the launcher, or of a process with a connection to each of the others.
_FILES, _FILES_A_PROCESS = 64, 4
_LAST_WORDS = 4000  # characters of the output of a process that crashed
_LAST_BYTES = 65536  # which are searched for them


@dataclass(frozen=True)
class Ending:
    """How one process ended, as it reported itself."""

    rank: int
    code: int
    message: str
    time: float
    trace: str = ""
    said: bool = False
    """Whether the process has printed it on the terminal itself."""


@dataclass(frozen=True)
class Cause:
    """The cause of the end of an attempt."""

    code: int
    told: str = ""
    """The message for the user; empty if rank 0 has printed it already."""
    rank: int | None = None
    """The rank that failed first, if any."""


NodeLost = Callable[[], float | None]
"""When another node was lost, in seconds since the epoch; None while all nodes are connected."""


def run_locally(
    job: Any,
    *,
    processes: int,
    max_restarts: int = 0,
    elastic: bool = False,
    node_lost: NodeLost = lambda: None,
    started: float = STARTED,
) -> int:
    """Run the job in `processes` processes; return the exit code of the job.

    The processes are forked from a server that has imported torch, which saves the import
    at every start and restart. Signals reach them only through this launcher.

    Args:
        max_restarts: how often all of them are restarted after a failure.
        elastic: continue with one process fewer each time; with `exactness: bitwise`, with half.
        started: when this attempt began, in seconds since the epoch.
    Raises:
        SpecError: this machine cannot start that many processes.
    """
    _require_files(processes)
    with stop_on_signals(heard) as stop, tempfile.TemporaryDirectory(prefix="evenstep-") as notes:
        try:
            _get_ready()
            attempts = _Attempts(max_restarts, elastic, node_lost, started)
            return _attempts(job, processes, attempts, stop, Path(notes))
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 128 + signal.SIGINT


@dataclass(frozen=True)
class _Attempts:
    """The arguments of `run_locally` about restarts."""

    max_restarts: int
    elastic: bool
    node_lost: NodeLost
    started: float


def _attempts(job: Any, processes: int, asked: _Attempts, stop: StopRequest, notes: Path) -> int:
    started, max_restarts = asked.started, asked.max_restarts
    for restart in range(max_restarts + 1):
        if stop.requested:
            when = "before the first step" if restart == 0 else "before it was started again"
            print(f"Stopped by {stop.reason} {when}.", file=sys.stderr, flush=True)
            return STOPPED
        before = job.run_id() if max_restarts else None
        cause = _attempt(job, processes, stop, notes / str(restart), started, asked.node_lost)
        started = time.time()
        if cause.told:
            print(cause.told, file=sys.stderr, flush=True)
        if cause.code in FINAL or restart == max_restarts:
            return cause.code
        if stop.requested:
            continue
        if asked.elastic:
            processes = possible_processes(job.spec, most=max(1, processes - 1))
        job = job.again(before)
        print(
            f"Restarting on {processes} {'process' if processes == 1 else 'processes'} from "
            f"the newest checkpoint (restart {restart + 1} of {max_restarts}).",
            file=sys.stderr,
            flush=True,
        )
    raise AssertionError("the last restart returns")


def _require_files(processes: int) -> None:
    """Refuse a configuration that would hang, or fail with an unclear message of a library."""
    needed = _FILES + _FILES_A_PROCESS * processes
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit != resource.RLIM_INFINITY and limit < needed:
        raise SpecError(
            f"ulimit -n: a process may have {limit} files open here, and {processes} "
            f"{'process needs' if processes == 1 else 'processes need'} {needed}. Raise it: "
            f"ulimit -n {max(1024, needed)}."
        )


def _get_ready() -> None:
    """Import the agent while the fork server, already started, imports what the ranks need."""
    begin_server()
    from launch.processes.agent import adopt_orphans

    adopt_orphans()
    collect_garbage()
    # The agent's own log repeats, in a traceback, what we say in a sentence.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)


def _attempt(
    job: Any,
    processes: int,
    stop: StopRequest,
    notes: Path,
    started: float,
    node_lost: NodeLost,
) -> Cause:
    """Run all processes once, until the last one ends."""
    from launch.processes.agent import Agent, NotStarted, rank_spec

    with told_when_unwritten(notes):
        notes.mkdir(parents=True)  # something may have cleaned up the temporary directory
    group = getattr(job, "group", None)
    agent = Agent(
        rank_spec(process, job, str(notes), started, processes=processes),
        stop=stop,
        stop_budget_seconds=lambda: budget_seconds(job.spec, job.directory()),
        some_save=lambda ranks: some_save(
            job, [rank.number for rank in ranks], [rank.process.pid for rank in ranks]
        ),
        first=group.index * group.processes if group else 0,
        variables=set_since(),
    )
    try:
        agent.run_once()
    except NotStarted as error:
        return Cause(error.exit_code, f"error: {error}")
    for rank in agent.ranks:
        if _mark(notes, rank.number).exists():
            rank.ended = HUNG  # by its sentinel, not by anyone else
    _bring_reports(notes / "failures", job.directory())
    cause = root_cause(agent, _endings(notes), agent.stop_budget_seconds, node_lost())
    return _explained(cause, agent, job, notes)


def _bring_reports(notes: Path, directory: RunDirectory) -> None:
    """Move early failure reports into the directory of the run, if it has one by now."""
    if not directory.facts.exists():
        return
    for report in notes.glob("*.json"):
        try:
            make_directory(directory.failures)
            replace_unsynced(directory.failures / report.name, report.read_text())
        except OSError as error:
            print(f"WARNING: {told_of(directory.failures, error)}", file=sys.stderr, flush=True)


def _explained(cause: Cause, agent: Agent, job: Any, notes: Path) -> Cause:
    """The cause, completed and written to a file for a process that could not report itself."""
    rank = next((r for r in agent.ranks if r.number == cause.rank), None)
    if rank is None:
        return cause
    spoke = rank.number in _noted(notes)
    if spoke and rank.killed_by is None and not rank.ended_by_us:
        return cause
    directory = job.directory()
    place = directory.logs if directory.logs.exists() else notes
    beat = read_beat(place, rank.number)
    known = beat if beat and beat.get("process") == rank.process.pid else {}
    files = (place / f"rank-{rank.number}.{kind}" for kind in ("stacks", "log"))
    stacks = "\n".join(filter(None, map(_last_words, files)))
    if place != notes and not spoke:
        told = {"kind": "killed", "message": cause.told, "stacks": stacks, "rank": rank.number}
        write_failure(directory.failures, {**known, **told})
    crashed = rank.killed_by in (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE)
    held = rank.ended == HUNG and rank.killed_by is None and not spoke
    if held and (mark := _mark(notes, rank.number)).exists():
        cause = replace(cause, told=f"error: rank {rank.number}: {mark.read_text()}")
    return replace(cause, told=f"{stacks}\n{cause.told}") if crashed or held else cause


def _mark(notes: Path, rank: int) -> Path:
    """The file in which the sentinel of a rank writes the reason of a kill."""
    return notes / f"{rank}.silent"


def _noted(notes: Path) -> set[int]:
    return {ending.rank for ending in _endings(notes)}


def _last_words(path: Path) -> str:
    """The end of a file of any size; empty if it cannot be read."""
    try:
        with open(path, "rb", opener=plain) as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _LAST_BYTES))
            words = file.read(_LAST_BYTES).decode(errors="replace")
    except OSError:
        return ""
    return words.partition("\nExtension modules:")[0][-_LAST_WORDS:]


def process(environment: dict[str, str], job: Any, notes: str, started: float) -> None:
    """The main function of each process; it writes a note about its end."""
    from launch.processes.fork_server import PROCESS
    from launch.rank.entry import RankContext, outcome_of, work

    die_with_parent(PROCESS)
    outlive_readers("stdout", "stderr")
    if isinstance(job, TestJob):
        require_reader()
    collect_garbage()
    # In its own session: Ctrl-C on the terminal then reaches it once, from the launcher.
    os.setsid()
    os.environ.update(environment)
    # Its data-loader workers are its children, as under torchrun, not the fork server's.
    multiprocessing.set_start_method("fork" if sys.platform == "linux" else "spawn", force=True)
    place = launched()
    group = getattr(job, "group", None)
    if group is not None:  # the agent knows only this node
        os.environ.update(group.variables(place))
        place = launched()
    assert place is not None, "the agent sets RANK and the related variables"

    def note(code: int, message: str, trace: str = "", *, said: bool = False) -> None:
        ending = Ending(place.rank, code, message, time.time(), trace, said)
        path = Path(notes, f"{place.rank}.json")
        try:
            _write_whole(path, json.dumps(asdict(ending)))
        except OSError as error:  # the exit code still counts
            tell(f"{message}\nWARNING: {told_of(path, error)}".lstrip())

    def leave_hung(code: int, message: str) -> NoReturn:
        try:
            note(code, message)
        finally:  # without this exit, all ranks would wait for ever
            os._exit(code)

    heartbeat = Heartbeat(rank=place.rank, scratch=Path(notes), started=started)
    context = RankContext(heartbeat, leave_hung, mark=_mark(Path(notes), place.rank))
    with stop_on_signals() as stop:
        if place.rank:
            heartbeat.speak_into_log()
        faulthandler.enable(all_threads=True)
        # The launcher reports a lost peer, after the reason.
        end = outcome_of(
            lambda: work(job, place, stop=stop, context=context),
            context=context,
            silent=(PeerLost,),
        )
        note(end.code, end.message, end.trace, said=place.rank == 0)
        leave(end.code)


def root_cause(
    agent: Agent,
    endings: Sequence[Ending],
    budget_seconds: float,
    node_lost: float | None = None,
) -> Cause:
    """Why the job ended: its exit code, and the message if rank 0 has not printed it yet.

    A process that was killed comes first, then the earliest that failed by itself,
    then one that had to be killed because it did not respond; the loss of a peer is the cause
    only if there is no other.

    Args:
        node_lost: when another node was lost, if one was.
    """
    own = [ending for ending in endings if ending.code not in (0, STOPPED, PEER_LOST)]
    killed = [rank for rank in agent.first_ended if rank.killed_by is not None]
    # NCCL's watchdog aborts a process whose peer is gone: a loss causes no other signal.
    killed.sort(key=lambda rank: rank.killed_by == signal.SIGABRT)
    if killed and killed[0].killed_by == signal.SIGABRT:
        before = min((ending.time for ending in own), default=math.inf)
        if before < killed[0].ended_time:
            return _own_failure(own)
        if node_lost is not None and node_lost < killed[0].ended_time:
            told = f"error: rank {killed[0].number} was aborted, as NCCL does when a peer is gone."
            return Cause(PEER_LOST, told)
    for rank in killed[:1]:
        assert rank.killed_by is not None
        name = signal.Signals(rank.killed_by).name
        told = f"error: rank {rank.number} was killed by {name}."
        return Cause(128 + rank.killed_by, told, rank.number)
    if own:
        return _own_failure(own)
    if agent.overran:
        late = next(rank.number for rank in agent.ranks if rank.ended_by_us)
        return Cause(
            128 + signal.SIGKILL,
            f"error: rank {late} had not stopped {budget_seconds:g} s after the request, so it was "
            "killed; the newest checkpoint is unchanged. Raise faults.stop_budget_seconds.",
            late,
        )
    lost = [f"error: rank {e.rank}: {e.message}" for e in endings if e.code == PEER_LOST]
    noted = {ending.rank for ending in endings}
    silent = [
        rank
        for rank in agent.first_ended
        if rank.ended and (rank.ended_by_us or rank.number not in noted)
    ]
    silent.sort(key=lambda rank: rank.ended in (STOPPED, PEER_LOST))
    for rank in silent[:1]:
        assert rank.ended is not None
        code = 128 - rank.ended if rank.ended < 0 else rank.ended
        follows = rank.ended_by_us or rank.ended in (STOPPED, PEER_LOST)
        told = f"error: rank {rank.number} ended with code {code}."
        told = lost[0] if lost and follows else told
        return Cause(code, told, rank.number)
    if STOPPED in [ending.code for ending in endings]:
        return Cause(STOPPED)
    return Cause(PEER_LOST, lost[0]) if lost else Cause(0)


def _own_failure(own: Sequence[Ending]) -> Cause:
    first = min(own, key=lambda ending: ending.time)
    said = any(ending.said and ending.message == first.message for ending in own)
    told = f"error: rank {first.rank}: {first.message}"
    told = f"{first.trace}\n{told}" if first.trace else told
    return Cause(first.code, "" if said else told, first.rank)


def _write_whole(path: Path, text: str) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    os.replace(partial, path)


def _endings(directory: Path) -> list[Ending]:
    return [Ending(**json.loads(path.read_text())) for path in sorted(directory.glob("*.json"))]
