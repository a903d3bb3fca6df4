"""A trained run is tested, resumed and exported where its files have moved, or are gone."""

import json
import os

import pytest
from commands import evenstep

from service.basics.errors import SpecError
from service.spec.files import load_spec

TASK = """
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import TensorDataset

from service.data.task import supervised


def task(start=None):
    def model():
        line = nn.Linear(1, 2)
        if start is not None:  # as a model that is trained on from others' weights
            nn.init.constant_(line.weight, float(Path(start).read_text()))
        return line

    rows = torch.arange(40.0)[:, None] / 40
    data = TensorDataset(rows, (rows[:, 0] > 0.5).long())
    return supervised(model=model, train=data, test=data, loss="cross_entropy")
"""
SPEC = {
    "name": "job",
    "task": "./my_task.py:task",
    "task_args": {"start": "./weights/start.txt"},
    "batch": {"global_batch": 8},
    "length": {"steps": 5},
    "optimizer": {"name": "sgd", "lr": 0.1},
}


def ends(*words, cwd, code=0):
    done = evenstep(*words, cwd=cwd)
    assert done.returncode == code, done.stderr
    return done.stderr if code else done.stdout


def test_a_run_is_tested_resumed_and_exported_wherever_it_is(tmp_path):
    (tmp_path / "one/weights").mkdir(parents=True)
    (tmp_path / "one/my_task.py").write_text(TASK)
    (tmp_path / "one/weights/start.txt").write_text("0.25")
    (tmp_path / "one/job.yaml").write_text(json.dumps(SPEC))
    ends("run", "one/job.yaml", "--runs", "one/runs", cwd=tmp_path)
    before = ends("test", "one/runs/job", cwd=tmp_path)

    os.rename(tmp_path / "one", tmp_path / "two")  # all of it
    assert ends("test", "two/runs/job", cwd=tmp_path) == before
    told = ends("run", "two/job.yaml", "--runs", "two/runs", "test={every_steps: 5}", cwd=tmp_path)
    assert "Nothing to do" in told

    (tmp_path / "two/weights/start.txt").unlink()  # whoever trained on from it has it no more
    told = ends("test", "two/runs/job", cwd=tmp_path, code=64)
    assert "start.txt" in told
    assert "task_args.KEY=PATH (or task_args.KEY= for none)" in told

    os.rename(tmp_path / "two/runs/job", tmp_path / "alone")  # only the run
    new = ("task=two/my_task.py:task", "task_args.start=")
    assert ends("test", "alone", *new, cwd=tmp_path) == before
    told = ends("export", "alone", "-o", "directory", *new, cwd=tmp_path, code=64)
    assert "a directory is for a transformers model" in told
    told = ends("export", "alone", "-o", "file.safetensors", *new, cwd=tmp_path, code=64)
    assert "needs no task" in told
    ends("export", "alone", "-o", "file.safetensors", cwd=tmp_path)
    told = ends("test", "alone", "optimizer.lrr=1", cwd=tmp_path, code=64)
    assert told == "error: optimizer.lrr=1: optimizer.lrr: unknown key; did you mean 'lr'?\n"


def test_paths_of_a_task_are_relative_to_where_they_are_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "inner").mkdir()
    arguments = {"a": "./x", "b": ["../y", {"c": "./z"}], "d": "x/y", "e": "https://./x", "f": 3}
    (tmp_path / "inner/job.yaml").write_text(json.dumps(SPEC | {"task_args": arguments}))
    spec = load_spec("inner/job.yaml", overrides=["task_args.b.1.c=./z", "task_args.g=../w"])
    assert spec.task_args == {
        "a": f"{tmp_path}/inner/x",
        "b": [f"{tmp_path}/y", {"c": f"{tmp_path}/z"}],
        "d": "x/y",
        "e": "https://./x",
        "f": 3,
        "g": f"{tmp_path.parent}/w",
    }
    assert load_spec(spec.model_dump(exclude_none=True)).task_args == spec.task_args
    with pytest.raises(SpecError, match="unknown key"):
        load_spec("inner/job.yaml", overrides=["task_arg.b=./z"])
