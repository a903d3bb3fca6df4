"""The moving average of the weights: its arithmetic, its world, its checkpoint, its test."""

import pytest
import torch
from jobs import train_in_process
from precisions import images, job
from torch import nn
from torch.nn import functional as F

from service.basics.errors import SpecError
from service.checkpoints.snapshots import load_weights
from service.distributed.world import World
from service.optimization.moving_average import MovingAverage
from service.runs.tracking import read_metrics

DECAY, STEPS = 0.4, 9
SPEC = job(
    "images",
    task_args={"double": True, "dropout": 0.25},
    model={"moving_average": DECAY},
    optimizer={"name": "adam", "lr": 0.01},
    length={"steps": STEPS},
    test={"every_steps": 1, "micro_batch": 17},
)


def checkpoint(runs, step):
    return runs / "job" / "checkpoints" / f"step-{step:08d}"


def state(runs, step, *, average):
    model = images(double=True).model()
    load_weights(checkpoint(runs, step), model, average=average)
    return model.state_dict()


def difference(a, b):
    return max((a[k].double() - b[k].double()).abs().max().item() for k in a)


@pytest.fixture(scope="module")
def runs(processes, tmp_path_factory):
    places = {count: tmp_path_factory.mktemp(f"on-{count}") for count in (1, 2, 3)}
    for count, place in places.items():
        processes(count).run(train_in_process, SPEC, place)
    return places


class Shared(nn.Module):
    """One buffer in two of its modules, as of rotary position embeddings."""

    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Linear(1, 1), nn.Linear(1, 1)
        shared = torch.zeros(3)
        self.one.register_buffer("shared", shared)
        self.other.register_buffer("shared", shared)


def test_a_buffer_of_two_modules_moves_once_a_step():
    model = Shared()
    average = MovingAverage(model, decay=0.5)
    model.one.shared.fill_(1)
    average.move(100)
    assert average.model.other.shared.tolist() == [0.5] * 3


def test_each_step_moves_it_by_a_share_that_falls_to_the_decays(runs):
    average = state(runs[1], 1, average=True)
    for step in range(2, STEPS + 1):
        keep = min(DECAY, (1 + step) / (10 + step))
        latest = state(runs[1], step, average=False)
        for name, value in average.items():
            if value.is_floating_point():
                average[name] = keep * value + (1 - keep) * latest[name]
            else:
                average[name] = latest[name]
        assert difference(average, state(runs[1], step, average=True)) < 1e-12
    assert keep == DECAY, "the run is long enough to reach it"
    assert difference(average, latest) > 1e-3


@pytest.mark.parametrize("count", [2, 3])
def test_it_does_not_depend_on_the_number_of_processes(runs, count):
    pair = [state(runs[n], STEPS, average=True) for n in (1, count)]
    assert difference(*pair) < 1e-9


def test_it_is_what_is_tested(runs):
    task = images(double=True)
    model = task.model()
    rows, labels = task.test_data().tensors
    for step in (1, 5, STEPS):
        model.load_state_dict(state(runs[1], step, average=True))
        loss = F.cross_entropy(model.eval()(rows), labels).item()
        told = read_metrics(runs[1] / "job" / "metrics.jsonl")[step - 1]["test/loss"]
        assert told == pytest.approx(loss, rel=1e-9)


def test_a_model_that_moves_its_buffers_is_followed():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.line = nn.Linear(2, 2)
            self.register_buffer("mean", torch.zeros(2))
            self.register_buffer("steps", torch.zeros((), dtype=torch.long))

        def forward(self, x):
            self.mean = self.mean + 1  # another tensor in its place
            self.steps += 1
            return self.line(x)

    model = Counting()
    average = MovingAverage(model, 0.5)
    for step in (9999, 9999):
        model(torch.ones(1, 2))
        average.move(step)
    assert average.model.mean.tolist() == [1.25, 1.25]  # 0, 0.5, 1.25
    assert average.model.steps == 2
    assert not any(p.requires_grad for p in average.model.parameters())


def test_sixteen_bits_cannot_be_averaged():
    with pytest.raises(SpecError, match=r"model.moving_average: weight, bias have 16 bits"):
        MovingAverage(nn.Linear(2, 2).bfloat16(), 0.999)


def test_a_checkpoint_without_one_says_so(processes, tmp_path):
    plain = SPEC | {"model": {}, "length": {"steps": 1}}
    processes(1).run(train_in_process, plain, tmp_path)
    with pytest.raises(SpecError, match="has no moving average"):
        load_weights(checkpoint(tmp_path, 1), images(double=True).model(), average=True)


def _shape_kept(world: World) -> bool:
    model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    return MovingAverage(model, 0.9).model.weight.is_contiguous(memory_format=torch.channels_last)


def test_channels_last_stays_channels_last(processes):
    assert processes(1).run(_shape_kept) == [True]
