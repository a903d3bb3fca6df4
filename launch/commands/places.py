"""What a command line calls a place of runs: a directory, or an address in an object store."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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


def _require_some(value: str | Path, parameter: click.Parameter | None) -> None:
    """Refuse an empty name: as a path it would be the current directory."""
    if value == "":
        which = parameter.opts[0] if isinstance(parameter, click.Option) else "RUN"
        raise SpecError(f"{which}: is empty. Is a variable of the shell not set? Name a directory.")


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


class Directory(click.ParamType[Path]):
    """A directory; an address is refused, by a command that cannot use one yet."""

    name = "path"

    def convert(
        self, value: str | Path, param: click.Parameter | None, ctx: click.Context | None
    ) -> Path:
        _require_some(value, param)
        if address_in(str(value)) is not None:
            command = f"evenstep {ctx.info_name}" if ctx is not None else "this command"
            raise SpecError(
                f"{value}: {command} does not work with object stores yet. Name a directory."
            )
        return Path(value)
