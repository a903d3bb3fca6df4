"""receipt.jsonl on disk: digests of each step's rows, and of the weights at checkpoints.

No torch.  A line holds the rows of an interval, a digest for each of its steps, or the SHA-256 of a
checkpoint's tensor files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from service.durable import Appended, replace_file, sync_directory, told_when_unwritten
from service.errors import WillFailAgain


def read_receipt(path: Path) -> dict[int, str]:
    """The digest of every step (counted from 1) in a receipt; a torn last line is left out."""
    digests: dict[int, str] = {}
    for line in _lines(path):
        if "rows" in line:
            digests |= zip(range(line["from"], line["to"] + 1), line["rows"], strict=True)
    return digests


def read_weights(path: Path) -> dict[int, dict[str, str]]:
    """SHA-256 of the tensor files of each checkpoint that was ever saved, by step."""
    return {line["step"]: line["weights"] for line in _lines(path) if "weights" in line}


class ReceiptFile:
    """A receipt that is added to, line by line, each of them written at once."""

    def __init__(self, path: Path, *, step: int, say: Callable[[str], None] = print) -> None:
        """Forget what was written for steps after `step`: they are about to be taken again.

        `say` tells a person where lines wait for a disk that is full.

        Raises:
            EvenstepError: it cannot be written.
        """
        with told_when_unwritten(path):
            _keep_up_to(path, step)
            self._file = Appended(path, say=say)
        self._path = path

    def add_rows(self, steps: range, digests: Sequence[int]) -> None:
        """Add the digests of `steps`, counted from 0."""
        rows = [f"{digest & 0xFFFFFFFFFFFFFFFF:016x}" for digest in digests]
        self._add({"from": steps.start + 1, "to": steps.stop, "rows": rows})

    def add_weights(self, step: int, files: Mapping[str, str]) -> None:
        """Add the SHA-256 of a checkpoint's tensor files; from any thread."""
        self._add({"step": step, "weights": dict(files)})

    def sync(self) -> None:
        """Put what was added on disk."""
        self._file.sync()
        sync_directory(self._path.parent)

    def close(self) -> None:
        """Nothing is added afterwards."""
        self._file.close()

    def _add(self, line: Mapping[str, Any]) -> None:
        self._file.add((json.dumps(line) + "\n").encode())


def _keep_up_to(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = [_cut(line, step) for line in _lines(path) if _begins(line) <= step]
    # On disk before it takes the old one's place: what a checkpoint rests on must not be lost.
    replace_file(path, "".join(json.dumps(line) + "\n" for line in kept))


def _begins(line: Mapping[str, Any]) -> int:
    return int(line["from"] if "rows" in line else line["step"])


def _cut(line: dict[str, Any], step: int) -> dict[str, Any]:
    """The part of an interval up to `step`, which may lie within it."""
    if "rows" not in line:
        return line
    last = min(line["to"], step)
    return line | {"to": last, "rows": line["rows"][: last - line["from"] + 1]}


def _lines(path: Path) -> list[dict[str, Any]]:
    """Every line, without a torn last one.

    Raises:
        WillFailAgain: one before it is none.
    """
    if not path.exists():
        return []
    whole = path.read_bytes().rpartition(b"\n")[0]
    return [_line(raw, f"{path}:{n}") for n, raw in enumerate(whole.splitlines(), start=1)]


def _line(raw: bytes, place: str) -> dict[str, Any]:
    try:
        line = json.loads(raw)
        if "weights" in line:
            whole = isinstance(line["step"], int) and isinstance(line["weights"], dict)
        else:
            whole = len(line["rows"]) == line["to"] - line["from"] + 1
        if whole:
            return dict(line)
    except (ValueError, TypeError, KeyError):
        pass  # told below, as for every other line that is none
    raise WillFailAgain(
        f"{place}: this line is not of a receipt: {raw[:60]!r}. Remove the line, or start the run "
        "anew with --fresh."
    )
