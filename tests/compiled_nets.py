"""Models of blocks, to be sharded, compiled or offloaded by units."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from service.data.task import Task, supervised


class Block(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inner = nn.Linear(width, 2 * width)
        self.outer = nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, rows: Tensor) -> Tensor:
        return rows + self.dropout(self.outer(torch.relu(self.inner(self.norm(rows)))))


class Net(nn.Module):
    """Blocks between an embedding and a head, which may share their weights."""

    def __init__(self, count: int, dropout: float, tied: bool = True, width: int = 10) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, width)
        self.blocks = nn.ModuleList(Block(width, dropout) for _ in range(count))
        self.head = nn.Linear(width, 7)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        rows = self.embedding(tokens).sum(1)
        for block in self.blocks:
            rows = block(rows)
        return self.head(rows)


def blocks(count: int = 3, dropout: float = 0.0, tied: bool = True, width: int = 10) -> Task:
    """Guess the next of seven tokens.

    With ten blocks there are more than torch compiles one function for (8), if it does so for each
    of them anew.
    """
    tokens = torch.randint(0, 7, (103, 4), generator=torch.Generator().manual_seed(2))
    following = (tokens[:, 0] + tokens[:, 3]) % 7
    return supervised(
        model=lambda: Net(count, dropout, tied, width).double(),
        train=TensorDataset(tokens[21:], following[21:]),
        test=TensorDataset(tokens[:21], following[:21]),
        loss="cross_entropy",
        measures=("accuracy",),
    )
