"""A GPT-like decoder, trained from scratch on the characters of the book of Genesis.

Small by default.  `task_args={width: 928, layers: 12, heads: 16}` has 124 million parameters, as
many as the smallest GPT-2, which has a third of them in its table of 50,257 tokens.  The same spec
trains it with the whole model on every process, or, with `exchange.mode=sharded`, with some rows of
each parameter on each process.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from service.recipes.text import characters, genesis, nats
from service.task import Task, supervised


def task(
    width: int = 64, layers: int = 3, heads: int = 4, length: int = 64, dropout: float = 0.1
) -> Task:
    """Predict the next character; the last tenth of the book is for testing.

    Args:
        width: size of the vector of each position; a multiple of `heads`.
        length: characters in a row: the longest context of a prediction.
    """
    book = genesis()
    alphabet = sorted(set(book))
    number = {character: at for at, character in enumerate(alphabet)}
    codes = torch.tensor([number[character] for character in book])
    held_out = len(codes) // 10
    return supervised(
        model=lambda: Decoder(len(alphabet), width, layers, heads, length, dropout),
        train=rows(codes[:-held_out], length),
        test=rows(codes[-held_out:], length),
        loss=nats,
        measures={"bits": lambda guesses, following: nats(guesses, following) / math.log(2)},
        weight=characters,
    )


def rows(codes: Tensor, length: int) -> TensorDataset:
    """The text cut into rows [N, T], and the next characters [N, T]; the remainder is not used."""
    count = (len(codes) - 1) // length
    read = codes[: count * length].view(count, length)
    return TensorDataset(read, codes[1 : count * length + 1].view(count, length))


class Block(nn.Module):
    """Causal self-attention and a feed-forward layer, pre-norm: [B, T, width] to the same shape."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm_before = nn.LayerNorm(width)
        self.attention = nn.Linear(width, 3 * width)
        self.joined = nn.Linear(width, width)
        self.norm_after = nn.LayerNorm(width)
        self.wide = nn.Linear(width, 4 * width)
        self.narrow = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._dropped(self.joined(self._attended(self.norm_before(x))))
        return x + self._dropped(self.narrow(F.gelu(self.wide(self.norm_after(x)))))

    def _attended(self, x: Tensor) -> Tensor:
        places, width = x.shape[1:]
        split = self.attention(x).view(-1, places, 3, self.heads, width // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4)  # each [B, heads, T, width / heads]
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return seen.transpose(1, 2).reshape(-1, places, width)

    def _dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


class Decoder(nn.Module):
    """Scores of the next character after each one: [B, T] to [B, characters, T]."""

    def __init__(
        self, characters: int, width: int, layers: int, heads: int, length: int, dropout: float
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, width)
        self.place = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, characters, bias=False)
        self.head.weight = self.embedding.weight  # tied weights
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:  # smaller where residual layers add up, as in GPT-2
                adds_up = name.endswith(("joined.weight", "narrow.weight"))
                nn.init.normal_(parameter, std=0.02 / (math.sqrt(2 * layers) if adds_up else 1))

    def forward(self, read: Tensor) -> Tensor:
        x = self.embedding(read) + self.place(torch.arange(read.shape[1], device=read.device))
        for block in self.blocks:
            x = block(x)
        scores: Tensor = self.head(self.norm(x))
        return scores.transpose(1, 2).contiguous()  # torch warns of views from a sharded model
