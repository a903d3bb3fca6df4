"""Reports of failures, and the account of a run: what they hold, and what they never hold."""

import errno
import json
import math
import os
import stat
import subprocess
import threading
import time
from pathlib import Path

import pytest
from commands import evenstep
from saves import watched

from service.basics.errors import NoProgress, SpecError
from service.health.heartbeat import Heartbeat, _opened_to_append
from service.health.watchdog import _told, who_is_behind
from service.runs.directory import check_run, open_run, read_beat
from service.runs.failure_reports import line_of_secret, read_failures, redacted, write_failure
from service.runs.goodput import account_of, each_of, failures_in_a_row
from service.spec.files import load_spec

SPEC = {
    "name": "job",
    "task": "a.b:c",
    "batch": {"global_batch": 4},
    "length": {"steps": 9},
    "optimizer": {"name": "sgd", "lr": 0.1},
}


def test_a_report_holds_no_secret(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("STORE_PASSWORD", "correct horse")
    told = {"rank": 3, "stacks": f"key={'a' * 40}", "at": ["s3://me:pass@host/x", "correct horse"]}
    path = write_failure(tmp_path, told)
    assert path is not None
    assert path.name.endswith("-rank-3.json")
    assert json.loads(path.read_text())["at"] == ["s3://***@host/x", "***"]
    assert "aaaa" not in path.read_text()
    assert write_failure(tmp_path, told) != path, "a second one in the same second is another"
    assert len(list(read_failures(tmp_path))) == 2


def test_a_short_or_harmless_value_is_left_alone():
    assert redacted("key: 1", {"A_KEY": "1", "HOME": "key: 1"}) == "key: 1"


NAMED = ["DB_PASS", "PGPWD_PWD", "GITHUB_PAT", "HTTP_AUTH", "AUTHORIZATION", "GPG_PASSPHRASE"]


@pytest.mark.parametrize("name", NAMED)
def test_the_value_of_a_name_like_password_is_secret(name):
    assert redacted("it was correct horse", {name: "correct horse"}) == "it was ***"


HARMLESS = ["PWD", "OLDPWD", "GIT_AUTHOR_NAME", "PATH", "SSH_AUTH_SOCK", "XAUTHORITY", "COMPASS"]


@pytest.mark.parametrize("name", [*HARMLESS, "TOKENIZERS_PARALLELISM"])
def test_the_value_of_a_harmless_name_is_not_secret(name):
    assert redacted("it was correct horse", {name: "correct horse"}) == "it was correct horse"


CODE = """
-API_KEY = "0123456789abcdef0123"
+hub_token: str = 'hf_abcdefghijklmnopqrstuvwxyzABCDEF'
+s3 = connect("AKIAIOSFODNN7EXAMPLE", config["secret_key"] = "wJalrXUtnFEMI")
+pad_token = "<pad>"
+rows = open("s3://me:hush@host/rows")
"""


def test_changes_are_kept_without_keys_and_for_their_owner_alone(tmp_path, monkeypatch):
    def git(*words):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], check=True)

    monkeypatch.chdir(tmp_path)
    git("init", "-q")
    Path("task.py").write_text("rows = 3\n")
    git("add", "task.py")
    git("commit", "-qm", "first")
    Path("task.py").write_text(CODE)
    opened = open_run(tmp_path / "runs", load_spec(SPEC), fresh=False)
    opened.start_attempt(processes=1, device="cpu", step=0)
    opened.close()
    text = opened.directory.facts.read_text()
    assert "pad_token" in text, "what changed is kept"
    for key in ("0123456789abcdef", "hf_abc", "AKIAIO", "wJalr", "hush"):
        assert key not in text
    assert stat.S_IMODE(opened.directory.facts.stat().st_mode) == 0o600


def test_the_line_of_a_secret_is_found_and_a_harmless_text_is_none():
    assert line_of_secret("import os\n" + CODE) == 3
    for line in ('key = os.environ["STORE_KEY"]', 'pad_token = "<|endoftext|>"', 'key = "rows/3"'):
        assert line_of_secret(line) is None, line


def test_a_run_remembers_no_secret_of_its_command(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "hush-hush-hush")
    monkeypatch.setattr("sys.argv", ["evenstep", "run", "task_args.token=hush-hush-hush"])
    opened = open_run(tmp_path, load_spec(SPEC), fresh=False)
    opened.close()
    assert "hush-hush-hush" not in opened.directory.facts.read_text()


SECRETS = ["hush-hush-hush", "s3://me:hush@host/rows", "https://host/?k=hush-and-hush-and-hush"]


@pytest.mark.parametrize("secret", SECRETS)
def test_a_spec_that_holds_a_secret_is_refused_before_anything_is_written(
    tmp_path, monkeypatch, secret
):
    monkeypatch.setenv("MY_TOKEN", "hush-hush-hush")
    monkeypatch.setenv("STORE_KEY", "hush-and-hush-and-hush")
    spec = load_spec(SPEC | {"task_args": {"rows": [{"from": secret}]}})
    for begin in (check_run, open_run):
        with pytest.raises(SpecError, match=r"^task_args.rows\[0\].from contains a secret") as told:
            begin(tmp_path, spec, fresh=False)
        assert "hush" not in str(told.value)
    assert not list(tmp_path.iterdir())


LEAKING = """
import os

def task():
    raise RuntimeError("no way in with " + os.environ["STORE_KEY"] + " to s3://me:hush@host")

def late():
    import torch
    from torch.utils.data import TensorDataset
    from service.data.task import supervised

    class Model(torch.nn.Linear):
        calls = 0

        def forward(self, rows):
            self.calls += 1
            return super().forward(rows) if self.calls < 9 else task()

    rows = TensorDataset(torch.rand(40, 4), torch.arange(40) % 3)
    return supervised(model=lambda: Model(4, 3), train=rows, test=rows)
"""


MORE = {"batch": {"global_batch": 8, "micro_batch": 2}}


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("where", ["task", "late"])
def test_what_a_task_raises_shows_no_secret(tmp_path, where, processes):
    (tmp_path / "leaking.py").write_text(LEAKING)
    (tmp_path / "job.yaml").write_text(json.dumps(SPEC | MORE | {"task": f"./leaking.py:{where}"}))
    environ = {"STORE_KEY": "hush-and-hush-and-hush"}
    ended = evenstep("run", "job.yaml", "--processes", processes, cwd=tmp_path, **environ)
    assert ended.returncode == (64 if where == "task" else 1), ended.stderr
    assert "no way in with *** to s3://***@host" in ended.stderr
    for path in tmp_path.rglob("*"):
        is_task = path.name.startswith("leaking.")  # and what Python has compiled of it
        assert is_task or not path.is_file() or b"hush" not in path.read_bytes()
    assert "hush" not in ended.stdout + ended.stderr


REPORTS = {
    "a rank that is silent": ([(0, 5, "exchange", True), (1, 5, "save", None)], 1),
    "the one with fewer steps": ([(0, 5, "exchange", True), (1, 4, "save", False)], 1),
    "the one at an earlier point of the step": ([(0, 5, "agree", True), (1, 5, "test", False)], 1),
    "the one that does not wait": ([(0, 5, "exchange", False), (1, 5, "exchange", True)], 0),
}


@pytest.mark.parametrize("case", REPORTS)
def test_the_rank_behind_is(case):
    reports, behind = REPORTS[case]
    told = [
        {"rank": rank, "step": step, "work": work, "waits_for_others": waits}
        | ({"silent": True} if waits is None else {})
        for rank, step, work, waits in reports
    ]
    assert who_is_behind(told)["rank"] == behind


def test_the_seconds_of_a_pulse_add_up_to_the_time_since_it_began():
    heartbeat = Heartbeat(started=time.time() - 5)
    heartbeat.enter("data", 3)
    heartbeat.enter("forward", micro_batch=2)
    assert heartbeat.place[:3] == ("forward", 3, 2)
    assert sum(heartbeat.seconds().values()) == pytest.approx(
        time.time() - heartbeat.started, abs=2
    )
    assert heartbeat.seconds()["starting"] == pytest.approx(5, abs=2)


def test_a_clock_that_was_set_back_gives_no_negative_seconds():
    heartbeat = Heartbeat(started=time.time() + 1000)
    heartbeat.enter("data", 3)
    assert all(value >= 0 for value in heartbeat.seconds().values())


def test_a_save_newer_than_the_log_of_a_killed_attempt_leaves_a_readable_run(tmp_path):
    spec = load_spec(SPEC)
    opened = open_run(tmp_path, spec, fresh=False)
    opened.start_attempt(processes=1, device="cpu", step=0)
    opened.directory.metrics.write_text('{"step": 4}\n')
    opened.close()  # killed, and the checkpoint of step 6 was just published
    again = open_run(tmp_path, spec, fresh=False)
    again.start_attempt(processes=1, device="cpu", step=6)
    again.end_attempt("done", step=12)
    again.close()
    last = open_run(tmp_path, spec, fresh=False)
    last.close()
    facts = last.facts
    assert facts["attempts"][0]["to_step"] == 6
    assert facts["account"]["steps_again"] == 0


def test_who_trains_and_who_watches_write_one_beat(tmp_path):
    heartbeat, failed = Heartbeat(scratch=tmp_path), []

    def write():
        try:
            for _ in range(300):
                heartbeat.write()
        except OSError as error:
            failed.append(error)

    threads = [threading.Thread(target=write) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, "one renamed what another was about to"
    assert read_beat(tmp_path, 0)["work"] == "starting"
    assert os.listdir(tmp_path) == ["rank-0.beat"]


def test_a_beat_that_cannot_be_written_ends_no_run(tmp_path):
    (tmp_path / "rank-0.beat").mkdir()
    Heartbeat(scratch=tmp_path).write()
    assert read_beat(tmp_path, 0) is None


def test_reports_that_cannot_be_listed_end_no_watchdog():
    assert list(read_failures(Path("runs") / ("n" * 300))) == []


def test_a_rank_behind_that_failed_has_no_line_and_is_reported_anyway():
    failed = {"rank": 1, "step": 4, "work": "forward", "micro_batch": 2, "message": "no such file"}
    told = _told(failed, 0, 3.0)
    assert told.startswith("Rank 1 has made no progress for 3 s at step 4, micro-batch 2,")
    assert told.endswith(": no such file.")


def attempt(start: float, end: float, first: int, last: int, outcome: str, **seconds: float):
    return {
        "started": start,
        "ended": end,
        "from_step": first,
        "to_step": last,
        "outcome": outcome,
        "seconds": seconds,
    }


def test_a_step_taken_twice_counts_once():
    account = account_of(
        [
            attempt(100, 120, 0, 10, "lost", starting=8, forward=10, data=2),
            attempt(130, 140, 8, 20, "done", starting=1, forward=6, save=3),
        ]
    )
    assert account["steps_again"] == 2
    assert account["seconds"]["stopped"] == 10
    assert account["wall_seconds"] == 40
    assert math.isclose(account["goodput"], (10 * 8 / 10 + 6) / 40)


def test_each_attempt_shows_the_steps_that_counted_and_the_time_by_kind():
    first, running = (
        attempt(100, 120, 0, 10, "lost", starting=8, forward=9, data=2),
        {
            "started": 140,
            "from_step": 12,
        },
    )
    second = attempt(130, 140, 8, 12, "stopped", starting=1, test=5, save=3)
    one, other = each_of([first, second, running])
    assert (one["steps"], one["taken again"], one["training"], one["start-up"]) == (10, 2, 9, 8)
    assert (other["steps"], other["taken again"], other["testing"], other["saving"]) == (4, 0, 5, 3)
    assert each_of([]) == []


def test_only_failures_at_the_same_step_are_in_a_row():
    failed = attempt(0, 1, 4, 4, "failed")
    assert failures_in_a_row([attempt(0, 1, 0, 4, "lost"), failed, failed], 4) == 2
    assert failures_in_a_row([failed, attempt(0, 1, 4, 4, "stopped")], 4) == 0
    assert failures_in_a_row([failed, failed], 5) == 0


def test_an_attempt_that_was_killed_is_closed_by_the_next_one(tmp_path):
    spec = load_spec(SPEC)
    opened = open_run(tmp_path, spec, fresh=False)
    heartbeat = Heartbeat(started=time.time() - 3)
    heartbeat.settle(opened.directory)
    opened.start_attempt(processes=1, device="cpu", step=0, started=heartbeat.started)
    heartbeat.enter("forward", 2)
    heartbeat.write()
    opened.directory.metrics.write_text('{"step": 1}\n{"step": 4}\n{"ste')
    opened.close()  # and nothing is said of its end, as after SIGKILL
    again = open_run(tmp_path, spec, fresh=False)
    lost = again.facts["attempts"][0]
    assert (lost["outcome"], lost["to_step"]) == ("lost", 4)
    assert lost["seconds"]["starting"] == pytest.approx(3, abs=2)
    for _ in range(2):
        again.start_attempt(processes=1, device="cpu", step=0, most_failures=3)
        again.end_attempt("failed", step=0)
    with pytest.raises(NoProgress, match="3 consecutive attempts"):
        again.start_attempt(processes=1, device="cpu", step=0, most_failures=3)
    again.start_attempt(processes=1, device="cpu", step=0, most_failures=3)  # by hand, afterwards
    again.close()


@pytest.mark.parametrize("killed_before", ["spec.yaml", "logs", "run.json"])
def test_a_run_killed_in_its_first_moment_starts_over(tmp_path: Path, killed_before):
    spec = load_spec(SPEC)
    open_run(tmp_path, spec, fresh=False).close()
    directory = tmp_path / "job"
    in_order = ["run.json", "logs", "spec.yaml"]
    for name in in_order[in_order.index(killed_before) :]:
        path = directory / name
        path.rmdir() if path.is_dir() else path.unlink()
    open_run(tmp_path, spec, fresh=False).close()
    assert sorted(os.listdir(directory)) == [".lock", "logs", "run.json", "spec.yaml"]


def test_two_threads_report_progress_concurrently(tmp_path):
    heartbeat = Heartbeat(rank=3, scratch=tmp_path)
    failed = []

    def write():
        try:
            for _ in range(300):
                heartbeat.write()
        except OSError as error:
            failed.append(error)

    threads = [threading.Thread(target=write) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert [path.name for path in tmp_path.iterdir()] == ["rank-3.beat"]
    assert read_beat(tmp_path, 3)["rank"] == 3


def test_a_directory_that_an_nfs_client_remembers_as_missing_is_looked_for_again(tmp_path):
    log = tmp_path / "runs/job/logs/rank-1.log"
    log.parent.mkdir(parents=True)
    asked = set()

    def remembered(name, words):
        """As the client does it: it asks the server again for a directory that is opened."""
        asked.add(str(words[0]))
        if words[0] == log and str(tmp_path / "runs") not in asked:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(log))

    with watched(remembered), _opened_to_append(log) as file:
        file.write(b"what was said before")
    assert log.read_text() == "what was said before"
