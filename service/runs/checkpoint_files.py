"""Checkpoints on disk: their names, their files, and their verification. No torch.

A checkpoint is a directory `step-00000120` with its tensors in safetensors files, `state.json`
with everything else, and `manifest.json`, written last, with the size and SHA-256 of the others
(of large ones part by part) and of itself.  `step-00000120.untested` is a checkpoint whose step's
test was abandoned; it is removed when the one with the test exists.  A reader trusts nothing: see
`damage_of`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from service.basics.atomic_files import (
    PASSING,
    Hashes,
    sha256_of,
    sync_directory,
    told_when_unread,
    write_file,
    xxh3_of,
)
from service.basics.errors import NoCheckpoint, SpecError
from service.basics.limits import limits
from service.basics.multipart import Part, digest_of, parts_of, told_of
from service.spec.models import CheckpointSpec

T = TypeVar("T")

FORMAT = 2
FORMATS = (1, 2)  # format 1 has no parts
MODEL, AVERAGE, OPTIMIZER, STATE, MANIFEST = (
    "model.safetensors",
    "average.safetensors",
    "optimizer.safetensors",
    "state.json",
    "manifest.json",
)
DATA = (MODEL, OPTIMIZER, STATE)  # and AVERAGE, if the spec asks for one
BEST = "best"

_UNTESTED = ".untested"
_NAME = re.compile(rf"step-(\d{{8,}})({re.escape(_UNTESTED)})?", re.ASCII)
_MANIFEST_BYTES = 16 << 20
_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
_STATE_BYTES = 1 << 30
_SIZES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
    "C64": 8,
}


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint on disk."""

    path: Path
    step: int

    @property
    def untested(self) -> bool:
        """Whether the test of its step was abandoned, and is still due."""
        return self.path.name.endswith(_UNTESTED)


@dataclass(frozen=True)
class Entry:
    """A tensor in a header."""

    name: str
    dtype: str
    """The dtype in safetensors' notation: F32, BF16, ..."""
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * _SIZES[self.dtype]


def in_words(size_bytes: int) -> str:
    """A number of bytes as text: `1.1 GiB`."""
    size, unit = float(size_bytes), "bytes"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1000:
            break
        size, unit = size / 1024, larger
    return f"{size:.3g} {unit}" if unit != "bytes" else f"{size_bytes} bytes"


def saving_in_words(size_bytes: int | None, spec: CheckpointSpec, *, pinned: bool = False) -> str:
    """The size of a checkpoint on disk and in memory; None if it is known only after a step.

    `pinned` memory is allocated in powers of two: torch's allocator rounds up.
    """
    size = "as much as weights and optimizer state" if size_bytes is None else in_words(size_bytes)
    if spec.asynchronous and pinned:
        held = f"the next power of two, {in_words(pinned_bytes(size_bytes))}," if size_bytes else ""
        return (
            f"{size} each on disk, and {held or 'up to twice as much'} once in pinned main memory "
            "of the first node."
        )
    if spec.asynchronous:
        return f"{size} each on disk, and the same once in the main memory of the first node."
    return f"{size} each on disk; training waits until one is written."


def pinned_bytes(size_bytes: int) -> int:
    """The real size of a pinned buffer for this many bytes."""
    return 1 << max(0, size_bytes - 1).bit_length()


class _Damaged(Exception):
    """The damage of a checkpoint, as text."""


# ---- names


def name_of(step: int, *, untested: bool = False) -> str:
    """The name of a checkpoint's directory: `step-00000120`."""
    return f"step-{step:08d}{_UNTESTED if untested else ''}"


def checkpoints_in(directory: Path) -> list[Checkpoint]:
    """The directories named like checkpoints, by step; `damage_of` checks whether they are valid.

    Of two of one step, the untested one comes first.
    """
    if not directory.is_dir():
        return []
    found = []
    for path in directory.iterdir():
        match = _NAME.fullmatch(path.name)
        if match and path.name == name_of(int(match[1]), untested=bool(match[2])):
            found.append(Checkpoint(path, int(match[1])))
    return sorted(found, key=lambda checkpoint: (checkpoint.step, not checkpoint.untested))


def best_of(directory: Path) -> int | None:
    """The step in the file `best`; None if there is none."""
    path = directory / BEST
    if path.is_symlink() or not path.is_file() or path.stat().st_size > 100:
        return None
    match = _NAME.fullmatch(path.read_text(errors="replace").strip())
    return int(match[1]) if match else None


def ranks_of(directory: Path) -> dict[int, int]:
    """The rank of each step among the best, from 1, according to the newest readable state.

    The first is the one in the file `best`.
    """
    best = best_of(directory)
    ranks = {} if best is None else {best: 1}
    for checkpoint in reversed(checkpoints_in(directory)):
        with suppress(NoCheckpoint, KeyError, TypeError, ValueError):  # from another version
            others = [int(other["step"]) for other in read_state(checkpoint.path)["runners_up"]]
            return {**dict(zip(others, range(2, len(others) + 2), strict=True)), **ranks}
    return ranks


def find_checkpoint(directory: Path, which: str) -> Checkpoint:
    """The checkpoint for `best`, `latest` or a step; `latest` is the newest valid one.

    Raises:
        SpecError: it does not exist, or may not be read.
        NoCheckpoint: it is damaged.
    """
    with told_when_unread(directory):
        return _found(directory, which)


def _found(directory: Path, which: str) -> Checkpoint:
    found = checkpoints_in(directory)
    if not found:
        raise SpecError(f"There is no checkpoint in {directory}.")
    if which == "latest":
        for checkpoint in reversed(found):
            if damage_of(checkpoint) is None:
                return checkpoint
        raise NoCheckpoint(f"None of the {len(found)} checkpoints in {directory} can be read.")
    step = best_of(directory) if which == "best" else int(which) if which.isdecimal() else None
    for checkpoint in reversed(found):
        if checkpoint.step == step:
            damage = damage_of(checkpoint)
            if damage is not None:
                raise NoCheckpoint(f"The checkpoint {checkpoint.path} is damaged: {damage}.")
            return checkpoint
    steps = ", ".join(dict.fromkeys(str(checkpoint.step) for checkpoint in found))
    if which == "best":
        raise SpecError(f"No checkpoint in {directory} is marked as the best. There are {steps}.")
    raise SpecError(f"{directory}: there is no {which!r}; known: best, latest, {steps}.")


def kept(
    steps: Sequence[int], *, newest: int, every: int | None, best: Collection[int]
) -> set[int]:
    """The steps to keep: the newest, the best, and the first at or after each `every` steps.

    After others have been removed, the result for the kept ones is the same.
    """
    ordered = sorted(set(steps))
    stay = {*ordered[-newest:], *(step for step in ordered if step in best)}
    if every is not None:
        first_of: dict[int, int] = {}
        for step in ordered:
            first_of.setdefault(step // every, step)
        stay |= {step for number, step in first_of.items() if number > 0}
    return stay


# ---- write


def complete(
    directory: Path,
    digests: Mapping[Part, Hashes],
    rest: Mapping[str, Any],
    facts: Mapping[str, Any],
    *,
    part_bytes: int,
    moved: Callable[[], None] = lambda: None,
) -> None:
    """Make a checkpoint of a directory with tensor files: each file synced, the manifest last.

    Args:
        digests: the hashes of all parts of the tensor files, which are synced.
        rest: everything else in the state, including `step`.
        facts: additional values for the manifest.
        moved: called after each progress on disk.
    """
    state = write_file(directory / STATE, [(json.dumps(rest) + "\n").encode()])
    moved()
    files = told_of(digests) | {STATE: {"bytes": state.size_bytes, "sha256": state.sha256}}
    own = {"format": FORMAT, "step": rest["step"], "part_bytes": part_bytes, "files": files}
    write_file(directory / MANIFEST, [_sealed({**facts, **own}).encode()])
    moved()
    sync_directory(directory)
    moved()


def tensor_digests(manifest: Mapping[str, Any]) -> dict[str, str]:
    """SHA-256 of each tensor file in a manifest."""
    files = manifest["files"].items()
    return {name: told["sha256"] for name, told in files if name.endswith(".safetensors")}


def header(entries: Sequence[Entry], metadata: Mapping[str, str] | None = None) -> bytes:
    """The header of a safetensors file with the entries in this order."""
    told: dict[str, Any] = {"__metadata__": dict(metadata or {"format": "pt"})}
    at = 0
    for entry in entries:
        span = [at, at + entry.size_bytes]
        told[entry.name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": span}
        at = span[1]
    text = json.dumps(told, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data starts at a multiple of 8
    return len(text).to_bytes(8, "little") + text


def _sealed(manifest: Mapping[str, Any]) -> str:
    """The manifest's text, including its own hash."""
    body = {key: value for key, value in manifest.items() if key != "sha256"}
    sha256 = hashlib.sha256(json.dumps(body).encode()).hexdigest()
    return json.dumps({**body, "sha256": sha256}, indent=1) + "\n"


# ---- read and verify


@dataclass(frozen=True)
class Share:
    """The bytes that one of several processes verifies; the default is all of them."""

    index: int = 0
    """Of this process; the first one also checks what a hash cannot show."""
    processes: int = 1
    threads: int | None = None
    """None means one for each core."""

    def of(self, parts: Sequence[tuple[Part, T]]) -> list[tuple[Part, T]]:
        """The parts of this process: adjacent ones, nearly as many bytes as those of the others."""
        total = max(1, sum(part.end - part.begin for part, _ in parts))
        own, before = [], 0
        for part, value in parts:
            size = part.end - part.begin
            whose = (2 * before + size) * self.processes // (2 * total)  # where its middle is
            if min(whose, self.processes - 1) == self.index:  # an empty last one is at the end
                own.append((part, value))
            before += size
        return own


WHOLE = Share()


def damage_of(checkpoint: Checkpoint, share: Share = WHOLE, *, quick: bool = False) -> str | None:
    """The damage of a checkpoint, or None if every byte of the share is as it was written.

    Args:
        quick: compare XXH3 instead of SHA-256, except in checkpoints of versions that wrote none.

    Raises:
        OSError: it may not be read, or cannot be read at the moment: its state is unknown.
    """
    return _told(checkpoint, lambda: _require_undamaged(checkpoint, share, quick=quick))


def apparent_damage_of(checkpoint: Checkpoint) -> str | None:
    """The same, from the manifest and the names and sizes of its files only.

    Raises:
        OSError: as for `damage_of`.
    """
    return _told(checkpoint, lambda: _require_files(checkpoint))


def _told(checkpoint: Checkpoint, check: Callable[[], object]) -> str | None:
    """The damage that `check` raises."""
    try:
        try:
            return _damage_in(check)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            # NFS mounted `soft` gives this error for a server that does not answer for a while.
            return _damage_in(check)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM) or error.errno in PASSING:
            raise
        return f"{error.filename or checkpoint.path}: {error.strerror or error}"


def _damage_in(check: Callable[[], object]) -> str | None:
    try:
        check()
    except _Damaged as damage:
        return str(damage)
    return None


def _require_undamaged(checkpoint: Checkpoint, share: Share, *, quick: bool) -> None:
    directory = checkpoint.path
    parts = share.of(_require_files(checkpoint))
    # Hashing releases the GIL: two cores need half the time of one.
    with ThreadPoolExecutor(share.threads or limits().cores, thread_name_prefix="hash") as threads:
        checks = [
            threads.submit(_require_as_written, directory, *pair, quick=quick) for pair in parts
        ]
    for check in checks:
        check.result()
    if share.index == 0:
        _require_state(directory, checkpoint.step)


class _Known(NamedTuple):
    """The hashes of a part in the manifest; None for one that it does not have."""

    sha256: str | None
    xxh3: str | None


def _require_files(checkpoint: Checkpoint) -> list[tuple[Part, _Known]]:
    """The parts of all files and their hashes in the manifest; `state.json` is the first."""
    directory = checkpoint.path
    if directory.is_symlink() or not directory.is_dir():
        raise _Damaged("it is not a directory, but a link or a file")
    manifest = _manifest_of(directory, checkpoint.step)
    files = manifest["files"]
    strangers = {n for n in os.listdir(directory) if n[:1] != "."} - {*files, MANIFEST}
    if strangers:  # NFS and file browsers create hidden files
        raise _Damaged(
            f"it contains files that do not belong to a checkpoint: "
            f"{', '.join(sorted(strangers)[:3])!r}"
        )
    ordered = sorted(files, key=lambda name: name != STATE)
    return [pair for n in ordered for pair in _parts_of(directory / n, files[n], manifest)]


def read_manifest(checkpoint: Checkpoint) -> dict[str, Any]:
    """The manifest, verified.

    Raises:
        NoCheckpoint: it is damaged.
    """
    try:
        return _manifest_of(checkpoint.path, checkpoint.step)
    except (_Damaged, OSError) as error:
        raise NoCheckpoint(f"The checkpoint {checkpoint.path} is damaged: {error}.") from error


def read_state(directory: Path) -> dict[str, Any]:
    """Everything except the tensors.

    Raises:
        NoCheckpoint: it cannot be read.
    """
    try:
        return _object(_bytes(directory / STATE, _STATE_BYTES), STATE)
    except (_Damaged, OSError) as error:
        raise NoCheckpoint(f"The checkpoint {directory} cannot be read: {error}.") from error


def read_header(path: Path) -> tuple[list[Entry], int]:
    """The tensors of a safetensors file in the order of their bytes, and the offset of the first.

    Raises:
        NoCheckpoint: it is not such a file.
    """
    try:
        return _header_of(path)
    except (_Damaged, OSError) as error:
        raise NoCheckpoint(f"{path} cannot be read: {error}.") from error


def _manifest_of(directory: Path, step: int) -> dict[str, Any]:
    raw = _bytes(directory / MANIFEST, _MANIFEST_BYTES)
    manifest = _object(raw, MANIFEST)
    if manifest.get("format") not in FORMATS:
        raise _Damaged(f"its format is {manifest.get('format')!r} and not {FORMAT}")
    # Compared as bytes: any change counts, even one without effect.
    if _sealed(manifest).encode() != raw:
        raise _Damaged(f"the content of {MANIFEST} has changed")
    files = manifest.get("files")
    if not isinstance(files, dict) or set(files) - {AVERAGE} != set(DATA):
        named = sorted(files) if isinstance(files, dict) else files
        raise _Damaged(f"{MANIFEST} names the files {str(named)[:200]}")
    if manifest.get("step") != step:
        raise _Damaged(f"its step is {manifest.get('step')!r}, not the step in its name")
    return manifest


def _parts_of(path: Path, told: Any, manifest: Mapping[str, Any]) -> Iterator[tuple[Part, _Known]]:
    """The parts of a file, whose size is checked, and their hashes in the manifest."""
    size = _size(path)
    if not isinstance(told, dict) or told.get("bytes") != size:
        instead = told.get("bytes") if isinstance(told, dict) else told
        raise _Damaged(f"{path.name} has {size} bytes instead of {instead!r}")
    digests, part_bytes = told.get("parts"), manifest.get("part_bytes")
    quick = told.get("xxh3")
    if digests is None:
        [own] = quick if isinstance(quick, list) and len(quick) == 1 else [None]
        yield Part(path.name, 0, size), _Known(told.get("sha256"), own)
        return
    if type(part_bytes) is not int or part_bytes < 1 or not isinstance(digests, list):
        raise _Damaged(f"{MANIFEST} does not list the parts of {path.name}")
    if len(digests) != max(1, -(-size // part_bytes)):
        raise _Damaged(f"{MANIFEST} lists {len(digests)} parts of {path.name}")
    try:
        whole = digest_of(digests)
    except (TypeError, ValueError):
        whole = None
    if whole != told.get("sha256"):
        raise _Damaged(f"{MANIFEST} has two hashes for the content of {path.name}")
    if not isinstance(quick, list) or len(quick) != len(digests):
        quick = [None] * len(digests)  # earlier versions wrote none
    known = map(_Known, digests, quick)
    yield from zip(parts_of(path.name, size, part_bytes), known, strict=True)


def _require_as_written(directory: Path, part: Part, known: _Known, *, quick: bool) -> None:
    path = directory / part.file
    if quick and known.xxh3 is not None:
        is_same = xxh3_of(path, part.begin, part.end) == known.xxh3
    else:
        is_same = sha256_of(path, part.begin, part.end) == known.sha256
    if not is_same:
        raise _Damaged(f"the content of {part.file} has changed")


def _require_state(directory: Path, step: int) -> None:
    """Check what a hash cannot show: that the files are valid, whoever wrote them."""
    weights = {entry.name for entry in _header_of(directory / MODEL)[0]}
    held = {entry.name for entry in _header_of(directory / OPTIMIZER)[0]}
    rest = _object(_bytes(directory / STATE, _STATE_BYTES), STATE)
    if (directory / AVERAGE).exists() and not weights.issuperset(
        averaged := {entry.name for entry in _header_of(directory / AVERAGE)[0]}
    ):
        raise _Damaged(f"{AVERAGE} contains {sorted(averaged - weights)[:3]}, but {MODEL} does not")
    aliases, described = rest.get("aliases"), rest.get("optimizer")
    if rest.get("step") != step:
        raise _Damaged(f"the step in {STATE} is {rest.get('step')!r}")
    if not isinstance(aliases, dict) or not isinstance(described, dict):
        raise _Damaged(f"{STATE} lacks its sections")
    if not weights.issuperset(map(str, aliases.values())):
        raise _Damaged(f"{STATE} names weights that {MODEL} does not contain")
    if not held.issuperset(_tensor_names(described)):
        raise _Damaged(f"{STATE} names tensors that {OPTIMIZER} does not contain")


def _tensor_names(value: Any) -> Iterable[str]:
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            if isinstance(value.get("tensor"), str):
                yield value["tensor"]
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value


def _header_of(path: Path) -> tuple[list[Entry], int]:
    size = _size(path)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, _HEADER_BYTES):
            raise _Damaged(f"{path.name} is not in safetensors: its header would be {length} bytes")
        told = _object(file.read(length), path.name)
    told.pop("__metadata__", None)
    begin, at, entries = 8 + length, 0, []
    for entry, span in sorted(
        (_entry(name, value, path) for name, value in told.items()), key=lambda pair: pair[1]
    ):
        if span != (at, at + entry.size_bytes):
            raise _Damaged(
                f"{path.name}: the bytes of {entry.name!r:.100} are not at their position in the "
                f"file"
            )
        entries.append(entry)
        at = span[1]
    if begin + at != size:
        raise _Damaged(f"{path.name} has {size} bytes, but {begin + at} according to its header")
    return entries, begin


def _entry(name: str, told: Any, path: Path) -> tuple[Entry, tuple[int, int]]:
    try:
        entry = Entry(name, told["dtype"], tuple(told["shape"]))
        begin, end = told["data_offsets"]
        numbers = [begin, end, *entry.shape]
        if entry.dtype in _SIZES and all(type(n) is int and n >= 0 for n in numbers):
            return entry, (begin, end)
    except (TypeError, ValueError, KeyError):
        pass  # reported below, as for every other invalid header
    raise _Damaged(f"{path.name}: {name!r:.100} is not a tensor")


def _size(path: Path) -> int:
    """The size of a regular file: a link might lead anywhere, and reading a pipe might not end."""
    found = os.lstat(path)
    if not stat.S_ISREG(found.st_mode):
        raise _Damaged(f"{path.name} is not a regular file")
    return found.st_size


def _bytes(path: Path, at_most: int) -> bytes:
    size = _size(path)
    if size > at_most:
        raise _Damaged(f"{path.name} has {size} bytes, more than possible")
    return path.read_bytes()


def _object(raw: bytes, name: str) -> dict[str, Any]:
    try:
        value = json.loads(raw, object_pairs_hook=_without_repetition)
    except (ValueError, RecursionError) as error:
        raise _Damaged(f"{name} is not in JSON ({type(error).__name__}: {error})") from error
    if not isinstance(value, dict):
        raise _Damaged(f"{name} is not a JSON object")
    return value


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a name occurs twice")
    return values
