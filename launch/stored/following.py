"""A further node of a run in a store: it brings what node 0 has published, and uploads nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import IO, Any

from launch.processes.signals import heard
from service.basics.atomic_files import remove, told_when_unwritten
from service.basics.errors import PeerLost, SpecError
from service.runs.directory import RunDirectory, lock_of
from service.storage.address import Address
from service.storage.bringing import RUN, Gone, bring_checkpoint, bring_files, bring_newest
from service.storage.published import checkpoints_of, is_newest, newest_published
from service.storage.store import open_store


def runs_of_node(scratch: Path, node: int) -> Path:
    """The directory of runs of a further node: not that of node 0, which may be on its machine."""
    return scratch.with_name(f"{scratch.name}-node-{node}")


_OWN = ("logs", "failures")
"""What the processes of this node write in the directory of the run."""


class Following:
    """The directory of one further node, which is filled anew at each start."""

    def __init__(
        self, address: Address, scratch: Path, *, node: int, say: Callable[[str], None]
    ) -> None:
        """`address` is that of the run; `scratch` that of the runs of node 0 on this machine."""
        self._store = open_store(address).until(lambda: heard.signal_name is not None)
        self.runs = runs_of_node(scratch, node)
        self._run = RunDirectory(self.runs / address.name)
        self._say = say
        self._lock: IO[str] | None = None

    @property
    def address(self) -> Address:
        """Of the run."""
        return self._store.address

    def begin(self) -> None:
        """Bring what the checks before the start read.

        Raises:
            RunInUse: another launcher of this node is at work on this machine.
            EvenstepError: the store did not answer, or has lost what was published.
        """
        with told_when_unwritten(self._run.path):
            self.runs.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock = lock_of(RunDirectory(self.runs))
            remove(self._run.path)
        self.look()

    def look(self) -> None:
        """Bring again what tells whether the run is done; the logs of this node stay.

        Raises:
            EvenstepError: see `begin`.
        """
        with told_when_unwritten(self._run.path):
            self.runs.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._empty(but=_OWN)
            held = newest_published(self._store)
            if held is not None:
                only = {RUN, self._run.spec.name}
                bring_files(self._store, held, self._run.path, only=only)

    def resume(self, told: Mapping[str, Any]) -> None:
        """Bring the checkpoint that node 0 of an elastic job resumes from, in place of an earlier.

        Args:
            told: what node 0 has said of it, see `Leading.offer`.
        Raises:
            SpecError: node 0 has another `--runs`.
            PeerLost: that node 0 has gone on without this node, or another one has its run.
            EvenstepError: the store did not answer, or has lost what was published.
        """
        if "checkpoint" not in told:
            raise SpecError(
                f"--runs {self._store.address.parent}: node 0 keeps the runs in a directory. Give "
                "all nodes the same --runs."
            )
        began, name = time.monotonic(), told["checkpoint"]
        self.look()
        with told_when_unwritten(self._run.path):
            self._run.logs.mkdir(parents=True, exist_ok=True)
            if name is None:
                return
            self._bring_named(str(name), int(told["term"]))
        seconds = time.monotonic() - began
        self._say(f"Brought {self._store.address} ({name}) in {seconds:.1f} s.")

    def _bring_named(self, name: str, term: int) -> None:
        while True:
            held = newest_published(self._store)
            if held is None or held.stamp.term != term or name not in checkpoints_of(held):
                raise PeerLost(
                    f"{self._store.address}: the run has gone on from {name} without this node."
                )
            try:
                bring_checkpoint(self._store, held, name, self._run.path)
                return
            except Gone:
                if is_newest(self._store, held):
                    raise

    def _empty(self, *, but: Collection[str]) -> None:
        for path in self._run.path.glob("*"):
            if path.name not in but:
                remove(path)

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
