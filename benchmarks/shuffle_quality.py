"""Statistics that tell a keyed shuffle from a perfect one, and a table of them against randperm.

    python -m benchmarks.shuffle_quality

Each statistic has a known distribution over perfect shuffles and comes back as a standard normal
deviate, so |z| > 4.5 happens by chance once in 150,000. The columns with fewer rounds show that
it can fail.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from math import comb, erfc, factorial, sqrt
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from service.basics.randomness import SHUFFLE, key, keys
from service.plan.samplers import permuted, rounds_for, sides_of

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]


class Shuffle(Protocol):
    """The rows at the given places of several epochs.  # [E, P]"""

    def __call__(self, rows: int, *, epochs: int, places: Integers, seed: int = 0) -> Integers: ...


def ours(
    rows: int, *, epochs: int, places: Integers, seed: int = 0, rounds: int | None = None
) -> Integers:
    """The shuffle of `service.plan.samplers`, or a weaker one of fewer rounds."""
    own_keys = np.repeat(keys(SHUFFLE, seed, numbers=np.arange(epochs)), len(places))
    at = permuted(np.tile(places, epochs), rows=rows, keys=own_keys, rounds=rounds)
    return at.reshape(epochs, len(places))


def randperm(rows: int, *, epochs: int, places: Integers, seed: int = 0) -> Integers:
    """torch.randperm under the seeds that our epochs have."""
    at = torch.from_numpy(places)
    generator = torch.Generator()
    seeds = (key(SHUFFLE, seed, epoch) for epoch in range(epochs))
    orders = (torch.randperm(rows, generator=generator.manual_seed(s))[at] for s in seeds)
    return torch.stack(list(orders)).numpy()


# ---- from counts to a deviate ----


def chi_square(value: float, *, freedom: float) -> float:
    """A chi-square value as a standard normal deviate (Wilson & Hilferty 1931)."""
    spread = 2 / (9 * freedom)
    return float(((value / freedom) ** (1 / 3) - (1 - spread)) / sqrt(spread))


def p_value(z: float) -> float:
    """How likely a standard normal deviate is to lie at least this far from 0, on either side."""
    return erfc(abs(z) / sqrt(2))


def _against(counts: NDArray[np.int64], expected: Floats) -> float:
    """The deviate of counts of independent draws, whose expected values add up to as many."""
    return chi_square(float(((counts - expected) ** 2 / expected).sum()), freedom=counts.size - 1)


def _evenly(cells: Integers, *, kinds: int) -> float:
    counts = np.bincount(cells.ravel(), minlength=kinds)
    return _against(counts, np.full(kinds, cells.size / kinds))


def _standard(values: Floats, *, mean: float, variance: float) -> float:
    """The deviate of the squares of several standardised values, which sees either sign."""
    return chi_square(float(((values - mean) ** 2 / variance).sum()), freedom=values.size)


def _correlations(x: Integers, y: Integers, *, rows: int) -> Floats:
    """Row by row, the correlation of two row numbers over their n columns, as deviates.  # [E]"""
    middle, spread = (rows - 1) / 2, sqrt((rows**2 - 1) / 12)
    return np.asarray(((x - middle) / spread * ((y - middle) / spread)).sum(1) / sqrt(x.shape[1]))


# ---- statistics ----


def every_order(shuffle: Shuffle, *, rows: int, epochs: int) -> float:
    """All rows! orders come equally often."""
    found = shuffle(rows, epochs=epochs, places=np.arange(rows))
    numbered = (found * rows ** np.arange(rows)).sum(1)
    counts = np.unique(numbered, return_counts=True)[1]
    kinds = factorial(rows)
    counts = np.concatenate([counts, np.zeros(kinds - counts.size, np.int64)])
    return _against(counts, np.full(kinds, epochs / kinds))


def row_by_place(shuffle: Shuffle, *, rows: int, epochs: int) -> float:
    """Every row comes equally often at every place.

    The matrix of counts has (rows - 1)**2 free directions, in each of which one permutation has
    variance 1 / (rows - 1).
    """
    found = shuffle(rows, epochs=epochs, places=np.arange(rows))
    cells = found + rows * np.arange(rows)
    counts = np.bincount(cells.ravel(), minlength=rows**2)
    value = ((counts - epochs / rows) ** 2).sum() * (rows - 1) / epochs
    return chi_square(float(value), freedom=(rows - 1) ** 2)


def two_places(shuffle: Shuffle, *, rows: int, epochs: int, apart: int) -> float:
    """All ordered pairs of rows come equally often at two given places."""
    found = shuffle(rows, epochs=epochs, places=np.array([0, apart]))
    first, second = found.T
    return _evenly(first * (rows - 1) + second - (second > first), kinds=rows * (rows - 1))


def order_kept(shuffle: Shuffle, *, rows: int, epochs: int) -> float:
    """Row numbers do not follow the places: Spearman's rho has variance 1 / (rows - 1)."""
    places = np.arange(rows)
    found = shuffle(rows, epochs=epochs, places=places)
    rho = _correlations(found, places[None], rows=rows) / sqrt(rows)
    return _standard(rho, mean=0, variance=1 / (rows - 1))


def ascents(shuffle: Shuffle, *, rows: int, epochs: int) -> float:
    """Of two neighbours the first is smaller half the time: Eulerian numbers, variance (n+1)/12."""
    found = shuffle(rows, epochs=epochs, places=np.arange(rows))
    rises = (np.diff(found) > 0).sum(1).astype(np.float64)
    return _standard(rises, mean=(rows - 1) / 2, variance=(rows + 1) / 12)


def serial_correlation(shuffle: Shuffle, *, rows: int, epochs: int, places: int) -> float:
    """Rows 1 to 32 places apart, or a side of the grid apart, are uncorrelated."""
    start = rows // 3
    lags = [*range(1, 33), *sides_of(rows)]
    lags = [lag for lag in lags if start + places + lag <= rows]
    at = {lag: start + lag + np.arange(places) for lag in (0, *lags)}
    first = shuffle(rows, epochs=epochs, places=at[0])
    found = [
        _correlations(first, shuffle(rows, epochs=epochs, places=at[lag]), rows=rows)
        for lag in lags
    ]
    return _standard(np.concatenate(found), mean=0, variance=1)


def serial_pairs(shuffle: Shuffle, *, rows: int, epochs: int, places: int) -> float:
    """Neighbours fall evenly into 32 x 32 cells of the square of row numbers."""
    found = shuffle(rows, epochs=epochs, places=rows // 3 + np.arange(places))
    cells = found * 32 // rows
    return _evenly(cells[:, ::2] * 32 + cells[:, 1::2], kinds=32 * 32)


def next_epoch(shuffle: Shuffle, *, rows: int, epochs: int, places: int) -> float:
    """An epoch's rows are uncorrelated with the next epoch's at the same places."""
    found = shuffle(rows, epochs=epochs, places=np.arange(places))
    return _standard(_correlations(found[:-1], found[1:], rows=rows), mean=0, variance=1)


def next_seed(shuffle: Shuffle, *, rows: int, epochs: int, places: int) -> float:
    """The epochs of a seed are uncorrelated with those of the next seed."""
    a, b = (shuffle(rows, epochs=epochs, places=np.arange(places), seed=s) for s in (0, 1))
    return _standard(_correlations(a, b, rows=rows), mean=0, variance=1)


def same_place_again(shuffle: Shuffle, *, rows: int, epochs: int) -> float:
    """One row an epoch, on average, stands where it stood the epoch before (mean 1, variance 1)."""
    found = shuffle(rows, epochs=epochs, places=np.arange(rows))
    again = (found[:-1] == found[1:]).sum()
    return float((again - (epochs - 1)) / sqrt(epochs - 1))


def batch_composition(
    shuffle: Shuffle, *, rows: int, epochs: int, batch: int, every_tenth: bool
) -> float:
    """Rows of a class, a tenth of the data, in one batch of an epoch: hypergeometric.

    The class is the data set's first tenth or, with `every_tenth`, every tenth row.
    """
    found = shuffle(rows, epochs=epochs, places=3 * batch + np.arange(batch))
    members = found % 10 == 0 if every_tenth else found < rows // 10
    size = rows // 10
    chance = np.array(
        [comb(size, k) * comb(rows - size, batch - k) / comb(rows, batch) for k in range(batch + 1)]
    )
    likely = chance * epochs >= 10  # the usual rule; the rest of both tails is one more cell
    expected = np.append(chance[likely], chance[~likely].sum()) * epochs
    counts = np.bincount(members.sum(1), minlength=batch + 1)
    return _against(np.append(counts[likely], counts[~likely].sum()), expected)


def sign(shuffle: Shuffle, *, rows: int, epochs: int) -> float:
    """Half of the permutations are even; with two odd sides of the grid all of them would be."""
    found = shuffle(rows, epochs=epochs, places=np.arange(rows))
    earlier, later = np.triu_indices(rows, k=1)
    inversions = (found[:, earlier] > found[:, later]).sum(1)
    odd = int((inversions % 2).sum())
    return (odd - epochs / 2) / sqrt(epochs / 4)


def grid_offsets(
    shuffle: Shuffle, *, rows: int, epochs: int, lines: int, together: bool = False
) -> float:
    """Two places of one grid line keep their distance, modulo its length, as often as by chance.

    The statistic a Feistel network is weakest in (Patarin 2001). Each two rounds more divide the
    excess by the shorter side; pairs that also land `together` in one line show a fifth round.
    """
    a, b = sides_of(rows)
    line, column = np.divmod(np.arange(lines * a), a)
    kept = 0
    block = max(1, min(epochs, 2**20 // line.size))
    for seed in range(epochs // block):
        found = shuffle(rows, epochs=block, places=np.arange(lines * a), seed=seed)
        group = np.arange(block)[:, None] * lines + line  # [E, P]
        group = group * b + found // a if together else group
        met = np.unique(group * a + (found - column) % a, return_counts=True)[1]
        kept += int((met * (met - 1) // 2).sum())
    pairs = epochs // block * block * lines * comb(a, 2)
    chance = (1 if together else b) / (rows - 1)
    return (kept - pairs * chance) / sqrt(pairs * chance * (1 - chance))


# ---- the table ----


class Trial(NamedTuple):
    """A statistic at one size."""

    name: str
    rows: int
    deviate: Callable[[Shuffle], float]


def trials() -> list[Trial]:
    """Every line of the table."""
    found: list[Trial] = []

    def add(name: str, statistic: Callable[..., float], rows: int, **options: int) -> None:
        found.append(Trial(name, rows, partial(statistic, rows=rows, **options)))

    for rows in (2, 3, 4, 5):
        add(f"all {rows}! orders", every_order, rows, epochs=60_000)
    for rows in (9, 25, 49):
        add("sign of the permutation", sign, rows, epochs=10_000)
    for rows, epochs in ((16, 40_000), (100, 10_000)):
        add("row by place", row_by_place, rows, epochs=epochs)
    for apart in (1, 12):
        add(f"rows of two places, {apart} apart", two_places, 24, epochs=60_000, apart=apart)
    for rows, epochs in ((1000, 1000), (10**6, 2)):
        add("order kept (Spearman)", order_kept, rows, epochs=epochs)
        add("ascents", ascents, rows, epochs=epochs)
        add("same place in the next epoch", same_place_again, rows, epochs=epochs)
    for rows, epochs, batch in ((1000, 20_000, 50), (10_000, 3000, 250)):
        for tenth, words in enumerate(("the first tenth", "every tenth row")):
            add(
                f"batch of {batch}, class is {words}",
                batch_composition,
                rows,
                epochs=epochs,
                batch=batch,
                every_tenth=tenth,
            )
    for rows in (1000, 10**6, 10**9, 10**12):
        places = min(rows, 100_000)
        add("correlation with the next epoch", next_epoch, rows, epochs=8, places=places)
        add("correlation with the next seed", next_seed, rows, epochs=8, places=places)
    for rows in (10**6, 10**9, 10**12):
        add("pairs of neighbours", serial_pairs, rows, epochs=8, places=100_000)
        add("serial correlation", serial_correlation, rows, epochs=2, places=25_000)
    for rows, epochs, lines in (
        (64, 16_384, 8),
        (1024, 2048, 32),
        (10**6, 12, 1000),
        (10**9, 1, 50),
        (10**12, 1, 1),
    ):
        add("grid offsets", grid_offsets, rows, epochs=epochs, lines=lines)
    for rows, epochs, lines in ((64, 16_384, 8), (1024, 2048, 32), (10**6, 12, 1000)):
        add("grid offsets, together", grid_offsets, rows, epochs=epochs, lines=lines, together=1)
    return found


def line_of(trial: Trial) -> str:
    """The table's line of one statistic, as the p-values of each shuffle."""
    shuffles: list[Shuffle | None] = [
        ours,
        randperm if trial.rows <= 10**6 else None,  # it would have to list the permutation
        *(partial(ours, rounds=rounds) for rounds in (6, 4, 2)),
    ]
    cells = [f"{p_value(trial.deviate(s)):.2g}" if s else "-" for s in shuffles]
    rounds = rounds_for(sides_of(trial.rows))
    return " | ".join(["", trial.name, f"{trial.rows:,}", str(rounds), *cells, ""]).strip()


def main() -> None:
    """Print the table."""
    print("| statistic | rows | rounds | ours, p | randperm, p | 6 rounds | 4 rounds | 2 rounds |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|")
    start = time.perf_counter()
    for trial in trials():
        print(line_of(trial), flush=True)
    print(f"\n{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
