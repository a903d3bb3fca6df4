"""train() and eval(), in every precision, compiled and not; and compiling itself."""

import copy
import json
import re
import shutil
import sys
from typing import ClassVar

import own_steps
import pytest
import torch
from accelerate import Accelerator
from commands import DEADLINE_SECONDS, command, evenstep
from jobs import spec_of
from precisions import images, job
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import TensorDataset

from service.basics.errors import SpecError
from service.data.loading import sample
from service.data.loading import test_batches as batches_of
from service.data.task import supervised
from service.distributed.batchnorm import prepare
from service.distributed.world import World
from service.evaluation.test_loop import Counted
from service.evaluation.test_loop import test as run_test
from service.optimization.precision import computed
from service.plan.plan import make_plan
from service.runs.tracking import read_metrics
from service.spec.files import load_spec
from service.training.train_step import ModelWithLoss, summed_loss, summed_within

CASES = [
    (precision, compiled)
    for compiled in (False, True)
    for precision in ("fp32", "tf32", "bf16", "fp16")
]


def prepared(precision, *, falling=False):
    """(model, task, plan, world) with dropout and BatchNorm, as the worker makes them."""
    spec = load_spec(job("images", task_args={"dropout": 0.9}, model={"precision": precision}))
    task = images(dropout=0.9, falling=falling)
    world = World(Accelerator(cpu=True), precision=precision)
    plan = make_plan(spec, processes=1, train_rows=task.train_rows, test_rows=task.test_rows)
    torch.manual_seed(5)
    model = task.model()
    prepare(model, "micro", world)
    return model, task, plan, world


def compile_without_code(model):
    """As the worker compiles it, but for the C++ at the end, which takes seconds a graph."""
    model.forward = torch.compile(model.forward, backend="aot_eager")


@pytest.mark.parametrize(("precision", "compiled"), CASES)
def test_a_test_pass_leaves_dropout_inert_and_statistics_unmoved(precision, compiled):
    model, task, plan, world = prepared(precision)
    without = copy.deepcopy(model)
    without[-2].p = 0.0
    if compiled:
        compile_without_code(model)
    model.train()
    model(task.train_data().tensors[0][:9])  # in training, compiled for training
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def measured(which):
        batches = batches_of(task.test_data(), task=task, plan=plan, world=world)
        counted = Counted(task, plan=plan, world=world)
        return run_test(which, batches, world=world, counted=counted)

    values = measured(model)
    assert values == measured(model)
    assert values == pytest.approx(measured(without), rel=1e-3), "0.9 of the numbers were not cut"
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(("precision", "compiled"), CASES)
@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_given_back_when_the_test_loop_raises(precision, compiled, training):
    model, task, plan, world = prepared(precision, falling=True)
    if compiled:
        compile_without_code(model)
    model.train(training)
    batches = batches_of(task.test_data(), task=task, plan=plan, world=world)
    counted = Counted(task, plan=plan, world=world)
    with pytest.raises(ZeroDivisionError, match="in the test loop"):
        run_test(model, batches, world=world, counted=counted)
    assert all(module.training is training for module in model.modules())


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_outputs_are_widened_before_a_loss_sees_them(precision):
    model, task, _, world = prepared(precision)
    rows = task.test_data().tensors[0][:5]
    with world.autocast():
        assert model(rows).dtype == world.narrow
    assert computed(model, rows, world).dtype == torch.float32


def test_channels_last_reaches_the_second_convolution():
    model = images().model().to(memory_format=torch.channels_last)
    seen = []
    model[4].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(images().test_data().tensors[0][:5])
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    assert not seen[0].is_contiguous()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles for the CPU with g++")
def test_a_compiled_run_trains_like_an_eager_one(tmp_path):
    words = ["task_args.dropout=0", "length={steps: 12}", "tracking.log_every_steps=1"]
    words += ["model.moving_average=0.9", "checkpoint={every_steps: 6}", "test.micro_batch=364"]
    runs = {}
    for name, more in {"eager": [], "compiled": ["model.compile=true"]}.items():
        done = evenstep(
            "run", "digits", *words, *more, "--processes", 2, "--name", name,
            cwd=tmp_path, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        runs[name] = read_metrics(tmp_path / "runs" / name / "metrics.jsonl")
    for a, b in zip(runs["eager"], runs["compiled"], strict=True):
        # The kernels round otherwise, and this rate makes more of it with every step.
        close = 1e-5 if a["step"] == 1 else 1e-3 if a["step"] < 5 else 0.1
        assert a["train/loss"] == pytest.approx(b["train/loss"], rel=close)
    graphs = [row["train/compiled_graphs"] for row in runs["compiled"]]
    assert graphs[0] >= 1
    assert graphs[5] == graphs[0], "training compiles nothing again"
    for file in ("model", "average"):
        pair = [
            load_file(tmp_path / "runs" / n / "checkpoints/step-00000012" / f"{file}.safetensors")
            for n in ("eager", "compiled")
        ]
        assert pair[0].keys() == pair[1].keys()
        assert not any(re.search("_orig_mod|module", key) for key in pair[1])


@pytest.mark.parametrize("factory", ["by_loss", "weighed"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_model_that_is_compiled_with_its_loss_has_the_same_loss(factory, precision):
    task = own_steps.by_loss(weight=factory == "weighed")
    world = World(Accelerator(cpu=True), precision=precision)
    plan = make_plan(
        load_spec(spec_of("none", task=f"{own_steps.__file__}:by_loss")),
        processes=1,
        train_rows=task.train_rows,
        test_rows=task.test_rows,
    )
    batch = sample(task.train_data(), task=task, plan=plan, world=world, rows=7)
    assert (batch.weight is not None) == (factory == "weighed")
    model = own_steps.classifier(dropout=0.0)
    whole = ModelWithLoss(model, task, world)
    apart = summed_loss(model, batch, task=task, world=world)
    assert summed_within(whole, batch, task=task, world=world).item() == apart.item()
    assert [n for n, _ in whole.named_parameters()] == [n for n, _ in model.named_parameters()]


class Noticing(nn.Linear):
    """Notes cuDNN's setting in each pass."""

    seen: ClassVar[set[bool]] = set()

    def forward(self, rows):
        self.seen.add(torch.backends.cudnn.benchmark)
        return super().forward(rows)


def noticing():
    rows = TensorDataset(torch.randn(20, 3), torch.arange(20) % 2)
    return supervised(model=lambda: Noticing(3, 2), train=rows, test=rows)


@pytest.mark.parametrize("wanted", [False, True])
def test_cudnn_times_its_algorithms_during_a_run_that_asks_for_it(tmp_path, wanted):
    Noticing.seen.clear()
    spec = spec_of(
        "noticing", task=f"{__file__}:noticing", length={"steps": 1}, batch={"global_batch": 10},
        model={"cudnn_benchmark": wanted},
    )  # fmt: skip
    (tmp_path / "job.yaml").write_text(json.dumps(spec))
    code = (
        "import sys, service, torch\n"
        "service.run('job.yaml')\n"
        "kinds = [vars(m).get('Noticing') for m in list(sys.modules.values())]\n"
        "print(set().union(*[k.seen for k in kinds if k]), torch.backends.cudnn.benchmark)"
    )
    done = command(sys.executable, "-c", code, cwd=tmp_path, timeout=DEADLINE_SECONDS)
    assert done.stdout.splitlines()[-1:] == [f"{{{wanted}}} False"], done.stderr


def test_a_bitwise_run_has_no_algorithm_chosen_by_time():
    wish = {"exactness": "bitwise", "model": {"cudnn_benchmark": True}}
    with pytest.raises(SpecError, match=r"remove model\.cudnn_benchmark"):
        load_spec(spec_of("none", **wish))
