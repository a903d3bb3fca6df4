"""The backend of Hugging Face's trackio: a local database, or a Space."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

from service.observability.background_writer import TrackerBackend
from service.observability.logged_files import read_histogram
from service.runs.tracking import LoggedFile, Outcome
from service.spec.models import TrackioSpec

if TYPE_CHECKING:
    from trackio.run import Run


class Trackio(TrackerBackend):
    """A run of Hugging Face's trackio, on this machine or in a Space."""

    def __init__(self, run: Run, *, held_step: int) -> None:
        self._run = run
        self.held_step = held_step

    @classmethod
    def open(cls, spec: TrackioSpec, *, run: str, name: str, config: Mapping[str, Any]) -> Self:
        """Create the run, or resume the one of an earlier attempt.

        Args:
            run: the id of the run, the same in every attempt. trackio finds a run by its name, so
                the name has this id: another run of this name is not this one.
        """
        import trackio

        opened = trackio.init(
            project=spec.project,
            name=run if run.startswith(name) else f"{name}-{run}",
            space_id=spec.space,
            config=dict(config),
            resume="allow",
            embed=False,
            auto_log_cpu=False,
        )
        # trackio's counter points to the step after the last one in the run.
        return cls(opened, held_step=int(opened._next_step) - 1)

    def put(
        self,
        step: int,
        time: float,
        values: Mapping[str, float],
        files: Sequence[LoggedFile],
    ) -> None:
        shown = {file.key: _shown(file) for file in files if file.path.is_file()}
        self._run.log({**values, **shown}, step=step)

    def close(self, outcome: Outcome) -> None:
        self._run.finish()  # type: ignore[no-untyped-call]


def _shown(file: LoggedFile) -> Any:
    """The file as trackio shows it: if it is not an image, text or histogram, its path."""
    import trackio

    if file.kind == "image":
        return trackio.Image(file.path)
    if file.kind == "text":
        return trackio.Markdown(file.path.read_text(encoding="utf-8"))
    if file.kind == "histogram":
        return trackio.Histogram(np_histogram=read_histogram(file.path))
    return str(file.path)
