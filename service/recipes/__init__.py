"""The jobs that ship: each one file and one spec."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from service.basics.errors import SpecError, did_you_mean


def recipes() -> dict[str, str]:
    """The name of each recipe, and the first line of its spec: what it is about."""
    found = {}
    for path in sorted(_directory().glob("*.yaml")):
        first = path.read_text(encoding="utf-8").partition("\n")[0]
        found[path.stem] = first.removeprefix("#").strip()
    return found


def find_recipe(spec: str) -> Path:
    """The file that `spec` means: itself, or a recipe's where it is only a name.

    Raises:
        SpecError: it is the name of no recipe.
    """
    if "/" in spec or "." in spec:
        return Path(spec)
    path = _directory() / f"{spec}.yaml"
    if not path.exists():
        near = did_you_mean(spec, recipes())
        raise SpecError(f"there is no recipe {spec!r} (a file is ./{spec}.yaml){near}")
    return path


def _directory() -> Path:
    return Path(str(resources.files(__name__)))
