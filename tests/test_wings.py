"""service/ and launch/ are built in wings: imports go down only, so that no cycle can exist."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WINGS = (  # from top to bottom; a wing imports only from wings below it
    "preview",
    "training",
    "evaluation",
    "checkpoints",
    "optimization",
    "data",
    "sharding",
    "distributed",
    "monitoring",
    "observability",
    "health",
    "remote",
    "storage",
    "drivers",
    "runs",
    "plan",
    "spec",
    "basics",
)
DOOR = ("__init__", "in_place", "in_processes", "results", "task", "recipes")
"""What a user imports: it stands above every wing."""
WITH_TORCH = WINGS[: WINGS.index("monitoring")]
LAUNCH = ("__main__", "cli", "commands", "engines", "nodes", "stored", "processes", "rank")
LAUNCH += ("slurm_step", "environment")
SPEAKS = (
    "service/distributed/world.py",
    "service/sharding/cpu_exchange.py",
    "service/sharding/sharding.py",
    "service/distributed/recursive_doubling.py",
)
"""The only rooms that know torch.distributed and accelerate."""
MOST_ROOMS = 11


def rooms_of(wing: Path) -> list[Path]:
    """The modules of a wing, without its `__init__`."""
    return sorted(path for path in wing.glob("*.py") if path.stem != "__init__")


ROOMS = [path for wing in WINGS for path in rooms_of(ROOT / "service" / wing)]
PACKAGES = sorted(
    path.parent for part in ("service", "launch") for path in (ROOT / part).rglob("__init__.py")
)
ENGINES = [path for path in PACKAGES if path.is_relative_to(ROOT / "launch/engines/kubernetes")]
ENGINES += [ROOT / "launch/engines/slurm"]
LAUNCHER = sorted((ROOT / "launch").rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").as_posix()


def imported_by(path: Path) -> set[str]:
    """The dotted names that a module imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def wing_of(name: str) -> str | None:
    """`plan` of `service.plan.samplers`; None of what is none of service's."""
    parts = name.split(".")
    return parts[1] if parts[0] == "service" and len(parts) > 1 else None


def floor_plan(package: Path) -> list[str]:
    """The rooms that the docstring of a package names, from top to bottom."""
    text = (package / "__init__.py").read_text(encoding="utf-8")
    return re.findall(r"^\* (\w+)", ast.get_docstring(ast.parse(text)) or "", re.MULTILINE)


def test_service_is_its_wings_and_its_door():
    packages = {p.name for p in (ROOT / "service").iterdir() if (p / "__init__.py").exists()}
    modules = {p.stem for p in (ROOT / "service").glob("*.py")}
    assert packages | modules == {*WINGS, *DOOR}


@pytest.mark.parametrize("path", ROOMS, ids=name_of)
def test_a_room_imports_only_from_wings_below_and_rooms_below(path):
    wing, names = path.parent.name, imported_by(path)
    wings = {found for name in names if (found := wing_of(name)) is not None}
    above = wings - set(WINGS[WINGS.index(wing) :]) - {"recipes"}
    assert not above, f"{name_of(path)} imports from wings above its own: {sorted(above)}"
    plan = floor_plan(path.parent)
    own = {name.split(".")[2] for name in names if name.startswith(f"service.{wing}.")}
    too_high = [room for room in own if plan.index(room) <= plan.index(path.stem)]
    assert not too_high, f"{name_of(path)} imports rooms that its floor plan has above it"


@pytest.mark.parametrize("wing", WINGS)
def test_the_floor_plan_of_a_wing_names_each_of_its_rooms(wing):
    package = ROOT / "service" / wing
    assert set(floor_plan(package)) == {path.stem for path in rooms_of(package)}


@pytest.mark.parametrize("package", PACKAGES, ids=name_of)
def test_no_package_has_more_rooms_than_a_reader_can_look_through(package):
    assert len(rooms_of(package)) <= MOST_ROOMS, "too many rooms for one package: divide it"


@pytest.mark.parametrize("package", ENGINES, ids=name_of)
def test_a_room_of_an_engine_imports_only_from_rooms_below(package):
    dotted, plan = ".".join(package.relative_to(ROOT).parts) + ".", floor_plan(package)
    inside = {path.name for path in package.iterdir() if (path / "__init__.py").exists()}
    assert set(plan) == {path.stem for path in rooms_of(package)} | inside
    for path in rooms_of(package):
        names = {name for name in imported_by(path) if name.startswith(dotted)}
        rooms = {name.removeprefix(dotted).split(".")[0] for name in names}
        too_high = [room for room in rooms if plan.index(room) <= plan.index(path.stem)]
        assert not too_high, f"{name_of(path)} imports rooms that its floor plan has above it"


@pytest.mark.parametrize("path", ROOMS, ids=name_of)
def test_service_never_imports_launch(path):
    assert not {n for n in imported_by(path) if n == "launch" or n.startswith("launch.")}


@pytest.mark.parametrize(
    "path", [path for path in ROOMS if f"{name_of(path)}.py" not in SPEAKS], ids=name_of
)
def test_only_world_speaks_to_other_processes(path):
    spoken = ("torch.distributed", "accelerate", "torch.nn.parallel")
    assert not {name for name in imported_by(path) if name.startswith(spoken)}


@pytest.mark.parametrize(
    "path", [path for path in ROOMS if path.parent.name not in WITH_TORCH], ids=name_of
)
def test_a_wing_below_distributed_does_without_torch(path):
    assert not {name for name in imported_by(path) if name.split(".")[0] == "torch"}


@pytest.mark.parametrize(
    "name",
    [
        "processes/signals",
        "processes/warm_start",
        "processes/terminal",
        "rank/exit",
        "processes/echo",
        "nodes/handshake",
        "nodes/rendezvous",
        "environment",
        "slurm_step",
        "nodes/secret_file",
        "engines/kubernetes/**/*",
    ],
)
def test_what_a_launcher_without_torch_needs_does_not_import_it(name):
    found = list((ROOT / "launch").glob(f"{name}.py"))
    assert found
    for path in found:
        names = imported_by(path)
        assert not {n for n in names if n.split(".")[0] == "torch"}, path
        assert not {wing_of(n) for n in names} & set(WITH_TORCH), path


def test_launch_imports_from_parts_below():
    """launch/ stands above service/, and its own parts above each other in the order of LAUNCH."""
    for path in LAUNCHER:
        parts = path.relative_to(ROOT / "launch").with_suffix("").parts
        here = LAUNCH.index(parts[0]) if parts[0] in LAUNCH else -1
        if here < 0:
            assert parts == ("__init__",), path
            continue
        for name in imported_by(path):
            to = name.split(".")[1:2] if name.startswith("launch.") else []
            assert not to or LAUNCH.index(to[0]) >= here, f"{path} imports {name}"
