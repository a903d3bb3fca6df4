"""The receipt: which rows the forward passes really consumed, as a digest for each step."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from service.batches import Batch
from service.durable import sync_directory, sync_file
from service.receipt_file import append, keep_up_to
from service.world import World

_HELD_AT_MOST = 256  # micro-batches whose row ids are kept until they are digested


class Receipt:
    """Collects the rows of every step and writes one line per logging interval.

    A step's digest is the sum, modulo 2^64, of its micro-batches' digests, each over
    (step, micro-batch, rows in order).  So it does not depend on who computed which.
    """

    def __init__(self, path: Path, *, world: World, step: int) -> None:
        self._path = path
        self._world = world
        self._first = step
        self._held: list[tuple[int, Batch]] = []
        self._digests: dict[int, int] = {}
        if world.is_lead:
            keep_up_to(path, step)

    def note(self, step: int, batch: Batch) -> None:
        """Remember that a forward pass of step `step` (counted from 0) consumed `batch`."""
        self._held.append((step, batch))
        if len(self._held) >= _HELD_AT_MOST:
            self._digest()

    def write(self, step: int) -> None:
        """Write the digests of the steps up to `step` finished ones; every process calls it."""
        self._digest()
        steps = range(self._first, step)
        mine = torch.tensor([_signed(self._digests.get(s, 0)) for s in steps], dtype=torch.int64)
        total = self._world.sum_of_integers(mine)
        self._digests.clear()
        self._first = step
        if self._world.is_lead and len(steps):
            append(self._path, steps, total.tolist())

    def sync(self) -> None:
        """Put what was written so far on disk; only the lead has written anything."""
        if self._path.exists():
            sync_file(self._path)
            sync_directory(self._path.parent)

    def _digest(self) -> None:
        for step, batch in self._held:
            if len(batch.rows):
                digest = micro_batch_digest(step, batch)
                self._digests[step] = (self._digests.get(step, 0) + digest) & (2**64 - 1)
        self._held.clear()


def micro_batch_digest(step: int, batch: Batch) -> int:
    """64 bits over the step, the number of the micro-batch and its row ids in order."""
    text = step.to_bytes(8, "little") + batch.number.to_bytes(8, "little")
    hashed = hashlib.blake2b(text + batch.rows.astype("<i8").tobytes(), digest_size=8)
    return int.from_bytes(hashed.digest(), "little")


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value
