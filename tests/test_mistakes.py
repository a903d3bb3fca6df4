"""A person's mistake ends with one clear message, exit code 64, and nothing half-written."""

import os
import re

import pytest
from commands import BIN, DEADLINE_SECONDS, ROOT, command, evenstep

GOOD = (ROOT / "service/recipes/digits.yaml").read_text()


def wrong(key, line):
    return re.sub(f"(?m)^{key}:.*$", line, GOOD)


MISTAKES = {
    "an unknown key": (
        GOOD + "epoch: 3\n",
        [],
        r"job.yaml:14:1: epoch: unknown key",
    ),
    "a wrong type": (
        wrong("seed", "seed: zero"),
        [],
        r"job.yaml:5:\d+: seed: must be .*, but is 'zero'",
    ),
    "no task": (wrong("task", ""), [], r"job.yaml:1:1: task: missing|task: missing"),
    "a task module that is not there": (
        wrong("task", "task: service.recipes.digit:task"),
        [],
        r"task: cannot import service.recipes.digit",
    ),
    "a task name that is not there": (
        wrong("task", "task: service.recipes.digits:tusk"),
        [],
        r"service.recipes.digits has no 'tusk'; did you mean 'task'",
    ),
    "a task file that is not there": (
        wrong("task", "task: ./my_tesk.py:task"),
        [],
        r"there is no file .*my_tesk.py; did you mean 'my_task.py'",
    ),
    "a task that raises": (
        wrong("task", "task: ./my_task.py:raising"),
        [],
        r"my_task.py:raising raised ValueError: no width .*my_task.py:\d+",
    ),
    "arguments the task does not take": (
        wrong("task_args", "task_args: {widht: 3}"),
        [],
        r"task_args: .*takes \(width.*widht",
    ),
    "something that is no task": (
        wrong("task", "task: ./my_task.py:number").replace("task_args", "#"),
        [],
        r"returns a int, which is not a task: it lacks .*measure",
    ),
    "a loss that is a mean": (
        wrong("task", "task: ./my_task.py:mean"),
        [],
        r"task.loss: must give one value for each row.*gave \[\]",
    ),
    "a loss by pixel that nothing weighs": (
        wrong("task", "task: ./my_task.py:unweighed").replace("test/accuracy", "test/loss"),
        [],
        r"task.weight: the loss has 64 values for each row .*Give a weight",
    ),
    "a model that does not fit its data": (
        wrong("task", "task: ./my_task.py:misfit"),
        [],
        r"one forward and backward pass over 16 rows failed: RuntimeError",
    ),
    "no processes": (GOOD, ["--processes", "0"], r"--processes: must be .* but is 0"),
    "a number of processes without end": (
        GOOD,
        ["--processes", "9" * 5000],
        r"--processes: must be a whole number, at least 1, or auto, but is 9{40}\.",
    ),
    "an elastic run without restarts": (
        GOOD,
        ["--processes", "2", "--elastic"],
        r"--elastic: nothing is restarted without --max-restarts K; add it",
    ),
    "a runs directory without a name": (GOOD, ["--runs", ""], r"--runs: is empty\. .* not set\?"),
    "an empty name": (GOOD, ["--name", ""], r"name: must be .*but is ''"),
    "too many processes": (
        GOOD,
        ["--processes", "7"],
        r"too few for 7 processes. Use at most 6 processes, or batch.micro_batch=14",
    ),
    "a micro-batch that does not fit": (
        GOOD,
        ["batch.micro_batch=97"],
        r"job.yaml:6:\d+: batch: micro_batch must be at most global_batch \(96\), but is 97",
    ),
    "a pattern that matches nothing": (
        GOOD,
        ["optimizer.groups=[{match: 'base.*'}, {match: '*'}]"],
        r"optimizer.groups.0.match: 'base.\*' matches no parameter.*0.weight",
    ),
    "a parameter in no group": (
        GOOD,
        ["optimizer.groups=[{match: '*.bias'}]"],
        r"optimizer.groups: 0.weight, 1.weight.* are in no group",
    ),
    "a best measure that is not measured": (
        GOOD,
        ["checkpoint.best.measure=test/acuracy"],
        r"checkpoint.best.measure: .*'test/acuracy'; did you mean 'test/accuracy'",
    ),
    "an override of nothing": (GOOD, ["optimizer.lrr=3"], r"optimizer.lrr=3: .*unknown key"),
    "a steps' window that is none": (
        GOOD,
        ["--profile", "20"],
        r"--profile: must be START:STEPS, such as 20:5",
    ),
    "weights offloaded to where they are": (
        GOOD,
        ["exchange={mode: sharded, offload: true}"],
        r"exchange.offload: true keeps weights in main memory .*Leave it out here",
    ),
    "a change of a key that no spec has": (
        GOOD,
        ["--accept", "optimizer.rates"],
        r"--accept optimizer.rates: no spec has this key; known: dampening, .*lr, ",
    ),
    "an option nobody knows": (GOOD, ["--proceses", "2"], r"No such option.*--processes"),
}

TASKS = """
import torch
from torch import nn
from service.recipes import digits
from service.data.task import supervised

number = 3

def raising(width, dropout):
    raise ValueError("no width")

def mean(width, dropout):
    train, test = digits.split_by_class(*digits.load())
    return supervised(
        model=lambda: digits.network(width, dropout), train=train, test=test,
        loss=nn.functional.cross_entropy, measures=("accuracy",),
    )

def unweighed(width, dropout):
    train, test = digits.split_by_class(*digits.load())
    return supervised(
        model=lambda: nn.Conv2d(1, 10, 3, padding=1), train=train, test=test,
        loss=lambda outputs, targets: outputs.mean(1),
    )

def misfit(width, dropout):
    train, test = digits.split_by_class(*digits.load())
    return supervised(model=lambda: nn.Linear(3, 10), train=train, test=test,
                      measures=("accuracy",))
"""


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_reported_once_and_leaves_nothing(tmp_path, mistake):
    spec, words, message = MISTAKES[mistake]
    (tmp_path / "job.yaml").write_text(spec)
    (tmp_path / "my_task.py").write_text(TASKS)
    ended = evenstep("run", "job.yaml", *words, cwd=tmp_path)
    assert ended.returncode == 64, (ended.stdout, ended.stderr)
    assert re.search(message, ended.stderr, re.DOTALL), ended.stderr
    assert ended.stderr.count("error:") == 1
    assert "Traceback" not in ended.stderr + ended.stdout
    assert not (tmp_path / "runs").exists(), "nothing half-written"


def test_several_processes_tell_it_once_too(tmp_path):
    (tmp_path / "job.yaml").write_text(wrong("task", "task: ./my_task.py:mean"))
    (tmp_path / "my_task.py").write_text(TASKS)
    ended = evenstep("run", "job.yaml", "--processes", 2, cwd=tmp_path)
    assert ended.returncode == 64, ended.stderr
    assert ended.stderr.count("must give one value for each row") == 1, ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        (
            {"PET_NNODES": "2", "PET_NODE_RANK": "0", "PET_MASTER_ADDR": "127.0.0.1"},
            "--max-restarts: it is for one node, and this is one of 2",
        ),
        (
            {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"},
            "--max-restarts: torchrun has started the processes, so it restarts them",
        ),
    ],
)
def test_restarts_that_another_makes_are_refused(tmp_path, variables, told):
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29400"}
    ended = evenstep("run", "digits", "--max-restarts", 1, cwd=tmp_path, **variables)
    assert ended.returncode == 64, ended.stderr
    assert told in ended.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "words",
    [
        ("slurm", "status", "x", "--runs", ""),
        ("plan", "digits", "--runs", ""),
        ("report", "", "-o", "x.html"),
        ("new", ""),
        ("report", "x", "-o", ""),
        ("export", "x", "-o", ""),
        ("test", "x", "--predictions", ""),
        ("plan", "digits", "--set-file", ""),
    ],
)
def test_a_place_without_a_name_is_not_this_directory(tmp_path, words):
    ended = evenstep(*words, cwd=tmp_path)
    assert ended.returncode == 64, ended.stdout
    told = r": is empty\. Is a variable of the shell not set\? Name a (directory|file)\.$"
    assert re.search(told, ended.stderr), ended.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_spec_without_a_name_is_not_the_folder_of_a_sweep(tmp_path):
    (tmp_path / "job.yaml").write_text(GOOD)
    ended = evenstep("sweep", "", "seed=0,1", cwd=tmp_path)
    assert ended.returncode == 64, ended.stdout
    assert "there is no recipe ''" in ended.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["job.yaml"]


@pytest.mark.parametrize(
    "words",
    [
        ("runs", "locked"),
        ("watch", "--once", "--all", "--runs", "locked"),
        ("sweep", "locked"),
        ("sweep", "digits", "--name", "own", "--runs", "locked"),
        ("slurm", "status", "job", "--runs", "locked"),
    ],
    ids=" ".join,
)
def test_a_directory_that_may_not_be_read_is_reported(tmp_path, words):
    (tmp_path / "locked").mkdir(mode=0)
    root = ("setpriv", "--bounding-set=-dac_override,-dac_read_search")  # root may read it else
    plain = root if os.geteuid() == 0 else ()
    ended = command(*plain, BIN / "evenstep", *words, cwd=tmp_path, timeout=DEADLINE_SECONDS)
    (tmp_path / "locked").chmod(0o700)
    assert ended.returncode in (1, 64), ended.stderr
    assert re.match(r"error: .*locked.* cannot be read: Permission denied\.$", ended.stderr)


@pytest.mark.parametrize("words", ["run", "new", "runs", "sweep", "watch --all --runs"])
def test_a_name_too_long_for_a_file_is_reported(tmp_path, words):
    ended = evenstep(*words.split(), "a" * 300, cwd=tmp_path)
    assert ended.returncode == 64, ended.stderr
    assert ended.stderr.startswith("error: ")
    assert "Traceback" not in ended.stderr


def test_a_directory_that_is_no_run_is_left_alone(tmp_path):
    (tmp_path / "runs/digits").mkdir(parents=True)
    (tmp_path / "runs/digits/thesis.txt").write_text("mine")
    ended = evenstep("run", "digits", cwd=tmp_path)
    assert ended.returncode == 64
    assert "is not a run: it has no run.json, but contains thesis.txt" in ended.stderr
    assert os.listdir(tmp_path / "runs/digits") == ["thesis.txt"]


def test_a_run_directory_that_cannot_be_read_is_reported(tmp_path):
    (tmp_path / "runs").write_text("a file")
    ended = evenstep("run", "digits", cwd=tmp_path)
    assert ended.returncode == 64
    assert "cannot be used: Not a directory. Choose another with --runs" in ended.stderr
    (tmp_path / "other/digits").mkdir(parents=True)
    (tmp_path / "other/digits/run.json").write_text("{torn")
    ended = evenstep("run", "digits", "--runs", "other", cwd=tmp_path)
    assert ended.returncode == 64
    assert "run.json cannot be read" in ended.stderr


def test_a_run_in_use_is_refused_with_the_name_of_its_holder(tmp_path):
    import fcntl

    assert evenstep("run", "digits", "--stop-at", 1, cwd=tmp_path).returncode == 75
    with open(tmp_path / "runs/digits/.lock", "r+") as lock:
        holder = lock.read()
        fcntl.flock(lock, fcntl.LOCK_EX)
        ended = evenstep("run", "digits", cwd=tmp_path)
    assert ended.returncode == 64
    assert f"is being written by {holder}" in ended.stderr


@pytest.mark.parametrize("words", [(), ("kubernetes",)])
def test_a_command_without_a_word_is_shown_its_help(tmp_path, words):
    ended = evenstep(*words, cwd=tmp_path)
    assert ended.returncode == 64
    assert ended.stderr.startswith(f"Usage: {' '.join(('evenstep', *words))} [OPTIONS]")
    assert "Commands:" in ended.stderr


@pytest.mark.parametrize(
    "words", [["--help"], ["recipes"], ["schema"], ["run", "--help"]], ids=" ".join
)
def test_what_needs_no_torch_does_not_import_it(tmp_path, words):
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    ended = evenstep(*words, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout
