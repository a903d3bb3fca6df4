"""Which rows belong to which step and micro-batch, and which micro-batches to which process."""

from __future__ import annotations

from math import isqrt
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from service.basics.randomness import SHUFFLE, keys, outputs

_BIAS: Final = 2**30  # the shuffle's worst known bias of pairs is at most chance divided by this
_BLOCK: Final = 2**14  # positions at a time: fits into a core's cache, twice as fast


class MicroBatch(NamedTuple):
    """One forward pass of a step or of a test: its number, and the positions of its rows."""

    number: int  # counted from 0 over all processes
    span: range  # positions in the step's global batch, or row numbers of the test set


def rows_of(step: int, *, rows: int, global_batch: int, seed: int) -> NDArray[np.int64]:
    """The row numbers of optimizer step `step`, in order.  # [B]

    A pure function: no step depends on an earlier call.
    """
    first = step * global_batch
    return rows_at(np.arange(first, first + global_batch, dtype=np.int64), rows=rows, seed=seed)


def epochs_at(positions: NDArray[np.int64], *, rows: int) -> NDArray[np.int64]:
    """The epoch, counted from 0, of each position of the endless sequence, in their shape."""
    return positions // rows


def rows_at(positions: NDArray[np.int64], *, rows: int, seed: int) -> NDArray[np.int64]:
    """The endless sequence, one permutation of 0..rows-1 per epoch, at any positions.  # [P]

    A position is an integer in [0, 2**63); the cost does not depend on it.
    """
    blocks = np.split(positions, range(_BLOCK, positions.size, _BLOCK))
    return np.concatenate([_rows_of_block(block, rows=rows, seed=seed) for block in blocks])


def _rows_of_block(positions: NDArray[np.int64], *, rows: int, seed: int) -> NDArray[np.int64]:
    epochs = epochs_at(positions, rows=rows)
    one_epoch = epochs.size > 0 and epochs.min() == epochs.max()
    numbers = epochs[:1] if one_epoch else epochs  # one key broadcasts, in half of the time
    within = positions - epochs * rows
    return permuted(within, rows=rows, keys=keys(SHUFFLE, seed, numbers=numbers))


def share_of(count: int, *, index: int, of: int) -> range:
    """The contiguous share of `count` items for process `index` of `of`.

    Sizes differ by at most one, larger shares come first, and a share may be empty.
    """
    assert 0 <= index < of, f"process {index} of {of}"
    size, longer = divmod(count, of)
    start = index * size + min(index, longer)
    return range(start, start + size + (index < longer))


def halved_share(count: int, *, index: int, of: int) -> range:
    """The share of process `index` of `of`, a power of two, by repeated halving of `count` items.

    The first half of an odd number is the larger one.  So the share of every process is one
    complete branch of the same binary tree, for any number of processes.
    """
    assert of & (of - 1) == 0, f"{of} processes"
    start, stop, parts = 0, count, of
    while parts > 1:
        parts //= 2
        middle = start + (stop - start + 1) // 2
        start, stop = (start, middle) if index // parts % 2 == 0 else (middle, stop)
    return range(start, stop)


def micro_batches(rows: int, *, micro_batch: int, index: int = 0, of: int = 1) -> list[MicroBatch]:
    """The micro-batches of `rows` rows in order, or the range of them that process `index` takes.

    They are formed before they are distributed, so each has the same rows at any world size;
    the last one may be smaller and nothing is padded. `rows` is a global batch in training and
    the whole test set in testing.
    """
    numbers = share_of(-(-rows // micro_batch), index=index, of=of)
    starts = ((n, n * micro_batch) for n in numbers)
    return [MicroBatch(n, range(at, min(at + micro_batch, rows))) for n, at in starts]


def permuted(
    positions: NDArray[np.int64],
    *,
    rows: int,
    keys: NDArray[np.int64],
    rounds: int | None = None,
) -> NDArray[np.int64]:
    """The image of each position under keyed permutations of 0..rows-1.  # [P]

    `keys` has one key for all positions, or one each; any key names a permutation. Fewer
    `rounds` than needed are for tests of the statistics only.

    A Feistel network over Z_a x Z_b with a * b just above `rows`, repeated while the result is
    not a row. Source: Black & Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002.
    """
    sides = sides_of(rows)
    rounds = rounds_for(sides) if rounds is None else rounds
    at = _feistel(positions.astype(np.uint64), keys.astype(np.uint64), sides, rounds)
    while (outside := np.flatnonzero(at >= rows)).size:
        own = keys if keys.size == 1 else keys[outside]
        at[outside] = _feistel(at[outside], own.astype(np.uint64), sides, rounds)
    return at.astype(np.int64)


def sides_of(rows: int) -> tuple[int, int]:
    """Sides (a, b) of a nearly square grid of at least `rows` cells, with few unused ones.

    `a` is even: with two odd sides every round is an even permutation, and half of the orders
    could never occur. Unused cells cost a second pass through the network.
    """
    assert 1 <= rows < 2**63, f"{rows} rows"
    root = isqrt(rows - 1) + 1
    even = root + root % 2
    a = min(range(even, even + min(root // 4, 64) + 1, 2), key=lambda side: -rows % side)
    return a, -(-rows // a)


def rounds_for(sides: tuple[int, int]) -> int:
    """Rounds after which pairs of rows are distributed as in a perfect shuffle, within 2**-30.

    The worst known bias of pairs is as large as chance itself after four rounds, and each two
    more rounds divide it by the shorter side: Patarin, "Generic Attacks on Feistel Schemes",
    ASIACRYPT 2001; benchmarks/shuffle_quality.py counts it. At 2**-30 it takes 2**60 rows to be
    seen.
    """
    shorter = max(2, min(sides))
    pairs = 4
    while shorter ** (pairs - 2) < _BIAS:
        pairs += 1
    return 2 * pairs


def _feistel(
    at: NDArray[np.uint64], keys: NDArray[np.uint64], sides: tuple[int, int], rounds: int
) -> NDArray[np.uint64]:
    a, b = sides
    left, right = at % a, at // a
    for number in range(rounds):
        # Round r reads outputs r * 2**32 onwards of its key's generator: no two rounds share an
        # output.
        offset = number << 32
        if number % 2 == 0:
            left = _shifted(left, by=outputs(keys, right + offset), modulus=a)
        else:
            right = _shifted(right, by=outputs(keys, left + offset), modulus=b)
    return left + a * right


def _shifted(
    half: NDArray[np.uint64], *, by: NDArray[np.uint64], modulus: int
) -> NDArray[np.uint64]:
    # A product and a shift map 32 random bits into the range without a division (Lemire,
    # arXiv:1805.10941): a side is below 2**32. The bias of one round is at most modulus / 2**32,
    # and those of several rounds multiply.
    total = half + ((by >> 32) * modulus >> 32)
    reduced: NDArray[np.uint64] = np.minimum(total, total - modulus)  # below 0 wraps around
    return reduced
