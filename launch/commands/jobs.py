"""The commands that come before a run: `new`, `check` and `doctor`."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
import time
from pathlib import Path

import click

from launch.commands.overrides import overridden
from launch.commands.places import Named, Place, directory_of
from launch.environment import Environment, Node, launched
from launch.processes.warm_start import collect_garbage
from launch.slurm_step import node_asked, step_here
from service.basics.errors import LINES, SpecError, printable
from service.recipes import find_recipe
from service.spec.files import Override, load_spec
from service.storage.address import Address


@click.command()
@click.argument("directory", type=Named(file_okay=False))
def new(directory: Path) -> None:
    """Write a commented task and spec into DIRECTORY, as the start of your own job."""
    from launch.commands.new_job import SPEC, start

    for path in start(directory):
        click.echo(printable(f"wrote {path}"))
    spec = directory / SPEC
    where = shlex.quote(str(spec) if spec.is_absolute() else f"./{spec}")
    click.echo(printable(f"next: evenstep check {where}"))
    click.echo(printable(f"      evenstep run {where}"))


@click.command()
@click.argument("spec", metavar="SPEC")
@overridden
@click.option("--processes", metavar="N", type=click.IntRange(min=1), default=1)
def check(spec: str, overrides: tuple[Override, ...], processes: int) -> None:
    """Run a small part of SPEC: task, one step, test, checkpoint, memory."""
    begin = time.perf_counter()
    loaded = load_spec(find_recipe(spec), overrides=overrides)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    click.echo(f"{loaded.name}: the spec is valid")
    from launch.rank.entry import RankContext, outcome_of, world_of
    from launch.rank.exit import leave, leave_hung
    from service.health.heartbeat import Heartbeat
    from service.preview.check import checked

    collect_garbage()

    def work() -> None:
        with world_of(loaded, Environment()) as world:
            for what, told in checked(loaded, world=world, processes=processes):
                click.echo(f"  {what:<10}  {told}")
        click.echo(f"{loaded.name}: ready to run, found in {time.perf_counter() - begin:.1f} s")

    leave(outcome_of(work, context=RankContext(Heartbeat(), leave_hung)).code)


@click.command()
@click.argument("spec", metavar="[SPEC]", required=False)
@click.option(
    "--processes",
    metavar="N",
    type=click.IntRange(min=1),
    help="Default: 2; with --nodes as in a run.",
)
@click.option("--runs", type=Place(), default="runs", show_default=True)
@click.option(
    "--nodes",
    metavar="N",
    type=click.IntRange(min=2),
    help="Only measure the network between N machines: start it on each, like a run.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def doctor(
    spec: str | None,
    processes: int | None,
    runs: Path | Address,
    nodes: int | None,
    as_json: bool,
) -> None:
    """Check this machine; with SPEC, for that job. Exit 0: fine, 1: warnings, 2: failures.

    Under torchrun: as with --nodes. --runs may be an address in an object store."""
    from launch.commands.doctor import Asked, examined, exit_code

    loaded = load_spec(find_recipe(spec)) if spec is not None else None
    place, node = launched(), None
    if place is not None:
        _require_several(place)
    elif nodes is not None:
        node = _node_among(nodes, processes)
    each = process_count(node.processes) if node is not None else processes or 2
    speaks = place.local_rank == 0 if place is not None else node is None or node.local_index == 0
    store = runs if isinstance(runs, Address) else None
    here = directory_of(runs, loaded.name if loaded is not None else "job")
    findings = []
    for finding in examined(Asked(each, node, place, here, loaded, store)):
        findings.append(finding)
        if speaks and not as_json:
            told = printable(finding.told, keep=LINES)
            click.echo(f"{finding.state:<7}  {finding.name:<11}  {told}")
            if finding.fix:
                click.echo(f"{'':<22}fix: {finding.fix}")
    if speaks and as_json:
        click.echo(json.dumps([finding.record() for finding in findings], indent=1))
    if place is None:
        sys.exit(exit_code(findings))
    from launch.rank.exit import leave

    leave(exit_code(findings))


def process_count(asked: str | None) -> int:
    """The processes on this machine, from what a command was given: a number or `auto`.

    Raises:
        SpecError: it is neither.
    """
    if asked is None:
        return 1
    if asked == "auto":
        import torch

        return max(1, torch.accelerator.device_count())
    if not re.fullmatch(r"0*[1-9][0-9]{0,5}", asked):
        raise SpecError(
            "--processes: must be a whole number, at least 1, or auto, but is "
            f"{printable(asked[:40])}."
        )
    return int(asked)


def _require_several(place: Environment) -> None:
    """Refuse a torchrun on one machine: between its processes there is no network."""
    if place.local_world_size == place.world_size:
        raise SpecError(
            "doctor under torchrun measures the network between machines, but torchrun has "
            "started all processes on this one. Start doctor without torchrun."
        )


def _node_among(nodes: int, processes: int | None) -> Node:
    """This machine among the N of `--nodes`, by the environment as for a run.

    Raises:
        SpecError: the environment says otherwise, or does not say which machine this is.
    """
    given = None if processes is None else str(processes)
    told = "PET_NNODES" in os.environ or step_here() is not None
    node = node_asked(given, None if told else str(nodes))
    assert node is not None, "the number is given"
    machines = node.nodes // node.local_nodes
    if node.least or machines != nodes:
        number = f"{node.least}:{node.nodes}" if node.least else str(machines)
        raise SpecError(
            f"--nodes {nodes}: the environment (PET_NNODES, or Slurm's step) says {number}. doctor "
            "measures between a fixed number of nodes: make them equal."
        )
    return node
