"""Keys are the same for ever, differ whenever their arguments do, and look like coin tosses."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.basics import randomness
from service.basics.randomness import BATCH, FORWARD, ROW, SHUFFLE, TEST, WEIGHTS, key, keys, output

WORDS = st.integers(0, 2**64 - 1)


def test_splitmix64_gives_its_published_outputs():
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]

    assert [output(1234567, n) for n in range(5)] == published


def test_a_key_is_the_same_for_ever():
    # A change here changes every run: nobody's checkpoint would resume in the order it left.
    assert key(SHUFFLE, 0, 0) == 3813712798862122106
    assert key(FORWARD, 0, 1, 2) == 1582273537296004657
    assert key(ROW, 7, 3, 59_999) == 26527656855754444
    assert key(WEIGHTS, 2**63 - 1) == 4280668907324738948
    assert key(TEST, 0, 5) == 3580873320877069179
    assert key(ROW, 2**64, 5, 1) == 7040275202381986469


def test_every_domain_has_its_own_number():
    domains = [n for name, n in vars(randomness).items() if name.strip("_").isupper()]
    small = [n for n in domains if isinstance(n, int) and n < 256]

    assert len(small) == len(set(small)) == 15


@given(domain=st.integers(0, 255), parts=st.lists(st.integers(0, 2**200), max_size=5))
def test_a_key_is_a_63_bit_integer(domain, parts):
    assert 0 <= key(domain, *parts) < 2**63


@given(seeds=st.lists(WORDS, min_size=1, max_size=9), number=WORDS)
def test_outputs_of_arrays_are_those_of_integers(seeds, number):
    found = randomness.outputs(np.array(seeds, np.uint64), np.array([number], np.uint64))

    assert found.tolist() == [output(seed, number) for seed in seeds]


@given(
    parts=st.lists(st.integers(0, 2**70), max_size=3),
    numbers=st.lists(st.integers(0, 2**63 - 1), max_size=9),
)
def test_keys_of_an_array_are_those_of_its_numbers(parts, numbers):
    found = keys(ROW, *parts, numbers=np.array(numbers, np.int64))

    assert found.tolist() == [key(ROW, *parts, number) for number in numbers]


def test_domain_count_and_order_of_parts_all_matter():
    near = [*range(6), 2**32, 2**63, 2**64 - 1, 2**64, 2**64 + 1, 2**128]
    lists = [p for count in range(4) for p in itertools.product(near, repeat=count)]
    every = [(domain, *parts) for domain in range(8) for parts in lists]

    assert len({key(*arguments) for arguments in every}) == len(every)


def test_a_long_part_is_not_two_short_ones():
    a, b, c = 5, 7, 11

    assert key(ROW, a + (b << 64), c) != key(ROW, a, b + (c << 64))
    assert key(ROW, a + (b << 64)) != key(ROW, a, b)


def test_numpy_integers_make_the_same_key():
    assert key(ROW, np.int64(3), np.uint8(2), np.int32(9)) == key(ROW, 3, 2, 9)


def test_a_negative_part_is_refused():
    with pytest.raises(ValueError, match="nonnegative integers, not of -1"):
        key(SHUFFLE, 0, -1)


@pytest.mark.parametrize("counted", ["seed", "step", "micro_batch"])
def test_each_bit_of_counted_keys_is_a_fair_coin(counted):
    count = 4000
    made = []
    for n in range(count):
        name = {"seed": 0, "step": 0, "micro_batch": 0} | {counted: n}
        made.append(key(FORWARD, *name.values()))
    ones = (np.array(made)[:, None] >> np.arange(63) & 1).sum(0)

    assert np.abs(ones - count / 2).max() < 5 * np.sqrt(count / 4)  # by chance once in 27,000


@pytest.mark.parametrize("part", [0, 1, 2])
@pytest.mark.parametrize("bit", [0, 1, 7, 20, 40, 62])
def test_one_bit_of_a_part_turns_over_half_of_the_key(part, bit):
    turned = []
    for n in range(1000):
        parts = [3, n, 2 * n + 1]
        before = key(FORWARD, *parts)
        parts[part] ^= 1 << bit
        turned.append(before ^ key(FORWARD, *parts))
    by_bit = (np.array(turned)[:, None] >> np.arange(63) & 1).mean(0)

    assert np.abs(by_bit - 0.5).max() < 5.5 * np.sqrt(0.25 / 1000)


def test_the_low_32_bits_meet_no_oftener_than_by_chance():
    # torch's CPU generator reads no more of a seed.
    low = np.concatenate([keys(FORWARD, 0, step, numbers=np.arange(8)) for step in range(2**15)])
    low = low & 0xFFFFFFFF
    met = low.size - np.unique(low).size

    assert met <= 25  # expected: n**2 / 2**33 = 8; more than 25 by chance once in a million


def test_neighbouring_keys_are_uncorrelated():
    n = 2**16
    lists = {
        "row": keys(ROW, 0, 0, numbers=np.arange(n)),
        "epoch": keys(ROW, 0, 1, numbers=np.arange(n)),
        "seed": keys(ROW, 1, 0, numbers=np.arange(n)),
        "domain": keys(BATCH, 0, 0, numbers=np.arange(n)),
    }
    lists["next row"] = np.roll(lists["row"], 1)
    for (_, x), (_, y) in itertools.combinations(lists.items(), 2):
        for bits in (0x7FFFFFFF00000000, 0xFFFFFFFF):
            rho = np.corrcoef((x & bits).astype(float), (y & bits).astype(float))[0, 1]
            assert abs(rho) * np.sqrt(n) < 4.5
