"""Keys for random numbers: each is named by its purpose, so there is no stream to save.

Everything here is SplitMix64: output `n` of the generator that starts at `seed` is a fixed mixing
of `seed + (n + 1) * GAMMA`, so it costs the same at any `n` and is a bijection of `n`.

Source: Steele, Lea & Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014;
constants of Vigna's splitmix64.c (Stafford's variant 13). The tests hold its published outputs.
"""

from __future__ import annotations

from operator import index
from typing import Final, SupportsIndex

import numpy as np
from numpy.typing import NDArray

# What a number is for, with the parts that name it. A domain keeps its value for ever: a changed
# one changes every run that is resumed or repeated.
SHUFFLE: Final = 1  # seed, epoch: the order of the training rows
FORWARD: Final = 2  # seed, step, micro_batch: what the model draws in training, above all dropout
ROW: Final = 3  # seed, epoch, row: the augmentation of one row
WEIGHTS: Final = 4  # seed: initial weights
BATCH: Final = 5  # seed, step, micro_batch: what rows that are read together draw together
TEST: Final = 6  # seed, micro_batch: what the model draws in testing
TASK: Final = 7  # seed: what the task draws while it is made and brings its data
HOOK: Final = 8  # seed, step: what a hook of the task draws
SAMPLE: Final = 9  # seed, purpose, ...: rows by weight, from several sources, by stages
UPDATE: Final = 10  # seed, step, turn: what a task draws after an update
_LONG: Final = 0  # the 64-bit words of a part that does not fit into one

_GAMMA: Final = 0x9E3779B97F4A7C15  # 2**64 / golden ratio, made odd
_FIRST: Final = 0xBF58476D1CE4E5B9
_SECOND: Final = 0x94D049BB133111EB
_WORD: Final = 0xFFFFFFFFFFFFFFFF


def key(domain: int, *parts: SupportsIndex) -> int:
    """A uniformly distributed integer in [0, 2**63), the same for ever for the same arguments.

    Each part is any integer from 0 up and picks an output of the generator that the domain, the
    number of parts and the parts before it have seeded. So order and count matter, two keys that
    differ in one part differ before the last bit is dropped, and others meet by chance only:
    one pair in 2**63, or in 2**32 for torch's CPU generator, which reads the low 32 bits of its
    seed. All bits are mixed alike.
    """
    return _chained(domain, parts, count=len(parts)) >> 1


def keys(domain: int, *parts: SupportsIndex, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """`key(domain, *parts, n)` for every n of `numbers`, in its shape."""
    state = np.array([_chained(domain, parts, count=len(parts) + 1)], np.uint64)
    return (outputs(state, numbers.astype(np.uint64)) >> 1).astype(np.int64)


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

    An array wraps around at 2**64 in silence; for a scalar numpy warns.
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
    # Small multiples of GAMMA lie far apart, so no count turns one domain into another.
    state = output(count, domain)
    for part in parts:
        number = index(part)  # numpy's integers too, whose product would overflow
        state = output(state, number if 0 <= number <= _WORD else _shortened(number))
    return state


def _shortened(number: int) -> int:
    if number < 0:
        raise ValueError(f"a key is made of integers from 0 up, not of {number}")
    words = range(0, number.bit_length(), 64)
    return key(_LONG, *((number >> shift) & _WORD for shift in words))
