"""`evenstep sweep`: the product of several values, each setting a run on this machine."""

from __future__ import annotations

import hashlib
import os
import re
import sys
import unicodedata
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import click

from launch.commands.engines import complain, load_named
from launch.commands.overrides import overridden
from launch.commands.places import Place
from launch.engines.contract import CODES
from launch.engines.settings import Settings, settings_of
from launch.environment import launched, node_here
from launch.processes.side_by_side import Command, run_side_by_side
from launch.processes.signals import heard, stop_raises
from service.basics.atomic_files import (
    in_the_way,
    is_there,
    make_directory,
    plain,
    told_when_unread,
)
from service.basics.errors import EvenstepError, SpecError, Stopped, printable
from service.basics.limits import limits
from service.health.stop_request import stop_on_signals
from service.observability.sweeps import (
    Setting,
    Sweep,
    add_to_sweep,
    in_lines,
    is_sweep,
    read_sweep,
    rows_of,
    table_of,
)
from service.runs.directory import RunDirectory, check_run
from service.spec.documents import SUFFIXES, read_document
from service.spec.extending import EXTENDS
from service.spec.files import Override
from service.spec.models import Spec
from service.spec.part import PATTERNS_IN_WORDS, RUN_NAME, RUN_NAME_LETTERS
from service.storage.address import Address

VARIANT = "variant"
_LOGS = "logs"
_OWN = (_LOGS, "run.json", "sweep.json")
"""Names in the directory of a sweep that no run can have."""
_OWN_AT_ADDRESS = ("sweep", "data", "lease", "published")
"""The same at an address in an object store."""
_LAST_BYTES = 8192
_DIGEST_LETTERS = 8


@dataclass(frozen=True)
class _Run:
    """One run of the sweep."""

    name: str
    spec: str
    """The file or recipe."""
    overrides: tuple[Override, ...]
    setting: Setting
    loaded: Spec


@click.command()
@click.argument("spec", metavar="SPEC|FOLDER")
@overridden
@click.option("--jobs", metavar="N", type=click.IntRange(min=1), help="Runs at a time.")
@click.option(
    "--processes",
    metavar="N",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Processes for each run.",
)
@click.option(
    "--runs",
    type=Place(),
    default="runs",
    show_default=True,
    help="A directory, or an address in an object store.",
)
@click.option("--name", help="Name of the sweep's directory. Default: the spec's name and -sweep.")
def sweep(
    spec: str,
    overrides: tuple[Override, ...],
    jobs: int | None,
    processes: int,
    runs: Path | Address,
    name: str | None,
) -> None:
    """Run SPEC with every combination of the given values, each as a separate run.

    KEY=A,B gives several values, KEY=0..4 the integers from 0 to 4. The specs in a FOLDER are
    variants. The same command continues: finished runs are kept, stopped ones resume. By default
    one run at a time, or one for each share of the GPUs."""
    if launched() is not None or node_here() is not None:
        raise SpecError("sweep starts its processes itself, on one machine: do not use a launcher.")
    variants = _variants(spec)
    several = len(variants) > 1
    own = Path(spec).resolve().name if several else _name(variants[0][1], overrides)
    title = _title_of(own) if name is None else name
    _require_name(title)
    home = runs / title
    home = home.absolute() if isinstance(home, Path) else home
    with ExitStack() as until_read:
        with stop_raises("the sweep"):
            earlier = until_read.enter_context(_sweep_at(home))
        named = {key for setting in earlier.settings.values() for key, _ in setting}
        taken = _OWN_AT_ADDRESS if isinstance(home, Address) else _OWN
        planned = _planned(variants, overrides, named, taken)
        for run in planned:
            check_run(earlier.path, run.loaded, fresh=False)
        left = [run for run in planned if _state(earlier.path, run) != "done"]
    places = _places(jobs, processes, len(planned))
    with stop_raises("the sweep"):
        known = _opened(home, planned)
    told = f"{len(planned)} runs in {home}, {len(places)} at a time"
    click.echo(printable(f"{told}; {len(planned) - len(left)} are done" if known else told))
    codes = _run_all([_command(run, home, processes) for run in left], places)
    try:
        with _sweep_at(home, with_metrics=True) as found:
            lines = list(in_lines(*table_of(rows_of(found))))
    except EvenstepError as error:
        if isinstance(home, Path):
            raise
        complain(f"no table: {error}")  # the runs are what they are
        lines = []
    for line in lines:
        click.echo(printable(line))
    sys.exit(_code(codes, left))


@contextmanager
def _sweep_at(home: Path | Address, *, with_metrics: bool = False) -> Iterator[Sweep]:
    """The sweep in a directory; or at an address, with copies of its runs until the context ends.

    Raises:
        EvenstepError: it cannot be read.
    """
    if isinstance(home, Path):
        yield read_sweep(home)
        return
    from launch.stored.swept import copied_sweep, sweep_at

    with copied_sweep(home, sweep_at(home) or {}, with_metrics=with_metrics) as found:
        yield found


def _run_all(commands: Sequence[Command], places: Sequence[Mapping[str, str]]) -> dict[str, int]:
    """The exit code of each run that was started, by name."""
    codes: dict[str, int] = {}

    def began(command: Command) -> None:
        _say(f"{command.name}: starts")

    def ended(command: Command, code: int) -> None:
        codes[command.name] = code
        _say(f"{command.name}: {_end_in_words(command, code)}")

    def unstarted(command: Command, error: EvenstepError) -> None:
        codes[command.name] = error.exit_code
        _say(f"{command.name}: not started: {error}")

    with stop_on_signals(heard) as stop:
        try:
            run_side_by_side(
                commands, places=places, stop=stop, began=began, ended=ended, unstarted=unstarted
            )
        except KeyboardInterrupt:
            _say("interrupted")
            sys.exit(130)
    return codes


def _code(codes: Mapping[str, int], left: Sequence[_Run]) -> int:
    """0 if all runs are done; otherwise the code of the first failure, or of a stop."""
    failed = [code for code in codes.values() if code not in (0, Stopped.exit_code)]
    if failed:
        return failed[0]
    return 0 if len(codes) == len(left) and not any(codes.values()) else Stopped.exit_code


def _say(text: str) -> None:
    click.echo(printable(text))
    sys.stdout.flush()


def _end_in_words(command: Command, code: int) -> str:
    if code == 0:
        return "done"
    if code == Stopped.exit_code:
        return "stopped, its state is saved"
    words = f"failed with {code}" + (f" ({CODES[code]})" if code in CODES else "")
    lines: list[str] = []
    with suppress(OSError), open(command.log, "rb", opener=plain) as log:  # else: no last words
        log.seek(max(0, log.seek(0, 2) - _LAST_BYTES))
        lines = log.read().decode(errors="replace").splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    said = f": {errors[-1].removeprefix('error: ')}" if errors else "."
    return f"{words}{said} See {command.log}"


def _command(run: _Run, home: Path | Address, processes: int) -> Command:
    files = [word for o in run.overrides if not isinstance(o, str) for word in ("--set-file", o)]
    words = [sys.executable, "-P", "-m", "launch", "run", run.spec, *map(str, files)]
    words += ["--name", run.name, "--runs", str(home)]
    words += ["--processes", str(processes)] if processes > 1 else []
    given = [override for override in run.overrides if isinstance(override, str)]
    return Command(run.name, [*words, "--", *given], _place_of(home) / _LOGS / f"{run.name}.log")


def _place_of(home: Path | Address) -> Path:
    """The directory on this machine of a sweep."""
    if isinstance(home, Path):
        return home
    from launch.stored.swept import place_of

    return place_of(home)


# ---- what is run


def _variants(spec: str) -> list[tuple[str, str]]:
    """(name, file) of each spec in a folder that no other one there extends; or of the single spec.

    Raises:
        SpecError: there are none.
    """
    if not os.path.isdir(spec):  # False also for an empty name, and one too long for a file
        return [("", spec)]
    folder = Path(spec)
    with told_when_unread(folder):
        files = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    keys = {EXTENDS, *Spec.model_fields}
    others = [file for file in files if not keys & read_document(file).values.keys()]
    if others:  # such as the schema that `evenstep new` writes, or pyproject.toml
        told = ", ".join(printable(file.name) for file in others)
        complain(f"{folder}: not taken for specs, without any key of one: {told}")
    files = [file for file in files if file not in others]
    bases = {base for file in files for base in _base_of(file)}
    files = [file for file in files if file.resolve() not in bases]
    if not files:
        raise SpecError(
            f"{folder} contains no spec. The suffix of a spec is {', '.join(SUFFIXES)}."
        )
    names = [file.stem for file in files]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise SpecError(f"{folder}: two specs have the name {twice}. Rename one of them.")
    return [(file.stem, str(file)) for file in files]


def _base_of(file: Path) -> list[Path]:
    named = read_document(file).values.get(EXTENDS)
    return [(file.parent / named).resolve()] if isinstance(named, str) else []


def _planned(
    variants: Sequence[tuple[str, str]],
    overrides: Sequence[Override],
    named: Set[str],
    own: Sequence[str] = _OWN,
) -> list[_Run]:
    """Every run of the sweep.

    Args:
        named: keys that are in the names of its runs, because they had several values before.
        own: names that no run can have.
    Raises:
        SpecError: lists the errors of all of them.
    """
    fixed, choices = _fixed(overrides), _choices(overrides)
    several = _several(choices) | named
    found: list[_Run] = []
    taken = set(own)
    faults: dict[str, None] = {}
    for variant, spec in variants:
        for settings in choices:
            pairs = [_pair(text) for text in settings]
            setting = tuple(pair for pair in pairs if pair[0] in several)
            setting = ((VARIANT, variant), *setting) if len(variants) > 1 else setting
            name = _name_of(setting, taken)
            given: tuple[Override, ...] = (*fixed, *settings)
            try:
                loaded = load_named(spec, given, name)
            except SpecError as error:
                faults[str(error)] = None
                continue
            found.append(_Run(name, spec, given, setting, loaded))
    if faults:
        raise SpecError("\n".join(dict.fromkeys("\n".join(faults).split("\n"))))
    return found


def _fixed(overrides: Sequence[Override]) -> tuple[Override, ...]:
    """Files, and keys that are cleared: the same in every run."""
    return tuple(o for o in overrides if not isinstance(o, str) or _clears(o))


def _clears(text: str) -> bool:
    """Whether it is `key=`; a value may end with `=` too."""
    _, equals, value = text.partition("=")
    return bool(equals) and not value.strip()


def _choices(overrides: Sequence[Override]) -> list[Settings]:
    """Every combination of the other values; an empty one if there are none."""
    words = [o for o in overrides if isinstance(o, str) and not _clears(o)]
    return settings_of(words, option="sweep: ") or [()]


def _several(choices: Sequence[Settings]) -> set[str]:
    """The keys with more than one value."""
    values: dict[str, set[str]] = {}
    for key, value in (_pair(text) for settings in choices for text in settings):
        values.setdefault(key, set()).add(value)
    return {key for key, found in values.items() if len(found) > 1}


def _pair(text: str) -> tuple[str, str]:
    key, _, value = text.partition("=")
    return key.removeprefix("--"), value


def _name_of(setting: Setting, taken: set[str]) -> str:
    """`lr-0.1_seed-0`: the last part of each key and its value, unique among the names.

    A pure function of the settings in their order, so that the same command finds its runs.
    """
    ends = [key.rpartition(".")[2] for key, _ in setting]
    words = [
        value if key == VARIANT else f"{end if ends.count(end) == 1 else key}-{value}"
        for end, (key, value) in zip(ends, setting, strict=True)
    ]
    stem = _as_name("_".join(words)) if words else "run"
    name, number = stem, 1
    while name in taken:
        number += 1
        name = f"{stem[: RUN_NAME_LETTERS - 5]}-{number}"
    taken.add(name)
    return name


def _title_of(own: str) -> str:
    """The name of the sweep of a spec or folder; two folders never have the same.

    A name that is not valid ends with a digest of what was replaced in it: of a name in another
    script nothing would be left.
    """
    told = unicodedata.normalize("NFC", f"{own}-sweep")  # a disk may give it in another form
    title = _as_name(told)
    if title == told:
        return title
    digest = hashlib.sha256(told.encode(errors="surrogateescape")).hexdigest()[:_DIGEST_LETTERS]
    return f"{title[: RUN_NAME_LETTERS - _DIGEST_LETTERS - 1]}-{digest}"


def _as_name(text: str) -> str:
    """The text, with characters that are not allowed in names replaced."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-")[:RUN_NAME_LETTERS]
    return name if name[:1].isalnum() else f"run{name}"[:RUN_NAME_LETTERS]


def _require_name(name: str) -> None:
    """Refuse what would become another name: two sweeps could then be one.

    Raises:
        SpecError: says which names are valid.
    """
    if not re.fullmatch(RUN_NAME, name) or len(name) > RUN_NAME_LETTERS:
        raise SpecError(
            f"--name: must be up to {RUN_NAME_LETTERS} {PATTERNS_IN_WORDS[RUN_NAME]}, but is "
            f"{name!r}."
        )


def _name(spec: str, overrides: Sequence[Override]) -> str:
    """The spec's own name, loaded with the common overrides and the first values."""
    return load_named(spec, (*_fixed(overrides), *_choices(overrides)[0]), None).name


def _opened(home: Path | Address, planned: Sequence[_Run]) -> bool:
    """Create the sweep's directory, and record its runs; whether it existed.

    Raises:
        SpecError: the directory is something else, or cannot be written.
    """
    place, settings = _place_of(home), {run.name: run.setting for run in planned}
    there = is_sweep(place)
    if isinstance(home, Path) and is_there(place / "run.json"):
        raise SpecError(f"--name: {place} is a run. Give the sweep another name.")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        for directory in (place, place / _LOGS):
            make_directory(directory)
    except OSError as error:
        raise SpecError(f"{place} cannot be written: {in_the_way(error)}.") from error
    if isinstance(home, Address):
        from launch.stored.swept import add_to_sweep_at

        return add_to_sweep_at(home, settings)
    add_to_sweep(place, settings)
    return there


def _state(place: Path, run: _Run) -> str | None:
    directory = RunDirectory(place / run.name)
    return str(directory.read_facts()["state"]) if is_there(directory.facts) else None


# ---- on what it runs


def _places(jobs: int | None, processes: int, runs: int) -> list[dict[str, str]]:
    """The environment of each concurrent run: its share of the devices and cores."""
    import torch

    devices = torch.accelerator.device_count() if os.environ.get("EVENSTEP_DEVICE") != "cpu" else 0
    kind = torch.accelerator.current_accelerator() if devices else None
    variable = _VISIBLE.get(kind.type) if kind is not None else None
    most = max(1, devices // processes)
    count = min(jobs or most, runs)
    threads = max(1, limits().cores // (count * processes))
    own = os.environ.get(variable, "") if variable else ""
    shares = shares_of(own.split(",") if own else list(map(str, range(devices))), count, processes)
    places = []
    for share in shares:
        place = {} if variable is None or not share else {variable: ",".join(share)}
        if count > 1 and "OMP_NUM_THREADS" not in os.environ:
            place["OMP_NUM_THREADS"] = str(threads)
        places.append(place)
    return places


_VISIBLE = {
    "cuda": "CUDA_VISIBLE_DEVICES",  # NVIDIA and AMD
    "xpu": "ZE_AFFINITY_MASK",
    "npu": "ASCEND_RT_VISIBLE_DEVICES",
}
"""The variable that restricts a process to some devices of a kind."""


def shares_of(devices: Sequence[str], count: int, each: int) -> list[list[str]]:
    """The devices of each of `count` runs with `each` processes.

    With more runs than the devices allow, several runs share devices.
    """
    here = len(devices)
    return [
        [devices[(run * each + process) % here] for process in range(min(each, here))]
        for run in range(count)
    ]
