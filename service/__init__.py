"""What a job is, and how one process trains it.  Importing this package imports nothing else.

For a notebook or a script; each name is imported on first use:

    from service import run

    history = run("my_job.yaml", optimizer={"lr": 0.02}, name="faster")
    pandas.DataFrame(history.rows).plot(x="step", y="train/loss")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from service.data.task import Task, custom, load_task, supervised
    from service.in_place import run
    from service.plan.plan import Plan, make_plan
    from service.results import History, read_history
    from service.runs.tracking import read_metrics
    from service.spec.files import load_spec
    from service.spec.models import Spec

__all__ = [
    "run",
    "load_spec",
    "Spec",
    "read_history",
    "History",
    "read_metrics",
    "make_plan",
    "Plan",
    "supervised",
    "custom",
    "load_task",
    "Task",
]

_HOME = {
    "run": "in_place",
    "load_spec": "spec.files",
    "Spec": "spec.models",
    "read_history": "results",
    "History": "results",
    "read_metrics": "runs.tracking",
    "make_plan": "plan.plan",
    "Plan": "plan.plan",
    "supervised": "data.task",
    "custom": "data.task",
    "load_task": "data.task",
    "Task": "data.task",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'service' has no attribute {name!r}")
    return getattr(import_module(f"service.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
