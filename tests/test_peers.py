"""The comparison with other trainers, of which one may be installed and not work."""

from __future__ import annotations

import importlib
import os
import re
import sys
from pathlib import Path

import pytest
from commands import ROOT, command

from benchmarks import peers
from benchmarks.by_hand import ByHand

BROKEN = {
    "another version": ("from torch import no_such_name", "ImportError: cannot import name"),
    "another python": ("import os; os.no_such_name", "AttributeError: module 'os' has no"),
    "several lines": ("raise RuntimeError('a | b\\nc')", r"RuntimeError: a \| b c"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_trainer_that_fails_to_import_is_a_row_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    code, told = BROKEN[kind]
    (tmp_path / "broken_trainer.py").write_text(code + "\n")
    monkeypatch.syspath_prepend(tmp_path)

    def train(hand: ByHand, passes: int) -> peers.Turns:
        importlib.import_module("broken_trainer")
        raise AssertionError("it cannot be imported")

    peer = peers.Peer("broken_trainer", train, peers.test_with_accelerate)
    row = peers.line("broken", peer, pairs=1)
    assert row.startswith(f"| broken | not measured: {told}")
    assert "\n" not in row
    assert len(re.findall(r"(?<!\\)\|", row)) == 6, "five cells"


@pytest.mark.slow
def test_every_trainer_is_measured_or_says_why_not(tmp_path: Path) -> None:
    """One is installed and broken, and one is here because Evenstep needs it."""
    (tmp_path / "ignite.py").write_text("import os\nos.no_such_name\n")
    environ = {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    words = (sys.executable, "-m", "benchmarks.peers", "--pairs", 1, "--only", "i")
    done = command(*words, cwd=tmp_path, timeout=300, **environ)
    assert done.returncode == 0, done.stderr
    rows = {cells[1].strip(" *"): cells[2:-1] for cells in map(split, done.stdout.splitlines())}
    assert rows["ignite"][0].startswith(" not measured: AttributeError")
    assert rows["Evenstep"][-1] == " yes "


def split(line: str) -> list[str]:
    return re.split(r"(?<!\\)\|", line)


def test_its_install_line_names_every_package() -> None:
    asked = re.search(r"pip install (.*)", peers.__doc__ or "")
    assert asked is not None
    names = {"ignite": "pytorch-ignite"}
    assert {names.get(p.package, p.package) for p in peers.PEERS.values()} <= {*asked[1].split()}
