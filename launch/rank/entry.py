"""The main function of every process of a job, and the report of its end."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from launch.environment import Environment
from launch.rank.exit import end_in_time
from launch.rank.job import Job, TestJob
from launch.rank.joining import on_one_node
from launch.rank.network import measured
from launch.rank.process_group import process_group, stay_near_device
from launch.rank.same_command import require_same_command
from service.basics.errors import (
    LINES,
    EvenstepError,
    OutOfMemory,
    PeerLost,
    SpecError,
    Stopped,
    is_out_of_memory,
    printable,
)
from service.data.in_memory import bytes_on_device
from service.data.task import files_may_have_moved, load_task, sampling_of
from service.distributed.world import World, backend_advice, lost_peer
from service.health.heartbeat import Heartbeat
from service.health.stop_budget import grace_periods
from service.health.stop_request import StoppedEarly, StopRequest
from service.health.watchdog import Leave, watched
from service.optimization.precision import convolutions_timed
from service.plan.plan import Plan, make_plan
from service.runs.failure_reports import redacted, write_failure
from service.spec.models import Spec
from service.training.batch_size_finder import settled
from service.training.setup import together
from service.training.worker import run, test_run

# Keep exceptions until the process exits, with the objects in their frames: freeing a loader
# waits for each of its workers, which may be blocked at a row forever.
_KEPT: list[BaseException] = []


@dataclass(frozen=True)
class RankContext:
    """The objects that watch this process."""

    heartbeat: Heartbeat
    leave: Leave
    """Kills it immediately, if its main thread cannot exit."""
    mark: Path | None = None
    """The file for the reason of a kill, for a launcher that reads it."""
    when_connected: Callable[[], None] | None = None
    """Called before the run is opened, when all processes of the job have connected. On each of
    them, or on none; what it raises is raised on all."""

    def watched(self, spec: Spec, environment: Environment) -> AbstractContextManager[None]:
        """A context in which the watchdog reports and kills this process if it hangs."""
        return watched(
            self.heartbeat,
            processes=environment.world_size,
            timeout_seconds=spec.faults.hang_timeout_seconds,
            startup_timeout_seconds=spec.faults.startup_timeout_seconds,
            hook_timeout_seconds=spec.faults.hook_timeout_seconds,
            leave=self.leave,
            mark=self.mark,
        )


def work(
    job: Job | TestJob, environment: Environment, *, stop: StopRequest, context: RankContext
) -> None:
    """Run this process's part of the job.

    Raises:
        EvenstepError: see `train` and `test`.
    """
    if isinstance(job, TestJob):
        test(job, environment, stop=stop)
    else:
        train(job, environment, stop=stop, context=context)


def train(job: Job, environment: Environment, *, stop: StopRequest, context: RankContext) -> None:
    """Train this process's part of the job to its end, or until a request to stop.

    Raises:
        EvenstepError: see `service.training.worker.run`.
    """
    spec = job.spec
    watched = context.watched(spec, environment)
    entered = world_of(spec, environment, own_disks=job.own_disks)
    with stop.followed_at_once(), watched, entered as world:
        world.leave_limits_to_the_watchdog()
        require_same_command(job, world)
        if context.when_connected is not None:
            together(world, context.when_connected)
        if not on_one_node(environment):
            network = measured(world, processes_here=environment.local_world_size)
            if world.is_lead:
                print(f"Network: {network.told}", flush=True)
        task = load_task(spec.task, spec.task_args, seed=spec.seed)
        spec = settled(
            spec,
            task=task,
            world=world,
            runs=job.runs,
            fresh=job.fresh,
            processes=max(world.processes, environment.most_processes),
            processes_here=environment.local_world_size,
            say=print,
        )
        stay_near_device(world, environment)
        plan = make_plan(
            spec,
            processes=world.processes,
            train_rows=task.train_rows,
            test_rows=task.test_rows,
            stop_at=job.stop_at,
            profile=job.profile,
            accepted=job.accepted,
            sampling=sampling_of(task),
        )
        try:
            run(
                plan,
                task,
                world,
                runs=job.runs,
                stop=stop,
                fresh=job.fresh,
                heartbeat=context.heartbeat,
                grace_periods=grace_periods(spec, launcher=job.grace),
            )
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                raise _out_of_memory(plan, error) from error
            raise


def test(job: TestJob, environment: Environment, *, stop: StopRequest) -> None:
    """Run this process's part of the test; rank 0 prints the measures.

    Raises:
        EvenstepError: see `service.training.worker.test_run`.
    """
    stop.interrupts_from_now_on()  # there is nothing to save
    spec = job.spec
    with world_of(spec, environment) as world:
        require_same_command(job, world)
        with files_may_have_moved():
            task = load_task(spec.task, spec.task_args, seed=spec.seed)
        measures = test_run(
            spec,
            task,
            world,
            run=job.run,
            checkpoint=job.checkpoint,
            predictions=job.predictions,
            data=job.data,
        )
        if world.is_lead:
            print(json.dumps(measures), flush=True)


@contextmanager
def world_of(spec: Spec, environment: Environment, *, own_disks: bool = False) -> Iterator[World]:
    """A context with the processes of a job, each of which computes as the spec says."""
    timed = convolutions_timed(spec.model.cudnn_benchmark)
    with (
        timed,
        process_group(
            environment,
            precision=spec.model.precision,
            bitwise=spec.exactness == "bitwise",
            timeout_seconds=_collective_timeout(spec),
            own_disks=own_disks,
        ) as world,
    ):
        yield world


def _collective_timeout(spec: Spec) -> float:
    """Longer than the watchdog's timeout: torch's timeout names neither rank nor line."""
    return 60.0 + 2 * max(spec.faults.hang_timeout_seconds, spec.faults.startup_timeout_seconds)


def _out_of_memory(plan: Plan, error: BaseException) -> OutOfMemory:
    """The message: what happened, and which size would fit."""
    smaller = max(1, plan.micro_batch // 2)
    advice = (
        f"batch.micro_batch={smaller} halves the memory that the rows of one pass take (now "
        f"{plan.micro_batch} rows); a step stays {plan.global_batch} rows."
        if plan.micro_batch > 1
        else "A micro-batch has only one row: use a smaller model."
    )
    told = str(error).splitlines()[0]
    if plan.spec.model.precision == "fp32":
        advice += " model.precision=bf16 halves this memory too."
    if resident := bytes_on_device():
        advice += (
            f" Rows kept on the device take {resident / 2**20:,.0f} MiB of it; rows whose data set "
            f"is not a TensorDataset stay on the host."
        )
    return OutOfMemory(f"Out of memory: {told}. {advice}")


class End(NamedTuple):
    """How the work of one process ended."""

    code: int
    message: str = ""
    """For the user."""
    trace: str = ""
    """The traceback, unless the message is complete."""


def outcome_of(
    work: Callable[[], object],
    *,
    context: RankContext,
    silent: tuple[type[EvenstepError], ...] = (),
) -> End:
    """Run the work and return how it ended; a failure of this process is written to a file.

    After a failure, the process has little time to exit.
    An error that is equal on all processes is printed by rank 0; an error of one process, by
    itself.

    Args:
        silent: errors that another process reports better.
    """
    try:
        work()
    except EvenstepError as error:
        return _told(error, context, silent)
    except StoppedEarly as told:
        return _told(Stopped(str(told)), context, silent)
    except KeyboardInterrupt as error:
        _let_leave(error, 130)
        return End(130, "interrupted")
    except (Exception, SystemExit) as error:
        lost = lost_peer(error)
        if lost is not None:
            return _told(lost, context, silent)
        _let_leave(error, 1)
        # Exceptions of the user's code may contain secrets: the log of a pod is read by many
        # people.
        advice = backend_advice(error)
        if isinstance(error, SystemExit):
            advice = " (the task called sys.exit; it must raise an error, or return)"
        message = str(redacted(f"{type(error).__name__}: {error}{advice}"))
        trace = str(redacted(traceback.format_exc()))
        print(
            trace, f"{advice[1:]}\n" if advice else "", sep="", end="", file=sys.stderr, flush=True
        )
        _report(context, message)
        return End(1, message, trace)
    return End(0)


def _told(
    error: EvenstepError, context: RankContext, silent: tuple[type[EvenstepError], ...]
) -> End:
    _let_leave(error, error.exit_code)
    message = printable(str(redacted(str(error))), keep=LINES)
    if context.heartbeat.rank == 0 and not isinstance(error, silent):
        word = "" if isinstance(error, Stopped) else "error: "
        print(f"{word}{message}", file=sys.stderr, flush=True)
    if not isinstance(error, Stopped | PeerLost | SpecError):
        _report(context, message)
    return End(error.exit_code, message)


def _let_leave(error: BaseException, code: int) -> None:
    _KEPT.append(error)
    end_in_time(code)


def _report(context: RankContext, message: str) -> None:
    """Called while an exception is handled: write its traceback to the run, if there is one."""
    if context.heartbeat.failures is not None:
        told = {"kind": "failure", "message": message, "stacks": traceback.format_exc()}
        write_failure(context.heartbeat.failures, context.heartbeat.record() | told)
