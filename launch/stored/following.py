"""A further node of a run in a store: it brings what node 0 has published, and uploads nothing."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from service.basics.atomic_files import remove, told_when_unwritten
from service.runs.directory import RunDirectory
from service.storage.address import Address
from service.storage.bringing import RUN, bring_files, bring_newest
from service.storage.published import newest_published
from service.storage.store import open_store


def runs_of_node(scratch: Path, node: int) -> Path:
    """The directory of runs of a further node: not that of node 0, which may be on its machine."""
    return scratch.with_name(f"{scratch.name}-node-{node}")


class Following:
    """The directory of one further node, which is filled anew at each start."""

    def __init__(
        self, address: Address, scratch: Path, *, node: int, say: Callable[[str], None]
    ) -> None:
        """`address` is that of the run; `scratch` that of the runs of node 0 on this machine."""
        self._store = open_store(address)
        self.runs = runs_of_node(scratch, node)
        self._run = RunDirectory(self.runs / address.name)
        self._say = say

    def begin(self) -> None:
        """Bring what the checks before the start read.

        Raises:
            EvenstepError: the store did not answer, or has lost what was published.
        """
        with told_when_unwritten(self._run.path):
            remove(self._run.path)
            self.runs.mkdir(parents=True, exist_ok=True, mode=0o700)
            held = newest_published(self._store)
            if held is not None:
                only = {RUN, self._run.spec.name}
                bring_files(self._store, held, self._run.path, only=only)

    def bring(self) -> None:
        """Bring the checkpoint that node 0 resumes from: call it when the nodes have met.

        Raises:
            EvenstepError: the store did not answer, or has lost what was published.
        """
        began = time.monotonic()
        held = newest_published(self._store)
        with told_when_unwritten(self._run.path):
            self._run.logs.mkdir(parents=True, exist_ok=True)  # rank 0 makes that of node 0
            if held is None:
                return
            name = bring_newest(self._store, held, self._run.path, say=self._say)
        if name is not None:
            seconds = time.monotonic() - began
            self._say(f"Brought {self._store.address} ({name}) in {seconds:.1f} s.")
