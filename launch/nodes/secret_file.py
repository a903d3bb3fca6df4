"""The secret of a rendezvous in a file that node 0 writes and the other nodes read. No torch."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from service.basics.atomic_files import (
    make_directory,
    plain,
    remove_if_possible,
    replace_file,
    told_when_unread,
    told_when_unwritten,
)
from service.basics.errors import PeerLost
from service.basics.running_time import TimeLimit

_BYTES = 32
_MOST_BYTES = 1024
_POLL_SECONDS = 0.1


def folder_in(runs: Path) -> Path:
    """The folder of the secrets of this user, in the runs directory, which every node can access.

    A team may share the directory: nobody else could write into a folder that only its owner can
    read.
    """
    return runs / f".meetings-{os.geteuid()}"


@contextmanager
def secret_in(runs: Path, name: str, *, makes: bool, seconds: float) -> Iterator[bytes]:
    """The secret of the rendezvous with this name; node 0 deletes the file at the end of the block.

    Only its owner can read the file: who can read it can also read the runs.

    Args:
        makes: whether this is node 0.
        seconds: how long another node waits for the file.
    Raises:
        PeerLost: there was no file in time.
        EvenstepError: it cannot be written or read.
    """
    file = folder_in(runs) / name
    if makes:
        # Never read again: if others can write to the runs directory, they might have replaced it.
        secret = secrets.token_hex(_BYTES)
        with told_when_unwritten(file):
            runs.mkdir(parents=True, exist_ok=True)
            make_directory(file.parent, mode=0o700)
            replace_file(file, secret, mode=0o600)
        try:
            yield secret.encode()
        finally:
            remove_if_possible(file)
        return
    limit = TimeLimit(seconds)
    while not file.exists():
        if not limit.left:
            raise PeerLost(
                f"After {seconds:g} s node 0 has not written {file}. Check its log; every node "
                "must see the runs in the same place (--runs)."
            )
        time.sleep(_POLL_SECONDS)
    with told_when_unread(file), open(file, "rb", opener=plain) as found:
        told = found.read(_MOST_BYTES)
    yield told
