"""What a job is and how one process trains it.  Importing this imports nothing else.

For a notebook or a script, each name is brought when it is first asked for:

    from service import run

    history = run("my_job.yaml", optimizer={"lr": 0.02}, name="faster")
    pandas.DataFrame(history.rows).plot(x="step", y="train/loss")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from service.history import History, read_history
    from service.in_place import run
    from service.plan import Plan, make_plan
    from service.spec import Spec
    from service.spec_file import load_spec
    from service.task import Task, load_task, supervised
    from service.tracking import read_metrics

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
    "load_task",
    "Task",
]

_HOME = {
    "run": "in_place",
    "load_spec": "spec_file",
    "Spec": "spec",
    "read_history": "history",
    "History": "history",
    "read_metrics": "tracking",
    "make_plan": "plan",
    "Plan": "plan",
    "supervised": "task",
    "load_task": "task",
    "Task": "task",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'service' has no attribute {name!r}")
    return getattr(import_module(f"service.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
