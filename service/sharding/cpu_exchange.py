"""The exchange of FSDP2's units between processes on CPUs, with little memory.

For an all-gather, gloo needs a second copy of the result. For a reduce-scatter, it sums a copy of
all gradients on every process. Here each process sends its rows directly to their place on the
others, and to each process only the gradients of its rows. This sends as many bytes as a ring, and
needs memory for the rows of one process instead of two copies of a unit.
"""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_ROWS, _GRADIENTS = 1101, 1102  # tags that keep messages apart


class Scratch:
    """Memory for one unit, which every exchange of a unit uses again.

    FSDP2 allocates it for each exchange, and between two of them a process needs less memory. But
    new memory costs page faults.
    """

    def __init__(self, size_bytes: int) -> None:
        """A larger unit than `size_bytes` gets its own memory each time."""
        self._size_bytes = size_bytes
        self._memory: Tensor | None = None

    def tensor(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A tensor without values in this memory if it is large enough."""
        size_bytes = math.prod(size) * dtype.itemsize
        if size_bytes > self._size_bytes:
            return _in_large_pages(torch.empty(*size, dtype=dtype, device=device))
        if self._memory is None:
            memory = torch.empty(self._size_bytes + _LARGE_PAGE, dtype=torch.uint8, device=device)
            self._memory = _in_large_pages(memory)[-memory.data_ptr() % _LARGE_PAGE :]
        return self._memory[:size_bytes].view(dtype).view(*size)

    def give_back(self, tensor: Tensor) -> None:
        """Free the memory of a tensor that is larger than this."""
        if tensor.nbytes > self._size_bytes:
            tensor.untyped_storage().resize_(0)


def _in_large_pages(tensor: Tensor) -> Tensor:
    """The same tensor; Linux allocates its memory in pages of 2 MiB, with fewer page faults."""
    first = -(-tensor.data_ptr() // _LARGE_PAGE) * _LARGE_PAGE
    last = (tensor.data_ptr() + tensor.nbytes) // _LARGE_PAGE * _LARGE_PAGE
    if _madvise is not None and first < last:
        _madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _MADV_HUGEPAGE)
    return tensor


_LARGE_PAGE, _MADV_HUGEPAGE = 2 << 20, 14
_madvise = getattr(ctypes.CDLL(None), "madvise", None) if sys.platform == "linux" else None


class GatherInPlace:
    """FSDP2's AllGather, for all units of a model: each process gets the rows of all others.

    FSDP2 copies the result to the parameters. In a forward pass it keeps the result until it has
    gathered the next unit, for devices that copy asynchronously. Here it is freed before that.
    """

    def __init__(self, scratch: Scratch) -> None:
        self._scratch = scratch
        self._arrived: Tensor | None = None

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        if self._arrived is not None:
            self._scratch.give_back(self._arrived)
        arrived = self._scratch.tensor(size, dtype=dtype, device=device)
        in_backward = torch._C._current_graph_task_id() != -1  # there FSDP2 frees it itself
        self._arrived = None if in_backward else arrived
        return arrived

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False
    ) -> None:
        """Fill `output_tensor`, of which `input_tensor` is this process's part in its place."""
        parts, own = output_tensor.chunk(group.size()), group.rank()
        others = [other for other in range(group.size()) if other != own]
        waits = [group.recv([parts[other]], other, _ROWS) for other in others]
        waits += [group.send([input_tensor], other, _ROWS) for other in others]
        for wait in waits:
            wait.wait()


class ReduceScatterInPlace:
    """FSDP2's ReduceScatter: each process gets the sums of the gradients of its own rows."""

    def __init__(self, scratch: Scratch, rows: Scratch) -> None:
        """`scratch` is for the gradients of a unit, and `rows` for those of one process."""
        self._scratch, self._rows = scratch, rows
        self._given: Tensor | None = None

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """First the tensor of all gradients of a unit, then that of the sums, which stays."""
        if self._given is not None:
            return _in_large_pages(torch.empty(*size, dtype=dtype, device=device))
        self._given = self._scratch.tensor(size, dtype=dtype, device=device)
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
        like = output_tensor
        received = self._rows.tensor(like.shape, dtype=like.dtype, device=like.device)
        output_tensor.copy_(parts[own])
        for distance in range(1, processes):
            to, of = (own + distance) % processes, (own - distance) % processes
            waits = [group.recv([received], of, _GRADIENTS)]
            waits.append(group.send([parts[to]], to, _GRADIENTS))
            for wait in waits:
                wait.wait()
            output_tensor.add_(received)
        self._given = None
        self._scratch.give_back(input_tensor)  # FSDP2 keeps it until the next unit
