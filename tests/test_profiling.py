"""`--profile`: a trace for every process and a table, and the run as it would have been."""

import json
import re
from time import perf_counter

import pytest
from commands import evenstep, torchrun

from service.basics.errors import SpecError
from service.health.heartbeat import WORDS, Heartbeat
from service.health.throughput import Throughput
from service.plan.plan import Window, window_of
from service.runs.tracking import read_metrics

SHORT = ("run", "digits", "length.epochs=1", "tracking.wandb=", "tracking.log_every_steps=1")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    place = tmp_path_factory.mktemp("plain")
    done = evenstep(*SHORT, "--processes", 2, cwd=place)
    assert done.returncode == 0, done.stderr
    return place / "runs/digits"


def traced_steps(path):
    names = [event["name"] for event in json.loads(path.read_text())["traceEvents"]]
    assert "aten::convolution_backward" in names
    return [name for name in names if name.startswith("step ")]


@pytest.mark.parametrize("way", ["evenstep", "torchrun"])
def test_every_process_leaves_a_trace_and_the_lead_says_where_the_time_went(plain, tmp_path, way):
    asked = (*SHORT, "--profile", "5:3")
    if way == "torchrun":
        done = torchrun(2, *asked, cwd=tmp_path)
    else:
        done = evenstep(*asked, "--processes", 2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "USDT" not in done.stderr
    run = tmp_path / "runs/digits"
    for rank in (0, 1):
        assert traced_steps(run / f"profile/rank-{rank}.json") == ["step 5", "step 6", "step 7"]
        table = (run / f"profile/rank-{rank}.txt").read_text()
        assert table.startswith(f"Where the time of steps 5 to 7 went, on rank {rank}:\n")
        for work in ("data", "exchange", "update", "agree"):
            assert WORDS[work] in table
        shares = re.findall(r"^  .*\S +[\d.]+ +([\d.]+)%$", table.partition("operator")[0], re.M)
        assert sum(map(float, shares[:-1])) == pytest.approx(100, abs=0.4)
        assert re.search(r"^  aten::convolution_backward +6 +[\d.]+ +[\d.]+%$", table, re.M)
    assert done.stdout.count("Where the time of") == 1
    assert (run / "profile/rank-0.txt").read_text() in done.stdout
    weights = "checkpoints/step-00000015/model.safetensors"
    assert (run / weights).read_bytes() == (plain / weights).read_bytes(), "to the bit"
    rows = read_metrics(run / "metrics.jsonl")
    assert all(row.get("system/slowest_ratio", 1.0) >= 1.0 for row in rows)


def test_a_run_that_ends_within_the_window_leaves_what_there_is(tmp_path):
    stopped = evenstep(*SHORT, "--profile", "4:100", "--stop-at", 6, cwd=tmp_path)
    assert stopped.returncode == 75, stopped.stderr
    run = tmp_path / "runs/digits"
    assert traced_steps(run / "profile/rank-0.json") == ["step 4", "step 5", "step 6"]
    behind = evenstep(*SHORT, "--profile", "1:3", "--stop-at", 9, cwd=tmp_path)
    assert behind.returncode == 75, behind.stderr
    assert "--profile: step 3 was taken before this attempt." in behind.stdout
    late = evenstep(*SHORT, "--profile", "5:6", cwd=tmp_path)
    assert late.returncode == 0, late.stderr
    assert traced_steps(run / "profile/rank-0.json") == ["step 10"]
    rows = read_metrics(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == [*range(1, 16)]
    assert all(row["train/data_wait"] >= 0 for row in rows)


def test_the_writing_of_a_trace_is_neither_training_nor_waiting():
    heartbeat = Heartbeat(rank=0)
    throughput = Throughput(heartbeat)
    heartbeat.enter("data", 0)
    with throughput.stopped():
        began = perf_counter()
        while perf_counter() - began < 0.5:
            pass
    heartbeat.enter("forward", 1)
    assert 0.0 <= throughput.waited_a_step < 0.5
    assert throughput.seconds_a_step < 0.5


def test_a_window_is_read_or_refused(tmp_path):
    assert window_of("20:5") == Window(20, 5)
    assert window_of("20:5").last == 24
    for wrong in ("20", "0:5", "20:0", "a:b", "20:-1", ""):
        with pytest.raises(SpecError, match="must be START:STEPS, such as 20:5"):
            window_of(wrong)
    refused = evenstep(*SHORT, "--profile", "16:1", cwd=tmp_path)
    assert refused.returncode == 64
    assert "--profile: the run ends after step 15, before step 16." in refused.stderr
    assert not (tmp_path / "runs").exists()
