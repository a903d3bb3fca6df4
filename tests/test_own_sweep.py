"""`evenstep sweep`: every combination is a run of its own, on this machine."""

import json
import os
import re
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from click.testing import CliRunner
from commands import BIN, DEADLINE_SECONDS, evenstep, start
from injuring import until

from launch.cli import evenstep as command
from launch.commands.sweep import _choices, _fixed, _opened, _planned, _title_of, shares_of
from launch.engines.settings import settings_of
from launch.processes.side_by_side import Command, run_side_by_side
from service.basics.errors import SpecError
from service.health.stop_request import StopRequest
from service.observability.sweeps import add_to_sweep, mean_and_deviation, read_sweep, rows_of
from service.runs.history import read_history
from service.spec.part import RUN_NAME, RUN_NAME_LETTERS

QUICK = ("length.steps=4", "schedule.name=constant", "tracking.log_every_steps=1")


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A sweep of two rates, one of which diverges, over two seeds; two runs at a time."""
    place = tmp_path_factory.mktemp("swept")
    words = ("sweep", "digits", *QUICK, "optimizer.lr=0.02,1e30", "seed=3..4", "--jobs", 2)
    return place, words, evenstep(*words, cwd=place)


def test_a_failed_run_is_reported_and_the_others_go_on(swept):
    _, _, done = swept
    assert done.returncode == 42, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert "lr-0.02_seed-3: done" in lines
    assert "lr-0.02_seed-4: done" in lines
    failed = [line for line in lines if "failed with 42 (would fail again): " in line]
    assert {line.partition(":")[0] for line in failed} == {"lr-1e30_seed-3", "lr-1e30_seed-4"}
    assert all("logs/lr-1e30_seed-" in line for line in failed)
    head, good, bad = (line.split() for line in lines[-3:])
    assert head[:2] == ["optimizer.lr", "done"]
    assert good[:4] == ["0.02", "2", "of", "2"]
    assert bad[:4] == ["1e30", "0", "of", "2"]


def test_the_table_has_mean_and_deviation_over_seeds(swept):
    place, *_ = swept
    row = rows_of(read_sweep(place / "runs/digits-sweep"))[0]
    runs = [place / "runs/digits-sweep" / f"lr-0.02_seed-{seed}" for seed in (3, 4)]
    losses = [read_history(run).last["test/loss"] for run in runs]
    assert row.setting == (("optimizer.lr", "0.02"),)
    assert row.measured["last test/loss"] == losses
    assert losses[0] != losses[1]
    assert mean_and_deviation([1.0, 3.0]) == "2 ± 1.414"
    assert mean_and_deviation([float("inf"), 3.0]) == "∞ ± NaN"
    assert mean_and_deviation([0.5]) == "0.5"


def test_the_same_run_alone_has_the_same_bits(swept):
    place, *_ = swept
    words = ("digits", *QUICK, "optimizer.lr=0.02", "seed=4", "--name", "alone")
    assert evenstep("run", *words, cwd=place).returncode == 0
    done = evenstep(
        *("verify", "alone", "runs/digits-sweep/lr-0.02_seed-4", "--level", "bits"), cwd=place
    )
    assert done.returncode == 0, done.stdout


def test_what_is_done_is_left_and_what_failed_is_tried_again(swept):
    place, words, _ = swept
    sweep = place / "runs/digits-sweep"
    before = (sweep / "lr-0.02_seed-3/run.json").read_bytes()
    done = evenstep(*words[:-3], "seed=3", cwd=place)  # one seed of the two
    assert done.returncode == 42
    assert "2 runs in" in done.stdout
    assert "1 are done" in done.stdout
    assert done.stdout.count(": starts") == 1
    assert (sweep / "lr-0.02_seed-3/run.json").read_bytes() == before
    assert len(read_sweep(sweep).settings) == 4  # those of before are still of the sweep


def test_another_spec_is_refused_before_anything_starts(swept):
    place, words, _ = swept
    done = evenstep(*words, "batch.micro_batch=3", cwd=place)
    assert done.returncode == 64
    assert "batch.micro_batch" in done.stderr
    assert "starts" not in done.stdout


def test_a_report_of_the_sweep(swept):
    place, *_ = swept
    done = evenstep("report", "digits-sweep", "-o", "sweep.html", cwd=place)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1].startswith("0.02")
    page = (place / "sweep.html").read_text()
    assert "mean and deviation over seeds" in page
    assert "lr-1e30_seed-4" in page


def test_a_report_reads_each_run_of_a_sweep_as_often_as_that_of_the_run_alone(swept, monkeypatch):
    place, *_ = swept
    monkeypatch.chdir(place)
    file, opened = place / "runs/digits-sweep/lr-0.02_seed-3/metrics.jsonl", []

    def note(event, arguments):
        if event == "open" and isinstance(arguments[0], str | os.PathLike):
            opened.append(Path(arguments[0]).absolute())

    sys.addaudithook(note)
    counts = []
    for run in ("digits-sweep", "digits-sweep/lr-0.02_seed-3"):
        opened.clear()
        done = CliRunner().invoke(command, ["report", run, "-o", "counted.html"])
        assert done.exit_code == 0, done.output
        counts.append(opened.count(file))
    assert counts[0] == counts[1] > 0


def has_steps(run):
    file = run / "metrics.jsonl"
    return file.exists() and file.stat().st_size > 0


def test_a_request_to_stop_saves_all_and_the_same_command_resumes(tmp_path):
    words = ("sweep", "digits", "length.steps=400", "optimizer.lr=0.01,0.02", "--jobs", "2")
    rest = ("faults.stop_poll_steps=1", "tracking.log_every_steps=1")
    sweep = tmp_path / "runs/digits-sweep"
    runs = [sweep / "lr-0.01", sweep / "lr-0.02"]
    with (tmp_path / "out").open("w") as out:
        started = start([BIN / "evenstep", *words, *rest], cwd=tmp_path, stdout=out, stderr=out)
        try:
            until(lambda: all(map(has_steps, runs)), "their first step", of=started)
            started.send_signal(signal.SIGINT)
            code = started.wait(DEADLINE_SECONDS)
        finally:
            started.kill()
    said = (tmp_path / "out").read_text()
    assert code == 75, said
    assert said.count("stopped, its state is saved") == 2
    stopped = [read_history(run) for run in runs]
    assert [history.state for history in stopped] == ["stopped", "stopped"]
    assert all(0 < history.step < 400 for history in stopped)
    done = evenstep(*words, *rest, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    for run, before in zip(runs, stopped, strict=True):
        first, second = read_history(run).attempts
        assert second["from_step"] == first["to_step"] == before.step


def test_a_run_that_cannot_be_started_ends_no_other(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    script = "import time; time.sleep(0.5); print('saved')"
    commands = [
        Command("first", [sys.executable, "-c", script], tmp_path / "first"),
        Command("second", [sys.executable, "-c", script], tmp_path / "pipe"),
        Command("third", [str(tmp_path / "no program")], tmp_path / "third"),
        Command("fourth", [sys.executable, "-c", script], tmp_path / "fourth"),
    ]
    ends = {}
    run_side_by_side(
        commands,
        places=[{}, {}],
        stop=StopRequest(),
        began=lambda command: None,
        ended=lambda command, code: ends.update({command.name: code}),
        unstarted=lambda command, error: ends.update({command.name: str(error)}),
    )
    assert (ends["first"], ends["fourth"]) == (0, 0)
    assert (tmp_path / "first").read_text() == "saved\n"
    assert ends["second"].endswith("pipe could not be written: a pipe is in its place. Remove it.")
    assert ends["third"] == "this machine starts no process: No such file or directory."


# ---- what is planned


def settings_in(place):
    found = json.loads((place / "sweep.json").read_text())["runs"]
    return {name: dict(pairs) for name, pairs in found.items()}


def test_a_folder_of_variants(tmp_path, monkeypatch):
    """Each spec is a variant but the base of another; nothing is run, as all of them fail."""
    folder = tmp_path / "folder"
    folder.mkdir()
    base = "name: x\ntask: no_such_module:task\nbatch: {global_batch: 8}\nlength: {steps: 1}\n"
    (folder / "base.yaml").write_text(base + "optimizer: {name: sgd, lr: 0.1}\n")
    (folder / "large.yaml").write_text("extends: base.yaml\nbatch: {global_batch: 16}\n")
    (folder / "small.toml").write_text('extends = "base.yaml"\n')
    done = evenstep("sweep", "folder/", "seed=1,2", "--jobs", 4, cwd=tmp_path)
    assert done.returncode == 64
    assert done.stdout.count("failed with 64") == 4
    assert settings_in(tmp_path / "runs/folder-sweep") == {
        f"{variant}_seed-{seed}": {"variant": variant, "seed": str(seed)}
        for variant in ("large", "small")
        for seed in (1, 2)
    }


def test_two_folders_have_two_default_names():
    """In another script nothing was left of either but `sweep`, so they shared a directory."""
    names = ["folder", "数据", "実験", "été", "ete", "a b", "a-b", "x" * 300, "x" * 301, "\udcff"]
    titles = list(map(_title_of, names))
    assert len(set(titles)) == len(names)
    assert titles[0] == "folder-sweep"
    assert all(re.fullmatch(RUN_NAME, title, re.ASCII) for title in titles)
    assert max(map(len, titles)) <= RUN_NAME_LETTERS
    assert _title_of("e\u0301t\u00e9") == titles[3], "as a disk may give it"


def test_a_folder_with_one_variant_and_what_only_the_command_gives(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    base = "name: only\ntask: no_such_module:task\nbatch: {global_batch: 8}\nlength: {steps: 1}\n"
    (folder / "base.yaml").write_text(base + "optimizer: {name: sgd}\n")
    (folder / "child.yaml").write_text("extends: base.yaml\n")
    done = evenstep("sweep", "folder", "optimizer.lr=0.1,0.2", "--jobs", 2, cwd=tmp_path)
    assert done.returncode == 64
    assert settings_in(tmp_path / "runs/only-sweep") == {
        f"lr-{lr}": {"optimizer.lr": lr} for lr in ("0.1", "0.2")
    }


@pytest.mark.parametrize("name", ["../other", "/etc", "..", "a/b", ""])
def test_a_sweep_names_no_run_elsewhere(tmp_path, name):
    facts = {"format": 1, "runs": {"good": [], name: []}}
    (tmp_path / "sweep.json").write_text(json.dumps(facts))
    with pytest.raises(SpecError, match="is not the name of a run"):
        read_sweep(tmp_path)


def test_sweeps_that_start_at_the_same_time_keep_the_runs_of_each_other(tmp_path):
    names = [f"seed-{number}" for number in range(12)]
    with ThreadPoolExecutor(len(names)) as threads:
        list(threads.map(lambda name: add_to_sweep(tmp_path, {name: (("seed", name),)}), names))
    _opened(tmp_path, _planned([("", "digits")], ("optimizer.lr=1,2",), set()))
    assert read_sweep(tmp_path).settings.keys() == {*names, "lr-1", "lr-2"}


def test_a_mean_and_deviation_of_numbers_of_any_size():
    assert mean_and_deviation([0.9, 0.92]) == "0.91 ± 0.01414"
    assert mean_and_deviation([1e200, 3e200]) == "2e+200 ± 1.414e+200"
    assert mean_and_deviation([1.0, float("nan")]) == "NaN ± NaN"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["optimizer.lr=fast,0.1"], "optimizer.lr=fast: optimizer.lr: must be"),
        (["optimizer.rate=1,2"], "optimizer.rate=1: optimizer.rate: unknown key"),
        (["seed=1,2", "seed=3"], "seed is swept twice"),
        (["seed=1,1"], "sweep: seed=1 is given twice"),
        (["seed=5..2"], "the range 5..2 must go up"),
        (["seed"], "must be KEY=VALUE,VALUE"),
        (["seed=1,,2"], "seed=1,,2: a value is empty. Remove the comma, or write null."),
        (["seed=1,2,"], "a value is empty"),
        (["seed=1,2", "--name", ""], "--name: must be up to 63 letters and digits, and after the"),
        (["seed=1,2", "--name", "träge"], "but is 'träge'"),
        (["seed=1,2", "--name", "a" * 64], "--name: must be up to 63"),
    ],
)
def test_a_mistake_is_reported_and_nothing_is_written(words, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SpecError) as caught:
        CliRunner().invoke(command, ["sweep", "digits", *words], catch_exceptions=False)
    assert told in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_values_ranges_and_commas_of_their_own():
    assert settings_of(["seed=0..2"]) == [("seed=0",), ("seed=1",), ("seed=2",)]
    assert settings_of(["a=-1..0,7"]) == [("a=-1",), ("a=0",), ("a=7",)]
    assert settings_of(["a='x,y',[1,2]"]) == [("a='x,y'",), ("a=[1,2]",)]


def test_a_value_may_end_as_a_cleared_key_does():
    given = ("test.every_steps=", "task_args.word=YQ==,Yg==", "name= ")
    assert _fixed(given) == ("test.every_steps=", "name= ")
    assert _choices(given) == [("task_args.word=YQ==",), ("task_args.word=Yg==",)]


def test_no_run_has_the_name_of_a_file_of_the_sweep():
    variants = [(name, "digits") for name in ("logs", "sweep.json", "run.json", "other")]
    names = [run.name for run in _planned(variants, (), set())]
    assert names == ["logs-2", "sweep.json-2", "run.json-2", "other"]


def test_devices_are_divided_among_the_runs():
    devices = ["0", "1", "2", "3", "4"]
    assert shares_of(devices, 2, 2) == [["0", "1"], ["2", "3"]]
    assert shares_of(["3", "5"], 3, 1) == [["3"], ["5"], ["3"]]
    assert shares_of([], 2, 1) == [[], []]


@pytest.mark.parametrize(
    ("words", "at", "offered"),
    [("evenstep sw", 1, "sweep"), ("evenstep sweep digits --jo", 3, "--jobs")],
)
def test_tab_completion_knows_commands_and_options(words, at, offered, tmp_path):
    asked = {"COMP_WORDS": words, "COMP_CWORD": str(at), "_EVENSTEP_COMPLETE": "bash_complete"}
    done = evenstep(cwd=tmp_path, **asked)
    assert done.returncode == 0, done.stderr
    assert f"plain,{offered}" in done.stdout.splitlines()


def test_a_folder_of_specs_may_have_other_files(tmp_path):
    """Such as the schema that `evenstep new` writes beside the spec."""
    assert evenstep("new", "mine", cwd=tmp_path).returncode == 0
    (tmp_path / "mine/values.toml").write_text("[project]\n")
    done = evenstep("sweep", "mine", "seed=0,1", "optimizer.lrr=1", cwd=tmp_path)
    told = "mine: not taken for specs, without any key of one: evenstep.schema.json, values.toml"
    assert told in done.stderr
    assert done.returncode == 64, "of the override alone"
    assert done.stderr.count("unknown key") == 1, done.stderr
