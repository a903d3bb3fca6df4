"""What a command line calls a place of runs: a directory, or an address in an object store."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from service.basics.errors import SpecError
from service.runs.directory import RunDirectory, find_run
from service.storage.address import Address, address_in


class Place(click.ParamType[Path | Address]):
    """A directory, or `s3://bucket/prefix` and its kin."""

    name = "place"

    def convert(
        self,
        value: str | Path | Address,
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> Path | Address:
        if isinstance(value, Address):
            return value
        _require_some(value, param)
        return address_in(str(value)) or Path(value)


class Named(click.Path):
    """The path of a file, or of a directory that is no place of runs."""

    def __init__(self, *, file_okay: bool = True, dir_okay: bool = True) -> None:
        super().__init__(path_type=Path, file_okay=file_okay, dir_okay=dir_okay)

    def convert(
        self,
        value: str | os.PathLike[str],
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> Any:
        _require_some(value, param, kind="file" if self.file_okay else "directory")
        return super().convert(value, param, ctx)


def _require_some(
    value: object, parameter: click.Parameter | None, *, kind: str = "directory"
) -> None:
    """Refuse an empty name: as a path it would be the current directory."""
    if value == "":
        which = "RUN"
        if parameter is not None:
            is_option = isinstance(parameter, click.Option)
            which = parameter.opts[0] if is_option else parameter.human_readable_name
        raise SpecError(f"{which}: is empty. Is a variable of the shell not set? Name a {kind}.")


@contextmanager
def run_at(
    place: Path | Address, *, checkpoint: str | None = None, with_best: bool = False
) -> Iterator[RunDirectory]:
    """The run at a place: its directory, or a copy of what is needed, until the context ends.

    Args:
        checkpoint: the one to copy: `best`, `latest`, or a step; None for none.
        with_best: copy also the best one according to that checkpoint.
    Raises:
        SpecError: there is no such run.
    """
    if isinstance(place, Path):
        yield find_run(place)
        return
    from service.storage.reading import copied

    with copied(place, checkpoint=checkpoint, with_best=with_best, say=say) as found:
        yield found


def say(text: str) -> None:
    """Print a line of the store for the user."""
    click.echo(text, err=True)


def directory_of(place: Path | Address, name: str) -> Path:
    """The directory on this machine in which a run of this name is trained at a place of runs."""
    if isinstance(place, Path):
        return place
    from service.storage.scratch import scratch_runs

    return scratch_runs(place / name)
