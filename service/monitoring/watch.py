"""A live table of runs for a terminal, or plain lines elsewhere. No torch."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, TextIO

from service.basics.errors import EvenstepError, printable
from service.monitoring.live_runs import LiveRuns, RunNow
from service.observability.charts import short

if TYPE_CHECKING:
    from rich.table import Table

_BLOCKS = "▁▂▃▄▅▆▇█"
_PLAIN_BLOCKS = "_.-=*#"
_CHART_COLUMNS = 24
_LONGEST_NAME = 40
_AGAIN = "The store answers again."
_LINES_ROUND_THE_TABLE = 5  # its head, its frame, and the line below it
HEAD = ("run", "state", "step", "left", "loss", "test", "rows/s", "data wait", "news")
_TONES = {"running": "blue", "done": "green", "failed": "red", "gave up": "red", "lost": "magenta"}


def watch(
    runs: LiveRuns,
    *,
    stream: TextIO,
    seconds: float,
    once: bool,
    wait: Callable[[float], None] = time.sleep,
    environ: Mapping[str, str] = os.environ,
) -> None:
    """Show the runs every so many seconds, until none of them goes on.

    Args:
        once: show them one time.
    Raises:
        EvenstepError: none of them can be read.
    """
    if once or not stream.isatty() or environ.get("TERM", "").lower() in ("", "dumb", "unknown"):
        _in_lines(runs, stream=stream, seconds=seconds, once=once, wait=wait)
    else:
        _on_a_terminal(runs, stream=stream, seconds=seconds, wait=wait, environ=environ)


def _readable(runs: LiveRuns) -> tuple[list[RunNow], list[str]]:
    found, broken = runs.look()
    if not found and broken:
        raise EvenstepError("\n".join(broken))
    return found, broken


def _in_lines(
    runs: LiveRuns,
    *,
    stream: TextIO,
    seconds: float,
    once: bool,
    wait: Callable[[float], None],
) -> None:
    """A line for each run, and again whenever it changes."""
    told: dict[str, str] = {}
    known: set[str] = set()
    trouble: str | None = None
    while True:
        found, broken = _readable(runs)
        for run in found:
            line = line_of(run)
            if told.get(str(run.path)) != line:
                told[str(run.path)] = line
                print(f"{line}{_age_of(run)}", file=stream, flush=True)
        if (runs.trouble is None) != (trouble is None):
            words = runs.trouble and f"{runs.trouble} What was read before stays, and it is asked"
            print(f"warning: {words} again." if words else _AGAIN, file=stream, flush=True)
        trouble = runs.trouble
        for words in broken:
            if words not in known:
                known.add(words)
                print(f"warning: {printable(words)}", file=stream, flush=True)
        if once or not any(run.is_running for run in found):
            if not told and not known:
                print("There are no runs here.", file=stream, flush=True)
            return
        wait(seconds)


def _age_of(run: RunNow) -> str:
    """How old the newest row of a copy is; a directory has the newest there is."""
    ago = _ago(time.time() - run.news).replace(" ", "_")
    return f" news={ago}" if run.address is not None else ""


def line_of(run: RunNow) -> str:
    """One run as `name=value` pairs, without what changes by itself."""
    cells = dict(zip(HEAD, cells_of(run), strict=True))
    name, _ = cells.pop("run"), cells.pop("news")
    pairs = [f"{key.replace(' ', '_')}={cell.replace(' ', '_')}" for key, cell in cells.items()]
    return " ".join([name, *(pair for pair in pairs if not pair.endswith("=-"))])


def cells_of(run: RunNow) -> tuple[str, ...]:
    """What the table shows of one run, in the order of `HEAD`; every text is safe to print."""
    latest = run.latest
    of = f"/{run.steps:,}" if run.steps else ""
    tested = [key for key in latest if key.startswith("test/")]
    test = f"{tested[-1].removeprefix('test/')} {short(latest[tested[-1]])}" if tested else "-"
    left = run.seconds_left
    cells = (
        _cut(run.name),
        run.state,
        f"{run.step:,}{of}",
        "-" if left is None else _span(left),
        _number(latest, "train/loss"),
        test,
        _number(latest, "train/rows_per_second"),
        f"{latest['train/data_wait']:.0%}" if "train/data_wait" in latest else "-",
        _ago(time.time() - run.news),
    )
    return tuple(printable(cell) for cell in cells)


def sparkline(values: Sequence[float], *, columns: int, blocks: str = _BLOCKS) -> str:
    """The latest values as a row of blocks; `!` where one is not finite."""
    shown = values[-columns:]
    finite = [value for value in shown if math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    size = (high / 2 - low / 2) or 1.0  # halves, because the difference may overflow
    top = len(blocks) - 1
    return "".join(
        blocks[round((value / 2 - low / 2) / size * top)] if math.isfinite(value) else "!"
        for value in shown
    )


def _on_a_terminal(
    runs: LiveRuns,
    *,
    stream: TextIO,
    seconds: float,
    wait: Callable[[float], None],
    environ: Mapping[str, str],
) -> None:
    """A table on a screen of its own, drawn over itself; at the end it stays where one was."""
    from rich.console import Console
    from rich.live import Live

    # Asked again, a terminal that was closed is none, and nothing would be drawn for ever.
    console = Console(
        file=stream, highlight=False, markup=False, force_terminal=True, _environ=environ
    )
    blocks = _BLOCKS if _can_say(stream, _BLOCKS) else _PLAIN_BLOCKS
    found, broken = _readable(runs)
    try:
        with Live(console=console, screen=True, auto_refresh=False) as live:
            drawn: object = None
            while True:
                lines = max(1, console.height - _LINES_ROUND_THE_TABLE)
                below = _below(runs)
                shown = (tuple(map(cells_of, found[:lines])), console.size, len(found), below)
                if shown != drawn:  # a screen that is not drawn cannot flicker
                    drawn = shown
                    table = table_of(found, broken, lines=lines, blocks=blocks, below=below)
                    live.update(table, refresh=True)
                if not any(run.is_running for run in found):
                    break
                wait(seconds)
                found, broken = _readable(runs)
    finally:
        below = _below(runs)
        table = table_of(found, broken, lines=len(found), blocks=blocks, below=below)
        console.print(table)


def _below(runs: LiveRuns) -> str:
    """What is told below the table of how old it is; nothing of files of this machine."""
    told = (runs.seen(time.time()), runs.trouble)
    return "; ".join(printable(words) for words in told if words)


def table_of(
    runs: Sequence[RunNow],
    broken: Iterable[str],
    *,
    lines: int,
    blocks: str = _BLOCKS,
    below: str = "",
) -> Table:
    """The table of so many runs; below it how many more there are, and what else is told."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    more, unread = len(runs) - lines, len(list(broken))
    words = [f"and {more:,} more"] if more > 0 else []
    words += [f"{unread:,} cannot be read"] if unread else []
    words += [below] if below else []
    table = Table(box=box.SIMPLE_HEAD, caption="; ".join(words) or None, caption_justify="left")
    for name in HEAD:
        kept = name in ("run", "step", "loss")
        table.add_column(Text(name), no_wrap=True, overflow="ellipsis" if kept else "crop")
    table.add_column(Text("loss of late"), no_wrap=True, overflow="crop")
    for run in runs[:lines]:
        cells = [Text(cell) for cell in cells_of(run)]
        cells[1].stylize(_TONES.get(run.state, ""))
        chart = sparkline(run.losses, columns=_CHART_COLUMNS, blocks=blocks)
        table.add_row(*cells, Text(chart))
    return table


def _can_say(stream: TextIO, text: str) -> bool:
    try:
        text.encode(stream.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _number(values: Mapping[str, float], key: str) -> str:
    return short(values[key]) if key in values else "-"


def _cut(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 3]}..."


def _span(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "-"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}"


def _ago(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return "now" if seconds < 10 else f"{seconds // 10 * 10:.0f} s ago"
