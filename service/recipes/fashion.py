"""Fashion-MNIST: ten kinds of clothing in 28x28 pixels, or any folder of IDX files like it.

Copy this file and fashion.yaml to start your own job.
"""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset

from service.basics.errors import SpecError
from service.task import Task, supervised

DEBIAN = "/usr/share/datasets/fashion-mnist"


def task(folder: str = DEBIAN, width: int = 16, dropout: float = 0.2) -> Task:
    """Kinds of 28x28 images; Fashion-MNIST has 60,000 to train on and 10,000 to test on.

    Args:
        folder: contains train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte
            and t10k-labels-idx1-ubyte, each plain or with .gz.
    """
    train, test = images_in(Path(folder), "train"), images_in(Path(folder), "t10k")
    kinds, (height, across) = int(train.tensors[1].max()) + 1, train.tensors[0].shape[2:]
    return supervised(
        model=lambda: network(kinds, width, dropout, height, across),
        train=train,
        test=test,
        loss="cross_entropy",
        measures=("accuracy",),
    )


def network(kinds: int, width: int, dropout: float, height: int, across: int) -> nn.Module:
    """Two convolutions with BatchNorm, and a head with Dropout: [B, 1, H, W] to [B, kinds]."""
    half = math.ceil(height / 2), math.ceil(across / 2)
    return nn.Sequential(
        nn.Conv2d(1, width, 5, stride=2, padding=2, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, padding=1, bias=False),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(),
        pooling(*half),
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(2 * width * 49, kinds),
    )


def pooling(height: int, across: int) -> nn.Module:
    """The largest values of each part: [B, C, H, W] to [B, C, 7, 7].

    `AdaptiveMaxPool2d` has no deterministic backward pass on a GPU, as `exactness: bitwise` needs.
    """
    if height % 7 or across % 7:
        return nn.AdaptiveMaxPool2d(7)
    return nn.MaxPool2d((height // 7, across // 7))


def images_in(folder: Path, part: str) -> TensorDataset:
    """Images float32 [N, 1, H, W], about -1 to 1, and labels int64 [N].

    Raises:
        SpecError: they do not exist, or have other shapes.
    """
    images = read_idx(_find(folder, f"{part}-images-idx3-ubyte"))
    labels = read_idx(_find(folder, f"{part}-labels-idx1-ubyte"))
    if images.ndim != 3 or labels.shape != images.shape[:1] or not len(images):
        raise SpecError(
            f"task: the {part} files in {folder} must hold images [N, H, W] and labels [N], but "
            f"hold {list(images.shape)} and {list(labels.shape)}."
        )
    pixels = torch.from_numpy(images).float().unsqueeze(1) / 127.5 - 1
    return TensorDataset(pixels, torch.from_numpy(labels).long())


def _find(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise SpecError(
        f"task: there is no {name} or {name}.gz in {folder}. On Debian or Ubuntu: "
        "apt install dataset-fashion-mnist. Or name a folder of IDX files: task_args.folder=PATH"
    )


def read_idx(path: Path) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """The array of bytes in an IDX file, plain or with .gz.

    Source of the format: LeCun, Cortes & Burges, "The MNIST database of handwritten digits":
    two zeros, 8 for bytes, the number of dimensions; each dimension in 4 bytes, the largest
    byte first; the values.
    Raises:
        SpecError: it is not such a file.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise SpecError(f"task: {path} cannot be read: {error}.") from error
    if content[:3] != b"\0\0\x08" or len(content) < 4 + 4 * content[3]:
        raise SpecError(f"task: {path} is not an IDX file of bytes.")
    dimensions = content[3]
    shape = np.frombuffer(content, ">u4", count=dimensions, offset=4).tolist()
    begin = 4 + 4 * dimensions
    if len(content) - begin != math.prod(shape):
        raise SpecError(
            f"task: {path} should hold {math.prod(shape)} bytes of shape {shape}, "
            f"but holds {len(content) - begin}."
        )
    return np.frombuffer(content, np.uint8, offset=begin).reshape(shape).copy()
