"""A receiver of OTLP over HTTP, as a collector is one: it decodes what is sent and keeps it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)


@dataclass
class Received:
    """What has come so far."""

    port: int = 0
    messages: list[dict[tuple[str, str], float]] = field(default_factory=list)
    """Of each, the values by (name, labels without the run and the host)."""
    kinds: dict[str, str] = field(default_factory=dict)
    runs: set[str] = field(default_factory=set)
    resource: dict[str, str] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)

    def take(self, body: bytes) -> None:
        asked = ExportMetricsServiceRequest.FromString(body)
        values = {}
        for of_resource in asked.resource_metrics:
            self.resource = _plain(of_resource.resource.attributes)
            for metric in (m for scope in of_resource.scope_metrics for m in scope.metrics):
                kind = self.kinds[metric.name] = metric.WhichOneof("data")
                if kind == "sum":
                    assert metric.sum.is_monotonic
                for point in getattr(metric, kind).data_points:
                    labels = _plain(point.attributes)
                    self.runs.add(labels.pop("run"))
                    labels.pop("host", None)
                    values[metric.name, "/".join(labels.values())] = point.as_double
        self.messages.append(values)


def _plain(attributes: Any) -> dict[str, str]:
    return {each.key: each.value.string_value for each in attributes}


@contextmanager
def receiver(*, status: int = 200) -> Iterator[Received]:
    """A receiver on loopback that answers each message with this status."""
    received = Received()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            assert self.path == "/v1/metrics"
            assert self.headers["Content-Type"] == "application/x-protobuf"
            received.headers = dict(self.headers.items())
            received.take(body)
            answer = ExportMetricsServiceResponse().SerializeToString()
            self.send_response(status)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        received.port = server.server_port
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield received
        finally:
            server.shutdown()
            thread.join()
