"""Whether a test measure has stopped improving: what early stopping and `plateau` wait for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from service.spec import EarlyStoppingSpec, PlateauSpec


@dataclass
class Patience:
    """Counts tests in a row without improvement.

    It sees only what is equal on every process, so all of them run out together.
    """

    spec: EarlyStoppingSpec | PlateauSpec
    best: float | None = None
    waited: int = 0
    """Tests since the measure was better than ever before."""

    def tested(self, values: Mapping[str, float]) -> bool:
        """Take in the `values` of a step; whether they held the measure."""
        if self.spec.measure not in values:
            return False
        value, sign = values[self.spec.measure], 1 if self.spec.mode == "max" else -1
        # Asked this way round, a measure that is not a number is never an improvement.
        if self.best is None:
            better = value == value
        else:
            better = sign * value > sign * self.best + self.spec.min_delta
        self.best = value if better else self.best
        self.waited = 0 if better else self.waited + 1
        return True

    @property
    def ran_out(self) -> bool:
        return self.waited >= self.spec.patience

    def memory(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {"best": self.best, "waited": self.waited}

    def remember(self, memory: Mapping[str, Any]) -> None:
        """Go on from what a checkpoint kept."""
        self.best, self.waited = memory["best"], memory["waited"]
