"""The exchange of FSDP2's units between processes on CPUs, with little memory.

For an all-gather, gloo needs a second copy of the result. For a reduce-scatter, it sums a copy of
all gradients on every process. Here each process sends its rows directly to their place on the
others, and to each process only the gradients of its rows. This sends as many bytes as a ring, and
needs memory for the rows of one process instead of two copies of a unit.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from service.sharding.heap import Heap, Pages, discard, pages

_ROWS, _GRADIENTS = 1101, 1102  # tags that keep messages apart
_PIECE_BYTES = 1 << 20
"""Of gradients: as many are received before they are added."""


class GatherInPlace:
    """FSDP2's AllGather, for all units of a model: each process gets the rows of all others.

    FSDP2 copies the result to the parameters. In a forward pass it keeps the result until it has
    gathered the next unit, for devices that copy asynchronously. Here the next one uses the same
    memory.
    """

    def __init__(self, heap: Heap | None = None) -> None:
        """`heap` returns memory before an exchange of a backward pass."""
        self._heap = heap
        self._memory: Tensor | None = None
        self.alone = False
        """Whether to use own rows for those of others, with which nothing is exchanged."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        size_bytes = math.prod(size) * dtype.itemsize
        in_backward = torch._C._current_graph_task_id() != -1  # there FSDP2 frees it itself
        if self._memory is not None and (in_backward or self._memory.nbytes != size_bytes):
            discard(self._memory)
            self._memory = None
        if in_backward:
            if self._heap is not None:
                self._heap.return_surplus(2 * size_bytes)  # for the parameters too
            return pages(size, dtype=dtype)
        if self._memory is None:
            self._memory = pages([size_bytes], dtype=torch.uint8)
        return self._memory.view(dtype).view(*size)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False
    ) -> None:
        """Fill `output_tensor`, of which `input_tensor` is this process's part in its place."""
        parts, own = output_tensor.chunk(group.size()), group.rank()
        if self.alone:
            fill_with_own(output_tensor, input_tensor, group)
            return
        others = [other for other in range(group.size()) if other != own]
        waits = [group.recv([parts[other]], other, _ROWS) for other in others]
        waits += [group.send([input_tensor], other, _ROWS) for other in others]
        for wait in waits:
            wait.wait()


class ReduceScatterInPlace:
    """FSDP2's ReduceScatter: each process gets the sums of the gradients of its own rows."""

    def __init__(self, heap: Heap | None = None) -> None:
        """`heap` returns memory before each exchange."""
        self._heap = heap
        self._given: Tensor | None = None
        self.alone = False
        """Whether to sum nothing."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """First the tensor of all gradients of a unit, then that of the sums, which stays."""
        if self._given is not None:
            return pages(size, dtype=dtype)
        if self._heap is not None:
            size_bytes = math.prod(size) * dtype.itemsize
            self._heap.return_surplus(size_bytes)  # the parameters were released just now
        self._given = pages(size, dtype=dtype)
        return self._given

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: Any,
        op: Any,
        async_op: bool = False,
    ) -> None:
        """Sum this process's part of every `input_tensor`, and free its own."""
        assert op == dist.ReduceOp.SUM, "shard() asks for sums"
        processes, own = group.size(), group.rank()
        parts = input_tensor.chunk(processes)
        output_tensor.copy_(parts[own])
        numbers, most = len(output_tensor), _PIECE_BYTES // output_tensor.itemsize
        received = output_tensor.new_empty(min(most, numbers))
        for distance in range(1, 1 if self.alone else processes):
            to, of = (own + distance) % processes, (own - distance) % processes
            for begin in range(0, numbers, most):
                piece = slice(begin, begin + most)
                arrived = received[: min(most, numbers - begin)]
                waits = [group.recv([arrived], of, _GRADIENTS)]
                waits.append(group.send([parts[to][piece]], to, _GRADIENTS))
                for wait in waits:
                    wait.wait()
                output_tensor[piece] += arrived
        self._given = None
        discard(input_tensor)  # FSDP2 keeps it until the next unit


def fill_with_own(gathered: Tensor, own: Tensor, group: Any) -> None:
    """Let the rows of each process be copies of this process's own, in place of an exchange."""
    for place, part in enumerate(gathered.chunk(group.size())):
        if place != group.rank():  # where they are already
            part.copy_(own)


class GatheredInPages:
    """The gathered parameters of a unit, one after the other in memory of their own.

    FSDP2 allocates and frees each of them in every pass.  Here they always have the same place,
    whose memory is returned to the system when the unit is released.
    """

    def __init__(self, parameters: Sequence[Any], processes: int) -> None:
        """Replace the memory of a unit that has not been gathered yet.

        Args:
            parameters: all FSDPParam of the unit, in the order in which torch releases them.
        """
        rows = [parameter._sharded_param_data for parameter in parameters]
        ends = list(accumulate(_in_whole_pages(processes * own.nbytes) for own in rows))
        self._pages = Pages(ends[-1])
        for parameter, own, begin in zip(parameters, rows, [0, *ends], strict=False):
            if own.numel():
                numbers = processes * own.numel()
                place = self._pages.tensor(begin, numbers, dtype=own.dtype)
                parameter.all_gather_outputs = [place]
            parameter.alloc_all_gather_outputs = self._pages.allow
            parameter.free_unsharded_param = _wait_for_the_last
        parameters[-1].free_unsharded_param = self._pages.give_back


def _in_whole_pages(size_bytes: int) -> int:
    return -(-size_bytes // mmap.PAGESIZE) * mmap.PAGESIZE


def _wait_for_the_last() -> None:
    """Nothing: all parameters of a unit are released together, with the last one."""
