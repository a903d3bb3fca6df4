"""The commands that come before a run: `new`, `check` and `doctor`."""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from pathlib import Path

import click

from launch.commands.overrides import overridden
from launch.commands.places import Directory
from launch.processes.warm_start import collect_garbage
from service.recipes import find_recipe
from service.spec.files import Override, load_spec


@click.command()
@click.argument("directory", type=click.Path(path_type=Path, file_okay=False))
def new(directory: Path) -> None:
    """Write a commented task and spec into DIRECTORY, as the start of your own job."""
    from launch.commands.new_job import SPEC, start

    for path in start(directory):
        click.echo(f"wrote {path}")
    spec = directory / SPEC
    where = shlex.quote(str(spec) if spec.is_absolute() else f"./{spec}")
    click.echo(f"next: evenstep check {where}\n      evenstep run {where}")


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
    from launch.environment import Environment
    from launch.rank.entry import RankContext, outcome_of
    from launch.rank.exit import leave, leave_hung
    from launch.rank.process_group import process_group
    from service.health.heartbeat import Heartbeat
    from service.preview.check import checked

    collect_garbage()

    def work() -> None:
        with process_group(Environment(), precision=loaded.model.precision) as world:
            for what, told in checked(loaded, world=world, processes=processes):
                click.echo(f"  {what:<10}  {told}")
        click.echo(f"{loaded.name}: ready to run, found in {time.perf_counter() - begin:.1f} s")

    leave(outcome_of(work, here=RankContext(Heartbeat(), leave_hung)).code)


@click.command()
@click.argument("spec", metavar="[SPEC]", required=False)
@click.option("--processes", metavar="N", type=click.IntRange(min=1), default=2, show_default=True)
@click.option("--runs", type=Directory(), default="runs", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def doctor(spec: str | None, processes: int, runs: Path, as_json: bool) -> None:
    """Check this machine; with SPEC, for that job. Exit 0: fine, 1: warnings, 2: failures."""
    from launch.commands.doctor import Asked, examined, exit_code

    loaded = load_spec(find_recipe(spec)) if spec is not None else None
    findings = []
    for finding in examined(Asked(processes=processes, runs=runs, spec=loaded)):
        findings.append(finding)
        if not as_json:
            click.echo(f"{finding.state:<7}  {finding.name:<11}  {finding.told}")
            if finding.fix:
                click.echo(f"{'':<22}fix: {finding.fix}")
    if as_json:
        click.echo(json.dumps([finding.record() for finding in findings], indent=1))
    sys.exit(exit_code(findings))
