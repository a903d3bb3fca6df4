"""A checkpoint is whole or absent, as it was written or not believed."""

import errno
import hashlib
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import threading
from pathlib import Path

import pytest
import torch
import xxhash
from commands import evenstep
from disks import mounted
from hypothesis import given, settings
from hypothesis import strategies as st
from jobs import spec_of, train_in_process
from safetensors.torch import load_file, save_file
from saves import (
    at_step,
    best,
    checkpoints,
    content,
    die_at,
    new_state,
    same,
    saved,
    take_step,
    watched,
)
from torch import nn

import service.checkpoints.checkpoints
import service.runs.checkpoint_files
from service.basics.errors import Diverged, EvenstepError, NoCheckpoint, NotSaved, SpecError
from service.checkpoints.checkpoints import agreed_checkpoint
from service.checkpoints.snapshots import content_of, expected_bytes
from service.optimization.learning_rates import Schedule
from service.optimization.train_state import TrainState
from service.runs.checkpoint_files import (
    AVERAGE,
    DATA,
    MANIFEST,
    MODEL,
    OPTIMIZER,
    STATE,
    Checkpoint,
    best_of,
    checkpoints_in,
    damage_of,
    find_checkpoint,
    kept,
)
from service.runs.export import export_weights
from service.runs.tracking import read_metrics

FILES = (*DATA, MANIFEST)
BOTH = pytest.mark.parametrize("asynchronous", [True, False], ids=["asynchronous", "blocking"])


def steps_in(directory):
    return [checkpoint.step for checkpoint in checkpoints_in(directory)]


def save_now(made, state):
    made.save(state)
    made.finish()


# ---- what is saved comes back


@BOTH
def test_everything_is_restored_with_the_same_bits(tmp_path, alone, asynchronous):
    saved(tmp_path, alone, 3, asynchronous=asynchronous)
    state = new_state(seed=5)
    assert checkpoints(tmp_path, alone).restore(state)
    assert same(state, at_step(3))
    take_step(state)
    assert same(state, at_step(4)), "and goes on with the same bits"


def test_the_files_are_plain_safetensors_and_json(tmp_path, alone):
    saved(tmp_path, alone, 2)
    weights = load_file(tmp_path / "step-00000002" / MODEL)
    own = dict(at_step(2).model.state_dict())
    assert own.keys() - weights.keys() == {"head.weight"}, "tied weights are stored once"
    assert all(torch.equal(tensor, own[name]) for name, tensor in weights.items())
    assert json.loads((tmp_path / "step-00000002" / STATE).read_text())["step"] == 2
    told = json.loads((tmp_path / "step-00000002" / MANIFEST).read_text())
    for name in DATA:
        raw = (tmp_path / "step-00000002" / name).read_bytes()
        digest = hashlib.sha256(raw).hexdigest()
        wanted = {"bytes": len(raw), "sha256": digest}
        if name != STATE:
            wanted["xxh3"] = [xxhash.xxh3_128_hexdigest(raw)]
        assert told["files"][name] == wanted


def test_an_average_keeps_its_own_type_and_its_place_in_memory(tmp_path, alone):
    def conv():
        torch.manual_seed(1)
        model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Conv2d(6, 5, 3)).to(
            memory_format=torch.channels_last
        )
        model[1].bfloat16()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
        return TrainState(model, optimizer, Schedule(optimizer, lambda step: 1.0))

    def step(state):
        generator = torch.Generator().manual_seed(state.step)
        for p in state.model.parameters():
            grad = torch.empty_like(p)
            p.grad = grad.copy_(torch.randn(p.shape, generator=generator))
        state.optimizer.step()
        state.step += 1

    undisturbed, before, after = conv(), conv(), conv()
    for state in (undisturbed, before):
        for _ in range(3):
            step(state)
    made = checkpoints(tmp_path, alone)
    made.save(before)
    made.finish()
    assert checkpoints(tmp_path, alone).restore(after)
    for state in (undisturbed, after):
        for _ in range(3):
            step(state)
    assert same(after, undisturbed)


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "NAdam", "Rprop", "Adagrad", "RMSprop"])
def test_the_size_is_known_before_the_first_step(name):
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Linear(7, 2))
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.1)
    held = len(optimizer.state)
    told = expected_bytes(model, optimizer)
    assert len(optimizer.state) == held, "asking changes nothing"
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    state = TrainState(model, optimizer, Schedule(optimizer, lambda step: 1.0))
    assert told == content_of(state).size_bytes


def test_the_snapshot_does_not_change_while_training_continues(tmp_path, alone):
    state, made, wanted = new_state(), checkpoints(tmp_path, alone, keep=50), {}
    for _ in range(30):
        take_step(state)
        made.save(state)
        wanted[state.step] = content(state)
        for p in state.model.parameters():  # at once, while the writer writes
            p.data.mul_(-3)
            p.data.div_(-3)
            state.optimizer.state[p]["exp_avg"].neg_().neg_()
        state.model.norm.running_mean.add_(1).sub_(1)
    made.finish()
    for step, then in wanted.items():
        shutil.rmtree(tmp_path / "alone", ignore_errors=True)
        shutil.copytree(tmp_path / f"step-{step:08d}", tmp_path / "alone" / f"step-{step:08d}")
        back = new_state(seed=9)
        assert checkpoints(tmp_path / "alone", alone).restore(back)
        assert same(back, then)


def test_a_save_returns_while_the_disk_is_slow_and_the_next_waits(tmp_path, alone):
    # The disk syncs only when it is let: whoever waited for it would stand still here.
    let, state, made = threading.Event(), at_step(1), checkpoints(tmp_path, alone)

    def slow(name, words):
        if name == "fsync":
            assert let.wait(30)

    with watched(slow):
        made.save(state)
        assert steps_in(tmp_path) == []
        assert "save/durable_seconds" not in (told := made.timings())
        assert told["save/stall_seconds"] < 30
        take_step(state)
        later = threading.Thread(target=made.save, args=(state,))
        later.start()
        assert later.is_alive()
        assert steps_in(tmp_path) == []
        let.set()
        later.join(30)
        made.finish()
    assert steps_in(tmp_path) == [1, 2]
    assert made.timings()["save/durable_seconds"] > 0
    assert made.timings() == {}, "each figure once"


def test_the_records_are_on_disk_before_the_checkpoint_is_there(tmp_path, alone):
    class Seen:
        steps = None

        def sync(self):
            self.steps = steps_in(tmp_path)

    seen, made = Seen(), checkpoints(tmp_path, alone)
    made.save(at_step(1), records=[seen])
    made.finish()
    assert seen.steps == []
    assert steps_in(tmp_path) == [1]


def test_everything_is_synced_before_the_name_that_makes_it_count(tmp_path, alone):
    trace = []
    real = os.path.realpath

    def note(name, words):
        at = real(f"/proc/self/fd/{words[0]}") if isinstance(words[0], int) else str(words[0])
        trace.append((name, Path(at).name))

    made = saved(tmp_path, alone, 1, keep=1, asynchronous=False)
    with watched(note):
        made.save(at_step(2))
    published = next(n for n, (name, _) in enumerate(trace) if name == "rename")
    for file in FILES:
        last_write = max(n for n, call in enumerate(trace) if call == ("write", file))
        synced = trace.index(("fsync", file))
        assert last_write < synced < published
    assert max(trace.index(("fsync", f)) for f in DATA) < trace.index(("open", MANIFEST))
    partial = trace[published][1]
    assert trace[published - 1] == ("fsync", partial), "the names in the directory, last of all"
    assert ("fsync", tmp_path.name) in trace[published : published + 4], "then the name itself"
    parent = trace.index(("fsync", tmp_path.name), published)
    assert trace.index(("rename", "step-00000001")) > parent, "only then an older one goes"
    assert all(n > parent for n, (name, _) in enumerate(trace) if name in ("unlink", "rmdir"))


# ---- which stay


def test_the_newest_the_best_and_every_nth_stay(tmp_path, alone):
    made = checkpoints(tmp_path, alone, keep=2, keep_every_steps=5)
    state = new_state()
    for step in range(1, 15):
        take_step(state)
        if step == 3:
            best(state, 0.9)
        if step % 3 == 0 or step == 14:
            made.save(state)
    made.finish()
    # 6 is the first at or after 5, 12 the first at or after 10.
    assert steps_in(tmp_path) == [3, 6, 12, 14]
    assert best_of(tmp_path) == 3
    assert find_checkpoint(tmp_path, "best").step == 3
    assert find_checkpoint(tmp_path, "latest").step == 14
    assert find_checkpoint(tmp_path, "6").step == 6
    with pytest.raises(SpecError, match=r"there is no '7'; known: best, latest, 3, 6, 12, 14"):
        find_checkpoint(tmp_path, "7")


@given(
    steps=st.sets(st.integers(1, 300), min_size=1, max_size=40),
    newest=st.integers(1, 5),
    every=st.none() | st.integers(1, 60),
    data=st.data(),
)
@settings(deadline=None, max_examples=200)
def test_to_prune_as_one_goes_leaves_what_pruning_once_would(steps, newest, every, data):
    best_step = data.draw(st.none() | st.sampled_from(sorted(steps)))
    there = set()
    for step in sorted(steps):
        best_now = {best_step} if best_step is not None and best_step <= step else set()
        there = kept(sorted(there | {step}), newest=newest, every=every, best=best_now)
    assert there <= kept(sorted(steps), newest=newest, every=every, best={best_step})
    assert set(sorted(steps)[-newest:]) <= there
    if every is not None:
        assert {s // every for s in there} - {0} == {s // every for s in steps} - {0}


def test_a_step_that_is_there_is_not_written_again(tmp_path, alone):
    saved(tmp_path, alone, 1, 2)
    before = (tmp_path / "step-00000002" / MODEL).stat().st_mtime_ns
    saved(tmp_path, alone, 2)
    assert (tmp_path / "step-00000002" / MODEL).stat().st_mtime_ns == before


# ---- damage


def damage(path, kind):
    raw = bytearray(path.read_bytes())
    if kind == "empty":
        raw.clear()
    elif kind == "cut":
        del raw[-1]
    elif kind == "longer":
        raw += b"\0"
    elif kind == "missing":
        return path.unlink()
    else:
        at = {"first bit": 0, "middle bit": len(raw) // 2, "last bit": len(raw) - 1}[kind]
        raw[at] ^= 1 << (at % 8)
    return path.write_bytes(raw)


KINDS = ("empty", "cut", "longer", "missing", "first bit", "middle bit", "last bit")


@pytest.mark.parametrize("file", FILES)
def test_any_damage_to_any_file_is_noticed_and_the_one_before_is_used(
    tmp_path, alone, capsys, file
):
    saved(tmp_path / "good", alone, 1, 2)
    for kind in KINDS:
        place = tmp_path / kind.replace(" ", "-")
        shutil.copytree(tmp_path / "good", place)
        damage(place / "step-00000002" / file, kind)
        state = new_state(seed=3)
        assert checkpoints(place, alone).restore(state), kind
        assert same(state, at_step(1)), kind
        assert "step-00000002 is damaged: " in capsys.readouterr().out
        assert steps_in(place) == [1]
        assert len(list(place.glob(".damaged-step-00000002-*"))) == 1, "kept for whoever asks why"


def test_every_bit_of_the_manifest_counts(tmp_path, alone):
    saved(tmp_path, alone, 1)
    checkpoint = Checkpoint(tmp_path / "step-00000001", 1)
    path = checkpoint.path / MANIFEST
    raw = path.read_bytes()
    for bit in range(0, len(raw) * 8, 3):  # every byte, and each of the eight in turn
        flipped = bytearray(raw)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        assert damage_of(checkpoint) is not None, (bit, flipped[bit // 8 - 20 : bit // 8 + 20])
    path.write_bytes(raw)
    assert damage_of(checkpoint) is None


def test_two_damaged_in_a_row_and_then_none(tmp_path, alone, capsys):
    saved(tmp_path, alone, 1, 2, 3)
    damage(tmp_path / "step-00000003" / MODEL, "middle bit")
    damage(tmp_path / "step-00000002" / OPTIMIZER, "cut")
    state = new_state(seed=3)
    assert checkpoints(tmp_path, alone).restore(state)
    assert same(state, at_step(1))
    said = capsys.readouterr().out
    assert said.count("is damaged") == 2
    assert f"the content of {MODEL} has changed" in said
    damage(tmp_path / "step-00000001" / STATE, "empty")
    for _ in range(2):  # and asked again, it is not taken for a new run
        with pytest.raises(NoCheckpoint, match="None of the 1 checkpoints"):
            checkpoints(tmp_path, alone).restore(new_state())
    assert steps_in(tmp_path) == [1]


def test_a_directory_under_another_steps_name_is_not_believed(tmp_path, alone):
    saved(tmp_path, alone, 1)
    shutil.copytree(tmp_path / "step-00000001", tmp_path / "step-00000009")
    assert "not the step in its name" in damage_of(Checkpoint(tmp_path / "step-00000009", 9))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, processes):
    """Twelve steps with a checkpoint every four, and a copy as it stood after eight."""
    place = tmp_path_factory.mktemp("undisturbed")
    spec = spec_of("cut_of_digits", length={"steps": 12}, checkpoint={"every_steps": 4})
    processes(1).run(train_in_process, spec, place, 8)
    shutil.copytree(place, place.with_name("after-8"))
    processes(1).run(train_in_process, spec, place)
    return spec, place, place.with_name("after-8")


@pytest.mark.parametrize(
    ("file", "kind"),
    [(MODEL, "middle bit"), (OPTIMIZER, "cut"), (STATE, "middle bit"), (MANIFEST, "cut")],
)
def test_a_run_with_a_damaged_checkpoint_ends_in_the_same_bits(
    tmp_path, processes, undisturbed, file, kind
):
    spec, whole, after_8 = undisturbed
    shutil.copytree(after_8, tmp_path / "runs")
    damage(tmp_path / "runs/job/checkpoints/step-00000008" / file, kind)
    processes(1).run(train_in_process, spec, tmp_path / "runs")
    for name in (MODEL, OPTIMIZER, STATE):
        ends = [p / "job/checkpoints/step-00000012" / name for p in (whole, tmp_path / "runs")]
        assert ends[0].read_bytes() == ends[1].read_bytes()
    rows = read_metrics(tmp_path / "runs/job/metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 13)), "no gap, no step twice"


def restore_in_process(world, directory):
    state = new_state(seed=world.index)
    made = checkpoints(Path(directory), world)
    try:
        made.restore(state)
    except EvenstepError as error:
        return type(error).__name__, str(error)
    return state.step, same(state, at_step(state.step))


def test_one_process_chooses_and_all_follow(tmp_path, alone, processes):
    saved(tmp_path, alone, 1, 2)
    damage(tmp_path / "step-00000002" / MODEL, "middle bit")
    assert processes(3).run(restore_in_process, tmp_path) == [(1, True)] * 3
    damage(tmp_path / "step-00000001" / MANIFEST, "middle bit")
    told = processes(3).run(restore_in_process, tmp_path)
    assert [kind for kind, _ in told] == ["NoCheckpoint"] * 3
    assert len({text for _, text in told}) == 1


def found_for_a_test(world, directories, which):
    try:
        found = agreed_checkpoint(directories[world.index], which, world)
    except EvenstepError as error:
        return type(error).__name__, str(error)
    return found.path


def test_all_processes_test_the_checkpoint_that_one_chooses(tmp_path, alone, processes):
    """Of a run that trains, another one could find a newer checkpoint."""
    early, late = (tmp_path / name for name in ("early", "late"))
    saved(late, alone, 1, 2)
    shutil.copytree(late / "step-00000001", early / "step-00000001")
    told = processes(2).run(found_for_a_test, (early, late), "latest")
    assert told == [early / "step-00000001", late / "step-00000001"]
    lacks = f"Process 1 finds no checkpoint in {early}/step-00000002, unlike rank 0."
    for kind, text in processes(2).run(found_for_a_test, (late, early), "latest"):
        assert kind == "NoCheckpoint"
        assert lacks in text
    for kind, text in processes(2).run(found_for_a_test, (early, late), "2"):
        assert kind == "SpecError"
        assert "there is no '2'; known: best, latest, 1" in text


def test_none_readable_ends_the_real_command_with_42(tmp_path):
    assert evenstep("run", "digits", "--stop-at", 3, cwd=tmp_path).returncode == 75
    place = tmp_path / "runs/digits/checkpoints"
    damage(place / "step-00000003" / OPTIMIZER, "cut")
    listed = evenstep("checkpoints", "runs/digits", cwd=tmp_path)
    assert listed.returncode == 1
    assert f"damaged: {OPTIMIZER} has" in listed.stdout
    for words in ((), ("--processes", 2)):
        ended = evenstep("run", "digits", *words, cwd=tmp_path)
        assert ended.returncode == 42, ended.stderr
        assert ended.stderr.count("None of the 1 checkpoints in") == 1, ended.stderr
        assert "Traceback" not in ended.stderr


# ---- killed at any operation


OPERATIONS_AT_LEAST = 35


@BOTH
def test_killed_at_any_operation_the_one_before_or_this_one_is_whole(tmp_path, alone, asynchronous):
    saved(tmp_path / "good", alone, 1, 2, keep=2)
    state, after, ends = at_step(3), {}, []
    best(state, 0.5)
    number = 0
    while not ends or ends[-1] != 0:
        number += 1
        place = tmp_path / str(number)
        shutil.copytree(tmp_path / "good", place)
        ends.append(killed_while_saving(place, alone, state, number, asynchronous))
        back = new_state(seed=8)
        assert checkpoints(place, alone).restore(back)
        assert back.step in (2, 3)
        assert same(back, at_step(back.step)), number
        after[number] = back.step
        take_step(back)
        saved(place, alone, 4, keep=2)
        assert steps_in(place)[-1] == 4
        assert not list(place.glob(".*")), "nothing half-written stays"
        shutil.rmtree(place)
    assert len(ends) > OPERATIONS_AT_LEAST
    assert set(ends[:-1]) == {-signal.SIGKILL}
    order = [after[n] for n in sorted(after)]
    assert order == sorted(order), "before the rename the old one, after it the new one"
    assert 2 in order
    assert 3 in order


def killed_while_saving(place, world, state, number, asynchronous):
    """A child that is killed at its operation `number`: how it ended."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            with watched(die_at(number)):
                made = checkpoints(place, world, keep=2, asynchronous=asynchronous)
                made.save(state)
                made.finish()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# ---- what stands in the way


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 192 KiB."""
    with mounted(tmp_path / "disk", "192k") as disk:
        yield disk


@BOTH
def test_a_full_disk_is_reported_and_leaves_the_earlier_ones(small_disk, alone, asynchronous):
    made = saved(small_disk, alone, 1, keep=2, asynchronous=asynchronous)
    free = shutil.disk_usage(small_disk).free
    # Room for the weights alone; then the check beforehand sees it, and then only the write does.
    for left, told in ((4_000, "it needs .* are free"), (20_000, "no space is left there")):
        (small_disk / "filler").write_bytes(b"x" * (free - left))
        with pytest.raises(NotSaved, match=told) as caught:
            save_now(made, at_step(2))
        assert caught.value.exit_code == 42
        assert "Earlier ones are unchanged" in str(caught.value)
        assert sorted(p.name for p in small_disk.iterdir()) == ["filler", "step-00000001"]
        assert damage_of(checkpoints_in(small_disk)[0]) is None
        (small_disk / "filler").unlink()
    made.save(at_step(2))
    made.finish()
    assert steps_in(small_disk) == [1, 2]


def test_a_read_only_disk_is_reported(small_disk, alone):
    saved(small_disk, alone, 1)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(NotSaved, match=r"the file system is read-only\. Earlier"):
        saved(small_disk, alone, 2)
    state = new_state()
    assert checkpoints(small_disk, alone).restore(state), "reading goes on"
    assert state.step == 1


def save_while_the_lead_cannot(world, directory, on_failure, asynchronous):
    """Three saves, of which the lead's disk refuses the second; what each process saw."""
    state, seen = new_state(), []
    made = checkpoints(
        Path(directory), world, on_failure=on_failure, asynchronous=asynchronous, keep=9
    )

    def refuse(name, words):
        if name == "fsync" and "step-00000002" in os.path.realpath(f"/proc/self/fd/{words[0]}"):
            raise OSError(errno.EDQUOT, "Disk quota exceeded")

    try:
        with watched(refuse):
            for _ in range(3):
                take_step(state)
                made.save(state)
                seen.append(state.step)
            made.finish()
    except EvenstepError as error:
        return seen, type(error).__name__, str(error)
    finally:
        made.close()
    return seen, made.timings().get("save/failures"), steps_in(Path(directory))


@BOTH
def test_a_failed_save_fails_on_all_processes_together(tmp_path, processes, asynchronous):
    told = processes(3).run(save_while_the_lead_cannot, tmp_path, "stop", asynchronous)
    assert told[0] == told[1] == told[2]
    seen, kind, text = told[0]
    assert seen == ([1, 2] if asynchronous else [1])
    assert kind == "NotSaved"
    assert "step 2 could not be written" in text
    assert "the disk quota is used up" in text
    assert steps_in(tmp_path) == [1]


@BOTH
def test_the_run_continues_after_a_failed_save_and_counts_it(tmp_path, processes, asynchronous):
    told = processes(3).run(save_while_the_lead_cannot, tmp_path, "go_on", asynchronous)
    assert told == [([1, 2, 3], 1, [1, 3])] * 3


def test_the_last_save_must_succeed_either_way(tmp_path, alone):
    def refuse(name, words):
        if name == "fsync":
            raise OSError(errno.EIO, "Input/output error")

    made = checkpoints(tmp_path, alone, on_failure="go_on")
    with watched(refuse):
        made.save(at_step(1))
        with pytest.raises(EvenstepError, match=r"step 1 could not be .* Input/output") as caught:
            made.finish()
    assert caught.value.exit_code == 1, "elsewhere it may work"


NOT_FINITE = {
    "a weight": lambda state: state.model.scale.data.fill_(torch.nan),
    "an infinite weight": lambda state: state.model.first.weight.data[0, 0, 0, 0].fill_(-torch.inf),
    "half precision": lambda state: state.model.brief.data[2].fill_(torch.inf),
    "a running mean": lambda state: state.model.norm.running_mean[3].fill_(torch.nan),
    "the optimizer": lambda state: state.optimizer.state[state.model.scale]["exp_avg_sq"].fill_(
        torch.inf
    ),
    "a number of the optimizer": lambda state: state.optimizer.state[state.model.scale].update(
        norm=float("inf")
    ),
}


@BOTH
@pytest.mark.parametrize("what", NOT_FINITE)
def test_what_is_not_finite_is_never_saved(tmp_path, alone, what, asynchronous):
    state = at_step(2)
    made = saved(tmp_path, alone, 1, on_failure="go_on", asynchronous=asynchronous)
    NOT_FINITE[what](state)
    with pytest.raises(Diverged, match=r"After step 2, .* is not finite"):
        save_now(made, state)
    assert steps_in(tmp_path) == [1]
    assert sorted(os.listdir(tmp_path)) == ["step-00000001"]


def test_a_run_that_diverges_ends_with_42_and_keeps_what_was_good(tmp_path):
    # The loss of step 1 is finite, and its update is not: it is saved before another loss is seen.
    words = ("run", "digits", "optimizer.lr=1e39", "schedule={name: constant}")
    sparse = ("checkpoint={every_steps: 1, asynchronous: false}", "test={every_steps: 90}")
    ended = evenstep(*words, *sparse, cwd=tmp_path)
    assert ended.returncode == 42, ended.stderr
    assert "is not finite, so the state is not saved" in ended.stderr
    assert not list((tmp_path / "runs/digits/checkpoints").glob("*"))
    assert json.loads((tmp_path / "runs/digits/run.json").read_text())["state"] == "failed"


def test_another_number_of_rows_is_refused(tmp_path, alone):
    saved(tmp_path, alone, 1)
    made = checkpoints(tmp_path, alone)
    made._facts["train_rows"] = 104
    with pytest.raises(SpecError, match="trained on 103 rows, and the data set now has 104"):
        made.restore(new_state())


# ---- hostile input


class Bomb:
    def __reduce__(self):
        return os.mkdir, (os.environ["BOMB"],)


def reseal(directory, edit=lambda manifest: None):
    """Give the manifest the sizes and hashes that the files have now: a forger can."""
    manifest = json.loads((directory / MANIFEST).read_text())
    for name in DATA:
        raw = (directory / name).read_bytes()
        manifest["files"][name] = {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    edit(manifest)
    manifest.pop("sha256")
    manifest["sha256"] = hashlib.sha256(json.dumps(manifest).encode()).hexdigest()
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def with_header(told, data=b""):
    text = told if isinstance(told, bytes) else json.dumps(told).encode()
    return len(text).to_bytes(8, "little") + text + data


def replaced(name, raw):
    def attack(directory):
        (directory / name).write_bytes(raw(directory) if callable(raw) else raw)
        reseal(directory)

    return attack


def manifest_with(edit):
    return lambda directory: reseal(directory, edit)


def link(directory):
    outside = directory.parent.parent / "outside"
    shutil.move(directory / MODEL, outside)
    (directory / MODEL).symlink_to(outside)


def link_as_a_whole(directory):
    shutil.move(directory, directory.parent.parent / "elsewhere")
    directory.symlink_to(directory.parent.parent / "elsewhere")


def pipe(directory):
    (directory / STATE).unlink()
    os.mkfifo(directory / STATE)


def escaping(manifest):
    manifest["files"]["../../outside"] = manifest["files"].pop(MODEL)


def one(begin, end, shape=(1,), dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


ATTACKS = {
    "a pickle in place of tensors": (
        replaced(MODEL, lambda _: pickle.dumps(Bomb())),
        "not in safetensors",
    ),
    "a torch file in place of tensors": (
        lambda d: (torch.save({"a": Bomb()}, d / OPTIMIZER), reseal(d)),
        "not in safetensors",
    ),
    "a pickle in place of JSON": (replaced(STATE, lambda _: pickle.dumps(Bomb())), "not in JSON"),
    "a manifest that points outside": (manifest_with(escaping), "names the files"),
    "a file too many": (
        lambda d: (d / "extra.pkl").write_bytes(b"x"),
        "contains files that do not belong to a checkpoint: 'extra.pkl'",
    ),
    "a link to a file": (link, "is not a regular file"),
    "a link to a directory": (link_as_a_whole, "it is not a directory"),
    "a pipe": (pipe, "is not a regular file"),
    "a huge header": (
        replaced(MODEL, (1 << 62).to_bytes(8, "little") + b"{}"),
        f"its header would be {1 << 62} bytes",
    ),
    "a header without data": (
        replaced(MODEL, with_header({"a": one(0, 1 << 40, [1 << 38])})),
        "according to its header",
    ),
    "tensors that share bytes": (
        replaced(MODEL, with_header({"a": one(0, 4), "b": one(0, 4)}, b"1234")),
        "not at their position",
    ),
    "a tensor of another size": (
        replaced(MODEL, with_header({"a": one(0, 4, [2])}, b"1234")),
        "not at their position",
    ),
    "a negative shape": (
        replaced(MODEL, with_header({"a": one(0, 4, [-1])}, b"1234")),
        "is not a tensor",
    ),
    "a type nobody knows": (
        replaced(MODEL, with_header({"a": one(0, 4, [1], "OBJ")}, b"1234")),
        "is not a tensor",
    ),
    "a name that stands there twice": (
        replaced(MODEL, with_header(b'{"a":%b,"a":%b}' % ((json.dumps(one(0, 4)).encode(),) * 2))),
        "occurs twice",
    ),
    "a header that is deep": (
        replaced(MODEL, with_header(b'{"a":' * 100_000 + b"1" + b"}" * 100_000)),
        "RecursionError",
    ),
    "a state that is deep": (replaced(STATE, b"[" * 1_000_000), "RecursionError"),
    "a state of another step": (replaced(STATE, b'{"step": 7}'), "is 7"),
    "a state without its sections": (replaced(STATE, b'{"step": 2}'), "lacks its sections"),
    "a state that is a list": (replaced(STATE, b"[]"), "is not a JSON object"),
    "a huge manifest": (
        lambda d: (d / MANIFEST).write_bytes(b" " * (1 << 25)),
        "more than possible",
    ),
    "a manifest that is deep": (
        lambda d: (d / MANIFEST).write_bytes(b"[" * 1_000_000),
        "RecursionError",
    ),
    "sizes not as told": (
        manifest_with(lambda m: m["files"][STATE].update(bytes=3)),
        "bytes instead of 3",
    ),
    "another format": (manifest_with(lambda m: m.update(format=99)), "its format is 99"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_forged_checkpoint_is_refused_and_nothing_is_executed(
    tmp_path, alone, monkeypatch, attack
):
    monkeypatch.setenv("BOMB", str(tmp_path / "executed"))
    injure, told = ATTACKS[attack]
    saved(tmp_path / "all", alone, 1, 2)
    injure(tmp_path / "all/step-00000002")
    assert told in damage_of(Checkpoint(tmp_path / "all/step-00000002", 2))
    state = new_state(seed=3)
    assert checkpoints(tmp_path / "all", alone).restore(state)
    assert same(state, at_step(1))
    assert not (tmp_path / "executed").exists()


def test_a_link_in_place_of_a_leftover_leads_nowhere(tmp_path, alone):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/file").write_text("mine")
    (tmp_path / "all").mkdir()
    (tmp_path / "all/.step-00000001.partial-abc").symlink_to(tmp_path / "precious")
    (tmp_path / "all/.best.partial").symlink_to(tmp_path / "precious/file")
    made = checkpoints(tmp_path / "all", alone)
    made.save(best(at_step(1), 0.5))
    made.finish()
    assert (tmp_path / "precious/file").read_text() == "mine"
    assert sorted(os.listdir(tmp_path / "all")) == ["best", "step-00000001"]


def test_weights_of_another_model_are_refused(tmp_path, alone):
    saved(tmp_path, alone, 1)
    place = tmp_path / "step-00000001"
    weights = load_file(place / MODEL)
    save_file({**weights, "scale": torch.zeros(2)}, place / MODEL)
    reseal(place)
    with pytest.raises(SpecError, match=r"belongs to another model: scale \(2,\) instead of \(\)"):
        checkpoints(tmp_path, alone).restore(new_state())


# ---- looked at and taken out


@pytest.fixture(scope="module")
def run_of_20(tmp_path_factory):
    place = tmp_path_factory.mktemp("run")
    ended = evenstep("run", "digits", "--stop-at", 20, cwd=place)
    assert ended.returncode == 75, ended.stderr
    assert "Checkpoints: 169 KiB each on disk" in ended.stdout
    return place / "runs/digits"


def test_the_list_says_what_there_is_and_that_it_is_good(run_of_20, tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    listed = evenstep("checkpoints", run_of_20, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert listed.returncode == 0, listed.stderr
    lines = listed.stdout.splitlines()
    assert lines == sorted(lines)
    at = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ"
    assert re.fullmatch(rf"step +20  {at} +17\d KiB  1 process  good(, best)?", lines[-1])
    assert sum(line.endswith("good, best") for line in lines) == 1


def test_what_is_exported_is_what_was_saved(run_of_20, tmp_path):
    done = evenstep("export", run_of_20, "-o", "w.safetensors", "--checkpoint", 20, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "the weights after step 20" in done.stdout
    exported = load_file(tmp_path / "w.safetensors")
    stored = load_file(run_of_20 / "checkpoints/step-00000020" / MODEL)
    assert exported.keys() == stored.keys()
    assert all(torch.equal(exported[name], stored[name]) for name in stored)
    best_one = evenstep(
        "export", run_of_20, "-o", "b.safetensors", "--checkpoint=best", cwd=tmp_path
    )
    assert best_one.returncode == 0, best_one.stderr


def test_tied_weights_are_exported_under_both_names(tmp_path, alone):
    saved(tmp_path, alone, 2)
    export_weights(find_checkpoint(tmp_path, "latest"), tmp_path / "w.safetensors")
    model = new_state(seed=4).model
    model.load_state_dict(load_file(tmp_path / "w.safetensors"))
    assert all(
        torch.equal(tensor, at_step(2).model.state_dict()[name])
        for name, tensor in model.state_dict().items()
    )


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["-o", "there.safetensors"], "there.safetensors exists"),
        (["-o", "w.pt"], "must end in .safetensors"),
        (["-o", "w"], "a directory is for a transformers model, and the model of"),
        (["-o", "no/w.safetensors"], "cannot be written: No such file"),
        (["-o", "w.safetensors", "--checkpoint", "7"], "there is no '7'; known: best, latest"),
        (["-o", "w.safetensors", "--checkpoint", "../step-00000020"], "there is no '../step"),
    ],
)
def test_an_impossible_export_is_reported(run_of_20, tmp_path, words, told):
    (tmp_path / "there.safetensors").write_text("mine")
    ended = evenstep("export", run_of_20, *words, cwd=tmp_path)
    assert ended.returncode == 64, ended.stderr
    assert told in ended.stderr
    assert os.listdir(tmp_path) == ["there.safetensors"]
    assert (tmp_path / "there.safetensors").read_text() == "mine"


def test_the_moving_average_is_saved_verified_and_exported(processes, alone, tmp_path):
    spec = spec_of(
        "cut_of_digits",
        length={"steps": 3},
        model={"batchnorm": "micro", "moving_average": 0.9},
    )
    processes(1).run(train_in_process, spec, tmp_path)
    found = find_checkpoint(tmp_path / "job/checkpoints", "latest")
    export_weights(found, tmp_path / "a.safetensors", average=True)
    export_weights(found, tmp_path / "w.safetensors")
    averaged, latest = (load_file(tmp_path / f"{name}.safetensors") for name in "aw")
    assert averaged.keys() == latest.keys()
    assert any(not torch.equal(averaged[name], latest[name]) for name in latest)
    stored = load_file(found.path / AVERAGE)
    assert all(torch.equal(averaged[name], tensor) for name, tensor in stored.items())
    damage(found.path / AVERAGE, "middle bit")
    assert damage_of(found) == f"the content of {AVERAGE} has changed"
    (found.path / AVERAGE).unlink()
    assert "No such file" in damage_of(found)
    saved(tmp_path / "without", alone, 1)
    with pytest.raises(SpecError, match="has no moving average"):
        export_weights(
            find_checkpoint(tmp_path / "without", "1"), tmp_path / "b.safetensors", average=True
        )


# ---- storage that misbehaves


def held_open(name, words):
    """As an NFS client answers while another process has a file of a removed checkpoint open."""
    if name == "unlink" and Path(words[0]).name == MODEL:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), words[0])


def test_an_old_checkpoint_that_somebody_reads_fails_neither_a_save_nor_a_restart(tmp_path, alone):
    with watched(held_open):
        made = saved(tmp_path, alone, 1, 2, 3, keep=2)
        assert steps_in(tmp_path) == [2, 3]
        assert len(list(tmp_path.glob(".step-00000001.removed-*"))) == 1
        assert made.restore(new_state())
    assert made.restore(new_state())
    assert not list(tmp_path.glob(".*")), "removed as soon as nobody reads it"


def test_an_old_checkpoint_that_cannot_be_removed_fails_no_save(tmp_path, alone, capsys):
    def refused(name, words):
        if name == "rename" and "step-00000001.removed" in str(words[1]):
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    with watched(refused):
        saved(tmp_path, alone, 1, 2, 3, keep=2)
    assert steps_in(tmp_path) == [1, 2, 3]
    told = f"WARNING: {tmp_path / 'step-00000001'} could not be removed: this user has no"
    assert told in capsys.readouterr().out


def test_storage_that_does_not_answer_is_not_damage(tmp_path, alone, monkeypatch):
    saved(tmp_path, alone, 1, 2)
    newest = checkpoints_in(tmp_path)[-1]
    read = service.runs.checkpoint_files.sha256_of
    left = [1]

    def broken(path, *span):
        if left and path.name == MODEL:
            left.pop()
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return read(path, *span)

    monkeypatch.setattr(service.runs.checkpoint_files, "sha256_of", broken)
    assert damage_of(newest) is None, "one request without an answer, on NFS mounted soft"
    left[:] = [1, 1]
    assert "Input/output error" in damage_of(newest), "a disk that is broken"


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOTCONN, errno.EHOSTDOWN])
def test_storage_that_does_not_answer_is_no_mistake_of_the_user(tmp_path, alone, code, monkeypatch):
    def broken(directory):
        raise OSError(code, os.strerror(code), str(directory))

    saved(tmp_path, alone, 1)
    monkeypatch.setattr(service.checkpoints.checkpoints, "checkpoints_in", broken)
    with pytest.raises(EvenstepError, match="cannot be used") as told:
        checkpoints(tmp_path, alone).restore(new_state())
    assert told.value.exit_code == 1, "so that it is started again"


def restore_elsewhere(world, directory):
    """Rank 1 looks at another directory, which is not the same storage."""
    place = Path(directory, "other" if world.index else "shared")
    return restore_in_process(world, place)


def test_a_process_that_does_not_find_the_checkpoint_says_that_storage_is_not_shared(
    tmp_path, alone, processes
):
    saved(tmp_path / "shared", alone, 1)
    (tmp_path / "other").mkdir()
    for kind, told in processes(2).run(restore_elsewhere, tmp_path):
        assert kind == "NoCheckpoint"
        assert "Process 1 finds no checkpoint in" in told
        assert "Give all processes the same storage." in told


def test_memory_that_was_short_at_the_start_fails_no_later_save(tmp_path, alone):
    made = checkpoints(tmp_path, alone)
    made.reserve(2**60)
    save_now(made, at_step(1))
    save_now(made, at_step(2))
    assert steps_in(tmp_path) == [1, 2]
