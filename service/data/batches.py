"""A micro-batch: collated rows with their weights, on the device that computes them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from service.basics.errors import SpecError
from service.distributed.devices import module_of, side_stream

# The keys of the targets in a row that is a mapping.
TARGET_KEYS = ("labels", "label", "targets", "target")


class Batch(NamedTuple):
    """One forward pass worth of rows."""

    number: int
    """Number of the micro-batch in the step, over all processes."""
    rows: NDArray[np.int64]
    """The ids of its rows in the data set, or digests of the rows of a stream: [B]."""
    inputs: Any
    """The input of the model: a tensor [B, ...], or a tuple or mapping of them."""
    targets: Any
    """The targets for the loss."""
    weight: Tensor | None
    """The weight of each loss value, in the shape of the loss; None means 1 for each."""
    key: int
    """Seed of the random numbers that the model draws for this micro-batch."""


class Step(NamedTuple):
    """One process's micro-batches of one optimizer step."""

    micro_batches: Sequence[Batch]
    weight: float | Tensor
    """Weight of the whole step, over all processes."""


def split(collated: Any) -> tuple[Any, Any]:
    """(inputs, targets) of a collated batch: a pair, or a mapping with a usual key for the targets.

    Raises:
        TypeError: the rows of the data set are neither.
    """
    if isinstance(collated, Mapping):
        key = next((k for k in TARGET_KEYS if k in collated), None)
        if key is not None:
            return {k: v for k, v in collated.items() if k != key}, collated[key]
        raise TypeError(
            f"a row with the keys {sorted(collated)} has no targets; "
            f"use one of the keys {', '.join(TARGET_KEYS)}."
        )
    if isinstance(collated, tuple | list) and len(collated) == 2:
        return collated[0], collated[1]
    raise TypeError(
        f"a row must be (inputs, targets) or a mapping, but is {type(collated).__name__}"
        + (f" of {len(collated)}" if isinstance(collated, tuple | list) else "")
        + ". The model takes one argument: ((a, b), targets) passes a and b as a list, "
        "and a mapping passes each by its name."
    )


def split_or_whole(collated: Any) -> tuple[Any, Any]:
    """The same for a task's own step, which also accepts other rows: (the whole row, None)."""
    try:
        return split(collated)
    except TypeError:
        return collated, None


def to_device(value: Any, device: torch.device) -> Any:
    """The same nested tensors on `device`; copies from pinned memory do not wait."""
    return each_tensor(value, lambda tensor: tensor.to(device, non_blocking=True))


def carrier(device: torch.device) -> Callable[[Any], Any]:
    """A function that copies nested tensors to the device.

    On a device with asynchronous copies it uses a separate stream: on the computation stream,
    a copy would wait for all earlier work, and, for memory that is not
    pinned, the host with it.
    """
    stream = _stream_of_copies(device)
    if stream is None:
        return partial(to_device, device=device)
    module = module_of(device)

    def bring(value: Any) -> Any:
        with module.stream(stream):
            brought = to_device(value, device)
        work = module.current_stream()
        work.wait_stream(stream)
        # The copies own this memory: it must not be overwritten while the batch is in use.
        each_tensor(brought, lambda tensor: tensor.record_stream(work))
        return brought

    return bring


_stream_of_copies = lru_cache(maxsize=1)(side_stream)


def first_rows(value: Any, count: int) -> Any:
    """The first `count` rows of nested tensors; 0 makes an empty batch of the same structure."""
    return each_tensor(value, lambda tensor: tensor[:count])


def counted(values: Tensor, weight: Tensor) -> Tensor:
    """The values times their weights, without a gradient.

    0 where the weight is 0, also of a value that is not finite: a missing target counts nothing.
    """
    return (values * weight).masked_fill(weight == 0, 0.0)


def each_tensor(value: Any, act: Callable[[Tensor], Any]) -> Any:
    """The same structure with `act` applied to each tensor in it, in order."""
    if isinstance(value, Tensor):
        return act(value)
    if isinstance(value, Mapping):
        return {k: each_tensor(v, act) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return _of_its_kind(value, [each_tensor(v, act) for v in value])
    return value


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors of a nested structure, in order."""
    found: list[Tensor] = []
    each_tensor(value, found.append)
    return found


def _of_its_kind(value: tuple[Any, ...] | list[Any], items: list[Any]) -> Any:
    """The items as a list, a tuple, or a named tuple, like `value`."""
    return value._make(items) if hasattr(value, "_make") else type(value)(items)


def forward(model: nn.Module, inputs: Any) -> Any:
    """The model's outputs; a mapping of inputs is passed by name.

    Raises:
        SpecError: the inputs that the model accepts are not those of the rows.
    """
    if not isinstance(inputs, dict):
        return model(inputs)
    try:
        return model(**inputs)
    except TypeError as error:
        told = _other_names(model, inputs)
        if told is None:
            raise
        raise SpecError(told) from error


def _other_names(model: nn.Module, inputs: Mapping[str, Any]) -> str | None:
    """The mismatch of the names of the inputs, and what to do; None if there is none."""
    parameters = inspect.signature(model.forward).parameters.values()
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    known = [p.name for p in named]
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    extra = [name for name in inputs if name not in known and not takes_all]
    lacking = [p.name for p in named if p.default is p.empty and p.name not in inputs]
    what = f"{type(model).__name__}.forward({', '.join(known)})"
    told = []
    if extra:
        kept = [name for name in inputs if name in known]
        told.append(
            f"the rows contain {', '.join(map(repr, extra))}, which {what} does not accept. Remove "
            f"{'it' if len(extra) == 1 else 'them'} from the rows, in the data set or in "
            f"`collate` (then only {kept} of the inputs would remain), or add a parameter of that "
            "name to forward."
        )
    if lacking:
        told.append(
            f"{what} needs {', '.join(map(repr, lacking))}, which the rows do not contain. A row "
            f"has "
            f"the inputs {sorted(inputs)}: add the missing ones, or rename them."
        )
    return f"task: {' And '.join(told)}" if told else None
