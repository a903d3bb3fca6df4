"""Mosaic's MDS shards, read by their index, without the library (which needs torchvision).

Source: mosaicml-streaming 0.13, `streaming/base/format/mds`; versions of the format: 2.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from service.basics.errors import DataBroken, SpecError, did_you_mean
from service.remote.cache import Held
from service.remote.files import File, Files, found
from service.remote.parts import Part

_INDEX = "index.json"
_SCALARS = {f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)}
_SCALARS |= {"float16", "float32", "float64"}
_VALUES = {8: "uint8", 9: "int8", 16: "uint16", 17: "int16", 18: "float16", 32: "uint32"}
_VALUES |= {33: "int32", 34: "float32", 64: "uint64", 65: "int64", 66: "float64"}
_PLAIN: dict[str, Callable[[bytes], Any]] = {
    "bytes": bytes,
    "jpeg": bytes,  # the file; the task decodes it
    "png": bytes,
    "str": lambda data: data.decode(),
    "int": lambda data: int(np.frombuffer(data, np.int64)[0]),
    "str_int": lambda data: int(data.decode()),
    "str_float": lambda data: float(data.decode()),
    "json": json.loads,
}
_OF_ARROW = {"zstd": "zstd", "snappy": "snappy", "br": "brotli"}


class Mds:
    """The shards of a directory with an `index.json`; each is one part."""

    def __init__(self, files: Files, names: Sequence[str], columns: Sequence[str] | None) -> None:
        self._files = files
        self._names = [name.removesuffix(f"/{_INDEX}") for name in names]
        self._columns = columns
        self._shards: dict[str, _Layout] = {}

    def files(self) -> Sequence[File]:
        every = []
        for name in self._names:
            index = found(self._files, [f"{name}/{_INDEX}"], ending=None)[0]
            every += self._indexed(index, name)
        return every

    def parts(self, file: File) -> int:
        return 1

    def read(self, file: File, part: int) -> Part:
        layout = self._shards[file.name]
        told = self._files.told(file.name)
        held = self._files.hold(file, check=lambda held: _require_hash(held, file, layout, told))
        try:
            if layout.compression is None:
                return _Shard(held, layout, told)
            raw = _decompressed(held.read(0, file.size), layout, told)
            held.close()
            return _Shard(_InMemory(raw), layout, told)
        except BaseException:
            held.close()
            raise

    def _indexed(self, index: File, directory: str) -> list[File]:
        """The shards that an index names."""
        told = self._files.told(index.name)
        try:
            content = json.loads(self._files.read(index, 0, index.size))
            layouts = [_Layout(shard) for shard in content["shards"]]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataBroken(
                f"{told}: cannot be read as the index of an MDS data set of version 2: "
                f"{type(error).__name__}: {error}."
            ) from error
        files = []
        for layout in layouts:
            layout.choose(self._columns, told)
            name = f"{directory}/{layout.basename}"
            self._shards[name] = layout
            # The index has no other trace of a shard that was written again.
            version = f"{index.version} {sorted(layout.hashes.items())}"
            files.append(File(name, layout.size, version))
        return files


class _Layout:
    """What the index says of one shard."""

    def __init__(self, shard: Mapping[str, Any]) -> None:
        if shard["format"] != "mds" or shard["version"] != 2:
            raise ValueError(f"format {shard['format']}, version {shard['version']}")
        self.compression: str | None = (shard["compression"] or "").partition(":")[0] or None
        stored = shard["raw_data"] if self.compression is None else shard["zip_data"]
        self.basename = str(stored["basename"])
        if os.path.basename(self.basename) != self.basename:
            raise ValueError(f"the name {self.basename!r}")
        self.size = int(stored["bytes"])
        self.raw_size = int(shard["raw_data"]["bytes"])
        self.hashes: Mapping[str, str] = stored["hashes"]
        self.rows = int(shard["samples"])
        self.names: list[str] = shard["column_names"]
        self.encodings: list[str] = shard["column_encodings"]
        self.sizes: list[int | None] = shard["column_sizes"]
        self.decoders: dict[str, Callable[[bytes], Any]] = {}

    def choose(self, columns: Sequence[str] | None, told: str) -> None:
        """Prepare to read these columns.

        Raises:
            SpecError: there is no such column, or its encoding is not supported.
        """
        encodings = dict(zip(self.names, self.encodings, strict=True))
        for name in columns or self.names:
            if name not in encodings:
                raise SpecError(f"{told}: has no column {name!r}{did_you_mean(name, self.names)}")
            decoder = _decoder(encodings[name])
            if decoder is None:
                raise SpecError(
                    f"{told}: the column {name!r} is encoded as {encodings[name]!r}, which is not "
                    "read (a pickle can run code). Leave it out by `columns`, or write it in "
                    "another encoding."
                )
            self.decoders[name] = decoder


def _decoder(encoding: str) -> Callable[[bytes], Any] | None:
    """What makes a value of its bytes; None if the encoding is not supported."""
    if encoding in _SCALARS:
        return lambda data: np.frombuffer(data, encoding)[0]
    kind, _, options = encoding.partition(":")
    if kind == "ndarray":
        dtype, _, shape = options.partition(":")
        fixed = tuple(int(n) for n in shape.split(",")) if shape else None
        return lambda data: _array(data, dtype or None, fixed)
    return _PLAIN.get(encoding)


def _array(data: bytes, dtype: str | None, shape: tuple[int, ...] | None) -> Any:
    at = 0
    if dtype is None:
        dtype, at = _VALUES[data[0]], 1
    if shape is None:
        dimensions, kind = data[at] >> 2, f"uint{8 << data[at] % 4}"
        end = at + 1 + dimensions * np.dtype(kind).itemsize
        shape, at = tuple(np.frombuffer(data[at + 1 : end], kind).tolist()), end
    return np.frombuffer(data[at:], dtype).reshape(shape).copy()


class _InMemory:
    def __init__(self, content: bytes) -> None:
        self._content = content

    def read(self, offset: int, size: int) -> bytes:
        return self._content[offset : offset + size]

    def close(self) -> None:
        self._content = b""


class _Shard:
    """The rows of a shard: `uint32` count, offsets, a description, then the rows."""

    def __init__(self, held: Held | _InMemory, layout: _Layout, told: str) -> None:
        self._held = held
        self._layout = layout
        head = np.frombuffer(held.read(0, 4 * (layout.rows + 2)), np.uint32)
        ends = head[1:]
        if len(head) != layout.rows + 2 or head[0] != layout.rows or ends[-1] != layout.raw_size:
            raise DataBroken(
                f"{told}: is not the shard of {layout.rows:,} rows that the index describes. "
                "Upload it again."
            )
        self._ends = ends

    def __len__(self) -> int:
        return self._layout.rows

    def row(self, index: int) -> dict[str, Any]:
        begin, end = (int(at) for at in self._ends[index : index + 2])
        data = self._held.read(begin, end - begin)
        at, sizes = 0, []
        for size in self._layout.sizes:
            if size is None:
                size, at = int.from_bytes(data[at : at + 4], "little"), at + 4
            sizes.append(size)
        row = {}
        for name, size in zip(self._layout.names, sizes, strict=True):
            if name in self._layout.decoders:
                row[name] = self._layout.decoders[name](data[at : at + size])
            at += size
        return row

    def close(self) -> None:
        self._held.close()


def _require_hash(held: Held, file: File, layout: _Layout, told: str) -> None:
    """Check the hashes of the index.

    Raises:
        DataBroken: one of them differs.
    """
    content = held.read(0, file.size + 1)
    if len(content) != file.size:
        raise DataBroken(
            f"{told}: has not the {file.size:,} bytes that the index says. Upload it again."
        )
    for name, expected in layout.hashes.items():
        found_hash = _hash(name, content)
        if found_hash is not None and found_hash != expected:
            raise DataBroken(
                f"{told}: its {name} is {found_hash[:12]}..., and the index says "
                f"{expected[:12]}.... Upload it again."
            )


def _hash(name: str, content: bytes) -> str | None:
    """A hash by the name that Mosaic's library has for it; None if the name is unknown."""
    if name in xxhash.algorithms_available:
        return str(getattr(xxhash, name)(content).hexdigest())
    if name in hashlib.algorithms_available and not name.startswith("shake_"):
        return hashlib.new(name, content, usedforsecurity=False).hexdigest()
    return None


def _decompressed(content: bytes, layout: _Layout, told: str) -> bytes:
    kind = layout.compression
    try:
        if kind == "gz":
            return gzip.decompress(content)
        if kind == "bz2":
            return bz2.decompress(content)
        if kind in _OF_ARROW:
            size = layout.raw_size
            return bytes(pa.decompress(content, size, codec=_OF_ARROW[kind], asbytes=True))
    except (OSError, EOFError, ValueError, pa.ArrowException) as error:
        raise DataBroken(f"{told}: cannot be decompressed: {error}. Upload it again.") from error
    raise SpecError(f"{told}: the compression {kind!r} is not known; known: gz, bz2, zstd, ...")
