"""A program that is forked from an interpreter finds itself as one that was started."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import warm
from commands import BIN, CLEAN, DEADLINE_SECONDS

UNLIKE = ("LC_CTYPE", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_ERROR_FILE", "PWD")
"""Python sets the first, and each torchrun has its own of the next; a script is started by way of
`sh`, which sets the last, if the path of Python has spaces."""
ABOUT = f"""
UNLIKE = {UNLIKE}
"""
ABOUT += """
import json, locale, multiprocessing, os, signal, sys, tempfile, threading, time, warnings

def stream(file):
    how = [file.line_buffering, file.write_through, file.mode, file.name]
    return [file.encoding, file.errors, file.fileno(), *how]

umask = os.umask(0)
print(json.dumps({
    "name": __name__,
    "argv": sys.argv,
    "command line": open("/proc/self/cmdline").read().split(chr(0)),
    "path": sys.path,
    "variables": sorted(
        each for each in open("/proc/self/environ").read().split(chr(0))
        if not each.startswith(UNLIKE)
    ),
    "cwd": os.getcwd(),
    "environ": {k: v for k, v in os.environ.items() if k not in UNLIKE},
    "zone": time.tzname,
    "locale": locale.getlocale(),
    "umask": umask,
    "temporary": tempfile.gettempdir(),
    "streams": [stream(file) for file in (sys.stdin, sys.stdout, sys.stderr)],
    "descriptors": sorted(os.listdir("/proc/self/fd"))[:-1],  # the last is that of the listing
    "handlers": [str(signal.getsignal(n)) for n in signal.valid_signals() if n not in (9, 19)],
    "held back": [int(n) for n in signal.pthread_sigmask(signal.SIG_BLOCK, ())],
    "leads a session": os.getsid(0) == os.getpid(),
    "threads": threading.active_count(),
    "warnings": [sys.warnoptions, warnings.filters[0][0] if sys.warnoptions else ""],
    "children": len(multiprocessing.active_children()),
    "input": sys.stdin.read(),
}))
"""
PARENT = """
import os, signal, subprocess, sys, warnings
import service.spec.models, launch.environment
warnings.simplefilter("error")
sys.excepthook = print
signal.signal(signal.SIGTERM, print)
signal.signal(signal.SIGINT, signal.SIG_IGN)
words = [sys.executable, "../child.py", "a b", ""]
os.makedirs("below", exist_ok=True)
with open("other", "w"):
    done = subprocess.run(words, cwd="below", env=os.environ | {"MORE": "1"}, capture_output=True)
sys.stdout.buffer.write(done.stdout)
sys.stdout.flush()
os.write(2, done.stderr)
sys.exit(done.returncode)
"""
PROGRAMS = ("script", "-c", "-m")
ENDS = {
    "sys.exit(7)": 7,
    "sys.exit('a word')": 1,
    "sys.exit()": 0,
    "1 / 0": 1,
    "raise KeyboardInterrupt": -signal.SIGINT,
    "os.kill(os.getpid(), signal.SIGTERM)": -signal.SIGTERM,
    "os.abort()": -signal.SIGABRT,
    "os._exit(3)": 3,
    "atexit.register(print, 'left'); sys.exit(2)": 2,
    "threading.Thread(target=lambda: (time.sleep(0.2), print('late'))).start()": 0,
}


def started(words: list[str], *, cold: bool, env: Mapping[str, str], **how: Any) -> Any:
    if cold:
        return subprocess.Popen(words, env=env, **how)
    process = warm.popen(words, env=env, clean=CLEAN, **how)
    assert isinstance(process, warm.Warm), "it has been forked"
    return process


def program(place: Path, how: str, text: str, *options: str) -> list[str]:
    (place / "module_of_test.py").write_text(text)
    words = {"script": ["module_of_test.py"], "-m": ["-m", "module_of_test"], "-c": ["-c", text]}
    return [sys.executable, *options, *words[how], "a", "--word"]


@pytest.mark.skipif(not warm.WARM, reason="every start is cold here")
@pytest.mark.parametrize(
    ("how", "options"),
    [*((how, ()) for how in PROGRAMS), ("-c", ("-u", "-P")), ("-m", ("-W", "ignore"))],
)
def test_a_fork_finds_what_a_start_finds(
    tmp_path: Path, how: str, options: tuple[str, ...]
) -> None:
    words = program(tmp_path, how, ABOUT, *options)
    env = CLEAN | {"TZ": "Asia/Kolkata", "WORD": "ü", "TMPDIR": str(tmp_path)}
    env |= {"PYTHONPATH": str(tmp_path / "more")}
    told = []
    for cold in (True, False):
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        start = started(
            words, cold=cold, env=env, cwd=tmp_path, text=True, start_new_session=True, **pipes
        )
        out, err = start.communicate("asked\n", timeout=DEADLINE_SECONDS)
        assert (start.returncode, err) == (0, "")
        told.append(json.loads(out))
    assert told[0] == told[1]


@pytest.mark.skipif(not warm.WARM, reason="every start is cold here")
@pytest.mark.parametrize("how", ["subprocess", "torchrun"])
def test_what_a_fork_starts_finds_what_it_finds_elsewhere(tmp_path: Path, how: str) -> None:
    """A program that has changed much of itself starts another, which is forked from it."""
    (tmp_path / "child.py").write_text(
        f"{ABOUT}\nopen('{tmp_path}/torch', 'w').write(str('torch' in sys.modules))"
    )
    (tmp_path / "parent.py").write_text(PARENT)
    words = [sys.executable, "parent.py"]
    if how == "torchrun":
        words = [str(BIN / "torchrun"), "--nproc-per-node", "1", "child.py"]
    told = []
    for cold in (True, False):
        pipes = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
        start = started(words, cold=cold, env=CLEAN, cwd=tmp_path, text=True, **pipes)
        out, err = start.communicate(timeout=DEADLINE_SECONDS)
        assert start.returncode == 0, err
        told.append(json.loads(out))
        assert (tmp_path / "torch").read_text() == str(not cold), "it is a fork"
    assert told[0] == told[1]


@pytest.mark.skipif(not warm.WARM, reason="every start is cold here")
@pytest.mark.parametrize("end", ENDS)
def test_a_fork_ends_as_a_start_ends(tmp_path: Path, end: str) -> None:
    text = f"import atexit, os, signal, sys, threading, time\nprint('begun', flush=True)\n{end}"
    words, told = program(tmp_path, "script", text), []
    for cold in (True, False):
        pipes = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
        start = started(words, cold=cold, env=CLEAN, cwd=tmp_path, text=True, **pipes)
        out, err = start.communicate(timeout=DEADLINE_SECONDS)
        told.append((start.returncode, out, err.splitlines()[-1:]))
    assert told[0] == told[1]
    assert told[1][0] == ENDS[end]


@pytest.mark.skipif(not warm.WARM, reason="every start is cold here")
def test_a_fork_hears_signals_and_is_waited_for(tmp_path: Path) -> None:
    text = "import sys, time; print('waits', flush=True); time.sleep(3600)"
    words = program(tmp_path, "-c", text)
    with started(words, cold=False, env=CLEAN, cwd=tmp_path, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"waits\n"
        assert process.poll() is None
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=0.01)
        process.terminate()
        assert process.wait(timeout=DEADLINE_SECONDS) == -signal.SIGTERM
        assert process.poll() == -signal.SIGTERM


@pytest.mark.parametrize("different", ["OMP_NUM_THREADS", "LC_ALL", "PYTHONWARNINGS"])
def test_what_is_read_at_a_start_is_not_forked(tmp_path: Path, different: str) -> None:
    other = "2" if different[0] == "O" else "C"
    if CLEAN.get(different) == other:  # whoever runs the tests has it already
        other = {"2": "3", "C": "C.UTF-8"}[other]
    env = CLEAN | {different: other}
    words = [sys.executable, "-c", "pass"]
    with warm.popen(words, env=env, clean=CLEAN, cwd=tmp_path, stderr=subprocess.DEVNULL) as start:
        assert not isinstance(start, warm.Warm)
