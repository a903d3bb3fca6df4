"""The TensorBoard backend: an event file in the run's directory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from service.observability.background_writer import TrackerBackend
from service.observability.logged_files import read_histogram, size_of_png
from service.runs.tracking import LoggedFile, Outcome

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

    def put(
        self,
        step: int,
        time: float,
        values: Mapping[str, float],
        files: Sequence[LoggedFile],
    ) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        scalars = [Summary.Value(tag=key, simple_value=value) for key, value in values.items()]
        shown = [_shown(file) for file in files if file.path.is_file()]
        summary = Summary(value=[*scalars, *shown])
        self._writer.add_event(Event(step=step, wall_time=time, summary=summary))

    def close(self, outcome: Outcome) -> None:
        self._writer.close()


def _shown(file: LoggedFile) -> Any:
    """The file as a value of a summary; for a kind that TensorBoard does not support, its path."""
    from tensorboard.compat.proto.summary_pb2 import HistogramProto, Summary

    if file.kind == "image":
        content = file.path.read_bytes()
        width, height = size_of_png(content)
        image = Summary.Image(
            width=width, height=height, colorspace=3, encoded_image_string=content
        )
        return Summary.Value(tag=file.key, image=image)
    if file.kind == "histogram":
        counts, edges = read_histogram(file.path)
        middles = (edges[:-1] + edges[1:]) / 2
        bars = HistogramProto(
            min=edges[0],
            max=edges[-1],
            num=counts.sum(),
            sum=(counts * middles).sum(),
            sum_squares=(counts * middles**2).sum(),
            bucket_limit=edges[1:],
            bucket=counts,
        )
        return Summary.Value(tag=file.key, histo=bars)
    is_text = file.kind == "text"
    return _text(file.key, file.path.read_text(encoding="utf-8") if is_text else str(file.path))


def _text(tag: str, text: str) -> Any:
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.types_pb2 import DT_STRING

    plugin = SummaryMetadata.PluginData(plugin_name="text")
    tensor = TensorProto(dtype=DT_STRING, string_val=[text.encode()])
    return Summary.Value(tag=tag, metadata=SummaryMetadata(plugin_data=plugin), tensor=tensor)
