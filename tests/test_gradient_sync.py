"""The section `exchange`: how gradients travel changes what it says, and nothing else."""

import own_steps
import pytest
import torch
from commands import evenstep
from jobs import plan_of, spec_of, train_in_process
from safetensors.torch import load_file
from test_unused import SPEC
from torch import nn
from torch.utils.data import TensorDataset

from service.data.task import supervised
from service.runs.tracking import read_metrics
from service.spec.models import ExchangeSpec

JOB = spec_of(
    "cut_of_digits", task_args={"double": True}, optimizer={"name": "sgd", "lr": 0.05}
) | {"length": {"steps": 23}}


def trained(processes, count, place, **exchange):
    """(losses, weights) of the job on so many processes."""
    processes(count).run(train_in_process, JOB | {"exchange": exchange}, place)
    weights = load_file(place / "job/checkpoints/step-00000023/model.safetensors")
    return [row["train/loss"] for row in read_metrics(place / "job/metrics.jsonl")], weights


def furthest(some, others):
    """The largest difference of losses or weights."""
    return max(
        max(abs(a - b) for a, b in zip(some[0], others[0], strict=True)),
        max(float((some[1][k].double() - others[1][k]).abs().max()) for k in others[1]),
    )


@pytest.fixture(scope="module")
def alone(processes, tmp_path_factory):
    return trained(processes, 1, tmp_path_factory.mktemp("alone"))


@pytest.mark.parametrize("count", [2, 3])
def test_a_static_graph_takes_the_same_steps(processes, alone, tmp_path, count):
    found = trained(processes, count, tmp_path, static_graph=True, bucket_mib=1)
    assert furthest(found, alone) < 1e-9


def test_a_static_graph_resumes_to_the_same_bits(processes, tmp_path):
    whole = trained(processes, 2, tmp_path / "whole", static_graph=True)
    job = JOB | {"exchange": {"static_graph": True}}
    processes(2).run(train_in_process, job, tmp_path / "stopped", 9)
    resumed = trained(processes, 2, tmp_path / "stopped", static_graph=True)
    assert resumed[0] == whole[0]
    assert all(torch.equal(resumed[1][name], whole[1][name]) for name in whole[1])


class Backwards(nn.Module):
    """Layers that are used in the reverse order of their registration, a MiB each."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(512, 512, bias=False) for _ in range(4))
        self.head = nn.Linear(512, 7)

    def forward(self, rows):
        for layer in reversed(self.layers):
            rows = torch.tanh(layer(rows))
        return self.head(rows)


def backwards():
    rows = torch.randn(30, 512, generator=torch.Generator().manual_seed(3))
    data = TensorDataset(rows, rows[:, :7].argmax(1))
    return supervised(model=Backwards, train=data, test=data, loss="cross_entropy")


@pytest.mark.parametrize("exchange", [{}, {"static_graph": True}], ids=["", "static"])
def test_the_first_step_of_a_process_is_summed_as_the_others_are(processes, tmp_path, exchange):
    """Otherwise a run that is resumed would round its first step differently."""
    job = JOB | {"task": f"{__file__}:backwards", "task_args": {}, "length": {"steps": 6}}
    job |= {"exchange": {"bucket_mib": 2} | exchange}
    job["batch"] = {"global_batch": 30, "micro_batch": 10}
    processes(3).run(train_in_process, job, tmp_path / "whole")
    for stop in (2, 4, None):
        processes(3).run(train_in_process, job, tmp_path / "stopped", stop)
    ends = [tmp_path / at / "job/checkpoints/step-00000006" for at in ("whole", "stopped")]
    whole, stopped = (load_file(end / "model.safetensors") for end in ends)
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)


def test_bf16_rounds_what_travels(processes, alone, tmp_path):
    found = trained(processes, 3, tmp_path / "three", precision="bf16")
    assert 1e-6 < furthest(found, alone) < 0.3, "8 bits of each gradient, in 23 steps"
    assert furthest(trained(processes, 1, tmp_path / "one", precision="bf16"), alone) == 0


def told(tmp_path, name, *words):
    (tmp_path / "job.yaml").write_text(SPEC.format(file=_unused(), name=name))
    return evenstep("run", "job.yaml", *words, "--processes", 2, cwd=tmp_path)


def _unused():
    import test_unused

    return test_unused.__file__


def test_parameters_that_are_never_trained_are_left_out_of_a_static_graph(tmp_path):
    done = told(tmp_path, "never", "exchange.static_graph=true")
    assert done.returncode == 0, done.stderr
    assert "The loss does not depend on spare.weight, spare.bias" in done.stdout


def test_a_graph_that_is_not_static_is_reported(tmp_path):
    done = told(tmp_path, "at_first", "exchange.static_graph=true")
    assert done.returncode == 42, done.stderr
    assert (
        "does not depend on spare.weight, spare.bias, unlike that of the first rows" in done.stderr
    )


def test_a_graph_that_grows_is_reported(tmp_path):
    done = told(tmp_path, "later", "exchange.static_graph=true")
    assert done.returncode == 42, done.stderr
    assert "exchange.static_graph" in done.stderr
    assert done.stderr.count("error:") == 1, done.stderr


def test_a_graph_that_grows_before_the_last_micro_batch_is_reported(tmp_path):
    job = SPEC.format(file=own_steps.__file__, name="late_branch")
    (tmp_path / "job.yaml").write_text(job)
    words = ("exchange.static_graph=true", "batch.micro_batch=5", "--processes", 2)
    done = evenstep("run", "job.yaml", *words, cwd=tmp_path)
    assert done.returncode == 42, done.stdout
    assert "exchange.static_graph" in done.stderr
    assert done.stderr.count("error:") == 1, done.stderr


def test_it_may_grow_where_nothing_is_promised(tmp_path):
    done = told(tmp_path, "later")
    assert done.returncode == 0, done.stderr


def buckets(world, spec):
    """Bytes of the buckets that a model of 3 MiB is exchanged in."""
    model = nn.Sequential(*(nn.Linear(512, 512, bias=False) for _ in range(3)))
    wrapped = world.wrap(model, find_unused=False, spec=spec)
    for _ in range(3):
        wrapped(torch.ones(1, 512)).sum().backward()
    sizes = wrapped._get_ddp_logging_data()["rebuilt_bucket_sizes"]
    return sorted(int(size) for size in str(sizes).split(","))


def test_a_bucket_leaves_when_it_is_full(processes):
    MIB = 1 << 20
    small, large = (ExchangeSpec(bucket_mib=count) for count in (1, 25))
    assert processes(2).run(buckets, small) == [[MIB] * 3] * 2
    assert processes(2).run(buckets, large) == [[MIB, 2 * MIB]] * 2


def test_the_plan_says_what_bf16_means(tmp_path):
    many, one = (
        plan_of("digits", "exchange.precision=bf16", runs=tmp_path, processes=count)
        for count in (3, 1)
    )
    assert "in bf16: half the bytes, and the result depends on the number of" in many
    assert "bf16" not in one


def test_it_is_refused_with_bitwise(tmp_path):
    words = ("exactness=bitwise", "exchange.precision=bf16")
    done = evenstep("plan", "digits", *words, cwd=tmp_path)
    assert done.returncode == 64
    assert "exactness: bitwise sums gradients in its own fixed order" in done.stderr
