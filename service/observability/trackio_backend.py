"""The backend of Hugging Face's trackio: a local database, or a Space."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

from service.observability.background_writer import TrackerBackend
from service.spec.models import TrackioSpec

if TYPE_CHECKING:
    from trackio.run import Run


class Trackio(TrackerBackend):
    """A run of Hugging Face's trackio, on this machine or in a Space."""

    def __init__(self, run: Run, *, held_step: int) -> None:
        self._run = run
        self.held_step = held_step

    @classmethod
    def open(cls, spec: TrackioSpec, *, name: str, config: Mapping[str, Any]) -> Self:
        """Create the run `name`, or resume it."""
        import trackio

        run = trackio.init(
            project=spec.project,
            name=name,
            space_id=spec.space,
            config=dict(config),
            resume="allow",
            embed=False,
            auto_log_cpu=False,
        )
        # trackio's counter points to the step after the last one that the run holds.
        return cls(run, held_step=int(run._next_step) - 1)

    def put(self, step: int, time: float, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()  # type: ignore[no-untyped-call]
