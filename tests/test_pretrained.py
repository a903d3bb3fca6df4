"""A model of transformers goes back to where it came from: `from_pretrained` reads an export."""

import json
import os
import sys
from importlib.util import find_spec

import pytest
from commands import DEADLINE_SECONDS, command, evenstep

pytestmark = pytest.mark.skipif(
    find_spec("transformers") is None, reason="an optional extra of the package"
)

TASK = """
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from service.data.task import supervised


class Next(nn.Module):
    '''The token after 7 others, by a model that ties the weights of its two ends.'''

    def __init__(self):
        super().__init__()
        sizes = dict(vocab_size=29, n_positions=16, n_embd=12, n_layer=2, n_head=3)
        self.language = GPT2LMHeadModel(GPT2Config(**sizes))

    def forward(self, tokens):
        return self.language(input_ids=tokens).logits[:, -1]  # [B, 29]


class Rows:
    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, row):
        tokens = torch.arange(row, row + 8) * 7 % 29
        return tokens[:7], tokens[7]


def task():
    return supervised(model=Next, train=Rows(103), test=Rows(31), measures=("accuracy",))
"""
READ = """
import sys
import torch
from safetensors.torch import load_file
from transformers import GPT2LMHeadModel

for name in ("model", "average"):
    model, told = GPT2LMHeadModel.from_pretrained(name, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"], told
    loaded = model.state_dict()
    for key, tensor in load_file(f"{sys.argv[1]}/{name}.safetensors").items():
        assert torch.equal(loaded.pop(key.removeprefix("language.")), tensor), key
    assert set(loaded) == {"lm_head.weight"}, loaded.keys()
    assert model.lm_head.weight is model.transformer.wte.weight, "still tied"
    print(name, bool(model(torch.arange(7)[None]).logits.isfinite().all()))
"""


def test_from_pretrained_reads_what_was_exported_bit_by_bit(tmp_path):
    (tmp_path / "task.py").write_text(TASK)
    spec = {
        "name": "job",
        "task": "./task.py:task",
        "batch": {"global_batch": 20, "micro_batch": 7},
        "length": {"steps": 5},
        "optimizer": {"name": "adamw", "lr": 0.01},
        "model": {"moving_average": 0.9},
    }
    (tmp_path / "job.yaml").write_text(json.dumps(spec))
    ran = evenstep("run", "job.yaml", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    files = tmp_path / "runs/job/checkpoints/step-00000005"
    for words, name in (((), "model"), (("--average",), "average")):
        done = evenstep("export", "runs/job", "-o", name, *words, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"{name}: GPT2LMHeadModel, the ")
        assert {"config.json", "model.safetensors"} <= set(os.listdir(tmp_path / name))
    read = command(sys.executable, "-c", READ, files, cwd=tmp_path, timeout=DEADLINE_SECONDS)
    assert read.stdout.split() == ["model", "True", "average", "True"], read.stderr
    assert not [name for name in os.listdir(tmp_path) if "partial" in name]
