"""N processes on this machine through torch's elastic agent; the root cause's code comes out."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from launch.environment import launched

PEER_LOST = 76
STOPPED = 75


@dataclass(frozen=True)
class Ending:
    """How one process ended, as it said itself."""

    rank: int
    code: int
    message: str
    time: float


def run_locally(job: Any, *, processes: int, grace_seconds: int = 120) -> int:
    """Run the job in `processes` processes; the exit code of the whole.

    The processes are forked from a server that has torch imported, which saves each of them
    the import.  Signals reach them through this launcher alone.
    """
    # The server imports torch while this process imports the agent.
    multiprocessing.get_context("forkserver").set_forkserver_preload(["launch.entry"])
    from multiprocessing import forkserver

    forkserver.ensure_running()
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    _quiet_agent()
    with tempfile.TemporaryDirectory(prefix="evenstep-") as endings:
        config: dict[str, Any] = {
            "min_nodes": 1,
            "max_nodes": 1,
            "nproc_per_node": processes,
            "rdzv_backend": "c10d",
            "rdzv_endpoint": "localhost:0",  # a free port
            "run_id": f"evenstep-{os.getpid()}",
            "max_restarts": 0,
            "monitor_interval": 0.05,
            "start_method": "forkserver",
            "local_addr": "localhost",
        }
        if "shutdown_timeout" in {field.name for field in fields(LaunchConfig)}:
            config["shutdown_timeout"] = grace_seconds  # torch 2.13; its default is 30 s
        killed: dict[int, int] = {}
        try:
            elastic_launch(LaunchConfig(**config), entrypoint=process)(job, endings)
        except ChildFailedError as error:
            killed = {
                rank: -failure.exitcode
                for rank, failure in error.failures.items()
                if failure.exitcode < 0
            }
        except SignalException:
            pass  # handed on to the processes, which have said how they ended
        return root_cause(_endings(Path(endings)), killed, processes)


def process(job: Any, endings: str) -> None:
    """What each process runs; leaves a note of how it ended."""
    from launch.entry import leave, outcome_of

    # In a session of its own: Ctrl-C on the terminal then reaches it once, from the launcher.
    os.setsid()
    environment = launched()
    assert environment is not None, "the elastic agent sets RANK and its kin"
    code, message = outcome_of(lambda: job.work(environment), rank=environment.rank)
    ending = Ending(environment.rank, code, message, time.time())
    Path(endings, f"{environment.rank}.json").write_text(json.dumps(asdict(ending)))
    if code:
        leave(code)


def root_cause(endings: list[Ending], killed: dict[int, int], processes: int) -> int:
    """The exit code of the job, from how its processes ended; says what rank 0 did not say.

    A process that was killed comes first, then the earliest that failed on its own account;
    that a peer was lost is nobody's reason while there is another.
    """
    if killed:
        rank, number = min(killed.items())
        print(f"error: rank {rank} was killed by {signal.Signals(number).name}.", file=sys.stderr)
        return 128 + number
    own = [e for e in endings if e.code not in (0, STOPPED, PEER_LOST)]
    if own:
        first = min(own, key=lambda ending: ending.time)
        if all(ending.rank or ending.message != first.message for ending in own):
            print(f"error: rank {first.rank}: {first.message}", file=sys.stderr)
        return first.code
    codes = {ending.code for ending in endings}
    for code in (STOPPED, PEER_LOST):
        if code in codes:
            return code
    return 0 if len(endings) == processes else 1


def _endings(directory: Path) -> list[Ending]:
    return [Ending(**json.loads(path.read_text())) for path in sorted(directory.glob("*.json"))]


def _quiet_agent() -> None:
    """The agent's own log repeats, in a traceback, what we say in a sentence."""
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.CRITICAL)
