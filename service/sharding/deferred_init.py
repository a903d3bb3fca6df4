"""Models created without memory for their weights, whose values are created later, one by one.

While a model is created, large tensors are created on the `meta` device, and operations on them are
recorded. The value of any of them can then be computed by repeating these operations, with the
same state of the random generator for each operation: the bits are those of a model that is
created normally. So a process needs memory for only one of them at a time.

The idea is that of torchdistx, `deferred_init` (Meta, 2022), which does not keep random numbers.
"""

from __future__ import annotations

import gc
import heapq
import weakref
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

LEAST_NUMBERS = 1 << 14
"""Smaller tensors are created normally: many models compute with them during creation."""
_CAPTURED_BYTES = 1 << 20
"""Larger values from the model itself are not recorded, because they would be stored twice."""

# These operations write a whole tensor without reading it.
_OVERWRITING = {
    "aten::zero_",
    "aten::fill_",
    "aten::copy_",
    "aten::uniform_",
    "aten::normal_",
    "aten::random_",
    "aten::exponential_",
    "aten::log_normal_",
    "aten::cauchy_",
    "aten::geometric_",
}


class NotDeferred(Exception):
    """The model needs the values of large tensors while it is created."""


@dataclass(frozen=True)
class _View:
    """A tensor by the memory that it refers to, without keeping it alive."""

    memory: int
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    size_bytes: int
    """Size of the whole memory."""

    def of(self, memory: dict[int, Any]) -> Tensor:
        empty = torch.empty(0, dtype=self.dtype)
        if self.memory not in memory:  # the first access writes it
            memory[self.memory] = torch.UntypedStorage(self.size_bytes)  # type: ignore[no-untyped-call]
        return empty.set_(memory[self.memory], self.offset, self.size, self.stride)


@dataclass(frozen=True)
class _Operation:
    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    """Tensors are replaced by views, or by copies of tensors that were created normally."""
    makes: Sequence[_View | None]
    """Its results, in order; None for a tensor that existed before."""
    reads: frozenset[int]
    random: tuple[torch.Generator, Tensor] | None
    """The generator that it uses, and the state before."""

    def repeat(self, memory: dict[int, Any]) -> None:
        def real(value: Any) -> Any:
            return value.of(memory) if isinstance(value, _View) else value

        if self.random is not None:
            generator, state = self.random
            generator.set_state(state)
        given = self.func(*tree_map(real, self.args), **tree_map(real, self.kwargs))
        for view, tensor in zip(self.makes, tree_leaves(given), strict=True):
            if view is None:
                continue
            if (tensor.stride(), tensor.storage_offset()) == (view.stride, view.offset):
                memory[view.memory] = tensor.untyped_storage()
            else:  # on `meta` some results have another memory layout
                view.of(memory).copy_(tensor)


def made_deferred(
    make: Callable[[], nn.Module], *, least_numbers: int | None = None
) -> tuple[nn.Module, Deferring]:
    """The model that `make` returns, and the object that creates its large parameters.

    Raises:
        NotDeferred: it must be created normally. The generators have advanced.
    """
    deferring = Deferring(least_numbers=least_numbers or LEAST_NUMBERS)
    try:
        with deferring, _AsInMainMemory(deferring):
            model = make()
    except NotDeferred:
        raise
    except Exception as error:  # it will occur again when the model is created normally
        raise NotDeferred(f"{type(error).__name__}: {error}") from error
    deferring.settle(model)
    return model, deferring


class _AsInMainMemory(TorchFunctionMode):
    """Makes a deferred tensor claim to be in main memory: torch draws nothing on `meta`."""

    def __init__(self, deferring: Deferring) -> None:
        super().__init__()
        self._holds = deferring.holds

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == _IS_META and self._holds(args[0]):
            return False
        if func == _DEVICE and self._holds(args[0]):
            return torch.device("cpu")
        return func(*args, **(kwargs or {}))


_IS_META, _DEVICE = Tensor.is_meta.__get__, Tensor.device.__get__  # type: ignore[attr-defined]


class Deferring(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A context that creates large tensors on `meta`; afterwards it creates their values."""

    def __init__(self, *, least_numbers: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._least = least_numbers
        self._log: list[_Operation] = []
        self._writes: dict[int, list[int]] = {}
        """By memory, the positions in the log of the operations that write it."""
        self._alive: dict[int, Tensor] = {}
        """Keeps the memory alive, so that no other tensor gets the same address."""
        self._given: list[weakref.ref[Tensor]] = []

    def holds(self, tensor: Tensor) -> bool:
        """Whether the tensor was deferred."""
        return torch._C._has_storage(tensor) and _memory(tensor) in self._alive

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(map(self.holds, tensors)):
            return self._record(func, args, kwargs, tensors)
        if tensors or not _is_for_cpu(kwargs):
            return func(*args, **kwargs)
        shown = func(*args, **{**kwargs, "device": torch.device("meta"), "pin_memory": None})
        if not isinstance(shown, Tensor) or shown.numel() < self._least:
            return func(*args, **kwargs)
        return self._enter(func, args, kwargs, shown, reads=frozenset())

    def _record(self, func: Any, args: Any, kwargs: Any, tensors: Sequence[Tensor]) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return func(self.value(args[0]))  # such as the loop condition of torch's trunc_normal_
        written = _written(func, args, kwargs)
        if not all(map(self.holds, written)) or not _is_for_cpu(kwargs, or_none=True):
            raise NotDeferred(f"{func} writes large weights to another device")
        meta = {"device": torch.device("meta")} if kwargs.get("device") is not None else {}
        on_meta = tree_map(lambda v: v.to("meta") if isinstance(v, Tensor) else v, (args, kwargs))
        try:
            shown = func(*on_meta[0], **{**on_meta[1], **meta})
        except (RuntimeError, NotImplementedError) as error:
            raise NotDeferred(f"{func}: {error}") from error
        if not all(isinstance(leaf, Tensor) for leaf in tree_leaves(shown)):
            raise NotDeferred(f"{func} reads values of large weights")
        reads = {_memory(tensor) for tensor in tensors if self.holds(tensor)}
        if func._schema.name in _OVERWRITING and _is_whole(written[0]):
            others = [tensor for tensor in tensors if tensor is not written[0]]
            if not any(self.holds(t) and _memory(t) == _memory(written[0]) for t in others):
                reads.discard(_memory(written[0]))
        return self._enter(func, args, kwargs, shown, reads=frozenset(reads), written=written)

    def _enter(
        self,
        func: Any,
        args: Any,
        kwargs: Any,
        shown: Any,
        *,
        reads: frozenset[int],
        written: Sequence[Tensor] = (),
    ) -> Any:
        """Add an operation to the log, unless it only creates a view."""
        place, makes = len(self._log), list[_View | None]()
        for tensor in tree_leaves(shown):
            is_new = not self.holds(tensor)
            if is_new:
                self._alive[_memory(tensor)] = tensor.detach()
            makes.append(_view(tensor) if is_new else None)
        changed = {_memory(tensor) for tensor in written}
        changed |= {view.memory for view in makes if view is not None}
        if changed:
            drawn = self._drawn(func, args, kwargs, reads)
            kept = [tree_map(self._kept, part) for part in (args, kwargs)]
            self._log.append(_Operation(func, kept[0], kept[1], makes, reads, drawn))
            for memory in changed:
                self._writes.setdefault(memory, []).append(place)
        self._given += [weakref.ref(tensor) for tensor in tree_leaves(shown)]
        return shown

    def _kept(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if self.holds(value):
            return _view(value)
        if value.nbytes > _CAPTURED_BYTES:
            raise NotDeferred("large values from another source are copied into weights")
        return value.clone()

    def _drawn(
        self, func: Any, args: Any, kwargs: Any, reads: frozenset[int]
    ) -> tuple[torch.Generator, Tensor] | None:
        """The generator of a random operation and its state before; it is advanced."""
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return None
        if reads:
            raise NotDeferred(f"{func} draws random numbers that depend on large weights")
        leaves = tree_leaves((args, kwargs))
        own = next((leaf for leaf in leaves if isinstance(leaf, torch.Generator)), None)
        generator = torch.default_generator if own is None else own
        before = generator.get_state()

        def blank(value: Any) -> Any:
            return torch.empty_like(value, device="cpu") if isinstance(value, Tensor) else value

        func(*tree_map(blank, args), **tree_map(blank, kwargs))
        return generator, before

    # ---- after creation

    def settle(self, model: nn.Module) -> None:
        """Create the values of the buffers of a new model, and check that nothing else is left.

        Raises:
            NotDeferred: the model has a large tensor that is neither a parameter nor a buffer,
                or a parameter of a custom class.
        """
        made: dict[_View, Tensor] = {}
        for module in model.modules():
            self._make_buffers(module._buffers, made)
        parameters = [p for p in model.parameters() if self.holds(p)]
        if any(type(p) is not nn.Parameter or not p.is_contiguous() for p in parameters):
            raise NotDeferred("a parameter has a custom class, or is not contiguous")
        known = {_memory(parameter) for parameter in parameters}
        if self._strays(known):
            gc.collect()  # frees tensors that are no longer used
        if self._strays(known):
            raise NotDeferred("the model has large tensors that are not parameters or buffers")

    def _make_buffers(self, buffers: dict[str, Tensor | None], made: dict[_View, Tensor]) -> None:
        for key, buffer in buffers.items():
            if buffer is not None and self.holds(buffer):
                view = _view(buffer)
                if view not in made:
                    made[view] = self.value(buffer)
                buffers[key] = made[view]

    def _strays(self, known: set[int]) -> bool:
        left = (given() for given in self._given)
        return any(tensor is not None and _memory(tensor) not in known for tensor in left)

    @torch.no_grad()
    def value(self, tensor: Tensor) -> Tensor:
        """The value of the tensor; no generator advances."""
        memory: dict[int, Any] = {}
        view = _view(tensor)
        operations = [self._log[place] for place in self._needed(view.memory)]
        with _generators_kept(operations):
            for operation in operations:
                operation.repeat(memory)
        return view.of(memory)

    def _needed(self, memory: int) -> list[int]:
        """The log positions of all operations that led to the content of this memory, in order."""
        found: set[int] = set()
        open_places = [-self._writes[memory][-1]]
        while open_places:
            place = -heapq.heappop(open_places)
            if place in found:
                continue
            found.add(place)
            for read in self._log[place].reads:
                before = bisect_left(self._writes[read], place)
                if before:
                    heapq.heappush(open_places, -self._writes[read][before - 1])
        return sorted(found)


@contextmanager
def _generators_kept(operations: Sequence[_Operation]) -> Iterator[None]:
    generators = {id(o.random[0]): o.random[0] for o in operations if o.random is not None}
    before = [(generator, generator.get_state()) for generator in generators.values()]
    try:
        yield
    finally:
        for generator, state in before:
            generator.set_state(state)


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _view(tensor: Tensor) -> _View:
    size, stride = tuple(tensor.shape), tensor.stride()
    size_bytes = tensor.untyped_storage().nbytes()
    offset = int(tensor.storage_offset())
    return _View(_memory(tensor), tensor.dtype, size, stride, offset, size_bytes)


def _is_whole(tensor: Tensor) -> bool:
    """Whether it covers all of its memory."""
    return tensor.is_contiguous() and tensor.nbytes == tensor.untyped_storage().nbytes()


def _is_for_cpu(kwargs: dict[str, Any], *, or_none: bool = False) -> bool:
    """Whether a new tensor is in main memory."""
    device = kwargs.get("device")
    return or_none if device is None else torch.device(device).type == "cpu"


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The tensors that an operation writes."""
    found: list[Tensor] = []
    for number, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[number] if number < len(args) else kwargs.get(argument.name)
            found += [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
    return found
