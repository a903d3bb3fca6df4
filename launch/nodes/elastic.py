"""A job that continues with the nodes that are there: its generations, led by node 0.

The nodes of a generation train until the job is done, or until one of them is lost, leaves or
waits to join. Then their processes end, and the nodes that are there form the next generation,
which resumes from the newest checkpoint. Node 0 listens during the whole run. A node that comes
back or comes late authenticates, and waits until a checkpoint of this generation is complete;
then the processes are asked to stop, which saves their state.

So every generation that ends for a new node has saved at least once. A node that was lost before
the first save of its generation is also held back until the next one: a node that comes
and goes cannot keep the job from its progress. `faults.attempts_without_progress` ends a run
whose generations fail in a row.

Where the nodes share no disk, all checkpoints are written on node 0. Before a generation begins it
lets the newest good one be uploaded, and the other nodes bring that one (`launch.stored`).
"""

from __future__ import annotations

import os
import selectors
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from launch.environment import MOST_PROCESSES, Group, Node
from launch.nodes.handshake import JoinRequest
from launch.nodes.node_part import (
    DETECTION_SECONDS,
    is_done,
    kill_ranks,
    meeting_seconds,
    new_store,
    run_part,
    say,
    started_again,
    take_interface,
)
from launch.nodes.rendezvous import (
    CLOSING_SECONDS,
    Deadline,
    Membership,
    RendezvousServer,
    enter,
    listen,
)
from launch.processes.signals import STARTED, heard, stop_raises
from service.basics.errors import EvenstepError, PeerLost, SpecError, Stopped, WillFailAgain
from service.basics.running_time import TimeLimit
from service.plan.plan import make_plan
from service.runs.checkpoint_files import checkpoints_in
from service.spec.models import Spec
from service.storage.store import StoreFailed

if TYPE_CHECKING:
    from launch.stored.following import Following
    from launch.stored.leading import Leading

WAIT_SECONDS = 30
_STOPPED, _LOST = Stopped.exit_code, PeerLost.exit_code
_NEVER_AGAIN = (SpecError.exit_code, WillFailAgain.exit_code)
_SETTLE_SECONDS = DETECTION_SECONDS + 5
"""How long node 0 waits for the last messages of a generation that has lost a node."""
_MANY_ROWS = 1 << 60


class _Newest(NamedTuple):
    """The newest checkpoint at one moment."""

    run: str | None
    """The id of its run."""
    step: int
    """-1 if there is none."""


@dataclass
class _LocalNode:
    """This node, through all generations."""

    job: Any
    node: Node
    own: JoinRequest
    secret: bytes
    leading: Leading | None = None
    """Of node 0, if the run is in an object store."""
    following: Following | None = None
    """Of another node, if the run is in an object store."""
    begun: bool = False

    @property
    def wait_seconds(self) -> float:
        cluster = self.job.spec.kubernetes
        elastic = cluster is not None and cluster.is_elastic
        return float(cluster.nodes.wait_seconds if elastic else WAIT_SECONDS)

    def newest_step(self) -> int:
        """The step of the newest checkpoint; -1 if there is none."""
        saved = checkpoints_in(self.job.directory().checkpoints)
        return saved[-1].step if saved else -1

    def newest(self) -> _Newest:
        """The newest checkpoint, and of which run it is: `--fresh` replaces the run meanwhile."""
        return _Newest(self.job.run_id(), self.newest_step())

    def has_saved_since(self, before: _Newest) -> bool:
        """Whether there is a newer checkpoint than this one."""
        now = self.newest()
        return now.step > (before.step if now.run == before.run else -1)

    def is_at_its_end(self) -> bool:
        """Whether the step of `--stop-at` is saved."""
        last = self.job.stop_at
        return last is not None and self.newest_step() >= last

    def trains(self, membership: Membership, group: Group | None) -> int:
        """Run the processes of this node in one generation; return their exit code."""
        if membership.peers:
            assert group is not None, "several nodes have a store"
            take_interface(group.address, membership.own_address)
        started = time.time() if self.begun else STARTED
        before = self.job.run_id()
        self.begun = True
        try:
            return run_part(
                self.job,
                self.node,
                membership,
                group,
                processes=self.own.processes,
                kill=_kill_ranks,
                stop=_ask_for_stop,
                started=started,
            )
        finally:
            heard.regroups = False
            self.job = self.job.again(before)


def run_elastic(
    job: Any,
    node: Node,
    own: JoinRequest,
    secret: bytes,
    *,
    leading: Leading | None = None,
    following: Following | None = None,
) -> int:
    """Run this node's processes in all generations; return the exit code of this node.

    Args:
        leading: if the run is in an object store, of node 0.
        following: the same of another node.
    Raises:
        SpecError: this job cannot run with these numbers of nodes, or the nodes disagree.
        PeerLost: too few nodes connected, or node 0 was lost and did not come back.
        Stopped: a stop was requested while the nodes connected.
    """
    numbers = possible_nodes(job.spec, node.least, node.nodes, processes=own.processes)
    local = _LocalNode(job, node, own, secret, leading, following)
    os.environ[MOST_PROCESSES] = str(node.nodes * own.processes)  # for the ranks
    if node.index:
        return _follow(local)
    say(
        f"Node 0 of {own.range}, rendezvous at {node.address}:{node.port}. Nodes may come and go: "
        f"the job runs with at least {node.least}."
    )
    return _lead(local, numbers)


def possible_nodes(spec: Spec, least: int, most: int, *, processes: int) -> frozenset[int]:
    """The numbers of nodes with which the job can run: with `exactness: bitwise` powers of two.

    Raises:
        SpecError: it cannot run with the least or with the most of them.
    """
    found = set()
    for nodes in range(least, most + 1):
        try:
            total = nodes * processes
            make_plan(spec, processes=total, train_rows=_MANY_ROWS, test_rows=1)
        except SpecError as error:
            if nodes in (least, most):
                of = f"{nodes} of {least}:{most} nodes with {processes} processes each"
                raise SpecError(f"{of}: {error}") from error
        else:
            found.add(nodes)
    return frozenset(found)


# ---- node 0


@dataclass
class Roster:
    """Which nodes take part, as node 0 knows it between two generations."""

    numbers: frozenset[int]
    """The possible numbers of nodes, with node 0."""
    expected: frozenset[int]
    """The nodes for which the next generation waits a while."""
    held_back: frozenset[int] = frozenset()
    """The nodes that were lost before a checkpoint, which wait for the next one."""
    members: frozenset[int] = field(default=frozenset())

    def candidates(self, there: Collection[int], least: int) -> list[int]:
        """Of the nodes that are there, those that can begin now; the lowest indexes first."""
        free = sorted(set(there) - self.held_back)
        if len(free) + 1 < least:  # then each is needed
            free = sorted(there)
        most = max((n for n in self.numbers if n <= len(free) + 1), default=0)
        return free[: most - 1] if most else []

    def ended(self, closing_messages: dict[int, dict[str, Any] | None], *, saved: bool) -> Roster:
        """The roster after a generation, from the last message of each of its nodes."""
        gone = {n for n in self.members if not _comes_again(closing_messages.get(n))}
        lost = {n for n in gone if not (closing_messages.get(n) or {}).get("leaving")}
        held_back = frozenset() if saved else self.held_back | lost
        return replace(self, expected=self.members - gone, held_back=held_back)


def _comes_again(closing: dict[str, Any] | None) -> bool:
    """Whether a node that sent this last message connects again at once."""
    if closing is None or closing.get("leaving"):
        return False
    return closing["end"] in (_STOPPED, _LOST)


def _lead(local: _LocalNode, numbers: frozenset[int]) -> int:
    """Node 0: one generation after the other, until the job ends; its exit code."""
    node, code = local.node, 1
    with listen(node.address, node.port) as listener, selectors.DefaultSelector() as events:
        server = RendezvousServer(local.own, local.secret, listener, events, say)
        try:
            code = _generations(local, server, numbers)
        except EvenstepError as error:
            code = error.exit_code
            raise
        finally:
            server.close(end=code)
    return code


def _generations(local: _LocalNode, server: RendezvousServer, numbers: frozenset[int]) -> int:
    roster = Roster(numbers, expected=frozenset(range(1, local.own.nodes)))
    while True:
        with stop_raises():
            members, state = _gathered_with_state(local, server, roster)
        membership, group, store = _begin(local, server, members, state)
        roster = replace(roster, members=frozenset(members))
        before = local.newest()
        with _LateJoins(server, roster, partial(local.has_saved_since, before)) as late_joins:
            code = local.trains(membership, group)
        membership.await_ends(_SETTLE_SECONDS if code == _LOST else CLOSING_SECONDS)
        del store  # the processes of all nodes have ended
        again = not local.is_at_its_end() and _goes_on(
            code, membership, asked=late_joins.asked, nodes=len(members) + 1
        )
        membership.leave(code, again=again, leaving=heard.signal_name is not None)
        if not again:
            return code
        roster = roster.ended(membership.closing_messages, saved=local.has_saved_since(before))


def _goes_on(code: int, membership: Membership, *, asked: bool, nodes: int) -> bool:
    """Whether there is another generation after one that ended with this code on node 0."""
    ends = membership.closing_messages.values()
    if heard.signal_name is not None or any(end and end["end"] in _NEVER_AGAIN for end in ends):
        return False
    if code == _STOPPED:
        return asked or any(not _comes_again(end) for end in ends)
    return code == _LOST and nodes > 1


def _gathered_with_state(
    local: _LocalNode, server: RendezvousServer, roster: Roster
) -> tuple[list[int], Mapping[str, Any]]:
    """The same as `_gathered`, and what they are told of the state that they resume from."""
    while True:
        members = _gathered(local, server, roster)
        if local.leading is None or not members:
            return members, {}
        offered = local.leading.offer(fresh=local.job.fresh)
        while (state := offered()) is None:
            server.look()
        if server.peers.keys() >= set(members):  # it may have taken minutes
            return members, state


def _gathered(local: _LocalNode, server: RendezvousServer, roster: Roster) -> list[int]:
    """The nodes of the next generation, without node 0.

    All expected ones; after `wait_seconds` without a new one also fewer.
    """
    least = local.own.least
    deadline = Deadline(meeting_seconds(local.job), say)
    known, last_call = None, TimeLimit(local.wait_seconds)
    while True:
        there = frozenset(server.peers)
        found = roster.candidates(there, least)
        if there != known:
            known, last_call = there, TimeLimit(local.wait_seconds)
        if len(found) + 1 >= least:
            if roster.expected <= there or not last_call.left:
                return found
        elif not deadline.goes_on(f"{len(there) + 1} of at least {least} nodes are connected"):
            raise PeerLost(
                f"After {meeting_seconds(local.job):g} s only {len(there) + 1} of at least {least} "
                "nodes are connected."
            )
        server.look()


def _begin(
    local: _LocalNode, server: RendezvousServer, members: list[int], state: Mapping[str, Any]
) -> tuple[Membership, Group | None, object]:
    """Tell these nodes that a generation begins."""
    server.generation += 1
    nodes = len(members) + 1
    names = ", ".join(map(str, [0, *members]))
    say(f"Generation {server.generation}: {nodes} of {local.own.range} nodes ({names}).")
    peers = server.taken(members)
    if not peers:
        return Membership([]), None, None
    membership = Membership(peers)
    store, address, port = new_store(membership.own_address)
    told = {"store": port, "address": address, "generation": server.generation, "nodes": nodes}
    told |= state
    for place, peer in enumerate(peers, start=1):
        peer.send({**told, "index": place})
    return membership, Group(0, nodes, local.own.processes, address, port), store


class _LateJoins:
    """While a generation trains: lets nodes in, and asks for a stop when one can join.

    It asks once, when a checkpoint of this generation is complete.
    """

    def __init__(self, server: RendezvousServer, roster: Roster, saved: Callable[[], bool]) -> None:
        self._server, self._roster, self._saved = server, roster, saved
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._receive, name="late-joins", daemon=True)
        self.asked = False
        self._is_told = False

    def __enter__(self) -> _LateJoins:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        # It may have asked when the processes had ended: that must not stop the next ones.
        heard.regroups = False

    def _receive(self) -> None:
        told: frozenset[int] = frozenset()
        while not self._over.is_set():
            self._server.look()
            new = self._new()
            if new - told:
                say(f"Node {_listed(new - told)} waits for the next checkpoint, to join.")
                told |= new
            if new and not self.asked and self._has_saved():
                self.asked = True
                say(f"Node {_listed(new)} can join: the state is saved for a new generation.")
                _ask_for_stop()

    def _has_saved(self) -> bool:
        """Whether a checkpoint of this generation is complete.

        A disk that cannot be read for a moment ends no thread, in which nodes are let in.
        """
        try:
            return self._saved()
        except OSError as error:
            if not self._is_told:
                say(f"WARNING: {error}: whether there is a new checkpoint is looked at again.")
            self._is_told = True
            return False

    def _new(self) -> frozenset[int]:
        """The waiting nodes with which the next generation would have more nodes than this."""
        members = self._roster.members
        waiting = frozenset(self._server.peers) - members
        roster = replace(self._roster, held_back=frozenset())
        more = len(roster.candidates(members | waiting, 1)) > len(members)
        return waiting if more else frozenset()


# ---- the other nodes


def _follow(local: _LocalNode) -> int:
    """Any other node: one generation after the other, until the job ends; its exit code."""
    node, own = local.node, local.own
    place: dict[str, Any] = {"address": node.address, "port": node.port, "secret": local.secret}
    say(f"Node {node.index} of {own.range}, rendezvous at {node.address}:{node.port}.")
    while True:
        # Without a cluster nobody starts node 0 again, except a person who is there.
        waits = node.returns or not local.begun
        seconds = meeting_seconds(local.job) if waits else local.wait_seconds
        with stop_raises(), started_again(node):
            peer, answer = enter(own, **place, seconds=seconds, say=say)
        if "end" in answer:
            peer.close()
            say(f"The job has ended with exit code {answer['end']}.")
            return int(answer["end"]) if answer["end"] in (0, _STOPPED) else _LOST
        own = replace(own, generation=int(answer["generation"]))
        group = Group(
            int(answer["index"]),
            int(answer["nodes"]),
            own.processes,
            str(answer["address"]),
            int(answer["store"]),
        )
        say(f"Generation {own.generation}: this is {group.index} of {group.nodes} nodes, from 0.")
        membership, code, is_here = Membership([peer]), 1, True
        try:
            if local.following is not None:
                with stop_raises():
                    local.following.resume(answer)
            code = local.trains(membership, group)
        except PeerLost as lost:
            say(str(lost))
            code = lost.exit_code
        except StoreFailed as away:
            say(f"WARNING: {away} This node waits for the next generation.")
            is_here = False
        except EvenstepError as error:
            code = error.exit_code
            raise
        finally:
            membership.leave(code, leaving=heard.signal_name is not None)
        if is_here and (code == 0 or not _follows_on(code, membership, returns=node.returns)):
            return code
        if is_here and local.following is not None:
            is_here = _looked(local.following)
        if is_here and is_done(local.job):
            say(f"Nothing to do: {local.job.runs / local.job.spec.name} is done.")
            return 0


def _looked(following: Following) -> bool:
    """Whether the store has told what there is of the run."""
    try:
        with stop_raises():
            following.look()
    except StoreFailed as away:
        say(f"WARNING: {away} This node waits for node 0, which needs the store too.")
        return False
    return True


def _follows_on(code: int, membership: Membership, *, returns: bool) -> bool:
    """Whether this node goes on to another generation after one that ended with this code."""
    if heard.signal_name is not None or code not in (_STOPPED, _LOST):
        return False
    leader = membership.closing_messages.get(0)
    if leader is None or leader.get("again"):  # it may be gone, or hung up for another node
        return True
    if leader["end"] in _NEVER_AGAIN:
        return False
    return returns and (bool(leader.get("leaving")) or leader["end"] not in (0, _STOPPED))


# ---- both


def _ask_for_stop() -> None:
    """Let the processes of this node save and stop, as for a signal."""
    heard.regroups = True


def _kill_ranks() -> None:
    """Kill the ranks and what they started, but not the server that starts the next ones."""
    from launch.processes.agent import our_own

    kill_ranks(but=our_own())


def _listed(indexes: Collection[int]) -> str:
    return ", ".join(map(str, sorted(indexes)))
