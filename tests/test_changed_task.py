"""A resumed run whose task's code has changed: said loudly, with the names of the files."""

import json

import pytest
from commands import evenstep

TASK = """
import torch
from torch.utils.data import TensorDataset

from rows import targets
from service.task import supervised


def task():
    inputs = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    return supervised(
        model=lambda: torch.nn.Linear(4, 3),
        train=TensorDataset(inputs, targets()),
        loss="cross_entropy",
    )
"""
ROWS = "import torch\n\n\ndef targets():\n    return torch.arange(40) % 3\n"
SPEC = """
name: job
task: ./changing.py:task
batch: {global_batch: 8}
length: {steps: 6}
optimizer: {name: sgd, lr: 0.1}
"""


def resumed(place, **files):
    """What the command says that goes on after step 2, with these files changed before it."""
    (place / "changing.py").write_text(TASK)
    (place / "rows.py").write_text(ROWS)
    (place / "unused.py").write_text("")
    (place / "job.yaml").write_text(SPEC)
    assert evenstep("run", "job.yaml", "--stop-at", 2, cwd=place).returncode == 75
    for name, text in files.items():
        (place / f"{name}.py").write_text(text)
    done = evenstep("run", "job.yaml", cwd=place)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({"changing": TASK.replace("Linear(4, 3)", "Linear(4, 3, bias=True)")}, "changing.py."),
        ({"rows": ROWS.replace("% 3", "% 2")}, "rows.py."),
    ],
)
def test_a_changed_file_of_the_task_is_reported(tmp_path, files, told):
    said = resumed(tmp_path, **files)
    assert f"has changed since the last attempt of this run: {told} The steps up to 2" in said
    attempts = json.loads((tmp_path / "runs/job/run.json").read_text())["attempts"]
    assert [sorted(each["task_files"]) for each in attempts] == [["changing.py", "rows.py"]] * 2


OPTIMIZER = "import torch\n\n\nclass Own(torch.optim.SGD):\n    pass\n"


@pytest.mark.parametrize("changed", ["rows", "own"])
def test_a_changed_file_elsewhere_is_reported(tmp_path, changed):
    """A module that the task imports from another folder, and the file of an optimizer."""
    job, library = tmp_path / "job", tmp_path / "library"
    job.mkdir(), library.mkdir()
    (job / "changing.py").write_text(TASK)
    (job / "job.yaml").write_text(SPEC.replace("name: sgd", "name: ../library/own.py:Own"))
    (library / "rows.py").write_text(ROWS)
    (library / "own.py").write_text(OPTIMIZER)
    path = {"PYTHONPATH": str(library)}
    done = evenstep("run", "job.yaml", "--stop-at", 2, cwd=job, **path)
    assert done.returncode == 75, done.stderr
    with (library / f"{changed}.py").open("a") as file:
        file.write("# changed\n")
    done = evenstep("run", "job.yaml", cwd=job, **path)
    assert done.returncode == 0, done.stderr
    told = f"has changed since the last attempt of this run: {changed}. The steps up to 2"
    assert told in done.stdout
    attempts = json.loads((job / "runs/job/run.json").read_text())["attempts"]
    assert [sorted(each["task_files"]) for each in attempts] == [["changing.py", "own", "rows"]] * 2


def test_changes_that_the_task_does_not_use_are_not_reported(tmp_path):
    assert "has changed" not in resumed(tmp_path, unused="1")
