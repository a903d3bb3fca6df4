"""Tallies of the test loop: weighted sums that merge exactly, whoever counted which part."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from service.errors import DataBroken
from service.world import World


class Tally:
    """Weighted sums of a loss and of measures, one line for each micro-batch of the test set.

    Every process fills the lines of its own micro-batches; the merged table is summed in the
    order of the data set.  So the result has the same bits at any number of processes.
    """

    def __init__(
        self, measures: Sequence[str], *, micro_batches: int, device: torch.device
    ) -> None:
        self._names = ("loss", *measures)
        # float64 [micro-batches, loss and measures, then weight and rows]
        columns = len(self._names) + 2
        # Apple's GPUs have no float64; their sums are merged on the CPU like everybody's.
        self._on = torch.device("cpu") if device.type == "mps" else device
        self._lines = torch.zeros(micro_batches, columns, dtype=torch.float64, device=self._on)

    def add(
        self, number: int, losses: Tensor, measured: Tensor, weight: Tensor | None, *, rows: int
    ) -> None:
        """Enter micro-batch `number`.

        Args:
            losses: [B] or [B, T].
            measured: [B, measures] or [B, T, measures].
            weight: of the shape of `losses`, or None where each counts 1.
        """
        values = torch.cat(  # [*, loss and measures]
            [
                losses.to(self._on, torch.float64)[..., None],
                measured.to(self._on, torch.float64),
            ],
            dim=-1,
        )
        if weight is not None:
            values = values * weight.to(self._on, torch.float64)[..., None]
        line = self._lines[number]
        line[:-2] = values.flatten(0, -2).sum(0)
        line[-2] = losses.numel() if weight is None else weight.to(self._on, torch.float64).sum()
        line[-1] = rows

    def means(self, world: World, *, rows: int) -> dict[str, float]:
        """Weighted mean of the loss and each measure over the whole test set.

        Raises:
            DataBroken: the rows counted are not `rows`, or nothing in them has weight.
        """
        totals = world.sum(self._lines).sum(0).tolist()
        *sums, weight, counted = totals
        if counted != rows:
            raise DataBroken(
                f"The test loop counted {counted:.0f} rows, but the test set has {rows}. "
                "A data set must give one row for each of its indices."
            )
        if weight == 0:
            raise DataBroken("No row of the test set has any weight; the mean does not exist.")
        return {
            f"test/{name}": value / weight for name, value in zip(self._names, sums, strict=True)
        }
