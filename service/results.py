"""The results of a run, for a notebook or a script: its history, and its trained model."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from service.runs import history

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, repr=False)
class History(history.History):
    """One run: its metadata, its spec as plain values, its metrics, and its trained model."""

    def model(self, checkpoint: str | int = "latest", *, average: bool | None = None) -> nn.Module:
        """The trained model on the CPU, in evaluation mode.

        Args:
            checkpoint: `latest`, `best`, or a step.
            average: load the moving average of the weights. Default: if the spec has one.
        Raises:
            SpecError: there is no such checkpoint, or it belongs to another model.
            NoCheckpoint: it is damaged.
        """
        trained = import_module("service.checkpoints.trained")  # imports torch only when needed
        model: nn.Module = trained.trained_model(self.directory, str(checkpoint), average=average)
        return model


def read_history(run: str | Path) -> History:
    """The history of a run: a directory, or a name in `runs/`; no file is changed.

    Raises:
        SpecError: there is no such run.
    """
    found = history.read_history(run)
    return History(found.directory, found.facts, found.spec, found.failures)
