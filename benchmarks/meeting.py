"""How long the rendezvous of many nodes takes: `python -m benchmarks.meeting --nodes 4096`.

Node 0 is `launch.nodes.rendezvous.host` as it is, in one thread of a separate process. All
other nodes are connections of this process, over loopback; they authenticate with the secret as
real nodes do. The time is from the first connection until the last node has received the address
of the store.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import secrets
import selectors
import socket
import threading
import time
from multiprocessing.connection import Connection

from launch.nodes.handshake import LINE_BYTES, JoinRequest, Lines, Seal, answered
from launch.nodes.rendezvous import host

AT_ONCE = 512
"""Connections that are opened before the first one is answered."""


def node_0(nodes: int, port: int, secret: bytes, told: Connection) -> None:
    """Run the rendezvous and send the address of a store; report processor time and threads."""
    own = JoinRequest(0, nodes, 8, "digest")
    place = {"port": port, "secret": secret, "address": "127.0.0.1"}
    membership = host(own, **place, seconds=600, say=print)  # type: ignore[arg-type]
    membership.begin("127.0.0.1", 1)
    told.send((time.process_time(), threading.active_count()))
    told.recv()


def others(nodes: int, port: int, secret: bytes) -> None:
    """Return when every node has received the address of the store."""
    waiting = list(range(nodes - 1, 0, -1))
    heard: dict[int, tuple[Lines, Seal | None]] = {}
    met = unanswered = 0
    with selectors.DefaultSelector() as events:
        while met < nodes - 1:
            while waiting and unanswered < AT_ONCE:
                index = waiting.pop()
                connection = socket.create_connection(("127.0.0.1", port), timeout=60)
                heard[index] = (Lines(), None)
                events.register(connection, selectors.EVENT_READ, index)
                unanswered += 1
            for key, _ in events.select(60):
                connection, index = key.fileobj, key.data
                assert isinstance(connection, socket.socket)
                lines, seal = heard[index]
                piece = connection.recv(LINE_BYTES)
                assert piece, f"node 0 closed the connection to node {index}"
                for line in lines.fed(piece):
                    if seal is None:
                        said, seal = answered(line, JoinRequest(index, nodes, 8, "digest"), secret)
                        connection.sendall(said)
                        heard[index] = (lines, seal)
                        unanswered -= 1
                    else:
                        assert seal.opened(line)["store"] == 1
                        met += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, default=4096)
    nodes = parser.parse_args().nodes
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    secret = secrets.token_bytes(32)
    told, tells = multiprocessing.Pipe()
    first = multiprocessing.Process(target=node_0, args=(nodes, port, secret, tells))
    first.start()
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            break
        except ConnectionRefusedError:
            time.sleep(0.01)
    began = time.perf_counter()
    others(nodes, port, secret)
    seconds = time.perf_counter() - began
    busy, threads = told.recv()
    told.send(None)
    first.join()
    print(
        f"{nodes} nodes connected in {seconds:.2f} s; node 0 took {busy:.2f} s of one core, "
        f"in {threads} thread{'s' if threads > 1 else ''}."
    )


if __name__ == "__main__":
    main()
