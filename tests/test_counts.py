"""What a run costs beside its training, in counts, which no busy machine changes.

The Python calls a step are in test_step_calls.py.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from commands import evenstep

TASK = """
import gc
import glob
import json
import os
import sys
import time

import psutil
import torch
from torch import nn

from service.task import supervised

LOOKED_AT = (25, 35, 85, 325, 565)
SAVED = {85: 80, 325: 320, 565: 560}


class Watched(nn.Linear):
    passes = 0

    def forward(self, rows):
        if self.training:
            Watched.passes += 1
            if Watched.passes in LOOKED_AT:
                look()
        return super().forward(rows)


def look():
    saved = SAVED.get(Watched.passes)
    while saved and not glob.glob(f"runs/job/checkpoints/step-*{saved}"):
        time.sleep(0.01)
    gc.collect()
    connected = [
        each for each in psutil.Process().net_connections(kind="tcp")
        if each.status == psutil.CONN_ESTABLISHED
    ]
    counts = dict(line.split(": ") for line in open("/proc/self/io").read().splitlines())
    facts = {
        "blocks": sys.getallocatedblocks(),
        "calls": int(counts["syscr"]) + int(counts["syscw"]),
        "files": len(os.listdir("/proc/self/fd")),
        "connections": len(connected),
    }
    with open(f"facts-{os.environ.get('RANK', 0)}", "a") as file:
        print(json.dumps(facts), file=file)


def task():
    rows = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    model = lambda: nn.Sequential(Watched(16, 200), nn.ReLU(), nn.Linear(200, 4))
    return supervised(model=model, train=[(row, 0) for row in rows])
"""
JOB: dict[str, Any] = {
    "name": "job",
    "task": "./mine.py:task",
    "batch": {"global_batch": 12, "micro_batch": 4},
    "length": {"steps": 570},
    "optimizer": {"name": "adam", "lr": 0.01},
    "checkpoint": {"every_steps": 40},
    "tracking": {"log_every_steps": 40},
}
PARAMETERS = 16 * 200 + 200 + 200 * 4 + 4


def facts_of(place: Path, processes: int) -> list[list[dict[str, int]]]:
    """What each process saw, each time it looked."""
    (place / "mine.py").write_text(TASK)
    micro_batches = {"global_batch": 4 * processes, "micro_batch": 4}  # a pass is a step
    (place / "job.yaml").write_text(json.dumps(JOB | {"batch": micro_batches}))
    words = ["--processes", processes] if processes > 1 else []
    ran = evenstep("run", "job.yaml", *words, cwd=place, OMP_NUM_THREADS="1")
    assert ran.returncode == 0, ran.stderr
    files = [place / f"facts-{rank}" for rank in range(processes)]
    return [[json.loads(line) for line in file.read_text().splitlines()] for file in files]


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_a_step_reads_writes_opens_and_keeps_nothing(tmp_path):
    (looks,) = facts_of(tmp_path, 1)
    before, after, saved, later, last = looks
    # The looks themselves: a file of /proc is read in a few pieces, and a line is written.
    assert after["calls"] - before["calls"] <= 9
    # Twice 240 steps with logs and saves: a block is some object of Python, and those of a leak are
    # one a step at least, each time. A save that is still being written holds some hundred blocks.
    assert last["files"] - saved["files"] < 6  # fewer than the saves
    grown = [later["blocks"] - saved["blocks"], last["blocks"] - later["blocks"]]
    assert min(grown) < 240

    *_, checkpoint = sorted((tmp_path / "runs/job/checkpoints").glob("step-*"))
    size = sum(file.stat().st_size for file in checkpoint.iterdir())
    values = 3 * 4 * PARAMETERS  # float32, each with the two averages of Adam
    assert values <= size <= values + 16_384


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_a_process_connects_to_each_other_at_most_twice(tmp_path):
    for rank, (first, *_, last) in enumerate(facts_of(tmp_path, 3)):
        store = 3 if rank == 0 else 1
        assert 2 <= first["connections"] <= 2 * 2 + store
        assert last["connections"] == first["connections"]
