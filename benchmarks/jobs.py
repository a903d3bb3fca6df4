"""The jobs of `benchmarks.models` as tasks."""

from __future__ import annotations

import torch

from benchmarks.models import JOBS, OF_FILES, losses
from service.task import Task, supervised


def task(name: str) -> Task:
    """The job of this name."""
    job = (JOBS | OF_FILES)[name]
    return supervised(
        model=job.model,
        train=job.rows(job.train_rows, 1),
        test=job.rows(job.test_rows, 2),
        loss=losses,
        weight=torch.ones_like if name == "lm" else None,  # each token of a text counts
    )
