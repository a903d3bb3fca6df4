"""The store through which processes find each other: in memory, or at one address of the machine.

On one machine it is a file in memory, which only processes of the same user can open. Between
machines it is torch's store, which listens on all interfaces, has no authentication, and lets
anyone who reaches it change or delete its entries. So it is bound to one address here;
`launch.rank.joining` handles the rest.
"""

from __future__ import annotations

import os
import socket
from typing import BinaryIO, NamedTuple

from torch.distributed import HashStore, Store, TCPStore  # type: ignore[attr-defined]  # exported

LOOPBACK = "127.0.0.1"


def own_store(address: str, port: int = 0) -> TCPStore:
    """A store that listens only on this address of the machine; by default on a free port.

    Raises:
        OSError: the machine has no such address, or the port is taken.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listening = socket.create_server((address, port), family=family)
    port = listening.getsockname()[1]
    return TCPStore(
        address,
        port,
        is_master=True,
        wait_for_workers=False,
        master_listen_fd=listening.detach(),  # by default it listens on all interfaces
    )


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
    names of the addresses it connects to, which takes 20 s where the server does not answer.
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
