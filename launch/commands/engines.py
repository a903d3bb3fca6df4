"""The commands of every engine, from its contract: render, submit, status, logs, cancel."""

from __future__ import annotations

import json
import os.path
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import click

from launch.commands.overrides import overrides_and_files, with_files
from launch.engines.contract import Engine
from launch.engines.kubernetes.engine import Kubernetes
from launch.engines.slurm.engine import Slurm
from service.basics.errors import SpecError, printable
from service.plan.changing import Accepted
from service.recipes import find_recipe
from service.spec.files import Override, load_spec
from service.spec.models import Spec
from service.spec.part import PATTERNS_IN_WORDS, RUN_NAME, RUN_NAME_LETTERS

ENGINES: tuple[Engine, ...] = (Kubernetes(), Slurm())
_FILES = (".yaml", ".yml", ".json", ".toml")


def load_named(spec: str, overrides: Sequence[Override], name: str | None) -> Spec:
    """The spec of a file or a recipe, with another name if given."""
    if name is not None:
        overrides = (*overrides, f"name={json.dumps(name)}")
    return load_spec(find_recipe(spec), overrides=overrides)


def commands_of(engine: Engine) -> click.Group:
    """`evenstep ENGINE render|submit|status|logs|cancel`."""
    group = click.Group(engine.name, help=engine.about)
    for command in (_render(engine), _submit(engine), *_of_a_run(engine)):
        group.add_command(command)
    return group


def _render(engine: Engine) -> click.Command:
    def render(
        spec: str,
        overrides: tuple[Override, ...],
        name: str | None,
        change: bool,
        accept_changes: bool,
        **options: Any,
    ) -> None:
        accepted = accepted_by(overrides, change=change, accept_changes=accept_changes)
        loaded = load_named(spec, overrides, name)
        click.echo(engine.render(loaded, more=_words_of(accepted), **options), nl=False)

    words = f"Print {engine.rendered}."
    return click.Command(
        "render", callback=with_files(render), params=_job_params(engine), help=words
    )


def _submit(engine: Engine) -> click.Command:
    def submit(
        spec: str,
        overrides: tuple[Override, ...],
        name: str | None,
        change: bool,
        accept_changes: bool,
        **options: Any,
    ) -> None:
        accepted = accepted_by(overrides, change=change, accept_changes=accept_changes)
        loaded = load_named(spec, overrides, name)
        more = _words_of(accepted)
        engine.submit(loaded, more=more, say=click.echo, complain=complain, **options)

    waits = click.Option(
        ["--wait", "waits"], is_flag=True, help="Wait until the job ends; exit 0 if it completed."
    )
    words = "Start SPEC on a cluster. Submit it again after it has ended to resume it."
    params = [*_job_params(engine), waits]
    return click.Command("submit", callback=with_files(submit), params=params, help=words)


def _job_params(engine: Engine) -> list[click.Parameter]:
    return [
        click.Argument(["spec"], metavar="SPEC"),
        *overrides_and_files(),
        *engine.job_options,
        click.Option(["--name"], help="Name of the run; the spec's own by default."),
        click.Option(
            ["--change"],
            is_flag=True,
            help="Let KEY=VALUE change a run that has begun; it is recorded.",
        ),
        click.Option(
            ["--accept-changes"],
            is_flag=True,
            help="The same for all differences in SPEC.",
        ),
    ]


def accepted_by(overrides: Sequence[Override], *, change: bool, accept_changes: bool) -> Accepted:
    """The changes of a run that a command accepts.

    Raises:
        SpecError: `--change` without a key.
    """
    if change and not overrides:
        raise SpecError(
            "--change: no key is named. Add it as KEY=VALUE, such as length.epochs=20; "
            "for changes in the file, use --accept-changes."
        )
    named = Accepted.named(overrides) if change else Accepted()
    return Accepted(named.keys, everything=accept_changes)


def _words_of(accepted: Accepted) -> list[str]:
    """The same as arguments of `evenstep run`, for a spec that already has the new values."""
    words = ["--accept-changes"] if accepted.everything else []
    return words + [word for key in accepted.keys for word in ("--accept", key)]


def _of_a_run(engine: Engine) -> list[click.Command]:
    """The commands that take the name of a run."""

    def status(name: str, **options: Any) -> None:
        run, found = _named(name, engine, options)
        for line in engine.status(run, complain=complain, **found):
            click.echo(printable(line))

    def logs(name: str, **options: Any) -> None:
        run, found = _named(name, engine, options)
        shown = partial(printable, keep="\t") if sys.stdout.isatty() else str
        for line in engine.logs(run, complain=complain, **found):
            click.echo(shown(line))

    def cancel(name: str, **options: Any) -> None:
        run, found = _named(name, engine, options)
        click.echo(engine.cancel(run, complain=complain, **found))

    which: list[click.Parameter] = [
        click.Option(["--rank"], type=click.IntRange(min=0), default=0, show_default=True),
        click.Option(
            ["--node"],
            type=click.IntRange(min=0),
            help="The whole log of a node, of all ranks.",
        ),
        click.Option(["--previous"], is_flag=True, help="The log of the previous attempt."),
        click.Option(["-f", "--follow"], is_flag=True, help="Keep printing new lines."),
    ]
    told: list[tuple[Callable[..., None], list[click.Parameter], str]] = [
        (status, [], "Show the job's state, its step and loss, and why it does not start."),
        (logs, which, "Print the log of a rank. Default: rank 0, which reports for all."),
        (cancel, [], "Stop the job with a checkpoint; its runs are kept."),
    ]
    run = click.Argument(["name"], metavar="NAME|SPEC")
    return [
        click.Command(
            each.__name__, callback=each, params=[run, *engine.run_options, *more], help=words
        )
        for each, more, words in told
    ]


def _named(text: str, engine: Engine, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The name of a run, or the name in a spec file; and the options, completed from the file.

    Raises:
        SpecError: no run can have this name, such as that of an unset variable of the shell.
    """
    if text.endswith(_FILES) and os.path.isfile(text):  # of a text too long for a name, False
        spec = load_spec(text)
        given = {key: value for key, value in options.items() if value is not None}
        return spec.name, options | engine.options_in(spec) | given
    if not re.fullmatch(RUN_NAME, text) or len(text) > RUN_NAME_LETTERS:
        raise SpecError(
            f"NAME|SPEC: must be the name of a run (up to {RUN_NAME_LETTERS} "
            f"{PATTERNS_IN_WORDS[RUN_NAME]}), or an existing file of a spec "
            f"({', '.join(_FILES)}), but is {text!r}."
        )
    return text, options


def complain(text: str) -> None:
    """Print it on standard error."""
    click.echo(text, err=True)
