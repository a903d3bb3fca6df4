"""Slurm as one of the engines: render, submit, status, logs, cancel."""

from __future__ import annotations

import os
import re
import shlex
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from launch.engines.contract import Say, code_in_words, progress_in
from launch.engines.settings import settings_of
from launch.engines.slurm.queue import (
    Ends,
    SlurmError,
    asked,
    ends_of,
    jobs_of,
    submitted,
)
from launch.engines.slurm.script import Script, place_of, render
from launch.engines.slurm.states import state_in_words
from launch.processes.echo import spoken
from service.basics.atomic_files import (
    is_there,
    make_directory,
    plain,
    replace_file,
    told_when_unread,
    told_when_unwritten,
)
from service.basics.errors import SpecError
from service.health.stop_budget import budget_seconds
from service.runs.directory import RunDirectory
from service.spec.models import Spec
from service.storage.address import Address, address_in

_PASSING_KEYS = "AWS_SESSION_TOKEN"
_POLL_SECONDS = 2.0
_LAST_LINES = 200
_MOST_ENDS = 10
_MOST_BYTES = 4 << 20
_LABELLED = re.compile(r"(\d+): (.*)")


def _runs(context: click.Context, parameter: click.Parameter, value: str) -> Path | Address:
    if value == "":
        raise SpecError("--runs: is empty. Is a variable of the shell not set? Name a directory.")
    return address_in(value) or Path(value)


def _files(context: click.Context, parameter: click.Parameter, value: str) -> Path:
    if value == "":
        raise SpecError("--files: is empty. Is a variable of the shell not set? Name a directory.")
    return Path(value)


_PLACES = (
    click.Option(
        ["--runs"],
        callback=_runs,
        default="runs",
        show_default=True,
        help="The runs directory, on a disk that all nodes can access; or an address in an object "
        "store.",
    ),
    click.Option(
        ["--files"],
        callback=_files,
        default="runs",
        show_default=True,
        help="For runs at an address: the directory of the script and the logs, on a disk that all "
        "nodes can access.",
    ),
)


class Slurm:
    """Slurm's own commands, and the files of the run; nothing else is used."""

    name = "slurm"
    about = "Run a job on Slurm."
    rendered = "the script of SPEC, for sbatch"
    job_options: tuple[click.Option, ...] = (
        *_PLACES,
        click.Option(
            ["--sweep"],
            multiple=True,
            metavar="KEY=VALUE,...",
            help="Submit an array, a job for each value; with several, for each combination.",
        ),
    )
    run_options: tuple[click.Option, ...] = _PLACES

    def options_in(self, spec: Spec) -> dict[str, Any]:
        """See `Engine`."""
        return {}

    def render(
        self,
        spec: Spec,
        *,
        runs: Path | Address,
        files: Path,
        sweep: Sequence[str] = (),
        more: Sequence[str] = (),
    ) -> str:
        """See `Engine`."""
        runs = runs.absolute() if isinstance(runs, Path) else runs
        # Of runs at an address, the saves so far are not known here.
        here = runs if isinstance(runs, Path) else place_of(runs, spec.name, files=files)
        budget = budget_seconds(spec, RunDirectory(here / spec.name))
        return render(Script(spec, runs, budget, settings_of(sweep), more, files.absolute()))

    def submit(
        self,
        spec: Spec,
        *,
        waits: bool,
        say: Say,
        complain: Say,
        runs: Path | Address,
        files: Path,
        sweep: Sequence[str] = (),
        more: Sequence[str] = (),
    ) -> None:
        """See `Engine`."""
        text = self.render(spec, runs=runs, files=files, sweep=sweep, more=more)
        place = _place(runs, files, spec.name)
        if isinstance(runs, Address) and os.environ.get(_PASSING_KEYS):
            complain(
                f"WARNING: {_PASSING_KEYS} is set: sbatch passes it on, and such keys expire. A "
                "job that starts, or is queued again, after that ends with 64. Use keys that stay, "
                "or a file that is renewed (AWS_SHARED_CREDENTIALS_FILE)."
            )
        there = jobs_of(place)
        if there:
            stop = _command("cancel", spec.name, runs, files)
            raise SpecError(
                f"Job {there[0].number} of {spec.name} exists already and has not ended. Stop it "
                f"with {stop}, or give this run its own --name."
            )
        file = place / "job.sh"
        with told_when_unwritten(file):
            place.parent.parent.mkdir(parents=True, exist_ok=True)
            for directory in (place.parent, place):
                make_directory(directory)
            replace_file(file, text)
        number = submitted(file)
        with told_when_unwritten(place / "job"):
            replace_file(place / "job", f"{number}\n")
        say(f"{spec.name} is submitted as job {number}; its log: {_log(place, number)}")
        if waits:
            see = _command("logs", spec.name, runs, files)
            self._wait(spec.name, place, number, say, see=see)

    def _wait(self, name: str, place: Path, number: str, say: Say, *, see: str) -> None:
        seen: set[str] = set()
        ends: Ends = {}
        while there := {job.number for job in jobs_of(place)}:
            if seen - there - ends.keys():  # Slurm forgets them before a long sweep has ended
                ends |= {own: end for own, end in ends_of(number).items() if own not in there}
            seen |= there
            time.sleep(_POLL_SECONDS)
        ends |= ends_of(number)
        if len(seen) > 1:
            ends = {own: ends.get(own, ("UNKNOWN", 0)) for own in seen | ends.keys()}
        say(f"{name}: {_ended(ends) if ends else 'has ended'}")
        if any(state != "COMPLETED" for state, _ in ends.values()):
            raise SlurmError(f"See: {see}")

    def status(
        self, name: str, *, complain: Say, runs: Path | Address, files: Path
    ) -> Iterator[str]:
        """See `Engine`."""
        place = _known(runs, files, name)
        last = _last_job(place)
        jobs = jobs_of(place)
        for job in jobs:
            yield f"{name}: job {job.number} {state_in_words(job.state, job.reason)} ({job.told})"
        if not jobs:
            ends = ends_of(last) if last else {}
            told = _ended(ends) if ends else "is not in the queue"
            yield f"{name}: {f'job {last}' if last else 'it'} {told}"
        yield from _failures(place, last)
        log = _log(place, last)
        progress = progress_in(_end_of(log))
        yield from [f"  {progress}"] if progress else []
        yield f"  log: {log}"
        if "%a" in log.name:
            for run, state in _states(runs, name, place):
                yield f"  {run}: {state}"

    def logs(
        self,
        name: str,
        *,
        rank: int,
        node: int | None,
        previous: bool,
        follow: bool,
        complain: Say,
        runs: Path | Address,
        files: Path,
    ) -> Iterator[str]:
        """See `Engine`."""
        place = _known(runs, files, name)
        logs = sorted(place.glob("log-*"), key=_number_of)
        wanted = 2 if previous else 1
        if len(logs) < wanted:
            which = "an earlier log" if previous else "a log"
            see = _command("status", name, runs, files)
            raise SlurmError(f"{name} does not have {which} yet. See: {see}")
        labels = re.search(r"^srun .* --label\b", _text_of(place / "job.sh"), re.M) is not None
        for line in _lines_of(logs[-wanted], place if follow else None):
            found = _LABELLED.fullmatch(line) if labels else None
            of_node, words = (int(found[1]), found[2]) if found else (0, line)
            spoke, text = spoken(words)
            if node is not None:
                yield from [words] if of_node == node else []
            elif spoke == rank and (rank or of_node == 0):
                yield text

    def cancel(self, name: str, *, complain: Say, runs: Path | Address, files: Path) -> str:
        """See `Engine`."""
        jobs = jobs_of(_known(runs, files, name))
        if not jobs:
            raise SlurmError(f"There is no job of {name} in Slurm's queue.")
        running = [job.number for job in jobs if job.state == "RUNNING"]
        waiting = [job.number for job in jobs if job.state != "RUNNING"]
        if waiting:
            asked("scancel", *waiting)
        if running:
            # Its script has as long as it needs: scancel itself would kill after KillWait.
            asked("scancel", "--batch", "--signal=USR2", *running)
            return f"{name} is stopping with a checkpoint; submit it again to continue."
        return f"{name} is out of the queue; submit it again to continue."


def _ended(ends: Ends) -> str:
    """How a job has ended; of the jobs of an array, how many are done, and how others ended."""
    if len(ends) == 1:
        ((state, code),) = ends.values()
        return state_in_words(state, code=code)
    others = {number: end for number, end in ends.items() if end[0] != "COMPLETED"}
    told = [f"{len(ends) - len(others)} of {len(ends)} jobs are done"]
    for number in sorted(others, key=lambda number: (len(number), number))[:_MOST_ENDS]:
        state, code = others[number]
        told.append(f"{number} {state_in_words(state, code=code)}")
    if len(others) > _MOST_ENDS:
        told.append(f"and {len(others) - _MOST_ENDS} more")
    return "; ".join(told)


def _command(verb: str, name: str, runs: Path | Address, files: Path) -> str:
    """What a user types about a run, with the options it needs."""
    options = "" if runs == Path("runs") else f" --runs {shlex.quote(str(runs))}"
    if isinstance(runs, Address) and files != Path("runs"):
        options += f" --files {shlex.quote(str(files))}"
    return f"evenstep slurm {verb} {name}{options}"


def _place(runs: Path | Address, files: Path, name: str) -> Path:
    runs = runs.absolute() if isinstance(runs, Path) else runs
    return place_of(runs, name, files=files.absolute())


def _known(runs: Path | Address, files: Path, name: str) -> Path:
    place = _place(runs, files, name)
    with told_when_unread(place):
        is_known = is_there(place) and place.is_dir()
    if not is_known:
        options = "--runs" if isinstance(runs, Path) else "--runs and --files"
        raise SlurmError(
            f"{name} was never submitted from here: there is no {place}. Use the same {options} as "
            "to submit."
        )
    return place


def _states(runs: Path | Address, name: str, place: Path) -> Iterator[tuple[str, str]]:
    """The runs of an array that have begun, and their states."""
    if isinstance(runs, Path):
        for run in sorted(runs.absolute().glob(f"{name}-*/run.json")):
            yield run.parent.name, str(RunDirectory(run.parent).read_facts()["state"])
        return
    from service.storage.reading import states_at

    found = re.search(r"^#SBATCH --array=0-(\d{1,6})$", _text_of(place / "job.sh"), re.M | re.A)
    names = [f"{name}-{number}" for number in range(int(found[1]) + 1 if found else 0)]
    yield from states_at(runs, names).items()


def _last_job(place: Path) -> str:
    """The number of the latest job; empty if it is not known."""
    number = _text_of(place / "job").strip()
    return number if re.fullmatch(r"\d{1,12}", number, re.ASCII) else ""


def _log(place: Path, number: str) -> Path:
    is_array = "\n#SBATCH --array=" in _text_of(place / "job.sh")
    return place / (f"log-{number}_%a" if is_array else f"log-{number}")


def _text_of(file: Path) -> str:
    """The text of a small file of a job; empty if it is none, such as a pipe or a link."""
    try:
        with open(file, "rb", opener=plain) as opened:
            return opened.read(_MOST_BYTES).decode(errors="replace")
    except OSError:
        return ""


def _failures(place: Path, number: str) -> Iterator[str]:
    """The attempts that crashed by themselves; in an array, of each job."""
    for file in [place / f"failures-{number}", *sorted(place.glob(f"failures-{number}_*"))]:
        told = re.findall(r"^\d{1,3}$", _text_of(file), re.M | re.A)
        if told:
            codes = [code_in_words(int(code)) for code in told]
            times = "once" if len(codes) == 1 else f"{len(codes)} times"
            which = f"{file.name.removeprefix('failures-')} " if "_" in file.name else ""
            yield f"  {which}failed {times}, the last with {codes[-1]}"


def _number_of(file: Path) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", file.name)]


def _end_of(file: Path) -> list[str]:
    """The last lines of a log; none if there is no log."""
    try:
        with open(file, "rb", opener=plain) as opened:
            opened.seek(max(0, opened.seek(0, 2) - _LAST_LINES * 200))
            return opened.read().decode(errors="replace").splitlines()[-_LAST_LINES:]
    except OSError:
        return []


def _lines_of(file: Path, followed: Path | None) -> Iterator[str]:
    """The lines of a log; with `followed`, also new ones until no job of the run is left."""
    begun = b""
    with told_when_unread(file), open(file, "rb", opener=plain) as opened:
        while True:
            over = followed is None or not jobs_of(followed)
            *lines, begun = (begun + opened.read()).split(b"\n")
            for line in lines:
                yield line.decode(errors="replace")
            if over:
                yield from [begun.decode(errors="replace")] if begun else []
                return
            time.sleep(_POLL_SECONDS)
