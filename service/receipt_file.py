"""receipt.jsonl on disk: one line per interval, a digest for each of its steps.  No torch."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def read_receipt(path: Path) -> dict[int, str]:
    """The digest of every step (counted from 1) in a receipt; a torn last line is left out."""
    digests: dict[int, str] = {}
    for line in _lines(path):
        digests |= zip(range(line["from"], line["to"] + 1), line["rows"], strict=True)
    return digests


def append(path: Path, steps: range, digests: Sequence[int]) -> None:
    """Add the digests of `steps`, counted from 0, as one line written at once."""
    rows = [f"{digest & 0xFFFFFFFFFFFFFFFF:016x}" for digest in digests]
    line = json.dumps({"from": steps.start + 1, "to": steps.stop, "rows": rows})
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        if os.write(descriptor, text := (line + "\n").encode()) != len(text):
            raise OSError(errno.ENOSPC, "no room for a whole line; free some", str(path))
    finally:
        os.close(descriptor)


def keep_up_to(path: Path, step: int) -> None:
    """Forget what was written for steps that are about to be taken again."""
    if not path.exists():
        return
    kept = [_cut(line, step) for line in _lines(path) if line["from"] <= step]
    fresh = path.with_suffix(".partial")
    fresh.write_text("".join(json.dumps(line) + "\n" for line in kept))
    os.replace(fresh, path)


def _cut(line: dict[str, Any], step: int) -> dict[str, Any]:
    """The part of an interval up to `step`, which may lie within it."""
    last = min(line["to"], step)
    return line | {"to": last, "rows": line["rows"][: last - line["from"] + 1]}


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    whole = path.read_text().rpartition("\n")[0]
    return [json.loads(line) for line in whole.splitlines()]
