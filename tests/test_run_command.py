"""`evenstep run` and its kin, as real commands."""

import json
import re
import subprocess

import pytest
from commands import OFFLINE, ROOT, evenstep, torchrun
from jobs import plan_of
from safetensors.torch import load_file
from wandb_log import read_segments

from service.runs.receipt_file import read_receipt
from service.runs.tracking import read_metrics
from service.spec.files import fingerprint, load_spec

SHORT = ("length.epochs=4",)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The digits recipe, to the end, in one process."""
    place = tmp_path_factory.mktemp("alone")
    done = evenstep("run", "digits", cwd=place)
    assert done.returncode == 0, done.stderr
    return place / "runs" / "digits", done.stdout


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """Four epochs of it."""
    place = tmp_path_factory.mktemp("short")
    done = evenstep("run", "digits", *SHORT, cwd=place)
    assert done.returncode == 0, done.stderr
    return place / "runs" / "digits"


def test_the_digits_recipe_reaches_97_percent(alone):
    run, output = alone
    assert read_metrics(run / "metrics.jsonl")[-1]["test/accuracy"] >= 0.97
    assert re.search(r"step=180/180 .*test/accuracy=0\.9", output)
    assert "Done after step 180" in output


def test_the_best_checkpoint_is_kept_in_addition_to_the_newest(alone):
    run, _ = alone
    rows = [row for row in read_metrics(run / "metrics.jsonl") if "test/accuracy" in row]
    best = max(rows, key=lambda row: row["test/accuracy"])  # the first of equals, as saved
    assert (run / "checkpoints" / "best").read_text().strip() == f"step-{best['step']:08d}"
    kept = sorted(path.name for path in (run / "checkpoints").glob("step-*"))
    assert kept[-1] == "step-00000180"
    assert f"step-{best['step']:08d}" in kept
    assert len(kept) <= 3


@pytest.mark.parametrize("way", ["--processes 2", "--processes 3", "torchrun 2"])
def test_the_same_job_three_ways(short, tmp_path, way):
    kind, count = way.split()
    if kind == "torchrun":
        done = torchrun(int(count), "run", "digits", *SHORT, cwd=tmp_path)
    else:
        done = evenstep("run", "digits", *SHORT, kind, count, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "digits"
    facts = json.loads((run / "run.json").read_text())
    assert facts["attempts"][-1]["processes"] == int(count)
    assert read_receipt(run / "receipt.jsonl") == read_receipt(short / "receipt.jsonl")
    assert done.stdout.count("step=60/60") == 1, "one process speaks for all"
    last, first = (read_metrics(p / "metrics.jsonl")[-1] for p in (run, short))
    assert last["test/accuracy"] == pytest.approx(first["test/accuracy"], abs=0.012)


def test_run_again_it_resumes_and_then_has_nothing_to_do(tmp_path):
    run = ("run", "digits", *SHORT)
    stopped = evenstep(*run, "--stop-at", 13, cwd=tmp_path)
    assert stopped.returncode == 75, stopped.stderr
    assert "Stopped after step 13 of 60" in stopped.stderr
    resumed = evenstep(*run, "--processes", 2, "--stop-at", 30, cwd=tmp_path)
    assert resumed.returncode == 75, resumed.stderr
    assert "Resuming after step 13" in resumed.stdout
    done = evenstep(*run, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    again = evenstep(*run, cwd=tmp_path)
    assert again.returncode == 0
    assert "Nothing to do" in again.stdout
    steps = [row["step"] for row in read_metrics(tmp_path / "runs/digits/metrics.jsonl")]
    assert steps == sorted(set(steps)), "no step twice"
    assert set(range(10, 61, 10)) <= set(steps), "no gap"


def test_wandb_gets_one_run_over_all_attempts(tmp_path):
    for stop in (20, 40):
        ended = evenstep(
            "run", "digits", "--processes", 2, "--stop-at", stop, cwd=tmp_path, **OFFLINE
        )
        assert ended.returncode == 75, ended.stderr
    run = tmp_path / "runs" / "digits"
    segments = read_segments(run)
    assert [log.run_id for log in segments] == [
        json.loads((run / "run.json").read_text())["id"]
    ] * 2
    assert [log.exit_code for log in segments] == [75, 75]
    sent = [row for log in segments for row in log.rows]
    kept = read_metrics(run / "metrics.jsonl")
    assert [row["step"] for row in sent] == [row["step"] for row in kept]
    assert [row.get("train/loss") for row in sent] == [row.get("train/loss") for row in kept]


def test_only_the_lead_imports_wandb(tmp_path):
    job = tmp_path / "spy.py"
    job.write_text(
        "import sys\n"
        "from service.recipes.digits import task as digits\n"
        "import atexit, os, pathlib\n"
        "task = digits()\n"
        "def tell():\n"
        "    seen = 'wandb' in sys.modules\n"
        "    pathlib.Path(f'rank-{os.environ.get(\"RANK\")}').write_text(str(seen))\n"
        "class Measure:\n"
        "    def __call__(self, outputs, targets):\n"
        "        tell()\n"
        "        return original(outputs, targets)\n"
        "original = task.measure\n"
        "task.measure = Measure()\n"
    )
    spec = (ROOT / "service/recipes/digits.yaml").read_text()
    spec = re.sub("(?m)^task:.*$", "task: ./spy.py:task", spec)
    spec = re.sub("(?m)^task_args:.*$", "", spec)
    (tmp_path / "spy.yaml").write_text(spec)
    done = evenstep("run", "spy.yaml", "length.epochs=1", "--processes", 2, cwd=tmp_path, **OFFLINE)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "rank-0").read_text() == "True"
    assert (tmp_path / "rank-1").read_text() == "False"


def test_fresh_puts_the_earlier_run_aside(tmp_path):
    assert evenstep("run", "digits", "--stop-at", 5, cwd=tmp_path).returncode == 75
    fresh = evenstep("run", "digits", "--fresh", "--stop-at", 5, cwd=tmp_path)
    assert fresh.returncode == 75, fresh.stderr
    assert "Resuming" not in fresh.stdout
    asides = [p for p in (tmp_path / "runs").iterdir() if p.name.startswith(".digits-")]
    assert len(asides) == 1
    assert (asides[0] / "checkpoints/step-00000005/model.safetensors").exists()


def test_a_changed_spec_is_refused_and_a_changed_log_interval_is_not(tmp_path):
    assert evenstep("run", "digits", "--stop-at", 5, cwd=tmp_path).returncode == 75
    refused = evenstep("run", "digits", "optimizer.lr=0.2", cwd=tmp_path)
    assert refused.returncode == 64
    assert "optimizer.lr: 0.1 -> 0.2" in refused.stderr
    taken = evenstep("run", "digits", "tracking.log_every_steps=7", "--stop-at", 9, cwd=tmp_path)
    assert taken.returncode == 75, taken.stderr


def test_settings_by_pattern_reach_the_optimizer(tmp_path):
    (tmp_path / "two.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "from torch.utils.data import TensorDataset\n"
        "from service.task import supervised\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.base, self.regression = nn.Linear(3, 4), nn.Linear(4, 1)\n"
        "    def forward(self, x):\n"
        "        return self.regression(self.base(x))\n"
        "rows = TensorDataset(torch.randn(40, 3), torch.randn(40, 1))\n"
        "task = supervised(model=Net, train=rows, test=rows, loss='mean_squared')\n"
    )
    (tmp_path / "two.yaml").write_text(
        "name: two\ntask: ./two.py:task\nbatch: {global_batch: 10}\nlength: {steps: 10}\n"
        "optimizer:\n  name: sgd\n  lr: 0.5\n  groups:\n"
        '    - {match: "base.*", lr: 0.001}\n    - {match: "regression.*", lr: 0.0001}\n'
    )
    done = evenstep("run", "two.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    last = read_metrics(tmp_path / "runs/two/metrics.jsonl")[-1]
    assert (last["train/lr/0"], last["train/lr/1"]) == (0.001, 0.0001)
    plan = plan_of(tmp_path / "two.yaml", runs=tmp_path / "runs")
    assert re.search(r"base\.\* +2 +16 +0\.001 .*base\.weight, base\.bias", plan)
    assert re.search(r"regression\.\* +2 +5 +0\.0001 .*regression\.weight", plan)


def test_weights_are_plain_safetensors(alone):
    weights = load_file(sorted((alone[0] / "checkpoints").glob("step-*"))[-1] / "model.safetensors")
    assert weights["1.running_mean"].shape == (32,)
    assert int(weights["1.num_batches_tracked"]) == 180


def test_wandb_shows_the_spec_its_hash_and_the_state_of_the_code(tmp_path):
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    (tmp_path / "notes.txt").write_text("one\n")
    identity = ("-c", "user.name=a", "-c", "user.email=a@example.com")
    for words in (("add", "."), (*identity, "commit", "-qm", "first")):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    (tmp_path / "notes.txt").write_text("two\n")
    assert evenstep("run", "digits", "--stop-at", 3, cwd=tmp_path, **OFFLINE).returncode == 75
    run = tmp_path / "runs/digits"
    [log] = read_segments(run)
    spec = load_spec(run / "spec.yaml")
    assert log.config["optimizer"]["lr"] == 0.1
    assert log.config["spec_sha256"] == fingerprint(spec)
    assert log.config["processes"] == 1
    assert log.config["versions"]["torch"]
    assert log.config["git"]["dirty"] is True
    assert len(log.config["git"]["commit"]) == 40
    assert "-one\n+two\n" in log.config["git"]["diff"]
