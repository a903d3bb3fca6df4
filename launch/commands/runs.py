"""The commands that show runs: `runs`, `watch` and `report`.  No torch."""

from __future__ import annotations

import math
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

import click

from launch.commands.places import Named, Place, run_at
from launch.processes.terminal import OutputLost
from service.basics.errors import SpecError, printable
from service.runs.directory import find_run, with_name
from service.storage.address import Address

if TYPE_CHECKING:
    from service.monitoring.live_runs import LiveRuns
    from service.observability.sweeps import Sweep
    from service.runs.history import History
    from service.storage.store import Store

_WIDEST = 120  # characters of a cell, so that one run does not widen the whole table
_ALL = click.option("--all", "everything", is_flag=True, help="All runs in the directory --runs.")
_RUNS = click.option(
    "--runs",
    "place",
    type=Place(),
    default="runs",
    show_default=True,
    help="A directory, or an address in an object store.",
)
_EVERY_SECONDS = 1.0
_PATIENCE_SECONDS = 5.0
"""How long a request to a store is tried again: what looks again soon need not wait."""


class Number(click.FloatRange):
    """A number within limits, which `nan` is not although no comparison says so."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        number: float = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f"{value!r} is not a number.", param, ctx)
        return number


@click.command()
@click.argument("runs", metavar="RUN...", type=Place(), nargs=-1)
@_ALL
@_RUNS
@click.option(
    "--every",
    metavar="SECONDS",
    type=Number(min=0.1, max=86400),
    help="Look so often. Default: 1; at an object store 15, or more for many runs.",
)
@click.option("--once", is_flag=True, help="Print them one time.")
def watch(
    runs: tuple[Path | Address, ...],
    everything: bool,
    place: Path | Address,
    every: float | None,
    once: bool,
) -> None:
    """Show RUNs while they run: directories, addresses, or names in ./runs. Ctrl-C ends it, not the
    runs.

    On a terminal a table, elsewhere a line whenever a run has news."""
    from service.monitoring.watch import watch as show

    with _ends_cleanly(), _live(runs, everything, place, every_seconds=every) as live:
        # The age of what is shown goes on between two requests.
        seconds = min(every or _EVERY_SECONDS, _EVERY_SECONDS) if _stored(runs, place) else every
        show(live, stream=sys.stdout, seconds=seconds or _EVERY_SECONDS, once=once)


def _stored(runs: Sequence[Path | Address], place: Path | Address) -> list[Address]:
    """The addresses among the places of a command."""
    return [each for each in (*runs, *(() if runs else (place,))) if isinstance(each, Address)]


@contextmanager
def _live(
    runs: Sequence[Path | Address],
    everything: bool,
    place: Path | Address,
    *,
    every_seconds: float | None = None,
    in_background: bool = False,
) -> Iterator[LiveRuns]:
    """The named runs, those of a sweep, or all in a directory; copies of those in a store."""
    if everything == bool(runs):
        raise SpecError("RUN or --all: name the runs, or say --all for those in --runs.")
    if not (addresses := _stored(runs, place)):
        here = tuple(each for each in runs if isinstance(each, Path))
        yield _live_here(here, place if isinstance(place, Path) else None)
        return
    from launch.stored.swept import sweep_at
    from service.monitoring.live_runs import StoredRuns
    from service.storage.copies import Copies
    from service.storage.store import open_store

    with tempfile.TemporaryDirectory(prefix="evenstep-", ignore_cleanup_errors=True) as text:
        named: list[Store] = []
        below: list[Store] = []
        for each in dict.fromkeys(addresses):
            several = everything or sweep_at(each) is not None
            store = open_store(each, patience_seconds=_PATIENCE_SECONDS)
            (below if several else named).append(store)
        copies = Copies(Path(text), named, below=below)
        here = tuple(each for each in runs if isinstance(each, Path))
        yield StoredRuns(
            copies, _paths_of(here), every_seconds=every_seconds, in_background=in_background
        )


def _live_here(runs: tuple[Path, ...], place: Path | None) -> LiveRuns:
    from service.monitoring.live_runs import LiveRuns

    if not runs:
        assert place is not None
        if not os.path.isdir(place):  # False also for a name that is too long for a file
            raise SpecError(f"There is no directory {place}. Name the one that has the runs.")
        return LiveRuns(directory=place)
    if len(runs) == 1 and (sweep := _sweep_at(runs[0])) is not None:
        return LiveRuns(directory=sweep)  # with the runs that it starts later
    return LiveRuns(_paths_of(runs))


def _paths_of(runs: Sequence[Path]) -> list[Path]:
    """The directories of the named runs and of those of the named sweeps."""
    from service.monitoring.live_runs import run_paths

    paths: list[Path] = []
    for name in runs:
        sweep = _sweep_at(name)
        paths += list(run_paths(sweep)) if sweep is not None else [find_run(name).path]
    return list(dict.fromkeys(paths))


@contextmanager
def _ends_cleanly() -> Iterator[None]:
    """A context that a signal ends as Ctrl-C does: what looks at runs has not failed then.

    With its terminal closed, it has nobody left to whom its last words could be said.
    """
    heard: list[int] = []

    def end(number: int, frame: FrameType | None) -> NoReturn:
        heard.append(number)
        raise KeyboardInterrupt

    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(each) is not signal.SIG_IGN:
            signal.signal(each, end)
    try:
        yield
    except KeyboardInterrupt:
        pass
    except OutputLost:
        if not heard:
            raise


@click.command()
@click.argument("runs", metavar="RUN...", type=Place(), nargs=-1)
@_ALL
@_RUNS
@click.option("--serve", is_flag=True, help="Serve the page on this machine; it updates itself.")
@click.option("--port", type=click.IntRange(0, 65535), default=8787, show_default=True)
@click.option(
    "-o",
    "--output",
    type=Named(dir_okay=False),
    default="report.html",
    show_default=True,
)
def report(
    runs: tuple[Path | Address, ...],
    everything: bool,
    place: Path | Address,
    serve: bool,
    port: int,
    output: Path,
) -> None:
    """Write one HTML page about RUNs: directories, addresses, or names in ./runs. The page needs no
    network.

    For a directory of `evenstep sweep`: all its runs, and each setting's mean and deviation."""
    if serve:
        with _live(runs, everything, place, in_background=True) as live:
            _serve(live, port, lists=everything)
        return
    if everything or not runs:
        raise SpecError("RUN: name the runs of the page; --all is for --serve.")
    from service.observability.report import write_report
    from service.observability.sweeps import in_lines, rows_of, table_of
    from service.runs.history import read_history

    sweeps, histories = [], []
    with ExitStack() as stack:  # a report reads rows as it needs them
        for run in runs:
            sweep = _swept(run, stack)
            if sweep is not None:
                sweeps.append(sweep)
                found = sweep.histories
            else:
                found = [read_history(stack.enter_context(run_at(run)).path)]
            if isinstance(run, Address):
                addresses = [run / each.directory.name for each in found] if sweep else [run]
                pairs = zip(found, addresses, strict=True)
                named = [replace(each, address=str(at)) for each, at in pairs]
                found, unread = _with_leases(named, addresses)
                _warn(unread)
            histories += found
        if not histories:
            where = sweeps[0].address or sweeps[0].path
            raise SpecError(f"{where}: no run of this sweep has started yet.")
        write_report(histories, output, sweeps=sweeps)
    for sweep in sweeps:
        click.echo("\n".join(map(printable, in_lines(*table_of(rows_of(sweep))))))
    names = ", ".join(printable(history.name) for history in histories)
    click.echo(f"{printable(str(output))}: {names}")


def _serve(runs: LiveRuns, port: int, *, lists: bool) -> None:
    from service.monitoring.http_server import bound
    from service.monitoring.live_report import LiveReport, serve

    found, broken = runs.look()
    for words in broken:
        click.echo(f"warning: {printable(words)}", err=True)
    try:
        listening = bound("127.0.0.1", port)
    except OSError as error:
        raise SpecError(f"--port: {port}: {error.strerror}. Choose another; 0 is any.") from error
    address = f"http://127.0.0.1:{listening.getsockname()[1]}/"
    names = f"{len(found):,} runs" if len(found) != 1 else printable(found[0].name)
    seen = runs.seen(time.time())
    names += f" ({seen})" if seen else ""
    with listening, _ends_cleanly():
        click.echo(f"{address} shows {names}, on this machine only; Ctrl-C ends it.")
        sys.stdout.flush()
        serve(LiveReport(runs, names, lists=lists), [listening])


def _swept(run: Path | Address, stack: ExitStack) -> Sweep | None:
    """The sweep at a place, if it is one; of one in a store, copies until the stack ends."""
    from service.observability.sweeps import read_sweep

    if isinstance(run, Path):
        place = _sweep_at(run)
        return read_sweep(place) if place is not None else None
    from launch.stored.swept import copied_sweep, sweep_at

    settings = sweep_at(run)
    if settings is None:
        return None
    return stack.enter_context(copied_sweep(run, settings, with_metrics=True))


def _sweep_at(path: Path) -> Path | None:
    """The directory of a sweep: this one, or the one of that name in `runs/`."""
    from service.observability.sweeps import is_sweep

    places = (path, Path("runs") / path)
    return next((with_name(place) for place in places if is_sweep(place)), None)


@click.command(name="runs")
@click.argument("directory", type=Place(), default="runs")
def list_runs(directory: Path | Address) -> None:
    """List the runs in DIRECTORY (default: runs), the most recently changed first."""
    from service.runs.history import histories_in

    if isinstance(directory, Address):
        from service.storage.reading import copied_runs

        with copied_runs(directory) as (place, unread):
            found, broken = histories_in(place)
            addresses = [directory / each.directory.name for each in found]
            found, unheard = _with_leases(found, addresses)
            _list(found, [*broken, *unread, *unheard], directory)
    else:
        _list(*histories_in(directory), directory)


def _with_leases(
    found: Sequence[History], addresses: Sequence[Address]
) -> tuple[list[History], list[str]]:
    """The same runs, with whether a launcher holds each; and why this is not known of some."""
    from service.storage.reading import abandoned

    pairs = list(zip(found, addresses, strict=True))
    lost, unread = abandoned([at for each, at in pairs if each.state == "running"])
    return [replace(each, is_abandoned=at in lost) for each, at in pairs], unread


def _list(found: Sequence[History], broken: Sequence[str], directory: Path | Address) -> None:
    rows = [("run", "state", "step", "best", "when"), *map(_row, found)]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = [
        "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    if found:
        click.echo("\n".join(lines))
    else:
        click.echo(f"There are no runs in {printable(str(directory))}.")
    _warn(broken)


def _warn(told: Sequence[str]) -> None:
    for each in told:
        click.echo(f"warning: {printable(each)}", err=True)


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
