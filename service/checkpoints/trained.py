"""The model of a run with the weights of one of its checkpoints, on the CPU."""

from __future__ import annotations

from torch import nn

from service.checkpoints.snapshots import load_weights
from service.data.task import files_may_have_moved, load_task, new_model
from service.distributed.generators import generators_given_back
from service.runs.checkpoint_files import find_checkpoint
from service.runs.directory import RunDirectory


def trained_model(directory: RunDirectory, checkpoint: str, *, average: bool | None) -> nn.Module:
    """The task's model in evaluation mode; the caller's random generators stay as they are.

    Args:
        checkpoint: `latest`, `best`, or a step.
        average: the moving average of the weights; None: if the spec has one.
    Raises:
        SpecError: there is no such checkpoint, or it belongs to another model.
        NoCheckpoint: it is damaged.
    """
    spec = directory.read_spec()
    chosen = find_checkpoint(directory.checkpoints, checkpoint)
    with files_may_have_moved(), generators_given_back():
        task = load_task(spec.task, spec.task_args, seed=spec.seed)
        model = new_model(task, seed=spec.seed)
    wanted = spec.model.moving_average is not None if average is None else average
    load_weights(chosen.path, model, rename=spec.checkpoint.rename, average=wanted)
    return model.eval()
