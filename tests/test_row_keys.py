"""Each row draws the numbers of its own key, also if generators that no row uses are not seeded."""

import random
from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn

from service.basics import randomness
from service.basics.errors import DataBroken
from service.data.loading import train_steps
from service.data.task import supervised
from service.plan.plan import make_plan
from service.spec.files import load_spec

ROWS, MICRO_BATCH, SEED = 53, 8, 5
DRAWS = {"python": random.random, "numpy": np.random.rand, "torch": lambda: torch.rand(()).item()}
WHEN = {
    "always": lambda row: True,
    "in some rows": lambda row: row % 7 == 3,
    "in one row": lambda row: row == 30,
    "never": lambda row: False,
}


class Drawing:
    """Rows of one number, which some of them draw; it counts how often each is read."""

    def __init__(self, draw, when, most=1.0):
        self.draw, self.when, self.most, self.reads = draw, when, most, Counter()

    def __len__(self):
        return ROWS

    def __getitem__(self, row):
        self.reads[row] += 1
        drawn = self.draw() if self.when(row) else 0.5
        if drawn > self.most:
            raise ValueError(f"{drawn} is too much")
        return torch.tensor([drawn], dtype=torch.float64), row


@pytest.fixture
def batches_of(alone):
    """The micro-batches of three epochs of a data set."""

    def batches(data, **parts):
        test = torch.utils.data.TensorDataset(torch.zeros(1, 1), torch.zeros(1, 1))
        task = supervised(
            model=lambda: nn.Linear(1, 1), train=data, test=test, loss="mean_squared", **parts
        )
        spec = load_spec(
            {
                "name": "keys",
                "task": "a:b",
                "seed": SEED,
                "batch": {"global_batch": 3 * MICRO_BATCH, "micro_batch": MICRO_BATCH},
                "length": {"epochs": 3},
                "optimizer": {"name": "sgd", "lr": 0.1},
            }
        )
        plan = make_plan(spec, processes=1, train_rows=ROWS, test_rows=1)
        for step in train_steps(data, task=task, plan=plan, world=alone, start=0):
            yield from step.micro_batches

    return batches


def seeded(epoch, row):
    key = randomness.key(randomness.ROW, SEED, epoch, row)
    random.seed(key)
    np.random.seed(key & 0xFFFFFFFF)
    torch.manual_seed(key)


@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("source", DRAWS)
def test_a_row_draws_the_numbers_of_its_key(batches_of, source, when):
    drawn, expected = [], []
    for batch in batches_of(Drawing(DRAWS[source], WHEN[when])):
        drawn += batch.inputs.flatten().tolist()
        for row in batch.rows.tolist():
            seeded(len(expected) // ROWS, row)
            expected.append(DRAWS[source]() if WHEN[when](row) else 0.5)
    assert drawn == expected
    assert len(drawn) >= 3 * ROWS


@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("source", DRAWS)
def test_only_the_rows_beside_the_first_one_that_draws_late_are_read_again(
    batches_of, source, when
):
    data = Drawing(DRAWS[source], WHEN[when])
    count = sum(len(batch.rows) for batch in batches_of(data))
    late = source != "torch" and when.startswith("in ")
    again = data.reads.total() - count
    assert 1 < again < MICRO_BATCH if late else again == 0


@pytest.mark.parametrize("when", WHEN)
def test_collate_draws_on_from_the_last_row(batches_of, when):
    drawn = []

    def collate(rows):
        drawn.append([draw() for draw in DRAWS.values()])
        return torch.utils.data.default_collate(rows)

    place = 0
    batches = batches_of(Drawing(np.random.rand, WHEN[when]), collate=collate)
    for number, batch in enumerate(batches):
        place += len(batch.rows)
        last = batch.rows.tolist()[-1]
        seeded((place - 1) // ROWS, last)
        if WHEN[when](last):
            np.random.rand()
        assert drawn[number] == [draw() for draw in DRAWS.values()]


def test_a_row_that_fails_for_what_it_drew_is_the_one_that_is_named(batches_of):
    def first_above(most):
        for place, row in enumerate(row for batch in batches_of(plain) for row in batch.rows):
            seeded(place // ROWS, row)
            if plain.when(row) and (drawn := random.random()) > most:
                return row, drawn
        return None

    plain = Drawing(random.random, WHEN["in some rows"])
    row, drawn = first_above(0.9)
    with pytest.raises(DataBroken, match=rf"row {row} .*: {drawn} is too much"):
        list(batches_of(Drawing(random.random, WHEN["in some rows"], most=0.9)))


def test_a_row_fails_only_for_the_numbers_of_its_key(batches_of):
    class Particular(Drawing):
        def __getitem__(self, row):
            inputs, row = super().__getitem__(row)
            if self.when(row) and inputs.item() not in right:
                raise ValueError("not a number of this row")
            return inputs, row

    right = []
    for epoch in range(4):
        seeded(epoch, 30)
        right.append(random.random())
    assert list(batches_of(Particular(random.random, WHEN["in one row"])))
