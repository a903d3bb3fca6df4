"""What only a GPU can show of a compiled model: CUDA graphs, and its random numbers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import test_cuda_graphs
import torch
from commands import DEADLINE_SECONDS, start
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


def uncompiled_and_replayed(place: Path) -> list[Any]:
    return [run_of(place / "eager", False), run_of(place / "replayed", REPLAYED)]


def with_dropout(place: Path) -> list[Any]:
    compiled, replayed, cut = (place / name for name in ("compiled", "replayed", "cut"))
    return [
        run_of(compiled, True, 0.3),
        run_of(replayed, REPLAYED, 0.3),
        run_of(cut, REPLAYED, 0.3, stop_at=3),
        run_of(cut, REPLAYED, 0.3),
    ]


def with_recomputed_dropout(place: Path) -> list[Any]:
    whole, cut = place / "whole", place / "cut"
    runs = [run_of(whole, True, 0.3), run_of(cut, True, 0.3, stop_at=3), run_of(cut, True, 0.3)]
    for spec, *_ in runs:
        spec["model"]["activation_checkpointing"] = {"match": "2"}  # the dropout
    return runs


Trained = Callable[[Callable[[Path], list[Any]]], tuple[Path, str]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    """`trained(runs)`: where they are, and what they print. Three processes, side by side."""
    started = {}
    for kind in (uncompiled_and_replayed, with_dropout, with_recomputed_dropout):
        place = tmp_path_factory.mktemp(kind.__name__)
        runs = kind(place)
        (place / "runs.json").write_text(json.dumps(runs))
        how = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started[kind] = place, len(runs), start([sys.executable, "-c", PROGRAM], cwd=place, **how)

    def trained(kind: Callable[[Path], list[Any]]) -> tuple[Path, str]:
        place, count, process = started[kind]
        said = process.communicate(timeout=DEADLINE_SECONDS)[0]
        assert process.returncode == 0, said
        assert said.count(" on cuda |") == count, said
        return place, said

    yield trained
    for _, _, process in started.values():
        process.kill()
        process.wait()


def test_cuda_graphs_train_and_test_as_an_uncompiled_run(trained: Trained) -> None:
    place, said = trained(uncompiled_and_replayed)
    eager, replayed = place / "eager", place / "replayed"
    assert "makes no CUDA graph" not in said
    assert difference(eager, replayed) < 1e-9
    for one, other in zip(rows_of(eager), rows_of(replayed), strict=True):
        for key in {"train/loss", "test/loss", "test/auroc"} & one.keys():
            assert other[key] == pytest.approx(one[key], rel=1e-7), key


def test_dropout_in_a_cuda_graph_belongs_to_the_micro_batch(trained: Trained) -> None:
    place, _ = trained(with_dropout)
    assert difference(place / "compiled", place / "replayed") < 1e-9
    assert difference(place / "replayed", place / "cut") < 1e-9


def test_recomputed_dropout_belongs_to_the_micro_batch(trained: Trained) -> None:
    place, _ = trained(with_recomputed_dropout)
    assert difference(place / "whole", place / "cut") < 1e-9
