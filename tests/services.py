"""Tests of what Evenstep does with other services: `make test-services` runs them.

These are object stores, trackers, the API of a Kubernetes cluster, and Slurm. They start servers,
clients and launchers, and take a quarter of the time of the whole suite. CI runs both parts.
"""

from __future__ import annotations

from collections.abc import Iterable

import pytest

SERVICES = (
    # object stores
    *("object_storage", "other_stores", "storage_safety", "elastic_stored", "stored_rows"),
    *("stored_sweep", "stored_watch", "slurm_stored"),
    # trackers
    *("wandb", "wandb_training", "sweep", "mlflow", "opentelemetry", "second_writers"),
    # engines
    *("kubernetes_client", "kubernetes_submission", "slurm_script", "slurm_step"),
)
"""The names of the files, without `test_`."""


def mark_services(items: Iterable[pytest.Item], is_whole: bool) -> None:
    """Give the tests of these files the mark `services`.

    Raises `pytest.UsageError` if all tests were collected and a file has none.
    """
    missing = {f"test_{name}" for name in SERVICES}
    for item in items:
        if item.path.stem.removeprefix("test_") in SERVICES:
            item.add_marker("services")
            missing.discard(item.path.stem)
    if is_whole and missing:
        raise pytest.UsageError(f"tests/services.py: no tests in {', '.join(sorted(missing))}")
