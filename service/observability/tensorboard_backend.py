"""The TensorBoard backend: an event file in the run's directory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Self

from service.observability.background_writer import TrackerBackend

if TYPE_CHECKING:
    from tensorboard.summary.writer.event_file_writer import EventFileWriter


class TensorBoard(TrackerBackend):
    """An event file in the run's directory; a resumed attempt rewrites it from metrics.jsonl."""

    held_step = -1

    def __init__(self, writer: EventFileWriter) -> None:
        self._writer = writer

    @classmethod
    def open(cls, directory: Path) -> Self:
        """Start a new event file; the files of earlier attempts are deleted."""
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        # The file of a killed process may lack its last rows, or may be ahead of the checkpoint.
        # metrics.jsonl is complete and cut to the checkpoint.
        for earlier in directory.glob("events.out.tfevents.*"):
            earlier.unlink()
        return cls(EventFileWriter(str(directory), flush_secs=1))

    def put(self, step: int, time: float, values: Mapping[str, float]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        scalars = [Summary.Value(tag=key, simple_value=value) for key, value in values.items()]
        self._writer.add_event(Event(step=step, wall_time=time, summary=Summary(value=scalars)))

    def close(self) -> None:
        self._writer.close()
