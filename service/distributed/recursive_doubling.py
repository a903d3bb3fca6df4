"""Sums of small tensors over processes on CPUs, by recursive doubling or over a tree.

gloo's own all-reduce passes each message from thread to thread around its ring: 8 kB take two
processes of one machine 1.4 ms and four 6 ms, mostly for waking up, and every additional hop in a
large job adds to it. One message takes 0.1 ms, and log2(W) of them one after the other reach all.

For that each process has log2(W) connections. Those of a large job connect when they first send to
each other, each asks the one store for every address, and its agreements are few: there the values
go up a tree and down again, twice as many messages one after the other over W - 1 connections.
"""

# Without `from __future__ import annotations`: DistributedDataParallel reads those of its hook.

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

# Above it a ring is faster: it sends everything about twice, and pairs log2(W) times.
# Measured with 2, 3 and 4 processes on one machine: above it the ring is as fast or faster.
MOST_BYTES = 1 << 19
_TO_FIRST, _BACK, _BETWEEN = 1001, 1002, 1003  # tags that keep messages apart
MANY = 64
"""From this number of processes on, each connects only to those it sends to."""

Combine = Callable[..., Tensor]
"""`torch.add`, `torch.maximum`, ...: of two tensors, into `out`; it must be commutative."""


class RecursiveDoubling:
    """Processes of one gloo group that sum in pairs: neighbours first, (0 + 1) + (2 + 3).

    Processes beyond the greatest power of two first send their values to one of the others. a + b
    and b + a have the same bits, so all processes get the same bits; these depend on the size of
    the group.
    Source: recursive doubling, Thakur, Rabenseifner & Gropp, "Optimization of Collective
    Communication Operations in MPICH", 2005.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group: Any = group
        self._index = group.rank()
        self.processes: int = group.size()
        self._paired = 1 << (self.processes.bit_length() - 1)

    def fit(self, values: Tensor) -> bool:
        """Whether these values are few enough for this method."""
        return values.device.type == "cpu" and values.numel() * values.element_size() <= MOST_BYTES

    def combine(self, values: Tensor, by: Combine = torch.add) -> None:
        """Reduce the contiguous `values` over all processes in place, with equal bits.

        Raises:
            RuntimeError: a process is gone, or did not answer within the group's timeout.
        """
        index, group, beyond = self._index, self._group, self._index + self._paired
        if index >= self._paired:
            group.send([values], index - self._paired, _TO_FIRST).wait()
            group.recv([values], index - self._paired, _BACK).wait()
            return
        received = torch.empty_like(values)
        if beyond < self.processes:
            group.recv([received], beyond, _TO_FIRST).wait()
            by(values, received, out=values)
        self._combine_paired(values, received, by)
        if beyond < self.processes:
            group.send([values], beyond, _BACK).wait()

    def _combine_paired(self, values: Tensor, received: Tensor, by: Combine) -> None:
        """The same among a power of two of them; `received` is space for what others send."""
        index, group, distance = self._index, self._group, 1
        while distance < self._paired:
            sent = group.send([values], index ^ distance, _BETWEEN)
            group.recv([received], index ^ distance, _BETWEEN).wait()
            sent.wait()
            by(values, received, out=values)
            distance *= 2


class Tree(RecursiveDoubling):
    """The same, with the same bits, over a tree: each has about two connections instead of log2(W).

    Each process adds up those of its neighbours to the right that recursive doubling would have
    added by then, and the first process sends the result back along the same tree.
    """

    def _combine_paired(self, values: Tensor, received: Tensor, by: Combine) -> None:
        index, group, distance = self._index, self._group, 1
        while distance < self._paired and not index & distance:
            group.recv([received], index + distance, _BETWEEN).wait()
            by(values, received, out=values)
            distance *= 2
        if index:
            group.send([values], index - distance, _BETWEEN).wait()
            group.recv([values], index - distance, _BETWEEN).wait()
        sent = []
        while distance > 1:
            distance //= 2
            sent.append(group.send([values], index + distance, _BETWEEN))
        for each in sent:
            each.wait()


def agreements(group: dist.ProcessGroup) -> RecursiveDoubling:
    """What suits the small sums of a group that do not wait for each other in every step."""
    return Tree(group) if group.size() >= MANY else RecursiveDoubling(group)


def meet(group: dist.ProcessGroup | None) -> None:
    """Return when every process of a gloo group has called it.

    gloo's own barrier has other pairs: where pairs connect when they first send, each process
    would have twice as many connections.

    Raises:
        RuntimeError: a process is gone, or did not come within the group's timeout.
    """
    assert group is not None, "several processes have a group"
    agreements(group).combine(torch.zeros(1))


# ---- communication hooks of DistributedDataParallel for a bucket of gradients


def mean_in_pairs(
    pairs: RecursiveDoubling,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[Tensor]:
    """The mean of the bucket over the processes, summed in pairs."""
    values = bucket.buffer()
    pairs.combine(values)
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(values.div_(pairs.processes))
    return done


def mean_in_bf16(
    group: dist.ProcessGroup,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[Tensor]:
    """torch's own hook, which torch refuses by name without NCCL; gloo can sum bf16 too."""
    return bf16_compress_hook(group, bucket)
