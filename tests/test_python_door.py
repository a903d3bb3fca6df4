"""`from service import ...`: the same from a notebook or a script."""

import json
import signal
import subprocess
import sys

from commands import BIN, DEADLINE_SECONDS, OFFLINE, command, evenstep, start
from injuring import descendants, is_alive, until

from service.runs.tracking import read_metrics


def python(script, cwd, *options, **environ):
    words = (sys.executable, *options, "-c", script)
    return command(*words, cwd=cwd, timeout=DEADLINE_SECONDS, **environ)


def test_importing_service_imports_nothing_heavy(tmp_path):
    done = python(
        "import sys, service; dir(service); from service import read_history, load_spec;"
        "print(sorted({'torch', 'numpy', 'wandb', 'accelerate'} & set(sys.modules)))",
        tmp_path,
        "-B",  # with which no program is forked from an interpreter that has imported them
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_every_name_of_the_door_is_there(tmp_path):
    done = python(
        "import service\nfor name in service.__all__: assert getattr(service, name), name\n"
        "try: service.runn\nexcept AttributeError as error: print(error)",
        tmp_path,
    )
    assert done.stdout.strip() == "module 'service' has no attribute 'runn'", done.stderr


SCRIPT = """
import json
import signal
from service import run, read_history, Spec, load_spec
from service.basics.errors import SpecError

changed = {"length": {"epochs": 2}, "optimizer": {"lr": 0.05}, "tracking": {"wandb": None}}
changed["checkpoint"] = {"rename": {"old.line": "line"}}
h = run("digits", name="door", **changed)
assert h.spec["checkpoint"]["rename"] == {"old.line": "line"}, h.spec
try: raise AssertionError(run("digits", runs=""))
except SpecError as error: assert "runs: is empty" in str(error), error
print(json.dumps({"state": h.state, "rows": h.rows, "optimizer": h.spec["optimizer"]}))
again = run(load_spec(h.directory.spec))
assert again.rows == h.rows
longer = run("digits", name="door", accept_changes=True, **changed | {"length": {"epochs": 3}})
assert longer.rows[:len(h.rows)] == h.rows and longer.step == 45, longer
assert [entry["step"] for entry in longer.changes] == [30]
"""


def test_a_run_from_python_is_the_run_of_the_command(tmp_path):
    done = python(SCRIPT, tmp_path)
    assert done.returncode == 0, done.stderr
    told = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    assert told["state"] == "done"
    assert (told["optimizer"]["lr"], told["optimizer"]["momentum"]) == (0.05, 0.9)
    assert "step=30/30" in done.stdout, "the same progress"
    assert "Nothing to do" in done.stdout
    words = ["length.epochs=2", "optimizer.lr=0.05", "tracking.wandb="]
    ran = evenstep("run", "digits", *words, "--name", "command", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    same = read_metrics(tmp_path / "runs/command/metrics.jsonl")
    for ours, theirs in zip(told["rows"], same, strict=True):
        assert ours["step"] == theirs["step"]
        assert ours.get("train/loss") == theirs.get("train/loss"), "to the bit"


NOTEBOOK = """
import torch
from torch import nn
from torch.utils.data import TensorDataset
from service import run, supervised

x = torch.rand(200, 2, generator=torch.Generator().manual_seed(0))
rows = TensorDataset(x, (x[:, 0] > x[:, 1]).long())
task = supervised(model=lambda: nn.Linear(2, 2), train=rows, test=rows, measures=("accuracy",))
spec = {
    "name": "cells", "task": "__main__:task", "batch": {"global_batch": 50},
    "length": {"epochs": 40}, "optimizer": {"name": "adam", "lr": 0.1},
}
history = run(spec)
print(history)
print(history.rows[-1]["test/accuracy"])
"""


def test_a_task_may_be_a_cell_of_the_notebook(tmp_path):
    done = python(NOTEBOOK, tmp_path)
    assert done.returncode == 0, done.stderr
    *_, shown, accuracy = done.stdout.strip().splitlines()
    assert shown == "<run cells: done, step 160 of 160>"
    assert float(accuracy) > 0.9


WRONG = """
import pathlib, numpy
from service import run
from service.basics.errors import SpecError

def task(): pass

for wrong in (
    {"task": task},
    {"task_args": {"folder": pathlib.Path("data")}},
    {"optimizer": {"lr": numpy.float32(0.1)}},
):
    try:
        run("digits", **wrong)
    except SpecError as error:
        print(error)
"""


def test_what_no_spec_can_hold_is_reported_in_a_notebook_too(tmp_path):
    done = python(WRONG, tmp_path)
    assert done.returncode == 0, done.stderr
    of_task, of_folder, of_rate = done.stdout.splitlines()
    assert of_task.endswith("but is of type function; give its name, such as '__main__:task'")
    assert of_folder.startswith("task_args.folder: must be null, a truth value")
    assert of_rate.startswith("optimizer.lr: must be null")
    assert not (tmp_path / "runs").exists()


def test_under_torchrun_the_door_says_where_to_go(tmp_path):
    (tmp_path / "script.py").write_text("from service import run\nrun('digits')\n")
    words = ["--standalone", "--nproc-per-node", "2", "script.py"]
    done = command(BIN / "torchrun", *words, cwd=tmp_path, timeout=DEADLINE_SECONDS)
    assert done.returncode != 0
    assert "Use `torchrun ... -m launch run SPEC`" in done.stderr
    assert not (tmp_path / "runs").exists()


KEEPING = """
import random
import numpy
import torch
from service import run, supervised
from torch import nn
from torch.utils.data import TensorDataset

def settings():
    products = torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision
    return *products, torch.backends.cudnn.rnn.fp32_precision, torch.get_num_threads()

class Net(nn.Linear):
    def forward(self, rows):
        inside.add(settings()[:3])
        return super().forward(rows)

def task():
    rows = TensorDataset(torch.rand(40, 4), torch.arange(40) % 3)
    return supervised(model=lambda: Net(4, 3), train=rows, test=rows)

torch.set_num_threads(2)
spec = {"task": "__main__:task", "batch": {"global_batch": 8}, "length": {"steps": 2},
        "optimizer": {"name": "sgd", "lr": 0.1}}
for number, set_before in enumerate((
    lambda: None,
    lambda: torch.set_float32_matmul_precision("high"),
    lambda: setattr(torch.backends, "fp32_precision", "tf32"),
)):
    set_before()
    for precision in ("fp32", "tf32"):
        inside = set()
        random.seed(5), numpy.random.seed(5), torch.manual_seed(5)
        expected = random.random(), numpy.random.rand(), torch.rand(1).item()
        random.seed(5), numpy.random.seed(5), torch.manual_seed(5)
        before = settings()
        run({**spec, "name": f"{precision}-{number}", "model": {"precision": precision}})
        wanted = {("ieee",) * 3} if precision == "fp32" else {("tf32",) * 3}
        assert inside == wanted, (number, precision, inside)
        assert settings() == before, (number, precision, settings(), before)
        assert (random.random(), numpy.random.rand(), torch.rand(1).item()) == expected
import gc, os, sys
variables, hooks, frozen = dict(os.environ), (sys.excepthook, sys.exit), gc.get_freeze_count()
run({**spec, "name": "tracked", "tracking": {"wandb": {"project": "p", "mode": "offline"}}})
assert dict(os.environ) == variables
assert (sys.excepthook, sys.exit) == hooks, "wandb's stay otherwise"
assert gc.get_freeze_count() == frozen
print("all given back")
"""


def test_a_run_from_python_multiplies_as_its_spec_says_and_gives_back_what_it_changed(tmp_path):
    environ = {"EVENSTEP_DEVICE": "cpu"}
    done = python(KEEPING, tmp_path, **environ, **OFFLINE)
    assert done.stdout.endswith("all given back\n"), done.stderr


SEARCH = """
import random, signal, threading
import torch
from service import run

small = {"length": {"steps": 3, "epochs": None}, "schedule": {}, "test": {}}
small["tracking"] = {"wandb": None}
threads, handlers = torch.get_num_threads(), [signal.getsignal(n) for n in (2, 10, 12, 15)]
random.seed(1)
tried = []
for number in range(3):
    tried.append(10 ** random.uniform(-4, -1))
    run("digits", name=f"search{number}", optimizer={"lr": tried[-1]}, **small)
assert len(set(tried)) == 3, tried
assert torch.get_num_threads() == threads
assert [signal.getsignal(n) for n in (2, 10, 12, 15)] == handlers

begun, refused, first = threading.Event(), [], []

class Slow(torch.utils.data.Dataset):
    def __len__(self):
        return 40
    def __getitem__(self, row):
        begun.set()
        if threading.current_thread() is not threading.main_thread():
            while not refused:
                pass
        return torch.ones(4), row % 3

def task():
    from service import supervised
    return supervised(model=lambda: torch.nn.Linear(4, 3), train=Slow(), loss="cross_entropy")

spec = {"name": "slow", "task": "__main__:task", "batch": {"global_batch": 8},
        "length": {"steps": 2}, "optimizer": {"name": "sgd", "lr": 0.1}}
thread = threading.Thread(target=lambda: first.append(run(spec).state))
thread.start()
begun.wait(60)
try:
    run("digits", name="second", **small)
except Exception as error:
    refused.append(f"{type(error).__name__}: {error}")
finally:
    refused.append("")
thread.join(60)
assert first == ["done"], first
told = "SpecError: service.run: this process already trains a run"
assert refused[0].startswith(told), refused
print("alone")
"""


def test_a_search_from_a_notebook_tries_what_it_draws_and_two_runs_at_once_are_refused(tmp_path):
    done = python(SEARCH, tmp_path, EVENSTEP_DEVICE="cpu")
    assert done.stdout.endswith("alone\n"), done.stdout + done.stderr
    assert not (tmp_path / "runs/second").exists()


IN_PROCESSES = """
import torch
from service import load_task, read_history, run
from service.basics.errors import SpecError

best = {"measure": "test/accuracy", "mode": "max"}
changed = {"length": {"steps": 12}, "test": {"every_steps": 4}, "checkpoint": {"best": best}}
changed["checkpoint"]["every_steps"] = 4
one = run("digits", name="one", quiet=True, stop_at=8, **changed)
assert (one.state, one.step) == ("stopped", 8), one
one = run("digits", name="one", quiet=True, **changed)
two = run("digits", name="two", processes=2, quiet=True, **changed)
assert (two.state, two.step, two.attempts[0]["processes"]) == ("done", 12, 2), two
for mine, theirs in zip(one.rows, two.rows, strict=True):
    assert abs(mine.get("train/loss", 0) - theirs.get("train/loss", 0)) < 1e-4

task = load_task("service.recipes.digits:task", two.spec["task_args"])
images, labels = task.test_data().tensors
model = read_history("two").model()
assert not model.training
right = (model(images).argmax(1) == labels).double().mean().item()
assert abs(right - two.last["test/accuracy"]) < 1e-6, (right, two.last)
early = two.model(8)(images)
assert not torch.equal(early, model(images))
assert torch.isfinite(two.model("best")(images)).all()

def refused(words, **more):
    try:
        run("digits", quiet=True, **more)
    except SpecError as error:
        assert words in str(error), error
    else:
        raise AssertionError(words)

refused("processes: must be a whole number, at least 1", processes=0)
refused("processes: must be a whole number, at least 1, but is auto", processes="auto")
refused("stop_at: must be a whole number, at least 1", stop_at=2.5)
refused("__main__:x is a task of this notebook or script", processes=2, task="__main__:x")
refused("optimizer.lr: 0.1 -> 0.3", name="two", processes=2, **changed | {"optimizer": {"lr": 0.3}})
"""


def test_several_processes_quietly_and_the_trained_model(tmp_path):
    done = python(IN_PROCESSES, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


def test_a_run_dies_with_the_program_that_follows_it(tmp_path):
    script = "from service import run; run('digits', processes=2, length={'steps': 100_000}, "
    script += "schedule={'name': 'constant'}, faults={'stop_poll_steps': 1}, quiet=True)"
    none = subprocess.DEVNULL
    words = [sys.executable, "-c", script]
    with start(words, cwd=tmp_path, stdout=none, stderr=none) as started:
        try:
            metrics = tmp_path / "runs/digits/metrics.jsonl"
            begun = lambda: metrics.exists() and metrics.stat().st_size  # noqa: E731
            until(begun, "the first steps", of=started)
            below = descendants(started.pid)
        finally:
            started.kill()
    until(lambda: not any(map(is_alive, below)), "they die with it")


def test_an_interrupt_reaches_the_processes_of_a_run(tmp_path):
    script = "from service import run; h = run('digits', processes=2, length={'steps': 5000}, "
    script += "schedule={'name': 'constant'}, faults={'stop_poll_steps': 1}); print(repr(h))"
    words = [sys.executable, "-c", script]
    with (tmp_path / "out").open("w") as out:
        started = start(words, cwd=tmp_path, stdout=out, stderr=out)
        try:
            metrics = tmp_path / "runs/digits/metrics.jsonl"
            begun = lambda: metrics.exists() and metrics.stat().st_size  # noqa: E731
            until(begun, "the first steps", of=started)
            started.send_signal(signal.SIGINT)
            code = started.wait(DEADLINE_SECONDS)
        finally:
            started.kill()
    said = (tmp_path / "out").read_text()
    assert code == 0, said
    assert "<run digits: stopped, step " in said
