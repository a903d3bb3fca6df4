"""A machine that has little left of what a start needs says so, at once and in words."""

import resource
import shutil
import subprocess
import sys

import pytest
from commands import BIN, CLEAN, command

RUN = (BIN / "evenstep", "run", "digits", "length={steps: 2}", "--processes", "2")
COMPILER = shutil.which("cc") or shutil.which("gcc")
# As the kernel answers where memory or the number of processes is used up.
NO_FORK = """
#include <errno.h>
#include <unistd.h>
pid_t fork(void) { errno = EAGAIN; return -1; }
"""


@pytest.mark.skipif(sys.platform != "linux" or not COMPILER, reason="needs a compiler on Linux")
def test_a_process_that_cannot_be_forked_is_told_and_tried_again(tmp_path):
    (tmp_path / "fork.c").write_text(NO_FORK)
    build = (COMPILER, "-shared", "-fPIC", "-o", "fork.so", "fork.c")
    assert command(*build, cwd=tmp_path, timeout=60).returncode == 0
    preload = {"LD_PRELOAD": str(tmp_path / "fork.so")}
    done = command(*RUN, "--max-restarts", "1", cwd=tmp_path, timeout=120, **preload)
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("error: rank 0 could not be started: this machine lets no") == 2
    assert not (tmp_path / "runs").exists()


def test_too_few_open_files_are_told_before_anything_is_started(tmp_path):
    done = subprocess.run(
        [str(word) for word in RUN],
        cwd=tmp_path,
        env=CLEAN,
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (24, 24)),
    )
    assert done.returncode == 64
    assert done.stderr == (
        "error: ulimit -n: a process may have 24 files open here, and 2 processes need 72. "
        "Raise it: ulimit -n 1024.\n"
    )
