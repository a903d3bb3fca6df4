"""Functions stay short, and constructors only assign."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from code_figures import Function, is_command, lines_of, modules_of, parameters_of

ROOT = Path(__file__).parents[1]
MODULES = modules_of(ROOT)
MOST_LINES = 60
MOST_PARAMETERS = 8
CONTAINERS = {"dict", "frozenset", "list", "set", "tuple"}


def functions_in(module: ast.AST) -> list[Function]:
    return [n for n in ast.walk(module) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]


def function(module: str, name: str) -> Function:
    [found] = [f for f in functions_in(MODULES[module]) if f.name == name]
    return found


def constructor(module: str, name: str) -> Function:
    [found] = [
        n for n in ast.walk(MODULES[module]) if isinstance(n, ast.ClassDef) and n.name == name
    ]
    [init] = [n for n in functions_in(found) if n.name == "__init__"]
    return init


def autograd_functions(module: ast.AST) -> set[int]:
    """The methods whose parameters torch decides: each is an input of the operation."""
    classes = [n for n in ast.walk(module) if isinstance(n, ast.ClassDef)]
    operations = [c for c in classes if "torch.autograd.Function" in map(ast.unparse, c.bases)]
    return {id(f) for operation in operations for f in functions_in(operation)}


def task_constructors(module: ast.AST) -> set[int]:
    """`supervised` and `custom`: a user gives the parts of a task by name, as to a command."""
    classes = [n for n in ast.walk(module) if isinstance(n, ast.ClassDef)]
    public = [c for c in classes if c.name in ("supervised", "custom")]
    return {id(f) for task in public for f in functions_in(task) if f.name == "__init__"}


def what_it_calls(node: ast.AST) -> list[str]:
    return [ast.unparse(n.func) for n in ast.walk(node) if isinstance(n, ast.Call)]


def acts(statement: ast.stmt) -> bool:
    """Whether a statement of a constructor does more than assign a value or a new object."""
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
        return False  # a docstring
    called = what_it_calls(statement)
    if called == ["super", "super().__init__"]:
        return False
    if called[:1] == ["super().__init__"] and called[1:] == ["super"]:
        return False
    names = [name.rpartition(".")[2] for name in called]
    makes = all(name[0].isupper() or name in CONTAINERS for name in names)
    reads = "environ" in ast.unparse(statement)
    return reads or not makes or not isinstance(statement, ast.Assign | ast.AnnAssign)


@pytest.mark.parametrize("module", MODULES)
def test_no_function_is_longer_than_a_screen(module):
    long = {f.name: lines_of(f) for f in functions_in(MODULES[module]) if lines_of(f) > MOST_LINES}
    assert not long


@pytest.mark.parametrize("module", MODULES)
def test_no_function_takes_more_than_eight_parameters(module):
    exempt = autograd_functions(MODULES[module])
    if module == "service.data.task":
        exempt |= task_constructors(MODULES[module])
    many = {
        f.name: parameters_of(f)
        for f in functions_in(MODULES[module])
        if parameters_of(f) > MOST_PARAMETERS and not is_command(f) and id(f) not in exempt
    }
    assert not many


@pytest.mark.parametrize(
    ("module", "name", "lines", "parameters"),
    [
        ("service.training.train_loop", "train", 45, 6),
        ("service.evaluation.test_loop", "test", 25, 6),
    ],
)
def test_a_loop_fits_on_a_screen(module, name, lines, parameters):
    loop = function(module, name)
    assert lines_of(loop) <= lines
    assert parameters_of(loop) <= parameters


def test_the_worker_runs_in_about_a_dozen_calls():
    run = function("service.training.worker", "run")
    calls = what_it_calls(ast.Module(run.body, []))
    assert len(calls) <= 14, calls


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("service.checkpoints.checkpoints", "Checkpoints"),
        ("service.observability.wandb_writer", "WandB"),
        ("launch.processes.agent", "Agent"),
    ],
)
def test_a_constructor_only_assigns(module, name):
    acting = [ast.unparse(line) for line in constructor(module, name).body if acts(line)]
    assert not acting
