"""The receipt: for each step, a digest of the rows that its forward passes used."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from service.data.batches import Batch
from service.distributed.world import World
from service.runs.receipt_file import ReceiptFile

_PLACE = struct.Struct("<qq")
_HELD_AT_MOST = 256  # micro-batches whose row ids are kept until they are digested


class Receipt:
    """Collects the rows of every step and writes one line per logging interval.

    A step's digest is the sum, modulo 2^64, of its micro-batches' digests, each over
    (step, micro-batch, rows in order).  So it does not depend on which process computed which.
    """

    def __init__(
        self,
        path: Path,
        *,
        world: World,
        step: int,
        say: Callable[[str], None] = print,
        changes: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """`say` reports lines that wait because the disk is full; `changes` are all changes of
        the spec.

        Raises:
            EvenstepError: the file cannot be written.
        """
        self._world = world
        self._first = step
        self._held: list[tuple[int, int, NDArray[np.int64]]] = []  # step, micro-batch, rows
        self._digests: dict[int, int] = {}
        self._file = (
            ReceiptFile(path, step=step, say=say, changes=changes) if world.is_lead else None
        )

    def note(self, step: int, micro_batches: Sequence[Batch]) -> None:
        """Add the rows that the forward passes of step `step` (counted from 0) used."""
        for batch in micro_batches:
            self._held.append((step, batch.number, batch.rows))
        if len(self._held) >= _HELD_AT_MOST:
            self._digest()

    def write(self, step: int) -> None:
        """Write the digests of the steps up to `step` finished ones; every process calls it."""
        self._digest()
        steps = range(self._first, step)
        if not steps:
            return  # all is written: the attempt began in the test of a step
        mine = torch.tensor([_signed(self._digests.get(s, 0)) for s in steps], dtype=torch.int64)
        total = self._world.sum_of_integers(mine)
        self._digests.clear()
        self._first = step
        if self._file is not None:
            self._file.add_rows(steps, total.tolist())

    def seal(self, step: int, files: Mapping[str, str]) -> None:
        """Record the SHA-256 of the tensor files of a checkpoint that is about to be published."""
        assert self._file is not None, "rank 0 saves"
        self._file.add_weights(step, files)

    def sync(self) -> None:
        """Sync all lines so far to disk; only rank 0 writes."""
        if self._file is not None:
            self._file.sync()

    def close(self) -> None:
        """Close it; nothing is written afterwards."""
        if self._file is not None:
            self._file.close()

    def _digest(self) -> None:
        for step, number, rows in self._held:
            if len(rows):
                digest = micro_batch_digest(step, number, rows)
                self._digests[step] = (self._digests.get(step, 0) + digest) & (2**64 - 1)
        self._held.clear()


def micro_batch_digest(step: int, number: int, rows: NDArray[np.int64]) -> int:
    """64 bits over the step, the number of the micro-batch and its row ids [B] in order."""
    words = _PLACE.pack(step, number) + rows.astype("<i8", copy=False).tobytes()
    return int.from_bytes(hashlib.blake2b(words, digest_size=8).digest(), "little")


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value
