"""What a command line calls a place of runs: a directory, or an address in an object store."""

from __future__ import annotations

from pathlib import Path

import click

from service.basics.errors import SpecError
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
        return address_in(str(value)) or Path(value)


class Directory(click.ParamType[Path]):
    """A directory; an address is refused, by a command that cannot use one yet."""

    name = "path"

    def convert(
        self, value: str | Path, param: click.Parameter | None, ctx: click.Context | None
    ) -> Path:
        if address_in(str(value)) is not None:
            command = f"evenstep {ctx.info_name}" if ctx is not None else "this command"
            raise SpecError(
                f"{value}: {command} does not read object stores yet. Name a directory."
            )
        return Path(value)
