"""One node's part of a job on several nodes: rendezvous, local processes, end.

`launch.processes.local` runs the processes of this node as usual; the information about
the other nodes is passed with the job, as its `group`.
"""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.environment import Group, Node, meeting_secret
from launch.nodes.elastic import run_elastic
from launch.nodes.handshake import JoinRequest
from launch.nodes.node_part import (
    check_interfaces,
    is_done,
    kill_ranks,
    meeting_seconds,
    new_store,
    run_part,
    say,
    started_again,
    take_interface,
)
from launch.nodes.rendezvous import Membership, host, is_loopback, join
from launch.nodes.secret_file import secret_in
from launch.processes.signals import stop_raises
from service.basics.errors import EvenstepError
from service.spec.files import dump_spec

if TYPE_CHECKING:
    from launch.stored.following import Following
    from launch.stored.leading import Leading


def run_node(
    job: Any,
    node: Node,
    *,
    processes: int,
    leading: Leading | None = None,
    following: Following | None = None,
) -> int:
    """Run this node's processes in the group of all nodes; return the exit code of this node.

    Args:
        leading: if the run is in an object store, of node 0.
        following: the same of another node, which brings the state when the nodes have connected.
    Raises:
        SpecError: the nodes disagree, the port is taken, or an interface does not exist.
        PeerLost: not all nodes connected, or one was lost.
        Stopped: a stop was requested before the start.
    """
    check_interfaces()
    if is_done(job):
        say(f"Nothing to do: {job.runs / job.spec.name} is done.")
        return 0
    digest = hashlib.sha256(dump_spec(job.spec).encode()).hexdigest()
    stored = leading or following
    runs = hashlib.sha256(str(stored.address).encode()).hexdigest() if stored is not None else ""
    options = " ".join(f"{name} {value}" for name, value in job.options.items())
    own = JoinRequest(
        node.index, node.nodes, processes, digest, node.least, runs=runs, options=options
    )
    if node.least:
        with secret_of(node, job.runs, seconds=meeting_seconds(job)) as secret:
            return run_elastic(job, node, own, secret, leading=leading, following=following)
    seconds = meeting_seconds(job)
    with stop_raises(), secret_of(node, job.runs, seconds=seconds) as secret:
        membership, group, store = meet(node, own, secret, seconds=seconds)
    # From here on a request to stop is recorded, for `run_locally`; at the end it changes nothing.
    take_interface(group.address, membership.own_address)
    code = 1
    try:
        if following is not None:
            with stop_raises():
                following.bring()
        code = run_part(
            job,
            node,
            membership,
            group,
            processes=processes,
            kill=kill_ranks,
            stop=lambda: os.kill(os.getpid(), signal.SIGTERM),
        )
    except EvenstepError as error:
        code = error.exit_code
        raise
    finally:
        membership.leave(code)
        del store  # node 0's store; the others need it only until here
    return code


@contextmanager
def secret_of(node: Node, runs: Path, *, seconds: float) -> Iterator[bytes]:
    """The secret of the rendezvous; empty if there is none.

    Args:
        runs: a directory that the nodes may share.
        seconds: how long to wait for a secret that another node writes there.
    """
    secret = meeting_secret()
    if not secret and node.secret_name:
        made = secret_in(runs, node.secret_name, makes=node.index == 0, seconds=seconds)
        with made as secret:
            yield secret
        return
    if not secret and not is_loopback(node.address):
        say(_OPEN.format(port=node.port))
    yield secret


def meet(
    node: Node, own: JoinRequest, secret: bytes, *, seconds: float
) -> tuple[Membership, Group, object]:
    """The other nodes, the group of all their processes, and on node 0 its store.

    Raises:
        SpecError: the nodes disagree, or the port is taken.
        PeerLost: not all nodes connected in time.
    """
    say(f"Node {node.index} of {node.nodes}, rendezvous at {node.address}:{node.port}.")
    place: dict[str, Any] = {"address": node.address, "port": node.port, "secret": secret}
    if node.index == 0:
        membership = host(own, **place, seconds=seconds, say=say)
        store, address, port = new_store(membership.own_address)
        membership.begin(address, port)
    else:
        store = None
        with started_again(node):
            membership, (address, port) = join(own, **place, seconds=seconds, say=say)
    here = {"local_index": node.local_index, "local_nodes": node.local_nodes}
    return membership, Group(node.index, node.nodes, own.processes, address, port, **here), store


_OPEN = (
    "WARNING: no secret is given, so anyone who reaches port {port} of node 0 can join as a node. "
    "Give all nodes the same one: EVENSTEP_SECRET_FILE=<a file>, from `openssl rand -hex 32`."
)
