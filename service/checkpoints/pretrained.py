"""Exports that need the task's model: a directory of a transformers model, merged adapters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import nn

from service.basics.atomic_files import sync_directory, sync_file, write_file
from service.basics.errors import SpecError, told_as_mistake
from service.checkpoints.snapshots import load_weights
from service.data.task import Task, files_may_have_moved, load_task, new_model
from service.runs.checkpoint_files import Checkpoint
from service.runs.export import require_new, written_new
from service.spec.models import Spec


def export_pretrained(
    checkpoint: Checkpoint,
    directory: Path,
    *,
    spec: Spec,
    average: bool = False,
    merged: bool = False,
) -> str:
    """Write configuration and weights, completely or not at all; return the model's class name.

    transformers writes them itself: it knows the names of the weights of each of its models.

    Args:
        average: the moving average of the weights instead of the latest.
        merged: export the result of the task's `merged`.
    Raises:
        SpecError: the job's model is not a transformers model, or the directory cannot be written.
        NoCheckpoint: the checkpoint cannot be read.
    """
    require_new(directory)
    with files_may_have_moved():
        task = load_task(spec.task, spec.task_args, seed=spec.seed)
        merge = _merging(task, spec) if merged else None
        model = new_model(task, seed=spec.seed)
    if merge is None:
        _of_transformers(model, spec)
    load_weights(checkpoint.path, model, rename=spec.checkpoint.rename, average=average)
    pretrained = _of_transformers(model if merge is None else merge(model), spec)
    with written_new(directory) as partial:
        partial.mkdir()
        pretrained.save_pretrained(partial)
        for file in partial.iterdir():
            sync_file(file)
        sync_directory(partial)
    return type(pretrained).__name__


def export_merged(checkpoint: Checkpoint, file: Path, *, spec: Spec, average: bool = False) -> int:
    """Write the weights of the result of the task's `merged`; return their bytes.

    Raises:
        SpecError: the task has no `merged`, or the file cannot be written.
        NoCheckpoint: the checkpoint cannot be read.
    """
    require_new(file)
    with files_may_have_moved():
        task = load_task(spec.task, spec.task_args, seed=spec.seed)
        merge = _merging(task, spec)
        model = new_model(task, seed=spec.seed)
    load_weights(checkpoint.path, model, rename=spec.checkpoint.rename, average=average)
    weights = {n: t.detach().clone().contiguous() for n, t in merge(model).state_dict().items()}
    metadata = {"format": "pt", "evenstep.step": str(checkpoint.step)}
    with written_new(file) as partial:
        written = write_file(partial, [save(weights, metadata)])
    return written.size_bytes


def _merging(task: Task, spec: Spec) -> Callable[[nn.Module], nn.Module]:
    """The task's `merged`, with checks of its errors and its result.

    Raises:
        SpecError: the task has none.
    """
    merged = getattr(task, "merged", None)
    if merged is None:
        raise SpecError(
            f"--merged: {spec.task} has no function for it. Give the task merged=..., a function "
            "that gets the trained model and returns the model to export."
        )

    def merge(model: nn.Module) -> nn.Module:
        with told_as_mistake("task.merged raised"), torch.no_grad():
            made: object = merged(model)
        if not isinstance(made, nn.Module):
            raise SpecError(
                f"task.merged: must return an nn.Module, but returned a {type(made).__name__}."
            )
        return made

    return merge


def _of_transformers(model: nn.Module, spec: Spec) -> Any:
    """The model, or the only transformers model in it."""
    found = [module for module in model.modules() if hasattr(module, "save_pretrained")]
    inner = {id(part) for module in found for part in module.modules() if part is not module}
    outermost = [module for module in found if id(module) not in inner]
    if len(outermost) != 1:
        holds = f"contains {len(outermost)} of them" if outermost else "is not one"
        raise SpecError(
            f"-o: a directory is for a transformers model, and the model of {spec.task} {holds}. "
            "Use a file name that ends in .safetensors."
        )
    return outermost[0]
