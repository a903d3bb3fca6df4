"""The pinned packages."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import distributions

from commands import ROOT
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name


def test_all_can_be_installed_on_the_oldest_python() -> None:
    """A pinned version that a newer Python could install has failed on that of Debian 12."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (oldest,) = (each.version for each in SpecifierSet(project["requires-python"]))
    pinned = re.findall(r"(?m)^([\w.-]+)==", (ROOT / "constraints.txt").read_text())
    needed = {
        canonicalize_name(found.metadata["Name"]): found.metadata["Requires-Python"]
        for found in distributions()
    }
    here = {name: needed[name] for name in map(canonicalize_name, pinned) if needed.get(name)}
    assert len(here) > 100
    refused = {n: asked for n, asked in here.items() if not SpecifierSet(asked).contains(oldest)}
    assert not refused
