"""The shards of a checkpoint: which process writes which bytes, and the buffer for them.

If every process has the same state, each can write any part of a checkpoint's files.  Buffers
are still those of rank 0: a task may change its own depending on the rows of a process.  If
parameters are sharded, each process writes its own rows to their positions in the same
files.
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from service.basics.errors import Diverged
from service.basics.multipart import Part, parts_of, shared_out
from service.checkpoints.pending_copies import (
    DeviceCopies,
    LateCopies,
    PendingCopies,
    PendingCopy,
)
from service.checkpoints.snapshots import Content
from service.distributed.devices import copies_late, side_stream
from service.runs.checkpoint_files import OPTIMIZER, header
from service.sharding.heap import populate
from service.sharding.sharding import first_row, is_sharded, own_rows, writes_rows

# Of a share.  Measured: two processes write 120 MiB no faster than one, 1,140 MiB much faster.
_LEAST_PARTS = 4


class Segment(NamedTuple):
    """A range of numbers of one tensor, in the order of the file."""

    name: str
    begin: int
    """The offset of its first byte in the file."""
    end: int
    numbers: Tensor
    """The tensor in its shape, or a piece of it: [numbers]."""
    still: Tensor | None = None
    """The tensor that has these rows, if it changes in an update only."""

    def cut(self, begin: int, end: int) -> Segment:
        """The part of it between these bytes of the file, which must be boundaries of numbers."""
        if begin <= self.begin and self.end <= end:
            return self
        begin, end = max(begin, self.begin), min(end, self.end)
        width = self.numbers.element_size()
        piece = slice((begin - self.begin) // width, (end - self.begin) // width)
        numbers = self.numbers.reshape(-1)[piece]
        return self._replace(begin=begin, end=end, numbers=numbers)


@dataclass(frozen=True)
class Shard:
    """The parts of the files that one process writes."""

    shares: list[set[Part]]
    """The parts: one share for each parallel writer."""
    heads: dict[str, bytes]
    """The header of each file."""
    stretches: dict[str, list[Segment]]
    """The numbers in these parts, by file, in order."""
    rest: dict[str, Any]
    trained: frozenset[str]
    by_rows: bool = False
    """The segments are the rows of this process, and may end inside a part: all of
    them are written, and then the parts are hashed on disk."""

    def pieces(self, *, with_heads: bool) -> Iterator[tuple[str, int, Iterator[memoryview]]]:
        """(file, offset, bytes) of each segment in order, and of the headers."""
        for file, head in self.heads.items() if with_heads else ():
            yield file, 0, iter([memoryview(head)])
        for file, stretches in self.stretches.items():
            for stretch in stretches:
                yield file, stretch.begin, iter([_bytes_of(stretch.numbers)])

    def own_bytes(self) -> Iterator[tuple[int, int, memoryview]]:
        """(number of the file, offset, bytes) of each segment in order, without the headers."""
        for number, stretches in enumerate(self.stretches.values()):
            for stretch in stretches:
                yield number, stretch.begin, _bytes_of(stretch.numbers)

    def bytes_of(self, part: Part) -> Iterator[memoryview]:
        """The bytes of one part, copied to main memory piece by piece."""
        head = self.heads[part.file]
        if part.begin < len(head):
            yield memoryview(head)[part.begin : part.end]
        row = self.stretches[part.file]
        first = bisect_right(row, part.begin, key=lambda stretch: stretch.end)
        for number in range(first, len(row)):
            if row[number].begin >= part.end:
                break
            yield _bytes_of(row[number].cut(part.begin, part.end).numbers)

    @property
    def size_bytes(self) -> int:
        """Bytes of all parts."""
        return sum(s.end - s.begin for of_file in self.stretches.values() for s in of_file)

    @property
    def layout(self) -> str:
        """Equal if two processes have the same tensors in the same parts."""
        return hashlib.sha256(b"".join(self.heads.values())).hexdigest()


class ShardLayout:
    """The layout of a state in its files, and the shares of the processes of a node."""

    def __init__(
        self, content: Content, *, processes: int, streams: int = 1, part_bytes: int
    ) -> None:
        """Shares for each process; fewer if the state is small.

        Args:
            streams: the number of shares that each process writes in parallel.
            part_bytes: a multiple of 8, so that no part ends inside a number.
        """
        self._content = content
        self._processes = processes
        self._heads = {file: header(content.entries(file)) for file in content.tensors}
        self._stretches = {
            file: _in_a_row(content, file, len(self._heads[file])) for file in content.tensors
        }
        bound: set[Part] = set()
        every: list[Part] = []
        for file, stretches in self._stretches.items():
            size = stretches[-1].end if stretches else len(self._heads[file])
            parts = parts_of(file, size, part_bytes)
            every += parts
            for stretch in stretches if file != OPTIMIZER else ():
                if stretch.name not in content.trained and stretch.numbers.numel():
                    last = (stretch.end - 1) // part_bytes
                    bound.update(parts[stretch.begin // part_bytes : last + 1])
        shares = min(processes * streams, most_shares(content.size_bytes, part_bytes))
        self._shares = shared_out(every, shares, first=bound)

    def shard(self, index: int) -> Shard:
        """The shard of that process; the tensors are not copied."""
        shares = self._shares[index :: self._processes]
        spans = _spans([part for share in shares for part in share])
        stretches = {
            file: [
                stretch.cut(begin, end)
                for stretch in stretches
                for begin, end in spans.get(file, ())
                if stretch.begin < end and begin < stretch.end
            ]
            for file, stretches in self._stretches.items()
        }
        content = self._content
        return Shard(shares, self._heads, stretches, content.rest, content.trained)


def shard_by_rows(content: Content, *, index: int, hashing: int, part_bytes: int) -> Shard:
    """The part of the content that process `index` writes, if each has only some rows.

    Rows are consecutive in a file, so they are one range of its bytes.  What is not sharded, such
    as buffers and the optimizer's counters, is written by rank 0.

    Args:
        hashing: how many processes hash the files; each of the first ones has a share of the parts.
    """
    heads = {file: header(content.entries(file)) for file in content.tensors}
    stretches: dict[str, list[Segment]] = {}
    parts: list[Part] = []
    for file, tensors in content.tensors.items():
        at, row = len(heads[file]), []
        for name, tensor in tensors.items():
            rows, begin = own_rows(tensor), at
            if is_sharded(tensor) and rows.numel():
                begin += first_row(tensor) * (tensor.nbytes // tensor.shape[0])
            if rows.numel() and (writes_rows(tensor) if is_sharded(tensor) else index == 0):
                still = tensor if content.is_still(file, name) else None
                row.append(Segment(name, begin, begin + rows.nbytes, rows, still))
            at += tensor.nbytes
        stretches[file] = row
        parts += parts_of(file, at, part_bytes)
    hashed = parts[len(parts) * index // hashing : len(parts) * (index + 1) // hashing]
    return Shard([{*hashed}], heads, stretches, content.rest, content.trained, by_rows=True)


def _bytes_of(numbers: Tensor) -> memoryview:
    view: memoryview = numbers.reshape(-1).cpu().contiguous().view(torch.uint8).numpy().data
    return view


def most_shares(size_bytes: int, part_bytes: int) -> int:
    """The largest number of shares for a state."""
    return max(1, size_bytes // (_LEAST_PARTS * part_bytes))


def _in_a_row(content: Content, file: str, at: int) -> list[Segment]:
    row = []
    for name, tensor in content.tensors[file].items():
        still = tensor if content.is_still(file, name) else None
        row.append(Segment(name, at, at + tensor.nbytes, tensor, still))
        at += tensor.nbytes
    return row


def _spans(parts: Sequence[Part]) -> dict[str, list[tuple[int, int]]]:
    """By file, the ranges in which parts follow each other without a gap."""
    spans: dict[str, list[tuple[int, int]]] = {}
    for file, begin, end in sorted(parts):
        of_file = spans.setdefault(file, [])
        if of_file and of_file[-1][1] == begin:
            begin, _ = of_file.pop()
        of_file.append((begin, end))
    return spans


class Snapshot:
    """A reused buffer in main memory with the layout of the files, for a copy of the state.

    What changes in an update only is copied while the next pass runs: from main memory by the
    writer, and by a device on a stream of its own.  The update waits for that.
    """

    def __init__(self, device: torch.device) -> None:
        # A GPU copies to pinned memory asynchronously, in stream order: what is copied on
        # its current stream is the state as it is now.
        self._device = device
        self._pinned = copies_late(device)
        self._stream = side_stream(device)
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def reserve(self, size_bytes: int) -> None:
        """Allocate memory for tensors of this size, and touch all of it."""
        size_bytes += 1024  # the numbers in a file are aligned to their width
        if self._buffer.numel() < size_bytes:
            self._buffer = torch.empty(0, dtype=torch.uint8)  # released before more is allocated
            self._buffer = torch.empty(size_bytes, dtype=torch.uint8, pin_memory=self._pinned)
            if self._pinned or not populate(self._buffer):
                self._buffer.zero_()

    def whole(self, content: Content) -> tuple[Content, LateCopies]:
        """A copy of the content in the buffer, valid until the next one; and what to await."""
        every = [segment for file in content.tensors for segment in _in_a_row(content, file, 0)]
        spaces, arrived = self._copies(every)
        copies = iter(spaces)
        held = {
            file: {name: next(copies) for name in tensors}
            for file, tensors in content.tensors.items()
        }
        return replace(content, tensors=held), arrived

    def part(self, shard: Shard) -> tuple[Shard, LateCopies]:
        """The same for the shard of one process."""
        every = [segment for stretches in shard.stretches.values() for segment in stretches]
        spaces, arrived = self._copies(every)
        copies = iter(spaces)
        held = {
            file: [stretch._replace(numbers=next(copies)) for stretch in stretches]
            for file, stretches in shard.stretches.items()
        }
        return replace(shard, stretches=held), arrived

    @torch.no_grad()
    def _copies(self, segments: Sequence[Segment]) -> tuple[list[Tensor], LateCopies]:
        """The spaces of these tensors, and the copies that are made late: the others are made."""
        self.reserve(sum(segment.numbers.nbytes for segment in segments))
        spaces, late = [], []
        at = 0
        for segment in segments:
            numbers = segment.numbers
            at += -at % numbers.element_size()
            space = self._buffer[at : at + numbers.nbytes].view(numbers.dtype).view(numbers.shape)
            if segment.still is not None and numbers.device.type == self._device.type:
                late.append(PendingCopy(segment.name, numbers, space, segment.still))
            else:
                space.copy_(numbers, non_blocking=self._pinned)
            spaces.append(space)
            at += numbers.nbytes
        if self._pinned:
            return spaces, DeviceCopies(late, self._device, self._stream)
        return spaces, PendingCopies(late)


def require_finite(shard: Shard) -> None:
    """Check the content before it is published.

    A buffer may contain infinities, as masks do; trained values and the optimizer's state may not.

    Raises:
        Diverged: names the value that is not finite.
    """
    for file, stretches in shard.stretches.items():
        for stretch in stretches:
            low, high = _extremes(stretch.numbers)
            is_buffer = file != OPTIMIZER and stretch.name not in shard.trained
            if math.isnan(low) or (not is_buffer and (math.isinf(low) or math.isinf(high))):
                raise _diverged(shard, f"{stretch.name} in {file}")
    for name, value in _floats(shard.rest["optimizer"]["state"], "the optimizer's state"):
        if not math.isfinite(value):
            raise _diverged(shard, name)


def _diverged(shard: Shard, what: str) -> Diverged:
    return Diverged(
        f"After step {shard.rest['step']}, {what} is not finite, so the state is not saved; "
        "earlier checkpoints are unchanged. Look at train/grad_norm before it, lower "
        "optimizer.lr or set max_grad_norm."
    )


def _floats(value: Any, name: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _floats(part, f"{name}.{key}")
    elif isinstance(value, list):
        for part in value:
            yield from _floats(part, name)
    elif isinstance(value, float):
        yield name, value


def _extremes(tensor: Tensor) -> tuple[float, float]:
    if not tensor.numel() or not (tensor.is_floating_point() or tensor.is_complex()):
        return 0.0, 0.0
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if tensor.element_size() == 1:
        tensor = tensor.float()  # torch has no aminmax for 8-bit types
    low, high = torch.aminmax(tensor)  # both are NaN if any number is
    return float(low), float(high)
