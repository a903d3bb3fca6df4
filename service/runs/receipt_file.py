"""receipt.jsonl on disk: digests of each step's rows, and of the weights at checkpoints.

No torch.  A line has the rows of an interval (one digest for each step), the SHA-256 of a
checkpoint's tensor files, or the changes of the spec after a step.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from service.basics.atomic_files import (
    AppendOnlyFile,
    replace_file,
    sync_directory,
    told_when_unwritten,
)
from service.basics.errors import WillFailAgain
from service.runs.line_file import Block, blocks_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

LARGEST_STEP = 2**53
_DIGEST = re.compile(r"[0-9a-f]{16}")


def read_receipt(path: Path) -> dict[int, str]:
    """The digest of every step (counted from 1) in a receipt, without an incomplete last line."""
    digests: dict[int, str] = {}
    for line in _lines(path):
        if "rows" in line:
            digests |= zip(range(line["from"], line["to"] + 1), line["rows"], strict=True)
    return digests


def read_digests(path: Path) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
    """The steps of a receipt [S], counted from 1, increasing, and the digest of each."""
    import numpy as np

    steps, digests = [np.zeros(0, np.int64)], [np.zeros(0, np.uint64)]
    for block in _blocks(path):
        try:
            some = _digests_of(block.values)
        except (TypeError, KeyError, ValueError, OverflowError):
            some = _digests_of(_checked(block, path))
        steps.append(some[0])
        digests.append(some[1])
    all_steps, all_digests = np.concatenate(steps), np.concatenate(digests)
    if np.all(np.diff(all_steps) > 0):
        return all_steps, all_digests
    last = dict(zip(all_steps.tolist(), range(len(all_steps)), strict=True))
    order = np.array([last[step] for step in sorted(last)], np.int64)
    return all_steps[order], all_digests[order]


def _digests_of(lines: Sequence[Any]) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
    """The same for some lines.

    Raises:
        TypeError, KeyError, ValueError, OverflowError: one of them is invalid.
    """
    import numpy as np

    if not set(map(type, lines)) <= {dict}:
        raise TypeError("a line must be an object")
    of_rows = [line for line in lines if "step" not in line]
    if len(of_rows) < len(lines):
        _require(all(map(_is_line, (line for line in lines if "step" in line))))
    rows = [line["rows"] for line in of_rows]
    _require(set(map(type, rows)) <= {list})
    counts = np.frombuffer(array("q", map(len, rows)), np.int64)
    first = np.frombuffer(array("q", [line["from"] for line in of_rows]), np.int64)
    last = np.frombuffer(array("q", [line["to"] for line in of_rows]), np.int64)
    _require(bool(np.all((first >= 0) & (last < LARGEST_STEP) & (last - first + 1 == counts))))
    every = list(chain.from_iterable(rows))
    _require(set(map(len, every)) <= {16})
    digests = np.frombuffer(bytes.fromhex("".join(every)), ">u8").astype(np.uint64)
    _require(len(digests) == len(every))
    before = np.cumsum(counts) - counts
    return np.repeat(first - before, counts) + np.arange(len(digests)), digests


def _require(holds: bool) -> None:
    if not holds:
        raise ValueError("a line does not belong to a receipt")


def read_weights(path: Path) -> dict[int, dict[str, str]]:
    """SHA-256 of the tensor files of each checkpoint that was ever saved, by step."""
    return {line["step"]: line["weights"] for line in _lines(path) if "weights" in line}


class ReceiptFile:
    """A receipt to which lines are appended; each line is written immediately."""

    def __init__(
        self,
        path: Path,
        *,
        step: int,
        say: Callable[[str], None] = print,
        changes: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Remove the lines of steps after `step`: these steps will be repeated.

        `say` reports lines that wait because the disk is full.  `changes` are all changes of the
        spec, from run.json.

        Raises:
            EvenstepError: it cannot be written.
        """
        with told_when_unwritten(path):
            _keep_up_to(path, step, [_line_of_change(change) for change in changes])
            self._file = AppendOnlyFile(path, say=say)
        self._path = path

    def add_rows(self, steps: range, digests: Sequence[int]) -> None:
        """Add the digests of `steps`, counted from 0."""
        rows = [f"{digest & 0xFFFFFFFFFFFFFFFF:016x}" for digest in digests]
        self._add({"from": steps.start + 1, "to": steps.stop, "rows": rows})

    def add_weights(self, step: int, files: Mapping[str, str]) -> None:
        """Add the SHA-256 of a checkpoint's tensor files; from any thread."""
        self._add({"step": step, "weights": dict(files)})

    def sync(self) -> None:
        """Sync all lines to disk."""
        self._file.sync()
        sync_directory(self._path.parent)

    def close(self) -> None:
        """Close the file; nothing is appended afterwards."""
        self._file.close()

    def _add(self, line: Mapping[str, Any]) -> None:
        self._file.add((json.dumps(line) + "\n").encode())


def _line_of_change(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "step": entry["step"],
        "changed": {key["key"]: [key["was"], key["now"]] for key in entry["keys"]},
        "by": entry["by"],
        "time": entry["time"],
    }


def _keep_up_to(path: Path, step: int, changes: list[dict[str, Any]]) -> None:
    if not path.exists() and not changes:
        return
    held = [_cut(line, step) for line in _lines(path) if _begins(line) <= step]
    kept = [line for line in held if "changed" not in line or line in changes]
    kept += [line for line in changes if line not in kept]
    # On disk before it replaces the old one: a checkpoint depends on it.
    replace_file(path, "".join(json.dumps(line) + "\n" for line in kept))


def _begins(line: Mapping[str, Any]) -> int:
    return int(line["from"] if "rows" in line else line["step"])


def _cut(line: dict[str, Any], step: int) -> dict[str, Any]:
    """The part of an interval up to `step`, which may lie within it."""
    if "rows" not in line:
        return line
    last = min(line["to"], step)
    return line | {"to": last, "rows": line["rows"][: last - line["from"] + 1]}


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Every line, without an incomplete last one.

    Raises:
        WillFailAgain: an earlier line is invalid.
    """
    for block in _blocks(path):
        yield from _checked(block, path)


def _blocks(path: Path) -> Iterator[Block]:
    return (block for block in blocks_of(path) if not block.is_torn) if path.exists() else iter(())


def _checked(block: Block, path: Path) -> list[dict[str, Any]]:
    for number, value in enumerate(block.values):
        if not _is_line(value):
            raise WillFailAgain(
                f"{path}:{block.first + number}: this line is not a row of a receipt: "
                f"{block.lines[number][:60]!r}. Remove the line, or start over with --fresh."
            )
    return block.values


def _is_line(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    if "changed" in value:
        return isinstance(value["changed"], dict) and _is_step(value.get("step"))
    if "weights" in value:
        weights = value["weights"]
        names = isinstance(weights, dict) and all(isinstance(v, str) for v in weights.values())
        return names and _is_step(value.get("step"))
    first, last, rows = (value.get(key) for key in ("from", "to", "rows"))
    if not (_is_step(first) and _is_step(last) and isinstance(rows, list)):
        return False
    are_digests = all(isinstance(row, str) and _DIGEST.fullmatch(row) for row in rows)
    return are_digests and len(rows) == last - first + 1


def _is_step(value: Any) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < LARGEST_STEP
