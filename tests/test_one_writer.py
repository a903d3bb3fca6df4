"""One process writes to a run; it lets go when it ends, however it ends."""

import os
import signal
import time
from multiprocessing import get_context
from pathlib import Path

import pytest
from commands import evenstep
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
