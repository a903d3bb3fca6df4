"""Adapters: only they are trained, and exported alone or merged into their base."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch
from commands import ROOT, evenstep
from safetensors.torch import load_file
from torch import nn


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The run of the page, and the module of its task."""
    place = tmp_path_factory.mktemp("adapters")
    text = (ROOT / "docs/how-to/adapters.md").read_text()
    for name, content in re.findall(r"^`([\w.]+)`:\n\n```\w+\n(.*?)^```$", text, re.S | re.M):
        (place / name).write_text(content)
    done = evenstep("run", "lora.yaml", cwd=place)
    assert done.returncode == 0, done.stderr
    return place


@pytest.fixture(scope="module")
def lora(run):
    found = importlib.util.spec_from_file_location("lora", run / "lora.py")
    module = importlib.util.module_from_spec(found)
    sys.modules["lora"] = module
    found.loader.exec_module(module)
    yield module
    del sys.modules["lora"]


def exported(run: Path, name: str, *words: str) -> dict[str, torch.Tensor]:
    done = evenstep("export", "lora", "-o", name, *words, cwd=run)
    assert done.returncode == 0, done.stderr
    assert f"the {words[0].removeprefix('--')} weights after step 32" in done.stdout
    return load_file(run / name)


def test_what_is_trained_is_exported_alone(run):
    adapters = exported(run, "adapters.safetensors", "--trained")
    assert sorted(adapters) == ["0.down", "0.up", "2.down", "2.up"]
    [newest] = (run / "runs/lora/checkpoints").glob("step-*")
    whole = load_file(newest / "model.safetensors")
    assert sorted(whole.keys() - adapters.keys()) == [
        f"{n}.base.{w}" for n in (0, 2) for w in ("bias", "weight")
    ]
    assert all(torch.equal(whole[name], value) for name, value in adapters.items())
    assert adapters["0.up"].abs().max() > 0


def test_what_is_merged_computes_the_same_without_adapters(run, lora):
    merged = exported(run, "merged.safetensors", "--merged")
    plain = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))
    plain.load_state_dict(merged)
    [newest] = (run / "runs/lora/checkpoints").glob("step-*")
    trained = lora.model()
    trained.load_state_dict(load_file(newest / "model.safetensors"))
    rows = lora.points(2).tensors[0]
    with torch.no_grad():
        torch.testing.assert_close(plain(rows), trained(rows))


def test_what_cannot_be_exported_is_one_sentence(run):
    both = evenstep("export", "lora", "-o", "a.safetensors", "--trained", "--merged", cwd=run)
    assert both.returncode == 64
    assert "--trained cannot be combined with --merged" in both.stderr
    text = (run / "lora.py").read_text()
    (run / "plain.py").write_text(text.replace(", merged=merged)", ")"))
    words = ("-o", "a.safetensors", "--merged", "task=./plain.py:task")
    without = evenstep("export", "lora", *words, cwd=run)
    assert without.returncode == 64
    assert "--merged: " in without.stderr
    # Told before the model is made: here it would be another one, which the weights do not fit.
    (run / "wider.py").write_text(
        text.replace(", merged=merged)", ")").replace("nn.Linear(8, 32)", "nn.Linear(8, 33)")
    )
    wider = evenstep("export", "lora", *words[:-1], "task=./wider.py:task", cwd=run)
    assert wider.returncode == 64
    assert "has no function for it" in wider.stderr
    assert "has no function for it. Give the task merged=" in without.stderr
    assert not (run / "a.safetensors").exists()
