"""The console: a live bar on a terminal, one plain line for each row elsewhere.

Both write to standard output: they are the output of `evenstep run`, so `| grep` and `| tee`
receive them, and standard error is only for errors.
"""

from __future__ import annotations

import io
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, TextIO

from service.basics.background_queue import BackgroundQueue
from service.basics.running_time import joined
from service.runs.tracking import Outcome, Row, Writer

if TYPE_CHECKING:  # imported at run time only for a terminal
    from rich.console import Console as RichConsole
    from rich.console import ConsoleOptions, RenderResult
    from rich.progress_bar import ProgressBar
    from rich.text import Text

_REDRAW_SECONDS = 0.25
_LOOK_SECONDS = 0.1
_LAST_WORDS_SECONDS = 5.0  # for a reader to read the last lines
_MOST_BAR_COLUMNS, _LEAST_BAR_COLUMNS = 24, 6
_LEAST_CELL_COLUMNS = 7

# The short name of a key on the console, and the format of its value; other keys keep their names.
_FORMS = {
    "train/lr": ("lr", "{:.1e}"),
    "train/grad_norm": ("grad_norm", "{:.3g}"),
    "train/rows_per_second": ("rows/s", "{:.0f}"),
    "train/weight_per_second": ("weight/s", "{:.0f}"),
    "train/data_wait": ("data_wait", "{:.0%}"),
    "system/peak_memory_gib": ("memory", "{:.2f}GiB"),
    "system/tflops": ("tflop/s", "{:.3g}"),
    "system/flop_utilization": ("utilization", "{:.0%}"),
    "system/slowest_rank": ("slowest_rank", "{:.0f}"),
    "system/slowest_ratio": ("slowest_ratio", "{:.3g}"),
}


class Console(Writer, Protocol):
    """A writer for the terminal, on which the rest of the run can print lines too."""

    def say(self, text: str) -> None:
        """Print a permanent line."""


class LeadOutput:
    """Prints lines for the user: above the live bar if there is one, otherwise directly."""

    def __init__(self, *, speaks: bool) -> None:
        """Only rank 0 prints; on the other ranks this prints nothing."""
        self._speaks = speaks
        self._screen: Console | None = None

    def speak_through(self, screen: Console) -> None:
        """From now on print through this console."""
        self._screen = screen

    def __call__(self, text: str) -> None:
        if not self._speaks:
            return
        if self._screen is not None:
            self._screen.say(text)
            return
        try:
            print(text, flush=True)
        except OSError:
            _let_go(sys.stdout)


def console(
    total_steps: int,
    *,
    resume_step: int | None = None,
    stream: TextIO | None = None,
    environ: Mapping[str, str] = os.environ,
    started: float | None = None,
) -> Console:
    """The live bar if `stream` (default: standard output) is a terminal, otherwise plain lines.

    `CI` and `TERM=dumb` select plain lines on a terminal too. `started`, in seconds since 1970,
    is when the first step of this attempt began (default: now); the remaining time is based on it.
    """
    stream = sys.stdout if stream is None else stream
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="replace")  # a missing character must not end the training
    time_left = _TimeLeft(
        total_steps,
        step=resume_step or 0,
        time=time.time() if started is None else started,
    )
    if stream is not None and _is_live(stream, environ):
        return LiveConsole(total_steps, time_left=time_left, stream=stream, environ=environ)
    return PlainConsole(total_steps, time_left=time_left, stream=stream)


def _is_live(stream: TextIO, environ: Mapping[str, str]) -> bool:
    if environ.get("CI", "").lower() not in ("", "0", "false"):
        return False
    is_terminal = getattr(stream, "isatty", None)  # what replaces sys.stdout may lack it
    if is_terminal is None or not is_terminal():
        return False
    return environ.get("TERM", "").lower() not in ("", "dumb", "unknown")


class _Screen(Console, Protocol):
    """The common part of both: a background thread prints the rows that other threads add.

    Formatting takes time, drawing more; and the reader of a pipe may stop reading.
    """

    _stream: TextIO | None
    """None in a program that was started without an output."""
    _queue: BackgroundQueue[Row | str]
    _thread: threading.Thread

    def write(self, row: Row) -> None:
        self._queue.put(row)

    def say(self, text: str) -> None:
        if self._queue.ended:
            self._print(text)
        else:
            self._queue.put(text)

    def close(self, outcome: Outcome) -> None:
        self._queue.end()
        if not joined(self._thread, _LAST_WORDS_SECONDS) and self._stream is sys.stdout:
            # Nobody reads: further output would block too, up to the interpreter's own exit.
            self._stream = sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # open until exit

    def _print(self, text: str) -> None:
        if self._stream is None:
            return
        try:
            self._stream.write(text + "\n")
            self._stream.flush()
        except OSError:
            _let_go(self._stream)


class PlainConsole(_Screen):
    """One line per row: a time, then `name=value` pairs."""

    def __init__(self, total_steps: int, *, time_left: _TimeLeft, stream: TextIO | None) -> None:
        self._total_steps = total_steps
        self._time_left = time_left
        self._stream = stream
        self._queue = BackgroundQueue()
        self._thread = threading.Thread(target=self._show, name="console", daemon=True)
        self._thread.start()

    def _show(self) -> None:
        for found in self._queue.looks(_LOOK_SECONDS):
            lines = [thing if isinstance(thing, str) else self._line(thing) for thing in found]
            if lines:
                self._print("\n".join(lines))

    def _line(self, row: Row) -> str:
        pairs = {"step": f"{row.step}/{self._total_steps}", "epoch": f"{row.epoch:.4g}"}
        pairs |= _shown(row.values)
        if (seconds := self._time_left.after(row)) is not None:
            pairs["eta"] = _throughput(seconds)
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(row.time))
        return " ".join([when, *(f"{name}={value}" for name, value in pairs.items())])


class LiveConsole(_Screen):
    """A line at the bottom of a terminal, redrawn on new data, at most four times a second.

    Above it is a table of the test results.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        time_left: _TimeLeft,
        stream: TextIO,
        environ: Mapping[str, str],
    ) -> None:
        from rich.console import Console as RichConsole
        from rich.live import Live

        self._stream = stream
        self._time_left = time_left
        self._bar = _Bar(total_steps, step=time_left.step)
        self._rich = RichConsole(
            file=stream, force_terminal=True, highlight=False, markup=False, _environ=environ
        )
        # No redirection of sys.stdout: a print of a forked loader could block on rich's lock.
        self._live = Live(
            self._bar,
            console=self._rich,
            auto_refresh=False,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._rows: dict[bool, Row] = {}
        """The latest row with and without measures of training."""
        self._table = _Table()
        self._queue = BackgroundQueue()
        self._thread = threading.Thread(target=self._redraw, name="console", daemon=True)
        self._live.start()
        # Otherwise rich hides the cursor; a killed run could not restore it.
        self._rich.show_cursor(True)
        self._thread.start()

    def write(self, row: Row) -> None:
        self._rows["train/loss" in row.values] = row
        if any(key.startswith("test/") for key in row.values):
            self._queue.put(row)

    def _redraw(self) -> None:
        drawn = -1
        for found in self._queue.looks(_REDRAW_SECONDS):
            rows = sorted(self._rows.copy().values(), key=lambda row: row.step)
            new = [row for row in rows if row.step > drawn]
            for row in new:
                self._bar.take(row, self._time_left.after(row))
                drawn = row.step
            if found or new:
                columns = self._rich.width
                lines = [line for one in found for line in self._table.lines_of(one, columns)]
                self._draw(lines, self._live.refresh)
        self._draw([], self._live.stop)

    def _draw(self, lines: Sequence[str], bar: Callable[[], None]) -> None:
        try:
            if lines:
                self._rich.print("\n".join(lines), soft_wrap=True)  # and rich redraws the bar
            bar()
        except OSError:
            _let_go(self._stream)


class _Table:
    """A table of the tests, one line for each, with the names of the measures."""

    def __init__(self) -> None:
        self._names: tuple[str, ...] = ()

    def lines_of(self, thing: Row | str, columns: int) -> list[str]:
        """The lines for messages and tests; with the column names if they are new.

        Only measures that fit in `columns` are shown: all of them are in metrics.jsonl.
        """
        if isinstance(thing, str):
            return [thing]
        tested = {key: value for key, value in thing.values.items() if key.startswith("test/")}
        cells = {"step": str(thing.step), "epoch": f"{thing.epoch:.4g}", **_shown(tested)}
        names, before = _columns_that_fit(tuple(cells), columns), self._names
        self._names = names
        lines = [cells[name].rjust(_width(name)) for name in names]
        head = [name.rjust(_width(name)) for name in names]
        return ["  ".join(row) for row in ([head, lines] if names != before else [lines])]


def _columns_that_fit(names: tuple[str, ...], columns: int) -> tuple[str, ...]:
    """The names of the columns that fit into the width.

    `names` are the step, the epoch and the measures; the step and the first measure are always
    kept.
    """
    kept = list(names)
    for name in (names[1], *reversed(names[3:])):
        if sum(map(_width, kept)) + 2 * (len(kept) - 1) <= columns:
            break
        kept.remove(name)
    return tuple(kept)


def _width(name: str) -> int:
    return max(len(name), _LEAST_CELL_COLUMNS)


class _Bar:
    """The live line: as many facts as fit, and a bar in the remaining space."""

    def __init__(self, total_steps: int, *, step: int) -> None:
        self._total_steps = total_steps
        self._step = step
        self._facts: dict[str, str] = {}

    def take(self, row: Row, seconds_left: float | None) -> None:
        # A test does not measure training: values that a row lacks do not change.
        facts = self._facts | _shown({k: v for k, v in row.values.items() if k[:5] != "test/"})
        facts["epoch"] = f"{row.epoch:.4g}"
        if seconds_left is not None:
            facts["left"] = _throughput(seconds_left)
        self._step, self._facts = row.step, facts

    def __rich_console__(self, rich: RichConsole, options: ConsoleOptions) -> RenderResult:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        count = f"{self._step}/{self._total_steps}"
        # The last column stays free: some terminals wrap when it is written.
        room = options.max_width - 1 - len(count) - 1
        facts = _that_fit(self._facts, room)
        bar_columns = min(_MOST_BAR_COLUMNS, room - len(facts) - 1)
        cells: list[ProgressBar | Text] = [Text(count, no_wrap=True), Text(facts, no_wrap=True)]
        if bar_columns >= _LEAST_BAR_COLUMNS:
            cells.insert(1, ProgressBar(self._total_steps, self._step, width=bar_columns))
        line = Table.grid(padding=(0, 1, 0, 0), pad_edge=False)
        line.add_row(*cells)
        yield line


# The facts to keep longest if a terminal is narrow.
_FIRST = ("loss", "left", "rows/s", "epoch", "lr", "data_wait", "memory", "utilization")


def _that_fit(facts: Mapping[str, str], columns: int) -> str:
    names = [name for name in _FIRST if name in facts]
    names += [name for name in facts if name not in _FIRST]
    line = ""
    for name in names:
        longer = f"{line}  {name} {facts[name]}".lstrip()
        if len(longer) > columns:
            break
        line = longer
    return line


class _TimeLeft:
    """Estimates the remaining time from the steps of this attempt only."""

    def __init__(self, total_steps: int, *, step: int, time: float) -> None:
        self.step = step
        self._total_steps = total_steps
        self._time = time
        self._is_first = True

    def after(self, row: Row) -> float | None:
        """Seconds left after this row, or None before the first timed step."""
        steps, seconds = row.step - self.step, row.time - self._time
        if self._is_first:
            # From here on, without the one-time costs of the start (compiling, filling the
            # loaders).
            self.step, self._time, self._is_first = row.step, row.time, False
        if steps <= 0:
            return None
        return max(0.0, seconds) / steps * (self._total_steps - row.step)


def _shown(values: Mapping[str, float]) -> dict[str, str]:
    shown = {}
    for key, value in values.items():
        name, form = _FORMS.get(key, (key.removeprefix("train/"), "{:.4g}"))
        if name.startswith("lr/"):
            form = "{:.1e}"
        shown[name] = form.format(value)
    return shown


def _throughput(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour:02d}:{minute:02d}:{second:02d}"


def _let_go(stream: TextIO | None) -> None:
    """Discard further output: the reader is gone (a closed pipe, a lost ssh), training continues.

    On the file descriptor, so that the interpreter's own flush at exit does not turn 0 into 120.
    Source: https://docs.python.org/3/library/signal.html#note-on-sigpipe
    """
    try:
        number = stream.fileno() if stream is not None else None
    except (AttributeError, OSError):
        number = None  # an object of a notebook or a script
    if number is None:
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, number)
    os.close(nowhere)
