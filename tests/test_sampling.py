"""Weights, balanced classes, mixtures and a curriculum: functions of the seed and the place."""

import pickle
from collections import Counter

import numpy as np
import own_steps
import pytest
import sampled
import torch
from jobs import spec_of, train_in_process
from safetensors.torch import load_file
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from service.basics.errors import SpecError
from service.data.loaders import require_batch
from service.data.loading import Order, _Block, _Reader, _row_keys
from service.data.task import sampling_of, supervised
from service.distributed.world import alone
from service.plan.plan import make_plan
from service.plan.sampling import balanced, proportions, shuffled, stages, weighted
from service.preview.plan import planned
from service.runs.receipt_file import read_receipt
from service.spec.files import load_spec

STEPS = 12
WEIGHTS = np.array([0, 1, 1, 2, 0.5, 7, 3.25, 1, 0, 1.5, 1])


def job(factory, **sections):
    return (
        spec_of("")
        | {
            "task": f"{sampled.__file__}:{factory}",
            "batch": {"global_batch": 23, "micro_batch": 5},
            "length": {"steps": STEPS},
            "test": {},
        }
        | sections
    )


def drawn(sampling, positions, *, rows=0, sources=None, seed=7, global_batch=23):
    over = sampling.over(rows, sources or {})
    return over.rows_at(np.asarray(positions, np.int64), seed=seed, global_batch=global_batch)


def weights_of(place):
    return load_file(place / f"job/checkpoints/step-{STEPS:08d}/model.safetensors")


def same_bits(one, other):
    a, b = weights_of(one), weights_of(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- which rows come


def test_in_each_epoch_a_row_comes_as_often_as_its_weight_says_rounded():
    rows = len(WEIGHTS)
    expected = WEIGHTS * rows / WEIGHTS.sum()
    total = np.zeros(rows)
    for epoch in range(400):
        found = drawn(weighted(WEIGHTS), np.arange(epoch * rows, (epoch + 1) * rows), rows=rows)
        counts = np.bincount(found, minlength=rows)
        assert (counts >= np.floor(expected)).all()
        assert (counts <= np.ceil(expected)).all()
        total += counts
    assert np.abs(total / 400 - expected).max() < 0.1


def test_over_many_epochs_each_class_comes_equally_often():
    labels = np.arange(71) % 3  # of 71 draws, two classes come 24 times and one 23 times
    found = labels[drawn(balanced(labels), np.arange(200 * 71), rows=71)]
    assert np.abs(np.bincount(found) / 200 - 71 / 3).max() < 0.15


def test_equal_weights_give_each_row_once_an_epoch_in_a_new_order():
    epochs = [drawn(weighted(np.ones(37)), range(at, at + 37), rows=37) for at in (0, 37)]
    for found in epochs:
        assert sorted(found) == list(range(37))
    assert (epochs[0] != epochs[1]).any()


SAMPLINGS = {
    "weighted": (weighted(WEIGHTS), len(WEIGHTS), {}),
    "balanced": (balanced(list("aabbbbbbbc")), 10, {}),
    "proportions": (proportions({"a": 0.3, "b": 0.7}), 11, {"a": 4, "b": 7}),
    "stages": (
        stages({0: proportions({"a": 1, "b": 0}), 2: shuffled(), 4: weighted(WEIGHTS)}),
        11,
        {"a": 4, "b": 7},
    ),
}


@pytest.mark.parametrize("name", SAMPLINGS)
def test_a_row_is_a_function_of_the_seed_and_its_place(name):
    sampling, rows, sources = SAMPLINGS[name]
    whole = drawn(sampling, np.arange(500), rows=rows, sources=sources)
    apart = [drawn(sampling, [at], rows=rows, sources=sources)[0] for at in range(499, -1, -1)]
    assert apart[::-1] == whole.tolist()
    mixed = np.random.default_rng(0).permutation(500)
    assert (drawn(sampling, mixed, rows=rows, sources=sources) == whole[mixed]).all()
    assert (drawn(sampling, np.arange(500), rows=rows, sources=sources, seed=8) != whole).any()


def test_balanced_classes_come_equally_often():
    labels = np.array(list("aabbbbbbbbbbbbc"))
    found = drawn(balanced(labels), np.arange(15 * 40), rows=15)
    for epoch in found.reshape(40, 15):
        assert Counter(labels[epoch].tolist()) == {"a": 5, "b": 5, "c": 5}
    assert set(found) == set(range(15))


def test_a_mixture_has_its_proportions_from_the_start_and_each_source_its_epochs():
    sources = {"a": 5, "b": 9, "never": 3}
    shares = proportions({"a": 0.2, "b": 0.8, "never": 0})
    found = drawn(shares, np.arange(900), rows=17, sources=sources)
    for block in found.reshape(-1, 5):  # 1 of a and 4 of b
        assert (block < 5).sum() == 1
        assert ((block >= 5) & (block < 14)).sum() == 4
    for first, size, part in ((0, 5, 1), (5, 9, 4)):
        own = found[(found >= first) & (found < first + size)] - first
        passes = own[: len(own) // (part * size) * part * size].reshape(-1, part * size)
        assert len(passes) > 15
        for some in passes:  # within a block the order of rows is its own
            assert Counter(some.tolist()) == dict.fromkeys(range(size), part)


def test_a_stage_begins_with_its_step_and_the_first_is_as_if_alone():
    first, then = weighted(np.arange(11)), weighted(11 - np.arange(11))
    found = drawn(stages({0: first, 3: then}), np.arange(200), rows=11)
    assert (found[:69] == drawn(first, np.arange(69), rows=11)).all()
    counts = np.bincount(found[69 : 69 + 66], minlength=11)
    assert (np.abs(counts - 66 * (11 - np.arange(11)) / 66) <= 6).all()
    assert counts[0] > counts[10]


# ---- the promises of a run


@pytest.mark.parametrize(
    ("factory", "arguments"),
    [
        ("task", {"kind": "weighted", "noisy": True}),
        ("task", {"kind": "curriculum"}),
        ("mixture", {}),
    ],
)
def test_the_rows_are_the_same_at_any_number_of_processes_and_after_a_resume(
    processes, tmp_path, factory, arguments
):
    spec = job(factory, task_args=arguments)
    for count in (1, 3):
        processes(count).run(train_in_process, spec, tmp_path / str(count))
    receipts = [read_receipt(tmp_path / str(n) / "job/receipt.jsonl") for n in (1, 3)]
    assert receipts[0] == receipts[1]
    first, second = weights_of(tmp_path / "1"), weights_of(tmp_path / "3")
    assert max((first[n] - second[n]).abs().max().item() for n in first) < 1e-12
    assert processes(3).run(train_in_process, spec, tmp_path / "again", 7) == [None] * 3
    processes(3).run(train_in_process, spec, tmp_path / "again")
    assert same_bits(tmp_path / "3", tmp_path / "again")


def test_a_run_is_not_continued_with_other_weights(tmp_path, monkeypatch):
    spec = job("task", task_args={"kind": "weighted"})
    train_in_process(alone(), spec, tmp_path, 5)
    monkeypatch.setenv("SAMPLED", "lighter")  # as if what the task reads had changed
    with pytest.raises(SpecError, match=r"task\.sampling chose differently"):
        train_in_process(alone(), spec, tmp_path)


def test_a_row_that_comes_twice_in_an_epoch_draws_again():
    class Drawing:
        def __len__(self):
            return 2

        def __getitem__(self, row):
            return torch.rand(()).item()

    def rows_of(repeats):
        rows = np.array([[1, 1]])
        block = _Block(range(1), range(1), [2], np.array([[0]]), np.array([[0, 1]]), rows)
        keys = _row_keys(block, 0, epoch=2, repeats=repeats)
        return _Reader(Drawing(), 0, collate=list)[Order(0, 0, 0, rows[0], keys[0])]

    assert len(set(rows_of(True))) == 2
    assert len(set(rows_of(False))) == 1  # as for a plain shuffle, where none comes twice


# ---- what is said


def test_the_plan_says_how_often_a_row_comes(tmp_path):
    def said(**words):
        arguments = {"kind": words.pop("kind")} if "kind" in words else {}
        spec = job(words.get("factory", "task"), task_args=arguments)
        return planned(load_spec(spec), processes=1, runs=tmp_path)

    of_weights = said(kind="weighted")
    assert "by weight: a row 1.97 to 7.89 times, median" in of_weights
    assert "; 15 rows never" in of_weights
    of_classes = said(kind="balanced")
    assert "3 classes equally often" in of_classes
    labels = own_steps.classified()[0].tensors[1]
    rows = int((labels == 0).sum())
    assert f"0: {rows} rows, each {STEPS * 23 / 3 / rows:.3g} times" in of_classes
    of_mixture = said(factory="mixture")
    assert "from step 0, few: 0.25 of the rows, 2.65 passes over its 13" in of_mixture
    assert "from step 6, each of 71 rows 1.94 times" in of_mixture


# ---- loaders and samplers of torch


DATA = TensorDataset(torch.zeros(71, 6).double(), torch.arange(71) % 3)


def of(**arguments):
    return (
        supervised(model=own_steps.classifier, train=DATA)
        if not arguments
        else supervised(model=own_steps.classifier, **arguments)
    )


def test_a_loader_gives_its_data_its_collate_and_its_weights():
    def together(rows):
        return torch.utils.data.default_collate(rows)

    sampler = WeightedRandomSampler(torch.arange(71.0), 71)
    made = of(train=DataLoader(DATA, batch_size=23, sampler=sampler, collate_fn=together))
    assert made.train_data() is DATA
    assert made.collate is together
    positions = np.arange(300)
    assert (
        sampling_of(made).rows_at(positions, seed=1, global_batch=23)
        == drawn(weighted(np.arange(71)), positions, rows=71, seed=1)
    ).all()
    plain = of(train=DataLoader(DATA, shuffle=True), test=DataLoader(DATA, batch_size=50))
    assert plain.train_data() is DATA
    assert plain.test_data() is DATA
    assert not hasattr(plain, "collate")
    assert sampling_of(plain) is None


class Lines(IterableDataset):
    def __iter__(self):
        return iter(DATA)


def test_a_loader_of_a_stream_gives_the_stream():
    lines = Lines()
    made = of(train=DataLoader(lines, batch_size=23))
    assert made.train_data() is lines
    assert made.loader_rows == 23
    assert made.train_rows is None


def test_a_batch_sampler_of_rows_in_batches_is_understood_by_its_own_sampler():
    batches = BatchSampler(RandomSampler(DATA), 23, drop_last=False)
    made = of(train=DataLoader(DATA, batch_sampler=batches))
    assert made.loader_rows == 23
    assert sampling_of(made) is None


class Normalizing(DataLoader):
    def __iter__(self):
        for inputs, targets in super().__iter__():
            yield inputs / 255, targets


class Named(DataLoader):
    """With a way to make batches that is that of torch."""


def test_a_loader_of_another_class_without_its_own_batches_is_that_of_torch():
    together = list
    train = Named(DATA, shuffle=True, collate_fn=together)
    made = of(train=train, test=Named(DATA, collate_fn=together))
    assert made.train_data() is made.test_data() is DATA
    assert made.collate is together
    asked = of(train=DATA, test=DataLoader(DATA), collate=together)
    assert asked.collate is together


def test_the_batch_of_a_loader_is_that_of_the_spec_or_refused():
    spec = load_spec(job("task"))
    plan = make_plan(spec, processes=1, train_rows=71, test_rows=0)
    require_batch(of(train=DataLoader(DATA, batch_size=23, shuffle=True)), plan)
    with pytest.raises(SpecError, match=r"23 rows, but the task's DataLoader makes batches of 8"):
        require_batch(of(train=DataLoader(DATA, batch_size=8, shuffle=True)), plan)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"train": DataLoader(DATA)}, r"shuffle=False.* Write train=loader\.dataset"),
        (
            {"train": DataLoader(DATA, sampler=SubsetRandomSampler(range(5)))},
            "SubsetRandomSampler cannot be used",
        ),
        (
            {"train": DataLoader(DATA, sampler=RandomSampler(DATA, num_samples=5))},
            "RandomSampler cannot be used",
        ),
        (
            {"train": DataLoader(DATA, sampler=WeightedRandomSampler(torch.ones(71), 500))},
            "of 500 draws an epoch over 71 rows",
        ),
        (
            {"train": DataLoader(DATA, batch_sampler=[[0, 1]])},
            r"the batch sampler list.* batch\.global_batch",
        ),
        (
            {"train": DATA, "test": DataLoader(DATA, sampler=SubsetRandomSampler([1]))},
            "does not test each row once",
        ),
        (
            {
                "train": DATA,
                "test": DataLoader(
                    DATA, batch_sampler=BatchSampler(SubsetRandomSampler([1]), 1, drop_last=False)
                ),
            },
            "SubsetRandomSampler does not test each row once",
        ),
        (
            {"train": DATA, "test": DataLoader(DATA, collate_fn=list)},
            "another collate_fn than the training data",
        ),
        (
            {"train": DataLoader(DATA, shuffle=True, collate_fn=list), "test": DataLoader(DATA)},
            "another collate_fn than the training data",
        ),
        ({"train": Normalizing(DATA, shuffle=True)}, "Normalizing has its own __iter__"),
        ({"train": DATA, "test": Normalizing(DATA)}, r"write test=loader\.dataset"),
        ({"train": DATA, "sampling": weighted([1, 2])}, "weights of 2 rows, .* has 71"),
        ({"train": DATA, "sampling": balanced([1, 2])}, "labels of 2 rows"),
        ({"train": DATA, "sampling": proportions({"a": 1})}, r"train=\{'a': \.\.\.\}"),
        ({"train": DATA, "sampling": "balanced"}, "is a str. Write weighted"),
        ({"train": {"a": DATA}, "sampling": proportions({"b": 1})}, "name 'b', which is none"),
        (
            {"train": {"a": DATA, "b": DATA}, "sampling": proportions({"a": 1})},
            "do not include 'b'",
        ),
        (
            {"train": {"a": DATA, "b": []}, "sampling": proportions({"a": 1, "b": 1})},
            "'b' have no rows, and a part of 1 of 2",
        ),
        ({"train": {"a": iter([])}}, "'a' can only be iterated"),
        ({"train": iter([]), "sampling": weighted([1])}, "a stream, whose rows cannot"),
    ],
)
def test_what_cannot_be_understood_is_refused_with_what_to_write(arguments, said):
    with pytest.raises(SpecError, match=said):
        of(**arguments)


def test_a_source_without_rows_can_be_left_out():
    sampling = proportions({"a": 1, "b": 0}).over(3, {"a": 3, "b": 0})
    assert sampling.rows_at(np.arange(6), seed=1, global_batch=2).max() == 2
    assert sampling.in_words(6, global_batch=2)[1] == "b: 0 of the rows, 0 passes over its 0"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: weighted([1, -1]), "finite numbers from 0 up"),
        (lambda: weighted([0, 0]), "not all 0"),
        (lambda: weighted([1, float("nan")]), "finite numbers"),
        (lambda: weighted([[1, 2]]), r"but has \[1, 2\]"),
        (lambda: weighted([]), "has no weights"),
        (lambda: balanced([]), "one label for each row"),
        (lambda: proportions({"a": -1}), "from 0 up"),
        (lambda: proportions({"a": 0}), "all 0"),
        (lambda: proportions({"a": 1.0, "b": 0.123456789}), "Round them"),
        (lambda: stages({5: shuffled()}), "the first one must be 0"),
        (lambda: stages({0: shuffled(), "5": shuffled()}), "the first one must be 0"),
        (lambda: stages({0: shuffled}), "the stage from step 0 on is a function. Write weighted"),
        (lambda: weighted(["much"]), "one number for each row"),
        (lambda: weighted([[1], [1, 2]]), "one number for each row"),
        (lambda: balanced([None, "a"]), "one label for each row, all of one kind"),
        (lambda: balanced([[1, 2]]), r"but has \[1, 2\]"),
        (lambda: proportions([1, 2]), r"but are \[1, 2\]"),
    ],
)
def test_a_mistake_in_a_sampling_is_one_sentence(make, said):
    with pytest.raises(SpecError, match=said):
        make()


def test_a_sampling_can_go_to_the_workers_of_a_loader():
    there = pickle.loads(pickle.dumps(weighted([1, 2, 3])))
    positions = np.arange(20)
    assert (drawn(there, positions, rows=3) == drawn(weighted([1, 2, 3]), positions, rows=3)).all()
