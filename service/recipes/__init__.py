"""The included jobs: each one is a file and a spec."""

from __future__ import annotations

import os.path
from importlib import resources
from pathlib import Path

from service.basics.errors import SpecError, did_you_mean


def recipes() -> dict[str, str]:
    """The name of each recipe, and the first line of its spec, which describes it."""
    found = {}
    for path in sorted(_directory().glob("*.yaml")):
        first = path.read_text(encoding="utf-8").partition("\n")[0]
        found[path.stem] = first.removeprefix("#").strip()
    return found


def find_recipe(spec: str) -> Path:
    """The file that `spec` names: a path, or a recipe if it is only a name.

    Raises:
        SpecError: there is no recipe of this name.
    """
    if "/" in spec or "." in spec:
        return Path(spec)
    path = _directory() / f"{spec}.yaml"
    if not os.path.exists(path):  # False also for a name that is too long for a file
        near = did_you_mean(spec, recipes())
        raise SpecError(f"there is no recipe {spec!r} (a file is ./{spec}.yaml){near}")
    return path


def _directory() -> Path:
    return Path(str(resources.files(__name__)))
