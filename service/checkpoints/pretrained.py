"""Exports a checkpoint as a directory that the `from_pretrained` of transformers reads."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Any

from torch import nn

from service.basics.atomic_files import in_the_way, remove_if_possible, sync_directory, sync_file
from service.basics.errors import SpecError
from service.checkpoints.snapshots import load_weights
from service.data.task import files_may_have_moved, load_task, new_model
from service.runs.checkpoint_files import Checkpoint
from service.spec.models import Spec


def export_pretrained(
    checkpoint: Checkpoint, directory: Path, *, spec: Spec, average: bool = False
) -> str:
    """Write configuration and weights, all of it or nothing; the name of the model's class.

    transformers writes them itself: it knows how the weights of each of its models are called.

    Args:
        average: the moving average of the weights instead of the latest.
    Raises:
        SpecError: the job's model is none of transformers, or the directory cannot be written.
        NoCheckpoint: the checkpoint cannot be read.
    """
    if os.path.lexists(directory):
        raise SpecError(f"-o: {directory} exists. Choose another name, or remove it.")
    with files_may_have_moved():
        model = new_model(load_task(spec.task, spec.task_args, seed=spec.seed))
    pretrained = _of_transformers(model, spec)
    load_weights(checkpoint.path, model, rename=spec.checkpoint.rename, average=average)
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
