"""A run's directory: what stands where in it, who may write to it, and what it remembers."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import secrets
import socket
import subprocess
import sys
import time
import weakref
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import IO, Any

from service.durable import replace_file
from service.errors import SpecError
from service.spec import Spec
from service.spec_file import changes, dump_spec, load_spec

FORMAT = 1


@dataclass(frozen=True)
class RunDirectory:
    """The places of one run."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def spec(self) -> Path:
        return self.path / "spec.yaml"

    @property
    def facts(self) -> Path:
        return self.path / "run.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def receipt(self) -> Path:
        return self.path / "receipt.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def wandb(self) -> Path:
        return self.path / "wandb"

    def read_facts(self) -> dict[str, Any]:
        """What run.json says.

        Raises:
            SpecError: it is missing or unreadable.
        """
        try:
            facts = json.loads(self.facts.read_text())
        except (OSError, ValueError) as error:
            raise SpecError(f"{self.facts} cannot be read: {error}.") from error
        if not isinstance(facts, dict) or facts.get("format") != FORMAT:
            raise SpecError(f"{self.facts} is not a run of this version of evenstep.")
        return facts

    def write_facts(self, facts: dict[str, Any]) -> None:
        """Replace run.json, in one piece."""
        replace_file(self.facts, json.dumps(facts, indent=1) + "\n")


@dataclass
class OpenRun:
    """A run that this process alone writes to, until it is closed."""

    directory: RunDirectory
    facts: dict[str, Any]
    _lock: IO[str] = field(repr=False)

    @property
    def id(self) -> str:
        """Names the run where names are shared, such as on W&B."""
        return str(self.facts["id"])

    def start_attempt(self, *, processes: int, device: str, step: int) -> None:
        """Enter that the run goes on from `step`."""
        self.facts["state"] = "running"
        self.facts["attempts"].append(
            {
                "started": time.time(),
                "processes": processes,
                "device": device,
                "host": socket.gethostname(),
                "from_step": step,
            }
        )
        self.directory.write_facts(self.facts)

    def end_attempt(self, state: str, *, step: int) -> None:
        """Enter how the attempt ended: done, stopped or failed."""
        self.facts["state"] = state
        self.facts["attempts"][-1] |= {"ended": time.time(), "to_step": step, "outcome": state}
        self.directory.write_facts(self.facts)

    def close(self) -> None:
        """Let others have it."""
        self._lock.close()


def open_run(runs: Path, spec: Spec, *, fresh: bool) -> OpenRun:
    """Open the run that `spec` names, or begin it.

    Args:
        fresh: put an earlier run of this name aside and begin anew.
    Raises:
        SpecError: the directory is not a run's, another process has it open, or the spec
            differs from the one it was begun with in a way that changes the result.
    """
    directory = RunDirectory(runs / spec.name)
    try:
        directory.path.mkdir(parents=True, exist_ok=True)
        lock = _lock(directory)
        if fresh and directory.facts.exists():
            _put_aside(directory)
            lock.close()
            directory.path.mkdir(parents=True)
            lock = _lock(directory)
        if directory.facts.exists():
            return OpenRun(directory, _taken_up(directory, spec), lock)
        _require_empty(directory)
        facts = _first_facts(spec)
        directory.logs.mkdir(exist_ok=True)
        directory.spec.write_text(dump_spec(spec), encoding="utf-8")
        directory.write_facts(facts)
    except OSError as error:
        raise _unusable(directory, error) from error
    return OpenRun(directory, facts, lock)


def check_run(runs: Path, spec: Spec, *, fresh: bool) -> None:
    """Raise what `open_run` would raise, without touching anything.

    Raises:
        SpecError: see `open_run`.
    """
    directory = RunDirectory(runs / spec.name)
    try:
        _require_free(directory)
        if directory.facts.exists():
            if not fresh:
                _taken_up(directory, spec)
        elif directory.path.exists():
            _require_empty(directory)
    except OSError as error:
        raise _unusable(directory, error) from error


def _unusable(directory: RunDirectory, error: OSError) -> SpecError:
    return SpecError(
        f"The run directory {directory.path} cannot be used: {error.strerror}. "
        "Choose another with --runs or --name."
    )


def _lock(directory: RunDirectory) -> IO[str]:
    lock = open(directory.path / ".lock", "a+")  # noqa: SIM115  # held as long as the run is open
    _claim(lock, directory)
    # A child that is forked later, such as a data-loader worker, would hold the lock for as long
    # as it lives: where this process is killed, longer than the run may wait for its next attempt.
    held = weakref.ref(lock)
    os.register_at_fork(after_in_child=lambda: _let_go(held()))
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}")
    lock.flush()
    return lock


def _claim(lock: IO[str], directory: RunDirectory) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        holder = lock.read().strip() or "another process"
        lock.close()
        raise SpecError(
            f"{directory.path} is being written by {holder}. Wait for it, or stop it; "
            "to begin a second run of this spec, give it a --name of its own."
        ) from None


def _let_go(lock: IO[str] | None) -> None:
    if lock is not None:
        lock.close()  # of the copy in this process; the lock itself stays with the first


def _require_free(directory: RunDirectory) -> None:
    """Refuse a run that another process writes before anything of it is started."""
    path = directory.path / ".lock"
    if path.exists():
        with path.open() as lock:
            _claim(lock, directory)


def _taken_up(directory: RunDirectory, spec: Spec) -> dict[str, Any]:
    facts = directory.read_facts()
    differences = changes(load_spec(directory.spec), spec)
    if differences:
        raise SpecError(
            f"{directory.path} was begun with another spec:\n  "
            + "\n  ".join(differences)
            + "\nGo on with the old values, give this run a --name of its own, or begin again "
            "with --fresh."
        )
    return facts


def _require_empty(directory: RunDirectory) -> None:
    strangers = [entry.name for entry in directory.path.iterdir() if entry.name != ".lock"]
    if strangers:
        raise SpecError(
            f"{directory.path} is not a run: it has no run.json, but holds "
            f"{', '.join(sorted(strangers)[:5])}. Choose another --runs or --name."
        )


def _put_aside(directory: RunDirectory) -> None:
    stamp = time.strftime("%Y%m%d-%H%M%S")
    aside = directory.path.with_name(f".{directory.name}-{stamp}-{secrets.token_hex(2)}")
    os.rename(directory.path, aside)


def _first_facts(spec: Spec) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "id": os.environ.get("WANDB_RUN_ID") or f"{spec.name}-{secrets.token_hex(4)}",
        "created": time.time(),
        "state": "new",
        "command": sys.argv[1:],
        "versions": versions(),
        "git": git_facts(),
        "attempts": [],
    }


def versions() -> dict[str, str]:
    """Of Python and of the packages that decide a result."""
    found = {"python": platform.python_version()}
    for package in ("evenstep", "torch", "numpy", "accelerate", "safetensors", "wandb"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue  # an optional one, or evenstep from a source tree
    return found


def git_facts() -> dict[str, Any]:
    """Commit and uncommitted changes of the directory a run is started in, if it is a checkout."""

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", *words], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    if commit is None:
        return {}
    diff = git("diff", "HEAD") or ""
    return {"commit": commit.strip(), "dirty": bool(diff), "diff": diff[:200_000]}
