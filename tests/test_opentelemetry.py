"""OpenTelemetry: a receiver of OTLP gets the figures of a run, and a broken one hurts nothing."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
from clients import free_port
from commands import evenstep
from otlp_receiver import receiver

from service.monitoring.metrics import METRICS
from service.runs.tracking import read_metrics
from service.spec.files import load_spec

RUN = ("run", "digits", "length.epochs=1", "tracking.log_every_steps=1", "--name", "sent")


def asking(port: int, *more: str) -> list[str]:
    words = [f"endpoint: 'http://127.0.0.1:{port}'", "every_seconds: 1", *more]
    return [f"tracking.opentelemetry={{{', '.join(words)}}}"]


def test_a_receiver_gets_the_figures_of_a_run_and_the_last_ones_at_its_end(tmp_path: Path) -> None:
    with receiver() as received:
        done = evenstep(
            *RUN,
            *asking(received.port),
            cwd=tmp_path,
            OTEL_RESOURCE_ATTRIBUTES="team=vision",
            OTEL_EXPORTER_OTLP_HEADERS="x-token=abc",
        )
    assert done.returncode == 0, done.stderr
    assert "opentelemetry" not in done.stderr
    rows = read_metrics(tmp_path / "runs/sent/metrics.jsonl")
    last = received.messages[-1]
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert last["evenstep_train_loss", ""] == losses[-1]
    assert last["evenstep_step", ""] == rows[-1]["step"]
    assert last["evenstep_state", "done"] == 1.0
    assert last["evenstep_state", "running"] == 0.0
    assert last["evenstep_rank_work_seconds", "0/forward"] > 0
    assert received.kinds["evenstep_restarts"] == "sum"
    assert received.kinds["evenstep_train_loss"] == "gauge"
    assert received.runs == {"sent"}
    assert {name for name, _ in last} <= {metric.name for metric in METRICS}
    assert received.resource["service.name"] == "evenstep"
    assert received.resource["team"] == "vision"
    assert received.headers["x-token"] == "abc"


@pytest.mark.parametrize("how", ["away", "500", "silent"])
def test_a_receiver_that_is_broken_is_one_line_and_the_run_ends_well(
    how: str, tmp_path: Path
) -> None:
    with receiver(status=500) as failing, socket.create_server(("127.0.0.1", 0)) as silent:
        port = {"away": free_port(), "500": failing.port, "silent": silent.getsockname()[1]}[how]
        done = evenstep(*RUN, *asking(port), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    [line] = done.stderr.strip().splitlines()
    assert line.startswith("WARNING: tracking.opentelemetry: Failed to export metrics batch")
    assert "Training goes on" in line
    rows = read_metrics(tmp_path / "runs/sent/metrics.jsonl")
    assert len(rows) > 10


def test_the_address_may_be_that_of_opentelemetrys_own_variable(tmp_path: Path) -> None:
    with receiver() as received:
        address = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{received.port}"}
        unasked = evenstep(*RUN, "--name", "unasked", cwd=tmp_path, **address)
        assert received.messages == [], "the spec decides whether something is sent"
        asked = evenstep(*RUN, "tracking.opentelemetry={}", cwd=tmp_path, **address)
    assert (unasked.returncode, asked.returncode) == (0, 0), (unasked.stderr, asked.stderr)
    assert received.messages[-1]["evenstep_state", "done"] == 1.0


def test_a_port_that_is_taken_keeps_nothing_from_the_receiver(tmp_path: Path) -> None:
    with receiver() as received, socket.create_server(("127.0.0.1", 0)) as holder:
        taken = f"tracking.metrics_port={holder.getsockname()[1]}"
        done = evenstep(*RUN, *asking(received.port), taken, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "cannot be served on this machine" in done.stderr
    assert received.messages[-1]["evenstep_state", "done"] == 1.0


def test_what_is_not_installed_is_told_before_anything_starts(tmp_path: Path) -> None:
    hide = "import sys; sys.modules['opentelemetry.exporter.otlp.proto.http'] = None"
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(hide)
    told = evenstep(*RUN, *asking(4318), cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert told.returncode == 64, told.stderr
    assert "opentelemetry-exporter-otlp-proto-http is not installed" in told.stderr
    assert "pip install 'evenstep[otel]'" in told.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("endpoint", "told"),
    [
        ("collector:4317", "must be an address such as http://collector:4318"),
        ("http://", "must be an address such as http://collector:4318"),
        ("http://me:secret@collector:4318", "OTEL_EXPORTER_OTLP_HEADERS"),
    ],
)
def test_an_address_that_cannot_be_is_refused(endpoint: str, told: str, tmp_path: Path) -> None:
    spec = {
        "name": "sent",
        "task": "service.recipes.digits:task",
        "batch": {"global_batch": 8, "micro_batch": 4},
        "length": {"epochs": 1},
        "optimizer": {"name": "sgd", "lr": 0.1},
        "tracking": {"opentelemetry": {"endpoint": endpoint}},
    }
    (tmp_path / "job.yaml").write_text(json.dumps(spec))
    with pytest.raises(Exception, match=r"tracking\.opentelemetry\.endpoint") as raised:
        load_spec(tmp_path / "job.yaml")
    assert told in str(raised.value)
