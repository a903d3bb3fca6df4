"""What a task file imports: the public names of tasks, their losses and data."""

from service.data.losses import Loss, Losses, StepContext, StepResult, own_loss
from service.data.task import Task, custom, load_task, supervised
from service.evaluation.hooks import HookContext
from service.plan.sampling import Sampling, balanced, proportions, shuffled, stages, weighted
from service.remote.rows import rows_in

__all__ = [
    "Sampling",
    "balanced",
    "proportions",
    "shuffled",
    "stages",
    "weighted",
    "HookContext",
    "Loss",
    "Losses",
    "StepContext",
    "StepResult",
    "Task",
    "custom",
    "load_task",
    "own_loss",
    "rows_in",
    "supervised",
]
