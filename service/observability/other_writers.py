"""The trackers besides W&B in a spec, each as a background writer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from service.basics.errors import SpecError
from service.observability.background_writer import BackgroundWriter, TrackerBackend
from service.observability.tensorboard_backend import TensorBoard
from service.observability.trackio_backend import Trackio
from service.runs.tracking import Writer
from service.spec.models import TrackingSpec


def require_packages(spec: TrackingSpec) -> None:
    """Raise if the spec names a tracker whose package is not installed.

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
    """The writers of the trackers in the spec; trackio shows `config` as configuration."""
    backends: dict[str, Callable[[], TrackerBackend]] = {}
    if spec.tensorboard:
        backends["TensorBoard"] = lambda: TensorBoard.open(directory / "tensorboard")
    if spec.trackio is not None:
        asked = spec.trackio
        backends["trackio"] = lambda: Trackio.open(asked, name=name, config=config)
    metrics = directory / "metrics.jsonl"
    return [
        BackgroundWriter(tracker, open_backend, metrics=metrics, resume_step=resume_step, say=say)
        for tracker, open_backend in backends.items()
    ]
