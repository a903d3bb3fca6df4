"""What a task file imports: the public names of `service.data.task`."""

from service.data.task import Task, load_task, supervised

__all__ = ["Task", "load_task", "supervised"]
