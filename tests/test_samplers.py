"""The rows of a step follow from its number alone, at any number of processes, well shuffled."""

from __future__ import annotations

import runpy
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.basics.randomness import SHUFFLE, key, keys, output
from service.plan.samplers import (
    epochs_at,
    micro_batches,
    permuted,
    rounds_for,
    rows_at,
    rows_of,
    share_of,
    sides_of,
)

# The statistics live beside the table that is made of them, in a folder that is not a package.
ROOT = Path(__file__).parents[1]
quality = SimpleNamespace(**runpy.run_path(str(ROOT / "benchmarks" / "shuffle_quality.py")))

SEEDS = st.integers(0, 2**63 - 1)
ROWS = st.integers(1, 1200)
BATCHES = st.integers(1, 700)
MICRO_BATCHES = st.integers(1, 90)
PROCESSES = st.integers(1, 20)
few = settings(max_examples=60, deadline=None)


# ---- the endless sequence ----


@few
@given(rows=ROWS, epoch=st.integers(0, 2**50), seed=SEEDS)
def test_every_row_comes_exactly_once_in_an_epoch(rows, epoch, seed):
    positions = epoch * rows + np.arange(rows)

    assert np.array_equal(np.sort(rows_at(positions, rows=rows, seed=seed)), np.arange(rows))


@few
@given(rows=ROWS, global_batch=BATCHES, start=st.integers(0, 2**40), steps=st.integers(1, 4))
def test_a_start_at_any_step_is_a_slice_of_the_sequence(rows, global_batch, start, steps):
    positions = np.arange(start * global_batch, (start + steps) * global_batch)
    whole = rows_at(positions, rows=rows, seed=7)
    by_step = [
        rows_of(step, rows=rows, global_batch=global_batch, seed=7)
        for step in range(start, start + steps)
    ]

    assert np.array_equal(whole, np.concatenate(by_step))


@few
@given(rows=st.integers(1, 150), global_batch=BATCHES, seed=SEEDS)
def test_steps_count_every_row_once_an_epoch_whatever_the_batch(rows, global_batch, seed):
    steps = -(-2 * rows // global_batch)
    found = [rows_of(s, rows=rows, global_batch=global_batch, seed=seed) for s in range(steps)]
    epochs = epochs_at(np.arange(steps * global_batch), rows=rows)
    brought = np.concatenate(found)

    assert all(len(step) == global_batch for step in found)
    for epoch in (0, 1):
        assert sorted(brought[epochs == epoch].tolist()) == list(range(rows))


@few
@given(rows=ROWS, seed=SEEDS, order=st.randoms(use_true_random=False))
def test_positions_may_be_asked_for_in_any_order_and_alone(rows, seed, order):
    positions = np.arange(2 * rows)
    sequence = rows_at(positions, rows=rows, seed=seed)
    order.shuffle(asked := positions[:50].tolist())

    assert np.array_equal(rows_at(np.array(asked), rows=rows, seed=seed), sequence[asked])
    assert rows_at(np.array(asked[:1]), rows=rows, seed=seed) == sequence[asked[0]]
    assert rows_at(np.array([], np.int64), rows=rows, seed=seed).size == 0


def test_the_order_of_rows_is_the_same_for_ever():
    # A change here changes every run: nobody's checkpoint would resume in the order it left.
    assert rows_of(3, rows=517, global_batch=8, seed=7).tolist() == [
        *(208, 317, 94, 123, 151, 331, 150, 425)
    ]
    assert rows_of(10**9, rows=10**12, global_batch=5, seed=7).tolist() == [
        *(558214938425, 887031842602, 733101456000, 272366188046, 136754902043)
    ]
    assert rows_of(2**40, rows=10, global_batch=12, seed=0).tolist() == [
        *(6, 7, 1, 3, 5, 2, 4, 9, 0, 3, 4, 9)
    ]


def test_a_long_list_of_positions_is_worked_through_in_blocks():
    positions = np.arange(40_000)
    whole = rows_at(positions, rows=30_000, seed=1)
    parts = [rows_at(part, rows=30_000, seed=1) for part in np.array_split(positions, 7)]

    assert np.array_equal(whole, np.concatenate(parts))
    assert np.array_equal(np.sort(whole[:30_000]), np.arange(30_000))


def test_the_sequence_continues_beyond_position_two_to_the_62():
    first = 2**62 - 2**62 % 517
    rows = rows_at(np.arange(first, first + 517), rows=517, seed=0)

    assert np.array_equal(np.sort(rows), np.arange(517))


# ---- the permutation ----


def place_of(row, *, rows, key):
    """The position that a permutation sends to `row`: the network undone, a number at a time."""
    a, b = sides_of(rows)
    while True:
        left, right = row % a, row // a
        for number in reversed(range(rounds_for((a, b)))):
            if number % 2 == 0:
                left = (left - (output(key, (number << 32) + right) >> 32) * a // 2**32) % a
            else:
                right = (right - (output(key, (number << 32) + left) >> 32) * b // 2**32) % b
        row = left + a * right
        if row < rows:
            return row


@few
@given(rows=st.integers(1, 2**62), seed=SEEDS, data=st.data())
def test_the_permutation_of_a_large_data_set_can_be_undone(rows, seed, data):
    within = st.lists(st.integers(0, rows - 1), min_size=1, max_size=20)
    positions = np.array(data.draw(within))
    found = permuted(positions, rows=rows, keys=np.array([seed]))

    assert ((found >= 0) & (found < rows)).all()
    assert [place_of(int(row), rows=rows, key=seed) for row in found] == positions.tolist()


@pytest.mark.parametrize("rows", [10**6 + 3, 10**9 + 7, 10**12])
def test_no_row_comes_twice_in_a_sample_of_a_large_data_set(rows):
    sample = np.unique(np.random.default_rng(0).integers(rows, size=100_000))
    positions = np.union1d(sample, np.arange(100_000))
    found = rows_at(positions, rows=rows, seed=5)

    assert np.unique(found).size == positions.size
    assert found.min() >= 0
    assert found.max() < rows


@few
@given(rows=ROWS, epochs=st.lists(st.integers(0, 2**40), min_size=1, max_size=5))
def test_each_epoch_has_the_permutation_of_its_key(rows, epochs):
    for epoch in epochs:
        of_key = permuted(
            np.arange(rows), rows=rows, keys=keys(SHUFFLE, 3, numbers=np.array([epoch]))
        )
        assert np.array_equal(rows_at(epoch * rows + np.arange(rows), rows=rows, seed=3), of_key)


@given(rows=st.one_of(st.integers(1, 5000), st.integers(1, 2**62)))
def test_the_grid_holds_the_rows_and_is_nearly_square(rows):
    a, b = sides_of(rows)

    assert rows <= a * b < rows + a
    assert a % 2 == 0
    assert a <= 2 * b or rows <= 2 or (a, b) == (4, 2)
    assert a < 2**32
    assert 8 <= rounds_for((a, b)) <= 64


# ---- shares and micro-batches ----


@given(count=st.integers(0, 10**6), of=st.integers(1, 300))
def test_shares_cover_everything_in_order_and_differ_by_at_most_one(count, of):
    shares = [share_of(count, index=index, of=of) for index in range(of)]
    sizes = [len(share) for share in shares]

    assert [shares[0].start, *(s.stop for s in shares)] == [*(s.start for s in shares), count]
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes) - min(sizes) <= 1


@given(rows=st.integers(0, 3000), micro_batch=MICRO_BATCHES, of=PROCESSES)
def test_micro_batches_are_the_same_at_any_number_of_processes(rows, micro_batch, of):
    alone = micro_batches(rows, micro_batch=micro_batch)
    shared = [micro_batches(rows, micro_batch=micro_batch, index=i, of=of) for i in range(of)]

    assert [piece for share in shared for piece in share] == alone
    assert [number for number, _ in alone] == list(range(-(-rows // micro_batch)))
    assert all(len(span) == micro_batch for _, span in alone[:-1])


@few
@given(
    rows=ROWS,
    global_batch=st.integers(1, 150),
    micro_batch=MICRO_BATCHES,
    processes=PROCESSES,
    step=st.integers(0, 10**9),
    seed=SEEDS,
)
def test_processes_together_read_the_rows_of_the_step_in_order(
    rows, global_batch, micro_batch, processes, step, seed
):
    read = []
    for index in range(processes):
        for _, span in micro_batches(
            global_batch, micro_batch=micro_batch, index=index, of=processes
        ):
            positions = step * global_batch + np.arange(span.start, span.stop)
            read += rows_at(positions, rows=rows, seed=seed).tolist()

    assert read == rows_of(step, rows=rows, global_batch=global_batch, seed=seed).tolist()


@given(rows=st.integers(0, 60), micro_batch=MICRO_BATCHES, processes=st.integers(1, 90))
def test_each_test_row_counts_once_even_with_more_processes_than_rows(rows, micro_batch, processes):
    tested = [
        row
        for index in range(processes)
        for _, span in micro_batches(rows, micro_batch=micro_batch, index=index, of=processes)
        for row in span
    ]

    assert tested == list(range(rows))


def test_seven_processes_share_five_micro_batches_of_517_test_rows():
    shared = [micro_batches(517, micro_batch=120, index=i, of=7) for i in range(7)]

    assert [len(share) for share in shared] == [1, 1, 1, 1, 1, 0, 0]
    assert shared[4] == [(4, range(480, 517))]


# ---- the quality of the shuffle ----
#
# Each statistic comes back as a standard normal deviate of its known distribution, so 4.5 is
# passed by chance once in 150,000; with fixed seeds it is passed always or never.

PASSED = 4.5
STATISTICS = {
    "2! orders": partial(quality.every_order, rows=2, epochs=20_000),
    "3! orders": partial(quality.every_order, rows=3, epochs=20_000),
    "4! orders": partial(quality.every_order, rows=4, epochs=20_000),
    "5! orders": partial(quality.every_order, rows=5, epochs=20_000),
    "sign": partial(quality.sign, rows=25, epochs=2000),
    "row by place": partial(quality.row_by_place, rows=20, epochs=10_000),
    "two places": partial(quality.two_places, rows=24, epochs=20_000, apart=1),
    "order kept": partial(quality.order_kept, rows=517, epochs=200),
    "ascents": partial(quality.ascents, rows=517, epochs=200),
    "same place": partial(quality.same_place_again, rows=517, epochs=200),
    "class in a block": partial(
        quality.batch_composition, rows=1000, epochs=5000, batch=50, every_tenth=False
    ),
    "class strewn": partial(
        quality.batch_composition, rows=1000, epochs=5000, batch=50, every_tenth=True
    ),
    "next epoch": partial(quality.next_epoch, rows=10**6, epochs=4, places=20_000),
    "next seed": partial(quality.next_seed, rows=10**6, epochs=4, places=20_000),
    "neighbours": partial(quality.serial_pairs, rows=10**6, epochs=2, places=50_000),
    "serial": partial(quality.serial_correlation, rows=10**6, epochs=1, places=10_000),
    "grid": partial(quality.grid_offsets, rows=1024, epochs=1024, lines=32),
}
LARGE = {
    "neighbours, 10^9": partial(quality.serial_pairs, rows=10**9, epochs=2, places=100_000),
    "serial, 10^9": partial(quality.serial_correlation, rows=10**9, epochs=1, places=10_000),
    "next epoch, 10^9": partial(quality.next_epoch, rows=10**9, epochs=4, places=20_000),
    "grid, 10^9": partial(quality.grid_offsets, rows=10**9, epochs=1, lines=6),
    "neighbours, 10^12": partial(quality.serial_pairs, rows=10**12, epochs=2, places=100_000),
    "serial, 10^12": partial(quality.serial_correlation, rows=10**12, epochs=1, places=10_000),
    "next epoch, 10^12": partial(quality.next_epoch, rows=10**12, epochs=4, places=20_000),
    "grid, 10^12": partial(quality.grid_offsets, rows=10**12, epochs=1, lines=1),
}


@pytest.mark.parametrize("name", [*STATISTICS, *LARGE])
def test_the_shuffle_cannot_be_distinguished_from_a_perfect_one(name):
    deviate = (STATISTICS | LARGE)[name](quality.ours)

    assert abs(deviate) < PASSED


@pytest.mark.parametrize("name", STATISTICS)
def test_torch_randperm_passes_the_same_statistics(name):
    assert abs(STATISTICS[name](quality.randperm)) < PASSED


@pytest.mark.parametrize(
    "name",
    [
        *("3! orders", "4! orders", "5! orders", "two places", "order kept", "ascents"),
        *("class in a block", "class strewn", "neighbours", "serial", "grid"),
        *("neighbours, 10^9", "grid, 10^9", "grid, 10^12"),
    ],
)
def test_a_network_of_two_rounds_is_found_out(name):
    deviate = (STATISTICS | LARGE)[name](partial(quality.ours, rounds=2))

    assert abs(deviate) > 2 * PASSED


@pytest.mark.parametrize(
    ("name", "rounds"), [("4! orders", 4), ("5! orders", 10), ("grid", 6), ("grid, 10^12", 4)]
)
def test_a_network_a_few_rounds_short_is_found_out(name, rounds):
    deviate = (STATISTICS | LARGE)[name](partial(quality.ours, rounds=rounds))

    assert abs(deviate) > 2 * PASSED


def in_order(rows, *, epochs, places, seed=0):
    return np.tile(places, (epochs, 1))


def one_order_for_ever(rows, *, epochs, places, seed=0):
    return np.tile(quality.ours(rows, epochs=1, places=places), (epochs, 1))


@pytest.mark.parametrize(
    ("name", "shuffle"),
    [
        ("2! orders", in_order),
        ("sign", in_order),
        ("row by place", partial(quality.ours, rounds=1)),
        ("same place", one_order_for_ever),
        ("next epoch", one_order_for_ever),
        ("next seed", one_order_for_ever),
        ("next epoch, 10^12", one_order_for_ever),
    ],
)
def test_the_other_statistics_find_out_what_they_are_for(name, shuffle):
    assert abs((STATISTICS | LARGE)[name](shuffle)) > 2 * PASSED


def test_two_seeds_and_two_epochs_have_orders_of_their_own():
    names = [(seed, epoch) for seed in range(4) for epoch in range(4)]
    orders = {
        tuple(rows_at(epoch * 517 + np.arange(517), rows=517, seed=seed).tolist())
        for seed, epoch in names
    }

    assert len(orders) == len({key(SHUFFLE, *name) for name in names}) == len(names)
