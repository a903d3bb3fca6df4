"""Exports the weights of a checkpoint as one safetensors file. No torch."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from service.basics.atomic_files import remove_if_possible, sync_directory, write_file
from service.basics.errors import SpecError
from service.runs.checkpoint_files import (
    AVERAGE,
    MODEL,
    Checkpoint,
    Entry,
    header,
    read_header,
    read_state,
)

_PIECE_BYTES = 16 << 20


def export_weights(
    checkpoint: Checkpoint, file: Path, *, average: bool = False, trained: bool = False
) -> int:
    """Write the weights in safetensors, each under every name it has; returns their bytes.

    Args:
        average: their moving average instead of the latest.
        trained: only the parameters that the run trains, such as adapters.

    Raises:
        SpecError: there is a file of that name, or it cannot be written.
        NoCheckpoint: the checkpoint cannot be read.
    """
    if os.path.lexists(file):
        raise SpecError(f"-o: {file} exists. Choose another name, or remove it.")
    source = checkpoint.path / (AVERAGE if average else MODEL)
    if average and not source.exists():
        raise SpecError(
            f"--average: {checkpoint.path} has no moving average of the weights; it was trained "
            "without model.moving_average."
        )
    entries, begin = read_header(source)
    places: dict[str, tuple[Entry, int]] = {}
    for entry in entries:
        places[entry.name] = (entry, begin)
        begin += entry.size_bytes
    state = read_state(checkpoint.path)
    for alias, name in state["aliases"].items():
        entry, at = places[name]
        places[alias] = (Entry(alias, entry.dtype, entry.shape), at)
    if trained:
        optimized = {name for group in state["optimizer"]["groups"] for name in group["names"]}
        optimized |= {alias for alias, name in state["aliases"].items() if name in optimized}
        places = {name: place for name, place in places.items() if name in optimized}
    partial = file.with_name(f".{file.name}.partial-{secrets.token_hex(4)}")
    try:
        written = write_file(partial, _content(source, list(places.values()), checkpoint.step))
        os.rename(partial, file)
        sync_directory(file.parent)
    except OSError as error:
        remove_if_possible(partial)
        raise SpecError(f"-o: {file} cannot be written: {error.strerror or error}.") from error
    return written.size_bytes


def _content(source: Path, places: Sequence[tuple[Entry, int]], step: int) -> Iterator[bytes]:
    metadata = {"format": "pt", "evenstep.step": str(step)}  # transformers asks for the format
    yield header([entry for entry, _ in places], metadata)
    with source.open("rb") as file:
        for entry, at in places:
            file.seek(at)
            yield from _pieces(file, entry.size_bytes)


def _pieces(file: BinaryIO, left: int) -> Iterator[bytes]:
    while left:
        piece = file.read(min(left, _PIECE_BYTES))
        if not piece:
            raise OSError(errno.EIO, "the checkpoint ends before its weights do")
        left -= len(piece)
        yield piece
