"""The part of torchrun's store that belongs to one attempt.

torchrun keeps one store for all attempts of a job, and torch uses the same keys in it again: so
the processes of a restart would connect to dead ones. Nothing that torchrun tells a process names
the attempt either: TORCHELASTIC_RESTART_COUNT counts the failures of one agent, so after a failure
on one node it differs between the nodes. Therefore rank 0 invents a name, and tells it to each
process that asks.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator

from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]  # exported

from launch.environment import Environment
from service.basics.errors import PeerLost
from service.basics.running_time import TimeLimit

FOREIGN = (
    "Another program has changed what the processes of this job exchange in their store: "
    "docs/explanation/reliability.md says who must not reach it."
)
_FIRST_PAUSE_SECONDS, _LAST_PAUSE_SECONDS = 0.002, 0.01
"""Between two questions of one process."""
_ASKED_A_SECOND = 8000
"""By all processes together, at most: the pauses of more than 80 are longer."""


def questions(seconds: float, *, processes: int) -> Iterator[None]:
    """One element for each question of one of so many processes, until the time is over.

    Between two of them it waits, each time twice as long, up to a limit.
    """
    limit, pause = TimeLimit(seconds), _FIRST_PAUSE_SECONDS
    longest = max(_LAST_PAUSE_SECONDS, processes / _ASKED_A_SECOND)
    while True:
        yield
        if not limit.left:
            return
        time.sleep(min(pause, limit.left))
        pause = min(2 * pause, longest)


def of_attempt(store: Store, environment: Environment, *, seconds: float) -> Store:
    """The part of a store that no earlier attempt of the job has used; every process calls it.

    Args:
        seconds: how long to wait for the other processes.
    Raises:
        PeerLost: another program writes into the store, or not all arrived in time.
    """
    if environment.rank == 0:
        return _named(store, environment, seconds)
    own, name = f"asks/{environment.rank}", secrets.token_hex(8)
    store.set(own, name)
    for _ in questions(seconds, processes=environment.world_size):
        asked, _, told = _value(store, f"told/{environment.rank}").partition(" ")
        if asked == name:
            part = PrefixStore(told, store)
            part.set(_knows(environment.rank), "")
            return part
        if _value(store, own) != name:
            raise PeerLost(FOREIGN)
    raise PeerLost(f"After {seconds:g} s rank 0 has not connected.")


def _named(store: Store, environment: Environment, seconds: float) -> Store:
    """A new part, when every other process has been told its name.

    A process of an earlier attempt may have asked last: so each is answered until it is here.
    """
    name = secrets.token_hex(8)
    part = PrefixStore(name, store)
    awaited = set(range(1, environment.world_size))
    for _ in questions(seconds, processes=environment.world_size):
        for rank in sorted(awaited):
            if part.check([_knows(rank)]):
                awaited.discard(rank)
            elif asks := _value(store, f"asks/{rank}"):
                store.set(f"told/{rank}", f"{asks} {name}")
        if not awaited:
            return part
    here = environment.world_size - len(awaited)
    raise PeerLost(missing(here, environment, seconds))


def missing(here: int, environment: Environment, seconds: float) -> str:
    """That not all processes have connected in time, in words."""
    return f"After {seconds:g} s only {here} of {environment.world_size} processes have connected."


def _knows(rank: int) -> str:
    return f"knows/{rank}"


def _value(store: Store, key: str) -> str:
    """What is there; empty if nothing is. Whoever reaches the store could have written it."""
    return store.get(key).decode(errors="replace") if store.check([key]) else ""
