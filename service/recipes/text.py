"""A small character language model on the book of Genesis, which is included.

A row is a verse, and verses have unequal lengths: each character counts once, so the weight of a
row is its number of characters.  Copy this file and text.yaml to start your own job.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from service.task import Task, supervised

END = "\n"  # the end of every verse
NOTHING = -100  # the target past the end of a verse


def task(width: int = 128, longest: int = 120, dropout: float = 0.1) -> Task:
    """Predict the next character; every tenth verse is for testing.

    Args:
        longest: the number of characters of a verse that are read, at most.
    """
    verses = genesis().splitlines()
    alphabet = sorted({END, *"".join(verses)})
    held_out = verses[::10]
    rest = [verse for number, verse in enumerate(verses) if number % 10]
    return supervised(
        model=lambda: Reader(len(alphabet), width, dropout),
        train=rows(rest, alphabet, longest),
        test=rows(held_out, alphabet, longest),
        loss=nats,
        measures={"bits": lambda guesses, following: nats(guesses, following) / math.log(2)},
        weight=characters,
    )


def genesis() -> str:
    """The book of Genesis, one verse a line."""
    return Path(__file__).with_name("genesis.txt").read_text(encoding="utf-8")


def rows(verses: list[str], alphabet: list[str], longest: int) -> TensorDataset:
    """The characters of each verse [N, T], and the next ones [N, T]."""
    number = {character: at for at, character in enumerate(alphabet)}
    read = torch.full((len(verses), longest), number[END])
    following = torch.full((len(verses), longest), NOTHING)
    for row, verse in enumerate(verses):
        codes = torch.tensor([number[character] for character in END + verse + END])[: longest + 1]
        read[row, : len(codes) - 1] = codes[:-1]
        following[row, : len(codes) - 1] = codes[1:]
    return TensorDataset(read, following)


class Reader(nn.Module):
    """Scores of the next character, after each one: [B, T] to [B, characters, T]."""

    def __init__(self, characters: int, width: int, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, 32)
        self.memory = nn.GRU(32, width, batch_first=True)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, characters)

    def forward(self, read: Tensor) -> Tensor:
        remembered, _ = self.memory(self.embedding(read))  # [B, T, width]
        guesses: Tensor = self.head(self.dropout(remembered))
        return guesses.transpose(1, 2)


def nats(guesses: Tensor, following: Tensor) -> Tensor:
    """Negative log-likelihood in nats of each character, 0 after the end: [B, T]."""
    return F.cross_entropy(guesses, following, ignore_index=NOTHING, reduction="none")


def characters(following: Tensor) -> Tensor:
    """The weight of each position: 1 for a character, 0 after the end of the verse: [B, T]."""
    return following.ne(NOTHING).float()
