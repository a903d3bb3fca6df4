"""A sweep: its runs, and each setting's mean and deviation over seeds. No torch."""

from __future__ import annotations

import fcntl
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from service.basics.atomic_files import (
    is_there,
    read_json,
    replace_file,
    told_when_unread,
    told_when_unwritten,
    without_link,
)
from service.basics.errors import SpecError
from service.runs.history import History, read_history
from service.spec.part import RUN_NAME

FORMAT = 1
_FILE = "sweep.json"
_LOCK = ".lock"
_LARGEST_BYTES = 8 << 20
SEED = "seed"
_MOST_MEASURES = 6

Setting = tuple[tuple[str, str], ...]
"""Keys with their values as text: `(("optimizer.lr", "0.1"),)`."""


@dataclass(frozen=True)
class Sweep:
    """A directory of runs, with the setting of each by the run's name."""

    path: Path
    settings: Mapping[str, Setting]
    address: str | None = None
    """Where the sweep lives, if `path` has copies of its runs."""

    @property
    def name(self) -> str:
        """The name of the sweep."""
        return self.address.rpartition("/")[2] if self.address else self.path.name

    @cached_property
    def histories(self) -> list[History]:
        """The runs that have started."""
        runs = [self.path / name for name in self.settings]
        found = [read_history(run) for run in runs if is_there(run / "run.json")]
        if self.address is None:
            return found
        return [replace(each, address=f"{self.address}/{each.directory.name}") for each in found]


def is_sweep(path: Path) -> bool:
    """Whether this directory contains a sweep."""
    try:
        return is_there(path / _FILE)
    except OSError:  # reading it as a run reports the reason
        return False


def read_sweep(path: Path) -> Sweep:
    """The sweep in a directory; without runs if none was started there.

    Raises:
        SpecError: its file is damaged, or permission is denied.
        EvenstepError: it cannot be read at the moment.
    """
    file = path / _FILE
    try:
        with told_when_unread(file):
            if not is_there(file):
                return Sweep(path, {})
            told = read_json(file, at_most=_LARGEST_BYTES)
        settings = settings_in(told)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SpecError(
            f"{file} cannot be read: {error}. Remove it, and run the sweep again: its runs are "
            f"kept."
        ) from error
    return Sweep(path, settings)


def settings_in(told: Any) -> dict[str, Setting]:
    """The settings of runs in what `as_plain` has written.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: it is something else.
    """
    settings = {
        str(name): tuple((str(key), str(value)) for key, value in pairs)
        for name, pairs in told["runs"].items()
    }
    if told["format"] != FORMAT:
        raise ValueError(f"its format is {told['format']}")
    # Each becomes a path below the sweep, and nowhere else.
    for name in settings:
        if not re.fullmatch(RUN_NAME, name):
            raise ValueError(f"{name!r} is not the name of a run")
    return settings


def as_plain(settings: Mapping[str, Setting]) -> dict[str, Any]:
    """The settings of runs as plain values."""
    return {"format": FORMAT, "runs": {name: list(pairs) for name, pairs in settings.items()}}


def add_to_sweep(path: Path, settings: Mapping[str, Setting]) -> None:
    """Write the settings of runs next to those of the sweep's other runs.

    Another command may add the runs of its own at this moment.

    Raises:
        SpecError: the file of the sweep is damaged.
        EvenstepError: it cannot be written.
    """
    file = path / _FILE
    with told_when_unwritten(file), open(path / _LOCK, "ab", opener=without_link) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        known = {**read_sweep(path).settings, **settings}
        replace_file(file, json.dumps(as_plain(known), indent=1) + "\n")


@dataclass(frozen=True)
class Row:
    """One setting: its measures, over its seeds."""

    setting: Setting
    """Without the seed."""
    runs: int
    done: int
    measured: Mapping[str, Sequence[float]]
    """Values of the finished runs, by measure."""


def rows_of(sweep: Sweep) -> list[Row]:
    """One row for each setting, in the order of the sweep."""
    known = {history.directory.name: history for history in sweep.histories}
    of_setting: dict[Setting, list[History | None]] = {}
    for name, setting in sweep.settings.items():
        rest = tuple(pair for pair in setting if pair[0] != SEED)
        of_setting.setdefault(rest, []).append(known.get(name))
    found = []
    for setting, histories in of_setting.items():
        done = [h for h in histories if h is not None and h.state == "done"]
        measured: dict[str, list[float]] = {}
        for history in done:
            for key, value in _measured(history).items():
                measured.setdefault(key, []).append(value)
        found.append(Row(setting, len(histories), len(done), measured))
    return found


def _measured(history: History) -> dict[str, float]:
    """The best value of the run, and the last value of each test measure."""
    best = history.best
    found = {f"best {best.measure}": best.value} if best is not None else {}
    for key in history.keys:
        if key.startswith("test/"):
            found[f"last {key}"] = history.series(key)[-1][1]
    return found


def table_of(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """The header and the cells of the table: settings, finished runs, measures.

    A measure is shown as mean and sample standard deviation, `0.95 ± 0.01`; for one run, as its
    value.
    """
    keys = list(dict.fromkeys(key for row in rows for key, _ in row.setting))
    measures = list(dict.fromkeys(key for row in rows for key in row.measured))[:_MOST_MEASURES]
    lines = []
    for row in rows:
        values = dict(row.setting)
        cells = [values.get(key, "-") for key in keys]
        cells.append(f"{row.done} of {row.runs}")
        cells += [mean_and_deviation(row.measured.get(measure, ())) for measure in measures]
        lines.append(cells)
    return [*keys, "done", *measures], lines


def mean_and_deviation(values: Iterable[float]) -> str:
    """`0.95 ± 0.01`: the mean, and the sample standard deviation of several values."""
    from service.observability.charts import short  # numpy with it, which a sweep's start needs not

    known = list(values)
    if not known:
        return "-"
    mean = sum(known) / len(known)
    if len(known) == 1:
        return short(mean)
    if not math.isfinite(mean):
        return f"{short(mean)} ± {short(math.nan)}"
    # `hypot` squares no value, so large values do not overflow.
    deviation = math.hypot(*(value - mean for value in known)) / math.sqrt(len(known) - 1)
    return f"{short(mean)} ± {short(deviation)}"


def in_lines(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> Iterator[str]:
    """A table as text, its columns aligned."""
    rows = [heads, *lines]
    widths = [max(len(row[column]) for row in rows) for column in range(len(heads))]
    for row in rows:
        cells = (f"{cell:{width}}" for cell, width in zip(row, widths, strict=True))
        yield "  ".join(cells).rstrip()
