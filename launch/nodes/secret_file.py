"""The secret of a meeting in a file that node 0 makes and the other nodes read. No torch."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from service.basics.atomic_files import (
    plain,
    remove_if_possible,
    replace_file,
    told_when_unread,
    told_when_unwritten,
)
from service.basics.errors import PeerLost
from service.basics.running_time import TimeLimit

FOLDER = ".meetings"
"""Among the runs, which every node sees."""
_BYTES = 32
_MOST_BYTES = 1024
_POLL_SECONDS = 0.1


@contextmanager
def secret_in(runs: Path, name: str, *, makes: bool, seconds: float) -> Iterator[bytes]:
    """The secret of the meeting of this name; its file is gone when node 0 leaves the block.

    The file is its owner's alone: who can read it can read the runs too.

    Args:
        makes: whether this is node 0.
        seconds: how long another node waits for the file.
    Raises:
        PeerLost: it did not come.
        EvenstepError: it cannot be written or read.
    """
    file = runs / FOLDER / name
    if makes:
        # Never read again: where others may write among the runs, it might be theirs by then.
        secret = secrets.token_hex(_BYTES)
        with told_when_unwritten(file):
            file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
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
                f"After {seconds:g} s node 0 has not written {file}. Look at its log; every node "
                "must see the runs in the same place (--runs)."
            )
        time.sleep(_POLL_SECONDS)
    with told_when_unread(file), open(file, "rb", opener=plain) as found:
        told = found.read(_MOST_BYTES)
    yield told
