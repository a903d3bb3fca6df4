"""What a person sees: lines to grep in a pipe, one live line on a terminal."""

from __future__ import annotations

import errno
import fcntl
import io
import os
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from commands import BIN, DEADLINE_SECONDS, start

from service.observability.console import (
    LeadOutput,
    LiveConsole,
    PlainConsole,
    _Table,
    console,
)
from service.runs.tracking import Row

ROOT = Path(__file__).parents[1]
START = 1795407180.0  # 2026-11-23T04:13:00Z

TRAINED = {
    "train/loss": 0.31214,
    "train/lr": 9.4e-4,
    "train/grad_norm": 1.0213,
    "train/rows_per_second": 1480.2,
    "train/data_wait": 0.031,
}


def row(step: int, values: dict[str, float], *, after_seconds: float = 0.0) -> Row:
    return Row(step=step, epoch=step / 96, time=START + after_seconds, values=values)


def test_without_a_terminal_each_row_is_one_line_to_grep():
    out = io.StringIO()
    screen = console(600, resume_step=110, stream=out, started=START)
    screen.write(row(120, TRAINED, after_seconds=30.0))
    screen.write(row(130, TRAINED | {"test/accuracy": 0.97612}, after_seconds=50.0))
    screen.write(row(600, {"test/loss": 0.1}, after_seconds=990.0))
    screen.say("W&B is offline.")
    screen.close("done")
    assert out.getvalue().splitlines() == [
        # 10 steps of this attempt in 30 s, 480 to go; the 110 before it took no time of it.
        "2026-11-23T04:13:30Z step=120/600 epoch=1.25 loss=0.3121 lr=9.4e-04 grad_norm=1.02 "
        "rows/s=1480 data_wait=3% eta=00:24:00",
        # From the first row on, without what came before it: 10 steps in 20 s, 470 to go.
        "2026-11-23T04:13:50Z step=130/600 epoch=1.354 loss=0.3121 lr=9.4e-04 grad_norm=1.02 "
        "rows/s=1480 data_wait=3% test/accuracy=0.9761 eta=00:15:40",
        "2026-11-23T04:29:30Z step=600/600 epoch=6.25 test/loss=0.1 eta=00:00:00",
        "W&B is offline.",
    ]


def test_each_group_has_its_rate_and_a_lost_loss_is_shown():
    out = io.StringIO()
    values = {"train/loss": float("nan"), "train/lr/base.*": 0.05, "train/lr/rest": 1e-4}
    screen = console(10, stream=out, started=START)
    screen.write(row(0, values))
    screen.close("done")
    assert out.getvalue() == (
        "2026-11-23T04:13:00Z step=0/10 epoch=0 loss=nan lr/base.*=5.0e-02 lr/rest=1.0e-04\n"
    )


@pytest.mark.parametrize(
    ("environ", "kind"),
    [
        ({"TERM": "xterm-256color"}, LiveConsole),
        ({"TERM": "xterm-256color", "CI": "false"}, LiveConsole),
        ({"TERM": "xterm-256color", "CI": "true"}, PlainConsole),
        ({"TERM": "dumb"}, PlainConsole),
        ({}, PlainConsole),
    ],
)
def test_a_terminal_is_live_unless_it_asks_not_to_be(environ, kind):
    ours, theirs = os.openpty()
    with os.fdopen(theirs, "w") as terminal:
        screen = console(10, stream=terminal, environ=environ)
        assert isinstance(screen, kind)
        screen.close("done")
    os.close(ours)


def test_a_letter_that_the_stream_cannot_write_ends_nothing():
    content = io.BytesIO()
    screen = console(10, stream=io.TextIOWrapper(content, encoding="ascii"))
    screen.say("Läuft")
    screen.close("done")
    assert content.getvalue() == b"L?uft\n"


class Tee:
    """What scripts and notebooks put in the place of sys.stdout: it can write, and no more."""

    def __init__(self, *, full: bool = False) -> None:
        self.full, self.texts = full, []

    def write(self, text: str) -> int:
        if self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.texts.append(text)
        return len(text)

    def flush(self) -> None:
        pass


def test_what_replaces_standard_output_needs_only_to_write(monkeypatch):
    monkeypatch.delenv("CI", raising=False)
    read = Tee()
    screen = console(10, stream=read)
    screen.say("begins")
    screen.close("done")
    assert "".join(read.texts) == "begins\n"
    for nobody in (Tee(full=True), None):  # a full disk, and a program without an output
        monkeypatch.setattr(sys, "stdout", nobody)
        LeadOutput(speaks=True)("training goes on")
        screen = console(10)
        screen.say("training goes on")
        screen.close("done")


# Writes rows as fast as it can for a second, and 300 at least, in a process of its own on a
# terminal of its own.
BUSY = """
import sys, threading, time
from service.observability.console import console
from service.runs.tracking import Row

screen = console(10**6)
begin = time.monotonic()
step = 0
while time.monotonic() - begin < 1.0 or step < 300:
    step += 1
    values = {"train/loss": 0.31214, "train/lr": 9.4e-4, "train/rows_per_second": 1480.2}
    if step == 100:
        values["test/accuracy"] = 0.976
        screen.say("saved")
    if step == 200:
        values["test/accuracy"] = 0.981
    screen.write(Row(step=step, epoch=step / 96, time=time.time(), values=values))
screen.close("done")
names = [thread.name for thread in threading.enumerate()]
print(time.monotonic() - begin, step, names, file=sys.stderr)
"""


def on_a_terminal(columns: int, **environ: str) -> tuple[str, float, int]:
    """What BUSY writes to a terminal, how long it ran, and its last step."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    kept = {k: v for k, v in os.environ.items() if k not in ("CI", "NO_COLOR", "COLUMNS", "LINES")}
    process = subprocess.Popen(
        [sys.executable, "-c", BUSY],
        cwd=ROOT,
        env=kept | {"TERM": "xterm-256color"} | environ,
        stdin=theirs,
        stdout=theirs,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(theirs)
    written = b""
    while piece := _read(ours):
        written += piece
    os.close(ours)
    with process:
        found = process.stderr.read()
    assert process.returncode == 0, found
    seconds, step, names = found.split(maxsplit=2)
    assert names == "['MainThread']\n"
    return written.decode(), float(seconds), int(step)


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # Linux's way to say that nobody has it open any more
        return b""


def lines_shown(written: str) -> list[str]:
    """The lines of the screen at the end: a line that is drawn again covers what it was."""
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written)
    return [line.rstrip("\r").rsplit("\r", 1)[-1].rstrip() for line in plain.split("\n")]


def test_a_terminal_shows_one_line_that_is_drawn_four_times_a_second_at_most():
    written, seconds, step = on_a_terminal(100)
    draws = written.count("/1000000")
    # One at the start, one at the end, and one each with the two lines that stay.
    assert 3 <= draws <= 4 * seconds + 4
    *stay, bar, after = lines_shown(written)
    assert stay == [
        "saved",
        "   step    epoch  test/accuracy",
        "    100    1.042          0.976",
        "    200    2.083          0.981",
    ]
    assert bar.startswith(f"{step}/1000000 ")
    assert "loss 0.3121" in bar
    assert "rows/s 1480" in bar
    assert after == ""
    assert written.rindex("\x1b[?25h") > written.rindex("\x1b[?25l")


def test_a_narrow_terminal_still_has_one_line():
    written, _, step = on_a_terminal(30)
    *stay, bar, _ = lines_shown(written)
    assert stay[1:3] == ["   step  test/accuracy", "    100          0.976"], "epoch goes first"
    assert bar.startswith(f"{step}/")
    assert len(bar) < 30


def test_columns_says_how_wide_the_line_may_be():
    written, _, _ = on_a_terminal(200, COLUMNS="40")
    assert max(len(line) for line in lines_shown(written)) <= 40


def test_the_table_keeps_the_measures_that_fit():
    values = {"test/loss": 0.5, "test/accuracy": 0.9, "test/a_long_measure": 0.1}
    row = Row(step=100, epoch=1.5, time=0.0, values=values)
    shown = [_Table().lines_of(row, columns)[0].split() for columns in (80, 55, 40, 10)]
    assert shown == [
        ["step", "epoch", *values],
        ["step", *values],
        ["step", "test/loss", "test/accuracy"],
        ["step", "test/loss"],
    ]


def test_no_color_leaves_the_colours_out():
    colour = re.compile(r"\x1b\[(?:\d+;)*[34]\d")
    assert colour.search(on_a_terminal(100)[0])
    assert not colour.search(on_a_terminal(100, NO_COLOR="1")[0])


def test_a_reader_who_leaves_does_not_end_the_run():
    script = (
        "import sys; from service.observability.console import console\n"
        "from service.runs.tracking import Row\n"
        "screen = console(9)\n"
        "sys.stdin.readline()\n"
        "for step in range(9): screen.write(Row(step, 0.0, 0.0, {'train/loss': 1.0}))\n"
        "screen.close('done')\n"
        "print('the rest of the run prints into nothing')\n"
    )
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", script]
    process = subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe)
    process.stdout.close()
    process.stdout = None
    _, err = process.communicate(b"\n", timeout=DEADLINE_SECONDS)
    assert (process.returncode, err) == (0, b"")


def test_a_reader_who_stops_reading_does_not_hold_the_run():
    script = (
        "import os, sys\n"
        "from service.observability.console import console; from service.runs.tracking import Row\n"
        "screen = console(5000)\n"
        "for step in range(5000): screen.write(Row(step, 0.0, 0.0, {'train/loss': 1.0}))\n"
        "screen.close('done')\n"
        "screen.say('after the end')\n"
        "print('the rest of the run prints into nothing')\n"
        "sys.stdout.flush(); os._exit(0)\n"  # as `launch.rank.exit.leave` does
    )
    # 5000 lines are more than a pipe holds, and nobody takes them.
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE)
    assert process.wait(DEADLINE_SECONDS) == 0
    taken = process.communicate()[0]
    assert b"step=0/5000" in taken
    assert b"step=4999/5000" not in taken


def test_messages_after_the_end_are_still_printed():
    out = io.StringIO()
    screen = console(10, stream=out)
    screen.close("done")
    screen.say("Done.")
    assert out.getvalue() == "Done.\n"


def test_a_full_disk_behind_the_screen_does_not_end_the_run(tmp_path):
    with open("/dev/full", "w") as full:
        words = [BIN / "evenstep", "run", "digits", "length.epochs=1"]
        done = start(words, cwd=tmp_path, stdout=full, stderr=subprocess.PIPE)
        _, err = done.communicate(timeout=DEADLINE_SECONDS)
    assert (done.returncode, err) == (0, b"")
