"""`KEY=VALUE` and `--set-file`, for every command with a spec."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import click

from launch.commands.places import Named


def overrides_and_files() -> list[click.Parameter]:
    """The parameters `overrides` and `set_files` of a command."""
    return [
        click.Argument(["overrides"], metavar="[KEY=VALUE ...]", nargs=-1),
        click.Option(
            ["--set-file", "set_files"],
            type=Named(),
            multiple=True,
            metavar="FILE",
            help="A file of values in the format of a spec; KEY=VALUE is applied after it.",
        ),
    ]


def overridden(command: Callable[..., Any]) -> Callable[..., Any]:
    """Let a command accept both as its argument `overrides`, the files first."""
    taken = with_files(command)
    held = taken.__dict__.setdefault("__click_params__", [])
    held += reversed(overrides_and_files())
    return taken


def with_files(command: Callable[..., Any]) -> Callable[..., Any]:
    """The command with the files of `set_files` at the start of its `overrides`."""

    @wraps(command)
    def taken(
        *args: Any, overrides: tuple[str, ...], set_files: tuple[Path, ...], **more: Any
    ) -> Any:
        return command(*args, overrides=(*set_files, *overrides), **more)

    return taken
