"""What every process of a job runs: spec, world, task, plan, worker; and what its end is called."""

from __future__ import annotations

import atexit
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from launch.environment import Environment, Group
from launch.process_group import process_group
from service.errors import EvenstepError, OutOfMemory, PeerLost, SpecError, Stopped
from service.failures import write_failure
from service.faults import StoppedEarly, StopRequest
from service.fitting import settled
from service.hangs import Leave, watched
from service.plan import Plan, make_plan
from service.profiling import Window
from service.pulse import Pulse
from service.run_directory import RunDirectory
from service.spec import Spec
from service.spec_file import load_spec
from service.stopping import Grace, graces
from service.task import load_task
from service.worker import run, test_run
from service.world import World, is_out_of_memory, lost_peer


@dataclass(frozen=True)
class Here:
    """This process, as those who look after it know it."""

    pulse: Pulse
    leave: Leave
    """Ends it at once, when its main thread cannot."""

    def watched(self, spec: Spec, environment: Environment) -> AbstractContextManager[None]:
        """While it lasts, this process is reported and ended when it stands still."""
        return watched(
            self.pulse,
            processes=environment.world_size,
            timeout_seconds=spec.faults.hang_timeout_seconds,
            startup_timeout_seconds=spec.faults.startup_timeout_seconds,
            leave=self.leave,
        )


@dataclass(frozen=True)
class Job:
    """What is to be run, as a process receives it."""

    spec: Spec
    runs: Path
    fresh: bool = False
    stop_at: int | None = None
    group: Group | None = None
    """The processes of all nodes, where there are several."""
    profile: Window | None = None
    """The steps to trace."""
    grace: Grace | None = None
    """What the launcher gives a stop, where it is not our own."""

    def again(self, before: str | None) -> Job:
        """The job as it is started after a failure: an earlier run is put aside once.

        Args:
            before: the id of the run when the job was started.
        """
        return replace(self, fresh=self.fresh and self.run_id() == before)

    def directory(self) -> RunDirectory:
        """Where the run is kept."""
        return RunDirectory(self.runs / self.spec.name)

    def run_id(self) -> str | None:
        """The id of the run that is in its place now; None where none can be read."""
        try:
            return str(self.directory().read_facts()["id"])
        except SpecError:
            return None  # whether that is a mistake, opening the run decides

    def __reduce__(self) -> tuple[Any, ...]:
        # The classes of a spec's optimizers are made when it is imported and have no name that
        # a pickle could find them by.  What travels are plain values, as in a file.
        values = self.spec.model_dump(mode="json", exclude_none=True)
        rest = (self.fresh, self.stop_at, self.group, self.profile, self.grace)
        return _received, (values, self.runs, *rest)

    def work(self, environment: Environment, *, stop: StopRequest, here: Here) -> None:
        """Run this process's part of the job to its end, or until `stop` is asked for.

        Raises:
            EvenstepError: see `service.worker.run`.
        """
        spec = self.spec
        watched_here = here.watched(spec, environment)
        with stop.followed_at_once(), watched_here, _world(spec, environment) as world:
            task = load_task(spec.task, spec.task_args, seed=spec.seed)
            spec = settled(
                spec,
                task=task,
                world=world,
                runs=self.runs,
                fresh=self.fresh,
                processes_here=environment.local_world_size,
                say=print,
            )
            plan = make_plan(
                spec,
                processes=world.processes,
                train_rows=task.train_rows,
                test_rows=task.test_rows,
                stop_at=self.stop_at,
            )
            try:
                run(
                    plan,
                    task,
                    world,
                    runs=self.runs,
                    stop=stop,
                    fresh=self.fresh,
                    pulse=here.pulse,
                    profile=self.profile,
                    graces=graces(spec, launcher=self.grace),
                )
            except (RuntimeError, MemoryError) as error:
                if is_out_of_memory(error):
                    raise _out_of_memory(plan, error) from error
                raise


def _received(spec: dict[str, Any], *rest: Any) -> Job:
    return Job(load_spec(spec), *rest)


@dataclass(frozen=True)
class TestJob:
    """What is to be tested, as a process receives it."""

    run: Path
    checkpoint: str
    predictions: Path | None = None

    def directory(self) -> RunDirectory:
        """Where the run is kept."""
        return RunDirectory(self.run)

    @property
    def spec(self) -> Spec:
        """The spec of the run."""
        return load_spec(RunDirectory(self.run).spec)

    def work(self, environment: Environment, *, stop: StopRequest, here: Here) -> None:
        """Do this process's part of the test; the lead prints the measures.

        Raises:
            EvenstepError: see `service.worker.test_run`.
        """
        stop.interrupt = True  # there is nothing to save
        spec = self.spec
        with _world(spec, environment) as world:
            task = load_task(spec.task, spec.task_args, seed=spec.seed)
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
        timeout_seconds=_collective_timeout(spec),
    ) as world:
        yield world


def _collective_timeout(spec: Spec) -> float:
    """Beyond the hang watch, which explains: torch's own limit names neither rank nor line."""
    return 60.0 + 2 * max(spec.faults.hang_timeout_seconds, spec.faults.startup_timeout_seconds)


def _out_of_memory(plan: Plan, error: BaseException) -> OutOfMemory:
    """What happened, and what would fit."""
    smaller = max(1, plan.micro_batch // 2)
    advice = (
        f"batch.micro_batch={smaller} halves what the rows of one pass take (now "
        f"{plan.micro_batch} rows); a step stays {plan.global_batch} rows."
        if plan.micro_batch > 1
        else "A micro-batch is one row already: take a smaller model."
    )
    told = str(error).splitlines()[0]
    if plan.spec.model.precision == "fp32":
        advice += " model.precision=bf16 halves what they take as well."
    return OutOfMemory(f"Out of memory: {told}. {advice}")


class End(NamedTuple):
    """How the work of one process ended."""

    code: int
    message: str = ""
    """For a person."""
    trace: str = ""
    """Where it happened, unless the message says all there is to know."""


def outcome_of(
    work: Callable[[], object],
    *,
    here: Here,
    silent: tuple[type[EvenstepError], ...] = (),
) -> End:
    """Do the work and say how it ended; a failure of this process's own is reported to a file.

    What is equal on all processes is said by rank 0; what happened to one, by that one.

    Args:
        silent: what somebody else knows better how to tell.
    """
    try:
        work()
    except EvenstepError as error:
        return _told(error, here, silent)
    except StoppedEarly as told:
        return _told(Stopped(str(told)), here, silent)
    except KeyboardInterrupt:
        return End(130, "interrupted")
    except Exception as error:
        lost = lost_peer(error)
        if lost is not None:
            return _told(lost, here, silent)
        traceback.print_exc()
        message = f"{type(error).__name__}: {error}"
        _report(here, message)
        return End(1, message, traceback.format_exc())
    return End(0)


def leave(code: int) -> NoReturn:
    """End this process now, with what is registered for its exit done.

    The interpreter's own way out takes seconds with torch loaded, in which peers wait; and with
    gloo it now and then ends in an abort ("terminate called without an active exception").
    """
    atexit._run_exitfuncs()
    with suppress(OSError):  # who reads it is gone, or its disk is full: the code still counts
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def leave_hung(code: int, message: str) -> NoReturn:
    """End this process from another thread than the one that hangs, which may hold any lock."""
    os.write(2, f"error: {message}\n".encode(errors="replace"))
    os._exit(code)


def _told(error: EvenstepError, here: Here, silent: tuple[type[EvenstepError], ...]) -> End:
    if here.pulse.rank == 0 and not isinstance(error, silent):
        word = "" if isinstance(error, Stopped) else "error: "
        print(f"{word}{error}", file=sys.stderr, flush=True)
    if not isinstance(error, Stopped | PeerLost | SpecError):
        _report(here, str(error))
    return End(error.exit_code, str(error))


def _report(here: Here, message: str) -> None:
    """Called where an exception is handled: leave its traceback with the run, if there is one."""
    if here.pulse.failures is not None:
        told = {"kind": "failure", "message": message, "stacks": traceback.format_exc()}
        write_failure(here.pulse.failures, here.pulse.record() | told)
