"""An optimizer or a schedule in a file of the user's own, beside the spec."""

import pytest
from commands import evenstep

from launch.engines.kubernetes.manifests import code_beside
from service.basics.errors import SpecError
from service.runs.directory import RunDirectory
from service.runs.tracking import read_metrics
from service.spec.files import load_spec, with_code_files, with_files_where_they_are

SPEC = """
name: job
task: ./mine.py:task
batch: {global_batch: 4, micro_batch: 4}
length: {steps: 3}
optimizer: {name: ./mine.py:Doubled, lr: 0.01}
schedule: {name: ./rates.py:Halved}
tracking: {log_every_steps: 1}
"""
MINE = """
import torch
from torch import nn
from service.task import supervised

IMPORTED = []

class Doubled(torch.optim.SGD):
    def __init__(self, params, lr):
        super().__init__(params, lr=2 * lr)

def task():
    IMPORTED.append(1)
    assert IMPORTED == [1], "run once"
    rows = [(torch.ones(3), 0)] * 12
    return supervised(model=lambda: nn.Linear(3, 2), train=rows, test=rows)
"""
RATES = """
from torch.optim.lr_scheduler import LambdaLR

class Halved(LambdaLR):
    def __init__(self, optimizer, last_epoch=-1):
        super().__init__(optimizer, lambda step: 0.5**step, last_epoch)
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "job").mkdir()
    for name, text in {"job.yaml": SPEC, "mine.py": MINE, "rates.py": RATES}.items():
        (tmp_path / "job" / name).write_text(text)
    return tmp_path


def test_they_are_relative_to_the_spec_and_run(folder):
    ran = evenstep("run", "job/job.yaml", "--runs", "runs", cwd=folder)
    assert ran.returncode == 0, ran.stderr
    rates = [row["train/lr"] for row in read_metrics(RunDirectory(folder / "runs" / "job").metrics)]
    assert rates == pytest.approx([0.02, 0.01, 0.005])


def test_they_travel_with_the_spec(folder):
    spec = load_spec(folder / "job" / "job.yaml")
    assert spec.optimizer.name == f"{folder}/job/mine.py:Doubled"
    assert code_beside(spec) == {"mine.py": MINE, "rates.py": RATES}
    elsewhere = with_code_files(spec, lambda file, at: f"./{file.rpartition('/')[2]}")
    assert elsewhere.schedule.name == "./rates.py:Halved"
    (folder / "mine.py").write_text(MINE)
    other = load_spec(
        folder / "job" / "job.yaml", overrides=[f"optimizer.name={folder}/mine.py:Doubled"]
    )
    with pytest.raises(
        SpecError, match=r"optimizer\.name: .*mine\.py and .*mine\.py have the same name"
    ):
        code_beside(other)


def test_they_move_along_with_a_run(folder):
    spec = load_spec(folder / "job" / "job.yaml")
    (folder / "elsewhere").mkdir()
    (folder / "job").rename(folder / "elsewhere" / "job")
    old, new = f"{folder}/runs/job", f"{folder}/elsewhere/runs/job"
    moved = with_files_where_they_are(spec, old=old, new=new)
    assert moved.task == f"{folder}/elsewhere/job/mine.py:task"
    assert moved.optimizer.name == f"{folder}/elsewhere/job/mine.py:Doubled"
    assert moved.schedule.name == f"{folder}/elsewhere/job/rates.py:Halved"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.name=./job/none.py:Doubled", "optimizer.name: there is no file "),
        ("optimizer.name=./job/mine.py:Dobled", "optimizer.name: cannot import "),
        ("schedule.name=./job/mine.py:IMPORTED", "is a list, not a scheduler"),
        ("optimizer.name=./job/rates.py:Halved", "is not a torch.optim.Optimizer"),
    ],
)
def test_what_is_none_is_reported(folder, override, message):
    told = evenstep("check", "job/job.yaml", override, cwd=folder)
    assert told.returncode == 64, told.stderr
    assert message in told.stderr
    assert "Traceback" not in told.stderr
