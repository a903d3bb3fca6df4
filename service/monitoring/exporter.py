"""The program of a metrics endpoint: serves /metrics and /healthz beside a launcher, or sends them.

A process of its own, so that no client can take time, memory or descriptors from training. It reads
the files that a run writes anyway. Standard input gives it its task, and ends with the launcher, as
this process does.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import resource
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from service.health.stop_request import STOP_SIGNALS, die_with_parent
from service.monitoring.http_server import Answer, BadRequest, ReadOnlyServer, Request
from service.monitoring.liveness import LOOK_SECONDS, Liveness
from service.monitoring.metrics import METRICS, Value, values
from service.monitoring.snapshot import Observer, Snapshot, Watched
from service.runs.directory import RunDirectory

if TYPE_CHECKING:
    from prometheus_client.core import Metric

    from service.monitoring.otlp import Sender

FRESH_SECONDS = 1.0
"""The files are read at most so often, however many clients ask."""
_WAIT_SECONDS = 2.0  # for the disk to be read; after it, the figures of before are served
_NICE = 10
_MOST_FILES = 256
_DIES_FIRST = "1000"  # of the processes that the kernel may kill where memory is short


@dataclass
class Figures:
    """The latest snapshot; a thread takes a new one, so that a slow disk holds up nobody."""

    observer: Observer
    liveness: Liveness
    wrong: list[str] = field(default_factory=list)
    """What /healthz complains of."""
    snapshot: Snapshot | None = None
    taken: float = -1e9
    """When, on the monotonic clock."""
    _has_failed: bool = False
    _asked: threading.Event = field(default_factory=threading.Event)
    _new: threading.Condition = field(default_factory=threading.Condition)

    def keep_looking(self) -> None:
        """Take a snapshot when one is asked for, and at least every few seconds."""
        while True:
            self._asked.clear()
            try:
                self._look()
            except Exception:  # the next look may find the files whole again
                if not self._has_failed:
                    self._has_failed = True
                    traceback.print_exc()
            time.sleep(FRESH_SECONDS)
            self._asked.wait(LOOK_SECONDS - FRESH_SECONDS)

    def _look(self) -> None:
        snapshot = self.observer.look()
        wrong = self.liveness.look(snapshot.beats)
        with self._new:
            self.snapshot, self.wrong, self.taken = snapshot, wrong, time.monotonic()
            self._new.notify_all()

    def latest(self, *, most_seconds: float = FRESH_SECONDS) -> tuple[Snapshot | None, list[str]]:
        """The latest snapshot, and what is wrong.

        If it is older than `most_seconds`, a new one where the disk gives it in time.
        """
        asked = time.monotonic()
        with self._new:
            if asked - self.taken > most_seconds:
                self._asked.set()
                self._new.wait_for(lambda: self.taken > asked, timeout=_WAIT_SECONDS)
            return self.snapshot, self.wrong


class _Snapshot:
    """One snapshot, in the form of Prometheus's client library."""

    def __init__(self, found: Iterable[Value]) -> None:
        self._values: dict[str, list[Value]] = {}
        for value in found:
            self._values.setdefault(value.name, []).append(value)

    def collect(self) -> Iterable[Metric]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        for metric in METRICS:
            if metric.name not in self._values:
                continue
            kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
            family = kind(metric.name, metric.about, labels=metric.labels)
            for value in self._values[metric.name]:
                family.add_metric([value.labels[name] for name in metric.labels], value.value)
            yield family


def exposition(found: Iterable[Value], accept: str) -> tuple[bytes, str]:
    """(the text, its content type): OpenMetrics, or the older format for who asks for that."""
    from prometheus_client import CollectorRegistry
    from prometheus_client.exposition import choose_encoder

    registry = CollectorRegistry(auto_describe=False)
    collector: Any = _Snapshot(found)  # with the one method that matters of its Collector
    registry.register(collector)
    encode, kind = choose_encoder(accept)
    return encode(registry), kind


async def _answer(figures: Figures, request: Request) -> Answer:
    if request.path not in ("/metrics", "/healthz"):
        raise BadRequest(404, "there are /metrics and /healthz")
    snapshot, wrong = await asyncio.to_thread(figures.latest)
    if request.path == "/healthz":
        if wrong:
            return Answer(503, ("\n".join(wrong) + "\n").encode())
        return Answer(200, b"ok\n")
    if snapshot is None:
        raise BadRequest(503, "the run's directory has not answered yet")
    found = values(snapshot, healthy=not wrong)
    text, kind = exposition(found, request.headers.get("accept", "application/openmetrics-text"))
    return Answer(200, text, kind)


def main() -> None:
    """Serve or send what the first line of standard input says, until standard input ends."""
    die_with_parent(int(sys.argv[1]))
    for number in STOP_SIGNALS:  # a stop takes a save, which is to be seen too
        signal.signal(number, signal.SIG_IGN)
    _stand_back()
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # a client writes into no log of ours
    task = json.loads(sys.stdin.readline())
    figures = _figures(task)
    threading.Thread(target=figures.keep_looking, name="snapshots", daemon=True).start()
    sender = _sender(figures, task["opentelemetry"]) if task["opentelemetry"] else None
    ending = threading.Thread(
        target=_end_with_launcher, args=(figures, sender), name="launcher", daemon=True
    )
    ending.start()
    if not task["sockets"]:
        ending.join()
    sockets = [socket.socket(fileno=descriptor) for descriptor in task["sockets"]]
    server = ReadOnlyServer(
        sockets,
        lambda request: _answer(figures, request),
        names_allowed=task["names_allowed"],
    )
    asyncio.run(server.serve())


def _figures(task: Mapping[str, Any]) -> Figures:
    watched = Watched(**task["watched"])
    liveness = Liveness(
        RunDirectory(Path(watched.path)).logs,
        timeouts=task["timeouts"],
        timeout_seconds=task["timeout_seconds"],
    )
    return Figures(Observer(watched), liveness)


def _sender(figures: Figures, asked: Mapping[str, Any]) -> Sender:
    from service.monitoring.otlp import Sender

    def look() -> Iterable[Value]:
        snapshot, wrong = figures.latest()
        return [] if snapshot is None else values(snapshot, healthy=not wrong)

    def say(words: str) -> None:
        print(words, file=sys.stderr, flush=True)

    return Sender(look, endpoint=asked["endpoint"], every_seconds=asked["every_seconds"], say=say)


def _end_with_launcher(figures: Figures, sender: Sender | None) -> None:
    sys.stdin.read()
    if sender is not None:
        figures.latest(most_seconds=0.0)  # the run has ended in the meantime
        sender.finish()
    os._exit(0)


def _stand_back() -> None:
    """Take less of the processor than training, and die before it where memory is short."""
    os.nice(_NICE)
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(_DIES_FIRST)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MOST_FILES if hard == resource.RLIM_INFINITY else min(_MOST_FILES, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


if __name__ == "__main__":
    main()
