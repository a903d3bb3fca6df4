"""Sends the rows of a run to a tracker from a background thread.

The training thread puts a row into a bounded queue. An error of the tracker is reported once and
never stops the run: metrics.jsonl has every row, and a resumed attempt sends the missing ones.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from service.basics.background_queue import BackgroundQueue
from service.basics.running_time import joined
from service.observability.logged_files import files_of_step
from service.runs.metrics_file import rows_in
from service.runs.tracking import LoggedFile, Outcome, Row, Writer


class TrackerBackend(Protocol):
    """The client of one tracker. One thread calls all of its methods; they may block."""

    held_step: int
    """The last step that it has from earlier attempts, or -1."""

    def put(
        self,
        step: int,
        time: float,
        values: Mapping[str, float],
        files: Sequence[LoggedFile],
    ) -> None:
        """Write one row, and the files that hooks have logged with it."""

    def close(self, outcome: Outcome) -> None:
        """Flush the remaining rows, then close."""


class BackgroundWriter(Writer):
    """Sends rows to a tracker in a background thread."""

    def __init__(
        self,
        name: str,
        open_backend: Callable[[], TrackerBackend],
        *,
        metrics: Path,
        resume_step: int | None,
        say: Callable[[str], None],
        close_seconds: float = 30.0,
    ) -> None:
        """Returns immediately; the thread imports and opens the tracker.

        Args:
            name: of the tracker, for messages.
            metrics: the file of all rows, already cut to `resume_step`.
            say: prints one line for the user.
            close_seconds: how long `close` waits for the tracker.
        """
        self._name = name
        self._open_backend = open_backend
        self._metrics = metrics
        self._resume_step = resume_step
        self._say = say
        self._close_seconds = close_seconds
        self._rows: BackgroundQueue[Row] = BackgroundQueue()
        self._received_rows = 0
        self._written_rows = 0
        self._error: str | None = None
        self._outcome: Outcome = "failed"
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def write(self, row: Row) -> None:
        self._received_rows += 1
        self._rows.put(row)

    def close(self, outcome: Outcome) -> None:
        """Wait at most `close_seconds` for the tracker; report the number of missing rows."""
        self._outcome = outcome
        self._rows.end()
        if not joined(self._thread, self._close_seconds):
            self._error = f"it had not finished after {self._close_seconds:g} s"
        missing = self._received_rows - self._written_rows
        if missing or self._error:
            self._say(
                f"{self._name} lacks {missing} of this attempt's {self._received_rows} rows: "
                f"{self._error or 'the queue was full'}. {self._metrics} has them all."
            )

    def _work(self) -> None:
        try:
            backend = self._open_backend()
            self._catch_up(backend)
            for row in self._rows:
                if row.step > backend.held_step:
                    backend.put(row.step, row.time, row.values, row.files)
                self._written_rows += 1
            backend.close(self._outcome)
        except Exception as error:
            message = " ".join(str(error).split())[:200]
            self._error = f"{type(error).__name__}: {message}"
            self._say(f"{self._name} stopped: {self._error}. Training continues without it.")

    def _catch_up(self, backend: TrackerBackend) -> None:
        """Send the rows that earlier attempts could not send."""
        if self._resume_step is None or backend.held_step >= self._resume_step:
            return
        for _, record in rows_in(self._metrics):  # one at a time: there may be millions
            if backend.held_step < record["step"] <= self._resume_step:
                values = {k: v for k, v in record.items() if k not in ("step", "epoch", "time")}
                step = int(record["step"])
                files = files_of_step(self._metrics.with_name("logged"), step)
                backend.put(step, record["time"], values, files)
