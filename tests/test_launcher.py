"""What the launcher promises: root cause first, no orphan, no lost signal, no endless loop."""

import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from itertools import pairwise
from pathlib import Path

import psutil
import pytest
from chaos.campaign import spec_of
from commands import evenstep
from injuring import (
    DEADLINE_SECONDS,
    descendants,
    ended,
    facts_of,
    injured,
    is_alive,
    rows_of,
    started,
    until,
)
from jobs import plan_of
from processes import Processes, ProcessesOf

from launch.processes.agent import (
    Agent,
    Rank,
    end_orphans,
    of_ranks,
    rank_spec,
    reap_orphans,
)
from launch.processes.echo import _Echo, echoed
from launch.processes.local import _last_words
from service.distributed.agreed_stop import StopPoll
from service.distributed.world import World
from service.health.stop_request import StopRequest
from service.runs.receipt_file import read_receipt
from service.runs.tracking import read_metrics

SOONER_SECONDS = 110.0
"""Less than the 120 s after which a stop is no longer waited for."""


def test_the_root_cause_comes_first_with_its_traceback_and_its_code(tmp_path):
    environ = injured(tmp_path, ("raise", "forward", 1, 6))
    code, _, err = ended("--processes", 2, cwd=tmp_path, WANDB_API_KEY="k" * 40, **environ)
    assert code == 1
    assert err.index("chaos: this rank fails") < err.index("error: rank 1: RuntimeError: chaos")
    assert "job.py" in err
    assert err.count("error:") == 1, err
    (report,) = (tmp_path / "runs/job/failures").glob("*.json")
    report = json.loads(report.read_text())
    assert (report["rank"], report["kind"]) == (1, "failure")
    assert report["work"] in ("forward", "exchange")
    assert "chaos: this rank fails" in report["stacks"]
    log = (tmp_path / "runs/job/logs/rank-1.log").read_text()
    assert "chaos: this rank fails" in log
    files = [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    assert len(files) > 5
    assert not [path for path in files if b"k" * 40 in path.read_bytes()], "the key is nowhere"


LEAVES = """
import os
from service.recipes import digits
from service.task import supervised

passes = 0

def left(model, inputs):
    global passes
    passes += model.training
    if passes == 20 and os.environ["RANK"] == "1":
        print("a library gives up", flush=True)
        os._exit(9)

def network():
    model = digits.network(8, 0.25)
    model.register_forward_pre_hook(left)
    return model

def task():
    train, test = digits.split_by_class(*digits.load())
    return supervised(model=network, train=train, test=test, measures=("accuracy",))
"""


def test_a_rank_that_a_library_ends_is_named_with_its_code(tmp_path):
    """Not the loss that its peer reports."""
    (tmp_path / "leaves.py").write_text(LEAVES)
    words = ("run", "digits", "task=./leaves.py:task", "task_args={}", "--processes", 2)
    done = evenstep(*words, cwd=tmp_path)
    assert done.returncode == 9, done.stderr
    assert "error: rank 1 ended with code 9.\n" in done.stderr
    (report,) = (tmp_path / "runs/digits/failures").glob("*.json")
    report = json.loads(report.read_text())
    assert (report["rank"], report["message"]) == (1, "error: rank 1 ended with code 9.")
    assert "a library gives up" in report["stacks"]


@pytest.mark.parametrize("moment", ["rehearsal", "forward"])
def test_out_of_memory_says_what_would_fit(tmp_path, moment):
    environ = injured(tmp_path, ("out of memory", moment, 1, 1))
    code, _, err = ended("--processes", 2, cwd=tmp_path, **environ)
    assert code == 137, err
    assert "error: rank 1: Out of memory: " in err
    assert (
        "batch.micro_batch=4 halves the memory that the rows of one pass take (now 9 rows)" in err
    )


def test_a_crash_loop_ends_with_42(tmp_path):
    crashes = [("kill one", "forward", n % 2, 1) for n in range(9)]
    environ = injured(tmp_path, *crashes, faults={"attempts_without_progress": 3})
    code, _, err = ended("--processes", 2, "--max-restarts", 8, cwd=tmp_path, **environ)
    assert code == 42, err
    assert "3 consecutive attempts failed without a new checkpoint after step 0" in err
    outcomes = [attempt["outcome"] for attempt in facts_of(tmp_path)["attempts"]]
    assert len(outcomes) == 4
    assert set(outcomes[:3]) <= {"lost", "failed"}
    assert outcomes[3] == "gave up"
    assert err.count("was killed by SIGKILL") == 3


def test_an_elastic_run_continues_with_one_process_fewer(tmp_path):
    environ = injured(tmp_path, ("kill one", "forward", 2, 11))
    words = ("--processes", 3, "--max-restarts", 1)
    code, _, err = ended(*words, "--elastic", cwd=tmp_path, **environ)
    assert code == 0, err
    assert "Restarting on 2 processes" in err
    assert [attempt["processes"] for attempt in facts_of(tmp_path)["attempts"]] == [3, 2]
    rows = read_receipt(tmp_path / "runs/job/receipt.jsonl")
    assert ended("--name", "whole", cwd=tmp_path)[0] == 0
    assert rows == read_receipt(tmp_path / "runs/whole/receipt.jsonl")
    account = facts_of(tmp_path)["account"]
    assert account["steps"] == 12
    assert 0 < account["goodput"] < 1


def test_an_elastic_run_that_is_bitwise_continues_with_half_of_its_processes(tmp_path):
    """With 3 of 4, it would end with an error in the spec."""
    environ = injured(tmp_path, ("kill one", "forward", 1, 11))
    words = ("exactness=bitwise", "--processes", 4, "--max-restarts", 3, "--elastic")
    code, _, err = ended(*words, cwd=tmp_path, **environ)
    assert code == 0, err
    assert "Restarting on 2 processes" in err
    assert [attempt["processes"] for attempt in facts_of(tmp_path)["attempts"]] == [4, 2]


def test_nothing_outlives_or_writes_after_a_killed_launcher(tmp_path):
    environ = injured(tmp_path, length={"steps": 100_000})
    with started("--processes", 2, cwd=tmp_path, **environ) as launcher:
        until(lambda: rows_of(tmp_path) > 5, "five steps", of=launcher)
        below = descendants(launcher.pid)
        assert len(below) >= 3, "a fork server and two ranks"
        launcher.kill()
        until(lambda: not any(map(is_alive, below)), "every process dead")
        rows = rows_of(tmp_path)
        launcher.wait()
    assert rows_of(tmp_path) == rows
    assert not [p for p in below if is_alive(p)]


def test_one_ctrl_c_saves_and_a_second_one_ends_immediately(tmp_path):
    environ = injured(tmp_path, length={"steps": 100_000})
    with started("--processes", 2, cwd=tmp_path, **environ) as launcher:
        until(lambda: rows_of(tmp_path) > 5, "five steps")
        os.killpg(launcher.pid, signal.SIGINT)  # as a terminal does
        _, err = launcher.communicate(timeout=DEADLINE_SECONDS)
    assert launcher.returncode == 75, err
    assert "Stopped after step" in err
    environ = injured(tmp_path, ("hang", "forward", 1, 6), length={"steps": 100_000})
    with started("--processes", 2, cwd=tmp_path, **environ) as launcher:
        until((tmp_path / "struck-0").exists, "a rank that hangs")
        below = descendants(launcher.pid)
        launcher.send_signal(signal.SIGINT)
        assert any("saving the state after" in line for line in launcher.stderr), "heard once"
        launcher.send_signal(signal.SIGINT)
        launcher.wait(timeout=SOONER_SECONDS)
    assert launcher.returncode == 130
    until(lambda: not any(map(is_alive, below)), "the death of all that it started")


def test_a_start_that_takes_long_does_not_hold_up_a_stop(tmp_path):
    environ = injured(tmp_path, ("hang", "start-up", 1, 1))
    with started("--processes", 2, cwd=tmp_path, **environ) as launcher:
        until((tmp_path / "struck-0").exists, "a rank whose data takes an hour to load")
        launcher.terminate()
        _, err = launcher.communicate(timeout=SOONER_SECONDS)
    assert launcher.returncode == 75, err
    assert "error" not in err
    code, _, err = ended("--processes", 2, cwd=tmp_path, **environ)
    assert code == 0, err
    assert [attempt["outcome"] for attempt in facts_of(tmp_path)["attempts"]] == ["done"]


def test_a_hung_rank_is_named_with_its_line(tmp_path):
    environ = injured(tmp_path, ("hang", "forward", 1, 5), faults={"hang_timeout_seconds": 2.0})
    code, _, err = ended("--processes", 2, cwd=tmp_path, **environ)
    assert code == 1, err
    assert re.search(
        r"error: rank 1: This process has made no progress for \d s at step \d+", err
    ), err
    assert "in _hang: time.sleep(3600)" in err
    found = [json.loads(p.read_text()) for p in (tmp_path / "runs/job/failures").glob("*.json")]
    assert {report["rank"] for report in found} == {0, 1}
    hung, waits = sorted(found, key=lambda report: -report["rank"])
    assert waits["last_collective"] == "exchange of gradients", "which the other never began"
    assert waits["collectives"] == hung["collectives"] + 1
    assert "_hang" in hung["stacks"]
    assert waits["waits_for_others"]
    assert not hung["waits_for_others"]


@pytest.mark.parametrize(("hangs", "code"), [(True, 1), (False, 0)])
def test_ranks_that_cannot_leave_a_note_end_all_the_same(tmp_path, hangs, code):
    injuries = [("no scratch", "forward", 1, 3), ("hang", "forward", 1, 5)][: 1 + hangs]
    environ = injured(tmp_path, *injuries, faults={"hang_timeout_seconds": 2.0})
    with tempfile.TemporaryDirectory(prefix="e-") as scratch:  # short: sockets lie in it
        found, _, err = ended("--processes", 2, cwd=tmp_path, TMPDIR=scratch, **environ)
    assert found == code, err
    assert ("error: rank 1 ended with code 1" in err) is hangs
    assert ("in _hang: time.sleep(3600)" in err) is hangs
    log = (tmp_path / "runs/job/logs/rank-1.log").read_text()
    assert "1.json could not be written: No such file or directory." in log


@pytest.mark.parametrize("dies", [True, False])
def test_a_run_goes_on_when_temporary_files_are_removed(tmp_path, dies):
    """With all of them the socket of the fork server, which a restart needs."""
    injuries = [("no temporary files", "forward", 1, 3), ("kill one", "forward", 1, 5)][: 1 + dies]
    environ = injured(tmp_path, *injuries)
    with tempfile.TemporaryDirectory(prefix="e-") as place:  # short: sockets lie in it
        words = ("--processes", 2, "--max-restarts", 1)
        code, _, err = ended(*words, cwd=tmp_path, TMPDIR=place, **environ)
    assert code == 0, err
    assert ("Restarting on 2 processes" in err) is dies
    assert "Traceback" not in err


def test_the_last_words_of_a_rank_are_read_from_any_file(tmp_path):
    log = tmp_path / "log"
    with log.open("wb") as file:
        file.seek(4 << 30)  # of weeks: what is not written takes no room
        file.write(b"the end")
    assert _last_words(log).strip("\0") == "the end"
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(log)
    for name in ("pipe", "link", "none"):
        assert _last_words(tmp_path / name) == ""


def test_a_log_is_read_once_also_without_line_ends(tmp_path):
    """As of a progress bar, and of a line longer than what is read at once."""
    said = []
    log = tmp_path / "rank-1.log"
    log.touch()
    echo = _Echo(tmp_path, [1], said.append)
    log.write_bytes(b"step 1\rstep 2\rste")
    echo.look()
    assert said == ["[rank 1] step 1", "[rank 1] step 2"]
    with log.open("ab") as file:
        file.write(b"p 3\r")
    echo.look()
    with log.open("ab") as file:
        file.write(b"\n" + b"x" * (5 << 19) + b"\nlast")
    echo.look()
    assert said[2] == "[rank 1] step 3"
    assert "".join(line.removeprefix("[rank 1] ") for line in said[3:]) == "x" * (5 << 19)
    assert max(map(len, said)) < 2 << 20
    said.clear()
    echo.look()
    assert said == []
    echo.look(last=True)
    assert said == ["[rank 1] last"]


def test_a_log_that_cannot_be_read_ends_no_launcher(tmp_path):
    said = []
    (tmp_path / "rank-1.log").symlink_to("rank-1.log")
    os.mkfifo(tmp_path / "rank-2.log")
    with echoed(tmp_path, [1, 2, 3, 4], said.append):
        (tmp_path / "rank-3.log").mkdir()
        (tmp_path / "rank-3.log" / "any").write_text("so that it has a size")
        (tmp_path / "rank-4.log").write_text("four")
    assert said == ["[rank 4] four"]


# In the second case the lead waits for the share of rank 1 for longer than a hang is given, and
# then syncs files of its own for a while.
@pytest.mark.parametrize(("ranks", "timeout"), [((0,), 3.0), ((1, 0), 2.0)])
@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_save_slower_than_the_hang_timeout_is_no_hang(tmp_path, asynchronous, ranks, timeout):
    environ = injured(
        tmp_path,
        *(("slow disk", "disk", rank, 1) for rank in ranks),
        length={"steps": 2},
        faults={"hang_timeout_seconds": timeout, "stop_budget_seconds": 11},
        checkpoint={"every_steps": 9, "asynchronous": asynchronous},
    )
    code, out, err = ended("--processes", 2, cwd=tmp_path, **environ)
    assert code == 0, err
    longest = facts_of(tmp_path)["attempts"][0]["longest_save_seconds"]
    assert longest > timeout
    assert not list((tmp_path / "runs/job/failures").glob("*"))
    told = f"(two saves of {longest:.2g} s, as measured in this run, and 10 s to exit)"
    budget = "faults.stop_budget_seconds allows 11 s"
    assert f"{told}, but {budget}. Raise it to {math.ceil(2 * longest + 10)}" in out
    assert out.count("WARNING: a stop may take") == 1
    plan = plan_of(tmp_path / "job.yaml", runs=tmp_path / "runs")
    assert f"{told}; WARNING: {budget.replace('allows', 'allows only')}, raise it to" in plan


@pytest.mark.parametrize(("rank", "count"), [(0, 8), (1, 2)])
def test_a_save_that_hangs_is_reported_with_its_line(tmp_path, rank, count):
    environ = injured(tmp_path, ("hang", "disk", rank, count), faults={"hang_timeout_seconds": 2.0})
    code, _, err = ended("--processes", 2, cwd=tmp_path, **environ)
    assert code == 1, err
    told = re.search(r"has made no progress for \d s at step \d+, saving a checkpoint: (.*)", err)
    assert told, err
    assert f"error: rank {rank}: This process" in err
    assert "in _hang: time.sleep(3600)" in told[1], "where the writer stands, not who waits for it"
    found = (tmp_path / "runs/job/failures").glob("*.json")
    assert {json.loads(path.read_text())["rank"] for path in found} == {0, 1}


def test_a_frozen_rank_does_not_hold_up_a_stop(tmp_path):
    environ = injured(
        tmp_path,
        ("SIGTERM", "test", 1, 1),
        ("SIGSTOP", "save", 0, 1),
        faults={"hang_timeout_seconds": 2.0},
        checkpoint={"every_steps": 100},
    )
    started_at = time.monotonic()
    code, _, err = ended("--processes", 2, cwd=tmp_path, **environ)
    assert code == 137, err
    assert "Rank 0 has not answered" in err
    assert time.monotonic() - started_at < SOONER_SECONDS, "not the 120 s that a stop may take"


def test_a_rank_that_ends_while_a_request_comes_does_not_end_its_launcher(capfd):
    """As if SIGTERM goes to all processes: between its look and its signal a rank can end."""
    stop = StopRequest()
    agent = Agent(rank_spec(print, processes=1), stop=stop, stop_budget_seconds=lambda: 9.0)
    process = multiprocessing.get_context("forkserver").Process(target=print)
    process.start()
    until(lambda: not Path(f"/proc/{process.pid}").exists(), "its end")
    stop.hear(signal.SIGTERM)
    agent._hurry([Rank(0, process)], 0.0)
    assert agent.stop_budget_seconds == 9.0
    process.join()
    agent._worker_group.spec.rdzv_handler.shutdown()


@pytest.mark.skipif(sys.platform != "linux", reason="a fork server is found by /proc")
def test_a_frozen_fork_server_does_not_hold_up_a_stop(tmp_path):
    more = {"faults": {"stop_budget_seconds": 2.0}, "length": {"steps": 100_000}}
    environ = injured(tmp_path, **more)
    with started("--processes", 2, cwd=tmp_path, **environ) as launcher:
        metrics = tmp_path / "runs/job/metrics.jsonl"
        until(lambda: metrics.exists() and metrics.stat().st_size, "a step")
        (server,) = [
            child
            for child in descendants(launcher.pid)
            if psutil.Process(child).ppid() == launcher.pid and psutil.Process(child).children()
        ]
        os.kill(server, signal.SIGSTOP)
        os.kill(launcher.pid, signal.SIGTERM)
        _, err = launcher.communicate(timeout=SOONER_SECONDS)
    assert launcher.returncode == 137, err


BEFORE = """
sleep 600 >/dev/null 2>&1 & echo $! > {0}/plain
setsid sleep 600 >/dev/null 2>&1 & echo $! > {0}/daemon
exec "$@"
"""


@pytest.mark.skipif(shutil.which("setsid") is None, reason="needs setsid")
def test_what_was_started_before_the_launcher_is_left_alone(tmp_path):
    """Such as a mount or a shipper of logs, in the entrypoint of a container."""
    environ = injured(tmp_path, ("kill one", "forward", 1, 6))
    before = ("sh", "-c", BEFORE.format(tmp_path), "sh")
    with started(
        "--processes", 2, "--max-restarts", 1, cwd=tmp_path, before=before, **environ
    ) as run:
        _, err = run.communicate(timeout=DEADLINE_SECONDS)
    left = {name: int((tmp_path / name).read_text()) for name in ("plain", "daemon")}
    alive = {name for name, process in left.items() if is_alive(process)}
    for name in alive:
        os.kill(left[name], signal.SIGKILL)
    assert run.returncode == 0, err
    assert "restart 1 of 1" in err
    assert alive == {"plain", "daemon"}, err


def beside_subprocesses(world: World) -> tuple[set[int], list[bool], int | None, bool]:
    """Exit codes of subprocesses of a thread, beside a launcher that reaps; whom it kills.

    And whether a subprocess of its own, and one of a rank, belong to the ranks.
    """
    codes: set[int] = set()
    thread = threading.Thread(
        target=lambda: codes.update(
            subprocess.run(["sh", "-c", "exit 3"]).returncode for _ in range(200)
        )
    )
    thread.start()
    while thread.is_alive():
        reap_orphans()
    with subprocess.Popen(["sleep", "600"]) as own:
        of_a_rank = subprocess.Popen(["sleep", "600"], start_new_session=True)
        found = {process.pid for process in of_ranks()}
        end_orphans()
        killed = own.poll()
        own.kill()
    left = is_alive(of_a_rank.pid)
    of_a_rank.wait()
    return codes, [own.pid in found, of_a_rank.pid in found], killed, left


@pytest.mark.skipif(sys.platform != "linux", reason="children are found by /proc")
def test_subprocesses_of_the_launcher_itself_keep_their_exit_codes():
    """Such as those by which cloud storage gets its credentials, in the threads that upload."""
    with Processes(1) as own:
        assert own.run(beside_subprocesses) == [({3}, [False, True], None, False)]


@pytest.mark.skipif(os.geteuid() != 0, reason="a process namespace needs root")
@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare")
def test_as_pid_1_it_reaps_and_loses_no_early_signal(tmp_path):
    namespace = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")
    environ = injured(tmp_path, length={"steps": 100_000}, loader={"workers": 1})
    with started("--processes", 2, cwd=tmp_path, before=namespace, **environ) as outer:
        first = until(lambda: listening_child(outer.pid), "PID 1 that listens")
        assert "libtorch" not in Path(f"/proc/{first}/maps").read_text(), "before torch"
        os.kill(first, signal.SIGTERM)
        _, err = outer.communicate(timeout=DEADLINE_SECONDS)
    assert outer.returncode == 75, err
    environ = injured(tmp_path, ("kill one", "forward", 1, 6), length={"steps": 100_000})
    words = ("--processes", 2, "--max-restarts", 1)
    with started(*words, cwd=tmp_path, before=namespace, **environ) as outer:
        first = until(lambda: listening_child(outer.pid), "PID 1 that listens")
        until((tmp_path / "struck-0").exists, "a rank killed")
        until(lambda: len(facts_of(tmp_path)["attempts"]) == 2, "a restart")
        until(lambda: not zombies_of(first), "no zombies")
        os.kill(first, signal.SIGTERM)
        _, err = outer.communicate(timeout=DEADLINE_SECONDS)
    assert outer.returncode == 75, err


def listening_child(outer: int) -> int | None:
    """The child of `outer`, once it handles SIGTERM."""
    for child in descendants(outer):
        status = Path(f"/proc/{child}/status").read_text()
        caught = int(re.search(r"SigCgt:\s*(\w+)", status)[1], 16)
        if caught >> (signal.SIGTERM - 1) & 1:
            return child
    return None


def zombies_of(process: int) -> list[int]:
    return [child for child in descendants(process) if not is_alive(child)]


def test_loader_workers_serve_until_the_state_is_saved(tmp_path):
    (tmp_path / "slow.py").write_text(
        "from jobs import plain_rows\ndef task():\n    return plain_rows(rows=103, test_rows=7)\n"
    )
    spec = spec_of("job", steps=100_000, hang_seconds=60)
    spec |= {"task": "./slow.py:task", "task_args": {}, "loader": {"workers": 2}}
    del spec["checkpoint"]["best"], spec["test"]
    (tmp_path / "job.yaml").write_text(json.dumps(spec))
    tests = str(Path(__file__).parent)
    with started("--processes", 2, cwd=tmp_path, PYTHONPATH=tests) as launcher:
        until(lambda: rows_of(tmp_path) > 5, "five steps")
        for process in descendants(launcher.pid) | {launcher.pid}:  # as systemd does
            os.kill(process, signal.SIGTERM)
        _, err = launcher.communicate(timeout=DEADLINE_SECONDS)
    assert launcher.returncode == 75, err
    last = read_metrics(tmp_path / "runs/job/metrics.jsonl")[-1]["step"]
    assert f"Stopped after step {last} of" in err


def polled(world: World, most_steps: int) -> list[int]:
    """The steps at which a process asks, one rank being slower than the others."""
    poll = StopPoll(world, most_steps=most_steps)
    asked: list[int] = []
    for step in range(60):
        before = poll.next_step
        stops = poll.agreed(step, wanted=step >= 40 and world.index == 1)
        if step >= before:
            asked.append(step)
        if stops:
            return asked
        if world.index == 2:
            deadline = time.monotonic() + 0.004
            while time.monotonic() < deadline:
                pass
    return asked


def test_a_resumed_run_looks_for_a_stop_after_its_first_step(alone: World) -> None:
    poll = StopPoll(alone, most_steps=50)
    assert not poll.agreed(1000, wanted=False)
    assert poll.next_step == 1001, "nothing is known yet of the duration of a step"
    assert poll.agreed(1001, wanted=True)


def test_all_ranks_ask_at_the_same_steps_and_stop_together(processes: ProcessesOf) -> None:
    first, *others = processes(3).run(polled, 7)
    assert all(other == first for other in others)
    assert first[:2] == [0, 1]
    assert max(b - a for a, b in pairwise(first)) <= 7
    assert 40 <= first[-1] <= 47
