"""Reads a .wandb file back: what the real client wrote down, to be compared exactly."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

BLOCK_BYTES = 32 * 1024


@dataclass
class RunLog:
    """The records of one segment that a test asks about."""

    run_id: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    """As logged, without the keys that wandb adds (they begin with an underscore)."""
    summary: dict[str, Any] = field(default_factory=dict)
    step_metrics: dict[str, str] = field(default_factory=dict)
    preempting: bool = False
    exit_code: int | None = None
    artifacts: list[dict[str, Any]] = field(default_factory=list)
    """Name, aliases and references of each."""

    @property
    def steps(self) -> list[int]:
        return [row["step"] for row in self.rows]


def read_log(path: Path) -> RunLog:
    """Everything up to the end, or to where a killed process tore it."""
    log = RunLog()
    for content in _contents(path.read_bytes()):
        record = wandb_internal_pb2.Record.FromString(content)
        match record.WhichOneof("record_type"):
            case "run":
                log.run_id = record.run.run_id
                log.config |= _values(record.run.config.update)
            case "history":
                log.rows.append(_values(record.history.item))
            case "summary":
                log.summary |= _values(record.summary.update)
            case "metric":
                log.step_metrics[record.metric.glob_name] = record.metric.step_metric
            case "preempting":
                log.preempting = True
            case "artifact":
                log.artifacts.append(_artifact(record.artifact))
            case "exit":
                log.exit_code = record.exit.exit_code
    return log


def read_segments(directory: Path) -> list[RunLog]:
    """Those of RUN/wandb, the oldest first."""
    segments = [path for path in directory.glob("wandb/*run-*/*.wandb") if not path.is_symlink()]
    return [read_log(path) for path in sorted(segments, key=lambda path: path.stat().st_ctime_ns)]


def _artifact(record: Any) -> dict[str, Any]:
    return {
        "name": record.name,
        "type": record.type,
        "aliases": sorted(record.aliases),
        "references": [entry.ref for entry in record.manifest.contents],
        "copies": [entry.local_path for entry in record.manifest.contents if entry.local_path],
    }


def _values(items: Any) -> dict[str, Any]:
    named = ((item.key or ".".join(item.nested_key), item.value_json) for item in items)
    return {key: json.loads(value) for key, value in named if not key.startswith("_")}


def _contents(log: bytes) -> Iterator[bytes]:
    """LevelDB's log format: blocks of 32 KiB, in them pieces of records with a checksum each."""
    assert struct.unpack_from("<4sHB", log) == (b":W&B", 0xBEE1, 0)
    at, content = 7, b""
    while at + 7 <= len(log):
        room = BLOCK_BYTES - at % BLOCK_BYTES
        checksum, length, kind = struct.unpack_from("<IHB", log, at)
        if room < 7 or kind == 0:
            at += room
            continue
        piece = log[at + 7 : at + 7 + length]
        if len(piece) < length:
            return
        assert zlib.crc32(piece, zlib.crc32(bytes([kind]))) == checksum
        at += 7 + length
        content = piece if kind in (1, 2) else content + piece
        if kind in (1, 4):
            yield content
