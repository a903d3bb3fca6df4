"""The store through which processes find each other, bound to one address of the machine.

torch's store listens on all interfaces, has no authentication, and lets anyone who reaches it
change or delete its entries. So it is bound to one address here; `launch.rank.joining` handles the
rest.
"""

from __future__ import annotations

import socket

from torch.distributed import TCPStore  # type: ignore[attr-defined]  # exported all the same

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
