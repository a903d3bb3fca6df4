"""The global random generators of Python, numpy and torch."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

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


class _Python:
    def manual_seed(self, seed: int, /) -> None:
        random.seed(seed)


class _Numpy:
    def manual_seed(self, seed: int, /) -> None:
        np.random.seed(seed & 0xFFFFFFFF)


def python_and_numpy() -> list[Seeded]:
    """The global generators of Python and of numpy."""
    return [_Python(), _Numpy()]


@contextmanager
def noticing_draws() -> Iterator[list[Seeded]]:
    """Yields a list; afterwards it has Python's and numpy's generators, if they were used."""
    drawn: list[Seeded] = []
    python, numpy = random.getstate(), _place(np.random.get_state())
    yield drawn
    if random.getstate() != python:
        drawn.append(_Python())
    if _place(np.random.get_state()) != numpy:
        drawn.append(_Numpy())


def _place(state: object) -> list[object]:
    """The state of numpy as comparable values."""
    assert isinstance(state, tuple), "numpy's legacy state"
    return [part.tobytes() if isinstance(part, np.ndarray) else part for part in state]
