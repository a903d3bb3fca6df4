"""A save that the processes of a node share: the same bytes, whole or absent, whoever is struck."""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import sys
import threading
from datetime import timedelta
from itertools import accumulate, pairwise
from pathlib import Path

import pytest
import torch
import xxhash
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st
from processes import Processes, ProcessesFailed
from safetensors.torch import load_file
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

import service.checkpoints.checkpoints
import service.runs.checkpoint_files
from service.basics.errors import EvenstepError, NoCheckpoint
from service.basics.limits import Limits
from service.basics.multipart import PART_BYTES, Part, digest_of, parts_of, shared_out, write_pieces
from service.checkpoints.snapshots import content_of
from service.distributed.world import World
from service.runs.checkpoint_files import (
    DATA,
    MANIFEST,
    MODEL,
    OPTIMIZER,
    STATE,
    Checkpoint,
    Share,
    checkpoints_in,
    damage_of,
)

PART = 256  # bytes: a part of a few rows; the state has some 5 KiB
BOTH = pytest.mark.parametrize("asynchronous", [True, False], ids=["asynchronous", "blocking"])


def files_of(directory, step):
    place = Path(directory) / f"step-{step:08d}"
    return {name: (place / name).read_bytes() for name in DATA}


def manifest_of(directory, step):
    return json.loads((Path(directory) / f"step-{step:08d}" / MANIFEST).read_text())


# ---- who writes what


def save_and_tell(world, directory, asynchronous, part_bytes):
    """Saves of two steps; the files of tensors that this process opened to write, by step."""
    opened = []

    def note(name, words):
        if name == "open" and words[1] & os.O_CREAT:
            opened.append(Path(words[0]).name)

    made = checkpoints(
        Path(directory), world, part_bytes=part_bytes, asynchronous=asynchronous, keep=9
    )
    state = new_state()
    with watched(note):
        for _ in range(2):
            take_step(state)
            made.save(state)
        made.finish()
        made.close()
    return opened


@BOTH
def test_the_bytes_do_not_depend_on_who_writes_them(tmp_path, alone, processes, asynchronous):
    saved(tmp_path / "whole", alone, 1, 2, keep=9)
    for count in (1, 2, 3, 4):
        place = tmp_path / str(count)
        told = processes(count).run(save_and_tell, place, asynchronous, PART)
        for step in (1, 2):
            assert files_of(place, step) == files_of(tmp_path / "whole", step), count
        assert all(opened for opened in told), "each process has written"
        if count > 1:
            assert all(MANIFEST not in opened for opened in told[1:])
        assert (
            len({json.dumps(manifest_of(tmp_path / str(n), 2)["files"]) for n in (1, count)}) == 1
        )
        assert not list(place.glob(".*"))
        state = new_state(seed=4)
        assert checkpoints(place, alone).restore(state)
        assert same(state, at_step(2))


@pytest.mark.parametrize(
    ("cores", "training", "asynchronous", "streams"),
    [(2, 2, False, 2), (1, 1, False, 1), (2, 1, True, 1), (3, 1, True, 2), (8, 8, True, 1)],
)
def test_a_single_process_writes_two_shares_at_a_time_if_a_core_is_free(
    tmp_path, alone, monkeypatch, cores, training, asynchronous, streams
):
    monkeypatch.setattr(
        service.checkpoints.checkpoints, "limits", lambda: Limits(cores, None, None)
    )
    monkeypatch.setattr(torch, "get_num_threads", lambda: training)
    threads = set()

    def note(name, words):
        if name == "open" and Path(words[0]).name in (MODEL, OPTIMIZER):
            threads.add(threading.current_thread())

    with watched(note):
        saved(tmp_path, alone, 1, part_bytes=PART, asynchronous=asynchronous)
    assert len(threads) == streams
    assert damage_of(Checkpoint(tmp_path / "step-00000001", 1)) is None


def test_a_small_state_is_left_to_the_lead(tmp_path, processes):
    told = processes(3).run(save_and_tell, tmp_path, True, 1000)  # some five parts
    assert told[1:] == [[], []]
    assert MANIFEST in told[0]


def test_there_may_be_fewer_parts_than_processes(tmp_path, alone, processes):
    told = processes(4).run(save_and_tell, tmp_path, True, 504)
    assert [bool(opened) for opened in told] == [True, True, False, False]
    assert damage_of(Checkpoint(tmp_path / "step-00000002", 2)) is None
    state = new_state(seed=4)
    assert checkpoints(tmp_path, alone).restore(state)
    assert same(state, at_step(2))


def test_what_another_number_of_processes_wrote_is_gone_on_from(tmp_path, processes):
    processes(3).run(save_and_tell, tmp_path, True, PART)
    assert processes(2).run(go_on, tmp_path) == [True, True]


def go_on(world, directory):
    state = new_state(seed=world.index)
    assert checkpoints(Path(directory), world, part_bytes=PART).restore(state)
    take_step(state)
    return same(state, at_step(3))


def save_what_a_task_changed(world, directory):
    """The buffers of each process hold what it alone has seen."""
    state = at_step(1)
    for buffer in state.model.buffers():
        if buffer.is_floating_point():
            buffer += 10 * world.index
    made = checkpoints(Path(directory), world, part_bytes=8)
    made.save(state)
    made.finish()
    made.close()


def test_buffers_are_those_of_the_first_process(tmp_path, alone, processes):
    processes(3).run(save_what_a_task_changed, tmp_path)
    saved(tmp_path / "alone", alone, 1)
    assert files_of(tmp_path, 1) == files_of(tmp_path / "alone", 1)


def state_with_long_buffers(index):
    """No optimizer state; between parameters, buffers of more than a part, each process its own."""
    state = new_state()
    state.model.more = torch.nn.Parameter(torch.ones(1000))
    state.model.after = torch.nn.Parameter(torch.ones(1000, dtype=torch.bfloat16))
    state.optimizer = torch.optim.SGD(state.model.parameters(), lr=0.1)
    for number in range(3):
        seen = torch.full((150,), float(number + 10 * index))
        state.model.register_buffer(f"seen_{number}", seen)
    return state


def save_long_buffers(world, directory):
    made = checkpoints(Path(directory), world, part_bytes=PART)
    made.save(state_with_long_buffers(world.index))
    made.finish()
    made.close()


def test_buffers_of_several_parts_are_those_of_the_first_process_too(tmp_path, alone, processes):
    processes(4).run(save_long_buffers, tmp_path / "4")
    save_long_buffers(alone, tmp_path / "1")
    assert files_of(tmp_path / "4", 0) == files_of(tmp_path / "1", 0)


def save_a_step_twice(world, directory):
    made = checkpoints(Path(directory), world, part_bytes=PART)
    for _ in range(2):
        made.save(at_step(1))
    made.finish()
    made.close()


def test_an_existing_checkpoint_is_not_written_again(tmp_path, processes):
    processes(3).run(save_a_step_twice, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def odd_state():
    """Numbers that do not lie in a row in memory, of many types, each as large as a few parts."""
    torch.manual_seed(5)
    state, row = new_state(), torch.randn(4000)
    for name, tensor in {
        "every_second": row[::2],
        "repeated": row[:1].expand(1000),
        "column": row.view(-1, 4)[:, :1],
        "turned": row.view(40, 100).t(),
        "channels_last": row.view(4, 5, 10, 20).to(memory_format=torch.channels_last),
        "every_third_sign": (row > 0)[::3],
        "eighths": row.to(torch.float8_e5m2)[::2],
        "waves": torch.view_as_complex(row.view(-1, 2)),
    }.items():
        state.model.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))
        state.model.get_parameter(name).data = tensor
    return state


def save_odd(world, directory, asynchronous):
    made = checkpoints(Path(directory), world, part_bytes=PART, asynchronous=asynchronous)
    made.save(odd_state())
    made.finish()
    made.close()


@BOTH
def test_numbers_that_do_not_lie_in_a_row_are_saved_as_if_they_did(
    tmp_path, alone, processes, asynchronous
):
    processes(3).run(save_odd, tmp_path / "3", asynchronous)
    save_odd(alone, tmp_path / "1", asynchronous)
    assert files_of(tmp_path / "3", 0) == files_of(tmp_path / "1", 0)
    found = load_file(tmp_path / "3" / "step-00000000" / MODEL)
    wanted = odd_state().model.state_dict()
    for name, tensor in found.items():
        assert tensor.dtype == wanted[name].dtype
        wide = torch.complex128 if tensor.is_complex() else torch.float64
        assert torch.equal(tensor.to(wide), wanted[name].to(wide)), name


def reserved_bytes(world, directory, size_bytes):
    made = checkpoints(Path(directory), world)
    made.reserve(size_bytes)
    made.close()
    return made._snapshot._buffer.numel()


def test_no_process_takes_more_memory_than_the_whole_state_needs(tmp_path, alone, processes):
    size = 8 * PART_BYTES
    most = reserved_bytes(alone, tmp_path, size)
    told = processes(3).run(reserved_bytes, tmp_path, size)
    assert size / 2 < told[0] < most
    assert told == [told[0], told[0], 0], "two shares of four parts each"


def test_what_is_no_tensor_is_of_its_moment_too():
    state = at_step(1)
    state.untested = {"test/loss": 1.0}
    held = content_of(state).rest
    state.untested["test/loss"] = 2.0
    assert held["untested"] == {"test/loss": 1.0}


def save_while_going_on(world, directory):
    state, wanted = new_state(), {}
    made = checkpoints(Path(directory), world, part_bytes=PART, keep=50)
    for _ in range(12):
        take_step(state)
        made.save(state)
        wanted[state.step] = content(state)
        for p in state.model.parameters():  # at once, while the writers write
            p.data.mul_(-3)
            p.data.div_(-3)
            state.optimizer.state[p]["exp_avg"].neg_().neg_()
    made.finish()
    made.close()
    return wanted


def test_the_snapshot_is_of_its_moment_on_every_process(tmp_path, alone, processes):
    for step, then in processes(2).run(save_while_going_on, tmp_path)[0].items():
        (tmp_path / "one").mkdir()
        (tmp_path / f"step-{step:08d}").rename(tmp_path / "one" / f"step-{step:08d}")
        back = new_state(seed=9)
        assert checkpoints(tmp_path / "one", alone).restore(back)
        assert same(back, then)
        (tmp_path / "one").rename(tmp_path / f"seen-{step}")


@given(sizes=st.lists(st.integers(1, 40), max_size=9), shares=st.integers(1, 12), data=st.data())
def test_every_part_is_in_one_share_and_the_shares_are_even(sizes, shares, data):
    parts = [part for n, size in enumerate(sizes) for part in parts_of(f"{n:02d}", size, 8)]
    assert sum(part.end - part.begin for part in parts) == sum(sizes)
    first = set(data.draw(st.lists(st.sampled_from(parts)))) if parts else set()
    cut = shared_out(parts, shares, first=first)
    assert len(cut) == shares
    assert sorted(part for share in cut for part in share) == parts
    assert first <= cut[0]
    even = -(-len(parts) // shares)
    assert len(cut[0]) <= max(even, len(first))
    assert all(len(share) <= even for share in cut[1:])


def test_the_hash_of_a_file_in_parts_is_that_of_its_parts_hashes(tmp_path, alone):
    saved(tmp_path, alone, 1, part_bytes=PART)
    told = manifest_of(tmp_path, 1)
    assert told["part_bytes"] == PART
    for name, raw in files_of(tmp_path, 1).items():
        cut = [raw[at : at + PART] for at in range(0, len(raw), PART)]
        if name == STATE:  # is never cut
            assert told["files"][name] == {
                "bytes": len(raw),
                "sha256": hashlib.sha256(raw).hexdigest(),
            }
            continue
        digests = [hashlib.sha256(part) for part in cut]
        whole = hashlib.sha256(b"".join(d.digest() for d in digests)).hexdigest()
        assert told["files"][name]["sha256"] == whole
        assert told["files"][name]["parts"] == [d.hexdigest() for d in digests]


def test_a_changed_bit_of_any_part_is_noticed(tmp_path, alone):
    saved(tmp_path, alone, 1, part_bytes=PART)
    found = Checkpoint(tmp_path / "step-00000001", 1)
    for name, raw in files_of(tmp_path, 1).items():
        for at in range(PART // 3, len(raw), PART):
            changed = bytearray(raw)
            changed[at] ^= 1 << at % 8
            (found.path / name).write_bytes(changed)
            assert damage_of(found) == f"the content of {name} has changed"
        (found.path / name).write_bytes(raw)
    assert damage_of(found) is None


# ---- who verifies what


def restored_by_all(world, directory, struck):
    """What came of a restore, and the parts that this process has hashed.

    `struck` is the process for which the files of tensors cannot be read.
    """
    hashed = []

    def noting(hash_of):
        def note(path, begin, end):
            if world.index == struck and path.name == MODEL:
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
            hashed.append((path.name, begin, end))
            return hash_of(path, begin, end)

        return note

    state = new_state(seed=world.index)
    files = service.runs.checkpoint_files
    before = files.sha256_of, files.xxh3_of  # of state.json, and of the tensors
    files.sha256_of, files.xxh3_of = map(noting, before)
    try:
        checkpoints(Path(directory), world, part_bytes=PART).restore(state)
    except EvenstepError as error:
        return type(error).__name__, str(error), hashed
    finally:
        files.sha256_of, files.xxh3_of = before
    return state.step, same(state, at_step(state.step)), hashed


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_each_part_is_verified_by_one_of_the_processes(tmp_path, alone, processes, count):
    saved(tmp_path, alone, 1, part_bytes=PART)
    told = processes(count).run(restored_by_all, tmp_path, None)
    assert [each[:2] for each in told] == [(1, True)] * count
    hashed = [Part(*part) for each in told for part in each[2]]
    every = [p for name, raw in files_of(tmp_path, 1).items() for p in _parts(name, len(raw))]
    assert sorted(hashed) == sorted(every)
    sizes = [sum(end - begin for _, begin, end in each[2]) for each in told]
    assert max(sizes) - min(sizes) <= 2 * max(PART, len(files_of(tmp_path, 1)[STATE]))


def _parts(name, size):
    return parts_of(name, size, size if name == STATE else PART)


def test_whoever_finds_a_changed_bit_all_use_the_checkpoint_before(tmp_path, alone, processes):
    saved(tmp_path / "good", alone, 1, 2, part_bytes=PART)
    found = tmp_path / "good/step-00000002"
    places = [(name, at) for name in DATA for at in range(99, (found / name).stat().st_size, 700)]
    finders = set()
    for number, (name, at) in enumerate(places):
        place = tmp_path / str(number)
        shutil.copytree(tmp_path / "good", place)
        changed = bytearray((place / found.name / name).read_bytes())
        changed[at] ^= 1 << at % 8
        (place / found.name / name).write_bytes(changed)
        told = processes(3).run(restored_by_all, place, None)
        assert [each[:2] for each in told] == [(1, True)] * 3, (name, at)
        part = next(p for p in _parts(name, len(changed)) if p.begin <= at < p.end)
        finders |= {rank for rank, each in enumerate(told) if tuple(part) in each[2]}
        assert len(list(place.glob(".damaged-step-00000002-*"))) == 1
    assert finders == {0, 1, 2}


def test_storage_that_fails_one_process_fails_all_and_damages_nothing(tmp_path, alone, processes):
    saved(tmp_path, alone, 1, 2, part_bytes=PART)
    told = processes(3).run(restored_by_all, tmp_path, 1)
    assert {each[0] for each in told} == {"EvenstepError"}
    assert all("cannot be used: Stale file handle" in each[1] for each in told)
    assert [each.step for each in checkpoints_in(tmp_path)] == [1, 2]


@given(
    st.lists(st.integers(0, 40), max_size=30),
    st.integers(1, 6),
)
def test_shares_of_a_verification_are_adjacent_and_contain_each_part_once(sizes, processes):
    ends = list(accumulate(sizes, initial=0))
    parts = [(Part("f", a, b), n) for n, (a, b) in enumerate(pairwise(ends))]
    shares = [Share(index, processes).of(parts) for index in range(processes)]
    assert [pair for share in shares for pair in share] == parts
    most = max((sum(p.end - p.begin for p, _ in share) for share in shares), default=0)
    assert most <= sum(sizes) / processes + max(sizes, default=0)


def forged(directory, edit):
    """The manifest, changed, with its own hash set right."""
    manifest = manifest_of(directory, 1)
    edit(manifest, manifest["files"][OPTIMIZER])
    manifest.pop("sha256")
    manifest["sha256"] = hashlib.sha256(json.dumps(manifest).encode()).hexdigest()
    path = Path(directory) / "step-00000001" / MANIFEST
    path.write_text(json.dumps(manifest, indent=1) + "\n")
    return damage_of(Checkpoint(path.parent, 1))


FORGERIES = {
    "no size of a part": (lambda m, _: m.pop("part_bytes"), "does not list the parts"),
    "parts of no bytes": (lambda m, _: m.update(part_bytes=0), "does not list the parts"),
    "parts of half a byte": (lambda m, _: m.update(part_bytes=0.5), "does not list the parts"),
    "parts of one byte": (lambda m, _: m.update(part_bytes=1), "lists"),
    "a part too few": (lambda _, f: f["parts"].pop(), "lists"),
    "parts by name": (
        lambda _, f: f.update(parts={"0": f["parts"][0]}),
        "does not list the parts",
    ),
    "no part at all": (lambda _, f: f.update(parts=[]), "lists 0 parts"),
    "no part of an empty file": (
        lambda _, f: f.update(bytes=0, parts=[], sha256=hashlib.sha256(b"").hexdigest()),
        "lists 0 parts",
    ),
    "a part without a hash": (lambda _, f: f["parts"].__setitem__(3, None), "has two hashes"),
    "a hash that is none": (lambda _, f: f["parts"].__setitem__(3, "zz"), "has two hashes"),
    "parts in another order": (lambda _, f: f["parts"].reverse(), "has two hashes"),
    "the hash of the whole file": (
        lambda _, f: f.update(sha256=hashlib.sha256(b"").hexdigest()),
        "has two hashes",
    ),
    "parts of another content": (
        lambda _, f: f.update(parts=f["parts"][::-1], sha256=digest_of(f["parts"][::-1])),
        f"the content of {OPTIMIZER} has changed",
    ),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_manifest_that_lies_about_parts_is_refused(tmp_path, alone, forgery):
    edit, told = FORGERIES[forgery]
    saved(tmp_path, alone, 1, part_bytes=PART)
    if "empty" in forgery:
        (tmp_path / "step-00000001" / OPTIMIZER).write_bytes(b"")
    assert told in forged(tmp_path, edit)


def test_a_checkpoint_of_the_first_format_is_gone_on_from(tmp_path, alone):
    def as_before(manifest, _):
        manifest["format"] = 1
        del manifest["part_bytes"]
        for name, raw in files_of(tmp_path, 1).items():
            sha256 = hashlib.sha256(raw).hexdigest()
            manifest["files"][name] = {"bytes": len(raw), "sha256": sha256}

    saved(tmp_path, alone, 1, part_bytes=PART)
    assert forged(tmp_path, as_before) is None
    state = new_state(seed=3)
    assert checkpoints(tmp_path, alone).restore(state)
    assert same(state, at_step(1))
    checkpoint = Checkpoint(tmp_path / "step-00000001", 1)
    assert damage_of(checkpoint, quick=True) is None
    with (checkpoint.path / OPTIMIZER).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")
    assert damage_of(checkpoint, quick=True) == f"the content of {OPTIMIZER} has changed"


@pytest.mark.parametrize("part_bytes", [PART, 1 << 20], ids=["parts", "whole"])
def test_two_hashes_are_written_and_one_of_them_is_compared(tmp_path, alone, part_bytes):
    saved(tmp_path, alone, 1, part_bytes=part_bytes)
    files = manifest_of(tmp_path, 1)["files"]
    for name in DATA:
        if name == STATE:
            assert "xxh3" not in files[name]
            continue
        raw = (tmp_path / "step-00000001" / name).read_bytes()
        parts = [raw[part.begin : part.end] for part in parts_of(name, len(raw), part_bytes)]
        assert files[name]["xxh3"] == [xxhash.xxh3_128_hexdigest(part) for part in parts]

    for key, by_quick, by_full in (("sha256", False, True), ("xxh3", True, False)):
        saved(tmp_path / key, alone, 1, part_bytes=1 << 20)

        def forge(manifest, told, key=key):
            told[key] = "0" * 64 if key == "sha256" else ["0" * 32]

        found = forged(tmp_path / key, forge)
        assert (found is not None) == by_full
        quick = damage_of(Checkpoint(tmp_path / key / "step-00000001", 1), quick=True)
        assert (quick is not None) == by_quick
        resumed = checkpoints(tmp_path / key, alone)
        if by_quick:
            with pytest.raises(NoCheckpoint):
                resumed.restore(new_state(seed=3))
        else:
            assert resumed.restore(new_state(seed=3))


def save_on_two_nodes(world, directory, first):
    """Of three processes the first so many are on the lead's node."""
    os.environ["LOCAL_WORLD_SIZE"] = str(first if world.index < first else 3 - first)
    try:
        return save_and_tell(World(Accelerator(cpu=True)), directory, True, PART)
    finally:
        os.environ["LOCAL_WORLD_SIZE"] = "3"


@pytest.mark.parametrize("first", [1, 2])
def test_the_processes_of_other_nodes_write_nothing(tmp_path, alone, processes, first):
    told = processes(3).run(save_on_two_nodes, tmp_path, first)
    assert [bool(opened) for opened in told] == [True, first == 2, False]
    saved(tmp_path / "alone", alone, 1, 2)
    assert files_of(tmp_path, 2) == files_of(tmp_path / "alone", 2)


# ---- who can not


def save_while_one_cannot(world, directory, who, on_failure, asynchronous, injury):
    """Three saves, of which that process cannot write the second; what each process saw."""
    state, seen = new_state(), []
    made = checkpoints(
        Path(directory),
        world,
        part_bytes=PART,
        on_failure=on_failure,
        asynchronous=asynchronous,
        keep=9,
    )

    def refuse(name, words):
        at = os.path.realpath(f"/proc/self/fd/{words[0]}") if name == injury else ""
        if world.index == who and "step-00000002" in at:
            raise OSError(errno.ENOSPC, "No space left on device")

    try:
        with watched(refuse):
            for _ in range(3):
                take_step(state)
                if injury == "nan" and world.index == who and state.step == 2:
                    state.optimizer.state[state.model.brief]["exp_avg_sq"].fill_(torch.nan)
                if injury == "nan first" and world.index == who and state.step == 2:
                    state.model.first.weight.data.fill_(torch.nan)
                if injury == "more" and world.index == who and state.step == 2:
                    state.model.register_buffer("more", torch.zeros(3))
                made.save(state)
                seen.append(state.step)
            made.finish()
    except EvenstepError as error:
        return seen, type(error).__name__, str(error)
    finally:
        made.close()
    left = sorted(p.name for p in Path(directory).iterdir() if p.name[:1] == ".")
    return seen, made.timings().get("save/failures"), left


@BOTH
@pytest.mark.parametrize("who", [0, 1, 2])
@pytest.mark.parametrize("injury", ["write", "fsync"])
def test_all_fail_where_one_process_cannot_write(tmp_path, processes, who, asynchronous, injury):
    run = processes(3).run
    told = run(save_while_one_cannot, tmp_path, who, "stop", asynchronous, injury)
    assert told[0] == told[1] == told[2]
    seen, kind, text = told[0]
    assert seen == ([1, 2] if asynchronous else [1])
    assert kind == "NotSaved"
    assert "step 2 could not be written" in text
    assert "no space is left there" in text
    assert [c.step for c in checkpoints_in(tmp_path)] == [1]
    assert not list(tmp_path.glob(".*")), "nothing half-written stays"


@BOTH
def test_all_continue_with_the_next_save_after_a_failure(tmp_path, processes, asynchronous):
    told = processes(3).run(save_while_one_cannot, tmp_path, 1, "go_on", asynchronous, "write")
    assert told == [([1, 2, 3], 1, [])] * 3
    assert [c.step for c in checkpoints_in(tmp_path) if damage_of(c) is None] == [1, 3]


@BOTH
@pytest.mark.parametrize(
    ("who", "injury", "name"),  # that process writes the bytes of these numbers
    [
        (0, "nan first", "first.weight in model.safetensors"),
        (2, "nan", "exp_avg_sq:brief in optimizer.safetensors"),
    ],
)
def test_what_is_not_finite_on_one_process_is_not_saved(
    tmp_path, processes, asynchronous, who, injury, name
):
    run = processes(3).run
    for told in run(save_while_one_cannot, tmp_path, who, "go_on", asynchronous, injury):
        seen, kind, text = told
        assert seen == ([1, 2] if asynchronous else [1])
        assert kind == "Diverged"
        assert f"After step 2, {name} is not finite" in text
    assert [c.step for c in checkpoints_in(tmp_path)] == [1]


def test_a_process_with_another_model_is_named(tmp_path, processes):
    for told in processes(2).run(save_while_one_cannot, tmp_path, 1, "stop", True, "more"):
        assert told[1] == "WillFailAgain"
        assert "Process 1 has other tensors than process 0" in told[2]
    assert [c.step for c in checkpoints_in(tmp_path)] == [1]


def save_while_memory_is_short(world, directory, who):
    made = checkpoints(Path(directory), world, part_bytes=PART)
    if world.index == who:
        made._snapshot.reserve = lambda size: torch.empty(1 << 50)
    try:
        made.save(at_step(1))
        made.finish()
    except EvenstepError as error:
        return type(error).__name__, str(error)
    finally:
        made.close()
    return None


@pytest.mark.parametrize("who", [0, 1])
def test_all_fail_where_one_process_has_no_memory_for_its_copy(tmp_path, processes, who):
    told = processes(2).run(save_while_memory_is_short, tmp_path, who)
    assert told[0] == told[1]
    assert told[0][0] == "NotSaved"
    assert "The state after step 1 could not be copied" in told[0][1]
    assert not list(tmp_path.iterdir())


def save_while_a_writer_has_a_mistake(world, directory, who):
    made = checkpoints(Path(directory), world, part_bytes=PART)

    def mistake(name, words):
        if name == "fsync" and world.index == who:
            raise RuntimeError("nobody has foreseen this")

    failed = None
    with watched(mistake):
        made.save(at_step(1))
        try:
            made._pending.result(timeout=20)
        except Exception as error:
            failed = type(error).__name__, str(error)
    made.close()
    return failed


@pytest.mark.parametrize("who", [0, 1])
def test_a_mistake_of_one_writer_leaves_no_other_waiting(tmp_path, processes, who):
    told = processes(2).run(save_while_a_writer_has_a_mistake, tmp_path, who)
    assert told[who] == ("RuntimeError", "nobody has foreseen this")
    kind, text = told[1 - who]
    assert kind == "PeerLost"
    assert f"Process {who} could not write its share of the checkpoint of step 1: " in text
    assert "RuntimeError: nobody has foreseen this" in text
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="locks are found by /proc")
@pytest.mark.parametrize("has_locks", [True, False])
def test_pieces_are_written_so_that_no_nfs_client_extends_them(tmp_path, has_locks, monkeypatch):
    """For a file with a lock on some bytes, or opened with O_DSYNC: `nfs_can_extend_write`."""
    seen = []

    def notice(name, words):
        if name == "write":
            facts = Path(f"/proc/self/fdinfo/{words[0]}").read_text()
            flags = int(facts.split("flags:")[1].split()[0], 8)
            seen.append(("POSIX  ADVISORY  WRITE" in facts, bool(flags & os.O_DSYNC)))

    def refuse(*words):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    if not has_locks:
        monkeypatch.setattr(fcntl, "lockf", refuse)
    pieces = [(MODEL, 4100, [memoryview(b"abc")]), (MODEL, 9, [memoryview(b"de")])]
    with watched(notice):
        write_pieces(tmp_path, pieces, moved=lambda: None)
    assert seen == [(has_locks, not has_locks)] * 2
    assert (tmp_path / MODEL).read_bytes()[4100:] == b"abc"


def patience_of_writers(world):
    writers = world.writers()
    writers.meet()
    return writers._group._get_backend(torch.device("cpu")).options._timeout


def test_a_writer_is_waited_for_longer_than_any_save_takes(processes):
    # How long one may stand still is for the hang watch to say, and not for gloo's 30 minutes.
    assert processes(2).run(patience_of_writers) == [timedelta(days=20)] * 2


# ---- killed


def save_and_be_killed(world, directory, who, number, asynchronous):
    made = checkpoints(Path(directory), world, part_bytes=PART, keep=2, asynchronous=asynchronous)
    state = best(at_step(3), 0.5)
    with watched(die_at(number if world.index == who else 0)):
        made.save(state)
        made.finish()


@BOTH
@pytest.mark.parametrize("who", [0, 1])
def test_killed_at_an_operation_of_any_writer_a_checkpoint_is_whole(
    tmp_path, alone, who, asynchronous
):
    saved(tmp_path, alone, 2)
    after, number, ended = [], 1, False
    while not ended:
        with Processes(2) as pool:
            told = outcome(pool, save_and_be_killed, tmp_path, who, number, asynchronous)
        ended = told is None
        assert ended or f"rank {who}" in told
        back = new_state(seed=8)
        assert checkpoints(tmp_path, alone).restore(back)
        assert same(back, at_step(back.step)), number
        after.append(back.step)
        number += 1
    assert after == sorted(after), "before the rename the old one, after it the new one"
    assert 2 in after


def outcome(pool, *call):
    """What the processes say that died or failed; None where none did."""
    try:
        pool.run(*call)
    except ProcessesFailed as failed:
        return str(failed)
    return None
