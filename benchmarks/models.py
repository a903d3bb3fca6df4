"""Small jobs in plain PyTorch, by name: `benchmarks.whole_run` trains them in both ways."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from benchmarks.real_data import Lines, Photos, of_lines, of_photos

VOCABULARY, CONTEXT = 4096, 128


@dataclass(frozen=True)
class Job:
    """A model, its rows, the rows per step and process, and the number of steps."""

    model: Callable[[], nn.Module]
    rows: Callable[[int, int], Dataset[Any]]
    """Creates a number of rows from a seed."""
    batch: int
    """Rows per step and process."""
    steps: int
    """About ten seconds of training on two cores."""
    train_rows: int
    test_rows: int


def mlp() -> nn.Module:
    """Three linear layers: [B, 64] to [B, 10]."""
    return nn.Sequential(
        nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
    )


def cnn() -> nn.Module:
    """Two convolutions with BatchNorm and a head: [B, 1, 28, 28] to [B, 10]."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 5, stride=2, padding=2, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(7),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(32 * 49, 10),
    )


class Residual(nn.Module):
    """Two 3x3 convolutions with a residual connection: [B, C, H, W] to [B, D, H/stride, W/stride].

    Source: He et al., "Deep Residual Learning for Image Recognition", arXiv:1512.03385, figure 2.
    """

    def __init__(self, channels: int, wider: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, wider, 3, stride, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(wider)
        self.second = nn.Conv2d(wider, wider, 3, padding=1, bias=False)
        self.norm_of_second = nn.BatchNorm2d(wider)
        self.shortcut = nn.Sequential()
        if stride > 1 or channels != wider:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels, wider, 1, stride, bias=False), nn.BatchNorm2d(wider)
            )

    def forward(self, images: Tensor) -> Tensor:
        inner = F.relu(self.norm(self.first(images)))
        return F.relu(self.norm_of_second(self.second(inner)) + self.shortcut(images))


def resnet18(width: int = 64) -> nn.Module:
    """ResNet-18 for images of 32x32: [B, 3, 32, 32] to [B, 10]; 11 million parameters."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
    ]
    channels = width
    for stage in range(4):
        wider = width * 2**stage
        layers += [Residual(channels, wider, 1 if stage == 0 else 2), Residual(wider, wider, 1)]
        channels = wider
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


class LanguageModel(nn.Module):
    """A transformer of ten million parameters: tokens [B, T] to scores [B, T, VOCABULARY]."""

    def __init__(self, width: int = 320, layers: int = 7, heads: int = 5) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.places = nn.Embedding(CONTEXT, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, heads, 4 * width, dropout=0.1, batch_first=True, norm_first=True
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, read: Tensor) -> Tensor:
        length = read.shape[1]
        unseen = nn.Transformer.generate_square_subsequent_mask(length)
        hidden = self.tokens(read) + self.places.weight[:length]  # [B, T, width]
        for layer in self.layers:
            hidden = layer(hidden, src_mask=unseen, is_causal=True)
        scores: Tensor = self.head(self.norm(hidden))
        return scores


def numbers(count: int, seed: int) -> TensorDataset:
    """Numbers [N, 64] and the class of each row [N]."""
    inputs = torch.randn(count, 64, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(inputs, inputs[:, :10].argmax(1))


def images(channels: int, side: int) -> Callable[[int, int], TensorDataset]:
    """Creates images [N, channels, side, side] and the class of each [N]."""

    def rows(count: int, seed: int) -> TensorDataset:
        generator = torch.Generator().manual_seed(seed)
        pixels = torch.randn(count, channels, side, side, generator=generator)
        return TensorDataset(pixels, pixels.flatten(1)[:, :10].argmax(1))

    return rows


def texts(count: int, seed: int) -> TensorDataset:
    """Tokens [N, CONTEXT] and the one that follows each [N, CONTEXT]."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCABULARY, (count, CONTEXT + 1), generator=generator)
    return TensorDataset(tokens[:, :-1], tokens[:, 1:])


JOBS = {
    "mlp": Job(mlp, numbers, 32, steps=10_000, train_rows=32_768, test_rows=4096),
    "cnn": Job(cnn, images(1, 28), 32, steps=1400, train_rows=16_384, test_rows=2048),
    "resnet18": Job(resnet18, images(3, 32), 32, steps=32, train_rows=1024, test_rows=128),
    "resnet18 of 16 channels": Job(
        lambda: resnet18(16), images(3, 32), 32, steps=100, train_rows=2048, test_rows=256
    ),
    "lm": Job(LanguageModel, texts, 8, steps=32, train_rows=1024, test_rows=16),
}
OF_FILES = {
    "photos": Job(of_photos, Photos, 32, steps=100, train_rows=1000, test_rows=32),
    "lines": Job(of_lines, Lines, 32, steps=1000, train_rows=16_384, test_rows=32),
}
"""Jobs whose rows take longer to read than to train on."""


def losses(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each target, in the targets' shape."""
    each = F.cross_entropy(outputs.flatten(0, -2), targets.flatten(), reduction="none")
    return each.view_as(targets)
