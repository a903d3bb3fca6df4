"""What every engine does: render, submit, status, logs and cancel, in the same words. No torch.

An engine carries a spec to a cluster. It is a package in `launch/engines/`, with a class that
keeps this contract and is entered in `launch.commands.engines`, which makes its five commands.
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

    Every method takes the keywords that the contract names, and those of the engine's own options.
    """

    name: str
    """Of its commands, and of its section of the spec."""
    about: str
    """One line for its help."""
    rendered: str
    """What `render` prints, in words."""
    job_options: tuple[click.Option, ...]
    """Its own options of `render` and `submit`."""
    run_options: tuple[click.Option, ...]
    """Its own options of `status`, `logs` and `cancel`."""

    def render(self, spec: Spec, *args: Any, **options: Any) -> str:
        """What the cluster is given, as text that can be kept and read.

        Keyword of every engine, here and of `submit`: `more`, further words of `evenstep run`.

        Raises:
            SpecError: the spec has no section for the engine, or one that no cluster could run.
        """

    def submit(self, spec: Spec, *args: Any, **options: Any) -> None:
        """Start the job. If it is submitted again after its end, it resumes.

        Keywords of every engine: `waits`, to stay until it has ended; `say` and `complain`,
        functions that print messages and warnings.

        Raises:
            SpecError: it exists already and has not ended, or the cluster refuses it.
            EvenstepError: the cluster does not answer; or, waited for, the job has failed.
        """

    def status(self, name: str, *args: Any, **options: Any) -> Iterator[str]:
        """How the job does: its state and why, its nodes, last step and loss.

        Keyword of every engine, here and below: `complain`.
        """

    def logs(self, name: str, *args: Any, **options: Any) -> Iterator[str]:
        """What one rank wrote, or all of a node.

        Keywords of every engine: `rank`; `node`, or None; `previous`, for the attempt before this
        one; `follow`, to stay.
        """

    def cancel(self, name: str, *args: Any, **options: Any) -> str:
        """Stop the job with a checkpoint; what to say of it."""


# ---- texts that all of them use

CODES = {
    0: "done",
    42: "would fail again",
    64: "a mistake in the spec",
    75: "stopped, its state is saved",
    76: "lost a peer",
    137: "killed; out of memory, if nobody killed it",
}
"""What an exit code of ours means."""
_PROGRESS = re.compile(r"\bstep=(\d+)/(\d+).*?(?:loss=(\S+))")


def code_in_words(code: int) -> str:
    """`75 (stopped, its state is saved)`."""
    return f"{code} ({CODES[code]})" if code in CODES else str(code)


def progress_in(lines: Iterable[str]) -> str | None:
    """The newest step and loss in the lines of a log; None where there are none."""
    found = [match for match in map(_PROGRESS.search, lines) if match]
    if not found:
        return None
    step, steps, loss = found[-1].groups()
    return f"step {step} of {steps}, loss {loss}"
