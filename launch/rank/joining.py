"""How the processes of a job connect through a store that others may have modified.

Nothing from the store is unpickled, and a foreign change ends the job within seconds
instead of a long wait.
"""

from __future__ import annotations

import os
import secrets
from datetime import timedelta

import psutil  # type: ignore[import-untyped]  # its wheel has no types
from torch.distributed import FileStore, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from launch.environment import RUN_OF_STORE, STORE_FILE, Environment
from launch.rank.attempts import (
    FOREIGN,
    missing,
    of_attempt,
    questions,
)
from launch.rank.store import LOOPBACK, brief_lookups, own_store
from service.basics.errors import PeerLost
from service.basics.running_time import TimeLimit
from service.distributed.recursive_doubling import MANY
from service.distributed.world import CONNECT_SECONDS

_LOOK_SECONDS = 1.0
_COUNT, _ALL = "joined", "all joined"


def store_of(environment: Environment, *, seconds: float) -> Store | None:
    """The store of this job; None if torch finds it: on several nodes, if rank 0 has it.

    Args:
        seconds: how long to wait for the process that has it.
    Raises:
        PeerLost: the processes did not find each other in the store of torchrun.
    """
    run = os.environ.get(RUN_OF_STORE)
    if run is not None:
        file = os.environ.get(STORE_FILE)
        return PrefixStore(
            run, _in_file(file) if file else _client(os.environ["MASTER_ADDR"], seconds)
        )
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        kept = PrefixStore("evenstep", _client(os.environ["MASTER_ADDR"], seconds))
        return of_attempt(kept, environment, seconds=seconds)
    if not on_one_node(environment):
        return None
    if environment.rank == 0:
        return own_store(LOOPBACK, int(os.environ["MASTER_PORT"]))
    return _client(LOOPBACK, seconds)


def on_one_node(environment: Environment) -> bool:
    """Whether all processes of the job are on this machine."""
    return environment.local_world_size == environment.world_size


def keep_to_loopback() -> None:
    """Let gloo and NCCL listen on loopback only: all processes of the job are on this machine.

    Variables that the user has set take precedence.
    """
    for name, addresses in psutil.net_if_addrs().items():
        if LOOPBACK in {each.address for each in addresses}:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")


def connect_in_few_requests(environment: Environment) -> None:
    """Let gloo ask the store for all addresses in one request, and connect many processes lazily.

    Each with each, 1,000 processes would open 999 connections each, and the addresses that one
    writes into the store grow with their number. Connected when they first send to each other,
    they have about two connections each, and five requests. What the user has set wins.
    """
    os.environ.setdefault("GLOO_ENABLE_STORE_V2_API", "1")
    if environment.world_size >= MANY:
        os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")


def wait_for_all(store: Store, environment: Environment, *, seconds: float) -> None:
    """Return when every process of the job has arrived; connecting is then fast.

    The processes may start at very different times; if a process's own key is missing or changed,
    another program writes into the store, which is detected within a second.

    Raises:
        PeerLost: another program writes into it, or not all arrived in time.
    """
    own, token = f"here/{environment.rank}", secrets.token_hex(16)
    store.set(own, token)
    most = store.add(_COUNT, 1)
    if most >= environment.world_size:
        store.set(_ALL, "1")
    limit = TimeLimit(seconds)
    while not _is_there(store, _ALL, environment.world_size):
        here = store.add(_COUNT, 0)
        if here < most or not store.check([own]) or store.get(own) != token.encode():
            raise PeerLost(FOREIGN)
        if here >= environment.world_size:
            return
        if not limit.left:
            raise PeerLost(missing(here, environment, seconds))
        most = here


def _is_there(store: Store, key: str, processes: int) -> bool:
    """Whether it is there, or comes within a moment.

    It asks again and again: torch's own wait writes two warnings for each of its timeouts.
    """
    return any(store.check([key]) for _ in questions(_LOOK_SECONDS, processes=processes))


def _in_file(path: str) -> FileStore:
    store = FileStore(path, -1)
    store.set_timeout(timedelta(seconds=CONNECT_SECONDS))
    return store


def _client(host: str, seconds: float) -> TCPStore:
    port = int(os.environ["MASTER_PORT"])
    with brief_lookups(host):
        store = TCPStore(host, port, is_master=False, timeout=timedelta(seconds=seconds))
    store.set_timeout(timedelta(seconds=CONNECT_SECONDS))
    return store
