"""The commands that show runs: `runs` and `report`.  No torch."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from launch.commands.places import Directory
from service.basics.errors import SpecError, printable

if TYPE_CHECKING:
    from service.runs.history import History

_WIDEST = 120  # characters of a cell, so that one run does not widen the whole table


@click.command()
@click.argument("runs", metavar="RUN...", type=Directory(), nargs=-1, required=True)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    default="report.html",
    show_default=True,
)
def report(runs: tuple[Path, ...], output: Path) -> None:
    """Write one HTML page about RUNs: directories, or names in ./runs. Needs no network.

    For a directory of `evenstep sweep`: all its runs, and each setting's mean and deviation."""
    from service.observability.report import write_report
    from service.observability.sweeps import in_lines, read_sweep, rows_of, table_of
    from service.runs.history import read_history

    sweeps, histories = [], []
    for run in runs:
        place = _sweep_at(run)
        if place is None:
            histories.append(read_history(run))
        else:
            sweeps.append(read_sweep(place))
            histories += sweeps[-1].histories
    if not histories:
        raise SpecError(f"{sweeps[0].path}: no run of this sweep has started yet.")
    write_report(histories, output, sweeps=sweeps)
    for sweep in sweeps:
        click.echo("\n".join(map(printable, in_lines(*table_of(rows_of(sweep))))))
    names = ", ".join(printable(history.name) for history in histories)
    click.echo(f"{printable(str(output))}: {names}")


def _sweep_at(path: Path) -> Path | None:
    """The directory of a sweep: this one, or the one of that name in `runs/`."""
    from service.observability.sweeps import is_sweep

    return next((place for place in (path, Path("runs") / path) if is_sweep(place)), None)


@click.command(name="runs")
@click.argument("directory", type=Directory(), default="runs")
def list_runs(directory: Path) -> None:
    """List the runs in DIRECTORY (default: runs), the most recently changed first."""
    from service.runs.history import histories_in

    found, broken = histories_in(directory)
    rows = [("run", "state", "step", "best", "when"), *map(_row, found)]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    for row in rows if found else []:
        cells = (f"{cell:{width}}" for cell, width in zip(row, widths, strict=True))
        click.echo("  ".join(cells).rstrip())
    if not found:
        click.echo(f"There are no runs in {printable(str(directory))}.")
    for told in broken:
        click.echo(f"warning: {printable(told)}", err=True)


def _row(history: History) -> tuple[str, str, str, str, str]:
    of = f"/{history.steps}" if history.steps else ""
    best = history.best
    told = f"{best.measure} {best.value:.4g} at step {best.step}" if best else "-"
    cells = (history.directory.name, history.state, f"{history.step}{of}", told)
    name, state, step, best_told = (_cut(printable(cell)) for cell in cells)
    return name, state, step, best_told, _ago(time.time() - history.news)


def _cut(cell: str) -> str:
    return cell if len(cell) <= _WIDEST else cell[: _WIDEST - 3] + "..."


def _ago(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{max(seconds, 0):.0f} s ago"
