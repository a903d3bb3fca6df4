"""Processes that are all stopped for a while and continued go on as if nothing had happened."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import psutil
import pytest
from commands import ROOT, start
from injuring import (
    DEADLINE_SECONDS,
    descendants,
    ended,
    facts_of,
    injured,
    rows_of,
    started,
    until,
)
from processes import ProcessesOf

from service.distributed.world import World, be_patient
from service.health.heartbeat import Heartbeat
from service.health.sentinel import LOCKED_CODE
from service.health.watchdog import _Watch, watched
from service.runs.directory import RunDirectory
from service.runs.verification import compare

TIMEOUT_SECONDS = 2.0
STEPS = 80
HELD_UP_TIMEOUT_SECONDS = 4.0
SOON_SECONDS = 60.0


def stop_and_continue(processes: set[int], seconds: float) -> None:
    """As `kill -STOP` and `kill -CONT` do, or a container that is frozen for a while."""
    for process in processes:
        os.kill(process, signal.SIGSTOP)
    time.sleep(seconds)  # the fault itself
    for process in processes:
        os.kill(process, signal.SIGCONT)


@pytest.mark.skipif(sys.platform != "linux", reason="processes are found by /proc")
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_that_is_stopped_and_continued_continues(tmp_path: Path, processes: int) -> None:
    environ = injured(
        tmp_path,
        length={"steps": STEPS},
        faults={"hang_timeout_seconds": TIMEOUT_SECONDS, "startup_timeout_seconds": 60},
        checkpoint={"every_steps": 40},
        test={"every_steps": 40},
    )
    words = ("--processes", processes)
    with started(*words, cwd=tmp_path, **environ) as launcher:
        until(lambda: rows_of(tmp_path) > 5, "five steps", of=launcher)
        stop_and_continue({launcher.pid} | descendants(launcher.pid), 3 * TIMEOUT_SECONDS)
        assert rows_of(tmp_path) < STEPS, "it was over before it was stopped"
        _, err = launcher.communicate(timeout=DEADLINE_SECONDS)
    assert launcher.returncode == 0, err
    assert [attempt["outcome"] for attempt in facts_of(tmp_path)["attempts"]] == ["done"]
    assert not list((tmp_path / "runs/job/failures").glob("*"))
    assert not [f for f in (tmp_path / "runs/job/logs").glob("*.stacks") if f.stat().st_size]
    assert ended(*words, "--name", "whole", cwd=tmp_path)[0] == 0
    runs = (RunDirectory(tmp_path / "runs" / name) for name in ("job", "whole"))
    compared = compare(*runs, level="bits", tolerance=0.0)
    assert compared.equal, compared.lines


@pytest.mark.skipif(sys.platform != "linux", reason="whether a process is stopped is in /proc")
def test_one_process_that_is_stopped_without_its_sentinel_continues(tmp_path: Path) -> None:
    faults = {"hang_timeout_seconds": TIMEOUT_SECONDS}
    environ = injured(tmp_path, length={"steps": STEPS}, faults=faults)
    with started(cwd=tmp_path, **environ) as run:
        until(lambda: rows_of(tmp_path) > 1, "a step", of=run)
        stop_and_continue({run.pid}, 3 * TIMEOUT_SECONDS)
        assert rows_of(tmp_path) < STEPS, "it was over before it was stopped"
        _, err = run.communicate(timeout=DEADLINE_SECONDS)
    assert run.returncode == 0, err


@pytest.mark.parametrize(("processes", "code"), [(1, -signal.SIGKILL), (2, 1)])
def test_a_process_that_holds_pythons_lock_is_killed(
    tmp_path: Path, processes: int, code: int
) -> None:
    injury = ("hang, lock held", "forward", processes - 1, 40)
    faults = {"hang_timeout_seconds": TIMEOUT_SECONDS}
    # Slow steps: one of them is looked at, so that the limit of the start is over.
    environ = injured(tmp_path, injury, pause=0.05, length={"steps": 80}, faults=faults)
    found, _, err = ended("--processes", processes, cwd=tmp_path, **environ)
    assert found == code, err
    told = re.findall(r"error: (.*)This process has not answered for \d s: (.*) Its stacks", err)
    assert len(told) == 1, err
    assert told[0][0] == ("" if processes == 1 else "rank 1: ")
    stacks = (tmp_path / f"runs/job/logs/rank-{processes - 1}.stacks").read_text()
    assert "in _hang_with_the_lock" in stacks


CONTAINERS = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("unshare") is None,
    reason="a process namespace needs root, and unshare",
)
COLD_TIMEOUT_SECONDS = 6.0
"""For one that imports everything itself, in its first step too."""
CONTAINER = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")


@CONTAINERS
def test_process_1_of_a_container_continues_after_a_pause(tmp_path: Path) -> None:
    faults = {"hang_timeout_seconds": COLD_TIMEOUT_SECONDS}
    environ = injured(tmp_path, length={"steps": 100_000}, faults=faults)
    with started(cwd=tmp_path, before=CONTAINER, **environ) as outer:
        until(lambda: rows_of(tmp_path) > 1, "a step", of=outer)
        [run] = [p for p in descendants(outer.pid) if psutil.Process(p).ppid() == outer.pid]
        stop_and_continue(descendants(outer.pid), 1.5 * COLD_TIMEOUT_SECONDS)
        rows = rows_of(tmp_path)
        until(lambda: rows_of(tmp_path) > rows + 5, "steps after the pause", of=outer)
        os.kill(run, signal.SIGTERM)
        _, err = outer.communicate(timeout=DEADLINE_SECONDS)
    assert outer.returncode == 75, err


@CONTAINERS
def test_process_1_that_holds_pythons_lock_is_ended(tmp_path: Path) -> None:
    injury = ("hang, lock held", "forward", 0, 40)
    faults = {"hang_timeout_seconds": COLD_TIMEOUT_SECONDS}
    environ = injured(tmp_path, injury, pause=0.07, length={"steps": 80}, faults=faults)
    with started(cwd=tmp_path, before=CONTAINER, **environ) as outer:
        _, err = outer.communicate(timeout=DEADLINE_SECONDS)
    assert outer.returncode == LOCKED_CODE, err
    assert "error: This process has not answered for" in err
    assert "in _hang_with_the_lock" in (tmp_path / "runs/job/logs/rank-0.stacks").read_text()


def test_a_lock_taken_before_the_first_interval_of_looks_is_no_endless_hang(
    tmp_path: Path,
) -> None:
    injury = ("hang, lock held", "forward", 0, 1)
    faults = {"hang_timeout_seconds": 60.0, "startup_timeout_seconds": 8}
    environ = injured(tmp_path, injury, length={"steps": 80}, faults=faults)
    found, _, err = ended(cwd=tmp_path, **environ)
    assert found == -signal.SIGKILL, err
    assert "error: This process has not answered for" in err


def outlast(world: World) -> list[int]:
    """What each process hears where one of them comes later than torch's own limit."""
    be_patient(timedelta(seconds=1), None)
    world.leave_limits_to_the_watchdog()
    if world.index == 1:
        time.sleep(2.5)  # the fault itself
    return world.gather(world.index)


def test_the_limit_of_a_collective_ends_no_run_that_is_watched(processes: ProcessesOf) -> None:
    assert processes(2).run(outlast) == [[0, 1], [0, 1]]


def wait_for_one_that_is_held_up(world: World, place: Path) -> list[str]:
    """What the watchdog of rank 1 says while rank 0 saves, and for once tells nothing for long."""
    heartbeat = Heartbeat(rank=world.index, scratch=place)
    heartbeat.enter("save", 1)
    told: list[str] = []
    if world.index == 0:
        for seconds in (*[0.2] * 8, 0.85 * HELD_UP_TIMEOUT_SECONDS, *[0.2] * 3):
            heartbeat.moved()
            heartbeat.write()
            time.sleep(seconds)
        world.barrier()
        return told

    def leave(code: int, message: str) -> NoReturn:
        told.append(message)
        raise SystemExit(code)  # of the watchdog's thread

    limits = dict.fromkeys(("startup_timeout_seconds", "hook_timeout_seconds"), 60.0)
    with watched(
        heartbeat, processes=2, timeout_seconds=HELD_UP_TIMEOUT_SECONDS, leave=leave, **limits
    ):
        world.barrier()
    return told


def leave(code: int, message: str) -> NoReturn:
    raise AssertionError(message)


def test_a_rank_that_has_stood_still_for_long_has_time_for_its_next_heartbeat(
    tmp_path: Path,
) -> None:
    """Its watchdog may be late on a busy machine: an eighth of the limit was too short."""
    other = Heartbeat(rank=0, scratch=tmp_path)
    other._place = ("save", 1, -1, time.monotonic() - 1.9)
    other.write()
    ours = Heartbeat(rank=1, scratch=tmp_path)
    ours.enter("save", 1)
    watch = _Watch(ours, 2, 2.0, {}, leave, threading.Event(), None)
    awaited = watch._last_moved(ours.place, 100.0, 2.0)
    assert (awaited.rank, awaited.until) == (0, 101.0)


def test_a_rank_that_tells_nothing_has_the_whole_limit_too(
    processes: ProcessesOf, tmp_path: Path
) -> None:
    assert processes(2).run(wait_for_one_that_is_held_up, tmp_path) == [[], []]


def hang_beside_a_strange_beat(world: World, place: Path) -> list[str]:
    """What the watchdog of rank 0 says, with a heartbeat that another version of rank 1 wrote."""
    heartbeat = Heartbeat(rank=0, scratch=place)
    heartbeat.enter("forward", 1)
    strange = heartbeat.record() | {"rank": 1, "work": "dancing"}
    (place / "rank-1.beat").write_text(json.dumps(strange))
    told: list[str] = []
    over = threading.Event()

    def leave(code: int, message: str) -> NoReturn:
        told.append(message)
        over.set()
        raise SystemExit(code)  # of the watchdog's thread

    limits = dict.fromkeys(("startup_timeout_seconds", "hook_timeout_seconds"), 60.0)
    with watched(
        heartbeat, processes=2, timeout_seconds=HELD_UP_TIMEOUT_SECONDS, leave=leave, **limits
    ):
        over.wait(SOON_SECONDS)
    return told


def test_a_heartbeat_that_is_not_understood_ends_no_watchdog(
    processes: ProcessesOf, tmp_path: Path
) -> None:
    [[told]] = processes(1).run(hang_beside_a_strange_beat, tmp_path)
    assert told.startswith("Rank 1 has not answered for"), told


LOOKS = """
import time
looks = 0
def look(seconds):
    global looks
    looks += 1
    if looks == 1:
        print("waiting", flush=True)
    time.sleep(min(seconds, 0.2))
"""
WAITS = {
    "limit": """
from service.basics.running_time import TimeLimit
assert not TimeLimit(2.5).wait(look)
""",
    "hook": """
from service.evaluation.hooks import HookTimeout, _Limit
try:
    with _Limit(2.5).over():
        while True:
            look(1.0)
except HookTimeout:
    pass
""",
}


@pytest.mark.parametrize("which", WAITS)
def test_a_limit_does_not_count_the_time_in_which_its_process_is_stopped(which: str) -> None:
    words = [sys.executable, "-c", f"{LOOKS}{WAITS[which]}print(looks)"]
    with start(words, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "waiting\n"
        stop_and_continue({process.pid}, 4.0)
        assert int(process.stdout.read()) >= 3, "each look counts for one second at most"
    assert process.returncode == 0
