"""Messages between processes as bytes and back: plain data, no executable content.

torch sends objects as pickles, and unpickling runs any code of the sender. The
sockets between processes have no authentication, so messages are read as data only: a header in
JSON, followed by the bytes of tensors and arrays.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from service.basics.errors import EvenstepError, PeerLost, WillFailAgain

_LENGTH_BYTES = 8
# Values that JSON does not have are a mapping with this one key: [kind, content].
_MARK = "$"
_ARRAY_KINDS = "biufcSUmM"  # numbers, booleans, text, times; no objects


def to_bytes(value: Any) -> bytes:
    """The value as bytes; `from_bytes` returns an equal one, with its tensors on the CPU.

    A value that cannot be sent is replaced by an error, so that all processes fail and none waits.
    """
    blobs: list[bytes] = []
    try:
        plain = _plain(value, blobs)
    except TypeError as error:
        blobs, plain = [], {_MARK: ["refused", str(error)]}
    header = json.dumps(plain).encode()
    return b"".join([len(header).to_bytes(_LENGTH_BYTES, "little"), header, *blobs])


def from_bytes(message: bytes) -> Any:
    """The value that was given to `to_bytes`.

    Raises:
        WillFailAgain: the value was not plain data.
        PeerLost: `to_bytes` did not create this: the sender is not a process of this job.
    """
    try:
        length = int.from_bytes(message[:_LENGTH_BYTES], "little")
        header = json.loads(message[_LENGTH_BYTES : _LENGTH_BYTES + length])
        return _whole(header, _Bytes(message, _LENGTH_BYTES + length))
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
        # RuntimeError: of torch for a wrong number of bytes, or because of deep nesting
        raise PeerLost(
            "A message from another process of this job is not in Evenstep's format "
            f"({type(error).__name__}): a foreign program is on the network between them. "
            "docs/explanation/reliability.md says who must not reach a run."
        ) from error


def _plain(value: Any, blobs: list[bytes]) -> Any:
    """As JSON; the bytes of tensors and arrays are appended to `blobs`."""
    kind = type(value)
    if value is None or kind in (bool, int, float, str):
        return value
    if kind is list:
        return [_plain(item, blobs) for item in value]
    if kind is dict:
        if all(type(key) is str for key in value) and _MARK not in value:
            return {key: _plain(item, blobs) for key, item in value.items()}
        pairs = [[_plain(key, blobs), _plain(item, blobs)] for key, item in value.items()]
        return {_MARK: ["dict", pairs]}
    if kind in (tuple, torch.Size):
        return {_MARK: ["tuple", [_plain(item, blobs) for item in value]]}
    if kind in (set, frozenset):
        return {_MARK: ["set", [_plain(item, blobs) for item in value]]}
    if isinstance(value, tuple) and _is_named(kind):
        return {_MARK: ["named", [_name(kind), [_plain(item, blobs) for item in value]]]}
    if isinstance(value, EvenstepError):
        return {_MARK: ["error", [_name(kind), str(value)]]}
    if isinstance(value, Path):
        return {_MARK: ["path", str(value)]}
    return _plain_array(value, blobs)


def _plain_array(value: Any, blobs: list[bytes]) -> Any:
    if isinstance(value, bytes | bytearray):
        blobs.append(bytes(value))
        return {_MARK: ["bytes", len(value)]}
    if isinstance(value, torch.Tensor) and value.layout == torch.strided:
        dense = value.detach().cpu().contiguous()
        blobs.append(dense.reshape(-1).view(torch.uint8).numpy().tobytes())
        return {_MARK: ["tensor", [str(dense.dtype).removeprefix("torch."), list(dense.shape)]]}
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in _ARRAY_KINDS:
        blobs.append(np.ascontiguousarray(value).tobytes())
        form = "array" if isinstance(value, np.ndarray) else "scalar"
        return {_MARK: [form, [value.dtype.str, list(value.shape)]]}
    raise TypeError(
        f"{type(value).__name__}: it cannot be sent between processes: only numbers, text, bytes, "
        "tensors, arrays, and tuples, lists, sets and mappings of them can"
    )


class _Bytes:
    """The bytes after the header, read in order."""

    def __init__(self, message: bytes, begin: int) -> None:
        self._message, self._at = message, begin

    def take(self, count: int) -> bytearray:
        """The next `count` bytes; a ValueError if there are fewer."""
        if not 0 <= count <= len(self._message) - self._at:
            raise ValueError("a part is missing")
        begin, self._at = self._at, self._at + count
        return bytearray(self._message[begin : self._at])


def _whole(value: Any, rest: _Bytes) -> Any:
    if isinstance(value, list):
        return [_whole(item, rest) for item in value]
    if not isinstance(value, dict):
        return value
    if _MARK not in value:
        return {key: _whole(item, rest) for key, item in value.items()}
    kind, parts = value[_MARK]
    match kind:
        case "dict":
            return {_whole(key, rest): _whole(item, rest) for key, item in parts}
        case "tuple":
            return tuple(_whole(item, rest) for item in parts)
        case "set":
            return {_whole(item, rest) for item in parts}
        case "named":
            return _named(parts[0])._make([_whole(item, rest) for item in parts[1]])
        case "error":
            return _errors()[parts[0]](parts[1])
        case "refused":
            raise WillFailAgain(f"{parts[:1].upper()}{parts[1:]}.")
        case "path":
            return Path(parts)
        case "bytes":
            return bytes(rest.take(parts))
        case "tensor":
            kind_of_numbers, shape = parts
            return _tensor(kind_of_numbers, shape, rest)
        case "array" | "scalar":
            kind_of_numbers, shape = parts
            values = _array(kind_of_numbers, shape, rest)
            return values if kind == "array" else values[()]
    raise ValueError(f"unknown kind {kind}")


def _tensor(kind: str, shape: list[int], rest: _Bytes) -> torch.Tensor:
    dtype = getattr(torch, kind)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{kind} is not a numeric type")
    empty = torch.empty(0, dtype=dtype)
    count = _count(shape)
    if count == 0:
        return empty.reshape(shape)
    data = rest.take(count * empty.element_size())
    return torch.frombuffer(data, dtype=torch.uint8).view(dtype).reshape(shape)


def _array(kind: str, shape: list[int], rest: _Bytes) -> np.ndarray[Any, Any]:
    dtype = np.dtype(kind)
    if dtype.kind not in _ARRAY_KINDS:
        raise ValueError(f"{kind} is not a numeric type")
    return np.frombuffer(rest.take(_count(shape) * dtype.itemsize), dtype).reshape(shape)


def _count(shape: list[int]) -> int:
    count = 1
    for size in shape:
        if type(size) is not int or size < 0:
            raise ValueError("a size must be a whole number, at least 0")
        count *= size
    return count


# ---- classes by name: only those that are loaded already, and contain only data


def _name(kind: type) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


def _is_named(kind: type) -> bool:
    return issubclass(kind, tuple) and hasattr(kind, "_fields") and "<locals>" not in _name(kind)


def _named(name: str) -> Any:
    """The named tuple class of this name, in a module that is loaded."""
    module, _, path = name.partition(":")
    found: Any = sys.modules[module]
    for part in path.split("."):
        found = getattr(found, part)
    if not (isinstance(found, type) and _is_named(found)):
        raise ValueError(f"{name} is not a named tuple")
    return found


def _errors() -> dict[str, type[EvenstepError]]:
    """Evenstep's errors, by name."""
    return {_name(kind): kind for kind in _below(EvenstepError)}


def _below(kind: type[EvenstepError]) -> Iterator[type[EvenstepError]]:
    yield kind
    for narrower in kind.__subclasses__():
        yield from _below(narrower)
