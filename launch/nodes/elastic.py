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
"""

from __future__ import annotations

import os
import selectors
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from launch.environment import MOST_PROCESSES, Group, Node
from launch.nodes.handshake import JoinRequest
from launch.nodes.node_part import (
    PATIENCE_SECONDS,
    is_done,
    kill_ranks,
    meeting_seconds,
    new_store,
    run_part,
    say,
    stop_raises,
    take_interface,
)
from launch.nodes.rendezvous import (
    FAREWELL_SECONDS,
    Hall,
    Membership,
    Patience,
    enter,
    listen,
)
from launch.processes.signals import STARTED, heard
from service.basics.errors import EvenstepError, PeerLost, SpecError, Stopped, WillFailAgain
from service.basics.running_time import TimeLimit
from service.plan.plan import make_plan
from service.runs.checkpoint_files import checkpoints_in
from service.spec.models import Spec

WAIT_SECONDS = 30
_STOPPED, _LOST = Stopped.exit_code, PeerLost.exit_code
_NEVER_AGAIN = (SpecError.exit_code, WillFailAgain.exit_code)
_SETTLE_SECONDS = PATIENCE_SECONDS + 5
"""How long node 0 waits for the last messages of a generation that has lost a node."""
_MANY_ROWS = 1 << 60


@dataclass
class _Here:
    """This node, through all generations."""

    job: Any
    node: Node
    own: JoinRequest
    secret: bytes
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

    def has_saved_since(self, step: int) -> bool:
        """Whether there is a newer checkpoint than that of this step."""
        return self.newest_step() > step

    def is_at_its_end(self) -> bool:
        """Whether the step of `--stop-at` is saved."""
        last = self.job.stop_at
        return last is not None and self.newest_step() >= last

    def trains(self, company: Membership, group: Group | None) -> int:
        """Run the processes of this node in one generation; return their exit code."""
        if company.friends:
            assert group is not None, "several nodes have a store"
            take_interface(group.address, company.own_address)
        started = time.time() if self.begun else STARTED
        before = self.job.run_id()
        self.begun = True
        try:
            return run_part(
                self.job,
                self.node,
                company,
                group,
                processes=self.own.processes,
                kill=_kill_ranks,
                stop=_ask_for_stop,
                started=started,
            )
        finally:
            heard.regroups = False
            self.job = self.job.again(before)


def run_elastic(job: Any, node: Node, own: JoinRequest, secret: bytes) -> int:
    """Run this node's processes in all generations; return the exit code of this node.

    Raises:
        SpecError: this job cannot run with these numbers of nodes, or the nodes disagree.
        PeerLost: too few nodes connected, or node 0 was lost and did not come back.
        Stopped: a stop was requested while the nodes connected.
    """
    numbers = possible_nodes(job.spec, node.least, node.nodes, processes=own.processes)
    here = _Here(job, node, own, secret)
    os.environ[MOST_PROCESSES] = str(node.nodes * own.processes)  # for the ranks
    if node.index:
        return _follow(here)
    say(
        f"Node 0 of {own.range}, meeting at {node.address}:{node.port}. Nodes may come and go: "
        f"the job runs with at least {node.least}."
    )
    return _lead(here, numbers)


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
class Roll:
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

    def ended(self, farewells: dict[int, dict[str, Any] | None], *, saved: bool) -> Roll:
        """The roll after a generation, from the last message of each of its nodes."""
        gone = {n for n in self.members if not _comes_again(farewells.get(n))}
        lost = {n for n in gone if not (farewells.get(n) or {}).get("leaving")}
        held_back = frozenset() if saved else self.held_back | lost
        return replace(self, expected=self.members - gone, held_back=held_back)


def _comes_again(farewell: dict[str, Any] | None) -> bool:
    """Whether a node that sent this last message connects again at once."""
    if farewell is None or farewell.get("leaving"):
        return False
    return farewell["end"] in (_STOPPED, _LOST)


def _lead(here: _Here, numbers: frozenset[int]) -> int:
    """Node 0: one generation after the other, until the job ends; its exit code."""
    node, code = here.node, 1
    with listen(node.address, node.port) as door, selectors.DefaultSelector() as events:
        hall = Hall(here.own, here.secret, door, events, say)
        try:
            code = _generations(here, hall, numbers)
        except EvenstepError as error:
            code = error.exit_code
            raise
        finally:
            hall.close(end=code)
    return code


def _generations(here: _Here, hall: Hall, numbers: frozenset[int]) -> int:
    roll = Roll(numbers, expected=frozenset(range(1, here.own.nodes)))
    while True:
        with stop_raises():
            members = _gathered(here, hall, roll)
        company, group, store = _begin(here, hall, members)
        roll = replace(roll, members=frozenset(members))
        before = here.newest_step()
        with _Reception(hall, roll, partial(here.has_saved_since, before)) as reception:
            code = here.trains(company, group)
        company.await_ends(_SETTLE_SECONDS if code == _LOST else FAREWELL_SECONDS)
        del store  # the processes of all nodes have ended
        again = not here.is_at_its_end() and _goes_on(
            code, company, asked=reception.asked, nodes=len(members) + 1
        )
        company.part(code, again=again, leaving=heard.signal_name is not None)
        if not again:
            return code
        roll = roll.ended(company.farewells, saved=here.has_saved_since(before))


def _goes_on(code: int, company: Membership, *, asked: bool, nodes: int) -> bool:
    """Whether there is another generation after one that ended with this code on node 0."""
    ends = company.farewells.values()
    if heard.signal_name is not None or any(end and end["end"] in _NEVER_AGAIN for end in ends):
        return False
    if code == _STOPPED:
        return asked or any(not _comes_again(end) for end in ends)
    return code == _LOST and nodes > 1


def _gathered(here: _Here, hall: Hall, roll: Roll) -> list[int]:
    """The nodes of the next generation, without node 0.

    All expected ones; after `wait_seconds` without a new one also fewer.
    """
    least = here.own.least
    patience = Patience(meeting_seconds(here.job), say)
    known, last_call = None, TimeLimit(here.wait_seconds)
    while True:
        there = frozenset(hall.friends)
        found = roll.candidates(there, least)
        if there != known:
            known, last_call = there, TimeLimit(here.wait_seconds)
        if len(found) + 1 >= least:
            if roll.expected <= there or not last_call.left:
                return found
        elif not patience.goes_on(f"{len(there) + 1} of at least {least} nodes are connected"):
            raise PeerLost(
                f"After {meeting_seconds(here.job):g} s only {len(there) + 1} of at least {least} "
                "nodes are connected."
            )
        hall.look()


def _begin(here: _Here, hall: Hall, members: list[int]) -> tuple[Membership, Group | None, object]:
    """Tell these nodes that a generation begins."""
    hall.generation += 1
    nodes = len(members) + 1
    names = ", ".join(map(str, [0, *members]))
    say(f"Generation {hall.generation}: {nodes} of {here.own.range} nodes ({names}).")
    peers = hall.taken(members)
    if not peers:
        return Membership([]), None, None
    company = Membership(peers)
    store, address, port = new_store(company.own_address)
    told = {"store": port, "address": address, "generation": hall.generation, "nodes": nodes}
    for place, peer in enumerate(peers, start=1):
        peer.say({**told, "index": place})
    return company, Group(0, nodes, here.own.processes, address, port), store


class _Reception:
    """While a generation trains: lets nodes in, and asks for a stop when one can join.

    It asks once, when a checkpoint of this generation is complete.
    """

    def __init__(self, hall: Hall, roll: Roll, saved: Callable[[], bool]) -> None:
        self._hall, self._roll, self._saved = hall, roll, saved
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._receive, name="reception", daemon=True)
        self.asked = False

    def __enter__(self) -> _Reception:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _receive(self) -> None:
        told: frozenset[int] = frozenset()
        while not self._over.is_set():
            self._hall.look()
            new = self._new()
            if new - told:
                say(f"Node {_listed(new - told)} waits for the next checkpoint, to join.")
                told |= new
            if new and not self.asked and self._saved():
                self.asked = True
                say(f"Node {_listed(new)} can join: the state is saved for a new generation.")
                _ask_for_stop()

    def _new(self) -> frozenset[int]:
        """The waiting nodes with which the next generation would have more nodes than this."""
        members = self._roll.members
        waiting = frozenset(self._hall.friends) - members
        roll = replace(self._roll, held_back=frozenset())
        more = len(roll.candidates(members | waiting, 1)) > len(members)
        return waiting if more else frozenset()


# ---- the other nodes


def _follow(here: _Here) -> int:
    """Any other node: one generation after the other, until the job ends; its exit code."""
    node, own = here.node, here.own
    place: dict[str, Any] = {"address": node.address, "port": node.port, "secret": here.secret}
    say(f"Node {node.index} of {own.range}, meeting at {node.address}:{node.port}.")
    while True:
        # Without a cluster nobody starts node 0 again, except a person who is there.
        waits = node.returns or not here.begun
        seconds = meeting_seconds(here.job) if waits else here.wait_seconds
        with stop_raises():
            friend, answer = enter(own, **place, seconds=seconds, say=say)
        if "end" in answer:
            friend.close()
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
        company, code = Membership([friend]), 1
        try:
            code = here.trains(company, group)
        finally:
            company.part(code, leaving=heard.signal_name is not None)
        if code == 0 or not _follows_on(code, company, returns=node.returns):
            return code
        if is_done(here.job):
            say(f"Nothing to do: {here.job.runs / here.job.spec.name} is done.")
            return 0


def _follows_on(code: int, company: Membership, *, returns: bool) -> bool:
    """Whether this node goes on to another generation after one that ended with this code."""
    if heard.signal_name is not None or code not in (_STOPPED, _LOST):
        return False
    leader = company.farewells.get(0)
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
