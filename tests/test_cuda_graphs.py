"""A run whose passes are replayed as CUDA graphs keeps nothing that the next replay overwrites.

`replayed` fakes the graphs on the CPU; `test_gpu_compile.py` has what only a GPU can show.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
import torch._functorch.config
from jobs import difference, rows_of, spec_of, train_in_process
from processes import ProcessesOf
from replayed import replaying
from test_ready import job as of_a_step
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from torchmetrics.classification import MulticlassAUROC

from service.basics.errors import SpecError
from service.data.task import Task, supervised
from service.distributed.batchnorm import prepare, statistics_of
from service.distributed.world import World
from service.optimization.compilation import compile_in_place, compiled_graphs, replays_in_words
from service.plan.changing import changes
from service.preview.check import checked
from service.spec.files import load_spec
from service.spec.models import CompileSpec

# Of the compiler's own.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
GRAPHS = {"backend": "cudagraphs"}


def numbers(dropout: float = 0.0) -> Task:
    """Three classes, with a measure that keeps the scores of every micro-batch."""
    rows = torch.randn(60, 4, generator=torch.Generator().manual_seed(1)).double()
    data = TensorDataset(rows, rows[:, :3].argmax(1))

    def network() -> nn.Module:
        layers = nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(dropout), nn.Linear(5, 3)
        return nn.Sequential(*layers).double()

    return supervised(model=network, train=data, test=data, measures={"auroc": MulticlassAUROC(3)})


def job(compiled: Any, *, dropout: float = 0.0, **sections: Any) -> dict[str, Any]:
    sections = {
        "length": {"steps": 5},
        "batch": {"global_batch": 20, "micro_batch": 5},
        "test": {"every_steps": 3, "micro_batch": 20},
    } | sections
    model = {"compile": compiled, "moving_average": 0.9} | sections.pop("model", {})
    task = f"{__file__}:numbers"
    return spec_of("none", model=model, task_args={"dropout": dropout}, **sections) | {"task": task}


def replayed_run(world: World, spec: dict[str, Any], runs: Path) -> dict[str, int]:
    with replaying() as counted:
        train_in_process(world, spec, runs)
        return dict(counted)


@pytest.mark.parametrize(
    ("count", "sections"),
    [
        (1, {}),
        (2, {}),
        (2, {"batch": {"global_batch": 10, "micro_batch": 5}}),
        (1, {"optimizer": {"name": "lbfgs", "lr": 0.1, "max_iter": 3}}),
    ],
    ids=["4 micro-batches", "2 processes", "2 processes, 1 micro-batch each", "LBFGS"],
)
def test_replayed_passes_train_and_test_as_others(
    processes: ProcessesOf, tmp_path: Path, count: int, sections: dict[str, Any]
) -> None:
    processes(1).run(train_in_process, job(False, **sections), tmp_path / "eager")
    made = processes(count).run(replayed_run, job(GRAPHS, **sections), tmp_path / "replayed")[0]
    assert made["backward"] >= 5
    assert made["forward"] > made["backward"], "and those of tests"
    assert difference(tmp_path / "eager", tmp_path / "replayed") < 1e-10
    for eager, other in zip(
        rows_of(tmp_path / "eager"), rows_of(tmp_path / "replayed"), strict=True
    ):
        assert {"train/loss"} <= eager.keys() <= other.keys()
        for key in eager.keys() - {"time"}:
            assert other[key] == pytest.approx(eager[key], rel=1e-9), key


def test_dropout_of_replayed_passes_belongs_to_the_micro_batch(
    processes: ProcessesOf, tmp_path: Path
) -> None:
    plain = job({"backend": "aot_eager"}, dropout=0.3)
    processes(1).run(train_in_process, plain, tmp_path / "compiled")
    processes(2).run(replayed_run, job(GRAPHS, dropout=0.3), tmp_path / "replayed")
    assert difference(tmp_path / "compiled", tmp_path / "replayed") < 1e-10


MODES = ["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles for the CPU with g++")
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_of_the_compiler_trains_as_eager(
    processes: ProcessesOf, tmp_path: Path, mode: str
) -> None:
    processes(1).run(train_in_process, job(False), tmp_path / "eager")
    processes(2).run(train_in_process, job({"mode": mode, "dynamic": False}), tmp_path / mode)
    assert difference(tmp_path / "eager", tmp_path / mode) < 1e-12


def test_options_of_the_compiler_are_heeded(alone: World) -> None:
    """A model and its loss are one graph, so `fullgraph` does not refuse every model."""
    told = dict(checked(load_spec(job({"backend": "aot_eager", "fullgraph": True})), world=alone))
    assert "forward and a backward pass" in told["compile"]
    spec = load_spec(job({"backend": "aot_eger"}))
    with pytest.raises(SpecError, match=r"no backend 'aot_eger'; did you mean 'aot_eager'"):
        list(checked(spec, world=alone))


class Opaque:
    """Has tensors that torch does not find."""


class Returning(nn.Module):
    def forward(self, rows: Tensor) -> Any:
        return {"rows": [rows, None, 3], "more": Opaque()}


def test_a_result_whose_tensors_cannot_be_copied_is_refused() -> None:
    model = Returning()
    with replaying():
        compile_in_place(model, CompileSpec(backend="cudagraphs"), telling=False)
        with pytest.raises(SpecError, match=r"backend: cudagraphs: the model returns a Opaque"):
            model(torch.ones(2))


def test_the_ninth_model_of_a_process_is_compiled_too() -> None:
    """Of one function torch compiles eight versions, and computes all further ones uncompiled."""
    for width in range(1, 11):
        model, before = nn.Linear(3, width), compiled_graphs()
        compile_in_place(model, CompileSpec(backend="eager"), telling=False)
        model(torch.ones(2, 3))
        assert compiled_graphs() == before + 1, width


def test_the_compiler_leaves_dropout_and_statistics_to_the_run(
    alone: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU: recomputed dropout by generators of torch's own, statistics that move."""
    monkeypatch.setattr(torch._functorch.config, "graphsafe_rng_functionalization", True)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    prepare(model, "micro", alone)
    compile_in_place(model, CompileSpec(mode="reduce-overhead"), telling=False)
    assert torch._functorch.config.graphsafe_rng_functionalization is False
    kinds = [torch._dynamo.utils.get_static_address_type(t) for t in statistics_of(model)]
    assert kinds == ["unguarded"] * 8
    monkeypatch.setenv("TORCHINDUCTOR_CUDAGRAPHS", "1")
    with pytest.raises(SpecError, match=r"^TORCHINDUCTOR_CUDAGRAPHS=1 makes CUDA graphs of which"):
        compile_in_place(nn.Linear(2, 2), CompileSpec(), telling=False)


def test_graphs_that_torch_does_not_make_are_told() -> None:
    how, cpu, gpu = CompileSpec(mode="max-autotune"), torch.device("cpu"), torch.device("cuda")
    assert replays_in_words(CompileSpec(), cpu) == replays_in_words(None, cpu) == []
    assert "max-autotune: torch makes CUDA graphs on GPUs" in replays_in_words(how, cpu)[0]
    counter = torch._dynamo.utils.counters["inductor"]
    before = counter.pop("cudagraph_skips", 0)
    try:
        assert replays_in_words(how, gpu) == []
        counter["cudagraph_skips"] = 2
        assert "no CUDA graph of 2 of the compiled graphs" in replays_in_words(how, gpu)[0]
    finally:
        counter["cudagraph_skips"] = before


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"exactness": "bitwise"}, "exactness: bitwise needs the same kernels"),
        ({"exchange": {"mode": "sharded"}}, "do not work with exchange.mode: sharded"),
        ({"batch": {"global_batch": 8, "micro_batch": "auto"}}, "batch.micro_batch: auto, which"),
        ({"model": {"batchnorm": "sync"}}, "with model.batchnorm: sync"),
    ],
)
def test_what_no_graph_can_do_is_refused_by_name(sections: dict[str, Any], told: str) -> None:
    for mode in ("reduce-overhead", "max-autotune"):
        with pytest.raises(SpecError, match=told) as refused:
            load_spec(job({"mode": mode}, **sections))
        assert f"model.compile.mode: {mode}" in str(refused.value)
    load_spec(job(True, **sections))


def test_a_step_of_ones_own_is_refused(alone: World) -> None:
    spec = load_spec(of_a_step("own_step", model={"compile": {"mode": "reduce-overhead"}}))
    with pytest.raises(SpecError, match="do not work with a task's own step"):
        list(checked(spec, world=alone))


def test_true_is_a_mapping_without_keys() -> None:
    off, on, mapped, replayed = (
        load_spec(job(c)) for c in (False, True, {"mode": "default"}, {"mode": "reduce-overhead"})
    )
    assert changes(on, mapped) == []
    assert list(map(str, changes(mapped, replayed))) == [
        "model.compile.mode: default -> reduce-overhead"
    ]
    assert list(map(str, changes(off, on))) == ["model.compile: false -> true"]
