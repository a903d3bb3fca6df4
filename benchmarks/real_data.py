"""Rows that cost something to read: photos decoded from JPEG files, and text tokenised on the fly.

The files are made once, from seeds, in the system's directory for temporary files.  Needs Pillow
and tokenizers.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

SIDE, CROP, LENGTH = 320, 224, 256
WORDS_OF_A_LINE = 160


class Photos(Dataset[tuple[Tensor, int]]):
    """A JPEG file of 320 x 320 for each row: decoded, cropped at random to [3, 224, 224], flipped.

    The random numbers are torch's, as those of torchvision's transforms are.
    """

    def __init__(self, count: int, seed: int) -> None:
        self.folder = made(f"photos-{count}-{seed}", lambda folder: photos(folder, count, seed))
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        from PIL import Image

        with Image.open(self.folder / f"{row}.jpg") as image:
            pixels = torch.from_numpy(np.array(image.convert("RGB")))
        top, left = torch.randint(SIDE - CROP + 1, (2,)).tolist()
        pixels = pixels[top : top + CROP, left : left + CROP].permute(2, 0, 1)
        if torch.rand(()) < 0.5:
            pixels = pixels.flip(2)
        return pixels.float().div_(255), row % 10


class Lines(Dataset[tuple[Tensor, int]]):
    """A line of a text file for each row, as [256] tokens of a byte-pair encoding."""

    def __init__(self, count: int, seed: int) -> None:
        self.folder = made(f"lines-{count}-{seed}", lambda folder: lines(folder, count, seed))
        self.lines = (self.folder / "lines.txt").read_text(encoding="utf-8").splitlines()
        self.tokenizer: Any = None

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        if self.tokenizer is None:
            from tokenizers import Tokenizer

            self.tokenizer = Tokenizer.from_file(str(self.folder / "tokenizer.json"))
            self.tokenizer.enable_truncation(LENGTH)
            self.tokenizer.enable_padding(length=LENGTH)
        return torch.tensor(self.tokenizer.encode(self.lines[row]).ids), row % 10


def made(name: str, make: Any) -> Path:
    """The folder of this name; `make` fills it where it is not there yet."""
    folder = Path(tempfile.gettempdir(), f"evenstep-benchmark-{os.getuid()}", name)
    if not folder.exists():
        folder.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as place:
            filled = Path(place, name)
            filled.mkdir()
            make(filled)
            filled.rename(folder)
    return folder


def photos(folder: Path, count: int, seed: int) -> None:
    """Smooth colours with some noise: about 25 KB a file, as photos of this size have."""
    from PIL import Image

    generator = np.random.default_rng(seed)
    for row in range(count):
        coarse = generator.integers(0, 256, (12, 12, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
        noisy = smooth + generator.normal(0, 6, smooth.shape)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{row}.jpg", quality=85)


def lines(folder: Path, count: int, seed: int) -> None:
    """Words in random order from the text that ships with the recipes, and a tokenizer of it."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    text = Path(__file__).parents[1] / "service/recipes/genesis.txt"
    words = np.array(text.read_text(encoding="utf-8").split())
    drawn = np.random.default_rng(seed).choice(words, (count, WORDS_OF_A_LINE))
    (folder / "lines.txt").write_text("\n".join(" ".join(line) for line in drawn), encoding="utf-8")
    tokenizer = Tokenizer(models.BPE(unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(vocab_size=4096, special_tokens=["?"], show_progress=False)
    tokenizer.train([str(text)], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))


def of_photos() -> nn.Module:
    """A model that costs little, so that the data decides: [B, 3, 224, 224] to [B, 10]."""
    return nn.Sequential(nn.AvgPool2d(16), nn.Flatten(), nn.Linear(3 * 14 * 14, 10))


def of_lines() -> nn.Module:
    """The same for tokens [B, 256]."""
    return nn.Sequential(nn.EmbeddingBag(4096, 64), nn.Linear(64, 10))
