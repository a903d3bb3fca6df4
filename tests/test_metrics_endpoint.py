"""The endpoint of a launcher: true figures, for any scraper, and nothing that harms training."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from clients import closed_by_server, free_port, get, listens, raw, serving, silent
from commands import BIN, DEADLINE_SECONDS, ROOT, evenstep, start
from injuring import descendants, until
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from prometheus_client.parser import text_string_to_metric_families as parse_older

from service.health.heartbeat import Heartbeat
from service.monitoring.endpoint import metrics_endpoint
from service.monitoring.http_server import Answer
from service.monitoring.liveness import SPARE_SECONDS, Liveness
from service.monitoring.metrics import METRICS, with_table
from service.monitoring.probe import outcome
from service.monitoring.snapshot import LatestValues, is_there
from service.runs.directory import RunDirectory, read_beat
from service.runs.tracking import read_metrics
from service.spec.files import load_spec

TASK = """
import time, torch
from torch.utils.data import Dataset
from service.task import supervised

class Tokens(Dataset):
    def __init__(self, rows, seconds): self.rows, self.seconds = rows, seconds
    def __len__(self): return self.rows
    def __getitem__(self, row):
        time.sleep(self.seconds)
        generator = torch.Generator().manual_seed(row)
        tokens = torch.randint(0, 7, (6,), generator=generator)
        return tokens, tokens.roll(-1)

def task(seconds: float = 0.002):
    return supervised(
        model=lambda: torch.nn.Sequential(torch.nn.Embedding(7, 8), torch.nn.Linear(8, 7)),
        train=Tokens(5170, seconds),
        test=Tokens(13, 0.0),
        loss=lambda outputs, targets: torch.nn.functional.cross_entropy(
            outputs.transpose(1, 2), targets, reduction="none"),
        weight=lambda targets: targets.ne(0).float(),
    )
"""
RUN = (str(BIN / "evenstep"), "run", "job.yaml", "--processes", "2")
SPEC: dict[str, Any] = {
    "name": "watched",
    "task": "./words.py:task",
    "batch": {"global_batch": 8, "micro_batch": 4},
    "length": {"epochs": 5},
    "optimizer": {"name": "adam", "lr": 0.003},
    "test": {"at_start": True},
    "checkpoint": {"every_steps": 7},
    "tracking": {"log_every_steps": 2},
}


def samples(port: int) -> dict[tuple[str, str], float]:
    """(name, rank or another distinctive label) and the value of every sample."""
    answer = get(port, "/metrics", Accept="application/openmetrics-text; version=1.0.0")
    assert answer.status == 200, answer
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    found = {}
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            labels = {k: v for k, v in sample.labels.items() if k not in ("run", "host")}
            assert sample.labels["run"] == "watched"
            found[sample.name, "/".join(labels.values())] = sample.value
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("endpoint")
    (place / "words.py").write_text(TASK)
    (place / "job.yaml").write_text(json.dumps(SPEC))
    return place


@pytest.fixture
def training(place: Path, tmp_path: Path) -> Any:
    """(the port, the process) of a run on two processes, which trains for minutes."""
    port = free_port()
    process = start(
        (*RUN, f"tracking.metrics_port={port}", "--runs", str(tmp_path)),
        cwd=place,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        until(lambda: process.poll() is not None or listens(port), "the port is open")
        until(lambda: ("evenstep_save_durable_seconds", "") in samples(port), "it has saved")
        yield port, process
    finally:
        process.kill()
        process.communicate()


def test_a_run_is_served_while_it_trains_and_hostile_clients_change_nothing(
    tmp_path: Path, training: Any
) -> None:
    port, process = training
    found = samples(port)
    rows = {row["step"]: row for row in read_metrics(tmp_path / "watched/metrics.jsonl")}
    latest = max(step for step in rows if "train/loss" in rows[step])
    losses = {rows[step]["train/loss"] for step in rows if "train/loss" in rows[step]}
    assert found["evenstep_train_loss", ""] in losses
    assert 7 <= found["evenstep_step", ""] <= latest + 3230
    assert found["evenstep_state", "running"] == 1.0
    assert found["evenstep_state", "done"] == 0.0
    assert found["evenstep_steps", ""] == 3232  # 5 epochs of 5,170 rows, 8 a step
    assert found["evenstep_restarts_total", ""] == 0
    assert 0 < found["evenstep_goodput_ratio", ""] <= 1
    assert ("evenstep_test", "loss") in found
    assert found["evenstep_learning_rate", "all"] == 0.003
    # A row has six tokens, of which about one in seven weighs nothing.
    a_row = found["evenstep_weight_per_second", ""] / found["evenstep_rows_per_second", ""]
    assert 2 < a_row <= 6
    for rank in ("0", "1"):
        assert found["evenstep_rank_step", rank] >= 1
        assert found["evenstep_rank_memory_bytes", rank] > 1 << 20
        assert found["evenstep_rank_work_seconds_total", f"{rank}/data"] > 0
        works = [v for (name, _), v in found.items() if name == "evenstep_rank_work"]
        assert sum(works) == 2, "each of the two ranks is at one kind of work"
    assert {name for name, _ in found} <= {metric.sample for metric in METRICS}
    older = get(port, "/metrics", Accept="text/plain; version=0.0.4")
    assert list(parse_older(older.text)), "a scraper that does not know OpenMetrics"
    assert get(port, "/healthz").text == "ok\n"

    # Ten thousand connections that send half a request; the oldest make room for the newest.
    silent_ones = silent(port, 10_000)
    assert raw(port, b"GET /metrics HTTP/1.1\r\nX: " + b"a" * 100_000).startswith(b"HTTP/1.1 431")
    assert samples(port)["evenstep_healthy", ""] == 1.0
    assert closed_by_server(silent_ones[0])
    assert closed_by_server(silent_ones[-1]), "it has some seconds for its request, and no more"
    before = samples(port)["evenstep_step", ""]
    until(lambda: samples(port)["evenstep_step", ""] > before, "it goes on training")
    for each in silent_ones:
        each.close()

    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == 75, errors
    assert "Traceback" not in errors
    assert not listens(port), "the endpoint ends with its launcher"


def test_a_launcher_that_is_killed_leaves_no_endpoint(training: Any) -> None:
    port, process = training
    [exporter] = [
        number
        for number in descendants(process.pid)
        if "service.monitoring.exporter" in psutil.Process(number).cmdline()
    ]
    own = psutil.Process(process.pid).nice()
    assert psutil.Process(exporter).nice() == min(19, own + 10), "training comes first"
    process.kill()
    until(lambda: not psutil.pid_exists(exporter), "the kernel ends it")
    assert not listens(port)


def test_a_probe_fails_only_where_a_rank_is_told_not_to_be_healthy(training: Any) -> None:
    port, _ = training
    assert outcome(port) == 0
    assert outcome(free_port()) == 0, "an endpoint that is gone says nothing of training"
    for status, code in ((503, 1), (200, 0), (404, 0)):
        with serving(Answer(status, b"rank 0")) as other:
            assert outcome(other) == code


def test_an_endpoint_that_is_killed_does_not_end_its_run(tmp_path: Path, training: Any) -> None:
    port, process = training
    [exporter] = [
        number
        for number in descendants(process.pid)
        if "service.monitoring.exporter" in psutil.Process(number).cmdline()
    ]
    os.kill(exporter, signal.SIGKILL)
    until(lambda: not listens(port), "it is gone")
    metrics = tmp_path / "watched/metrics.jsonl"
    before = metrics.stat().st_size
    until(lambda: metrics.stat().st_size > before, "the run goes on")
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == 75, errors


def test_a_port_that_is_taken_is_one_line_and_training_goes_on(place: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        words = ("length={steps: 3}", "task_args.seconds=0", f"tracking.metrics_port={port}")
        done = evenstep("run", "job.yaml", *words, "--name", "beside", cwd=place)
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip() == (
        f"WARNING: tracking.metrics_port: {port} cannot be served on this machine: 127.0.0.1: "
        "Address already in use. Training goes on without it."
    )


@pytest.mark.parametrize("address", ["127.0.0.2", "0.0.0.0"])
def test_a_name_is_answered_only_where_others_than_loopback_are(
    place: Path, tmp_path: Path, address: str
) -> None:
    port, said = free_port(), list[str]()
    words = [f"tracking.metrics_port={port}", f"tracking.metrics_address={address}"]
    spec = load_spec(place / "job.yaml", overrides=words)
    with metrics_endpoint(spec, tmp_path, ranks=range(1), started=0.0, say=said.append):
        until(lambda: listens(port), "it listens")
        assert get(port, "/healthz", Host="127.0.0.2").status == 200
        status = get(port, "/healthz", Host="evil.example").status
    assert status == (421 if address == "127.0.0.2" else 200)
    assert said == []


def test_what_is_not_installed_is_told_before_anything_starts(place: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import sys; sys.modules.update(prometheus_client=None)"
    )
    words = ("job.yaml", "tracking.metrics_port=9400")
    for command in ("run", "check"):
        told = evenstep(command, *words, cwd=place, PYTHONPATH=str(tmp_path))
        assert told.returncode == 64, told.stderr
        assert "tracking.metrics_port: the package prometheus-client is not installed" in (
            told.stderr
        )
        assert "pip install 'evenstep[metrics]'" in told.stderr


@pytest.mark.parametrize(
    ("key", "told"),
    [
        ("metrics_port=80", "tracking.metrics_port: must be at least 1024"),
        ("metrics_address=here", "tracking.metrics_address: must be an address such as 127.0.0.1"),
    ],
)
def test_a_port_or_address_that_cannot_be_is_refused(place: Path, key: str, told: str) -> None:
    with pytest.raises(Exception, match=re.escape(told)):
        load_spec(place / "job.yaml", overrides=[f"tracking.{key}"])


# ---- /healthz


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def beat(**changed: Any) -> dict[str, Any]:
    """The heartbeat of this process."""
    own = {"host": socket.gethostname(), "process": os.getpid(), "time": 1.0}
    return {**own, "step": 7, "work": "save", **changed}


def test_a_save_is_healthy_while_the_hang_watch_writes_and_a_silent_watch_is_not(
    tmp_path: Path,
) -> None:
    clock = Clock()
    liveness = Liveness(tmp_path, timeouts={"starting": 900}, timeout_seconds=10, clock=clock)
    for hour in range(12):  # a save of twelve hours, by a disk that is slow
        clock.now = hour * 3600.0
        assert liveness.look({0: beat(time=float(hour))}) == []
    clock.now += 20 + SPARE_SECONDS
    assert liveness.look({0: beat(time=11.0)}) == [], "the watch itself would end it before"
    clock.now += 1
    [told] = liveness.look({0: beat(time=11.0)})
    assert told == (
        f"rank 0 (process {os.getpid()}): its hang watch has written no heartbeat for 81 s; "
        "the last one was at step 7, save"
    )
    assert liveness.look({0: beat(time=12.0)}) == []


@pytest.mark.parametrize(
    "why", ["its start may take longer", "it has ended", "it is elsewhere", "it cannot be read"]
)
def test_in_doubt_a_rank_is_healthy(tmp_path: Path, why: str) -> None:
    clock = Clock()
    liveness = Liveness(tmp_path, timeouts={"starting": 900}, timeout_seconds=10, clock=clock)
    found = {
        "its start may take longer": beat(work="starting"),
        "it has ended": beat(process=2**22 + 1),
        "it is elsewhere": beat(host="another"),
        "it cannot be read": beat(),
    }[why]
    assert liveness.look({0: found}) == []
    clock.now = 1000.0
    if why == "it cannot be read":
        assert liveness.look({}) == []
        clock.now = 1050.0
    assert liveness.look({0: found}) == []
    clock.now = 1e6
    assert bool(liveness.look({0: found})) == (why not in ("it has ended", "it is elsewhere"))


def test_a_run_whose_disk_takes_no_heartbeat_is_healthy(tmp_path: Path) -> None:
    """On a full disk a run goes on without heartbeats; here the directory cannot be written."""
    clock = Clock()
    liveness = Liveness(tmp_path / "gone", timeouts={}, timeout_seconds=10, clock=clock)
    assert liveness.look({0: beat()}) == []
    clock.now = 1e6
    assert liveness.look({0: beat()}) == []
    (tmp_path / "gone").mkdir()
    assert len(liveness.look({0: beat()})) == 1


def test_a_later_process_with_the_number_of_a_rank_is_not_that_rank(tmp_path: Path) -> None:
    clock = Clock()
    liveness = Liveness(tmp_path, timeouts={}, timeout_seconds=10, clock=clock)
    heartbeat = Heartbeat(scratch=tmp_path)
    heartbeat.write()
    own = read_beat(tmp_path, 0)
    assert own is not None
    assert is_there(own)
    later = {**own, "process_start": "17"}
    liveness.look({0: own, 1: later})
    clock.now = 1e6
    [told] = liveness.look({0: own, 1: later})
    assert told.startswith("rank 0 ")
    # A new process of that number that has written at the same moment is not silent.
    assert liveness.look({0: later}) == []
    assert not is_there(later), "nor is its memory that of the rank"


# ---- the latest values


def test_a_look_that_begins_at_the_beginning_of_a_line_keeps_that_line(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    lines = [f'{{"step": {n}, "v{n % 3}": {n}}}\n' for n in range(100, 120)]
    run.metrics.write_text("".join(lines))
    line = len(lines[0])
    for extra in range(-2, line + 2):
        found = LatestValues(run, look_bytes=3 * line + extra).look()
        held = {key: value for key, value in found.items() if key != "step"}
        assert len(held) == 3 if extra >= 0 else 2, extra

    # A line that is longer than a look is left out as a whole.
    values = LatestValues(run, keep="v", most=9, look_bytes=50)
    run.metrics.write_text('{"v": 1, "text": "' + "x" * 99)
    values.look()
    with run.metrics.open("a") as file:
        file.write('{"v": 2}')
    values.look()
    with run.metrics.open("a") as file:
        file.write('"}\n{"v": 3}\n')
    values.look()
    assert list(values.kept) == [3.0]


def test_the_latest_value_of_every_key_is_found_in_a_file_that_grows(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    values = LatestValues(run)
    assert values.look() == {}
    run.metrics.write_text('{"step": 1, "a": 2, "b": "NaN"}\n{"step": 2, "a": "Infin')
    first = values.look()
    assert (first["step"], first["a"], str(first["b"])) == (1.0, 2.0, "nan")
    with run.metrics.open("a") as file:
        file.write('ity"}\nnot a row\n[1]\n{"step": 3, "c": "text", "d": null}\n')
    assert {k: v for k, v in values.look().items() if k != "b"} == {"step": 3.0, "a": float("inf")}
    # A resumed run writes its file anew, up to the checkpoint.
    (tmp_path / "new").write_text('{"step": 1, "a": 7}\n')
    os.replace(tmp_path / "new", run.metrics)
    assert values.look() == {"step": 1.0, "a": 7.0}
    with run.metrics.open("a") as file:  # more at once than is read at once
        file.writelines(f'{{"step": {n}, "e": {n}}}\n' for n in range(2, 90_000))
    assert values.look() == {"step": 89_999.0, "a": 7.0, "e": 89_999.0}


# ---- the page


def test_the_table_of_the_page_is_the_one_that_the_code_makes() -> None:
    page = (ROOT / "docs/reference/metrics.md").read_text()
    assert with_table(page) == page, "run: python -m service.monitoring.metrics"
    assert len(re.findall(r"^\| `evenstep_", page, re.MULTILINE)) == len(METRICS)


def test_the_program_of_the_endpoint_does_without_torch() -> None:
    script = "import service.monitoring.exporter, sys; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=DEADLINE_SECONDS
    )
    assert done.stdout.strip() == "False", done.stderr
