"""Changes of weights of which each process has only some rows, such as those of a task's function.

The weights are DTensors: an operation on each number is computed on the rows of each process, and a
sum or a norm is a sum over all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from service.basics.errors import SpecError
from service.sharding.sharding import (
    computing_device,
    is_sharded,
    own_rows,
    rows_like,
    sharded_like,
)


@contextmanager
def as_on_one_process() -> Iterator[None]:
    """A context in which changes of sharded weights have the values of one process with all rows.

    Raises:
        SpecError: an operation cannot be computed by rows, or draws random numbers otherwise.
    """
    try:
        with _WholeDraws():  # type: ignore[no-untyped-call]
            yield
    except RuntimeError as error:
        if "mixed torch.Tensor and DTensor" not in str(error):
            raise
        raise SpecError(
            "exchange.mode: sharded: task.after_update combines a parameter, of which each process "
            "has only some rows, with another tensor. Use only parameters and numbers."
        ) from error


class _WholeDraws(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no types here
    """Random numbers for a sharded tensor are those of the whole tensor."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded not in func.tags or not any(map(is_sharded, args)):
            return func(*args, **(kwargs or {}))
        like, *rest = args
        if not is_sharded(like) or func.overloadpacket not in _DRAWS:
            raise SpecError(
                f"exchange.mode: sharded: task.after_update draws random numbers by {func}, which "
                "would depend on the number of processes. Use randn_like, rand_like, normal_ or "
                "uniform_."
            )
        device = computing_device(like)  # whose generator draws the same if rows are offloaded
        whole: Tensor = torch.empty(like.shape, dtype=like.dtype, device=device)
        whole = func(whole, *rest, **(kwargs or {}))
        if not func._schema.is_mutable:
            return sharded_like(like, whole)
        own_rows(like).copy_(rows_like(like, whole))
        return like


_DRAWS = {
    torch.ops.aten.randn_like,
    torch.ops.aten.rand_like,
    torch.ops.aten.normal_,
    torch.ops.aten.uniform_,
}
"""Functions whose result depends only on the shape of their first argument."""
