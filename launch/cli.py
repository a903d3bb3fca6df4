"""The `evenstep` command. Only the commands that train import torch."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from launch.commands.checkpoints import checkpoints, export
from launch.commands.engines import ENGINES, accepted_by, commands_of, complain, load_named
from launch.commands.fork import fork
from launch.commands.jobs import check, doctor, new, process_count
from launch.commands.overrides import overridden
from launch.commands.places import Named, Place, directory_of, run_at
from launch.commands.runs import Number, list_runs, report, watch
from launch.commands.sweep import sweep
from launch.environment import (
    Environment,
    Node,
    launched,
    read_secrets,
    torchrun_began,
    torchrun_grace,
    unshared_store_advice,
)
from launch.processes.signals import (
    STARTED,
    hear_interrupts,
    heard,
    stop_listening,
    stop_raises,
)
from launch.processes.terminal import ReaderGone
from launch.processes.warm_start import collect_garbage, end_server
from launch.rank.exit import leave, leave_hung
from launch.rank.job import Job, TestJob
from launch.slurm_step import node_asked, note_exit_code, slurm_grace
from service.basics.errors import LINES, EvenstepError, PeerLost, SpecError, printable
from service.health.stop_request import die_with_parent, stop_on_signals
from service.monitoring.endpoint import metrics_endpoint
from service.plan.changing import Accepted, require_keys
from service.recipes import recipes
from service.runs.directory import RunDirectory, RunInUse, check_run
from service.runs.failure_reports import redacted
from service.spec.files import Override, spec_schema
from service.spec.models import Spec
from service.storage.address import Address

if TYPE_CHECKING:
    from service.plan.plan import Window

_SPEC = click.argument("spec", metavar="SPEC")
_PROCESSES = click.option(
    "--processes",
    metavar="N|auto",
    default=None,
    help="Processes on this machine; auto is one per GPU. Default: 1.",
)
_LEASE_SECONDS = 120.0
"""Longer than NFS keeps the locks of a machine that is gone, 90 s by default on Linux."""


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="evenstep", message="evenstep %(version)s")
@click.pass_context
def evenstep(context: click.Context) -> None:
    """Train and test one job, the same run on one device or on many."""
    hear_interrupts()
    if context.invoked_subcommand not in ("run", "test", "sweep"):
        stop_listening()
    if context.invoked_subcommand not in ("run", "test", "plan", "check"):
        collect_garbage()  # these have more to import first


evenstep.add_command(checkpoints)
evenstep.add_command(export)


@evenstep.command()
@_SPEC
@overridden
@_PROCESSES
@click.option(
    "--runs",
    type=Place(),
    metavar="DIRECTORY|ADDRESS",
    default="runs",
    show_default=True,
    help="Where runs are kept: a directory, or an address such as s3://bucket/prefix.",
)
@click.option("--name", help="Name of the run; the spec's own by default.")
@click.option("--fresh", is_flag=True, help="Move an earlier run of this name aside; start over.")
@click.option(
    "--max-restarts",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    metavar="K",
    help="Restart all processes from the newest checkpoint after a failure, at most K times.",
)
@click.option(
    "--elastic",
    is_flag=True,
    help="Restart with one process fewer each time; with exactness=bitwise, with half.",
)
@click.option(
    "--nodes",
    metavar="N|LEAST:MOST",
    help="Machines of the job, as PET_NNODES; with a range it continues when some leave or join.",
)
@click.option(
    "--change", is_flag=True, help="Let KEY=VALUE change a run that has begun; it is recorded."
)
@click.option("--accept-changes", is_flag=True, help="The same for all differences in SPEC.")
@click.option(
    "--accept", multiple=True, metavar="KEY", help="The same for this key or section only."
)
@click.option("--stop-at", type=click.IntRange(min=1), metavar="STEP", help="Save, then stop.")
@click.option(
    "--profile", metavar="START:STEPS", help="Trace these steps and show where the time is spent."
)
def run(
    spec: str,
    overrides: tuple[Override, ...],
    processes: str | None,
    runs: Path | Address,
    name: str | None,
    fresh: bool,
    max_restarts: int,
    elastic: bool,
    nodes: str | None,
    stop_at: int | None,
    profile: str | None,
    **accepting: Any,
) -> None:
    """Train and test SPEC: a file, or the name of a recipe. The same command resumes the run."""
    place = launched()
    if place is not None and processes is not None:
        raise SpecError("--processes: torchrun has already started the processes; leave it out.")
    node = node_asked(processes, nodes) if place is None else None
    asked = process_count(node.processes if node else processes)
    _check_restarts(place, node, max_restarts, elastic=elastic)
    window = _window(profile)
    named = _name_in_sweep(spec, overrides) if name is None else name
    loaded = load_named(spec, overrides, named)
    os.environ.update(read_secrets())
    accepted = _accepted(loaded, overrides, fresh=fresh, **accepting)
    given = torchrun_grace() if place is not None else slurm_grace(loaded)
    if fresh and place is not None and place.rank == 0:  # which decides for all
        fresh = not _begun_by_torchrun(runs, loaded)

    def job_in(directory: Path) -> Job:
        if node is None or node.index == 0:
            _tell_allowance(RunDirectory(directory / loaded.name))
        if place is None or place.rank == 0:
            _check(directory, loaded, node, fresh=fresh, accepted=accepted)
        return Job(
            loaded,
            directory,
            fresh=fresh,
            stop_at=stop_at,
            profile=window,
            grace=given,
            accepted=accepted,
            own_disks=isinstance(runs, Address),
            place=str(runs),
        )

    starting: dict[str, Any] = {
        "processes": asked,
        "max_restarts": max_restarts,
        "elastic": elastic,
    }
    if isinstance(runs, Address):
        _start_in_store(job_in, runs, loaded, place, node, fresh=fresh, **starting)
    job = job_in(runs.absolute())
    if node is not None and node.nodes > 1:
        from launch.nodes.node import run_node

        leave(note_exit_code(run_node(job, node, processes=asked)))
    _start(job, place, **starting, echoed_logs=job.directory().logs if node else None)


def _begun_by_torchrun(runs: Path | Address, spec: Spec) -> bool:
    """Whether the run was begun by the torchrun that has now restarted this process.

    `--fresh` moves an earlier run aside only once, but torchrun repeats the command.
    """
    if isinstance(runs, Address):
        from service.storage.scratch import scratch_runs

        runs = scratch_runs(runs / spec.name)
    began = torchrun_began()
    directory = RunDirectory(runs / spec.name)
    if began is None or not os.path.exists(directory.facts):  # opening it reports the reason
        return False
    # A run of the future is an earlier one, of a machine with another time.
    created: float = directory.read_facts()["created"]
    return began <= created <= time.time()


def _check_restarts(
    place: Environment | None, node: Node | None, max_restarts: int, *, elastic: bool
) -> None:
    """Refuse restarts that this command would not make.

    Raises:
        SpecError: names what restarts the job instead.
    """
    if elastic and not max_restarts:
        raise SpecError("--elastic: nothing is restarted without --max-restarts K; add it.")
    if max_restarts and place is not None:
        raise SpecError(
            "--max-restarts: torchrun has started the processes, so it restarts them. Give the "
            "option to torchrun."
        )
    if max_restarts and node is not None and node.nodes > 1:
        raise SpecError(
            f"--max-restarts: it is for one node, and this is one of {node.nodes}. Leave it out: a "
            "cluster restarts them (kubernetes.restarts, slurm.restarts), and with --nodes "
            "LEAST:MOST the job goes on when a node is lost."
        )


def _start_in_store(
    job_in: Callable[[Path], Job],
    address: Address,
    spec: Spec,
    place: Environment | None,
    node: Node | None,
    *,
    fresh: bool,
    **starting: Any,
) -> NoReturn:
    """Bring the run of an address here, train it in processes, upload it; exit with their code."""
    from launch.stored.in_store import followed, kept_in_store, require_supported, say, uploaded
    from launch.stored.under_torchrun import (
        on_several,
        seconds_to_stop,
        train_in_child,
        trained_in,
        when_connected,
    )
    from service.health.stop_budget import budget_seconds, grace_periods

    require_supported(address, spec, place, node)
    if place is not None:
        if (runs := trained_in(address / spec.name, place)) is not None:
            connected = when_connected(address / spec.name, place, say=say)
            _start(job_in(runs), place, **starting, when_connected=connected)
        die_with_parent()
    several = on_several(place) if place else node is not None and node.nodes > 1
    if node is not None and several and node.index > 0:
        from launch.nodes.node import run_node

        following = followed(address, spec, node)
        job, processes = job_in(following.runs), starting["processes"]
        leave(note_exit_code(run_node(job, node, processes=processes, following=following)))
    held = kept_in_store(address, spec, fresh=fresh, several=several)
    with _started_again(node), held as uploading:
        job = job_in(uploading.runs)

    def train() -> int:
        if place is not None:
            return train_in_child(uploading.runs)
        if node is not None and several:
            from launch.nodes.node import run_node
            from launch.stored.leading import Leading

            leading = Leading(uploading, say=say)
            return run_node(job, node, processes=starting["processes"], leading=leading)
        return _in_processes(job, echoed_logs=job.directory().logs if node else None, **starting)

    code = uploaded(
        address / spec.name,
        uploading,
        train,
        budget_seconds=(
            seconds_to_stop if place else lambda: budget_seconds(spec, job.directory())
        ),
        is_fixed=place is not None or spec.faults.stop_budget_seconds != "auto",
        grace_periods=grace_periods(spec, launcher=job.grace),
    )
    leave(note_exit_code(code))


@evenstep.command()
@click.argument("run", type=Place())
@overridden
@click.option("--checkpoint", default="latest", metavar="best|latest|STEP", show_default=True)
@click.option(
    "--predictions",
    type=Named(),
    metavar="FILE",
    help="Write them as .npy, or with row ids and targets as .csv, .parquet or .safetensors.",
)
@click.option("--data", metavar="NAME", help="One of several test sets. Default: all.")
@_PROCESSES
def test(
    run: Path | Address,
    overrides: tuple[Override, ...],
    checkpoint: str,
    predictions: Path | None,
    data: str | None,
    processes: str | None,
) -> None:
    """Test a checkpoint of RUN, a directory or a name in ./runs, on any number of processes.

    KEY=VALUE changes the spec for this test only: other rows, or new paths of files."""
    place = launched()
    asked = process_count(processes)

    def job_of(found: RunDirectory) -> TestJob:
        found.read_spec(overrides)  # an error is reported here, once
        path, place = found.path.absolute(), str(run)
        return TestJob(path, checkpoint, predictions, overrides, data, place)

    if isinstance(run, Address) and place is not None:
        from launch.stored.copied import copy_of

        die_with_parent()
        found = copy_of(run, place, checkpoint=checkpoint, say=complain)
        _start(job_of(found), place, processes=asked)
    with ExitStack() as until_the_end:
        with stop_raises("the test"):
            found = until_the_end.enter_context(run_at(run, checkpoint=checkpoint))
        job = job_of(found)
        if not isinstance(run, Address):
            _start(job, place, processes=asked)
        code = _in_processes(job, processes=asked)  # so that the copy can be removed afterwards
    leave(code)


def _start(
    job: Job | TestJob,
    place: Environment | None,
    *,
    processes: int,
    max_restarts: int = 0,
    elastic: bool = False,
    echoed_logs: Path | None = None,
    when_connected: Callable[[], None] | None = None,
) -> NoReturn:
    """Run this rank, or start `processes` ranks; exit with their code.

    This command also prints what the other ranks write to `echoed_logs`, for the log of a pod.
    For `when_connected` see `RankContext`.
    """
    if place is None and (processes > 1 or max_restarts):
        leave(
            _in_processes(
                job,
                processes=processes,
                max_restarts=max_restarts,
                elastic=elastic,
                echoed_logs=echoed_logs,
            )
        )
    if place is not None:
        die_with_parent()
        if place.rank == 0 and "TORCHELASTIC_RUN_ID" in os.environ:
            click.echo(
                "Started by torchrun: a request to stop, and its save, may take "
                f"{torchrun_grace().seconds:g} s, which is its --shutdown-timeout; "
                "faults.stop_budget_seconds has no effect.",
                err=True,
            )
            if (advice := unshared_store_advice()) is not None:
                complain(advice)
    end_server()  # `auto` may have found only one device
    from launch.rank.entry import RankContext, outcome_of, work
    from service.health.heartbeat import Heartbeat

    collect_garbage()
    environment = place or Environment()
    heartbeat = Heartbeat(rank=environment.rank, started=STARTED)
    context = RankContext(heartbeat, leave_hung, when_connected=when_connected)
    first = environment.rank - environment.local_rank
    ranks = range(first, first + environment.local_world_size)
    with stop_on_signals(heard) as stop:
        with nullcontext() if environment.local_rank else _endpoint(job, ranks):
            end = outcome_of(
                lambda: work(job, environment, stop=stop, context=context), context=context
            )
        leave(end.code)


def _in_processes(
    job: Job | TestJob,
    *,
    processes: int,
    max_restarts: int = 0,
    elastic: bool = False,
    echoed_logs: Path | None = None,
) -> int:
    """Run the job in processes of this launcher; the exit code of the whole."""
    from launch.processes.echo import echoed
    from launch.processes.local import run_locally

    ranks = range(1, processes) if echoed_logs else ()
    echo = echoed(echoed_logs or Path(), ranks, complain)
    with _endpoint(job, range(processes)), echo:
        return run_locally(job, processes=processes, max_restarts=max_restarts, elastic=elastic)


def _endpoint(job: Job | TestJob, ranks: range) -> AbstractContextManager[None]:
    """The metrics endpoint of this launcher, if the spec of the run asks for one."""
    if isinstance(job, TestJob):
        return nullcontext()
    run = job.runs / job.spec.name
    return metrics_endpoint(job.spec, run, ranks=ranks, started=STARTED, say=complain)


@evenstep.command()
@click.argument("run_a", type=Place())
@click.argument("run_b", type=Place())
@click.option(
    "--level", type=click.Choice(["rows", "losses", "bits"]), default="losses", show_default=True
)
@click.option("--tolerance", type=Number(min=0), default=1e-3, show_default=True, help="Of losses.")
def verify(run_a: Path | Address, run_b: Path | Address, level: str, tolerance: float) -> None:
    """Check that two runs took the same steps, or name the first step that differs (exit 1)."""
    from service.runs.verification import compare

    with run_at(run_a) as one, run_at(run_b) as other:
        compared = compare(one, other, level=level, tolerance=tolerance)
    click.echo("\n".join(map(printable, compared.lines)))
    sys.exit(0 if compared.equal else 1)


@evenstep.command()
@_SPEC
@overridden
@_PROCESSES
@click.option("--runs", type=Place(), default="runs", show_default=True)
def plan(
    spec: str, overrides: tuple[Override, ...], processes: str | None, runs: Path | Address
) -> None:
    """Show the plan of SPEC: rows, steps, shares, rates, parameter groups. Needs no GPU."""
    loaded = load_named(spec, overrides, None)
    from service.preview.plan import planned

    collect_garbage()
    here = directory_of(runs, loaded.name).absolute()
    click.echo(planned(loaded, processes=process_count(processes), runs=here))


@evenstep.command(name="recipes")
def list_recipes() -> None:
    """List the jobs that come with the package."""
    found = recipes()
    width = max(len(name) for name in found)
    for name, about in found.items():
        click.echo(f"{name:{width}}  {about}")


@evenstep.command()
@click.option("--page", is_flag=True, help="Print a Markdown page instead.")
def schema(page: bool) -> None:
    """Print the JSON Schema of a spec, for editors."""
    if page:
        from service.plan.changing import changes_page
        from service.spec.page import spec_page

        click.echo(f"{spec_page(spec_schema())}{changes_page()}".rstrip())
    else:
        click.echo(json.dumps(spec_schema(), indent=2))


for _command in (new, check, doctor, fork, list_runs, report, sweep, watch):
    evenstep.add_command(_command)


for _engine in ENGINES:
    evenstep.add_command(commands_of(_engine))


def _name_in_sweep(spec: str, overrides: tuple[Override, ...]) -> str | None:
    """A name for each run of a W&B sweep: all share one spec, and none may resume another.

    The agent restarts a preempted run with the same id, so it gets the same name and resumes.
    """
    run_id = os.environ.get("WANDB_RUN_ID")
    if run_id is None or "WANDB_SWEEP_ID" not in os.environ:
        return None
    return f"{load_named(spec, overrides, None).name}-{run_id}"


def _check(
    directory: Path, spec: Spec, node: Node | None, *, fresh: bool, accepted: Accepted
) -> None:
    """Report the errors of a run before anything starts.

    Raises:
        SpecError: see `check_run`.
    """
    check = partial(check_run, directory, spec, fresh=fresh, accepted=accepted)
    if node is not None and node.index > 0:
        if not node.least:  # else the run may be going on without this node, and with other changes
            check(lock_seconds=None)  # node 0 writes it, and may still save for the lost node
        return
    try:
        check()
    except RunInUse as error:
        # A cluster starts a lost node again; the file server keeps its locks until a lease ends.
        if node is None or not node.returns:
            raise
        complain(f"{error} Waiting up to {_LEASE_SECONDS:g} s, in case it is a node that was lost.")
        with _started_again(node):
            check(lock_seconds=_LEASE_SECONDS)


@contextmanager
def _started_again(node: Node | None) -> Iterator[None]:
    """A context in which a run that is in use does not end the job of a cluster.

    Its writer is an earlier pod of this node then, on a machine that only the cluster has lost.

    Raises:
        PeerLost: the run is in use; the cluster starts the pod again, as often as it must.
    """
    try:
        yield
    except RunInUse as error:
        if node is None or not node.returns:
            raise
        raise PeerLost(f"{error} Until then the cluster starts this pod again.") from error


def _tell_allowance(directory: RunDirectory) -> None:
    """Print how long Slurm lets this attempt run, if known."""
    if "SLURM_JOB_ID" not in os.environ:
        return
    from launch.engines.slurm.allowance import allowance

    told = allowance(directory)
    if told is not None:
        complain(told)


def _accepted(
    spec: Spec,
    overrides: tuple[Override, ...],
    *,
    fresh: bool,
    change: bool,
    accept_changes: bool,
    accept: tuple[str, ...],
) -> Accepted:
    if fresh and (change or accept_changes or accept):
        which = "--change" if change else "--accept-changes" if accept_changes else "--accept"
        raise SpecError(
            f"{which}: --fresh starts a new run, for which changes need not be accepted."
        )
    require_keys(accept, spec, option="--accept")
    asked = accepted_by(overrides, change=change, accept_changes=accept_changes)
    return Accepted((*asked.keys, *accept), everything=asked.everything)


def _window(profile: str | None) -> Window | None:
    if profile is None:
        return None
    from service.plan.plan import window_of

    return window_of(profile)


def main() -> None:
    """Run the command; every user error ends with one message and exit code 64."""
    try:
        try:
            evenstep.main(prog_name="evenstep", standalone_mode=False)
        finally:
            sys.stdout.flush()
    except ReaderGone as gone:
        sys.exit(gone.exit_code)
    except click.exceptions.Exit as ended:
        sys.exit(ended.exit_code)
    except click.exceptions.Abort:
        sys.exit(130)
    except click.exceptions.NoArgsIsHelpError as mistake:
        click.echo(mistake.format_message(), err=True)
        sys.exit(SpecError.exit_code)
    except click.ClickException as mistake:
        if _reports_errors():
            message = printable(mistake.format_message(), keep=LINES)
            click.echo(f"error: {message}{_without_dashes(mistake)}", err=True)
        sys.exit(note_exit_code(SpecError.exit_code))
    except EvenstepError as error:
        if _reports_errors():
            click.echo(f"error: {printable(redacted(str(error)), keep=LINES)}", err=True)
        sys.exit(note_exit_code(error.exit_code))


def _reports_errors() -> bool:
    """Whether this process prints errors that all processes have in common."""
    try:
        place = launched()
    except SpecError:
        return True  # this is the error
    return place is None or place.local_rank == 0  # another machine may have another error


def _without_dashes(mistake: click.ClickException) -> str:
    """A hint for an override that is written like an option."""
    if not isinstance(mistake, click.NoSuchOption):
        return ""
    key = mistake.option_name.removeprefix("--")
    if key.partition(".")[0] not in Spec.model_fields:
        return ""
    return f" To change a key of the spec, write {key}=VALUE, without dashes."
