"""The settings of a sweep, one for each run. Pure."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

from service.basics.errors import SpecError

Settings = tuple[str, ...]
"""Overrides of the spec, `key=value`."""
_MOST = 1000
"""Slurm's own limit, MaxArraySize, is 1001 unless a cluster has another."""
_RANGE = re.compile(r"(-?\d{1,15})\.\.(-?\d{1,15})")


def settings_of(sweep: Sequence[str], *, option: str = "--sweep: ") -> list[Settings]:
    """Every combination of `optimizer.lr=0.1,0.2` and `seed=1..3`; none if nothing is swept.

    A range of whole numbers has both its ends. A comma in brackets, braces or quotes belongs to
    its value.

    Args:
        option: the start of messages.
    Raises:
        SpecError: one of them is not a key with values, a key occurs twice, or there are too many.
    """
    choices: dict[str, list[str]] = {}
    for text in sweep:
        key, equals, values = (part.strip() for part in text.partition("="))
        if not key or not equals or not values:
            raise SpecError(f"{option}must be KEY=VALUE,VALUE, but is {text!r}.")
        if key in choices:
            raise SpecError(f"{option}{key} is swept twice; give all its values at once.")
        if not all(part.strip() for part in _values(values)):
            raise SpecError(f"{option}{text}: a value is empty. Remove the comma, or write null.")
        found = [value for part in _values(values) for value in _range(part.strip(), text, option)]
        choices[key] = [f"{key}={value}" for value in found]
    count = 1
    for values_of_key in choices.values():
        count *= len(values_of_key)
    if count > _MOST:
        raise SpecError(
            f"{option}{count:,} combinations are more than {_MOST:,} runs. Sweep over fewer values."
        )
    for found in choices.values():
        repeated = next((text for text in found if found.count(text) > 1), None)
        if repeated is not None:
            raise SpecError(f"{option}{repeated} is given twice.")
    return list(itertools.product(*choices.values())) if choices else []


def _range(value: str, text: str, option: str) -> list[str]:
    found = _RANGE.fullmatch(value)
    if not found:
        return [value]
    first, last = int(found[1]), int(found[2])
    if not first <= last < first + _MOST:
        raise SpecError(
            f"{option}{text}: the range {value} must go up, over at most {_MOST:,} whole numbers."
        )
    return [str(number) for number in range(first, last + 1)]


def _values(text: str) -> list[str]:
    depth, found = 0, [""]
    for piece in re.findall(r"\"[^\"]*\"|'[^']*'|[\[\]{},]|[^\[\]{},\"']+|[\"']", text):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(piece, 0)
        if piece == "," and depth == 0:
            found.append("")
        else:
            found[-1] += piece
    return found
