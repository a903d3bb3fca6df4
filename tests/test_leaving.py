"""A process leaves in time and with its code, whatever workers, pools and libraries do."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from commands import DEADLINE_SECONDS, ROOT, command, evenstep, start, torchrun
from injuring import rows_of, started, until

from service.health.stop_request import stop_on_signals

TASKS = '''
import atexit
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import torch
from torch import nn

from service.data.task import supervised


class Rows(torch.utils.data.Dataset):
    bad = None

    def __len__(self):
        return 40

    def __getitem__(self, row):
        if row == self.bad:
            raise OSError("cannot read image 12")
        return torch.tensor([row / 40.0]), int(row > 20)


class BadRow(Rows):
    bad = 12


class Pooled(Rows):
    """Each row is made by a pool, forked while this process hears signals."""

    def __getitem__(self, row):
        with multiprocessing.get_context("fork").Pool(1) as pool:
            return torch.tensor([pool.apply(abs, (row / 40.0,))]), int(row > 20)


def of(rows):
    return supervised(model=lambda: nn.Linear(1, 2), train=rows, loss="cross_entropy")


class Leaving(Rows):
    def __getitem__(self, row):
        if row == 12:
            sys.exit(0)
        return super().__getitem__(row)


def leaving():
    return of(Leaving())


def refusing():
    sys.exit("no data here")


def broken():
    return of(BadRow())


def pooled():
    return of(Pooled())


def twice():
    sys.stderr = Twice(sys.stderr)
    return of(Rows())


class Twice:
    """While a stop is reported, the next signal arrives."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        if text.startswith("Stopped after"):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.5)
        return self.stream.write(text)


def lingering():
    atexit.register(linger)
    return of(Rows())


def linger():
    Path("leaving").touch()
    time.sleep(3600)
'''
SPEC = {
    "name": "job",
    "batch": {"global_batch": 8, "micro_batch": 4},
    "length": {"steps": 5},
    "optimizer": {"name": "sgd", "lr": 0.1},
}


def job(place: Path, task: str, **more: object) -> None:
    (place / "tasks.py").write_text(TASKS)
    (place / "job.yaml").write_text(json.dumps(SPEC | {"task": f"./tasks.py:{task}"} | more))


@pytest.mark.parametrize("words", [(), ("--processes", 2, "--max-restarts", 1)])
def test_a_row_that_a_worker_cannot_read_ends_the_run(tmp_path, words):
    job(tmp_path, "broken", loader={"workers": 1})
    done = evenstep("run", "job.yaml", *words, cwd=tmp_path)
    assert done.returncode == 42, done.stderr
    assert done.stderr.count("cannot read image 12") == 1
    assert "Restarting on" not in done.stderr, "it will fail again"


def test_a_row_that_a_worker_cannot_read_ends_torchruns_processes(tmp_path):
    job(tmp_path, "broken", loader={"workers": 1})
    done = torchrun(2, "run", "job.yaml", cwd=tmp_path)
    assert "exitcode  : 42" in done.stderr, done.stderr


def test_a_row_that_a_worker_cannot_read_lets_a_script_end(tmp_path):
    job(tmp_path, "broken", loader={"workers": 1})
    script = "import service; service.run('job.yaml')"
    done = command(sys.executable, "-c", script, cwd=tmp_path, timeout=DEADLINE_SECONDS)
    assert done.returncode == 1
    assert "service.basics.errors.DataBroken" in done.stderr.splitlines()[-1]


def test_a_pool_of_the_tasks_own_can_be_ended(tmp_path):
    job(tmp_path, "pooled", length={"steps": 1})
    done = evenstep("run", "job.yaml", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("words", [(), ("--processes", 2)])
def test_a_task_that_leaves_has_failed(tmp_path, words):
    job(tmp_path, "leaving", length={"epochs": 1})
    ended = evenstep("run", "job.yaml", *words, cwd=tmp_path)
    assert ended.returncode == 1, ended.stderr
    assert "the task called sys.exit; it must raise an error" in ended.stderr
    assert "in __getitem__" in ended.stderr, "where"


def test_a_task_that_leaves_while_it_is_created_is_a_mistake(tmp_path):
    job(tmp_path, "refusing")
    ended = evenstep("plan", "job.yaml", cwd=tmp_path)
    assert ended.returncode == 64, ended.stderr
    assert "raised SystemExit: no data here (" in ended.stderr


@pytest.mark.parametrize("words", [(), ("--processes", 2)])
def test_a_stop_request_ends_a_leaving_process_immediately(tmp_path, words):
    job(tmp_path, "lingering")
    with started(*words, cwd=tmp_path) as process:
        until((tmp_path / "leaving").exists, "a function for the exit that takes an hour")
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == 0, err
    assert "did not release everything" not in err


@pytest.mark.parametrize("words", [(), ("--processes", 2)])
def test_a_second_stop_request_does_not_silence_the_report_of_the_first(tmp_path, words):
    job(tmp_path, "twice", length={"steps": 1_000_000}, tracking={"log_every_steps": 1})
    with started(*words, cwd=tmp_path) as process:
        until(lambda: rows_of(tmp_path) > 3, "three steps", of=process)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == 75, err
    assert "Stopped after step " in err
    assert "error" not in err


def test_where_nothing_would_be_lost_the_first_request_interrupts_whenever_it_arrives():
    with stop_on_signals() as stop:
        stop.interrupts_from_now_on()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # the launcher passes on its own
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)  # somebody is impatient
    with stop_on_signals() as stop:
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            stop.interrupts_from_now_on()


LINGERING = {
    "sleeps": "time.sleep(3600)",
    "waits for a thread": "each = threading.Thread(target=time.sleep, args=(3600,)); each.start(); "
    "each.join()",
    "is in a library": "while True: ctypes.CDLL(None).sleep(3600)",
    "holds the interpreter's lock": "ctypes.PyDLL(None).sleep(3600)",
}
WITHOUT_THREADS = "holds the interpreter's lock"  # its time ends as well; by a signal it cannot
CASES = [
    (what, number)
    for what in LINGERING
    for number in (None, signal.SIGINT, signal.SIGTERM)
    if number is None or what != WITHOUT_THREADS
]


@pytest.mark.parametrize(("what", "number"), CASES)
def test_leaving_is_bounded_where_a_function_for_the_exit(what, number):
    lingers, code = LINGERING[what], 1 if what == WITHOUT_THREADS else 7
    script = (
        "import atexit, ctypes, os, sys, threading, time\n"
        "from launch.rank import exit as leaving\n"
        f"leaving.LEAVING_SECONDS, leaving._LOCKED_SECONDS = {3600 if number else 0.2}, 0.2\n"
        "leaving._REPORT_SECONDS = 3600\n"  # it is reported: nothing is left to wait for
        "def linger():\n"
        "    print('leaving', flush=True)\n"
        f"    try:\n        {lingers}\n"
        "    finally:\n        os._exit(9)  # it came back\n"
        "atexit.register(linger)\n"
        "leaving.leave(7)\n"
    )
    words = [sys.executable, "-c", script]
    with start(words, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "leaving\n"
        if number is not None:
            process.send_signal(number)
        try:
            assert process.wait(timeout=DEADLINE_SECONDS) == code
        finally:
            process.kill()


def test_a_report_that_nobody_reads_delays_a_stop_for_a_limited_time():
    script = (
        "import time\n"
        "from launch.rank import exit as leaving\n"
        "leaving.LEAVING_SECONDS, leaving._REPORT_SECONDS = 3600, 0.2\n"
        "leaving.end_in_time(7)\n"
        "print('reporting', flush=True)\n"
        "time.sleep(3600)\n"
    )
    words = [sys.executable, "-c", script]
    with start(words, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "reporting\n"
        process.send_signal(signal.SIGTERM)
        try:
            assert process.wait(timeout=DEADLINE_SECONDS) == 7
        finally:
            process.kill()
