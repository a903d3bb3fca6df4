"""The contract of every engine: render, submit, status, logs and cancel. No torch.

An engine runs a spec on a cluster. It is a package in `launch/engines/`, with a class that
implements this contract and is registered in `launch.commands.engines`, which creates its commands.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import click

from service.spec.models import Spec

Say = Callable[[str], None]


class Engine(Protocol):
    """One way to run a job on a cluster.

    Every method takes the keywords of the contract, and those of the engine's own options.
    """

    name: str
    """The name of its commands, and of its section of the spec."""
    about: str
    """One line for its help."""
    rendered: str
    """The output of `render`, in words."""
    job_options: tuple[click.Option, ...]
    """Its own options of `render` and `submit`."""
    run_options: tuple[click.Option, ...]
    """Its own options of `status`, `logs` and `cancel`."""

    def options_in(self, spec: Spec) -> dict[str, Any]:
        """The values of `run_options` that a spec has, for a command that names its file."""

    def render(self, spec: Spec, *args: Any, **options: Any) -> str:
        """The input of the cluster, as text that can be stored and read.

        Keyword of every engine, here and in `submit`: `more`, additional arguments of `evenstep
        run`.

        Raises:
            SpecError: the spec has no section for the engine, or one that no cluster could run.
        """

    def submit(self, spec: Spec, *args: Any, **options: Any) -> None:
        """Start the job. If it is submitted again after its end, it resumes.

        Keywords of every engine: `waits`, to wait for its end; `say` and `complain`,
        functions that print messages and warnings.

        Raises:
            SpecError: it exists already and has not ended, or the cluster refuses it.
            EvenstepError: the cluster does not respond; or, with `waits`, the job has failed.
        """

    def status(self, name: str, *args: Any, **options: Any) -> Iterator[str]:
        """The state of the job, with the reason, its nodes, last step and loss.

        Keyword of every engine, here and below: `complain`.
        """

    def logs(self, name: str, *args: Any, **options: Any) -> Iterator[str]:
        """The log of one rank, or of a whole node.

        Keywords of every engine: `rank`; `node`, or None; `previous`, for the log of the previous
        attempt; `follow`, to keep printing.
        """

    def cancel(self, name: str, *args: Any, **options: Any) -> str:
        """Stop the job with a checkpoint; return a message for the user."""


# ---- common texts

CODES = {
    0: "done",
    42: "would fail again",
    64: "an error in the spec",
    75: "stopped, its state is saved",
    76: "lost a peer",
    137: "killed, probably because memory ran out",
}
"""The meanings of Evenstep's exit codes."""
_PROGRESS = re.compile(r"\bstep=(\d+)/(\d+).*?(?:loss=(\S+))")


def code_in_words(code: int) -> str:
    """`75 (stopped, its state is saved)`."""
    return f"{code} ({CODES[code]})" if code in CODES else str(code)


def progress_in(lines: Iterable[str]) -> str | None:
    """The newest step and loss in the lines of a log; None if there are none."""
    found = [match for match in map(_PROGRESS.search, lines) if match]
    if not found:
        return None
    step, steps, loss = found[-1].groups()
    return f"step {step} of {steps}, loss {loss}"
