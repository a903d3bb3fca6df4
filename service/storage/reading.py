"""Reads a run that lives in a store: what a command needs of it is copied to a temporary place."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

from service.basics.atomic_files import told_when_unwritten
from service.basics.errors import EvenstepError, SpecError, did_you_mean
from service.runs.checkpoint_files import Checkpoint, best_of, damage_of, name_of, read_state
from service.runs.directory import RunDirectory
from service.spec.part import RUN_NAME
from service.storage.address import Address
from service.storage.bringing import (
    RUN,
    Gone,
    bring_checkpoint,
    bring_files,
    bring_newest,
    newest_first,
)
from service.storage.lease import is_abandoned
from service.storage.published import Published, checkpoints_of, newest_published, step_of
from service.storage.store import Store, in_parallel, open_store

_LISTED = (RUN, "spec.yaml", "metrics.jsonl")
"""The files from which a list of runs is made."""
_TRIES = 5
_SHOWN = 8
Result = TypeVar("Result")


@contextmanager
def copied(
    address: Address,
    *,
    checkpoint: str | None = None,
    with_best: bool = False,
    say: Callable[[str], None],
) -> Iterator[RunDirectory]:
    """A copy of the run at an address, until the context ends.

    Args:
        checkpoint: `best`, `latest` or a step, which is copied too; None for none.
        with_best: copy also the best one according to that checkpoint, if the store has it.
    Raises:
        SpecError: there is no such run, or no such checkpoint.
    """
    store = open_store(address)
    with _place() as place:
        run = RunDirectory(place / address.name)

        def bring(held: Published) -> None:
            bring_files(store, held, run.path)
            name = None
            if checkpoint == "latest":
                name = bring_newest(store, held, run.path, say=say)
            elif checkpoint is not None:
                name = _named(run, held, checkpoint, address)
                bring_checkpoint(store, held, name, run.path)
            if with_best and name is not None:
                best = _best(run, name)
                if best != name and best in checkpoints_of(held):
                    bring_checkpoint(store, held, best, run.path)

        with told_when_unwritten(place):
            _with_newest(store, require_published(store), bring)
        yield run


def checkpoints_at(address: Address) -> Iterator[tuple[Checkpoint, str | None, int | None]]:
    """Each checkpoint of the run at an address, what is wrong with it, and the step of the best.

    One at a time is on this machine, and only until the next one.

    Raises:
        SpecError: there is no such run.
    """
    store = open_store(address)
    with _place() as place:
        run = RunDirectory(place / address.name)

        def bring(held: Published) -> Published:
            bring_files(store, held, run.path)
            return held

        with told_when_unwritten(place):
            held = _with_newest(store, require_published(store), bring)
        best = best_of(run.checkpoints)
        seen: set[str] = set()
        while left := [n for n in newest_first(checkpoints_of(held)) if n not in seen]:
            seen.add(name := left[-1])
            with tempfile.TemporaryDirectory(dir=place) as one:
                checkpoint = Checkpoint(RunDirectory(Path(one)).checkpoints / name, step_of(name))
                held, damage = _brought(store, held, checkpoint, Path(one))
                if damage is not None or checkpoint.path.exists():
                    yield checkpoint, damage, best


def _brought(
    store: Store, held: Published, checkpoint: Checkpoint, directory: Path
) -> tuple[Published, str | None]:
    """Bring a checkpoint, unless the run has removed it meanwhile.

    Returns the newest publication then, and what is wrong with the checkpoint.
    """

    def bring(held: Published) -> Published:
        if checkpoint.path.name in checkpoints_of(held):
            bring_checkpoint(store, held, checkpoint.path.name, directory)
        return held

    try:
        with told_when_unwritten(directory):
            newest = _with_newest(store, held, bring)
    except Gone as gone:
        return held, str(gone)
    return newest, damage_of(checkpoint) if checkpoint.path.exists() else None


@contextmanager
def copied_runs(address: Address, *, with_metrics: bool = True) -> Iterator[tuple[Path, list[str]]]:
    """A directory with what a list needs of all runs at an address; why others cannot be read."""
    listed = _LISTED if with_metrics else (RUN, "spec.yaml")
    store = open_store(address)

    with _place() as place:

        def bring(name: str) -> str | None:
            below = store.below(name)
            try:
                held = newest_published(below)
                if held is not None:
                    _with_newest(
                        below, held, lambda h: bring_files(below, h, place / name, only=listed)
                    )
            except (EvenstepError, OSError) as error:
                return f"{below.address}: {error}" if isinstance(error, OSError) else str(error)
            return None

        # Whoever may write to the bucket chooses the names there; one such as `..` is no run.
        names = [name for name in store.children() if re.fullmatch(RUN_NAME, name, re.ASCII)]
        told = in_parallel(bring, names)
        yield place, [each for each in told if each is not None]


def states_at(address: Address, names: Sequence[str]) -> dict[str, str]:
    """The state of each run that has something at the address, by its name.

    Raises:
        EvenstepError: one of them cannot be read.
    """
    store = open_store(address)
    with _place() as place:

        def bring(name: str) -> str | None:
            below, run = store.below(name), RunDirectory(place / name)
            held = newest_published(below)
            if held is None:
                return None
            with told_when_unwritten(place):
                _with_newest(below, held, lambda h: bring_files(below, h, run.path, only=(RUN,)))
            return str(run.read_facts()["state"])

        states = in_parallel(bring, names)
    return {name: told for name, told in zip(names, states, strict=True) if told is not None}


def abandoned(runs: Sequence[Address]) -> tuple[set[Address], list[str]]:
    """Which of these runs no launcher holds; and why this is not known of some."""
    unread = []

    def is_lost(run: Address) -> bool:
        try:
            return is_abandoned(open_store(run))
        except EvenstepError as error:
            unread.append(str(error))
            return False

    lost = in_parallel(is_lost, runs)
    return {run for run, is_so in zip(runs, lost, strict=True) if is_so}, unread


def _with_newest(store: Store, held: Published, act: Callable[[Published], Result]) -> Result:
    """What `act` gives for a publication, or for a newer one that replaces it meanwhile.

    Raises:
        Gone: an object of the newest publication is missing.
    """
    for _ in range(_TRIES):
        try:
            return act(held)
        except Gone:
            newest = newest_published(store)
            if newest is None or newest.stamp == held.stamp:
                raise
            held = newest
    return act(held)


def require_published(store: Store) -> Published:
    """The newest publication of a run.

    Raises:
        SpecError: there is no such run.
    """
    held = newest_published(store)
    if held is None:
        parent, _, name = store.address.path.rpartition("/")
        known = open_store(Address(store.address.scheme, parent)).children() if parent else []
        if name in known and (below := store.children()):  # it has objects, but none of a run
            told = ", ".join(below[:_SHOWN])
            raise SpecError(
                f"{store.address} is no run. Below it there is: {told}. Name one of these, or, for "
                f"all runs there, --all --runs {store.address}, where the command has it."
            )
        raise SpecError(f"There is no run {store.address}{did_you_mean(name, known) or '.'}")
    return held


def _best(run: RunDirectory, name: str) -> str:
    """The name of the best checkpoint according to this one; its own if it tells of none."""
    best = read_state(run.checkpoints / name)["best"]
    return name_of(int(best["step"])) if best else name


def _named(run: RunDirectory, held: Published, which: str, address: Address) -> str:
    """The name of the checkpoint `best` or of a step."""
    step = best_of(run.checkpoints) if which == "best" else None
    step = int(which) if which.isdecimal() else step
    names = newest_first(checkpoints_of(held))
    for name in names:
        if step_of(name) == step:
            return name
    steps = ", ".join(dict.fromkeys(str(step_of(name)) for name in reversed(names)))
    if not names:
        raise SpecError(f"There is no checkpoint in {address}.")
    if which == "best":
        raise SpecError(f"No checkpoint in {address} is marked as the best. There are {steps}.")
    raise SpecError(f"{address}: there is no {which!r}; there are best, latest, {steps}.")


@contextmanager
def _place() -> Iterator[Path]:
    with ExitStack() as until_the_end:
        with told_when_unwritten(Path(os.environ.get("TMPDIR") or "/tmp")):
            place = until_the_end.enter_context(tempfile.TemporaryDirectory(prefix="evenstep-"))
        yield Path(place)
