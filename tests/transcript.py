"""Writes the first five minutes of a new user into the tutorial: what they type, what they see.

    python tests/transcript.py

Every command is run; of a long output the middle is left out.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import warm
from commands import BIN, CLEAN, OFFLINE, ROOT

PAGE = ROOT / "docs/tutorial/first-job.md"
BEGIN = "<!-- written by: python tests/transcript.py -->\n"
END = "<!-- end of what it writes -->\n"
INTERRUPT_AT = "step=120/"
COMMANDS = (
    "evenstep new mine",
    "evenstep check mine/my_job.yaml",
    "evenstep run mine/my_job.yaml ^C",
    "evenstep run mine/my_job.yaml",
    "evenstep run mine/my_job.yaml optimizer.lr=0.01",
    "evenstep run mine/my_job.yaml optimizer.lr=0.01 --name faster --processes 2",
    "evenstep runs",
    "evenstep report my_job faster -o report.html",
)
HEAD, TAIL = 1, 1
"""Rows of metrics that are shown of a run."""


def transcript() -> str:
    """The section as it stands in the tutorial, of commands run now."""
    with tempfile.TemporaryDirectory() as place:
        shown = [line for command in COMMANDS for line in _shown(command, Path(place))]
    return "\n".join(["```console", *shown, "```"]) + "\n"


def in_page(text: str) -> str:
    """The section that a page holds."""
    return text.partition(BEGIN)[2].partition(END)[0].strip() + "\n"


def shape(text: str) -> str:
    """The same without figures: what stays from one machine, and one day, to the next."""
    text = re.sub(r"\d[\d,.:TZe+-]*", "#", text)
    text = re.sub(r"(# )?(B|kB|KiB|MB|MiB|GiB)\b", "#", text)
    text = re.sub(r"\b(s|min|h) ago", "# ago", text)
    # Of a row, what depends on where Ctrl-C has met the run, and on the machine.
    text = re.sub(r" (slowest_rank|slowest_ratio|test/\w+|save/\w+)=#", "", text)
    text = text.replace(", in its test, which is then repeated", "")
    text = re.sub(r"[ -]{2,}", "  ", text)
    lines = [line for line in text.splitlines() if line != "..."]
    # And how many rows there are.
    return "\n".join(line for n, line in enumerate(lines) if n == 0 or line != lines[n - 1])


def _shown(command: str, place: Path) -> Iterator[str]:
    typed = command.removesuffix(" ^C")
    yield f"$ {typed}"
    interrupted = typed != command
    output = _output(typed, place, interrupted=interrupted)
    for _ in range(9):  # on a busy machine it may end before it is heard
        if not interrupted or "^C" in output:
            break
        shutil.rmtree(place / "runs")
        output = _output(typed, place, interrupted=True)
    lines = output.replace(f"{place}/", "").rstrip().splitlines()
    yield from _without_the_middle([line for line in lines if "is a straggler" not in line])


def _output(command: str, place: Path, *, interrupted: bool) -> str:
    theirs = {key: value for key, value in CLEAN.items() if key not in ("OMP_NUM_THREADS", "CI")}
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    name, *words = shlex.split(command)
    with warm.popen(
        [str(BIN / name), *words],
        cwd=place,
        env=theirs | OFFLINE | {"PATH": path},
        clean=theirs,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            if line.startswith("Stopped after"):
                lines.append("^C\n")  # rows may have come after it; how many is chance
            lines.append(line)
            if interrupted and INTERRUPT_AT in line:
                process.send_signal(signal.SIGINT)
    return "".join(lines)


def _without_the_middle(lines: list[str]) -> Iterator[str]:
    rows = [number for number, line in enumerate(lines) if re.match(r"\d{4}-\d\d-\d\dT", line)]
    hidden = set(rows[HEAD:-TAIL]) if len(rows) > HEAD + TAIL else set()
    for number, line in enumerate(lines):
        if number not in hidden:
            yield line
        elif number - 1 not in hidden:
            yield "..."


def main() -> None:
    warm.WARM = False  # the page shows how long real starts take
    text = PAGE.read_text()
    assert BEGIN in text, f"the README has no line {BEGIN!r}"
    before, _, rest = text.partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{transcript()}\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
