"""The state of a foreign object as JSON and back, without a pickle."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import torch

# Values that JSON does not have are a mapping with this one key: [kind, content].
_MARK = "$"


def plain(value: Any) -> Any:
    """The value as plain JSON data; `from_plain` returns an equal one.

    Raises:
        TypeError: it is, or contains, a value of another type.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        if all(isinstance(key, str) for key in value) and _MARK not in value:
            return {key: plain(item) for key, item in value.items()}
        return {_MARK: ["dict", [[plain(key), plain(item)] for key, item in value.items()]]}
    if isinstance(value, tuple):
        return {_MARK: ["tuple", [plain(item) for item in value]]}
    if isinstance(value, bytes):
        return {_MARK: ["bytes", base64.b64encode(value).decode()]}
    if isinstance(value, torch.Tensor):
        data = value.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
        kind = str(value.dtype).removeprefix("torch.")
        return {_MARK: ["tensor", [kind, list(value.shape), base64.b64encode(data).decode()]]}
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biuf":
        data = np.ascontiguousarray(value).tobytes()
        parts = [value.dtype.str, list(value.shape), base64.b64encode(data).decode()]
        return {_MARK: ["array" if isinstance(value, np.ndarray) else "scalar", parts]}
    raise TypeError(f"{type(value).__name__} is not supported")


def from_plain(value: Any) -> Any:
    """The value that was given to `plain`."""
    if isinstance(value, list):
        return [from_plain(item) for item in value]
    if not isinstance(value, dict):
        return value
    if _MARK not in value:
        return {key: from_plain(item) for key, item in value.items()}
    kind, parts = value[_MARK]
    match kind:
        case "dict":
            return {from_plain(key): from_plain(item) for key, item in parts}
        case "tuple":
            return tuple(from_plain(item) for item in parts)
        case "bytes":
            return base64.b64decode(parts)
    dtype, shape, data = parts
    numbers = np.frombuffer(base64.b64decode(data), np.uint8 if kind == "tensor" else dtype).copy()
    if kind == "tensor":
        return torch.from_numpy(numbers).view(getattr(torch, dtype)).reshape(shape)
    return numbers.reshape(shape) if kind == "array" else numbers[0]
