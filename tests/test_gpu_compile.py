"""What only a GPU can show of a compiled model: CUDA graphs, and its random numbers."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import test_cuda_graphs
import torch
from commands import DEADLINE_SECONDS, command
from jobs import difference, rows_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"),
]
REPLAYED = {"mode": "reduce-overhead"}
# All runs of a test in one process: torch and CUDA start once. Each compiles anew.
PROGRAM = """
import json, sys, service, torch
for spec, place, stop_at in json.load(open("runs.json")):
    torch._dynamo.reset()
    service.run(spec, runs=place, stop_at=stop_at)
"""


def run_of(place: Path, compiled: Any, dropout: float = 0.0, stop_at: int | None = None) -> Any:
    """A run for `trained`; it goes on where an earlier one has stopped."""
    return test_cuda_graphs.job(compiled, dropout=dropout), str(place), stop_at


def trained(place: Path, *runs: Any) -> str:
    """Train them on the GPU; what they print."""
    (place / "runs.json").write_text(json.dumps(runs))
    done = command(sys.executable, "-c", PROGRAM, cwd=place, timeout=DEADLINE_SECONDS)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" on cuda |") == len(runs), done.stdout
    return done.stdout


def test_cuda_graphs_train_and_test_as_an_uncompiled_run(tmp_path: Path) -> None:
    eager, replayed = tmp_path / "eager", tmp_path / "replayed"
    said = trained(tmp_path, run_of(eager, False), run_of(replayed, REPLAYED))
    assert "makes no CUDA graph" not in said
    assert difference(eager, replayed) < 1e-9
    for one, other in zip(rows_of(eager), rows_of(replayed), strict=True):
        for key in {"train/loss", "test/loss", "test/auroc"} & one.keys():
            assert other[key] == pytest.approx(one[key], rel=1e-7), key


def test_dropout_in_a_cuda_graph_belongs_to_the_micro_batch(tmp_path: Path) -> None:
    compiled, replayed, cut = (tmp_path / name for name in ("compiled", "replayed", "cut"))
    trained(
        tmp_path,
        run_of(compiled, True, 0.3),
        run_of(replayed, REPLAYED, 0.3),
        run_of(cut, REPLAYED, 0.3, stop_at=3),
        run_of(cut, REPLAYED, 0.3),
    )
    assert difference(compiled, replayed) < 1e-9
    assert difference(replayed, cut) < 1e-9


def test_recomputed_dropout_belongs_to_the_micro_batch(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    runs = [run_of(whole, True, 0.3), run_of(cut, True, 0.3, stop_at=3), run_of(cut, True, 0.3)]
    for spec, *_ in runs:
        spec["model"]["activation_checkpointing"] = {"match": "2"}  # the dropout
    trained(tmp_path, *runs)
    assert difference(whole, cut) < 1e-9
