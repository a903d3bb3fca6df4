"""A fake of torch's CUDA graphs: a backend of torch.compile whose passes write to fixed memory.

It computes with the CPU's kernels and keeps the rules of `torch/_inductor/cudagraph_trees.py`: a
result is a new tensor over the same memory in every pass, so torch may make that memory the `grad`
of a parameter; and when a forward pass begins, everything that an earlier pass returned is
overwritten, here with NaN. It is installed under the name of torch's own, `cudagraphs`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

_memory: list[Tensor] = []
"""All memory that passes have returned."""
counted: dict[str, int] = {"forward": 0, "backward": 0}
"""Replays so far."""


@torch.no_grad()
def _overwrite() -> None:
    for tensor in _memory:
        if tensor.is_floating_point():
            tensor.fill_(torch.nan)
        else:
            tensor.zero_()


def _recorded(module: GraphModule, kind: str) -> Callable[[list[Any]], Sequence[Any]]:
    """The pass of a graph: of boxed arguments."""
    kept: dict[tuple[Any, ...], Tensor] = {}

    def replay(arguments: list[Any]) -> Sequence[Any]:
        given = {a.untyped_storage().data_ptr() for a in arguments if isinstance(a, Tensor)}
        counted[kind] += 1
        own = [_like(a) for a in arguments]  # a graph reads its inputs where it expects them
        if kind == "forward":
            _overwrite()
        results = module(*own)
        arguments.clear()
        return [_at_its_place(kept, n, result, given) for n, result in enumerate(results)]

    replay._boxed_call = True  # type: ignore[attr-defined]
    return replay


def _like(argument: Any) -> Any:
    """A copy of an input that is memory of a graph, which its own pass is about to overwrite."""
    places = {tensor.untyped_storage().data_ptr() for tensor in _memory}
    if isinstance(argument, Tensor) and argument.untyped_storage().data_ptr() in places:
        return argument.clone()
    return argument


def _at_its_place(
    kept: dict[tuple[Any, ...], Tensor], number: int, result: Any, given: set[int]
) -> Any:
    if not isinstance(result, Tensor) or result.untyped_storage().data_ptr() in given:
        return result  # a number, or a parameter that the backward pass needs
    shape, strides = tuple(result.shape), tuple(result.stride())
    place = kept.get((number, shape, strides))
    if place is None:
        place = kept[number, shape, strides] = torch.empty_strided(
            shape, strides, dtype=result.dtype
        )
        _memory.append(place)
    place.copy_(result.detach())
    return torch.empty(0, dtype=result.dtype).set_(place.untyped_storage(), 0, shape, strides)


@contextmanager
def replaying() -> Iterator[dict[str, int]]:
    """A context in which the backend `cudagraphs` is this one; yields how many passes it made."""
    import torch._dynamo
    from torch._dynamo.backends import registry
    from torch._dynamo.backends.common import aot_autograd

    registry.lookup_backend("cudagraphs")
    functions = registry._COMPILER_FNS
    before = functions["cudagraphs"]
    functions["cudagraphs"] = aot_autograd(
        fw_compiler=lambda module, _: _recorded(module, "forward"),
        bw_compiler=lambda module, _: _recorded(module, "backward"),
    )
    counted.update(forward=0, backward=0)
    torch._dynamo.reset()
    try:
        yield counted
    finally:
        functions["cudagraphs"] = before
        _memory.clear()
        torch._dynamo.reset()
