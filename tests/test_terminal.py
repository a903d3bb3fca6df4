"""A run outlives whoever reads what it says, and saves where it is asked to stop."""

import fcntl
import os
import pty
import signal
import subprocess
import termios
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from commands import BIN, CLEAN, DEADLINE_SECONDS, command, start
from injuring import facts_of, injured, rows_of, until

from service.runs.checkpoint_files import checkpoints_in

ENDLESS = {"steps": 10_000_000}
WORDS = [(), ("--processes", 2, "--max-restarts", 1)]
Stop = Callable[[subprocess.Popen[bytes]], None]


@contextmanager
def pipe_left_by_its_reader() -> Iterator[tuple[list[int], Stop]]:
    """`2>&1 | tee log`, and Ctrl-C, of which tee dies first."""
    read, write = os.pipe()

    def stop(process: subprocess.Popen[bytes]) -> None:
        os.close(read)
        process.send_signal(signal.SIGINT)

    yield [write], stop
    os.close(write)


@contextmanager
def full_disk() -> Iterator[tuple[list[int], Stop]]:
    full = os.open("/dev/full", os.O_WRONLY)
    yield [full], lambda process: process.send_signal(signal.SIGUSR1)
    os.close(full)


@contextmanager
def nothing_at_all() -> Iterator[tuple[list[int], Stop]]:
    """`>&- 2>&-`: closed before it starts."""
    yield [], lambda process: process.send_signal(signal.SIGUSR2)


@contextmanager
def closed_terminal() -> Iterator[tuple[list[int], Stop]]:
    """The kernel sends SIGHUP, and whatever is written from then on fails."""
    ours, theirs = pty.openpty()
    yield [theirs], lambda process: os.close(ours)
    os.close(theirs)


@contextmanager
def running(place: Path, *words: object, output: list[int]) -> Iterator[subprocess.Popen[bytes]]:
    """`evenstep run job.yaml WORDS` in a session whose terminal, if any, is the output's."""

    def begin() -> None:
        os.setsid()
        for terminal in output:
            fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
        for number in (1, 2):
            os.close(number) if not output else os.dup2(output[0], number)

    if output and not os.isatty(output[0]):
        how: dict[str, Any] = {"stdout": output[0], "stderr": output[0], "start_new_session": True}
    else:
        how = {"preexec_fn": begin}
    process = start(
        [BIN / "evenstep", "run", "job.yaml", *words],
        cwd=place,
        env=CLEAN | {"CHAOS": str(place)},
        **how,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize(
    "reader", [pipe_left_by_its_reader, full_disk, nothing_at_all, closed_terminal]
)
def test_a_stop_is_followed_where_nothing_can_be_said(tmp_path, reader):
    with ExitStack() as stack:
        at_once = []
        for number, words in enumerate(WORDS):
            place = tmp_path / str(number)
            place.mkdir()
            injured(place, length=ENDLESS)
            output, stop = stack.enter_context(reader())
            at_once.append(
                (place, stop, stack.enter_context(running(place, *words, output=output)))
            )
        for place, stop, process in at_once:
            until(lambda place=place: rows_of(place) > 3, "three steps")
            stop(process)
        for place, _, process in at_once:
            assert process.wait(timeout=DEADLINE_SECONDS) == 75
            attempt = facts_of(place)["attempts"][-1]
            assert attempt["outcome"] == "stopped"
            saved = checkpoints_in(place / "runs/job/checkpoints")
            assert saved[-1].step == attempt["to_step"]


def test_a_run_continues_and_restarts_when_its_reader_has_read_enough(tmp_path):
    injured(tmp_path, ("kill one", "forward", 1, 6))
    read, write = os.pipe()
    words = ("--processes", 2, "--max-restarts", 1)
    with running(tmp_path, *words, output=[write]) as process:
        os.close(write)
        os.read(read, 1)
        os.close(read)  # as `| head -1` does
        assert process.wait(timeout=DEADLINE_SECONDS) == 0
    _, last = facts_of(tmp_path)["attempts"]
    assert last["outcome"] == "done"


TALKATIVE = """
from service.recipes.digits import task as digits
import sys

def task(**ignored):
    print("loading caf\\u00e9 \\u4e2d", "x" * 100_000)
    print("loading", file=sys.stderr)
    return digits()
"""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_what_a_task_prints_ends_no_run_either(tmp_path):
    (tmp_path / "talkative.py").write_text(TALKATIVE)
    words = ("run", "digits", "task=./talkative.py:task", "length={steps: 2}")
    line = " ".join([f"exec '{BIN}/evenstep'", *(f"'{word}'" for word in words), "> /dev/full"])
    done = command("sh", "-c", line, cwd=tmp_path, timeout=DEADLINE_SECONDS)
    assert done.returncode == 0, done.stderr
    line = line.removesuffix("> /dev/full")
    line += " --fresh > said"
    done = command(
        "sh", "-c", line, cwd=tmp_path, timeout=DEADLINE_SECONDS, PYTHONIOENCODING="latin-1"
    )
    assert done.returncode == 0, done.stderr
    assert b"caf\xe9 \\u4e2d x" in (tmp_path / "said").read_bytes()


def test_what_was_asked_for_and_could_not_be_written_is_reported(tmp_path):
    done = command(
        "sh", "-c", f"'{BIN}/evenstep' schema > /dev/full", cwd=tmp_path, timeout=DEADLINE_SECONDS
    )
    told = "error: Standard output cannot be written: No space left on device.\n"
    assert (done.returncode, done.stderr) == (1, told)
    read, write = os.pipe()
    os.close(read)
    with subprocess.Popen(
        [BIN / "evenstep", "schema"], stdout=write, stderr=subprocess.PIPE
    ) as left:
        assert left.stderr is not None
        assert left.stderr.read() == b""
    assert left.returncode == 141
    os.close(write)
