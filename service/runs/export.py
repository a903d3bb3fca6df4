"""Exports the weights of a checkpoint as one safetensors file. No torch."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from service.basics.atomic_files import (
    in_the_way,
    remove_if_possible,
    sync_directory,
    write_file,
)
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
    """Write the weights in safetensors format, each under all of its names; return their bytes.

    Args:
        average: the moving average instead of the latest weights.
        trained: only the parameters that the run trains, such as adapters.

    Raises:
        SpecError: the file exists, or cannot be written.
        NoCheckpoint: the checkpoint cannot be read.
    """
    require_new(file)
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
    with written_new(file) as partial:
        written = write_file(partial, _content(source, list(places.values()), checkpoint.step))
    return written.size_bytes


def require_new(place: Path) -> None:
    """Check that an export overwrites nothing.

    Raises:
        SpecError: a file or a directory of that name exists.
    """
    if os.path.lexists(place):
        raise SpecError(f"-o: {place} exists. Choose another name, or remove it.")


@contextmanager
def written_new(place: Path) -> Iterator[Path]:
    """A context with a temporary path next to `place`; its file or directory then becomes `place`.

    If writing fails, nothing is left.

    Raises:
        SpecError: it cannot be written.
    """
    partial = place.with_name(f".{place.name}.partial-{secrets.token_hex(4)}")
    try:
        yield partial
        os.rename(partial, place)
        sync_directory(place.parent)
    except OSError as error:
        raise SpecError(f"-o: {place} cannot be written: {in_the_way(error)}.") from error
    finally:
        remove_if_possible(partial)


def _content(source: Path, places: Sequence[tuple[Entry, int]], step: int) -> Iterator[bytes]:
    metadata = {"format": "pt", "evenstep.step": str(step)}  # transformers requires the format
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
