"""Which row is used when, if not each once per epoch: weights, mixtures, a curriculum.  Pure.

Everything is a function of (seed, position), as in the plain shuffle: so the rows are the same at
any number of processes, and no state is kept.  No torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import lru_cache
from math import gcd, lcm
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from service.basics.errors import SpecError, did_you_mean
from service.basics.randomness import SAMPLE, key, keys
from service.plan.samplers import permuted, rows_at

_BLOCKS, _SOURCE, _WEIGHTS, _STAGE = range(4)  # the purposes of keys in this domain
_LONGEST_BLOCK = 2**20
_SHOWN = 8


class Sampling(Protocol):
    """Chooses the training rows."""

    def over(self, rows: int, sources: Mapping[str, int]) -> Sampling:
        """The same for a data set with this many rows, and this many of each named source in it.

        Raises:
            SpecError: it does not match them.
        """
        ...

    def rows_at(
        self, positions: NDArray[np.int64], *, seed: int, global_batch: int
    ) -> NDArray[np.int64]:
        """The row numbers at any positions of the endless sequence.  # [P]"""
        ...

    def in_words(self, drawn: int, *, global_batch: int) -> list[str]:
        """How often rows are used among the first `drawn` ones: lines of text for the user."""
        ...

    def digest(self) -> str:
        """Equal for samplings that choose the same rows."""
        ...


def _digest(kind: str, *parts: bytes) -> str:
    return hashlib.sha256(b"\0".join([kind.encode(), *parts])).hexdigest()


@dataclass(frozen=True)
class Shuffled(Sampling):
    """Each row once per epoch, as without a sampling."""

    rows: int = 0

    def over(self, rows: int, sources: Mapping[str, int]) -> Shuffled:
        return replace(self, rows=rows)

    def rows_at(
        self, positions: NDArray[np.int64], *, seed: int, global_batch: int
    ) -> NDArray[np.int64]:
        return rows_at(positions, rows=self.rows, seed=seed)

    def in_words(self, drawn: int, *, global_batch: int) -> list[str]:
        return [f"each of {self.rows:,} rows {drawn / self.rows:.3g} times"]

    def digest(self) -> str:
        return _digest("shuffled")


@dataclass(frozen=True, eq=False)
class Weighted(Sampling):
    """Rows in proportion to their weights.

    In an epoch of N rows a row of weight w is used N * w / sum(w) times, rounded down or up: the
    N draws are evenly spaced positions in the cumulative weights, from one random start.  So
    equal weights use each row once.  The order in which weights are cumulated, the start and the
    order of the draws are new in each epoch.
    Source: systematic sampling, Madow, Annals of Mathematical Statistics 20 (1949), 333-354.
    """

    weights: NDArray[np.float64]
    labels: Sequence[tuple[str, int, float]] = ()
    """With balanced classes: name, rows and the weight of one row of each."""
    classes: NDArray[np.int64] | None = None
    """With balanced classes: the class of each row.  Classes are cumulated one after the other, so
    that each class is used equally often in every epoch, rounded down or up."""

    def over(self, rows: int, sources: Mapping[str, int]) -> Weighted:
        if len(self.weights) != rows:
            what = "balanced has the labels" if self.labels else "weighted has the weights"
            raise SpecError(
                f"task.sampling: {what} of {len(self.weights):,} rows, and the training data has "
                f"{rows:,}. Give one for each row, in their order."
            )
        return self

    def rows_at(
        self, positions: NDArray[np.int64], *, seed: int, global_batch: int
    ) -> NDArray[np.int64]:
        rows = len(self.weights)
        epochs = positions // rows
        found = np.empty_like(positions)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            found[here] = self._of_epoch(positions[here] - epoch * rows, epoch, seed=seed)
        return found

    def _of_epoch(self, places: NDArray[np.int64], epoch: int, *, seed: int) -> NDArray[np.int64]:
        rows = len(self.weights)
        order, ends = _cumulated(self, epoch, seed)
        mixed = permuted(places, rows=rows, keys=_one(_WEIGHTS, seed, epoch, 1))
        start = key(SAMPLE, seed, _WEIGHTS, epoch, 2) / 2**63
        at = (mixed + start) * (ends[-1] / rows)
        # Below the end, which rounding could reach: there is no row after it.
        chosen = np.searchsorted(ends, np.minimum(at, np.nextafter(ends[-1], 0)), side="right")
        found: NDArray[np.int64] = order[chosen]
        return found

    def in_words(self, drawn: int, *, global_batch: int) -> list[str]:
        times = self.weights * (drawn / self.weights.sum())
        if self.labels:
            lines = [
                f"{name}: {rows:,} rows, each {weight * drawn / self.weights.sum():.3g} times"
                for name, rows, weight in self.labels[:_SHOWN]
            ]
            more = len(self.labels) - _SHOWN
            return [f"{len(self.labels)} classes equally often", *lines] + (
                [f"and {more} more classes"] if more > 0 else []
            )
        never = int((times == 0).sum())
        least, middle, most = (np.quantile(times[times > 0], q) for q in (0, 0.5, 1))
        told = f"by weight: a row {least:.3g} to {most:.3g} times, median {middle:.3g}"
        return [told + (f"; {never:,} rows never" if never else "")]

    def digest(self) -> str:
        of_classes = b"" if self.classes is None else self.classes.tobytes()
        return _digest("weighted", self.weights.tobytes(), of_classes)


@lru_cache(maxsize=4)
def _cumulated(
    sampling: Weighted, epoch: int, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The order of the rows in this epoch, and the cumulative weight at the end of each."""
    numbers = np.arange(len(sampling.weights), dtype=np.int64)
    order = permuted(numbers, rows=len(numbers), keys=_one(_WEIGHTS, seed, epoch, 0))
    if sampling.classes is not None:
        order = order[np.argsort(sampling.classes[order], kind="stable")]
    return order, np.cumsum(sampling.weights[order])


@dataclass(frozen=True)
class Proportions(Sampling):
    """Rows of several sources in given proportions; each source has its own epochs."""

    parts: Mapping[str, int]
    """For each source, how many of `total` successive rows belong to it."""
    sizes: Mapping[str, int] = field(default_factory=dict)
    """Rows of each source, in their order in the data set."""

    @property
    def total(self) -> int:
        """The length of one block of positions, in which the proportions are exact."""
        return sum(self.parts.values())

    def over(self, rows: int, sources: Mapping[str, int]) -> Proportions:
        if not sources:
            raise SpecError(
                "task.sampling: proportions need named data sets. Give them as train="
                f"{{{', '.join(f'{name!r}: ...' for name in self.parts)}}}."
            )
        for name in self.parts:
            if name not in sources:
                raise SpecError(
                    f"task.sampling: proportions name {name!r}, which is none of the training "
                    f"data{did_you_mean(name, sources)}"
                )
        missing = [name for name in sources if name not in self.parts]
        if missing:
            raise SpecError(
                f"task.sampling: proportions do not include {missing[0]!r}. "
                "Give it a number; 0 leaves it out."
            )
        empty = [name for name, size in sources.items() if self.parts[name] and not size]
        if empty:
            raise SpecError(
                f"task.sampling: the training data {empty[0]!r} have no rows, and a part of "
                f"{self.parts[empty[0]]} of {self.total}. Give them 0, or rows."
            )
        return replace(self, sizes=dict(sources))

    def rows_at(
        self, positions: NDArray[np.int64], *, seed: int, global_batch: int
    ) -> NDArray[np.int64]:
        # Every block of `total` positions has the required number of rows of each source, in its
        # own order.
        blocks, places = np.divmod(positions, self.total)
        mixed = permuted(places, rows=self.total, keys=keys(SAMPLE, seed, _BLOCKS, numbers=blocks))
        found = np.empty_like(positions)
        first_row = first_slot = 0
        for number, (name, size) in enumerate(self.sizes.items()):
            part = self.parts[name]
            here = (mixed >= first_slot) & (mixed < first_slot + part)
            turns = blocks[here] * part + (mixed[here] - first_slot)
            of_source = key(SAMPLE, seed, _SOURCE, number)
            if turns.size:
                found[here] = first_row + rows_at(turns, rows=size, seed=of_source)
            first_row, first_slot = first_row + size, first_slot + part
        return found

    def in_words(self, drawn: int, *, global_batch: int) -> list[str]:
        return [
            f"{name}: {self.parts[name] / self.total:.4g} of the rows, "
            f"{drawn * self.parts[name] / self.total / max(size, 1):.3g} passes over its {size:,}"
            for name, size in self.sizes.items()
        ]

    def digest(self) -> str:
        return _digest("proportions", repr((list(self.parts.items()), self.sizes)).encode())


@dataclass(frozen=True)
class Stages(Sampling):
    """One sampling after the other, each from its first step on."""

    each: tuple[tuple[int, Sampling], ...]

    def over(self, rows: int, sources: Mapping[str, int]) -> Stages:
        return Stages(tuple((step, part.over(rows, sources)) for step, part in self.each))

    def rows_at(
        self, positions: NDArray[np.int64], *, seed: int, global_batch: int
    ) -> NDArray[np.int64]:
        found = np.empty_like(positions)
        firsts = np.array([step * global_batch for step, _ in self.each])
        stages = np.searchsorted(firsts, positions, side="right") - 1
        for number, (_, part) in enumerate(self.each):
            here = stages == number
            if here.any():
                own = seed if number == 0 else key(SAMPLE, seed, _STAGE, number)
                found[here] = part.rows_at(
                    positions[here] - firsts[number], seed=own, global_batch=global_batch
                )
        return found

    def in_words(self, drawn: int, *, global_batch: int) -> list[str]:
        lines = []
        ends = [*(step * global_batch for step, _ in self.each[1:]), drawn]
        for (step, part), end in zip(self.each, ends, strict=True):
            rows = min(end, drawn) - step * global_batch
            if rows <= 0:
                lines.append(f"from step {step:,}: never, because the run ends earlier")
                continue
            said = part.in_words(rows, global_batch=global_batch)
            lines += [f"from step {step:,}, {said[0]}", *said[1:]]
        return lines

    def digest(self) -> str:
        return _digest("stages", *(f"{step}:{part.digest()}".encode() for step, part in self.each))


def _one(*parts: int) -> NDArray[np.int64]:
    purpose, seed, *rest = parts
    return np.array([key(SAMPLE, seed, purpose, *rest)], np.int64)


# ---- the functions for tasks


def shuffled() -> Sampling:
    """Each row once per epoch; for a stage of a curriculum."""
    return Shuffled()


def weighted(weights: Any) -> Sampling:
    """Rows in proportion to these weights, one for each training row, from 0 up.

    Raises:
        SpecError: they are not such numbers.
    """
    try:
        values = np.asarray(weights, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise SpecError(
            f"task.sampling: weighted takes one number for each row ({error})."
        ) from error
    if values.ndim != 1:
        raise SpecError(
            f"task.sampling: weighted takes one weight for each row, but has {list(values.shape)}."
        )
    if not np.isfinite(values).all() or (values < 0).any() or not values.any():
        raise SpecError(
            "task.sampling: weights must be finite numbers from 0 up, and not all 0, but they are "
            f"{values.min():g} to {values.max():g}."
            if values.size
            else "task.sampling: weighted has no weights."
        )
    return Weighted(values)


def balanced(labels: Any) -> Sampling:
    """Every class equally often, by the label of each training row.

    Raises:
        SpecError: they are not a list of labels.
    """
    try:
        values = np.asarray(labels)
        names, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    except (TypeError, ValueError) as error:  # lists of unequal lengths, or texts mixed with None
        raise SpecError(
            f"task.sampling: balanced takes one label for each row, all of one kind ({error})."
        ) from error
    if values.ndim != 1 or not values.size:
        raise SpecError(
            f"task.sampling: balanced takes one label for each row, but has {list(values.shape)}."
        )
    told = [(str(n), int(c), 1 / int(c)) for n, c in zip(names, counts, strict=True)]
    return Weighted((1 / counts)[which], tuple(told), which.astype(np.int64))


def proportions(parts: Mapping[str, float]) -> Sampling:
    """Rows of named data sets in these proportions: `{"web": 0.7, "books": 0.3}`.

    Raises:
        SpecError: they are not numbers from 0 up, or have too many digits.
    """
    is_known = isinstance(parts, Mapping) and bool(parts)
    if not is_known or not all(_is_share(part) for part in parts.values()):
        raise SpecError(
            "task.sampling: proportions must be finite numbers from 0 up, by the names of data "
            f"sets, but are {parts!r}."
        )
    exact = {name: Fraction(str(part)) for name, part in parts.items()}
    scale = lcm(*(part.denominator for part in exact.values()))
    whole = {name: int(part * scale) for name, part in exact.items()}
    common = gcd(*whole.values())
    if not common:
        raise SpecError("task.sampling: proportions are all 0, so no row can be chosen.")
    whole = {name: part // common for name, part in whole.items()}
    if sum(whole.values()) > _LONGEST_BLOCK:
        raise SpecError(
            f"task.sampling: the proportions {dict(parts)!r} are exact only after "
            f"{sum(whole.values()):,} rows. Round them, for example to 0.001."
        )
    return Proportions(whole)


def _is_share(part: object) -> bool:
    is_number = isinstance(part, int | float) and not isinstance(part, bool)
    return is_number and 0 <= part < float("inf")  # type: ignore[operator]  # it is a number


def stages(each: Mapping[int, Sampling]) -> Sampling:
    """A curriculum: the sampling that applies from each step on, starting with step 0.

    Raises:
        SpecError: a step is not a whole number, or the first is not 0.
    """
    steps = sorted(step for step in each if type(step) is int)
    if len(steps) != len(each) or not steps or steps[0] != 0:
        raise SpecError(
            "task.sampling: stages must be samplings by the finished steps from which on they "
            "apply, "
            f"and the first one must be 0, but they are {list(each)!r}."
        )
    for step in steps:
        if not hasattr(each[step], "rows_at"):
            raise SpecError(
                f"task.sampling: the stage from step {step} on is a {type(each[step]).__name__}. "
                "Write weighted(weights), balanced(labels), proportions({...}) or shuffled()."
            )
    return Stages(tuple((step, each[step]) for step in steps))
