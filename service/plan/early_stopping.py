"""Early stopping: which of two measures is better, and whether one has stopped improving.

Used by everything that compares measures: the best checkpoint, early stopping, `plateau`, report.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from service.spec.models import EarlyStoppingSpec
from service.spec.schedule import PlateauSpec


def is_better(value: float, best: float | None, *, mode: str, by: float = 0.0) -> bool:
    """Whether `value` is better than `best`, by more than `by`; None is worse than any number.

    A value that is not finite is never better, and any finite value is better than it.

    Args:
        mode: `max` or `min`.
    """
    if not math.isfinite(value):
        return False
    if best is None or not math.isfinite(best):
        return True
    sign = 1 if mode == "max" else -1
    return sign * value > sign * best + by


@dataclass
class EarlyStopping:
    """Counts tests in a row without improvement.

    Its input is equal on every process, so all processes stop together.
    """

    spec: EarlyStoppingSpec | PlateauSpec
    best: float | None = None
    waited: int = 0
    """Tests since the last improvement."""

    def tested(self, values: Mapping[str, float]) -> bool:
        """Process the `values` of a step; return whether they contain the measure."""
        if self.spec.measure not in values:
            return False
        value = values[self.spec.measure]
        better = is_better(value, self.best, mode=self.spec.mode, by=self.spec.min_delta)
        self.best = value if better else self.best
        self.waited = 0 if better else self.waited + 1
        return True

    @property
    def ran_out(self) -> bool:
        """Whether the patience is used up."""
        return self.waited >= self.spec.patience

    def memory(self) -> dict[str, Any]:
        """Its state for a checkpoint."""
        return {"best": self.best, "waited": self.waited}

    def remember(self, memory: Mapping[str, Any]) -> None:
        """Restore the state from a checkpoint."""
        self.best, self.waited = memory["best"], memory["waited"]
