"""One process writes to a run; it lets go when it ends, however it ends."""

import os
import signal
from multiprocessing import get_context

import pytest
from commands import evenstep
from jobs import spec_of

from service.errors import SpecError
from service.run_directory import check_run, open_run
from service.spec_file import load_spec


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


def test_a_second_command_is_refused_before_it_starts_anything(tmp_path):
    assert evenstep("run", "digits", "--stop-at", 1, cwd=tmp_path).returncode == 75
    opened = open_run(tmp_path / "runs", load_spec(tmp_path / "runs/digits/spec.yaml"), fresh=False)
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    for words in ((), ("--processes", 2), ("--fresh",)):
        ended = evenstep("run", "digits", *words, cwd=tmp_path, PYTHONPATH=str(tmp_path))
        assert ended.returncode == 64, (ended.stdout, ended.stderr)
        assert f"is being written by process {os.getpid()} on" in ended.stderr
    opened.close()
