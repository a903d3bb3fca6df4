"""Keys for random numbers: each is named by its purpose, so there is no stream to save.

Everything here is SplitMix64: output `n` of the generator that starts at `seed` is a fixed mixing
of `seed + (n + 1) * GAMMA`, so it costs the same at any `n` and is a bijection of `n`.

Source: Steele, Lea & Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014;
constants of Vigna's splitmix64.c (Stafford's variant 13). The tests check its published outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import index
from typing import Final, SupportsIndex

import numpy as np
from numpy.typing import NDArray

# The purpose of a number, and the parts of its key. A domain never changes its value: that
# would change every run that is resumed or repeated.
SHUFFLE: Final = 1  # seed, epoch: the order of the training rows
FORWARD: Final = 2  # seed, step, micro_batch: the model in training, mainly dropout
ROW: Final = 3  # seed, epoch, row: the augmentation of one row
WEIGHTS: Final = 4  # seed: initial weights
BATCH: Final = 5  # seed, step, micro_batch: rows that are read in one call; a stream's collate
TEST: Final = 6  # seed, micro_batch: the model in testing
TASK: Final = 7  # seed: the task, while it is built and its data are loaded
HOOK: Final = 8  # seed, step: a hook of the task
SAMPLE: Final = 9  # seed, purpose, ...: rows by weight, from several sources, by stages
UPDATE: Final = 10  # seed, step, turn: the task's after_update
OPTIMIZER: Final = 11  # seed, step, turn, pass: the step of an optimizer
STORED: Final = 12  # seed, epoch, ...: the order of rows in files
ACROSS: Final = 13  # seed, step, turn, loss: a loss over all rows of a step
STREAM: Final = 14  # seed, part, epoch: a stream, while it begins an epoch
_LONG: Final = 0  # the 64-bit words of a part that does not fit into one

_GAMMA: Final = 0x9E3779B97F4A7C15  # 2**64 / golden ratio, made odd
_FIRST: Final = 0xBF58476D1CE4E5B9
_SECOND: Final = 0x94D049BB133111EB
_WORD: Final = 0xFFFFFFFFFFFFFFFF


def key(domain: int, *parts: SupportsIndex) -> int:
    """A uniformly distributed integer in [0, 2**63), always the same for the same arguments.

    Each part is a nonnegative integer and selects an output of the generator that is seeded by the
    domain, the number of parts and the previous parts. So order and count matter. Two keys that
    differ in one part differ before the last bit is dropped, and others collide by chance only:
    one pair in 2**63, or in 2**32 for torch's CPU generator, which uses the low 32 bits of its
    seed. All bits are mixed equally well.
    """
    return _chained(domain, parts, count=len(parts)) >> 1


def keys(domain: int, *parts: SupportsIndex, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """`key(domain, *parts, n)` for every n of `numbers`, in its shape."""
    return keys_of(domain, *parts, columns=(numbers,))


def keys_of(
    domain: int, *parts: SupportsIndex, columns: Sequence[NDArray[np.int64]]
) -> NDArray[np.int64]:
    """`key(domain, *parts, a, b, ...)` for the numbers a, b, ... at each place of the columns."""
    state = np.array([_chained(domain, parts, count=len(parts) + len(columns))], np.uint64)
    for column in columns:
        state = outputs(state, column.astype(np.uint64))
    return (state >> 1).astype(np.int64)


def grid(
    domain: int, *parts: SupportsIndex, rows: NDArray[np.int64], columns: NDArray[np.int64]
) -> NDArray[np.int64]:
    """`key(domain, *parts, row, column)` for every row and column: [rows, columns]."""
    start = np.array([_chained(domain, parts, count=len(parts) + 2)], np.uint64)
    of_rows = outputs(start, rows.astype(np.uint64))[:, None]
    return (outputs(of_rows, columns.astype(np.uint64)) >> 1).astype(np.int64)


def output(seed: int, number: int) -> int:
    """Output `number`, counted from 0, of SplitMix64 started at `seed`; both are 64-bit words."""
    z = (seed + (number + 1) * _GAMMA) & _WORD
    z = ((z ^ (z >> 30)) * _FIRST) & _WORD
    z = ((z ^ (z >> 27)) * _SECOND) & _WORD
    return z ^ (z >> 31)


def outputs(seeds: NDArray[np.uint64], numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """`output` of every seed and number, broadcast together, neither of them a scalar.

    An array wraps around at 2**64 silently; for a scalar numpy warns.
    """
    z = numbers * _GAMMA
    z = z + (seeds + _GAMMA)
    shifted = z >> 30
    z ^= shifted
    z *= _FIRST
    z ^= np.right_shift(z, 27, out=shifted)
    z *= _SECOND
    z ^= np.right_shift(z, 31, out=shifted)
    return z


def _chained(domain: int, parts: tuple[SupportsIndex, ...], *, count: int) -> int:
    # Small multiples of GAMMA are far apart, so no count turns one domain into another.
    state = output(count, domain)
    for part in parts:
        number = index(part)  # also for numpy integers, whose product would overflow
        state = output(state, number if 0 <= number <= _WORD else _shortened(number))
    return state


def _shortened(number: int) -> int:
    if number < 0:
        raise ValueError(f"a key consists of nonnegative integers, not of {number}")
    words = range(0, number.bit_length(), 64)
    return key(_LONG, *((number >> shift) & _WORD for shift in words))
