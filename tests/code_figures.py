"""Prints the sizes of `service` and `launch` for docs/explanation/architecture.md.

`python tests/code_figures.py [ROOT]`: ROOT is a checkout, by default the one of this file.
"""

import ast
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from statistics import median, quantiles

Function = ast.FunctionDef | ast.AsyncFunctionDef


def modules_of(root: Path) -> dict[str, ast.Module]:
    """The modules by dotted name, without the packages' own `__init__`."""
    files = [path for part in ("service", "launch") for path in (root / part).rglob("*.py")]
    return {
        ".".join(path.relative_to(root).with_suffix("").parts): ast.parse(path.read_text())
        for path in files
        if path.stem not in ("__init__", "__main__")
    }


def lines_of(function: Function) -> int:
    assert function.end_lineno is not None
    return function.end_lineno - function.lineno + 1


def is_command(function: Function) -> bool:
    """Whether click calls it: then each parameter is an option or an argument of the command."""
    return any("command(" in ast.unparse(decorator) for decorator in function.decorator_list)


def parameters_of(function: Function) -> int:
    given = function.args
    every = [*given.posonlyargs, *given.args, *given.kwonlyargs]
    variable = [name for name in (given.vararg, given.kwarg) if name is not None]
    return len([a for a in every if a.arg not in ("self", "cls")]) + len(variable)


def imports_of(tree: ast.Module, names: set[str]) -> set[str]:
    """The modules among `names` that a module imports when it is imported itself."""
    found = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & names


def has_cycle(modules: dict[str, ast.Module]) -> bool:
    graph = {name: imports_of(tree, set(modules)) - {name} for name, tree in modules.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError:
        return True
    return False


def figures_of(root: Path) -> dict[str, str]:
    modules = modules_of(root)
    functions = [
        node
        for tree in modules.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    lines = sorted(map(lines_of, functions))
    plain = [function for function in functions if not is_command(function)]
    packages: dict[str, int] = {}
    for name in modules:
        package = name.rpartition(".")[0]
        packages[package] = packages.get(package, 0) + 1
    largest = max(packages, key=lambda package: packages[package])
    return {
        "modules": f"{len(modules)}",
        "packages": f"{len(packages)}",
        "most modules in one package": f"{packages[largest]} ({largest})",
        "functions": f"{len(functions)}",
        "lines of a function: median": f"{median(lines):g}",
        "lines of a function: 95th percentile": f"{quantiles(lines, n=20)[-1]:.0f}",
        "lines of a function: longest": f"{lines[-1]}",
        "most parameters, without commands": f"{max(map(parameters_of, plain))}",
        "import cycles": "some" if has_cycle(modules) else "0",
    }


if __name__ == "__main__":
    here = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1]
    for what, figure in figures_of(here).items():
        print(f"| {what} | {figure} |")
