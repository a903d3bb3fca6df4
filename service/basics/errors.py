"""The errors that end a run, as one tree, with their exit codes.

    EvenstepError            1
    ├── SpecError           64   an error of the user: the spec, the task, the command line
    ├── WillFailAgain       42   running the same thing again cannot help
    │   ├── Diverged             the loss or a gradient is not finite
    │   ├── DataBroken           the number of rows is not the one that the plan expects
    │   ├── NotSaved             a checkpoint cannot be written: disk full, permissions, memory
    │   ├── HookFailed           a hook of the task failed, with faults.on_hook_failure: stop
    │   ├── NoCheckpoint         there are checkpoints, and none of them can be read
    │   └── NoProgress           several consecutive attempts failed without a new checkpoint
    ├── Stopped             75   stopped on request, state saved: run again to continue
    ├── PeerLost            76   another process was lost; not the fault of this one
    └── OutOfMemory        137   the code of a process that the kernel kills for memory

0 is a finished run. Every other code is that of the root cause (137 killed, 139 crashed, 1 ...).
"""

from __future__ import annotations

import difflib
import re
import sysconfig
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


class EvenstepError(Exception):
    """An error for the user; its message says what is wrong, where, and what to do."""

    exit_code = 1


class SpecError(EvenstepError):
    """An error of the user, reported before any device is used."""

    exit_code = 64


class WillFailAgain(EvenstepError):
    """A failure that would occur again if the same command were repeated."""

    exit_code = 42


class Diverged(WillFailAgain):
    """The loss or a gradient is not a finite number."""


class DataBroken(WillFailAgain):
    """The number of rows read is not the number of rows expected."""


class NotSaved(WillFailAgain):
    """A checkpoint could not be written, for a reason that the user must fix."""


class HookFailed(WillFailAgain):
    """A hook of the task failed, and `faults.on_hook_failure` is `stop`."""


class NoCheckpoint(WillFailAgain):
    """Checkpoints exist and none of them can be read."""


class NoProgress(WillFailAgain):
    """Several consecutive attempts failed without progress."""


class Stopped(EvenstepError):
    """The run was asked to stop and has saved its state."""

    exit_code = 75


class PeerLost(EvenstepError):
    """Another process of the job was lost."""

    exit_code = 76


class OutOfMemory(EvenstepError):
    """A micro-batch does not fit into the memory of the device or of the machine."""

    exit_code = 137


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'lr'?`, or the known names, or nothing if there are none.

    Initials count as similar too: `learning_rate` is close to `lr`.
    """
    names = sorted(set(known))
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    near = near or [name for name in names if name == "".join(w[:1] for w in word.split("_"))]
    near = near or [
        name for name in names if min(len(name), len(word)) > 2 and _one_holds_the_other(name, word)
    ]
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; known: {', '.join(names)}" if names else ""


def _one_holds_the_other(a: str, b: str) -> bool:
    return a in b or b in a


LINES = "\n\t"
"""Characters that a message of several lines keeps."""


def printable(text: str, *, keep: str = "") -> str:
    """The text with every non-printable character escaped: `\\x1b`, `\\u202e`.

    A name or a word from a file may contain terminal control codes, for example to hide a line, and
    characters that change the text direction.

    Args:
        keep: characters that are not escaped, such as line ends.
    """
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text
    )


# The texts of torch, cuBLAS, cuSOLVER, cuDNN, CUDA, Level Zero and NCCL, according to their
# documentation.  No device error has been observed yet.
_OUT_OF_MEMORY = re.compile(
    r"out of memory|can't allocate memory|_ALLOC_FAILED|ALLOCATION_FAILED"
    r"|OUT_OF_(DEVICE|HOST)_MEMORY|Failed to CUDA (calloc|host alloc|malloc)"
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch, one of its libraries, or Python ran out of memory."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error)) is not None


def with_place(error: BaseException) -> str:
    """`ValueError: width must be even (my_task.py:12)`: the error and the line it came from.

    The line is the last one of the user's own code in the traceback, if there is one.
    """
    return f"{type(error).__name__}: {error}{place_of(error)}"


def place_of(error: BaseException) -> str:
    """` (my_task.py:12)`, or empty."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if is_own_code(frame.filename)]
    return f" ({own[-1].filename}:{own[-1].lineno})" if own else ""


_SERVICE = Path(__file__).parents[1]
_OURS = (f"{_SERVICE}/", f"{_SERVICE.with_name('launch')}/")
_RECIPES = f"{_SERVICE}/recipes/"
_PYTHON = sysconfig.get_path("stdlib")
# By name: a virtual environment may also include the packages of the system or of the user.
_OF_PACKAGES = {"site-packages", "dist-packages"}


def is_own_code(file: str) -> bool:
    """Whether a source file belongs to the user: not to Python, a package, or this project."""
    # A run asks this about every loaded module, thousands with torch: a Path for each takes 0.1 s.
    place = str(Path(file)) if "//" in file or "/./" in file else file
    # A recipe is a task like the user's.
    is_ours = place.startswith(_OURS) and not place.startswith(_RECIPES)
    is_a_packages = not _OF_PACKAGES.isdisjoint(place.split("/"))
    return not (is_ours or is_a_packages or file.startswith(("<frozen ", _PYTHON)))


@contextmanager
def told_as_mistake(what: str) -> Iterator[None]:
    """Turn any exception of the user's code into a `SpecError`: `what`, and its message.

    Our own errors and out-of-memory errors are not changed.
    """
    try:
        yield
    except EvenstepError:
        raise
    except (Exception, SystemExit) as error:
        if is_out_of_memory(error):
            raise
        raise SpecError(f"{what}: {with_place(error)}") from error
