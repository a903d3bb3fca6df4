"""Images, texts, histograms and files that hooks log, in the directory of the run.

`logged/step-00000120/images/grid.png` is the image `hook/grid` of step 120.  No torch.
"""

from __future__ import annotations

import json
import re
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from service.basics.atomic_files import make_directory, remove, replace_file
from service.runs.tracking import Kind, LoggedFile

_PREFIX = "step-"
_FOLDERS: Mapping[Kind, str] = {
    "image": "images",
    "text": "texts",
    "histogram": "histograms",
    "file": "files",
}
_SUFFIXES: Mapping[Kind, str] = {
    "image": ".png",
    "text": ".txt",
    "histogram": ".json",
    "file": "",
}
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*(/[A-Za-z0-9_-][A-Za-z0-9_.-]*)*")
_COLORS = {1: 0, 3: 2, 4: 6}  # number of channels, and PNG's color type


def require_name(name: object) -> str:
    """The name, which becomes a part of a key and of a path.

    Raises:
        ValueError: it is not valid.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(
            f"a name that a hook logs must consist of letters, digits and _ . - /, but is {name!r}"
        )
    return name


class LoggedFiles:
    """The directory `logged` of a run; only rank 0 has one."""

    def __init__(self, directory: Path, *, resume_step: int | None = None) -> None:
        """`resume_step` is the step of the checkpoint from which this attempt starts: files that
        were logged after it are removed, and logged again.

        Raises:
            OSError: they cannot be removed.
        """
        self._directory = directory
        for path in self._steps():
            if _step_of(path) > (-1 if resume_step is None else resume_step):
                remove(path)

    def write(self, step: int, kind: Kind, name: str, content: bytes) -> LoggedFile:
        """Write a file; it is complete or absent.

        Raises:
            ValueError: the name is not valid.
            OSError: it cannot be written.
        """
        path = self._path(step, kind, require_name(name))
        replace_file(path, content)
        return LoggedFile(f"hook/{name}", kind, path)

    def _steps(self) -> list[Path]:
        return [path for path in self._directory.glob(f"{_PREFIX}*") if _step_of(path) >= 0]

    def _path(self, step: int, kind: Kind, name: str) -> Path:
        steps = self._directory / f"{_PREFIX}{step:08d}" / _FOLDERS[kind]
        path = steps / f"{name}{_SUFFIXES[kind]}"
        missing = [path.parent, *path.parent.parents]
        for place in reversed(missing[: missing.index(self._directory) + 1]):
            make_directory(place)
        return path


def files_of_step(directory: Path, step: int) -> list[LoggedFile]:
    """Everything in `logged` of this step, in the order of kinds and names."""
    found = []
    for kind, folder in _FOLDERS.items():
        place = directory / f"{_PREFIX}{step:08d}" / folder
        for path in sorted(place.rglob("*")):
            if path.is_file() and not path.is_symlink() and not path.name.startswith("."):
                name = path.relative_to(place).as_posix().removesuffix(_SUFFIXES[kind])
                found.append(LoggedFile(f"hook/{name}", kind, path))
    return found


def _step_of(path: Path) -> int:
    number = path.name.removeprefix(_PREFIX)
    return int(number) if number.isdecimal() else -1


def png(image: NDArray[np.generic]) -> bytes:
    """An image as a PNG file.

    Args:
        image: [H, W], [C, H, W] or [H, W, C] with 1, 3 or 4 channels (if ambiguous, the
            first); integers from 0 to 255, or floats from 0 to 1.
    Raises:
        ValueError: it has another form.
    Source: https://www.w3.org/TR/png-3
    """
    pixels = _as_pixels(image)  # [H, W, C]
    height, width, channels = pixels.shape
    lines = np.zeros((height, 1 + width * channels), np.uint8)  # each starts with its filter: none
    lines[:, 1:] = pixels.reshape(height, -1)
    header = struct.pack(">IIBBBBB", width, height, 8, _COLORS[channels], 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(lines.tobytes())), (b"IEND", b"")]
    parts = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def size_of_png(content: bytes) -> tuple[int, int]:
    """(width, height) of a PNG file in pixels."""
    width, height = struct.unpack_from(">II", content, 16)
    return width, height


def _as_pixels(image: NDArray[np.generic]) -> NDArray[np.uint8]:
    shape = list(image.shape)
    if image.ndim == 2:
        image = image[:, :, None]
    elif image.ndim == 3 and shape[0] in _COLORS:
        image = np.moveaxis(image, 0, 2)
    if image.ndim != 3 or image.shape[2] not in _COLORS or 0 in shape:
        raise ValueError(
            "an image must have the shape [H, W], [C, H, W] or [H, W, C] with 1, 3 or 4 channels, "
            f"but has {shape}"
        )
    if image.dtype == np.bool_:
        return image.astype(np.uint8) * np.uint8(255)
    real = np.issubdtype(image.dtype, np.floating)
    numbers = image.astype(np.float64)
    least, most = numbers.min(), numbers.max()
    if not (least >= 0 and most <= (1 if real else 255)):  # NaN too
        raise ValueError(
            "an image must have integers from 0 to 255, or floats from 0 to 1, but has "
            f"{image.dtype} from {least:g} to {most:g}"
        )
    return np.rint(numbers * 255 if real else numbers).astype(np.uint8)


def histogram(values: NDArray[np.generic], *, bins: int) -> bytes:
    """The histogram of the finite values, as JSON: counts [bins] and edges [bins + 1].

    Raises:
        ValueError: none is finite.
    """
    numbers = values.astype(np.float64).ravel()
    finite = numbers[np.isfinite(numbers)]
    if not finite.size:
        raise ValueError(f"a histogram needs finite values, but none of {numbers.size} is finite")
    counts, edges = np.histogram(finite, bins=bins)
    told = {"counts": counts.tolist(), "edges": edges.tolist()}
    return json.dumps(told | {"not_finite": numbers.size - finite.size}).encode()


def read_histogram(path: Path) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """(counts [bins], edges [bins + 1]) of a logged histogram."""
    told = json.loads(path.read_bytes())
    return np.array(told["counts"], np.int64), np.array(told["edges"], np.float64)
