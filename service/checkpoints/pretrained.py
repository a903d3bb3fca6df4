"""Exports what only the task's model can write: a directory of transformers, merged adapters."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import nn

from service.basics.atomic_files import (
    in_the_way,
    remove_if_possible,
    sync_directory,
    sync_file,
    write_file,
)
from service.basics.errors import SpecError, told_as_mistake
from service.checkpoints.snapshots import load_weights
from service.data.task import files_may_have_moved, load_task, new_model
from service.runs.checkpoint_files import Checkpoint
from service.spec.models import Spec


def export_pretrained(
    checkpoint: Checkpoint,
    directory: Path,
    *,
    spec: Spec,
    average: bool = False,
    merged: bool = False,
) -> str:
    """Write configuration and weights, all of it or nothing; the name of the model's class.

    transformers writes them itself: it knows how the weights of each of its models are called.

    Args:
        average: the moving average of the weights instead of the latest.
        merged: what the task's `merged` makes of the model.
    Raises:
        SpecError: the job's model is none of transformers, or the directory cannot be written.
        NoCheckpoint: the checkpoint cannot be read.
    """
    if os.path.lexists(directory):
        raise SpecError(f"-o: {directory} exists. Choose another name, or remove it.")
    model, merge = _model_and_merge(spec)
    if not merged:
        _of_transformers(model, spec)
    load_weights(checkpoint.path, model, rename=spec.checkpoint.rename, average=average)
    pretrained = _of_transformers(merge(model) if merged else model, spec)
    partial = directory.with_name(f".{directory.name}.partial-{secrets.token_hex(4)}")
    try:
        partial.mkdir()
        pretrained.save_pretrained(partial)
        for file in partial.iterdir():
            sync_file(file)
        sync_directory(partial)
        os.rename(partial, directory)
        sync_directory(directory.parent)
    except OSError as error:
        remove_if_possible(partial)
        raise SpecError(f"-o: {directory} cannot be written: {in_the_way(error)}.") from error
    return type(pretrained).__name__


def export_merged(checkpoint: Checkpoint, file: Path, *, spec: Spec, average: bool = False) -> int:
    """Write the weights of what the task's `merged` makes of the model; returns their bytes.

    Raises:
        SpecError: the task has no `merged`, or the file cannot be written.
        NoCheckpoint: the checkpoint cannot be read.
    """
    if os.path.lexists(file):
        raise SpecError(f"-o: {file} exists. Choose another name, or remove it.")
    model, merge = _model_and_merge(spec)
    load_weights(checkpoint.path, model, rename=spec.checkpoint.rename, average=average)
    weights = {n: t.detach().clone().contiguous() for n, t in merge(model).state_dict().items()}
    metadata = {"format": "pt", "evenstep.step": str(checkpoint.step)}
    partial = file.with_name(f".{file.name}.partial-{secrets.token_hex(4)}")
    try:
        written = write_file(partial, [save(weights, metadata)])
        os.rename(partial, file)
        sync_directory(file.parent)
    except OSError as error:
        remove_if_possible(partial)
        raise SpecError(f"-o: {file} cannot be written: {in_the_way(error)}.") from error
    return written.size_bytes


def _model_and_merge(spec: Spec) -> tuple[nn.Module, Callable[[nn.Module], nn.Module]]:
    """A new model of the job's task, and its `merged`."""
    with files_may_have_moved():
        task = load_task(spec.task, spec.task_args, seed=spec.seed)
        model = new_model(task)

    def merge(model: nn.Module) -> nn.Module:
        merged = getattr(task, "merged", None)
        if merged is None:
            raise SpecError(
                f"--merged: {spec.task} does not say how. Give the task merged=..., a function of "
                "the trained model that gives the one to export."
            )
        with told_as_mistake("task.merged raised"), torch.no_grad():
            made: object = merged(model)
        if not isinstance(made, nn.Module):
            raise SpecError(
                f"task.merged: must give an nn.Module, but gave a {type(made).__name__}."
            )
        return made

    return model, merge


def _of_transformers(model: nn.Module, spec: Spec) -> Any:
    """The model, or the only one of transformers that it holds."""
    found = [module for module in model.modules() if hasattr(module, "save_pretrained")]
    inner = {id(part) for module in found for part in module.modules() if part is not module}
    outermost = [module for module in found if id(module) not in inner]
    if len(outermost) != 1:
        holds = f"holds {len(outermost)} of them" if outermost else "is none"
        raise SpecError(
            f"-o: a directory is for a model of transformers, and that of {spec.task} {holds}. "
            "Name a file that ends in .safetensors."
        )
    return outermost[0]
