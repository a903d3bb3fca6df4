"""The global random generators of Python, numpy and torch."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Protocol

import numpy as np
import torch


class Seeded(Protocol):
    """A generator that can be seeded, as those of torch."""

    def manual_seed(self, seed: int, /) -> object: ...


def seed_generators(key: int) -> None:
    """Seed the global generators of Python, numpy and torch (CPU) with `key`, in [0, 2**63)."""
    random.seed(key)
    np.random.seed(key & 0xFFFFFFFF)
    torch.default_generator.manual_seed(key)


@contextmanager
def generators_given_back() -> Iterator[None]:
    """A context that restores these three, and those of the devices in use, at its end."""
    python, numpy, own = random.getstate(), np.random.get_state(), torch.get_rng_state()
    kind = torch.accelerator.current_accelerator()
    module: Any = None if kind is None else torch.get_device_module(kind)
    # If no device was used yet, there is nothing to restore, and a query would initialize it.
    in_use = module is not None and getattr(module, "is_initialized", lambda: False)()
    devices = module.get_rng_state_all() if in_use else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(own)
        if devices is not None:
            module.set_rng_state_all(devices)


class Global(Seeded, Protocol):
    """One of Python's and numpy's global generators."""

    marked: ClassVar[float]
    """What it draws first after it was seeded with `_MARK`."""

    def draw(self) -> float:
        """A number in [0, 1)."""


# A seed that no program uses by itself.
_MARK: Final = 0x6D61726B


@dataclass(frozen=True)  # equal, also after it was pickled
class _Python:
    marked: ClassVar[float] = random.Random(_MARK).random()

    def manual_seed(self, seed: int, /) -> None:
        random.seed(seed)

    def draw(self) -> float:
        return random.random()


@dataclass(frozen=True)
class _Numpy:
    marked: ClassVar[float] = np.random.RandomState(_MARK).random_sample()

    def manual_seed(self, seed: int, /) -> None:
        np.random.seed(seed & 0xFFFFFFFF)

    def draw(self) -> float:
        return np.random.random_sample()


_PYTHON, _NUMPY = _Python(), _Numpy()


def python_and_numpy() -> list[Global]:
    """The global generators of Python and of numpy."""
    return [_PYTHON, _NUMPY]


def seeding_without(unused: Sequence[Global]) -> Callable[[int], object]:
    """A function that seeds the generators of `seed_generators`, except these."""
    seeds: list[Callable[[int], object]] = [torch.default_generator.manual_seed]
    seeds += [each.manual_seed for each in python_and_numpy() if each not in unused]
    if len(seeds) == 1:
        return seeds[0]

    def seed(key: int) -> None:
        for of_one in seeds:
            of_one(key)

    return seed


@contextmanager
def noticing_draws() -> Iterator[list[Global]]:
    """Yields a list; afterwards it has Python's and numpy's generators, if they were used."""
    drawn: list[Global] = []
    python, numpy = random.getstate(), _place(np.random.get_state())
    yield drawn
    if random.getstate() != python:
        drawn.append(_PYTHON)
    if _place(np.random.get_state()) != numpy:
        drawn.append(_NUMPY)


@contextmanager
def noticing_use(generators: Sequence[Global]) -> Iterator[list[Global]]:
    """Yields a list; afterwards, also after an error, it has those generators that were used.

    At a tenth of the cost of `noticing_draws`, because their states are not kept.
    """
    used: list[Global] = []
    for each in generators:
        each.manual_seed(_MARK)
    try:
        yield used
    finally:
        used += [each for each in generators if each.draw() != each.marked]


def _place(state: object) -> list[object]:
    """The state of numpy as comparable values."""
    assert isinstance(state, tuple), "numpy's legacy state"
    return [part.tobytes() if isinstance(part, np.ndarray) else part for part in state]
