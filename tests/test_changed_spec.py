"""A run is changed, extended and forked: what may change, what is recorded, and that it is true."""

import hashlib
import json
import re
import shlex
import shutil

import pytest
import torch
import yaml
from commands import evenstep
from jobs import spec_of, train_in_process
from safetensors.torch import load_file

from service.basics.errors import SpecError
from service.plan.changing import FIXED, Accepted, Change, changes, require_keys, why_not
from service.runs.checkpoint_files import best_of
from service.runs.directory import check_run
from service.runs.history import read_history
from service.spec.files import load_spec

RULES = {
    "optimizers": (
        "optimizers.a.optimizer.lr=0.2",
        "optimizer=\nschedule={name: constant}\noptimizers={TURNS}",
    ),
    "init": ("init.from=other", "init.from=first"),
    "batch.global_batch": ("batch.global_batch=60", ""),
    "exactness": ("exactness=bitwise", ""),
    "loader.stream": ("loader.stream=split", ""),
    "optimizer.name": ("optimizer={name: adam, lr: 0.05}", ""),
    "optimizer.groups": ("optimizer.groups=[{match: '*'}]", ""),
    "optimizer.*": ("optimizer.nesterov=true", ""),
    "optimizer.momentum": ("optimizer.momentum=0", ""),
    "optimizer.lr": ("optimizer.lr=0.1", "schedule={name: 'torch.optim.lr_scheduler:StepLR'}"),
    "schedule": ("schedule={name: 'torch.optim.lr_scheduler:StepLR', step_size: 3}", ""),
    "schedule.measure": ("schedule.measure=test/accuracy", "schedule={PLATEAU}"),
    "schedule.mode": ("schedule.mode=max", "schedule={PLATEAU}"),
    "early_stopping.measure": ("early_stopping.measure=test/x", "early_stopping={WAITING}"),
    "early_stopping.mode": ("early_stopping.mode=max", "early_stopping={WAITING}"),
    "checkpoint.best.mode": ("checkpoint.best.mode=max", "checkpoint.best={BEST}"),
    "model.moving_average": ("model.moving_average=0.9", ""),
    "model.precision": ("model.precision=fp16", ""),
}
BEST = "measure: test/loss, mode: min"
WORDS = {"PLATEAU": f"name: plateau, {BEST}", "WAITING": f"{BEST}, patience: 3", "BEST": BEST}
WORDS["TURNS"] = "a: {optimizer: {name: sgd, lr: 0.1}}"


def spec(*overrides):
    held = [part for text in overrides for part in text.split("\n") if part]
    for word, meaning in WORDS.items():
        held = [text.replace(word, meaning) for text in held]
    return load_spec(spec_of("cut_of_digits"), overrides=held)


@pytest.mark.parametrize("key", [fixed.key for fixed in FIXED])
def test_what_the_state_cannot_follow_is_refused_with_the_reason(key):
    changed, before = RULES[key]
    old, new = spec(before), spec(before, changed)
    reasons = {why_not(change, old) for change in changes(old, new)}
    assert next(fixed.why for fixed in FIXED if fixed.key == key) in reasons


def test_every_rule_has_a_case():
    assert RULES.keys() == {fixed.key for fixed in FIXED}


def test_what_the_state_can_follow_is_not():
    followed = (
        "length.steps=60",
        "optimizer.lr=0.1",
        "optimizer.momentum=0.5",
        "optimizer.weight_decay=0.1",
        "schedule={name: constant}",
        "schedule={PLATEAU}",
        "early_stopping={WAITING}",
        "max_grad_norm=1",
        "seed=8",
        "batch.micro_batch=5",
        "model.precision=bf16",
        "checkpoint.best={BEST}",
    )
    for text in followed:
        found = changes(spec(), spec(text))
        assert found, text
        assert [why_not(change, spec()) for change in found] == [None] * len(found), text


def test_a_named_key_covers_itself_its_section_and_its_other_unit():
    accepted = Accepted.named(["--length.epochs=2", "schedule.name=cosine", "optimizer=x"])
    for key in ("length.epochs", "schedule.final", "optimizer.groups.0.lr", "optimizer.lr"):
        assert accepted.covers(Change(key, "1", "2")), key
    assert Accepted.named(["schedule.warmup_steps=3"]).covers(
        Change("schedule.warmup_epochs", "1", "not set")
    )
    assert Accepted.named(["length.steps=3"]).covers(Change("length.epochs", "1", "not set"))
    for key in ("seed", "task_args.width", "lengths"):
        assert not accepted.covers(Change(key, "1", "2")), key


JOB = spec_of("cut_of_digits", name="long", schedule={"name": "constant"}) | {
    "length": {"steps": 9},
    "checkpoint": {"every_steps": 3},
    "test": {},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory, processes):
    """A run of nine steps at once, and one of six that was extended."""
    place = tmp_path_factory.mktemp("changed")
    runs, short = place / "runs", JOB | {"name": "extended", "length": {"steps": 6}}
    (place / "job.yaml").write_text(yaml.safe_dump(JOB))
    (place / "short.yaml").write_text(yaml.safe_dump(short))
    pool = processes(1)
    pool.run(train_in_process, JOB, runs)
    pool.run(train_in_process, short, runs)
    told = evenstep("run", "short.yaml", "--change", "length.steps=9", cwd=place)
    assert told.returncode == 0, told.stderr
    assert "Changed from step 7 on:\n  length.steps: 6 -> 9" in told.stdout
    return place


def go_on(processes, run):
    """Train a fork to its end, in as many processes as the pool has."""
    spec = load_spec(run / "spec.yaml").model_dump(mode="json", exclude_none=True)
    processes.run(train_in_process, spec, run.parent)


def weights(run, step):
    return load_file(run / "checkpoints" / f"step-{step:08}" / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(value, b[key]) for key, value in a.items())


def test_an_extended_run_ends_in_the_bits_of_one_that_was_so_long_from_the_start(place):
    assert same(weights(place / "runs/long", 9), weights(place / "runs/extended", 9))
    compared = evenstep("verify", "long", "extended", "--level", "bits", cwd=place)
    assert compared.returncode == 0, compared.stdout
    assert "extended: changed after step 6 by " in compared.stdout
    assert "length.steps: 6 -> 9" in compared.stdout


@pytest.mark.parametrize("waiting", ["schedule", "early_stopping"])
def test_the_test_after_the_old_last_step_does_not_count_in_the_longer_run(
    processes, tmp_path, waiting
):
    sections = {"name": "plateau", "gamma": 0.5} if waiting == "schedule" else {}
    measure = {"measure": "test/accuracy", "mode": "max", "min_delta": 2.0, "patience": 2}
    job = spec_of("cut_of_digits", test={"every_steps": 3})  # so after 3 and 6, and after 5
    job |= {"schedule": {"name": "constant"}, waiting: sections | measure}
    train = processes(1).run
    for count in (5, 8):
        length = {"length": {"steps": count}}
        accepted = Accepted.named(["length.steps=8"])
        train(train_in_process, job | length, tmp_path / "extended", None, accepted)
    train(train_in_process, job | length, tmp_path / "long")
    extended, long = (tmp_path / name / "job" for name in ("extended", "long"))
    assert same(weights(extended, 8), weights(long, 8))


def test_who_changed_what_at_which_step_is_in_run_json_receipt_and_report(place):
    run = place / "runs/extended"
    (entry,) = read_history(run).changes
    assert entry["step"] == 6
    assert "@" in entry["by"]
    assert entry["keys"] == [{"key": "length.steps", "was": "6", "now": "9"}]
    assert entry["spec_sha256"] == hashlib.sha256((run / "spec.yaml").read_bytes()).hexdigest()
    lines = [json.loads(line) for line in (run / "receipt.jsonl").read_text().splitlines()]
    (told,) = [line for line in lines if "changed" in line]
    assert told["step"] == 6
    assert told["changed"] == {"length.steps": ["6", "9"]}
    assert evenstep("report", "extended", "-o", "page.html", cwd=place).returncode == 0
    assert "length.steps: 6 -&gt; 9" in (place / "page.html").read_text()


def test_the_same_again_records_nothing_more(place, processes):
    spec = yaml.safe_load((place / "short.yaml").read_text()) | {"length": {"steps": 9}}
    accepted = Accepted.named(["length.steps=9"])
    processes(1).run(train_in_process, spec, place / "runs", None, accepted)
    assert len(read_history(place / "runs/extended").changes) == 1


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--change"], "--change: no key is named"),
        (["--change", "seed=8", "--fresh"], "--change: --fresh starts a new run"),
        (["seed=8"], "long was started with another spec:\n  seed: 7 -> 8\nContinue with the old"),
        (["--change", "seed=8", "max_grad_norm=1", "batch.global_batch=60"], "counted in steps"),
        (["--change", "length.steps=5"], "has taken 9 steps, and would end after 5 steps, so no"),
    ],
)
def test_an_impossible_change_is_reported_and_changes_nothing(place, words, told):
    run = place / "runs/long"
    before = {path: path.read_bytes() for path in (run / "run.json", run / "spec.yaml")}
    refused = evenstep("run", "job.yaml", *words, cwd=place)
    assert refused.returncode == 64, refused.stdout
    assert told in refused.stderr
    assert {path: path.read_bytes() for path in before} == before


def test_only_what_is_named_is_accepted(place):
    runs = place / "runs"
    with pytest.raises(SpecError, match=r"seed: 7 -> 8\n.*name these keys too"):
        check_run(
            runs,
            load_spec(JOB, overrides=["seed=8", "length.steps=20"]),
            fresh=False,
            accepted=Accepted.named(["length.steps=20"]),
        )
    check_run(
        runs,
        load_spec(JOB, overrides=["seed=8", "length.steps=20"]),
        fresh=False,
        accepted=Accepted(everything=True),
    )


def test_a_fork_continues_from_its_step_and_leaves_the_run_as_it_was(place, processes):
    run = place / "runs/long"
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    words = ("fork", "long", "--at", "6", "--name", "forked", "optimizer.weight_decay=0.5")
    forked = evenstep(*words, cwd=place)
    assert forked.returncode == 0, forked.stderr
    assert "evenstep run runs/forked/spec.yaml" in forked.stdout
    assert same(weights(run, 6), weights(place / "runs/forked", 6))
    go_on(processes(2), place / "runs/forked")
    assert {path: path.read_bytes() for path in before} == before
    told = read_history(place / "runs/forked")
    assert told.facts["forked_from"]["run"] == "long"
    assert [row["step"] for row in told.rows] == list(range(1, 10))
    compared = evenstep("verify", "long", "forked", "--level", "losses", cwd=place)
    assert "rows: the same in 9 steps" in compared.stdout
    assert "forked: changed after step 6" in compared.stdout
    again = evenstep(*words, cwd=place)
    assert again.returncode == 64
    assert "--name: runs/forked exists" in again.stderr


def test_a_fork_has_the_best_checkpoint_under_this_name(tmp_path):
    words = ("run", "digits", "length.steps=4", "test.every_steps=2", "test.every_epochs=")
    assert evenstep(*words, cwd=tmp_path).returncode == 0
    assert evenstep("fork", "digits", "--at", "latest", "--name", "x", cwd=tmp_path).returncode == 0
    best = best_of(tmp_path / "runs/digits/checkpoints")
    assert best is not None
    assert best_of(tmp_path / "runs/x/checkpoints") == best


def test_a_changed_option_is_the_one_that_trains(place, processes):
    for name, words in (("plain", []), ("decayed", ["optimizer.weight_decay=0.5"])):
        done = evenstep("fork", "long", "--at", "6", "--name", name, *words, cwd=place)
        assert done.returncode == 0, done.stderr
        go_on(processes(1), place / "runs" / name)
    assert same(weights(place / "runs/plain", 9), weights(place / "runs/long", 9))
    assert not same(weights(place / "runs/decayed", 9), weights(place / "runs/long", 9))
    state = json.loads((place / "runs/decayed/checkpoints/step-00000009/state.json").read_text())
    (group,) = state["optimizer"]["groups"]
    assert group["values"]["weight_decay"] == {"value": 0.5}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--at", "4", "--name", "x"], "there is no '4'"),
        (["--at", "6", "--name", "x", "optimizer.name=adagrad"], "optimizer.momentum: unknown"),
        (["--at", "6", "--name", "x", "batch.global_batch=60"], "cannot be forked with"),
        (["--at", "6", "--name", "a/b"], "name: must be"),
    ],
)
def test_an_impossible_fork_is_reported_and_leaves_nothing(place, words, told):
    before = sorted((place / "runs").iterdir())
    refused = evenstep("fork", "long", *words, cwd=place)
    assert refused.returncode == 64, refused.stdout
    assert told in refused.stderr
    assert sorted((place / "runs").iterdir()) == before


def test_a_fork_names_the_file_of_the_source_that_cannot_be_read(place, tmp_path):
    shutil.copytree(place / "runs/long", tmp_path / "runs/long")
    (tmp_path / "runs/long/metrics.jsonl").unlink()
    (tmp_path / "runs/long/metrics.jsonl").mkdir()
    refused = evenstep("fork", "long", "--at", "6", "--name", "x", cwd=tmp_path)
    assert refused.returncode == 64, refused.stdout
    assert "metrics.jsonl cannot be read: Is a directory" in refused.stderr
    assert [run.name for run in (tmp_path / "runs").iterdir()] == ["long"]


def test_a_change_can_be_accepted_of_every_key_that_a_spec_can_have():
    custom = JOB | {"optimizer": {"name": "./job.py:made", "lr": 0.1}}
    known = ["model", "length.epochs", "optimizer.groups.0.lr", "optimizers.a.optimizer.lr"]
    known += ["task_args.width", "task_args.a.b", "kubernetes.env.A", "kubernetes.nodes.least"]
    known += ["schedule.warmup_steps", "model.compile.mode"]
    require_keys(known, load_spec(JOB), option="--accept")
    require_keys([*known, "optimizer.own.a"], load_spec(custom), option="--accept")
    unknown = ("lenght", "optimizer.own", "batch.micro_batch.x", "optimizers.a.optimizer.own", "")
    for key in unknown:
        with pytest.raises(SpecError, match=f"--accept {key}: no spec has this key"):
            require_keys([key], load_spec(JOB), option="--accept")
    with pytest.raises(SpecError, match="did you mean 'length'"):
        require_keys(["lenght"], load_spec(JOB), option="--accept")


def test_a_schedule_that_depends_on_the_length_is_reported(tmp_path, processes):
    job = JOB | {"schedule": {"name": "cosine"}, "length": {"steps": 6}}
    processes(1).run(train_in_process, job, tmp_path / "runs", 3)
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job | {"length": {"steps": 12}}))
    done = evenstep("run", "job.yaml", "--accept-changes", "--stop-at", 4, cwd=tmp_path)
    assert done.returncode == 75, done.stderr
    assert (
        "The schedule cosine depends on the length of the run, so it changes too: at step 4 the "
        "learning rate's multiplier is 0.8536 instead of 0.5."
    ) in done.stdout


def test_a_change_that_was_entered_and_never_written_is_forgotten(place, tmp_path):
    from service.runs.directory import open_run

    shutil.copytree(place / "runs/extended", tmp_path / "extended")
    facts = json.loads((tmp_path / "extended/run.json").read_text())
    lost = facts["changes"][0] | {"spec_sha256": "0" * 64}
    (tmp_path / "extended/run.json").write_text(json.dumps(facts | {"changes": [lost]}))
    spec = load_spec(tmp_path / "extended/spec.yaml")
    opened = open_run(tmp_path, spec, fresh=False)
    try:
        assert opened.facts["changes"] == []
    finally:
        opened.close()


def submitted_to_slurm(text, place):
    """(spec file, words) of the script's `evenstep run`, but for its directory of runs."""
    spec = place / "slurm.yaml"
    spec.write_text(
        re.search(r"<<'END_OF_SPEC' \|\| exit\n(.*?)\nEND_OF_SPEC\n", text, re.DOTALL)[1]
    )
    line = next(line for line in text.splitlines() if "--name " in line and line.endswith(" &"))
    words = shlex.split(line.removesuffix(" &").replace('"$name"', "digits"))
    return spec, words


def submitted_to_kubernetes(text, place):
    objects = list(yaml.safe_load_all(text))
    spec = place / "kubernetes.yaml"
    spec.write_text(next(o for o in objects if o["kind"] == "ConfigMap")["data"]["spec.yaml"])
    job = next(o for o in objects if o["kind"] == "Job")
    command = job["spec"]["template"]["spec"]["containers"][0]["command"]
    assert command[:5] == ["evenstep", "run", "/etc/evenstep/spec.yaml", "--runs", "/runs"]
    return spec, command[5:]


def test_a_cluster_gets_the_changes_of_submit(tmp_path):
    """What Slurm and the pods are given is run here: it changes the run, and only as asked."""
    begun = ("digits", "length.steps=3", "schedule.name=constant")
    assert evenstep("run", *begun, cwd=tmp_path).returncode == 0
    cluster = ("slurm={nodes: 1, gpus_per_node: 0}", "kubernetes={image: e.com/x, device: cpu}")
    for engine, submitted, steps in (
        ("slurm", submitted_to_slurm, 4),
        ("kubernetes", submitted_to_kubernetes, 5),
    ):
        words = (engine, "render", *begun[::2], f"length.steps={steps}", "--name", "digits")
        plain = evenstep(*words, *cluster, cwd=tmp_path)
        asked = evenstep(*words, "--change", *cluster, cwd=tmp_path)
        assert asked.returncode == 0, asked.stderr
        spec, without = submitted(plain.stdout, tmp_path)
        refused = evenstep("run", spec, *without, cwd=tmp_path)
        assert refused.returncode == 64
        assert f"length.steps: {steps - 1} -> {steps}" in refused.stderr
        spec, given = submitted(asked.stdout, tmp_path)
        changed = evenstep("run", spec, *given, cwd=tmp_path)
        assert changed.returncode == 0, changed.stderr
    entries = read_history(tmp_path / "runs/digits").changes
    assert [(e["step"], [k["key"] for k in e["keys"]]) for e in entries] == [
        (3, ["length.steps"]),
        (4, ["length.steps"]),
    ]


@pytest.mark.parametrize(("below", "run"), [(".", "."), ("checkpoints", "..")])
def test_a_fork_of_the_current_directory_is_beside_it(place, below, run):
    name = f"beside-{len(run)}"
    forked = evenstep("fork", run, "--at", "6", "--name", name, cwd=place / "runs/long" / below)
    assert forked.returncode == 0, forked.stderr
    assert read_history(place / "runs" / name).step == 6
    assert not (place / "runs/long" / below / name).exists()


def test_the_command_that_fork_prints_works_where_a_path_has_a_space(tmp_path):
    runs = tmp_path / "my runs"
    words = ("run", "digits", "length={steps: 2}", "--stop-at", 1, "--runs", runs)
    assert evenstep(*words, cwd=tmp_path).returncode == 75
    forked = evenstep("fork", runs / "digits", "--at", "latest", "--name", "other", cwd=tmp_path)
    assert forked.returncode == 0, forked.stderr
    told = shlex.split(forked.stdout.partition("  evenstep ")[2])
    done = evenstep(*told, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (runs / "other/metrics.jsonl").exists()
