"""`evenstep doctor --nodes`: nodes meet as those of a run, and measure their network. No torch."""

from __future__ import annotations

import hashlib
from pathlib import Path

from launch.environment import Environment, Node
from launch.nodes.handshake import JoinRequest
from launch.nodes.node import meet, secret_of
from launch.nodes.node_part import MEETING_SECONDS, check_interfaces, take_interface
from launch.processes.signals import stop_raises
from launch.rank.trial import TrialEnd, tried
from service.basics.errors import PeerLost

TRIAL_SECONDS = 120
"""Time for the processes of all nodes to import torch, to connect, and for the sums."""
_PURPOSE = hashlib.sha256(b"evenstep doctor").hexdigest()
"""In place of the digest of a spec: no node of a run takes part."""


def measured_by(node: Node, *, processes: int, runs: Path) -> TrialEnd:
    """How this node's processes ended that measured the network; all nodes call it together.

    Args:
        runs: see `launch.nodes.node.secret_of`.
    Raises:
        SpecError: the nodes disagree, the port is taken, or an interface does not exist.
        PeerLost: not all nodes connected, or one was lost.
        Stopped: a stop was requested while they connected.
    """
    check_interfaces()
    own = JoinRequest(node.index, node.nodes, processes, _PURPOSE)
    seconds = MEETING_SECONDS
    with stop_raises(), secret_of(node, runs, seconds=seconds) as secret:
        membership, group, store = meet(node, own, secret, seconds=seconds)
    take_interface(group.address, membership.own_address)
    membership.watch(lambda: None)
    code = 1
    try:
        places = [Environment(0, 0, local, processes) for local in range(processes)]
        variables = [group.variables(each) for each in places]
        lost = lambda: membership.lost is not None  # noqa: E731
        ended = tried("nodes", variables, seconds=TRIAL_SECONDS, lost=lost)
        code = 0 if ended.code == 0 else 1
    finally:
        membership.leave(code)
        del store  # node 0's store; the others need it only until here
    if ended.code != 0 and membership.lost is not None:
        waited = "The processes of this node waited for it, and were ended."
        here = waited if ended.code is None else f"Here: {ended.last_line}"
        raise PeerLost(f"{membership.lost} {here}")
    return ended
