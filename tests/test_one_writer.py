"""One process writes to a run; it lets go when it ends, however it ends."""

import os
import shutil
import signal
import socket
import sys
import time
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

import pytest
from commands import BIN, CLEAN, DEADLINE_SECONDS, command, evenstep, start
from injuring import until
from jobs import spec_of

from service.basics.errors import SpecError
from service.runs.directory import check_run, open_run
from service.spec.files import load_spec


def hold_and_fork(runs, ready):
    """Open the run, fork a child that outlives this process, and wait to be killed."""
    opened = open_run(runs, load_spec(spec_of("plain_rows")), fresh=False)
    child = os.fork()
    if child:
        ready.send(child)
    signal.pause()
    opened.close()


def test_a_child_of_a_killed_writer_does_not_keep_the_run(tmp_path):
    context, spec = get_context("fork"), load_spec(spec_of("plain_rows"))
    here, there = context.Pipe()
    writer = context.Process(target=hold_and_fork, args=(tmp_path, there), daemon=True)
    writer.start()
    orphan = here.recv()
    try:
        for refused in (check_run, open_run):
            with pytest.raises(SpecError, match=f"being written by process {writer.pid} on"):
                refused(tmp_path, spec, fresh=False)
        writer.kill()
        writer.join()
        os.kill(orphan, 0)  # it lives
        check_run(tmp_path, spec, fresh=False)
        open_run(tmp_path, spec, fresh=False).close()
    finally:
        os.kill(orphan, signal.SIGKILL)


def open_and_tell(runs, fresh, told):
    """Open the run, and say what came of it; then wait to be ended."""
    try:
        opened = open_run(runs, load_spec(spec_of("plain_rows")), fresh=fresh)
    except SpecError as error:
        told.send(str(error))
    else:
        told.send(opened.id)
        signal.pause()


def waits_for(process, path):
    """Whether the process has the file open."""
    files = Path(f"/proc/{process.pid}/fd")
    return any(os.path.realpath(file) == str(path) for file in files.iterdir())


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="/proc tells who waits")
@pytest.mark.parametrize("fresh", [False, True])
def test_who_waits_while_a_run_is_put_aside_does_not_write_to_the_new_one(tmp_path, fresh):
    """As where two start at one moment, one of them with --fresh."""
    spec, context = load_spec(spec_of("plain_rows")), get_context("fork")
    first = open_run(tmp_path, spec, fresh=False)
    here, there = context.Pipe()

    def begun():
        process = context.Process(target=open_and_tell, args=(tmp_path, fresh, there), daemon=True)
        process.start()
        return process

    second = begun()
    try:
        deadline = time.monotonic() + 60
        while not waits_for(second, tmp_path / "job/.lock"):
            assert time.monotonic() < deadline
            if here.poll():  # on a busy machine it was refused before anybody looked
                assert "is being written by process" in here.recv()
                second.kill()
                second.join()
                second = begun()
        os.kill(second.pid, signal.SIGSTOP)  # otherwise it may notice, and be the new writer
        os.rename(tmp_path / "job", tmp_path / ".job-aside")
        new = open_run(tmp_path, spec, fresh=False)
        first.close()
        os.kill(second.pid, signal.SIGCONT)
        assert here.poll(60)
        assert f"is being written by process {os.getpid()} on" in here.recv()
        assert new.directory.read_facts()["id"] == new.id
        new.close()
    finally:
        second.kill()
        second.join()


def test_a_second_command_is_refused_before_it_starts_anything(tmp_path):
    assert evenstep("run", "digits", "--stop-at", 1, cwd=tmp_path).returncode == 75
    opened = open_run(tmp_path / "runs", load_spec(tmp_path / "runs/digits/spec.yaml"), fresh=False)
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    for words in ((), ("--processes", 2), ("--fresh",)):
        ended = evenstep("run", "digits", *words, cwd=tmp_path, PYTHONPATH=str(tmp_path))
        assert ended.returncode == 64, (ended.stdout, ended.stderr)
        assert f"is being written by process {os.getpid()} on" in ended.stderr
    opened.close()


def node_variables(nodes, index):
    """Those of a pod of an Indexed Job."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    variables = {"PET_NNODES": str(nodes), "JOB_COMPLETION_INDEX": str(index)}
    variables |= {"PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": str(port)}
    return CLEAN | variables | {"PET_NPROC_PER_NODE": "1", "EVENSTEP_DEVICE": "cpu"}


@contextmanager
def node(variables, log):
    """`evenstep run digits` on a node; killed at the end."""
    words = [BIN / "evenstep", "run", "digits", "length={steps: 2}"]
    with open(log, "ab") as output:
        process = start(words, cwd=log.parent, env=variables, stdout=output, stderr=output)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def open_digits(place):
    words = ("run", "digits", "length={steps: 2}", "--stop-at", 1)
    assert evenstep(*words, cwd=place, EVENSTEP_DEVICE="cpu").returncode == 75
    return open_run(place / "runs", load_spec(place / "runs/digits/spec.yaml"), fresh=False)


def test_a_node_that_is_started_again_waits_while_node_0_has_the_run_open(tmp_path):
    """Node 0 may still save for the lost node; exit code 64 would end a job of a cluster."""
    log, log_0 = tmp_path / "node-1.log", tmp_path / "node-0.log"
    opened = open_digits(tmp_path)
    variables = node_variables(2, 1)
    with node(variables, log) as first:
        until(lambda: "Node 1 of 2, rendezvous at" in log.read_text(), "node 1 waits", of=first)
        opened.close()
        with node(variables | {"JOB_COMPLETION_INDEX": "0"}, log_0) as second:
            codes = [each.wait(DEADLINE_SECONDS) for each in (first, second)]
    assert codes == [0, 0], log.read_text() + log_0.read_text()


def test_node_0_of_a_cluster_waits_for_the_lock_of_a_machine_that_is_gone(tmp_path):
    log = tmp_path / "node-0.log"
    opened = open_digits(tmp_path)
    with node(node_variables(1, 0), log) as only:
        until(lambda: "Waiting up to 120 s" in log.read_text(), "it waits", of=only)
        opened.close()
        assert only.wait(DEADLINE_SECONDS) == 0, log.read_text()


COMPILER = shutil.which("cc") or shutil.which("gcc")
STALE = "#include <errno.h>\nint flock(int fd, int op) { errno = ESTALE; return -1; }\n"


@pytest.mark.skipif(sys.platform != "linux" or not COMPILER, reason="needs a compiler on Linux")
def test_a_file_server_that_does_not_respond_is_no_error_in_the_spec(tmp_path):
    """64 would end a job of a cluster, where another attempt can succeed."""
    (tmp_path / "stale.c").write_text(STALE)
    build = (COMPILER, "-shared", "-fPIC", "-o", "stale.so", "stale.c")
    assert command(*build, cwd=tmp_path, timeout=DEADLINE_SECONDS).returncode == 0
    assert evenstep("run", "digits", "--stop-at", 1, cwd=tmp_path).returncode == 75
    ended = evenstep("run", "digits", cwd=tmp_path, LD_PRELOAD=str(tmp_path / "stale.so"))
    assert ended.returncode == 1, ended.stderr
    assert "digits cannot be used: Stale file handle.\n" in ended.stderr
