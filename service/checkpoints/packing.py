"""The state of an optimizer as named tensors and JSON values, and its restoration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.serialization import get_safe_globals
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from service.basics.errors import SpecError
from service.sharding.sharding import is_sharded

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def pack(value: Any, key: str, tensors: dict[str, Tensor]) -> Any:
    """JSON for `value`; its tensors are added to `tensors` under `key`.

    Raises:
        SpecError: it holds something that no file can.
    """
    if is_wrapped(value):
        return {"wrapped": _pack_wrapped(value, key, tensors)}
    if isinstance(value, Tensor):
        if value.dtype not in DTYPES:
            raise SpecError(f"optimizer.name: its state {key!r} is {value.dtype}; cannot save it.")
        tensors[key] = (
            value.detach() if value.requires_grad else value
        )  # of a DTensor it takes 8 us
        return {"tensor": key}
    if isinstance(value, list | tuple):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [pack(v, f"{n}.{key}", tensors) for n, v in enumerate(value)]}
    if isinstance(value, torch.dtype) and value in DTYPES:
        return {"dtype": DTYPES[value]}
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    raise SpecError(
        f"optimizer.name: its state {key!r} is a {type(value).__name__}; cannot save it."
    )


def unpack(packed: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    """What `pack` made JSON of, with windows on the tensors.

    Raises:
        SpecError: it is of a class that no loaded package has registered.
    """
    if "wrapped" in packed:
        return _unpack_wrapped(packed["wrapped"], tensors)
    if "tensor" in packed:
        return tensors[packed["tensor"]]
    if "list" in packed:
        return [unpack(part, tensors) for part in packed["list"]]
    if "tuple" in packed:
        return tuple(unpack(part, tensors) for part in packed["tuple"])
    if "dtype" in packed:
        return {name: kind for kind, name in DTYPES.items()}[packed["dtype"]]
    return packed["value"]


def unpacked(values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The same of each value."""
    return {key: unpack(value, tensors) for key, value in values.items()}


def kept(value: Any) -> Any:
    """`value`, with copies of its tensors.

    Tensors that were read are memory-mapped: using them directly would read the state from the
    disk during training, perhaps after the checkpoint has been removed.
    """
    if is_wrapped(value):
        return rewrapped(value, torch.clone)
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: kept(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)([kept(part) for part in value])
    return value


# ---- tensors that hold others, such as codes of 8 bits and their scales


def is_wrapped(value: Any) -> bool:
    """Whether it is a tensor that others are in, by torch's protocol for such classes."""
    return is_traceable_wrapper_subclass(value) and not is_sharded(value)


def rewrapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same with each tensor in it changed."""
    names, context = value.__tensor_flatten__()
    parts = {name: change(getattr(value, name)) for name in names}
    return type(value).__tensor_unflatten__(parts, context, value.size(), value.stride())


def _pack_wrapped(value: Any, key: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    if kind not in _registered():
        raise SpecError(
            f"optimizer.name: its state {key!r} is a {kind}, which its package has not registered "
            "(torch.serialization.add_safe_globals), so no checkpoint could be read back."
        )
    names, context = value.__tensor_flatten__()
    return {
        "class": kind,
        "parts": {n: pack(getattr(value, n), f"{n}.{key}", tensors) for n in names},
        "context": pack(context, key, tensors),
        "size": list(value.size()),
        "stride": list(value.stride()),
    }


def _unpack_wrapped(packed: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    made = _registered().get(packed["class"])
    if made is None:
        raise SpecError(
            f"The checkpoint holds a {packed['class']}, and the optimizer of the spec loads no "
            "package that registers this class. Use the optimizer that the run began with."
        )
    size, stride = torch.Size(packed["size"]), tuple(packed["stride"])
    parts, context = unpacked(packed["parts"], tensors), unpack(packed["context"], tensors)
    return made.__tensor_unflatten__(parts, context, size, stride)


def _registered() -> dict[str, Any]:
    """Classes that their packages have declared safe to be made from a file, by name.

    Nothing is imported by a name that stands in a checkpoint.
    """
    classes = [found for found in get_safe_globals() if isinstance(found, type)]
    return {f"{found.__module__}.{found.__qualname__}": found for found in classes}
