"""A liveness probe: `python -m service.monitoring.probe PORT`. No package, no torch.

It fails only if /healthz answers with 503. An endpoint that is not there, or that does not answer,
says nothing of training: a probe of the kubelet's own would then kill a pod that trains.
"""

from __future__ import annotations

import signal
import socket
import sys

_SECONDS = 5.0
_ALL_SECONDS = 8
"""For the whole answer, however slowly it comes."""


def outcome(port: int) -> int:
    """The exit code: 1 if /healthz on loopback says that a rank is not healthy, otherwise 0."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=_SECONDS) as connection:
            connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            answer = b""
            while len(answer) < 4096 and (more := connection.recv(4096)):
                answer += more
    except OSError as error:
        print(f"/healthz did not answer: {error}")
        return 0
    status, _, told = answer.decode(errors="replace").partition("\r\n\r\n")
    print(told.strip())
    return int(status.split(" ")[1:2] == ["503"])


if __name__ == "__main__":
    signal.signal(signal.SIGALRM, lambda *_: sys.exit(0))
    signal.alarm(_ALL_SECONDS)
    sys.exit(outcome(int(sys.argv[1])))
