"""Reads a run that lives in a store: what a command needs of it is copied to a temporary place."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from service.basics.errors import EvenstepError, SpecError, did_you_mean
from service.runs.checkpoint_files import Checkpoint, best_of, damage_of
from service.runs.directory import RunDirectory
from service.storage.address import Address
from service.storage.bringing import (
    RUN,
    Gone,
    bring_checkpoint,
    bring_files,
    bring_newest,
    newest_first,
)
from service.storage.published import Published, newest_published, step_of
from service.storage.store import Store, in_parallel, open_store

_LISTED = (RUN, "spec.yaml", "metrics.jsonl")
"""The files from which a list of runs is made."""


@contextmanager
def copied(
    address: Address, *, checkpoint: str | None = None, say: Callable[[str], None]
) -> Iterator[RunDirectory]:
    """A copy of the run at an address, until the context ends.

    Args:
        checkpoint: `best`, `latest` or a step, which is copied too; None for none.
    Raises:
        SpecError: there is no such run, or no such checkpoint.
    """
    store = open_store(address)
    held = _published(store)
    with _place() as place:
        run = RunDirectory(place / address.name)
        bring_files(store, held, run.path)
        if checkpoint == "latest":
            bring_newest(store, held, run.path, say=say)
        elif checkpoint is not None:
            bring_checkpoint(store, held, _named(run, held, checkpoint, address), run.path)
        yield run


def checkpoints_at(address: Address) -> Iterator[tuple[Checkpoint, str | None, int | None]]:
    """Each checkpoint of the run at an address, what is wrong with it, and the step of the best.

    One at a time is on this machine, and only until the next one.

    Raises:
        SpecError: there is no such run.
    """
    store = open_store(address)
    held = _published(store)
    with _place() as place:
        run = RunDirectory(place / address.name)
        bring_files(store, held, run.path)
        best = best_of(run.checkpoints)
        for name in reversed(newest_first(held)):
            with tempfile.TemporaryDirectory(dir=place) as one:
                checkpoint = Checkpoint(RunDirectory(Path(one)).checkpoints / name, step_of(name))
                try:
                    bring_checkpoint(store, held, name, Path(one))
                except Gone as gone:
                    yield checkpoint, str(gone), best
                else:
                    yield checkpoint, damage_of(checkpoint), best


@contextmanager
def copied_runs(address: Address) -> Iterator[tuple[Path, list[str]]]:
    """A directory with what a list needs of all runs at an address; why others cannot be read."""
    store = open_store(address)

    with _place() as place:

        def bring(name: str) -> str | None:
            try:
                held = newest_published(store.below(name))
                if held is not None:
                    bring_files(store.below(name), held, place / name, only=_LISTED)
            except EvenstepError as error:
                return str(error)
            return None

        told = in_parallel(bring, store.children())
        yield place, [each for each in told if each is not None]


def _published(store: Store) -> Published:
    held = newest_published(store)
    if held is None:
        parent, _, name = store.address.path.rpartition("/")
        known = open_store(Address(store.address.scheme, parent)).children() if parent else []
        raise SpecError(f"There is no run {store.address}{did_you_mean(name, known) or '.'}")
    return held


def _named(run: RunDirectory, held: Published, which: str, address: Address) -> str:
    """The name of the checkpoint `best` or of a step."""
    step = best_of(run.checkpoints) if which == "best" else None
    step = int(which) if which.isdecimal() else step
    names = newest_first(held)
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
    with tempfile.TemporaryDirectory(prefix="evenstep-") as place:
        yield Path(place)
