"""Sends the metrics of a launcher by OTLP over HTTP, through OpenTelemetry's own exporter."""

from __future__ import annotations

import logging
import math
import os
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from time import monotonic
from typing import Any

from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.metrics import CallbackOptions, Observation
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource

from service.monitoring.metrics import METRICS, Value

EXPORT_SECONDS = 4.0
"""For one export with its retries, unless OTEL_EXPORTER_OTLP_TIMEOUT says otherwise."""
_SAME_SECONDS = 1.0  # within which all metrics of a message are asked for
_PATH = "/v1/metrics"
_TIMEOUTS = ("OTEL_EXPORTER_OTLP_METRICS_TIMEOUT", "OTEL_EXPORTER_OTLP_TIMEOUT")


class Sender:
    """Sends what `look` returns every so many seconds, from a thread of its own."""

    def __init__(
        self,
        look: Callable[[], Iterable[Value]],
        *,
        endpoint: str | None,
        every_seconds: float,
        say: Callable[[str], None],
    ) -> None:
        """`endpoint` is the address without its path; None: what OpenTelemetry's variables name."""
        self._look = look
        self._found: Sequence[Value] = ()
        self._looked = -math.inf
        """When, on the monotonic clock: a message asks for each metric by itself."""
        logger = logging.getLogger("opentelemetry")
        logger.propagate = False
        logger.addHandler(_ToldOnce(say))
        own_timeout = None if any(map(os.environ.get, _TIMEOUTS)) else EXPORT_SECONDS
        exporter = OTLPMetricExporter(
            endpoint=None if endpoint is None else endpoint.rstrip("/").removesuffix(_PATH) + _PATH,
            timeout=own_timeout,
        )
        reader = PeriodicExportingMetricReader(
            exporter, export_interval_millis=every_seconds * 1000
        )
        resource = Resource.create(_identity())
        self._provider = MeterProvider([reader], resource, shutdown_on_exit=False)
        meter = self._provider.get_meter("evenstep")
        for metric in METRICS:
            create: Any = meter.create_observable_gauge
            if metric.kind == "counter":
                create = meter.create_observable_counter
            unit = "s" if metric.name.endswith("_seconds") else ""
            create(metric.name, [partial(self._observed, metric.name)], unit, metric.about)

    def _observed(self, name: str, options: CallbackOptions) -> Iterable[Observation]:
        return [
            Observation(value.value, dict(value.labels))
            for value in self._latest()
            if value.name == name
        ]

    def _latest(self) -> Sequence[Value]:
        if monotonic() - self._looked > _SAME_SECONDS:
            self._found = list(self._look())
            self._looked = monotonic()
        return self._found

    def finish(self) -> None:
        """Send the last values."""
        self._looked = -math.inf
        self._provider.force_flush(timeout_millis=EXPORT_SECONDS * 1000)


def _identity() -> Mapping[str, str]:
    """The attributes of this launcher; those of the environment win."""
    told = os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
    named = "service.name" if os.environ.get("OTEL_SERVICE_NAME") else ""
    own = {
        "service.name": "evenstep",
        "service.instance.id": f"{socket.gethostname()}:{os.getppid()}",
    }
    return {key: value for key, value in own.items() if key != named and f"{key}=" not in told}


class _ToldOnce(logging.Handler):
    """Tells the user of the first export that fails."""

    def __init__(self, say: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._say = say
        self._reason = ""
        self._has_told = False

    def emit(self, record: logging.LogRecord) -> None:
        words = " ".join(record.getMessage().split()).removesuffix(".")
        if record.levelno < logging.ERROR:
            self._reason = f": {words.partition(' encountered while ')[0]}"
        elif not self._has_told:
            self._has_told = True
            self._say(
                f"WARNING: tracking.opentelemetry: {words[:300]}{self._reason[:300]}. "
                "Training goes on, and later figures are sent as soon as they are accepted."
            )
