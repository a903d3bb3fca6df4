"""service/ is built in floors: a module imports only from floors strictly below its own."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = [
    {"charts", "spec_page", "limits", "handover", "pairs", "errors", "generators"} | {"keeping"},
    {"optimizer_options", "durable", "messages", "devices"},
    {"documents", "spec", "line_file", "parts", "flops"},
    {"spec_file", "randomness", "schedules", "patience", "checkpoint_files"} | {"receipt_file"},
    {"metrics_file", "samplers", "streams", "failures", "faults", "account", "export"},
    {"run_directory"},
    {"plan", "pulse", "stopping"},
    {"world", "batches", "task", "tracking", "averages", "compiling", "hangs"},
    {"precision", "history", "shapes"},
    {"report", "starting"},
    {"clock"},
    {"vitals"},
    {
        "exchange",
        "predictions",
        "metrics",
        "normalization",
        "optimizers",
        "rates",
        "receipts",
        "agreement",
    },
    {"verification", "state", "profiling", "buffers"},
    {"in_memory"},
    {"loading", "snapshots", "console", "wandb_writer", "second_writers", "rehearsal", "reference"},
    {"copies", "planning", "pretrained"},
    {"checkpoints"},
    {"updates", "fitting"},
    {"loops"},
    {"worker"},
    {"checking", "in_place"},
]
FLOOR_OF = {name: number for number, floor in enumerate(FLOORS) for name in floor}
MODULES = sorted((ROOT / "service").glob("*.py"))
MODULES = [path for path in MODULES if path.stem != "__init__"]
WITHOUT_TORCH = {"errors", "optimizer_options", "documents", "spec", "spec_file", "randomness"} | {
    "schedules",
    "patience",
    "samplers",
    "faults",
    "pulse",
    "account",
    "failures",
    "hangs",
    "run_directory",
    "plan",
    "tracking",
    "verification",
    "receipt_file",
    "metrics_file",
    "line_file",
    "durable",
    "checkpoint_files",
    "parts",
    "export",
    "console",
    "wandb_writer",
    "second_writers",
    "charts",
    "spec_page",
    "history",
    "report",
    "starting",
    "limits",
    "handover",
    "stopping",
}


def imported_by(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_a_module_imports_only_from_floors_below(path):
    assert path.stem in FLOOR_OF, f"say on which floor service/{path.name} stands"
    rooms = {name.split(".")[1] for name in imported_by(path) if name.startswith("service.")}
    too_high = {room for room in rooms if FLOOR_OF.get(room, -1) >= FLOOR_OF[path.stem]}
    assert not too_high, f"{path.stem} (floor {FLOOR_OF[path.stem]}) imports {sorted(too_high)}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_service_never_imports_launch(path):
    assert not {n for n in imported_by(path) if n == "launch" or n.startswith("launch.")}


@pytest.mark.parametrize(
    "path",
    [path for path in MODULES if path.stem not in ("world", "pairs")],
    ids=lambda path: path.stem,
)
def test_only_world_speaks_to_other_processes(path):
    spoken = ("torch.distributed", "accelerate", "torch.nn.parallel")
    assert not {name for name in imported_by(path) if name.startswith(spoken)}


@pytest.mark.parametrize("name", sorted(WITHOUT_TORCH))
def test_what_a_machine_without_torch_needs_does_not_import_it(name):
    names = imported_by(ROOT / "service" / f"{name}.py")
    assert not {n for n in names if n.split(".")[0] == "torch"}
    rooms = {n.split(".")[1] for n in names if n.startswith("service.")}
    assert rooms & set(FLOOR_OF) <= WITHOUT_TORCH


@pytest.mark.parametrize(
    "name",
    [
        "signals",
        "warming",
        "leaving",
        "terminal",
        "environment",
        "echo",
        "meeting",
        "handshake",
        "kubernetes/*",
    ],
)
def test_what_a_launcher_without_torch_needs_does_not_import_it(name):
    found = list((ROOT / "launch").glob(f"{name}.py"))
    assert found
    for path in found:
        names = imported_by(path)
        assert not {n for n in names if n.split(".")[0] == "torch"}, path
        rooms = {n.split(".")[1] for n in names if n.startswith("service.")}
        assert rooms & set(FLOOR_OF) <= WITHOUT_TORCH, path


def test_every_room_on_the_floors_exists():
    assert set(FLOOR_OF) == {path.stem for path in MODULES}
