"""What every process of a job runs: spec, world, task, plan, worker; and what its end is called."""

from __future__ import annotations

import atexit
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from launch.environment import Environment
from launch.process_group import process_group
from service.errors import EvenstepError, Stopped
from service.faults import StopRequest
from service.plan import make_plan
from service.run_directory import RunDirectory
from service.spec import Spec
from service.spec_file import load_spec
from service.task import load_task
from service.worker import run, test_run
from service.world import World, lost_peer


@dataclass(frozen=True)
class Job:
    """What is to be run, as a process receives it."""

    spec: Spec
    runs: Path
    fresh: bool = False
    stop_at: int | None = None

    def again(self, before: str | None) -> Job:
        """The job as it is started after a failure: an earlier run is put aside once.

        Args:
            before: the id of the run when the job was started.
        """
        return replace(self, fresh=self.fresh and self.run_id() == before)

    def run_id(self) -> str | None:
        """The id of the run that is in its place now."""
        directory = RunDirectory(self.runs / self.spec.name)
        return str(directory.read_facts()["id"]) if directory.facts.exists() else None

    def __reduce__(self) -> tuple[Any, ...]:
        # The classes of a spec's optimizers are made when it is imported and have no name that
        # a pickle could find them by.  What travels are plain values, as in a file.
        values = self.spec.model_dump(mode="json", exclude_none=True)
        return _received, (values, self.runs, self.fresh, self.stop_at)

    def work(self, environment: Environment, *, stop: StopRequest) -> None:
        """Run this process's part of the job to its end, or until `stop` is asked for.

        Raises:
            EvenstepError: see `service.worker.run`.
        """
        spec = self.spec
        with _world(spec, environment) as world:
            task = load_task(spec.task, spec.task_args)
            plan = make_plan(
                spec,
                processes=world.processes,
                train_rows=task.train_rows,
                test_rows=task.test_rows,
                stop_at=self.stop_at,
            )
            run(plan, task, world, runs=self.runs, stop=stop, fresh=self.fresh)


def _received(spec: dict[str, Any], runs: Path, fresh: bool, stop_at: int | None) -> Job:
    return Job(load_spec(spec), runs, fresh, stop_at)


@dataclass(frozen=True)
class TestJob:
    """What is to be tested, as a process receives it."""

    run: Path
    checkpoint: str
    predictions: Path | None = None

    @property
    def spec(self) -> Spec:
        """The spec of the run."""
        return load_spec(RunDirectory(self.run).spec)

    def work(self, environment: Environment, *, stop: StopRequest) -> None:
        """Do this process's part of the test; the lead prints the measures.

        Raises:
            EvenstepError: see `service.worker.test_run`.
        """
        stop.interrupt = True  # there is nothing to save
        spec = self.spec
        with _world(spec, environment) as world:
            task = load_task(spec.task, spec.task_args)
            measures = test_run(
                spec,
                task,
                world,
                run=self.run,
                checkpoint=self.checkpoint,
                predictions=self.predictions,
            )
            if world.is_lead:
                print(json.dumps(measures))


@contextmanager
def _world(spec: Spec, environment: Environment) -> Iterator[World]:
    with process_group(
        environment,
        precision=spec.model.precision,
        bitwise=spec.exactness == "bitwise",
        timeout_seconds=spec.faults.hang_timeout_seconds,
    ) as world:
        yield world


class End(NamedTuple):
    """How the work of one process ended."""

    code: int
    message: str = ""
    """For a person."""
    trace: str = ""
    """Where it happened, unless the message says all there is to know."""


def outcome_of(
    work: Callable[[], object], *, rank: int = 0, silent: tuple[type[EvenstepError], ...] = ()
) -> End:
    """Do the work and say how it ended.

    What is equal on all processes is said by rank 0; what happened to one, by that one.

    Args:
        silent: what somebody else knows better how to tell.
    """
    try:
        work()
    except EvenstepError as error:
        return _told(error, rank, silent)
    except KeyboardInterrupt:
        return End(130, "interrupted")
    except Exception as error:
        lost = lost_peer(error)
        if lost is not None:
            return _told(lost, rank, silent)
        traceback.print_exc()
        return End(1, f"{type(error).__name__}: {error}", traceback.format_exc())
    return End(0)


def leave(code: int) -> NoReturn:
    """End this process now, with what is registered for its exit done.

    The interpreter's own way out takes seconds with torch loaded, in which peers wait; and with
    gloo it now and then ends in an abort ("terminate called without an active exception").
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _told(error: EvenstepError, rank: int, silent: tuple[type[EvenstepError], ...]) -> End:
    if rank == 0 and not isinstance(error, silent):
        word = "" if isinstance(error, Stopped) else "error: "
        print(f"{word}{error}", file=sys.stderr, flush=True)
    return End(error.exit_code, str(error))
