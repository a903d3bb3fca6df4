"""A machine that has little left of what a start needs says so, at once and in words."""

import errno
import os
import resource
import shutil
import subprocess
import sys
import tempfile

import pytest
from commands import BIN, CLEAN, DEADLINE_SECONDS, command, evenstep
from disks import mounted

from launch.processes.warm_start import out_of_place
from service.basics.errors import SpecError
from service.recipes import find_recipe
from service.spec.files import load_spec

RUN = (BIN / "evenstep", "run", "digits", "length={steps: 2}", "--processes", "2")
COMPILER = shutil.which("cc") or shutil.which("gcc")
# As the kernel answers where memory or the number of processes is used up.
NO_FORK = """
#include <errno.h>
#include <unistd.h>
pid_t fork(void) { errno = EAGAIN; return -1; }
"""


@pytest.mark.skipif(sys.platform != "linux" or not COMPILER, reason="needs a compiler on Linux")
def test_a_process_that_cannot_be_forked_is_reported_and_tried_again(tmp_path):
    (tmp_path / "fork.c").write_text(NO_FORK)
    build = (COMPILER, "-shared", "-fPIC", "-o", "fork.so", "fork.c")
    assert command(*build, cwd=tmp_path, timeout=DEADLINE_SECONDS).returncode == 0
    preload = {"LD_PRELOAD": str(tmp_path / "fork.so")}
    done = command(*RUN, "--max-restarts", "1", cwd=tmp_path, timeout=DEADLINE_SECONDS, **preload)
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("error: rank 0 could not be started: this machine cannot start") == 2
    assert not (tmp_path / "runs").exists()


def test_too_few_open_files_are_reported_before_anything_is_started(tmp_path):
    done = subprocess.run(
        [str(word) for word in RUN],
        cwd=tmp_path,
        env=CLEAN,
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (24, 24)),
    )
    assert done.returncode == 64
    assert done.stderr == (
        "error: ulimit -n: a process may have 24 files open here, and 2 processes need 72. "
        "Raise it: ulimit -n 1024.\n"
    )


def told(*words, cwd, **environ):
    done = command(BIN / "evenstep", *words, cwd=cwd, timeout=DEADLINE_SECONDS, **environ)
    assert (done.returncode, done.stdout) == (64, "")
    return done.stderr


def test_a_place_that_torchrun_did_not_set_is_reported_in_a_line(tmp_path):
    line = told("run", "digits", cwd=tmp_path, RANK="0", WORLD_SIZE="1")
    assert line.startswith("error: The environment sets RANK but not LOCAL_RANK, LOCAL_WORLD_SIZE.")
    assert line.count("\n") == 1


def test_a_current_directory_that_is_gone_is_reported(tmp_path):
    script = f'mkdir gone; cd gone; rmdir ../gone; exec "{BIN}/evenstep" run digits'
    done = command("sh", "-c", script, cwd=tmp_path, timeout=DEADLINE_SECONDS)
    # Where the path of its Python has spaces or is long, pip starts a command by way of a shell.
    told = [line for line in done.stderr.splitlines(keepends=True) if not line.startswith("sh: ")]
    assert (done.returncode, "".join(told)) == (
        64,
        "error: The current directory is gone: No such file or directory. Change into one that "
        "exists.\n",
    )


def test_a_temporary_directory_too_deep_for_a_socket_is_reported(tmp_path):
    fits = "/tmp/" + "x" * 70
    assert out_of_place(["run", "digits", "--processes", "2"], {"TMPDIR": fits}) is None
    assert out_of_place(["run", "digits"], {"TMPDIR": fits + "x"}) is None
    assert out_of_place(["test", "runs/job", "task_args.at=s3://b"], {"TMPDIR": fits + "x"}) is None
    of_a_bucket = out_of_place(["test", "s3://b/runs/job"], {"TMPDIR": fits + "x"})
    assert of_a_bucket is not None
    assert of_a_bucket.startswith("TMPDIR has 76 bytes")
    line = told("run", "digits", "--processes", "2", cwd=tmp_path, TMPDIR=fits + "x")
    assert line.startswith("error: TMPDIR has 76 bytes")


def test_a_machine_without_a_temporary_directory_is_reported(monkeypatch):
    def none() -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(tempfile, "gettempdir", none)
    assert out_of_place(["run", "digits"], {}) is None
    told = out_of_place(["run", "digits", "--processes", "2"], {})
    assert told == (
        "No usable temporary directory found in ['/tmp']. Set TMPDIR to a directory that can be "
        "written to."
    )


def test_a_new_job_on_a_full_disk_leaves_no_half_of_it(tmp_path):
    with mounted(tmp_path / "small", "16k") as small:
        full = evenstep("new", "job", cwd=small)
        assert (full.returncode, "cannot be written: No space left" in full.stderr) == (64, True)
        assert list((small / "job").iterdir()) == []


@pytest.mark.parametrize("threads", ["abc", "0", "", "2,2"])
def test_a_number_of_threads_that_is_none_is_reported(tmp_path, threads):
    line = told("run", "digits", "--processes", "2", cwd=tmp_path, OMP_NUM_THREADS=threads)
    assert line.startswith(f"error: OMP_NUM_THREADS={threads}: must be a whole number, at least 1.")
    assert line.count("\n") == 1


def test_a_number_of_threads_that_is_none_is_reported_once_under_torchrun(tmp_path):
    start = (BIN / "torchrun", "--standalone", "--nproc-per-node", 2, "-m", "launch")
    run = (*start, "run", "digits")
    done = command(*run, cwd=tmp_path, timeout=DEADLINE_SECONDS, OMP_NUM_THREADS="abc")
    assert done.stderr.count("error: OMP_NUM_THREADS=abc: must be") == 1, done.stderr
    assert "exitcode  : 64" in done.stderr


SLOW_ROWS = """
import torch
from torch import nn
from service.task import supervised

class Rows:
    def __len__(self):
        return 64
    def __getitem__(self, row):
        return torch.full((200, 200), row / 64), row % 3

def task():
    model = lambda: nn.Sequential(nn.Flatten(), nn.Linear(40_000, 3))
    return supervised(model=model, train=Rows(), test=Rows(), loss="cross_entropy")
"""


def with_workers(place):
    (place / "rows.py").write_text(SLOW_ROWS)
    spec = "name: job\ntask: ./rows.py:task\nbatch: {global_batch: 32, micro_batch: 32}\n"
    spec += "length: {steps: 2}\noptimizer: {name: sgd, lr: 0.01}\nloader: {workers: 1}\n"
    (place / "job.yaml").write_text(spec)


def test_a_temporary_directory_too_deep_for_the_socket_of_a_worker_is_reported(tmp_path):
    with_workers(tmp_path)
    deep = tmp_path / ("x" * 90)
    deep.mkdir()
    line = told("run", "job.yaml", cwd=tmp_path, TMPDIR=str(deep))
    assert line.splitlines()[-1].startswith("error: loader.workers: workers send rows through a")
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("unshare"), reason="mounts as root")
def test_shared_memory_too_small_for_the_rows_of_a_worker_is_reported(tmp_path):
    with_workers(tmp_path)
    mount = "mount -t tmpfs -o size=256k tmpfs /dev/shm"
    script = f'{mount} && exec "{BIN}/evenstep" run job.yaml'
    words = ("unshare", "--mount", "sh", "-c", script)
    done = command(*words, cwd=tmp_path, timeout=DEADLINE_SECONDS)
    assert done.returncode == 42, done.stderr
    assert "/dev/shm, which has 0.2 MiB here" in done.stderr
    assert "lower loader.workers or loader.prefetch" in done.stderr


def test_an_override_with_dashes_is_reported_without(tmp_path):
    line = told("run", "digits", "--optimizer.lr=0.02", cwd=tmp_path)
    hint = "To change a key of the spec, write optimizer.lr=VALUE, without dashes."
    assert line == f"error: No such option '--optimizer.lr'. {hint}\n"


@pytest.mark.parametrize("number", [10**16, 10**30, 1e16])
def test_a_number_that_counts_nothing_is_refused_where_it_stands(number):
    override = f"length.steps={number}" if isinstance(number, int) else f"length.epochs={number}"
    with pytest.raises(SpecError, match=r"must be at most 1e\+15"):
        load_spec(find_recipe("digits"), overrides=["length={}", override])
    assert load_spec(find_recipe("digits"), overrides=["seed=9223372036854775807"]).seed > 10**18
