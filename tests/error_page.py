"""Prints docs/reference/errors.md: each kind of user error with its real message.

python tests/error_page.py > docs/reference/errors.md
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

from processes import Processes
from test_check import CHECKED, MORE_MISTAKES, MORE_TASKS, message_of
from test_mistakes import TASKS

HEAD = """\
# Errors by message

The messages of `evenstep check` and `evenstep run` for user errors: one message, exit code 64, no
traceback, and nothing is written. (Broken data, and a loss that is not finite, end with 42.) Each
message below is the output of a test; `python tests/error_page.py > docs/reference/errors.md`
writes this page.

Search for the words of your message: names and numbers differ.
"""


def section(kind: str, message: str) -> str:
    """One kind of mistake."""
    overrides = (CHECKED | MORE_MISTAKES)[kind][1]
    given = f"With `{' '.join(overrides)}`:\n\n" if overrides else ""
    return f"\n## {kind[0].upper()}{kind[1:]}\n\n{given}```\n{message}\n```\n"


def main() -> None:
    """Print the page."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder, Processes(1) as process:
        place = Path(folder)
        (place / "my_task.py").write_text(TASKS)
        (place / "tasks_to_check.py").write_text(TASKS + MORE_TASKS)
        sections = [section(k, message_of(k, place, process)) for k in CHECKED | MORE_MISTAKES]
    print(HEAD + "".join(sections), end="")


if __name__ == "__main__":
    main()
