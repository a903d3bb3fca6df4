"""The settings of a sweep, one for each job of an array. Pure."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

from service.basics.errors import SpecError

Settings = tuple[str, ...]
"""Overrides of the spec, `key=value`."""
_MOST = 1000
"""Slurm's own limit, MaxArraySize, is 1001 unless a cluster has another."""


def settings_of(sweep: Sequence[str]) -> list[Settings]:
    """Every combination of `optimizer.lr=0.1,0.2` and `seed=1,2`; none where nothing is swept.

    A comma in brackets or braces belongs to its value.

    Raises:
        SpecError: one of them is no key with values, a key comes twice, or there are too many.
    """
    choices: list[list[str]] = []
    keys: list[str] = []
    for text in sweep:
        key, equals, values = (part.strip() for part in text.partition("="))
        if not key or not equals or not values:
            raise SpecError(f"--sweep: must be KEY=VALUE,VALUE, but is {text!r}.")
        if key in keys:
            raise SpecError(f"--sweep: {key} is swept twice; give all its values at once.")
        keys.append(key)
        choices.append([f"{key}={value.strip()}" for value in _values(values)])
    found = list(itertools.product(*choices)) if choices else []
    if len(found) > _MOST:
        raise SpecError(
            f"--sweep: {len(found):,} combinations are more than an array of {_MOST:,} jobs. "
            "Sweep over fewer values."
        )
    return found


def _values(text: str) -> list[str]:
    depth, found = 0, [""]
    for piece in re.findall(r"[\[\]{},]|[^\[\]{},]+", text):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(piece, 0)
        if piece == "," and depth == 0:
            found.append("")
        else:
            found[-1] += piece
    return found
