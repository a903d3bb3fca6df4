"""A transformers model and a datasets table, each named by an import string; no glue.

A row of the table is a mapping: `labels` is the target, and everything else is passed to the model
by name.  Copy this file and huggingface.yaml to start your own job.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from service.basics.errors import SpecError
from service.recipes import digits
from service.task import Task, supervised


def task(
    model: str = "transformers:ViTForImageClassification",
    config: Mapping[str, Any] | None = None,
    table: str = "service.recipes.huggingface:digits_table",
) -> Task:
    """Classify the rows of a table.

    Args:
        model: a class of transformers; the model is newly initialized, from its configuration.
        config: the values of its configuration.
        table: a function that returns a datasets.DatasetDict with the splits train and test, or a
            folder written by its save_to_disk.
    """
    kind = _named(model)
    splits = _table(table)
    return supervised(
        model=lambda: _new(kind, config or {}),
        train=splits["train"].with_format("torch"),
        test=splits["test"].with_format("torch"),
        loss="cross_entropy",
        measures=("accuracy",),
    )


def digits_table() -> Any:
    """The included digits as a datasets.DatasetDict: pixel_values [1, 8, 8] and labels."""
    datasets = _package("datasets")
    splits = zip(("train", "test"), digits.split_by_class(*digits.load()), strict=True)
    return datasets.DatasetDict(
        {
            name: datasets.Dataset.from_dict(
                {"pixel_values": data.tensors[0].numpy(), "labels": data.tensors[1].numpy()}
            )
            for name, data in splits
        }
    )


def _new(kind: Any, config: Mapping[str, Any]) -> nn.Module:
    model: nn.Module = kind(kind.config_class(**config))
    return model


def _table(table: str) -> Any:
    stored = Path(table).is_dir()
    splits = _package("datasets").load_from_disk(table) if stored else _named(table)()
    missing = {"train", "test"} - set(splits)
    if missing:
        raise SpecError(f"task_args.table: {table} has no split {' or '.join(sorted(missing))}.")
    return splits


def _named(where: str) -> Any:
    """The object that `package.module:name` names."""
    module, _, name = where.partition(":")
    found = getattr(_package(module), name, None)
    if found is None:
        raise SpecError(f"task_args: {module} has no {name!r}; write package.module:name.")
    return found


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise SpecError(
            f"task: there is no package {error.name}. This recipe needs transformers and datasets: "
            "pip install 'evenstep[huggingface]'"
        ) from error
