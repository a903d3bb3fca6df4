"""Data that can only be iterated: the same rows at any process count, resumed where it was."""

import numpy as np
import pytest
import torch
from jobs import spec_of, train_in_process
from processes import ProcessesFailed
from test_features import difference
from torch import nn
from torch.utils.data import IterableDataset, TensorDataset

from service.basics import randomness
from service.basics.errors import DataBroken, SpecError
from service.data.streams import Stream, contents
from service.data.task import supervised
from service.plan.plan import make_plan
from service.preview.plan import planned
from service.runs.receipt_file import read_receipt
from service.runs.tracking import read_metrics
from service.spec.files import load_spec


class Lines(IterableDataset):
    """Rows in an order that each pass shuffles anew, with a state; noisy, to use randomness."""

    def __init__(self, rows=103, stateful=True, first=0, every=1):
        self.rows, self.first, self.every = rows, first, every
        self.at, self.epoch = 0, 0
        if stateful:
            self.state_dict = self._state
            self.load_state_dict = self._load

    def set_epoch(self, epoch):
        self.epoch, self.at = epoch, 0

    def shard(self, num_shards, index):
        return Lines(self.rows, True, index, num_shards)

    def _state(self):
        return {"at": self.at, "epoch": self.epoch}

    def _load(self, state):
        self.at, self.epoch = state["at"], state["epoch"]

    def __iter__(self):
        order = torch.randperm(self.rows, generator=torch.Generator().manual_seed(self.epoch))
        mine = order[self.first :: self.every]
        while self.at < len(mine):
            row = int(mine[self.at])
            self.at += 1
            values = torch.tensor([row / self.rows, row % 7, 1.0], dtype=torch.float64)
            yield values + 0.01 * torch.randn(3).double(), row % 3


def lines(stateful=True):
    generator = torch.Generator().manual_seed(1)
    test = TensorDataset(torch.randn(40, 3, generator=generator).double(), torch.arange(40) % 3)
    return supervised(
        model=lambda: nn.Linear(3, 3).double(), train=Lines(stateful=stateful), test=test
    )


HERE = __file__
JOB = spec_of("") | {"task": f"{HERE}:lines", "test": {}}


@pytest.mark.parametrize("stateful", [True, False])
def test_a_stream_gives_the_same_run_at_any_process_count_and_resumes_at_any_other(
    processes, tmp_path, stateful
):
    job = JOB | {"task_args": {"stateful": stateful}}
    processes(1).run(train_in_process, job, tmp_path / "1")
    processes(3).run(train_in_process, job, tmp_path / "3")
    for count, stop_at in ((2, 9), (1, 23), (3, None)):
        processes(count).run(train_in_process, job, tmp_path / "changing", stop_at)
    for other in ("3", "changing"):
        losses, weights = difference(tmp_path / "1", tmp_path / other)
        assert losses < 1e-9
        assert weights < 1e-9
        receipts = [read_receipt(tmp_path / n / "job" / "receipt.jsonl") for n in ("1", other)]
        assert receipts[0] == receipts[1]


def test_at_one_process_count_a_resumed_stream_has_the_same_bits(processes, tmp_path):
    processes(2).run(train_in_process, JOB, tmp_path / "whole")
    for stop_at in (13, None):
        processes(2).run(train_in_process, JOB, tmp_path / "cut", stop_at)
    assert difference(tmp_path / "whole", tmp_path / "cut") == (0, 0)


def test_split_each_process_reads_its_own_part(processes, tmp_path):
    job = JOB | {"loader": {"stream": "split"}}
    processes(2).run(train_in_process, job, tmp_path / "whole")
    for stop_at in (13, None):
        processes(2).run(train_in_process, job, tmp_path / "cut", stop_at)
    assert difference(tmp_path / "whole", tmp_path / "cut") == (0, 0)
    processes(1).run(train_in_process, job, tmp_path / "one")
    last = [
        read_metrics(tmp_path / n / "job/metrics.jsonl")[-1]["train/loss"] for n in ("one", "whole")
    ]
    assert last[0] != last[1], "it does depend on the number of processes, and the plan says so"


class ByRank(Lines):
    """Divides itself by the rank, as most streams for several processes do elsewhere."""

    def __init__(self):
        started = torch.distributed.is_initialized()
        super().__init__(first=torch.distributed.get_rank() if started else 0, every=2)


class OwnNoise(IterableDataset):
    """Draws from a generator that nobody seeds."""

    def __iter__(self):
        generator = np.random.default_rng()
        while True:
            yield torch.from_numpy(generator.normal(size=3)), 0


def divided(stream):
    train = {"ByRank": ByRank, "OwnNoise": OwnNoise}[stream]()
    return supervised(model=lambda: nn.Linear(3, 3).double(), train=train)


@pytest.mark.parametrize("stream", ["ByRank", "OwnNoise"])
def test_a_stream_of_which_each_process_reads_other_rows_is_refused(processes, tmp_path, stream):
    """Each process kept its own micro-batches of another half: most rows were never used."""
    job = JOB | {"task": f"{HERE}:divided", "task_args": {"stream": stream}}
    processes(1).run(train_in_process, job, tmp_path / "1")
    with pytest.raises(ProcessesFailed, match=rf"different first rows of the stream {stream}"):
        processes(2).run(train_in_process, job, tmp_path / "2")


def test_split_cannot_be_taken_up_by_another_number(processes, tmp_path):
    stream = Stream(Lines(), mode="split", index=0, of=3)
    with pytest.raises(SpecError, match="split among 2 processes so far"):
        stream.move_to([stream.place(), stream.place()], 0)


def test_what_a_stream_does_not_know_is_asked_in_steps():
    spec = load_spec(JOB | {"length": {"epochs": 2}})
    with pytest.raises(SpecError, match=r"length.epochs: the training data is a stream"):
        make_plan(spec, processes=1, train_rows=None, test_rows=40)


def test_a_stream_without_rows_is_reported():
    with pytest.raises(DataBroken, match="returned no row in a whole epoch"):
        Stream(Lines(rows=0), mode="whole", index=0, of=1).take(1)


def test_the_plan_says_which_promise_holds(tmp_path):
    whole = planned(load_spec(JOB), processes=1, runs=tmp_path)
    assert "the same rows at any number of processes" in whole
    split = planned(load_spec(JOB | {"loader": {"stream": "split"}}), processes=1, runs=tmp_path)
    assert "depend on their number" in split


def test_each_row_draws_the_numbers_of_its_key_also_after_rows_that_were_passed_over():
    class Drawing(IterableDataset):
        def __iter__(self):
            while True:
                yield torch.rand(()).item(), np.random.rand()

    stream = Stream(Drawing(), mode="split", index=2, of=1, seed=5)
    rows = dict(enumerate(stream.take(1030)))
    stream.pass_over(1030)
    rows |= enumerate(stream.take(10), start=2060)
    for place in (0, 1, 1023, 1024, 1029, 2060, 2069):
        key = randomness.key(randomness.ROW, 5, 2, place)
        torch.manual_seed(key)
        np.random.seed(key & 0xFFFFFFFF)
        assert rows[place] == (torch.rand(()).item(), np.random.rand())


def test_the_ids_of_rows_are_those_of_earlier_versions():
    rows = [
        {"input_ids": [101, 7, 4095, -3], "label": 2},
        ([1, True, 2.5, "a", None], [[3], []]),
        (torch.arange(6, dtype=torch.float32).reshape(2, 3).T, np.arange(3), 7),
        b"bytes",
        [1, True, 2],
        [1, 2.5],
    ]
    of_first_version = [
        2498097381683045508,
        4549865432072867423,
        4966780423435339456,
        -4233714428153177304,
        7161993625976042658,
        5303935915441713824,
    ]
    assert contents(rows).tolist() == of_first_version
