"""A run's directory: on a network's file system, and in a checkout of whatever content."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commands import DEADLINE_SECONDS, ROOT, command, evenstep

from service.runs.directory import git_facts

# flock as an NFS client of Linux does it (flock(2), "NFS details"): a byte-range lock on the whole
# file, for which it must be open to write.  Between two openings of one process it holds as well.
NFS = """
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sys/file.h>
int flock(int fd, int op) {
    struct flock whole = {0};
    whole.l_type = (op & LOCK_UN) ? F_UNLCK : (op & LOCK_EX) ? F_WRLCK : F_RDLCK;
    int done = fcntl(fd, (op & LOCK_NB) ? F_OFD_SETLK : F_OFD_SETLKW, &whole);
    if (done < 0 && (errno == EACCES || errno == EAGAIN)) errno = EWOULDBLOCK;
    return done;
}
"""
COMPILER = shutil.which("cc") or shutil.which("gcc")


@pytest.mark.skipif(sys.platform != "linux" or not COMPILER, reason="needs a compiler on Linux")
def test_a_run_on_nfs_is_resumed_and_refused_to_a_second_writer(tmp_path):
    (tmp_path / "nfs.c").write_text(NFS)
    build = (COMPILER, "-shared", "-fPIC", "-o", "nfs.so", "nfs.c")
    assert command(*build, cwd=tmp_path, timeout=DEADLINE_SECONDS).returncode == 0
    nfs = {"LD_PRELOAD": str(tmp_path / "nfs.so")}
    words = ("run", "digits", "length={steps: 4}")
    assert evenstep(*words, "--stop-at", 2, cwd=tmp_path, **nfs).returncode == 75
    hold = (
        "import fcntl, subprocess, sys\n"
        "lock = open('runs/digits/.lock', 'r+')\n"
        "fcntl.flock(lock, fcntl.LOCK_EX)\n"
        "sys.exit(subprocess.run(sys.argv[1:]).returncode)"
    )
    start = (sys.executable, "-c", hold, Path(sys.executable).parent / "evenstep", *words)
    held = command(*start, cwd=tmp_path, timeout=DEADLINE_SECONDS, **nfs)
    assert held.returncode == 64
    assert "is being written by process" in held.stderr
    again = evenstep(*words, cwd=tmp_path, **nfs)
    assert again.returncode == 0, again.stderr
    assert "Resuming after step 2" in again.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere every path is UTF-8")
def test_no_run_begins_where_it_could_never_resume(tmp_path):
    """Its checkpoints could be written, but safetensors opens no such path."""
    place = tmp_path / os.fsdecode(b"caf\xe9")
    place.mkdir()
    ended = evenstep("run", "digits", "--stop-at", 1, cwd=place)
    assert ended.returncode == 64, ended.stdout
    assert r"caf\udce9/runs/digits: this path is not valid UTF-8, so no checkpoint" in ended.stderr
    (place / "job.yaml").write_text((ROOT / "service/recipes/digits.yaml").read_text())
    words = ("run", place / "job.yaml", "--stop-at", 1)
    assert evenstep(*words, cwd=tmp_path).returncode == 75, "the spec alone lies there"
    ended = evenstep(*words, "task=./my_task.py:task", cwd=place)
    assert ended.returncode == 64, ended.stdout
    assert r"caf\udce9/my_task.py: this path is not valid UTF-8" in ended.stderr
    assert [path.name for path in place.iterdir()] == ["job.yaml"]


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository with one file, n.txt, in the working directory."""
    monkeypatch.chdir(tmp_path)
    Path("n.txt").write_bytes(b"caf\xe9 1\n")
    git("init", "-q")
    git("add", "-A")
    git("-c", "user.name=a", "-c", "user.email=a@example.com", "commit", "-qm", "x")
    return tmp_path


def git(*words):
    subprocess.run(["git", *words], check=True)


def test_a_run_starts_in_a_checkout_with_a_changed_file_that_is_not_utf_8(checkout):
    Path("n.txt").write_bytes(b"caf\xe9 2\n")
    done = evenstep("run", "digits", "length={steps: 1}", cwd=checkout)
    assert done.returncode == 0, done.stderr
    facts = json.loads(Path("runs/digits/run.json").read_text())
    assert facts["git"]["dirty"]
    assert "\n-caf\\xe9 1\n+caf\\xe9 2\n" in facts["git"]["diff"]


def test_no_program_is_run_that_a_checkout_names(checkout):
    Path("ran").write_text('#!/bin/sh\necho "$0" >> seen\ncat\n')
    os.chmod("ran", 0o755)
    Path(".gitattributes").write_text("*.txt filter=own diff=own\n")
    named = ["filter.own.clean", "filter.own.process", "diff.own.textconv", "diff.own.command"]
    for setting in ["core.fsmonitor", "diff.external", *named]:
        git("config", setting, "./ran")
    git("config", "filter.own.required", "true")
    Path("n.txt").write_bytes(b"other\n")
    facts = git_facts()
    assert "\n+other\n" in facts["diff"]
    assert not Path("seen").exists()


def test_of_changes_without_end_the_first_are_kept(checkout):
    Path("n.txt").write_bytes(b"a line of some length\n" * 1_000_000)
    facts = git_facts()
    assert facts["dirty"]
    assert len(facts["diff"]) == 200_000


def test_outside_of_a_checkout_there_is_nothing_to_say(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert git_facts() == {}
    monkeypatch.setenv("PATH", "")
    assert git_facts() == {}
