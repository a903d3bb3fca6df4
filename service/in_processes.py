"""A run from Python in several processes: starts the command and follows it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from service.basics.errors import EvenstepError, SpecError, Stopped, WillFailAgain
from service.health.stop_request import PARENT
from service.spec.files import dump_spec
from service.spec.models import Spec

_LAST_LINES = 200


def run_in_processes(spec: Spec, *, processes: int, options: Sequence[str], quiet: bool) -> None:
    """Run `evenstep run` with these options; its output is printed here, unless `quiet`.

    An interrupt is passed on: the run saves and stops.

    Raises:
        SpecError: an error of the user.
        EvenstepError: the run has failed; the message is that of the run.
    """
    if spec.task.startswith("__main__:"):
        raise SpecError(
            f"processes: {spec.task} is a task of this notebook or script, which other processes "
            "do not have. Write it into a file, and name that: ./my_task.py:task."
        )
    with tempfile.TemporaryDirectory(prefix="evenstep-") as place:
        file = Path(place) / "spec.yaml"
        file.write_text(dump_spec(spec), encoding="utf-8")
        words = [sys.executable, "-P", "-m", "launch", "run", str(file)]
        code, last = _followed([*words, "--processes", str(processes), *options], quiet)
    if code in (0, Stopped.exit_code):
        return
    _, error, told = f"\n{last}".rpartition("\nerror: ")
    told = told.strip() if error else f"The run ended with code {code}:\n{last.strip()}"
    kinds = {SpecError.exit_code: SpecError, WillFailAgain.exit_code: WillFailAgain}
    raise kinds.get(code, EvenstepError)(told)


def _followed(words: Sequence[str], quiet: bool) -> tuple[int, str]:
    """The exit code of a command, and its last lines."""
    here = os.path.abspath(sys.path[0] or ".")  # the import path of the user's modules
    known = os.environ.get("PYTHONPATH")
    path = os.pathsep.join([here, *([known] if known else [])])
    started = subprocess.Popen(
        words,
        env={**os.environ, "PYTHONPATH": path, PARENT: str(os.getpid())},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # so that Ctrl-C reaches it only once, from here
        text=True,
        errors="replace",
    )
    assert started.stdout is not None
    last: deque[str] = deque(maxlen=_LAST_LINES)
    while True:
        try:
            for line in started.stdout:
                last.append(line)
                if not quiet:
                    print(line, end="", flush=True)
            return _code_of(started), "".join(last)
        except KeyboardInterrupt:
            started.send_signal(signal.SIGINT)


def _code_of(ended: subprocess.Popen[str]) -> int:
    code = ended.wait()
    return code if code >= 0 else 128 - code
