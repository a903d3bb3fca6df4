"""The store through which processes find each other: in memory, or at one address of the machine.

On one machine it is a file in memory, which only processes of the same user can open. Between
machines it is torch's store, which listens on all interfaces, has no authentication, and lets
anyone who reaches it change or delete its entries. So it is bound to one address here;
`launch.rank.joining` handles the rest.
"""

from __future__ import annotations

import ctypes
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from typing import BinaryIO, NamedTuple

from torch.distributed import HashStore, Store, TCPStore  # type: ignore[attr-defined]  # exported

LOOPBACK = "127.0.0.1"
_BRIEF = "timeout:1 attempts:1"


def own_store(address: str, port: int = 0) -> TCPStore:
    """A store that listens only on this address of the machine; by default on a free port.

    Raises:
        OSError: the machine has no such address, or the port is taken.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listening = socket.create_server((address, port), family=family)
    port = listening.getsockname()[1]
    with brief_lookups(address):
        return TCPStore(
            address,
            port,
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=listening.detach(),  # by default it listens on all interfaces
        )


@contextmanager
def brief_lookups(address: str) -> Iterator[None]:
    """A context in which torch connects to this address, and this thread asks for names briefly.

    torch looks up the name of each address that it connects to, only to log it. Where the name
    server does not answer, that takes 10 s, which nothing can interrupt: here it takes 1 s. The
    lookups of an address that is a name itself, which are needed, are as patient as always; so are
    all of them if RES_OPTIONS is set.
    """
    again = getattr(ctypes.CDLL(None), "__res_init", None)  # of glibc: reads the options again
    if again is None or "RES_OPTIONS" in os.environ or not _is_number(address):
        yield
        return
    os.environ["RES_OPTIONS"] = _BRIEF
    try:
        again()
        yield
    finally:
        del os.environ["RES_OPTIONS"]
        again()


def _is_number(address: str) -> bool:
    try:
        ip_address(address.partition("%")[0])
    except ValueError:
        return False
    return True


class LocalStore(NamedTuple):
    """The store of one machine's processes, while their launcher keeps it open."""

    store: Store
    """What torch's agent holds; it asks nothing of it."""
    file: str
    """The path by which they open it; empty if it is at an address instead."""
    port: int
    """0 if it is a file."""
    memory: BinaryIO | None
    """That file."""


def local_store() -> LocalStore:
    """A store for the processes of this machine.

    Nothing listens, nothing is left on a disk, and no name server is asked: torch looks up the
    names of the addresses it connects to, see `brief_lookups`.
    """
    if not hasattr(os, "memfd_create"):  # not on Linux
        store = own_store(LOOPBACK)
        return LocalStore(store, "", store.port, None)
    memory = os.fdopen(os.memfd_create("evenstep-store"), "rb")
    # The launcher does not open it as a store: at its end torch's object writes once more to the
    # path, which could by then be another file with the same descriptor.
    return LocalStore(HashStore(), f"/proc/{os.getpid()}/fd/{memory.fileno()}", 0, memory)


def close(store: LocalStore) -> None:
    """Free its memory. No process can open it any more."""
    if store.memory is not None:
        store.memory.close()
