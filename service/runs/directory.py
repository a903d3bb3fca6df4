"""The directory of a run: its layout, its lock, and its metadata (run.json)."""

from __future__ import annotations

import fcntl
import getpass
import hashlib
import json
import os
import platform
import re
import secrets
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib import metadata
from pathlib import Path
from typing import IO, Any, TypeGuard

from service.basics.atomic_files import (
    in_the_way,
    is_there,
    is_utf_8,
    kind_of_unread,
    make_directory,
    plain,
    read_bytes,
    read_json,
    replace_file,
    told_when_unread,
    told_when_unwritten,
    without_link,
)
from service.basics.errors import (
    EvenstepError,
    NoCheckpoint,
    NoProgress,
    SpecError,
    did_you_mean,
    printable,
)
from service.basics.running_time import TimeLimit
from service.plan.changing import (
    NOTHING_ACCEPTED,
    Accepted,
    Change,
    changes,
    told_of_lines,
    why_not,
)
from service.runs.failure_reports import is_secret, redacted, redacted_code
from service.runs.goodput import account_of, failures_in_a_row
from service.spec.documents import LARGEST_FILE_BYTES, values_in
from service.spec.files import Override, dump_spec, load_spec, with_files_where_they_are
from service.spec.models import Spec

FORMAT = 1
LOCK_SECONDS = 2.0
"""How long the children of a killed process may still hold the lock of its run."""
_LONGEST_ROW = 65536  # bytes
_MOST_OF_A_DIFF = 200_000  # bytes
_GIT_SECONDS = 10.0
_LONGEST_HOLDER = 300  # characters
_LARGEST_BYTES = 8 << 20  # of run.json with thousands of attempts, or of a heartbeat
LATEST_TIME = 253_402_300_800.0
"""The end of the year 9999 in seconds since 1970: an upper limit for timestamps."""
_NUMBERS_OF_A_BEAT = ("rank", "time", "started", "step", "standing_seconds", "longest_save_seconds")


class RunInUse(SpecError):
    """Another process has the run open."""


@dataclass(frozen=True)
class RunDirectory:
    """The paths of one run."""

    path: Path

    @property
    def name(self) -> str:
        """The name of the run."""
        return self.path.name

    @cached_property
    def spec(self) -> Path:
        """`spec.yaml`, the resolved spec."""
        return self.path / "spec.yaml"

    @cached_property
    def facts(self) -> Path:
        """`run.json`, the metadata of the run."""
        return self.path / "run.json"

    @cached_property
    def metrics(self) -> Path:
        """`metrics.jsonl`, one row per logged step."""
        return self.path / "metrics.jsonl"

    @property
    def receipt(self) -> Path:
        """`receipt.jsonl`, the digests of the rows."""
        return self.path / "receipt.jsonl"

    @property
    def checkpoints(self) -> Path:
        """The directory of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def logs(self) -> Path:
        """The logs of ranks other than 0."""
        return self.path / "logs"

    @property
    def profile(self) -> Path:
        """The traces of `--profile`."""
        return self.path / "profile"

    @property
    def logged(self) -> Path:
        """Images, texts, histograms and files that the task's hooks have logged."""
        return self.path / "logged"

    @cached_property
    def failures(self) -> Path:
        """The failure reports of all processes."""
        return self.path / "failures"

    @property
    def wandb(self) -> Path:
        """The files of W&B."""
        return self.path / "wandb"

    @property
    def tensorboard(self) -> Path:
        """The event files of TensorBoard."""
        return self.path / "tensorboard"

    def read_facts(self) -> dict[str, Any]:
        """The content of run.json.

        Raises:
            SpecError: it is missing or unreadable.
        """
        try:
            facts = read_json(self.facts, at_most=_LARGEST_BYTES)
        except FileNotFoundError as error:
            what = "is not a run: it has no run.json" if self.path.exists() else "does not exist"
            raise SpecError(f"{self.path} {what}. Name a run's directory.") from error
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            raise SpecError(f"{self.facts} cannot be read: {why}.") from error
        if not isinstance(facts, dict) or facts.get("format") != FORMAT:
            raise SpecError(f"{self.facts} was not written by this version of evenstep.")
        if not _is_whole(facts):
            raise SpecError(f"{self.facts} is damaged. Restore a good copy, or use --fresh.")
        return facts

    def read_spec(self, overrides: Iterable[Override] = ()) -> Spec:
        """The spec of the run; paths of files that moved together with the run are corrected.

        Raises:
            SpecError: see `load_spec`.
        """
        begun_at = self.read_facts().get("place")
        spec = load_spec(self.regular_spec(), overrides=overrides)
        if not isinstance(begun_at, str):  # from an earlier version
            return spec
        return with_files_where_they_are(spec, old=begun_at, new=os.path.abspath(self.path))

    def read_spec_values(self) -> dict[str, Any]:
        """The values of `spec.yaml`, without checking them; see `regular_spec`.

        Raises:
            SpecError: it is missing, not a regular file, or not YAML.
        """
        with told_when_unread(self.spec):
            content = read_bytes(self.spec, at_most=LARGEST_FILE_BYTES)
        return values_in(content, source=str(self.spec))

    def regular_spec(self) -> Path:
        """`spec.yaml`, if it is a regular file: a user may name a pipe, a run must not wait for it.

        Raises:
            SpecError: it is something else, or missing.
        """
        with told_when_unread(self.spec):
            os.close(plain(self.spec, os.O_RDONLY))
        return self.spec

    def write_facts(self, facts: dict[str, Any]) -> None:
        """Replace run.json atomically.

        Raises:
            EvenstepError: it cannot be written; the old file is unchanged.
        """
        with told_when_unwritten(self.facts):
            # Readable by its owner only: the diff and the command may contain unknown secrets.
            replace_file(self.facts, json.dumps(facts, indent=1) + "\n", mode=0o600)


def with_name(path: Path) -> Path:
    """The path such that its name and its parent are those of the directory, also of `.`."""
    return path.resolve() if path.name in ("", "..") else path


def find_run(path: Path) -> RunDirectory:
    """The run in a directory, or the run of that name in `runs/`.

    Raises:
        SpecError: it does not exist; suggests the most similar name.
    """
    with told_when_unread(path):
        for place in (path, Path("runs") / path):
            if is_there(place / "run.json"):
                return RunDirectory(with_name(place))
        if path.exists():
            raise SpecError(f"{path} is not a run: it has no run.json.")
        parent = path.parent if path.parent != Path() else Path("runs")
        known = [entry.parent.name for entry in parent.glob("*/run.json")]
    raise SpecError(f"There is no run {path}{did_you_mean(path.name, known) or '.'}")


@dataclass
class OpenRun:
    """A run that is locked by this process until it is closed."""

    directory: RunDirectory
    facts: dict[str, Any]
    _lock: IO[str] = field(repr=False)
    changed: Sequence[Change] = ()
    """The changes of its spec in this attempt."""

    @property
    def id(self) -> str:
        """Unique name of the run, for W&B."""
        return str(self.facts["id"])

    def start_attempt(
        self,
        *,
        processes: int,
        device: str,
        step: int,
        started: float | None = None,
        data: str | None = None,
        most_failures: int | None = None,
        task_files: Mapping[str, str] | None = None,
    ) -> None:
        """Record that an attempt starts at `step`.

        Args:
            started: when the attempt began, in seconds since 1970; now by default.
            data: a description of the data path, for the user.
            most_failures: the limit of consecutive attempts that did not get beyond `step`.
            task_files: SHA-256 of the files of the task's code, by name.
        Raises:
            NoProgress: the limit is reached.
        """
        attempts = self.facts["attempts"]
        # The last save of an attempt that was killed can be newer than its last logged row.
        if attempts and attempts[-1].get("outcome") == "lost":
            attempts[-1]["to_step"] = max(attempts[-1]["to_step"], step)
        failures = failures_in_a_row(attempts, step)
        self.facts["state"] = "running"
        attempts.append(
            {
                "started": time.time() if started is None else started,
                "processes": processes,
                "device": device,
                "host": socket.gethostname(),
                "from_step": step,
                **({"data": data} if data is not None else {}),
                **({"task_files": dict(task_files)} if task_files else {}),
            }
        )
        if most_failures is not None and failures >= most_failures:
            self.end_attempt("gave up", step=step)
            raise NoProgress(
                f"{failures} consecutive attempts failed without a new checkpoint after step "
                f"{step}. "
                f"Their reports are in {self.directory.failures}. When the cause is removed, run "
                "the same command again; faults.attempts_without_progress is the limit."
            )
        self.directory.write_facts(self.facts)

    def changed_files(self, task_files: Mapping[str, str]) -> list[str]:
        """The files of the task's code that changed since the last attempt."""
        known = [each["task_files"] for each in self.facts["attempts"] if each.get("task_files")]
        if not known or not task_files or not isinstance(known[-1], dict):
            return []
        before = known[-1]
        # A name without .py is that of a module elsewhere. In a notebook some may be loaded that
        # the task does not use, so that they come and go: only a change counts.
        names = [
            name
            for name in sorted({*before, *task_files})
            if name.endswith(".py") or (name in before and name in task_files)
        ]
        return [name for name in names if before.get(name) != task_files.get(name)]

    def end_attempt(
        self,
        state: str,
        *,
        step: int,
        seconds: Mapping[str, float] | None = None,
        longest_save_seconds: float = 0.0,
    ) -> None:
        """Record how the attempt ended (done, stopped, failed, gave up) and its times."""
        self.facts["state"] = state
        self.facts["attempts"][-1] |= {
            "ended": time.time(),
            "to_step": step,
            "outcome": state,
            "seconds": dict(seconds or {}),
            "longest_save_seconds": round(longest_save_seconds, 3),
        }
        self.facts["account"] = account_of(self.facts["attempts"])
        self.directory.write_facts(self.facts)

    def require_never_saved(self) -> None:
        """If no checkpoint is found, refuse to start over a run that once had one.

        Raises:
            NoCheckpoint: earlier attempts recorded a checkpoint.
        """
        for attempt in self.facts["attempts"]:
            had_saved = attempt["outcome"] in ("done", "stopped") and attempt["to_step"]
            if had_saved or attempt["from_step"]:
                raise NoCheckpoint(
                    f"There is no checkpoint in {self.directory.checkpoints}, but the run had one "
                    f"at step {attempt['to_step'] if had_saved else attempt['from_step']}. "
                    "Restore it, or start over with --fresh."
                )

    def enter_done(self) -> None:
        """Record that the run is done, if its last attempt saved everything but could not.

        Raises:
            EvenstepError: it cannot be recorded now either.
        """
        if self.facts["state"] == "running":
            self.facts["state"] = self.facts["attempts"][-1]["outcome"] = "done"
            self.facts["account"] = account_of(self.facts["attempts"])
            self.directory.write_facts(self.facts)

    def enter_changes(self, spec: Spec, *, step: int) -> None:
        """Record in run.json and spec.yaml the changes from `step` on, and their author.

        Earlier changes that an older checkpoint has undone also start at `step`.

        Raises:
            EvenstepError: they cannot be written.
        """
        known = changes_in(self.facts)
        known = [each | {"step": min(each["step"], step)} for each in known]
        text = dump_spec(spec)
        if self.changed:
            known.append(change_entry(self.changed, step=step, text=text))
        if known == changes_in(self.facts):
            return
        # In this order: if the process is killed between the two, the hash shows that the entry has
        # no effect.
        self.facts["changes"] = known
        self.directory.write_facts(self.facts)
        if self.changed:
            with told_when_unwritten(self.directory.spec):
                replace_file(self.directory.spec, text)

    def close_lost_attempt(self) -> None:
        """Record what is known about an attempt that was killed."""
        attempts = self.facts["attempts"]
        if not attempts or "ended" in attempts[-1]:
            return
        last = attempts[-1]
        beat = read_beat(self.directory.logs, 0) or {}
        known = beat if beat.get("started") == last["started"] else {}
        last |= {
            "ended": max(last["started"], known.get("time", 0.0)),
            "to_step": max(last["from_step"], known.get("step", 0), self._last_row()),
            "outcome": "lost",
            "seconds": known.get("seconds", {}),
            "longest_save_seconds": known.get("longest_save_seconds", 0.0),
        }

    def _last_row(self) -> int:
        """The step of the last complete row of metrics, or 0."""
        if not self.directory.metrics.exists():
            return 0
        with open(self.directory.metrics, "rb", opener=plain) as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _LONGEST_ROW))
            lines = file.read().split(b"\n")[:-1]
        try:
            return int(json.loads(lines[-1])["step"]) if lines else 0
        except (ValueError, KeyError):
            return 0  # no row yet, or no complete row in the part that was read

    def close(self) -> None:
        """Release the lock."""
        self._lock.close()


def changes_in(facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The changes of the run after its start, from run.json."""
    return list(facts.get("changes", ()))


def change_entry(changed: Sequence[Change], *, step: int, text: str) -> dict[str, Any]:
    """One entry of `changes_in`: who changed what after `step` finished steps.

    Args:
        text: the current spec, as written to spec.yaml.
    """
    return {
        "step": step,
        "time": time.time(),
        "by": _person(),
        "command": redacted(sys.argv[1:]),
        "keys": [change._asdict() for change in changed],
        "spec_sha256": hashlib.sha256(text.encode()).hexdigest(),
    }


def change_in_words(entry: Mapping[str, Any]) -> str:
    """One entry of `changes_in`, as text."""
    keys = "; ".join(str(Change(**key)) for key in entry["keys"])
    return f"changed after step {entry['step']:,} by {entry['by']}: {keys}"


def _are_changes(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(entry, dict)
        and is_number(entry.get("step"))
        and is_number(entry.get("time"), LATEST_TIME)
        and isinstance(entry.get("by"), str)
        and isinstance(entry.get("keys"), list)
        and all(
            isinstance(key, dict)
            and key.keys() == {"key", "was", "now"}
            and all(isinstance(word, str) for word in key.values())
            for key in entry["keys"]
        )
        for entry in value
    )


def _person() -> str:
    """The user and the machine of this process."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # in a container, the user may have no name
        user = f"user {os.getuid()}"
    return f"{user}@{socket.gethostname()}"


def is_number(value: Any, below: float = 2**53) -> TypeGuard[float]:
    """Whether it is a number from 0 to a limit, such as a step or a duration."""
    return isinstance(value, int | float) and 0 <= value < below


def _is_whole(facts: Mapping[str, Any]) -> bool:
    """Whether it has the format of run.json: attempts, the last of which may be unfinished."""
    told = facts.get("attempts")
    if not isinstance(told, list) or not all(isinstance(attempt, dict) for attempt in told):
        return False
    is_last_ended = bool(told) and "ended" in told[-1]
    ended = told if is_last_ended else told[:-1]
    words = [facts.get("id"), facts.get("state"), *(each.get("outcome") for each in ended)]
    times = [facts.get("created", 0.0), *(each.get("started") for each in told)]
    times += [each.get("ended") for each in ended]
    steps = [each.get("from_step") for each in told] + [each.get("to_step") for each in ended]
    account = facts.get("account", {})
    return (
        all(isinstance(word, str) for word in words)
        and all(is_number(moment, LATEST_TIME) for moment in times)
        and all(map(is_number, steps))
        and all(_are_seconds(each.get("seconds", {})) for each in told)
        and isinstance(facts.get("versions", {}), dict)
        and isinstance(facts.get("command", []), list)
        and isinstance(facts.get("git", {}), dict)
        and _are_changes(facts.get("changes", []))
        and isinstance(account, dict)
        and _are_seconds(account.get("seconds", {}))
        and all(is_number(account.get(key, 0)) for key in ("steps_again", "goodput"))
    )


def _are_seconds(value: Any) -> bool:
    return isinstance(value, dict) and all(map(is_number, value.values()))


def read_beat(directory: Path, rank: int) -> dict[str, Any] | None:
    """The last heartbeat of that rank, in this attempt or an earlier one."""
    try:
        beat = read_json(directory / f"rank-{rank}.beat", at_most=_LARGEST_BYTES)
    except (OSError, ValueError):
        return None  # it has not written any
    whole = isinstance(beat, dict) and isinstance(beat.get("seconds"), dict)
    whole = whole and all(isinstance(beat.get(key), int | float) for key in _NUMBERS_OF_A_BEAT)
    return beat if whole else None


def open_run(
    runs: Path, spec: Spec, *, fresh: bool, accepted: Accepted = NOTHING_ACCEPTED
) -> OpenRun:
    """Open the run that `spec` names, or create it.

    Args:
        fresh: move an earlier run of this name aside and start over.
        accepted: the allowed differences between the spec and that of the run.
    Raises:
        SpecError: the directory is not a run, another process has it open, or the spec
            differs from that of the run in a way that changes the result and is not accepted, or
            that the run's state does not support.
    """
    directory = RunDirectory(runs / spec.name)
    require_no_secret(spec)
    _require_utf_8(directory)
    with ExitStack() as stack:
        try:
            lock = stack.enter_context(lock_of(directory))
            if fresh and directory.facts.exists():
                _put_aside(directory)
                before, lock = lock, stack.enter_context(lock_of(directory))
                before.close()
            opened = _opened(directory, spec, lock, accepted)
        except OSError as error:
            raise _unusable(directory, error) from error
        stack.pop_all()  # it stays open with the run
    return opened


def _opened(directory: RunDirectory, spec: Spec, lock: IO[str], accepted: Accepted) -> OpenRun:
    """The existing run, or a new one."""
    _require_no_link(directory)
    if _is_begun(directory):
        facts, changed = _taken_up(directory, spec, accepted)
        _drop_unwritten_change(facts, directory)
        opened = OpenRun(directory, facts, lock, changed)
        opened.close_lost_attempt()
        return opened
    _require_empty(directory)
    facts = first_facts(spec, directory)
    # In this order: if it is killed between two of these, the next attempt starts over.
    directory.write_facts(facts)
    make_directory(directory.logs)
    replace_file(directory.spec, dump_spec(spec))
    return OpenRun(directory, facts, lock)


def _drop_unwritten_change(facts: dict[str, Any], directory: RunDirectory) -> None:
    """Drop a change that was recorded by a process that was killed before it wrote the spec."""
    known = changes_in(facts)
    if known and "spec_sha256" in known[-1]:
        written = hashlib.sha256(directory.spec.read_bytes()).hexdigest()
        if known[-1]["spec_sha256"] != written:
            facts["changes"] = known[:-1]


def check_run(
    runs: Path,
    spec: Spec,
    *,
    fresh: bool,
    accepted: Accepted = NOTHING_ACCEPTED,
    lock_seconds: float | None = LOCK_SECONDS,
) -> None:
    """Raise the errors of `open_run`, without changing anything.

    Args:
        lock_seconds: how long another process may still have the run open; None: it may at any
            time, because this process will not write the run.
    Raises:
        SpecError: see `open_run`.
        RunInUse: another process has the run open.
        EvenstepError: the disk does not respond now.
    """
    directory = RunDirectory(runs / spec.name)
    require_no_secret(spec)
    _require_utf_8(directory)
    try:
        if lock_seconds is not None:
            _require_free(directory, lock_seconds)
        _require_no_link(directory)
        if _is_begun(directory):
            if not fresh:
                _taken_up(directory, spec, accepted)
        elif directory.path.exists():
            _require_empty(directory)
    except OSError as error:
        raise _unusable(directory, error) from error


def require_no_secret(spec: Spec) -> None:
    """Refuse a spec with a secret, which spec.yaml and every tracker would reveal.

    Raises:
        SpecError: names the key.
    """
    pods = dict(spec.kubernetes.env) if spec.kubernetes else {}
    pods |= _named_values(spec.kubernetes.pod_template) if spec.kubernetes else {}
    pods |= spec.slurm.env if spec.slurm else {}
    for place, value in _texts(spec.model_dump(mode="json")):
        if is_secret(value, os.environ | pods):
            better = "Let the task read it from the environment."
            if place.startswith("kubernetes."):
                better = (
                    "Keep it in a Secret, which the pods can read as a file: kubernetes.mounts, or "
                    "kubernetes.wandb_secret for the key of W&B; or as a variable: "
                    "kubernetes.env_from."
                )
            if place.startswith("slurm."):
                better = (
                    "sbatch passes on the environment in which the job is submitted; or keep it in "
                    "a file that only you can read, such as WANDB_API_KEY_FILE."
                )
            raise SpecError(
                f"{place} contains a secret, which spec.yaml would show to everybody who can read "
                f"the run. {better}"
            )


_ARGUMENT = re.compile(r"-{0,2}([\w-]+)=\S{8,}")


def _named_values(value: Any) -> dict[str, str]:
    """The variables in a pod template: each `{name: ..., value: ...}`, at any depth.

    And the arguments of commands, such as `--api-key=...`: each as a whole, by its name.
    """
    if isinstance(value, str):
        argument = _ARGUMENT.fullmatch(value)
        return {argument[1].replace("-", "_"): value} if argument else {}
    if isinstance(value, list):
        return {k: v for each in value for k, v in _named_values(each).items()}
    if not isinstance(value, dict):
        return {}
    inner = {k: v for each in value.values() for k, v in _named_values(each).items()}
    match value:
        case {"name": str(name), "value": str(text)}:
            return {**inner, name: text}
    return inner


def _texts(value: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """Every text in a nested value, with its key."""
    if isinstance(value, str):
        yield place, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _texts(inner, f"{place}.{key}" if place else str(key))
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            yield from _texts(inner, f"{place}[{number}]")


def _unusable(directory: RunDirectory, error: OSError) -> EvenstepError:
    kind = kind_of_unread(error)
    told = f"The run directory {directory.path} cannot be used: {in_the_way(error)}."
    return kind(f"{told} Choose another with --runs or --name." if kind is SpecError else told)


def _require_utf_8(directory: RunDirectory) -> None:
    """Refuse a place whose checkpoints could be written and never read: safetensors opens no other.

    Raises:
        SpecError: a name in the path has other bytes.
    """
    place = os.path.abspath(directory.path)
    if not is_utf_8(place):
        raise SpecError(
            f"{printable(place)}: this path is not valid UTF-8, so no checkpoint in it could be "
            "read again. Choose another with --runs."
        )


def _require_no_link(directory: RunDirectory) -> None:
    """Refuse a run with a link as one of its parts: its target may belong to something else."""
    parts = (directory.checkpoints, directory.logs, directory.failures, directory.profile)
    for part in (*parts, directory.wandb, directory.tensorboard, directory.logged):
        if part.is_symlink():
            raise SpecError(
                f"{part} is a link, and a run is not written through links. Replace it by its "
                "target, or move the whole run elsewhere with --runs."
            )


def _is_begun(directory: RunDirectory) -> bool:
    return directory.facts.exists() and directory.spec.exists()


def lock_of(directory: RunDirectory) -> IO[str]:
    """Take the lock of a directory, which is held until this file is closed.

    Raises:
        RunInUse: another process has it.
    """
    path = directory.path / ".lock"
    while True:
        directory.path.mkdir(parents=True, exist_ok=True)
        # Held while the run is open; opened for writing, which NFS requires for a lock.
        lock = os.fdopen(without_link(path, os.O_RDWR | os.O_CREAT), "r+", errors="replace")
        _claim(lock, directory)
        if _is_in_its_place(lock, path):
            break
        lock.close()
    # A child that is forked later, such as a data-loader worker, would hold the lock for as long
    # as it lives: after a kill, this could delay the next attempt for too long.
    held = weakref.ref(lock)
    os.register_at_fork(after_in_child=lambda: _let_go(held()))
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}")
    lock.flush()
    return lock


def _is_in_its_place(lock: IO[str], path: Path) -> bool:
    """Whether this is still the lock of the run: a waiting process may get it after --fresh has
    moved the run aside with its lock, while another process starts a new run at the same path."""
    try:
        return os.path.samestat(os.fstat(lock.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def _claim(lock: IO[str], directory: RunDirectory, seconds: float = LOCK_SECONDS) -> None:
    if not _locked_in_time(lock, seconds):
        lock.seek(0)
        holder = printable(lock.read(_LONGEST_HOLDER).strip()) or "another process"
        lock.close()
        raise RunInUse(
            f"{directory.path} is being written by {holder}. Wait for it, or stop it; "
            "to start a second run of this spec, give it its own --name."
        )


def _let_go(lock: IO[str] | None) -> None:
    if lock is not None:
        lock.close()  # closes this copy only; the first one still holds the lock


def _require_free(directory: RunDirectory, seconds: float) -> None:
    """Refuse a run that another process has open, before anything starts."""
    path = directory.path / ".lock"
    if path.exists():
        with os.fdopen(without_link(path, os.O_RDWR), "r+", errors="replace") as lock:
            _claim(lock, directory, seconds)


def _locked_in_time(lock: IO[str], seconds: float) -> bool:
    limit = TimeLimit(seconds)
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not limit.left:
                return False
            time.sleep(0.05)
        else:
            return True


def _taken_up(
    directory: RunDirectory, spec: Spec, accepted: Accepted
) -> tuple[dict[str, Any], list[Change]]:
    """The metadata of the run, and the changes of its spec.

    Raises:
        SpecError: a change was not requested, or is not possible in a run.
    """
    facts = directory.read_facts()
    held = directory.read_spec()
    found = changes(held, spec)
    unasked = [change for change in found if not accepted.covers(change)]
    if unasked:
        raise SpecError(_unasked_in_words(directory, facts, unasked, asked=bool(accepted.keys)))
    fixed = told_of_fixed(found, held)
    if fixed:
        raise SpecError(
            f"{directory.path} does not allow these changes:{fixed}\n"
            "Give a new run its own --name, or start over with --fresh."
        )
    return facts, found


def told_of_fixed(found: Sequence[Change], held: Spec) -> str:
    """The changes of the spec `held` that a run does not support, each with the reason."""
    told = [f"\n  {change}\n    {why}" for change in found if (why := why_not(change, held))]
    return "".join(told)


def _unasked_in_words(
    directory: RunDirectory, facts: Mapping[str, Any], unasked: Sequence[Change], *, asked: bool
) -> str:
    earlier = changes_in(facts)
    since = f" (as it was {change_in_words(earlier[-1])})" if earlier else ""
    first = unasked[0]
    how = "name these keys too" if asked else f"change it from here on: --change {first.key}=..."
    return (
        f"{directory.path} was started with another spec{since}:{told_of_lines(unasked)}\n"
        f"Continue with the old values; or {how}, or --accept-changes for all of them; or "
        "give this run its own --name; or start over with --fresh."
    )


def _require_empty(directory: RunDirectory) -> None:
    begun = {".lock", ".run.json.partial"}
    if directory.facts.exists():  # without a spec: it was killed at its start
        directory.read_facts()  # written atomically, so a damaged one is an error
        begun |= {"run.json", "logs", ".spec.yaml.partial"}
    strangers = [entry.name for entry in directory.path.iterdir() if entry.name not in begun]
    if strangers:
        raise SpecError(
            f"{directory.path} is not a run: it has no run.json, but contains "
            f"{', '.join(sorted(strangers)[:5])}. Choose another --runs or --name."
        )


def _put_aside(directory: RunDirectory) -> None:
    stamp = time.strftime("%Y%m%d-%H%M%S")
    aside = directory.path.with_name(f".{directory.name}-{stamp}-{secrets.token_hex(2)}")
    os.rename(directory.path, aside)


def first_facts(spec: Spec, directory: RunDirectory) -> dict[str, Any]:
    """The content of run.json for a new run."""
    return {
        "format": FORMAT,
        "id": os.environ.get("WANDB_RUN_ID") or f"{spec.name}-{secrets.token_hex(4)}",
        "created": time.time(),
        "place": os.path.abspath(directory.path),
        "state": "new",
        "command": redacted(sys.argv[1:]),
        "versions": versions(),
        "git": _without_secrets(git_facts()),
        "attempts": [],
    }


def _without_secrets(git: dict[str, Any]) -> dict[str, Any]:
    return git | ({"diff": redacted_code(git["diff"])} if "diff" in git else {})


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that affect a result."""
    packages = ("evenstep", "torch", "numpy", "accelerate", "safetensors", "wandb")
    found = {package: _version_of(package) for package in packages}
    present = {package: version for package, version in found.items() if version is not None}
    return {"python": platform.python_version(), **present}


@cache
def _version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None  # an optional package, or evenstep in a source tree


def git_facts() -> dict[str, Any]:
    """Commit and uncommitted changes of the current directory, if it is a checkout.

    The diff is cut at a limit; bytes that are not UTF-8 are escaped.
    """
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        return {}
    filters = (_git("config", "-z", "--name-only", "--get-regexp", r"^filter\.") or b"").split(
        b"\0"
    )
    without = [word for name in filters if name for word in ("-c", f"{os.fsdecode(name)}=")]
    plain = ("--no-ext-diff", "--no-textconv", "--ignore-submodules=dirty")
    diff = (_git(*without, "diff", *plain, "HEAD") or b"").decode(errors="backslashreplace")
    return {"commit": commit.decode().strip(), "dirty": bool(diff), "diff": diff[:_MOST_OF_A_DIFF]}


# Programs in a checkout's settings are never run, because the checkout may belong to another
# user. So the diff includes what they would have changed, such as filters for large files.
_PLAIN = ("core.fsmonitor=false", f"core.hooksPath={os.devnull}", "protocol.allow=never")


def _git(*words: str) -> bytes | None:
    """The output of git, up to a limit; None if it fails or takes too long."""
    start = ["git", *(word for setting in _PLAIN for word in ("-c", setting)), *words]
    try:
        git = subprocess.Popen(
            start,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0"},
        )
    except OSError:
        return None  # git is missing, or the directory was deleted
    late = threading.Timer(_GIT_SECONDS, git.kill)
    late.start()
    with git:
        assert git.stdout is not None
        printed: bytes = git.stdout.read(_MOST_OF_A_DIFF + 1)
        if len(printed) > _MOST_OF_A_DIFF:
            git.kill()
    late.cancel()
    return printed if git.returncode == 0 or len(printed) > _MOST_OF_A_DIFF else None
