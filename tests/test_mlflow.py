"""MLflow: its real server holds each row once, and a broken one hurts nothing."""

from __future__ import annotations

import json
import math
import os
import re
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from clients import free_port
from commands import DEADLINE_SECONDS, ROOT, command, evenstep
from mlflow_server import mlflow_server

from service.observability.mlflow_backend import key_of
from service.runs.tracking import read_metrics

# MLflow's own client, in a process of its own: its imports warn.
CLIENT = """
import json, sys
from mlflow.tracking import MlflowClient
client = MlflowClient(sys.argv[1])
experiment = client.get_experiment_by_name(sys.argv[2])

def files(number, folder=None):
    for entry in client.list_artifacts(number, folder):
        yield from files(number, entry.path) if entry.is_dir else [entry.path]

found = []
for run in client.search_runs([experiment.experiment_id]) if experiment else ():
    number = run.info.run_id
    found.append({
        "name": run.info.run_name, "status": run.info.status, "parameters": run.data.params,
        "tags": run.data.tags,
        "metrics": {key: [(m.step, str(m.value), m.timestamp)
                    for m in client.get_metric_history(number, key)] for key in run.data.metrics},
        "files": list(files(number)),
    })
print(json.dumps(found))
"""
# One attempt after the other, each with some rows, by the writer that a run uses.
ATTEMPT = """
import json, sys
from pathlib import Path
from service.observability.logged_files import LoggedFiles
from service.observability.other_writers import second_writers
from service.runs.tracking import MetricsFile, Tracker
from service.spec.models import TrackingSpec
task = json.loads(sys.argv[1])
place, resume, said = Path(task["place"]), task["resume"], []
tracking = TrackingSpec.model_validate({"mlflow": task["mlflow"]})
metrics = MetricsFile(place / "metrics.jsonl", resume_step=resume)
[writer] = second_writers(tracking, directory=place, name="by hand", run_id="by-hand-1",
                          config=task["config"], resume_step=resume, say=said.append)
writer._close_seconds = task["close_seconds"]
tracker = Tracker([metrics, writer], epoch_at=float, resume_step=resume)
logged = LoggedFiles(place / "logged", resume_step=resume)
for step in task["steps"]:
    files = [logged.write(step, "text", "note", f"at {step}".encode())] if step == 3 else []
    tracker.log(step, {"train/loss": 1 / step, "train/lr/*.bias": 0.5, **task["values"]}, files)
tracker.close(task["outcome"])
if task["prints_limits"]:
    import os
    from mlflow.environment_variables import (
        MLFLOW_HTTP_REQUEST_MAX_RETRIES, MLFLOW_HTTP_REQUEST_TIMEOUT)
    said += ["", str(MLFLOW_HTTP_REQUEST_TIMEOUT.get()), str(MLFLOW_HTTP_REQUEST_MAX_RETRIES.get())]
    said.append(str([name for name in os.environ if name.startswith("MLFLOW_HTTP")]))
print(json.dumps(said))
"""


def python(script: str, *words: str) -> Any:
    done = command(
        *(sys.executable, "-W", "ignore", "-c", script, *words), cwd=ROOT, timeout=DEADLINE_SECONDS
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def attempt(place: Path, uri: str, steps: list[int], **more: Any) -> list[str]:
    """What the writer said in one attempt."""
    asked = {"experiment": "by hand", "uri": uri}
    task = {"place": str(place), "mlflow": asked, "steps": steps, "resume": None}
    task |= {"config": {"a": {"b": 1}}, "values": {}, "outcome": "done", "close_seconds": 60}
    task["prints_limits"] = False
    said: list[str] = python(ATTEMPT, json.dumps(task | more))
    return said


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with mlflow_server(tmp_path_factory.mktemp("mlflow")) as uri:
        yield uri


def test_mlflow_holds_exactly_the_rows_of_both_attempts_in_one_run(
    server: str, tmp_path: Path
) -> None:
    words = ("run", "digits", "length.epochs=2", "tracking.wandb=")
    asked = f"tracking.mlflow={{experiment: tests, uri: '{server}'}}"
    stopped = evenstep(*words, asked, "--stop-at", 13, cwd=tmp_path)
    assert stopped.returncode == 75, stopped.stderr
    [held] = python(CLIENT, server, "tests")
    assert held["status"] == "KILLED"
    done = evenstep(*words, asked, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for ended in (stopped, done):
        assert "lacks" not in ended.stdout
        assert "MLflow" not in ended.stderr
    [held] = python(CLIENT, server, "tests")
    rows = read_metrics(tmp_path / "runs/digits/metrics.jsonl")
    wanted: dict[str, list[list[Any]]] = {}
    for row in rows:
        for key, value in row.items():
            if key not in ("step", "epoch", "time"):
                wanted.setdefault(key, []).append(
                    [int(row["step"]), str(value), int(row["time"] * 1000)]
                )
    assert held["metrics"] == {key_of(key): points for key, points in wanted.items()}
    assert (held["name"], held["status"]) == ("digits", "FINISHED")
    assert held["parameters"]["optimizer.lr"] == "0.1"
    assert held["parameters"]["spec_sha256"]
    facts = json.loads((tmp_path / "runs/digits/run.json").read_text())
    assert held["tags"]["evenstep.run"] == facts["id"]


def test_a_resume_sends_what_a_dead_server_lacks_with_its_files(
    server: str, tmp_path: Path
) -> None:
    dead = f"http://127.0.0.1:{free_port()}"
    said = attempt(tmp_path, dead, [1, 2, 3, 4], outcome="failed")
    assert len(said) == 2, said
    assert said[0].startswith("MLflow stopped: MlflowException: API request to")
    assert said[0].endswith("Training continues without it.")
    assert said[1].startswith("MLflow lacks 4 of this attempt's 4 rows: ")
    infinite = {"a": math.inf, "b": math.nan}
    changed = {"config": {"a": {"b": 2}, "c": "x" * 7000, "d": None}, "values": infinite}
    assert attempt(tmp_path, server, [5], resume=4, **changed) == []
    [held] = python(CLIENT, server, "by hand")
    losses = [(step, float(value)) for step, value, _ in held["metrics"]["train/loss"]]
    assert losses == [(step, 1 / step) for step in (1, 2, 3, 4, 5)]
    assert [float(v) for _, v, _ in held["metrics"][key_of("train/lr/*.bias")]] == [0.5] * 5
    assert math.isnan(float(held["metrics"]["b"][0][1]))
    assert held["parameters"]["a.b"] == "2"
    assert len(held["parameters"]["c"]) == 6000
    assert "d" not in held["parameters"]
    assert held["files"] == ["logged/step-00000003/texts/note.txt"], "as in the run's directory"

    # An attempt from an older checkpoint repeats no step; a parameter that is changed is a tag.
    changed["config"] = {"a": {"b": 3}, "c": None}
    assert attempt(tmp_path, server, [4, 5, 6], resume=3, outcome="failed", **changed) == []
    [held] = python(CLIENT, server, "by hand")
    assert [step for step, _, _ in held["metrics"]["train/loss"]] == [1, 2, 3, 4, 5, 6]
    assert (held["parameters"]["a.b"], held["tags"]["evenstep.changed.a.b"]) == ("2", "3")
    assert held["tags"]["evenstep.changed.c"] == "(not given)"
    assert held["status"] == "FAILED"

    # A tag may be shorter than a parameter, and its key longer; what is as at first has no tag.
    key = "k" * 245
    changed["config"] = {"a": {"b": 2, key: 1}, "c": "x" * 7000}
    assert attempt(tmp_path, server, [7], resume=6, **changed) == []
    [held] = python(CLIENT, server, "by hand")
    assert not [tag for tag in held["tags"] if tag.startswith("evenstep.changed")]
    changed["config"] = {"a": {"b": 2, key: 2}, "c": "y" * 7000}
    assert attempt(tmp_path, server, [8], resume=7, **changed) == []
    [held] = python(CLIENT, server, "by hand")
    told = {k: v for k, v in held["tags"].items() if k.startswith("evenstep.changed")}
    assert sorted(map(len, told)) == [18, 250]
    assert len(told["evenstep.changed.c"]) == 5000

    # Keys that MLflow takes for one, or not at all, keep no row out.
    changed["config"] |= {"a@b": 1, "a#b": 2, "y.z": 3, "y": {"z": 4}, "q" * 300: 5, "": 6, "r/": 7}
    assert attempt(tmp_path, server, [9], resume=8, **changed) == []
    [held] = python(CLIENT, server, "by hand")
    assert held["metrics"]["train/loss"][-1][0] == 9
    assert [held["parameters"][key_of(key)] for key in ("a@b", "a#b", "r/")] == ["1", "2", "7"]
    assert [held["parameters"][key] for key in ("y.z", key_of('"y.z"'))] == ["4", "3"]

    # Limits for our requests alone: not for those of the task, nor for the processes it starts.
    assert attempt(tmp_path, server, [10], resume=9, prints_limits=True)[1:] == ["120", "7", "[]"]


def test_two_keys_never_become_one_key_of_mlflow() -> None:
    keys = ["a/b", "a*b", "a?b", "a_b", "/a/b", "a//b", "a/./b", "a/../b", "../b", ".", "..", "a/"]
    keys += ["x" * 250, "x" * 251, "x" * 252, "é", "a b", "\udc80", "", "a:b"]
    found = {key: key_of(key) for key in keys}
    assert len(set(found.values())) == len(keys)
    for key, accepted in found.items():
        assert re.fullmatch(r"[\w. /-]{1,250}", accepted), key
        assert os.path.normpath(accepted) == accepted
        assert not accepted.startswith(("/", ".."))
    for plain in ("a/b", "a_b", "x" * 250, "é", "a b", "train/lr"):
        assert found.get(plain, key_of(plain)) == plain


@contextmanager
def broken(how: str) -> Iterator[str]:
    """The address of a server that answers each request with 500, or takes it and says nothing."""
    if how == "silent":
        with socket.create_server(("127.0.0.1", 0)) as silent:
            yield f"http://127.0.0.1:{silent.getsockname()[1]}"
        return

    class Failing(BaseHTTPRequestHandler):
        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_error(500)

        do_GET = do_POST = answer

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Failing) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("how", ["500", "silent"])
def test_a_server_that_is_broken_is_told_and_costs_no_row_of_the_file(
    how: str, tmp_path: Path
) -> None:
    close_seconds = 60 if how == "500" else 1
    with broken(how) as uri:
        said = attempt(tmp_path, uri, list(range(1, 30)), close_seconds=close_seconds)
    assert said[-1].startswith("MLflow lacks 29 of this attempt's 29 rows: ")
    reason = "API request to" if how == "500" else "it had not finished after 1 s"
    assert reason in said[-1]
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 29


def test_a_run_ends_well_while_its_server_is_dead(tmp_path: Path) -> None:
    asked = f"tracking.mlflow={{experiment: tests, uri: 'http://127.0.0.1:{free_port()}'}}"
    done = evenstep("run", "digits", "length.steps=3", "length.epochs=", asked, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "MLflow lacks 1 of this attempt's 1 rows" in done.stdout


def test_a_password_in_the_address_is_refused(tmp_path: Path) -> None:
    asked = "tracking.mlflow={experiment: a, uri: 'https://me:secret@mlflow.example.com'}"
    told = evenstep("run", "digits", asked, cwd=tmp_path)
    assert told.returncode == 64
    assert "tracking.mlflow.uri: must have no password" in told.stderr
    assert "MLFLOW_TRACKING_PASSWORD" in told.stderr
    told = evenstep("run", "digits", "tracking.mlflow={experiment: ''}", cwd=tmp_path)
    assert told.returncode == 64
    assert "tracking.mlflow.experiment" in told.stderr
