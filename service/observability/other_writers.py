"""TensorBoard and trackio as background writers, each in a thread of its own.

The training thread leaves a row in a bounded queue. What goes wrong behind it is said once, and
metrics.jsonl has every row; a resumed attempt hands over what the place lacks.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from service.basics.background_queue import BackgroundQueue
from service.basics.errors import SpecError
from service.runs.tracking import Outcome, Row, Writer, read_metrics
from service.spec.models import TrackingSpec, TrackioSpec


class TrackerBackend(Protocol):
    """Where rows go in the end; all of it is called by one thread, which may wait."""

    held_step: int
    """The last step that it has from earlier attempts, or -1."""

    def put(self, step: int, time: float, values: Mapping[str, float]) -> None:
        """Keep one row."""

    def close(self) -> None:
        """Keep what is not kept yet, and let go."""


class BackgroundWriter(Writer):
    """Hands the rows to a place in a thread of its own."""

    def __init__(
        self,
        name: str,
        open_place: Callable[[], TrackerBackend],
        *,
        metrics: Path,
        resume_step: int | None,
        say: Callable[[str], None],
        close_seconds: float = 30.0,
    ) -> None:
        """Returns at once; the thread opens the place, and imports what it needs.

        Args:
            name: of the place, for people.
            metrics: the file of all rows, already cut to `resume_step`.
            say: tells a person one line.
            close_seconds: how long `close` waits for the place.
        """
        self._name = name
        self._open_place = open_place
        self._metrics = metrics
        self._resume_step = resume_step
        self._say = say
        self._close_seconds = close_seconds
        self._rows: BackgroundQueue[Row] = BackgroundQueue()
        self._taken_rows = 0
        self._kept_rows = 0
        self._trouble: str | None = None
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def write(self, row: Row) -> None:
        self._taken_rows += 1
        self._rows.put(row)

    def close(self, outcome: Outcome) -> None:
        """Wait for the place at most `close_seconds`; say how many rows it lacks."""
        self._rows.end()
        self._thread.join(self._close_seconds)
        if self._thread.is_alive():
            self._trouble = f"it had not finished after {self._close_seconds:g} s"
        missing = self._taken_rows - self._kept_rows
        if missing or self._trouble:
            self._say(
                f"{self._name} lacks {missing} of this attempt's {self._taken_rows} rows: "
                f"{self._trouble or 'the queue was full'}. {self._metrics} has them all."
            )

    def _work(self) -> None:
        try:
            place = self._open_place()
            self._catch_up(place)
            for row in self._rows:
                if row.step > place.held_step:
                    place.put(row.step, row.time, row.values)
                self._kept_rows += 1
            place.close()
        except Exception as error:
            told = " ".join(str(error).split())[:200]
            self._trouble = f"{type(error).__name__}: {told}"
            self._say(f"{self._name} stopped: {self._trouble}. The training goes on without it.")

    def _catch_up(self, place: TrackerBackend) -> None:
        """Hand over what earlier attempts could not."""
        if self._resume_step is None or place.held_step >= self._resume_step:
            return
        for record in read_metrics(self._metrics):
            if place.held_step < record["step"] <= self._resume_step:
                values = {k: v for k, v in record.items() if k not in ("step", "epoch", "time")}
                place.put(int(record["step"]), record["time"], values)


class TensorBoard(TrackerBackend):
    """An event file in the run's directory; a resumed attempt writes it anew from the record."""

    def __init__(self, directory: Path) -> None:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        # A file that a killed process left may lack its last rows, and may be ahead of the
        # checkpoint: the record is neither.
        for earlier in directory.glob("events.out.tfevents.*"):
            earlier.unlink()
        self.held_step = -1
        self._writer = EventFileWriter(str(directory), flush_secs=1)

    def put(self, step: int, time: float, values: Mapping[str, float]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        scalars = [Summary.Value(tag=key, simple_value=value) for key, value in values.items()]
        self._writer.add_event(Event(step=step, wall_time=time, summary=Summary(value=scalars)))

    def close(self) -> None:
        self._writer.close()


class Trackio(TrackerBackend):
    """A run of Hugging Face's trackio: on this machine, or in a Space."""

    def __init__(self, spec: TrackioSpec, *, name: str, config: Mapping[str, Any]) -> None:
        import trackio

        self._run = trackio.init(
            project=spec.project,
            name=name,
            space_id=spec.space,
            config=dict(config),
            resume="allow",
            embed=False,
            auto_log_cpu=False,
        )
        # Where the run's own counter of steps stands: after the last one that it holds.
        self.held_step = int(self._run._next_step) - 1

    def put(self, step: int, time: float, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()  # type: ignore[no-untyped-call]


def require_packages(spec: TrackingSpec) -> None:
    """Raise where the spec asks for a place whose package is not installed.

    Raises:
        SpecError: says how to install it.
    """
    wanted = {"tensorboard": spec.tensorboard, "trackio": spec.trackio is not None}
    for package, asked in wanted.items():
        if asked and find_spec(package) is None:
            raise SpecError(
                f"tracking.{package}: the package {package} is not installed. "
                f"Use: pip install 'evenstep[{package}]'"
            )


def second_writers(
    spec: TrackingSpec,
    *,
    directory: Path,
    name: str,
    config: Mapping[str, Any],
    resume_step: int | None,
    say: Callable[[str], None],
) -> list[Writer]:
    """Those that the spec asks for; `config` is what trackio shows as the run's configuration."""
    places: dict[str, Callable[[], TrackerBackend]] = {}
    if spec.tensorboard:
        places["TensorBoard"] = lambda: TensorBoard(directory / "tensorboard")
    if spec.trackio is not None:
        asked = spec.trackio
        places["trackio"] = lambda: Trackio(asked, name=name, config=config)
    metrics = directory / "metrics.jsonl"
    return [
        BackgroundWriter(place, opened, metrics=metrics, resume_step=resume_step, say=say)
        for place, opened in places.items()
    ]
