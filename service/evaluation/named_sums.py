"""Sums by name, each with its weight, merged exactly over micro-batches and processes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from service.data.losses import Entry
from service.distributed.world import World

_HELD_AT_MOST = 1000  # micro-batches whose numbers wait on the device


class Ledger:
    """Sums by name, kept for each micro-batch: merged exactly, in any order."""

    def __init__(self) -> None:
        self._waiting: list[dict[str, Entry]] = []
        self._rows: dict[str, list[list[float]]] = {}

    def add(self, entries: Mapping[str, Entry]) -> None:
        """Add one micro-batch."""
        self._waiting.append(dict(entries))
        if len(self._waiting) == _HELD_AT_MOST:
            self._settle()

    def _settle(self) -> None:
        """Copy the waiting values from the device, in one transfer."""
        waiting, self._waiting = self._waiting, []
        entries = [(name, *entry) for held in waiting for name, entry in held.items()]
        tensors = [value for _, *entry in entries for value in entry if isinstance(value, Tensor)]
        numbers = iter(_numbers(tensors))
        for name, *entry in entries:
            row = [next(numbers) if isinstance(value, Tensor) else value for value in entry]
            self._rows.setdefault(name, []).append(row)

    def totals(self, world: World) -> dict[str, Total]:
        """By name, over all processes; every process calls it."""
        self._settle()
        mine = {name: torch.tensor(rows, dtype=torch.float64) for name, rows in self._rows.items()}
        merged: dict[str, list[list[float]]] = {}
        for theirs in world.gather(mine):
            for name, rows in theirs.items():
                merged.setdefault(name, []).extend(rows.tolist())
        return {name: _total(merged[name]) for name in sorted(merged)}


def _numbers(tensors: Sequence[Tensor]) -> list[float]:
    """The tensors as numbers; those of one device and dtype are copied together."""
    found = [0.0] * len(tensors)
    alike: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for place, tensor in enumerate(tensors):
        alike.setdefault((tensor.device, tensor.dtype), []).append(place)
    for places in alike.values():
        together = torch.stack([tensors[place].detach() for place in places]).tolist()
        for place, number in zip(places, together, strict=True):
            found[place] = float(number)
    return found


@dataclass(frozen=True)
class Total:
    """A named sum over all micro-batches, its weight, and its contribution to the loss."""

    sum: float
    weight: float
    scaled: float


def _total(rows: Sequence[Sequence[float]]) -> Total:
    scaled = [row[0] * row[2] if row[2] else 0.0 for row in rows]
    return Total(added([row[0] for row in rows]), added([row[1] for row in rows]), added(scaled))


def added(values: Sequence[float]) -> float:
    """The sum, rounded once: the same in any order."""
    return math.fsum(values) if all(map(math.isfinite, values)) else sum(values)
