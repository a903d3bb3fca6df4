"""Runs `make test` in fresh checkouts, each under a condition that other machines bring along.

python tests/fresh_machine.py                                  every condition, one after the other
python tests/fresh_machine.py --conditions timezone,user       these
python tests/fresh_machine.py --together user,locale,spaces    all of these at once, as one round
python tests/fresh_machine.py --conditions busy -- tests/test_stops.py -k test_pass
                                                               with words for pytest

The tests of `make test-services` run with it. It checks out what is committed. A condition that
needs what this machine lacks is told and left out. Everything is kept for a look where a condition
failed, and removed where it did not.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NOBODY = 65534
NAMELESS = 54321
"""A user that no file names, as in a pod: it has no login name and no home."""


@dataclass(frozen=True)
class Machine:
    """How a round differs from a plain one."""

    folder: str = "evenstep"
    is_repository: bool = True
    environ: Mapping[str, str] = field(default_factory=dict)
    before: tuple[str, ...] = ()
    """What the command is started by."""
    user: int | None = None
    umask: int = 0o022
    slow_fsync_seconds: float = 0.0
    busy_loops: int = 0
    is_online: bool = True

    def with_environ(self, **added: str) -> Machine:
        return replace(self, environ={**self.environ, **added})


def _plain(machine: Machine) -> Machine:
    return machine


def _user(machine: Machine) -> Machine:
    return replace(machine, user=NOBODY)


def _nameless(machine: Machine) -> Machine:
    return replace(machine, user=NAMELESS)


def _timezone(machine: Machine) -> Machine:
    return machine.with_environ(TZ="Asia/Kolkata")


def _locale(machine: Machine) -> Machine:
    return machine.with_environ(LC_ALL="C", LANG="C")


def _core(machine: Machine) -> Machine:
    return replace(machine, before=(*machine.before, "taskset", "-c", "0"))


def _spaces(machine: Machine) -> Machine:
    return replace(machine, folder="even step, here")


def _no_repository(machine: Machine) -> Machine:
    return replace(machine, is_repository=False)


def _slow_disk(machine: Machine) -> Machine:
    return replace(machine, slow_fsync_seconds=0.1)


def _busy(machine: Machine) -> Machine:
    return replace(machine, busy_loops=2)


def _umask(machine: Machine) -> Machine:
    return replace(machine, umask=0o077)


def _terminal(machine: Machine) -> Machine:
    """What a desktop's shell exports, where CI exports none of it."""
    return machine.with_environ(TERM="xterm-256color", COLUMNS="50", LINES="12", FORCE_COLOR="1")


def _background(machine: Machine) -> Machine:
    """As a script starts it with `&`, or a person with nohup."""
    ignoring = ("sh", "-c", """trap '' INT HUP && exec "$@\"""", "sh")
    return replace(machine, before=(*ignoring, *machine.before))


def _homeless(machine: Machine) -> Machine:
    return machine.with_environ(HOME="/proc/nowhere")


def _offline(machine: Machine) -> Machine:
    alone = ("unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh")
    return replace(machine, before=(*alone, *machine.before), is_online=False)


CONDITIONS = {
    "plain": (_plain, "nothing but a fresh clone"),
    "user": (_user, "another user (nobody), who may do nothing that root may"),
    "nameless": (_nameless, "a user with a number and no name"),
    "timezone": (_timezone, "TZ=Asia/Kolkata"),
    "locale": (_locale, "LC_ALL=C"),
    "core": (_core, "one core (taskset -c 0)"),
    "spaces": (_spaces, "a checkout path with spaces"),
    "norepo": (_no_repository, "an exported tree that is no git repository"),
    "slowdisk": (_slow_disk, "each fsync takes 0.1 s longer (a preloaded library)"),
    "busy": (_busy, "two endless loops beside it (yes >/dev/null)"),
    "umask": (_umask, "umask 077"),
    "homeless": (_homeless, "a HOME that is not there and cannot be made"),
    "offline": (_offline, "no network but the loopback; needs --packages-of"),
    "background": (_background, "SIGINT and SIGHUP ignored, as in the background of a script"),
    "terminal": (_terminal, "a terminal's variables: TERM, COLUMNS=50, FORCE_COLOR"),
}


class NotHere(Exception):
    """This machine lacks what a condition needs."""


def lacking(machine: Machine, asked: argparse.Namespace) -> str | None:
    """What this machine lacks for it, in words."""
    if not machine.is_online and asked.packages_of is None:
        return "without a network nothing can be installed; give --packages-of"
    if not machine.is_online and os.geteuid() != 0:
        return "only root may take the network away"
    if machine.user is not None and os.geteuid() != 0:
        return "only root may become another user"
    needed = [word for word in ("taskset", "unshare") if word in machine.before]
    needed += [] if machine.is_online else ["ip"]
    needed += ["setpriv"] if machine.user is not None else []
    needed += ["cc"] if machine.slow_fsync_seconds else []
    needed += ["git", "make", *(["yes"] if machine.busy_loops else [])]
    missing = [name for name in needed if shutil.which(name) is None]
    return f"needs {', '.join(missing)}" if missing else None


# ---- a checkout and its packages


def checked_out(place: Path, machine: Machine) -> Path:
    """A fresh checkout of what is committed."""
    tree = place / machine.folder
    if machine.is_repository:
        _do("git", "clone", "--quiet", "--no-hardlinks", ROOT, tree)
        return tree
    tree.mkdir()
    _do("git", "-C", ROOT, "archive", "--output", place / "tree.tar", "HEAD")
    _do("tar", "-x", "-f", place / "tree.tar", "-C", tree)
    return tree


def lend_packages(tree: Path, lender: Path, machine: Machine) -> None:
    """Set up .venv with the packages of another one: in seconds instead of minutes."""
    venv = tree / ".venv"
    _own(tree, machine)
    # By the user of the round: what is python3 to one, another may not be allowed to start.
    _do(*_become(machine), "python3", "-m", "venv", "--without-pip", venv, cwd=tree)
    (own,) = venv.glob("lib/python3*/site-packages")
    (theirs,) = lender.resolve().glob("lib/python3*/site-packages")
    if own.parent.name != theirs.parent.name:
        raise NotHere(f"{lender} has the packages of another Python")
    (own / "lent.pth").write_text(f"{tree}\n{theirs}\n")
    for script in (lender / "bin").iterdir():
        is_python = script.name.startswith(("python", "activate", "Activate"))
        if script.is_symlink() or script.is_dir() or is_python:
            continue
        first, _, rest = script.read_bytes().partition(b"\n")
        if first.startswith(b"#!"):  # by way of a shell: a path with spaces cannot stand after #!
            start = f"#!/bin/sh\n'''exec' \"{venv}/bin/python3\" \"$0\" \"$@\"\n' '''\n"
            (venv / "bin" / script.name).write_bytes(start.encode() + rest)
        else:
            shutil.copy(script, venv / "bin")
        (venv / "bin" / script.name).chmod(0o755)
    (venv / ".ready").touch()


def _do(*words: object, cwd: Path | str | None = None) -> None:
    subprocess.run([str(word) for word in words], cwd=cwd, check=True)


# ---- a round


@dataclass(frozen=True)
class Seen:
    """What came of a round."""

    name: str
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    minutes: float = 0.0
    told: str = ""
    """Why there was none, or which tests failed."""

    @property
    def is_bad(self) -> bool:
        return self.failed > 0 or bool(self.told)

    def row(self) -> str:
        if self.told and not self.passed + self.failed:
            return f"| {self.name} | - | - | - | {self.minutes:.1f} | {self.told} |"
        counts = f"{self.passed} | {self.failed} | {self.skipped}"
        return f"| {self.name} | {counts} | {self.minutes:.1f} | {self.told} |"


def a_round(name: str, machine: Machine, asked: argparse.Namespace) -> Seen:
    """`make test` and the tests of services, in one go, under the condition."""
    missing = lacking(machine, asked)
    if missing is not None:
        return Seen(name, told=f"not run: {missing}")
    place = Path(tempfile.mkdtemp(prefix="evenstep-fresh-", dir=asked.place))
    place.chmod(0o755)
    (place / "home").mkdir()
    began = time.monotonic()
    try:
        tree = checked_out(place, machine)
        if asked.packages_of is not None:
            lend_packages(tree, asked.packages_of, machine)
        _own(place, machine)
    except (NotHere, subprocess.CalledProcessError) as error:
        return Seen(name, told=f"not run: {error}")
    report = place / "home" / "report.xml"
    environ = _environ(place, machine, [f"--junitxml={report}", *asked.words])
    with beside(machine), (place / "output").open("wb") as output:
        code = subprocess.run(
            _command(machine, asked),
            cwd=tree,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            umask=machine.umask,
            start_new_session=True,
        ).returncode
    minutes = (time.monotonic() - began) / 60
    seen = counted(name, report, minutes)
    if code != 0 and not seen.failed:
        seen = replace(seen, told=f"make ended with {code}: {place}/output")
    elif seen.failed:
        seen = replace(seen, told=f"{seen.told}: {place}/output")
    elif not asked.keep:
        shutil.rmtree(place)
    return seen


def _command(machine: Machine, asked: argparse.Namespace) -> list[str]:
    target = "tests" if asked.without_check else "test"
    return [*machine.before, *_become(machine), "make", target, "CHOSEN=not matrix"]


def _become(machine: Machine) -> list[str]:
    if machine.user is None:
        return []
    return ["setpriv", f"--reuid={machine.user}", f"--regid={machine.user}", "--clear-groups"]


def _own(tree: Path, machine: Machine) -> None:
    """Give the tree to the user of the round."""
    if machine.user is not None:
        _do("chown", "-R", f"{machine.user}:{machine.user}", tree)


def _environ(place: Path, machine: Machine, words: Sequence[str]) -> dict[str, str]:
    """What a login has, and how pip finds packages: the rest of this shell is of this machine."""
    kept = ("PATH", "LANG", "LC_ALL", "TZ", "TMPDIR", "XDG_CONFIG_DIRS")
    found = {k: v for k, v in os.environ.items() if k in kept or k.startswith("PIP_")}
    found |= {"HOME": str(place / "home"), "PYTEST_ADDOPTS": shlex.join(words)}
    if machine.slow_fsync_seconds:
        library = place / "slow_fsync.so"
        source = ROOT / "tests/slow_fsync.c"
        _do("cc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl")
        found |= {
            "LD_PRELOAD": str(library),
            "SLOW_FSYNC_SECONDS": str(machine.slow_fsync_seconds),
        }
    return found | dict(machine.environ)


@contextmanager
def beside(machine: Machine) -> Iterator[None]:
    """Keep so many cores busy meanwhile."""
    loops = [
        subprocess.Popen(["yes"], stdout=subprocess.DEVNULL) for _ in range(machine.busy_loops)
    ]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def counted(name: str, report: Path, minutes: float) -> Seen:
    """The numbers of pytest's own report; none where there is no report."""
    if not report.exists():
        return Seen(name, minutes=minutes)
    passed, skipped = 0, 0
    bad: list[str] = []
    for case in ElementTree.parse(report).iter("testcase"):
        ends = {child.tag for child in case}
        if ends & {"failure", "error"}:
            bad.append(f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}")
        elif "skipped" in ends:
            skipped += 1
        else:
            passed += 1
    return Seen(name, passed, len(bad), skipped, minutes, ", ".join(bad))


def table(seen: Sequence[Seen], commit: str) -> str:
    """All rounds, as Markdown."""
    about = [
        time.strftime("%Y-%m-%d", time.gmtime()),
        commit,
        f"Python {platform.python_version()}",
        f"{platform.system()} {platform.release()}, {os.cpu_count()} cores",
    ]
    head = "| condition | passed | failed | skipped | minutes | |"
    return "\n".join([", ".join(about), "", head, f"|{'---|' * 6}", *(one.row() for one in seen)])


def _names(text: str) -> list[str]:
    names = text.split(",")
    strange = [name for name in names if name not in CONDITIONS]
    if strange:
        raise argparse.ArgumentTypeError(f"there is no {strange[0]!r}; {', '.join(CONDITIONS)}")
    return names


def main() -> int:
    meaning = "\n".join(f"  {name:10} {told}" for name, (_, told) in CONDITIONS.items())
    words = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"conditions:\n{meaning}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    which = words.add_mutually_exclusive_group()
    which.add_argument("--conditions", type=_names, default=list(CONDITIONS), metavar="A,B")
    which.add_argument("--together", type=_names, metavar="A,B", help="all of them in one round")
    words.add_argument("--packages-of", type=Path, metavar="VENV", help="take its packages")
    words.add_argument("--without-check", action="store_true", help="no ruff and mypy")
    words.add_argument("--place", type=Path, help="where the checkouts go; /tmp otherwise")
    words.add_argument("--keep", action="store_true", help="keep what passed, too")
    words.add_argument("words", nargs="*", metavar="-- PYTEST", help="words for pytest")
    asked = words.parse_args()
    if subprocess.run(["git", "-C", str(ROOT), "diff", "--quiet", "HEAD"]).returncode:
        print("Left out: what is not committed.", file=sys.stderr)
    rounds = [[name] for name in asked.conditions] if asked.together is None else [asked.together]
    words_of_git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(words_of_git, capture_output=True, text=True, check=True).stdout.strip()
    seen = []
    for names in rounds:
        machine = Machine()
        for name in names:
            machine = CONDITIONS[name][0](machine)
        seen.append(a_round(", ".join(names), machine, asked))
        print(seen[-1].row(), flush=True)
    print(f"\n{table(seen, commit)}")
    return int(any(one.is_bad for one in seen))


if __name__ == "__main__":
    sys.exit(main())
