"""Tracking: one `log(step, values)` for all writers of metrics."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

from service.basics.atomic_files import (
    AppendOnlyFile,
    sync_directory,
    told_when_unwritten,
    without_link,
)
from service.runs.metrics_file import read_metrics, rows_in

__all__ = [
    "Kind",
    "LoggedFile",
    "MetricsFile",
    "Outcome",
    "Row",
    "Tracker",
    "Writer",
    "read_metrics",
    "tells_of_speed",
]

Outcome = Literal["done", "stopped", "failed"]

_ENCODER = json.JSONEncoder(allow_nan=False)  # json.dumps would create one for every row
_OF_SPEED = ("time", "train/rows_per_second", "train/weight_per_second", "train/data_wait")


Kind = Literal["image", "text", "histogram", "file"]


class LoggedFile(NamedTuple):
    """A logged item of a hook besides numbers: a file in the directory of the run."""

    key: str
    """`hook/grid`."""
    kind: Kind
    path: Path


class Row(NamedTuple):
    """The values of one step."""

    step: int
    epoch: float
    time: float
    """Seconds since 1970."""
    values: Mapping[str, float]
    """By key: `train/loss`, `test/accuracy`, ..."""
    files: Sequence[LoggedFile] = ()
    """Items that hooks have logged after this step; not in metrics.jsonl."""

    def record(self) -> dict[str, float]:
        """The row as one flat object, with its step first."""
        return {"step": self.step, "epoch": self.epoch, "time": self.time, **self.values}


class Writer(Protocol):
    """Stores or shows rows; it is called by the training thread, so it must not block."""

    def write(self, row: Row) -> None:
        """Write one row; the steps of the rows increase."""

    def sync(self) -> None:
        """Return when all rows so far are on disk, if the writer supports this."""
        return

    def close(self, outcome: Outcome) -> None:
        """Finish within a bounded time; nothing is written afterwards."""

    @property
    def stop_requested(self) -> bool:
        """Whether the user asked through this writer for the run to stop."""
        return False


class Tracker:
    """One `log` for all writers; the same on every process, with no writers on the others."""

    def __init__(
        self,
        writers: Sequence[Writer] = (),
        *,
        epoch_at: Callable[[int], float],
        resume_step: int | None = None,
    ) -> None:
        """`writers` get each row in this order: the file first, the slowest last.

        `epoch_at` gives the passes over the data done at a step; `resume_step` is the step of the
        checkpoint this attempt starts from, or None for a fresh run.
        """
        self._writers = tuple(writers)
        self._epoch_at = epoch_at
        self._last_step = -1 if resume_step is None else resume_step
        self._closed = False

    def log(self, step: int, values: Mapping[str, float], files: Sequence[LoggedFile] = ()) -> None:
        """Record all values of `step`, of training and testing, in one call.

        One call is one row and one line, so a crash finds a step either recorded or not. A second
        row for a step would have to wait in memory for its other half, and be lost there.
        """
        assert not self._closed, f"step {step} is logged after close"
        assert step > self._last_step, (
            f"step {step} is logged after step {self._last_step}: log each step once, in order"
        )
        self._last_step = step
        if not self._writers:
            return
        row = Row(
            step=step,
            epoch=round(self._epoch_at(step), 6),
            time=time.time_ns() // 1_000_000 / 1000,  # rounding a float takes longer
            values={key: float(value) for key, value in values.items()},
            files=files,
        )
        for writer in self._writers:
            writer.write(row)

    def sync(self) -> None:
        """Sync every row so far to disk; call it before a checkpoint is published.

        A checkpoint that outlives the machine while the rows before it do not would leave a gap.
        """
        for writer in self._writers:
            writer.sync()

    @property
    def stop_requested(self) -> bool:
        """Whether the user asked a writer for the run to stop, such as with W&B's Stop button."""
        return any(writer.stop_requested for writer in self._writers)

    def close(self, outcome: Outcome) -> None:
        """Close every writer, the last one first, even if one of them fails; bounded in time."""
        if self._closed:
            return
        self._closed = True
        with ExitStack() as stack:
            for writer in self._writers:
                stack.callback(writer.close, outcome)


class MetricsFile(Writer):
    """`metrics.jsonl`, the reference: one JSON object a line, without gaps or repeated steps."""

    def __init__(
        self, path: Path, *, resume_step: int | None = None, say: Callable[[str], None] = print
    ) -> None:
        """Empty for a fresh run; for a resume, exactly the rows up to the checkpoint's step.

        `say` reports rows that wait because the disk is full.

        Raises:
            EvenstepError: it cannot be written.
        """
        with told_when_unwritten(path):
            _keep_up_to(path, resume_step)
            self._file = AppendOnlyFile(path, say=say)

    def write(self, row: Row) -> None:
        """Append the row by one system call, so that a kill tears at most one line."""
        self._file.add(_line(row))

    def sync(self) -> None:
        self._file.sync()

    def close(self, outcome: Outcome) -> None:
        self._file.close()


def tells_of_speed(key: str) -> bool:
    """Whether a value of a row describes the speed of the run, not its result."""
    return key in _OF_SPEED or key.startswith(("save/", "system/"))


def _line(row: Row) -> bytes:
    record = row.record()
    try:
        text = _ENCODER.encode(record)
    except ValueError:
        text = _ENCODER.encode({key: _strict(value) for key, value in record.items()})
    return text.encode() + b"\n"


def _strict(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _keep_up_to(path: Path, step: int | None) -> None:
    """Atomically cut the file to rows up to this step; None removes all rows."""
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    with open(partial, "wb", opener=without_link) as file:
        if step is not None and path.exists():
            file.writelines(line + b"\n" for line, row in rows_in(path) if row["step"] <= step)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    sync_directory(path.parent)
