"""The trackers besides W&B in a spec, each as a background writer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from service.basics.errors import SpecError
from service.observability.background_writer import BackgroundWriter, TrackerBackend
from service.observability.mlflow_backend import MLflow
from service.observability.tensorboard_backend import TensorBoard
from service.observability.trackio_backend import Trackio
from service.runs.directory import RunDirectory
from service.runs.tracking import Writer
from service.spec.models import TrackingSpec

_PACKAGES = (  # the key, the module, the package, the extra
    ("tensorboard", "tensorboard", "tensorboard", "tensorboard"),
    ("trackio", "trackio", "trackio", "trackio"),
    ("mlflow", "mlflow", "mlflow-skinny", "mlflow"),
    ("metrics_port", "prometheus_client", "prometheus-client", "metrics"),
    ("opentelemetry", "opentelemetry.sdk", "opentelemetry-sdk", "otel"),
    (
        "opentelemetry",
        "opentelemetry.exporter.otlp.proto.http",
        "opentelemetry-exporter-otlp-proto-http",
        "otel",
    ),
)


def require_packages(spec: TrackingSpec) -> None:
    """Raise if the spec names a tracker whose package is not installed.

    Raises:
        SpecError: says how to install it.
    """
    for key, module, package, extra in _PACKAGES:
        if getattr(spec, key) not in (None, False) and not _is_installed(module):
            raise SpecError(
                f"tracking.{key}: the package {package} is not installed. "
                f"Use: pip install 'evenstep[{extra}]'"
            )


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package above it
        return False


def second_writers(
    spec: TrackingSpec,
    *,
    directory: Path,
    name: str,
    run_id: str,
    config: Mapping[str, Any],
    resume_step: int | None,
    say: Callable[[str], None],
) -> list[Writer]:
    """The writers of the trackers in the spec; `config` is what they show as configuration.

    `run_id` is the same in every attempt.
    """
    backends: dict[str, Callable[[], TrackerBackend]] = {}
    if spec.tensorboard:
        backends["TensorBoard"] = lambda: TensorBoard.open(RunDirectory(directory).tensorboard)
    if spec.trackio is not None:
        asked = spec.trackio
        backends["trackio"] = lambda: Trackio.open(asked, run=run_id, name=name, config=config)
    if spec.mlflow is not None:
        where = spec.mlflow
        backends["MLflow"] = lambda: MLflow.open(
            where, run=run_id, name=name, config=config, say=say
        )
    metrics = directory / "metrics.jsonl"
    return [
        BackgroundWriter(tracker, open_backend, metrics=metrics, resume_step=resume_step, say=say)
        for tracker, open_backend in backends.items()
    ]
