"""Starts the process that serves or sends the metrics of a launcher; it hurts nothing. No torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING

from service.basics.errors import SpecError
from service.spec.models import Spec

if TYPE_CHECKING:
    from socket import socket

ADDRESS = "EVENSTEP_METRICS_ADDRESS"
"""The variable with the address to listen on besides loopback, such as that of a pod."""
_LOOPBACK = "127.0.0.1"
_END_SECONDS = 5.0
_SEND_SECONDS = 8.0  # for a last look at the disk, and for sending it to a server that is slow
_PROCESSES: set[int] = set()


def endpoint_processes() -> frozenset[int]:
    """The processes of the endpoints that this process has started."""
    return frozenset(_PROCESSES)


@contextmanager
def metrics_endpoint(
    spec: Spec,
    run: Path,
    *,
    ranks: range,
    started: float,
    say: Callable[[str], None],
) -> Iterator[None]:
    """A context in which what these ranks of the run do is served or sent, as the spec says.

    Where it cannot listen, `say` is told so in one line, and the run goes on without.

    Args:
        run: the directory of the run, which may not be there yet.
        started: when this launcher was started, in seconds since 1970.
    Raises:
        SpecError: a package is not installed.
    """
    port, is_sent = spec.tracking.metrics_port, spec.tracking.opentelemetry is not None
    if port is None and not is_sent:
        yield
        return
    from service.observability.other_writers import require_packages

    require_packages(spec.tracking)
    process = None
    try:
        with _listening([] if port is None else _addresses(spec), port or 0) as sockets:
            process = _started(spec, run, ranks, started, sockets)
    except OSError as error:
        if is_sent:
            process = _started(spec, run, ranks, started, [])
        say(
            f"WARNING: tracking.metrics_port: {port} cannot be served on this machine: "
            f"{error.strerror or error}. Training goes on without it."
        )
    try:
        yield
    finally:
        if process is not None:
            _end(process, sends=is_sent)


def _addresses(spec: Spec) -> list[str]:
    """Loopback, and what the spec or the environment names; the environment wins."""
    asked = os.environ.get(ADDRESS) or spec.tracking.metrics_address
    try:
        is_any = ip_address(asked).is_unspecified
    except ValueError as error:
        raise SpecError(f"{ADDRESS}: must be an address of this machine, but {error}.") from error
    # Unspecified in IPv6, the socket takes no connection to IPv4's loopback, where the probe asks.
    return [asked] if is_any and ":" not in asked else list(dict.fromkeys((_LOOPBACK, asked)))


@contextmanager
def _listening(addresses: Sequence[str], port: int) -> Iterator[list[socket]]:
    """Sockets that listen; the copies in this process are closed at the end.

    Raises:
        OSError: one of them cannot.
    """
    from service.monitoring.http_server import bound

    sockets: list[socket] = []
    try:
        for address in addresses:
            try:
                sockets.append(bound(address, port))
            except OSError as error:
                raise OSError(error.errno, f"{address}: {error.strerror}") from error
        yield sockets
    finally:
        for each in sockets:
            each.close()


def _started(
    spec: Spec, run: Path, ranks: range, started: float, sockets: Sequence[socket]
) -> subprocess.Popen[str]:
    from service.monitoring.snapshot import Watched

    values = spec.model_dump(mode="json")
    watched = Watched(
        path=str(run.absolute()),
        first_rank=ranks.start,
        ranks=len(ranks),
        is_lead=0 in ranks,
        started=started,
        spec={"name": spec.name, "length": values["length"]},
    )
    faults = spec.faults
    sent = spec.tracking.opentelemetry
    task = {
        "opentelemetry": None if sent is None else sent.model_dump(),
        "watched": watched.record(),
        "sockets": [each.fileno() for each in sockets],
        "names_allowed": not all(ip_address(each.getsockname()[0]).is_loopback for each in sockets),
        "timeout_seconds": faults.hang_timeout_seconds,
        "timeouts": {
            "starting": faults.startup_timeout_seconds,
            "hook": faults.hook_timeout_seconds,
        },
    }
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "service.monitoring.exporter", str(os.getpid())],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        pass_fds=[each.fileno() for each in sockets],
        start_new_session=True,  # Ctrl-C is not meant for it: the save is to be seen too
        env=os.environ | {"PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"},
        text=True,
    )
    _PROCESSES.add(process.pid)
    assert process.stdin is not None
    with suppress(BrokenPipeError):  # it has ended already, and has said why
        process.stdin.write(json.dumps(task) + "\n")
        process.stdin.flush()
    return process


def _end(process: subprocess.Popen[str], *, sends: bool) -> None:
    """End the endpoint, and wait until its port is free again.

    Args:
        sends: let it send the last values first.
    """
    if sends and process.stdin is not None:
        with suppress(BrokenPipeError):
            process.stdin.close()  # it reads to the end
        with suppress(subprocess.TimeoutExpired):
            process.wait(_SEND_SECONDS)
    process.kill()
    with suppress(subprocess.TimeoutExpired):
        process.wait(_END_SECONDS)
    if process.stdin is not None:
        with suppress(BrokenPipeError):
            process.stdin.close()
    _PROCESSES.discard(process.pid)
