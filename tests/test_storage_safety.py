"""Runs in an object store: nothing is lost, and nothing is said that is not so."""

import errno
import json
import os
import re
import resource
import shutil
import signal
import threading
import time
from typing import ClassVar

import fsspec
import pytest
import stored
from commands import DEADLINE_SECONDS, evenstep
from fsspec.implementations.memory import MemoryFileSystem
from injuring import until
from stored import (
    add_checkpoint,
    assert_same,
    brought_back,
    local_run,
    mirror_of,
    newest_step,
    steps_in,
    store_at,
    uploading_of,
)

from launch.stored import in_store
from launch.stored.following import Following
from launch.stored.in_store import _finished, uploaded
from launch.stored.leading import Leading
from service.basics import running_time
from service.basics.errors import EvenstepError, NoCheckpoint, SpecError, Stopped
from service.health.stop_budget import GracePeriod, longest_save
from service.health.stop_request import StopRequest
from service.runs.checkpoint_files import BEST, Checkpoint, checkpoints_in, damage_of
from service.runs.directory import RunDirectory, RunInUse
from service.runs.metrics_file import read_metrics
from service.spec.files import load_spec
from service.storage import beside
from service.storage.address import Address
from service.storage.beside import brought
from service.storage.bringing import Gone, bring_files, bring_newest, newest_first
from service.storage.lease import taken
from service.storage.published import newest_published
from service.storage.reading import checkpoints_at, copied, copied_runs


class Faulty(MemoryFileSystem):
    """A store in memory, to whose requests `harm(verb, path)` does something first."""

    protocol = "faulty"
    store: ClassVar = {}  # one for all instances, as in the base class
    pseudo_dirs: ClassVar = [""]
    harm = staticmethod(lambda verb, path: None)

    def pipe_file(self, path, value, mode="overwrite", **told):
        self.harm("write", path)
        super().pipe_file(path, value, mode=mode, **told)

    def cat_file(self, path, **told):
        self.harm("read", path)
        return super().cat_file(path, **told)

    def find(self, path, **told):
        self.harm("list", path)
        return super().find(path, **told)

    def rm_file(self, path):
        self.harm("delete", path)
        super().rm_file(path)

    def modified(self, path):
        self.harm("age", path)
        return super().modified(path)


@pytest.fixture
def harm(monkeypatch):
    """Sets what the store does to requests; until then nothing."""
    fsspec.register_implementation("faulty", Faulty, clobber=True)
    return lambda act: monkeypatch.setattr(Faulty, "harm", staticmethod(act))


def nothing(verb, path):
    """No harm."""


def killed(verb, path):
    """The end of the thread that asks."""
    raise SystemExit


place = stored.place


@pytest.fixture
def address(request, harm, tmp_path, monkeypatch):
    """An address of runs that no other test uses."""
    monkeypatch.setenv("EVENSTEP_LEASE_SECONDS", "1.5")
    monkeypatch.setenv("EVENSTEP_SCRATCH", str(tmp_path / "scratch"))
    return Address("faulty", f"{request.node.name.replace('[', '-').strip(']')}/runs")


def bring_here(address, place, said, **asked):
    """What a launcher does first: the upload, and the directory of the run."""
    spec = load_spec(place / "job.yaml")
    uploading = brought(address / "job", spec, **{"fresh": False, "say": said.append} | asked)
    uploading._lease.store._patience_seconds = 0.0
    return uploading, uploading._run


def in_time():
    """Seconds left, as often as it is asked."""
    over = time.monotonic() + DEADLINE_SECONDS
    return lambda: over - time.monotonic()


def steps_here(run):
    return [each.step for each in checkpoints_in(run.checkpoints)]


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def published(address, run):
    """Upload a run, and release its lease."""
    mirror = mirror_of(address, run)
    assert mirror.publish()
    mirror._lease.release()
    return mirror


def copied_here(run):
    with copied(run, checkpoint="latest", say=print):
        raise AssertionError("the disk takes nothing")


# ---- what is said at the end


def test_an_upload_that_a_driver_ends_with_any_error_is_no_success(address, place, tmp_path, harm):
    local, said = local_run(place, tmp_path / "local", 4), []

    def broken(verb, path):
        if "/data/" in path and verb == "write":
            raise RuntimeError("the driver has lost its head")

    uploading = uploading_of(address, local, said.append)
    harm(broken)
    uploading.start(when_lost=lambda: None)
    until(lambda: said, "words about the error")
    failed = uploading.finish(lambda: 0.0)
    assert "the driver has lost its head" in str(failed)
    assert "RuntimeError" in said[0]
    assert "no checkpoint is in the store, and step 4 is here" in said[0]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_upload_whose_thread_is_dead_is_no_success(address, place, tmp_path):
    local = local_run(place, tmp_path / "local", 4)

    def silent(text):
        raise SystemExit(1)

    uploading = uploading_of(address, local, silent)
    local.facts.write_text("{")
    uploading.start(when_lost=lambda: None)
    uploading._worker.join(DEADLINE_SECONDS)
    assert not uploading._worker.is_alive()
    assert "The run is not completely uploaded" in str(uploading.finish(in_time()))


def test_the_end_has_its_try_at_once(address, place, tmp_path, harm, monkeypatch):
    monkeypatch.setattr(beside, "_FIRST_PAUSE_SECONDS", 1e4)
    local, said = local_run(place, tmp_path / "local", 4), []

    def down(verb, path):
        raise ConnectionError("down")

    uploading = uploading_of(address, local, said.append)
    harm(down)
    uploading.start(when_lost=lambda: None)
    until(lambda: said, "words about the error")
    harm(nothing)
    assert uploading.finish(in_time()) is None
    assert steps_in(address) == [4]


def test_an_upload_that_does_not_come_forward_is_not_kept_going_by_the_lease(
    address, place, tmp_path, harm
):
    local, said = local_run(place, tmp_path / "local", 4), []
    renewed = threading.Semaphore(0)

    def refused(verb, path):
        if "/data/" in path and verb == "write":
            raise PermissionError(errno.EACCES, "AccessDenied")
        if "/lease/" in path and verb == "write":
            renewed.release()

    uploading = uploading_of(address, local, said.append)
    moved = uploading.moved
    harm(refused)
    uploading._lease.keep(said.append)
    uploading.start(when_lost=lambda: None)
    until(lambda: said, "words about the missing right")
    for _ in range(3):
        assert renewed.acquire(timeout=DEADLINE_SECONDS)
    assert uploading.moved == moved
    assert uploading.finish(lambda: 0.0).exit_code == 42


def test_a_lease_that_cannot_be_released_changes_no_result(address, place, tmp_path, harm):
    local = local_run(place, tmp_path / "local", 4)

    def refused(verb, path):
        if "/lease/" in path and verb == "write":
            raise PermissionError(errno.EACCES, "AccessDenied")

    uploading = uploading_of(address, local, print)
    harm(refused)
    uploading.start(when_lost=lambda: None)
    assert uploading.finish(in_time()) is None
    assert steps_in(address) == [4]


def test_what_is_trained_before_an_error_of_the_launcher_is_uploaded(address, place, tmp_path):
    local, said = local_run(place, tmp_path / "local", 4), []

    def train():
        add_checkpoint(place, local, 8)
        raise SpecError("too many files are open")

    with pytest.raises(SpecError, match="too many files"):
        uploaded(
            address / "job",
            uploading_of(address, local, said.append),
            train,
            budget_seconds=lambda: DEADLINE_SECONDS,
            is_fixed=True,
        )
    assert steps_in(address) == [4, 8]
    taken(store_at(address / "job"), say=said.append)
    assert not said  # it did not have to wait


@pytest.mark.parametrize("is_fixed", [False, True])
def test_a_stop_waits_for_an_upload_that_comes_forward_unless_its_time_is_set(
    address, place, tmp_path, harm, monkeypatch, capsys, is_fixed
):
    local, going_on = local_run(place, tmp_path / "local", 4), threading.Event()

    def held(verb, path):
        if verb == "write" and "/data/" in path:
            assert going_on.wait(DEADLINE_SECONDS)

    def train():
        heard.hear(signal.SIGTERM)
        heard.heard_at -= 1000.0
        if not is_fixed:
            going_on.set()  # the upload came forward when it began, and does so again
        return Stopped.exit_code

    monkeypatch.setattr(in_store, "heard", heard := StopRequest())
    uploading = uploading_of(address, local, print)
    harm(held)
    code = uploaded(
        address / "job", uploading, train, budget_seconds=lambda: 500.0, is_fixed=is_fixed
    )
    going_on.set()
    said = capsys.readouterr()
    assert code == (1 if is_fixed else Stopped.exit_code), said
    assert ("The run is not completely uploaded" in said.err) == is_fixed
    uploading._worker.join(DEADLINE_SECONDS)


def test_a_limit_of_a_stop_that_is_too_short_for_its_upload_is_told(
    address, place, tmp_path, capsys
):
    """That of Slurm is set before anything is known of the uploads."""
    local = local_run(place, tmp_path / "local", 4)
    takes = longest_save(local)
    assert takes is not None
    enough_for_saves = GracePeriod(takes.seconds, "slurm.stop_seconds")

    def train():
        until(lambda: newest_step(address) == 4, "step 4 in the store")
        return 0

    uploading = uploading_of(address, local, print)
    graces = {"grace_periods": (enough_for_saves,)}
    limits = {"budget_seconds": lambda: 500.0, "is_fixed": False}
    assert uploaded(address / "job", uploading, train, **limits, **graces) == 0
    told = r"WARNING: a stop may take .* two uploads of \S+ s, and 10 s to exit\), but slurm"
    assert len(re.findall(told, capsys.readouterr().err)) == 1


def test_old_objects_that_cannot_be_deleted_do_not_stop_the_upload(address, place, tmp_path, harm):
    local, said = local_run(place, tmp_path / "local", 4), []
    uploading = uploading_of(address, local, said.append)

    def refused(verb, path):
        if verb == "delete":
            raise PermissionError(errno.EACCES, "AccessDenied")

    harm(refused)
    uploading.start(when_lost=lambda: None)
    until(lambda: newest_step(address) == 4, "step 4 in the store")
    add_checkpoint(place, local, 8)
    shutil.rmtree(local.checkpoints / "step-00000004")
    assert uploading.finish(in_time()) is None
    assert steps_in(address) == [8]
    harm(nothing)
    mirror = mirror_of(address, local)
    mirror.take_over()
    held = newest_published(store_at(address / "job"))
    assert set(store_at(address / "job").sizes("data/")) == held.objects()


# ---- what is on this machine


def test_a_damaged_directory_of_a_checkpoint_does_not_keep_others_from_the_store(
    address, place, tmp_path
):
    local = local_run(place, tmp_path / "local", 4, 8)
    (local.checkpoints / "step-00000004/manifest.json").unlink()
    uploading = uploading_of(address, local, print)
    uploading.start(when_lost=lambda: None)
    assert uploading.finish(in_time()) is None
    assert steps_in(address) == [8]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_what_was_trained_while_the_store_was_away_is_uploaded_by_the_next_start(
    address, place, tmp_path, harm
):
    published(address, local_run(place, tmp_path / "elsewhere", 4))
    said = []
    uploading, run = bring_here(address, place, said)

    def down(verb, path):
        raise ConnectionError("down")

    harm(down)
    uploading.start(when_lost=lambda: None)
    for step in (8, 12):
        add_checkpoint(place, run, step)
    failed = uploading.finish(lambda: 0.0)
    assert "step 4 is in the store, and step 12 is here" in str(failed)
    assert "run the same command again on this machine" in str(failed)
    uploading._lease._over.set()  # as the end of its process does
    harm(killed)
    until(lambda: not uploading._worker.is_alive(), "the end of its thread")
    harm(nothing)
    again, run = bring_here(address, place, said)
    assert steps_here(run) == [4, 8, 12]
    again.start(when_lost=lambda: None)
    assert again.finish(in_time()) is None
    assert newest_step(address) == 12


def test_a_run_that_the_store_has_lost_goes_on_from_this_machine(address, place, tmp_path):
    said = []
    uploading, run = bring_here(address, place, said)
    shutil.copytree(place / "runs/job", run.path)
    uploading.start(when_lost=lambda: None)
    assert uploading.finish(in_time()) is None
    store = store_at(address / "job")
    for part in ("data/", "published/", "lease/"):
        store.remove(store.sizes(part))
    again, run = bring_here(address, place, said)
    assert "holds nothing of this run any more" in said[-1]
    assert steps_here(run)[-1] == 24
    again.start(when_lost=lambda: None)
    assert again.finish(in_time()) is None
    assert newest_step(address) == 24


def test_steps_that_only_this_machine_has_are_not_removed(address, place, tmp_path):
    said = []
    uploading, run = bring_here(address, place, said)
    shutil.copytree(place / "runs/job", run.path)
    uploading.start(when_lost=lambda: None)
    assert uploading.finish(in_time()) is None
    elsewhere = local_run(place, tmp_path / "elsewhere", 4)  # the run has gone on elsewhere
    published(address, elsewhere)
    _, run = bring_here(address, place, said)
    assert steps_here(run) == [4]
    assert "has step 24, which the store has not, so it is moved to" in said[-2]
    [aside] = run.path.parent.glob(".job-*")
    assert (aside / "checkpoints/step-00000024").is_dir()


@pytest.mark.parametrize("file", ["manifest.json", "model.safetensors"])
def test_a_damaged_checkpoint_does_not_replace_the_good_one_in_the_store(
    address, place, tmp_path, file
):
    local, said = local_run(place, tmp_path / "local", 4, 8), []
    published(address, local)
    flip(local.checkpoints / "step-00000008" / file)
    uploading = uploading_of(address, local, said.append)
    uploading.start(when_lost=lambda: None)
    assert uploading.finish(in_time()) is None
    brought_back(address, tmp_path / "back")  # where each is good
    assert steps_in(address) == [4, 8]


def test_a_damaged_checkpoint_that_only_this_machine_has_is_not_uploaded(address, place, tmp_path):
    local, said = local_run(place, tmp_path / "local", 4, 8), []
    flip(local.checkpoints / "step-00000008/model.safetensors")
    uploading = uploading_of(address, local, said.append)
    uploading.start(when_lost=lambda: None)
    assert uploading.finish(in_time()) is None
    assert steps_in(address) == [4]
    assert "step-00000008 is not uploaded" in said[0]


@pytest.mark.parametrize("injured", [(4, 8), (8,)], ids=["all", "newest"])
def test_a_damaged_checkpoint_on_this_machine_is_brought_again(address, place, tmp_path, injured):
    said = []
    uploading, run = bring_here(address, place, said)
    shutil.copytree(local_run(place, tmp_path / "local", 4, 8).path, run.path)
    uploading.start(when_lost=lambda: None)
    assert uploading.finish(in_time()) is None
    for step in injured:
        flip(run.checkpoints / f"step-{step:08d}/model.safetensors")
    _, run = bring_here(address, place, said)
    assert damage_of(Checkpoint(run.checkpoints / "step-00000008", 8)) is None
    assert "It is brought again from the store" in said[-2]


def test_a_checkpoint_that_this_machine_has_lost_is_brought_again(address, place, tmp_path):
    said = []
    uploading, run = bring_here(address, place, said)
    shutil.copytree(local_run(place, tmp_path / "local", 4, 8).path, run.path)
    uploading.start(when_lost=lambda: None)
    assert uploading.finish(in_time()) is None
    shutil.rmtree(run.checkpoints / "step-00000008")
    _, run = bring_here(address, place, said)
    assert steps_here(run) == [4, 8]


def test_of_a_checkpoint_that_was_uploaded_damaged_the_one_before_is_used(address, place, tmp_path):
    local, said = local_run(place, tmp_path / "local", 4), []
    mirror = mirror_of(address, local)
    add_checkpoint(place, local, 8)  # as if the disk had lost a bit just after the save
    flip(local.checkpoints / "step-00000008/model.safetensors")
    assert mirror.publish()
    mirror._lease.release()
    uploading, run = bring_here(address, place, said)
    assert steps_here(run) == [4]
    assert "step-00000008 was uploaded damaged" in said[-2]
    uploading.start(when_lost=lambda: None)
    assert uploading.finish(in_time()) is None
    assert steps_in(address) == [4]  # the run takes the steps after 4 again


def test_the_last_checkpoints_of_the_store_stay_while_this_machine_has_none(
    address, place, tmp_path
):
    local = local_run(place, tmp_path / "local", 4)
    mirror = mirror_of(address, local)
    assert mirror.publish()
    shutil.rmtree(local.checkpoints / "step-00000004")
    assert not mirror.publish()
    assert steps_in(address) == [4]
    add_checkpoint(place, local, 8)
    assert mirror.publish()
    assert steps_in(address) == [8]
    assert_same(brought_back(address, tmp_path / "back"), local)


def test_a_directory_that_is_replaced_while_it_is_read_is_not_published_in_parts(
    address, place, tmp_path
):
    """As by --fresh in another process; a pipe shows when it is being read."""
    local = local_run(place, tmp_path / "local", 4)
    other = local_run(place, tmp_path / "other", 12)
    mirror = mirror_of(address, local)
    assert mirror.publish()
    add_checkpoint(place, local, 8)
    (local.checkpoints / BEST).unlink(missing_ok=True)
    os.mkfifo(local.checkpoints / BEST)

    def replace():
        with (local.checkpoints / BEST).open("w"):  # waits for the reader
            local.path.rename(tmp_path / "aside")
            other.path.rename(local.path)

    replacing = threading.Thread(target=replace)
    replacing.start()
    with pytest.raises(EvenstepError, match="was replaced while it was read"):
        mirror.publish()
    replacing.join()
    assert steps_in(address) == [4]
    assert mirror.publish()
    assert steps_in(address) == [12]


def test_the_best_checkpoint_is_named_in_the_store_once_it_is_there(address, place, tmp_path):
    local = local_run(place, tmp_path / "local", 4)
    (local.checkpoints / BEST).write_text("step-00000008\n")  # it appears while this is read
    mirror = mirror_of(address, local)
    assert mirror.publish()
    assert f"checkpoints/{BEST}" not in mirror.published.files
    add_checkpoint(place, local, 8)
    assert mirror.publish()
    assert f"checkpoints/{BEST}" in mirror.published.files


def test_a_lease_counts_on_from_what_is_published_if_its_object_was_deleted(
    address, place, tmp_path
):
    local = local_run(place, tmp_path / "local", 4)
    published(address, local)
    published(address, local_run(place, tmp_path / "second", 4, 8))
    store = store_at(address / "job")
    store.remove(list(store.sizes("lease/")))
    assert newest_published(store).stamp.term == 2
    assert taken(store, say=print).term == 3


def test_a_piece_whose_first_answer_is_cut_is_fetched_again(address, place, tmp_path, monkeypatch):
    local, asked, whole = local_run(place, tmp_path / "local", 4), set(), Faulty.cat_file
    published(address, local)

    def cut(driver, path, **told):
        content = whole(driver, path, **told)
        if "/data/" not in path or path in asked:
            return content
        asked.add(path)
        return content[: len(content) // 2]

    monkeypatch.setattr(Faulty, "cat_file", cut)
    assert_same(brought_back(address, tmp_path / "back"), local)


def test_a_publication_in_which_a_letter_has_changed_is_not_read(address, place, tmp_path):
    held = published(address, local_run(place, tmp_path / "local", 4)).published
    store = store_at(address / "job")
    content = store.get(held.name)
    store.put(held.name, content.replace(b'"scratch": "test"', b'"scratch": "text"'))
    with pytest.raises(NoCheckpoint, match="is damaged, or of another version of evenstep"):
        newest_published(store)


def test_of_two_checkpoints_of_a_step_the_tested_one_is_brought_first():
    names = ["step-00000004", "step-00000008.untested", "step-00000008"]
    assert newest_first(names) == ["step-00000008", "step-00000008.untested", "step-00000004"]


def test_a_directory_with_the_facts_of_a_run_has_all_of_its_files(address, place, tmp_path, harm):
    """A start that is interrupted while it brings them begins again with all."""
    held = published(address, local_run(place, tmp_path / "local", 4)).published
    back = RunDirectory(tmp_path / "back")

    def without_rows(verb, path):
        if verb == "read" and path.endswith("metrics.jsonl"):
            raise ConnectionError("down")

    harm(without_rows)
    with pytest.raises(EvenstepError, match="down"):
        bring_files(store_at(address / "job"), held, back.path)
    assert not back.facts.exists()


def test_the_objects_of_a_run_that_fresh_has_set_aside_stay(address, place, tmp_path):
    before = published(address, local_run(place, tmp_path / "before", 4)).published
    local = local_run(place, tmp_path / "local", 8)
    local.facts.write_text(json.dumps(local.read_facts() | {"id": "another"}))
    published(address, local)
    later = mirror_of(address, local)
    later.take_over()
    store = store_at(address / "job")
    assert before.name in store.sizes("published/")
    assert before.objects() <= store.sizes("data/").keys()
    assert later.published.objects() < store.sizes("data/").keys()


def test_leftovers_of_starts_that_were_killed_are_removed(address, place, tmp_path):
    published(address, local_run(place, tmp_path / "local", 4))
    first, run = bring_here(address, place, [])
    first.abandon()
    for left in (".job.bringing/step-00000008", ".job.stale-0123", ".job.uploading/checkpoints"):
        (run.path.parent / left).mkdir(parents=True)
    store_at(address / "job").put("lease/probe-0123", b"of a launcher that was killed")
    bring_here(address, place, [])
    assert {path.name for path in run.path.parent.iterdir()} == {"job", ".job.scratch"}
    assert [*store_at(address / "job").sizes("lease/")] == ["lease/000003.json"]


def test_a_file_of_lines_that_gets_the_number_of_the_one_before_is_uploaded_whole(
    address, place, tmp_path
):
    local = local_run(place, tmp_path / "local", 4)
    mirror = mirror_of(address, local)
    old = [b'{"step": %d, "time": 1.25}\n' % step for step in range(50)]
    local.metrics.write_bytes(b"".join(old))
    mirror.publish()
    new = old[:10] + [b'{"step": %d, "time": 2.5}\n' % step for step in range(10, 80)]
    local.metrics.write_bytes(b"".join(new))  # in place, so with the same number
    mirror.publish()
    bring_files(store_at(address / "job"), mirror.published, tmp_path / "back")
    assert (tmp_path / "back/metrics.jsonl").read_bytes() == b"".join(new)


def test_a_file_of_lines_that_is_replaced_is_uploaded_whole_although_its_end_is_the_same(
    address, place, tmp_path
):
    local = local_run(place, tmp_path / "local", 4)
    rows = local.metrics.read_bytes()
    mirror = mirror_of(address, local)
    assert mirror.publish()
    with local.metrics.open("ab") as file:
        file.write(b'{"step": 25}\n')
    assert mirror.publish()
    assert len(mirror.published.files["metrics.jsonl"]) == 2
    replaced = local.path / "replaced"
    replaced.write_bytes(rows.replace(b"0", b"1") + b'{"step": 25}\n')
    replaced.rename(local.metrics)
    assert mirror.publish()
    assert_same(brought_back(address, tmp_path / "back"), local)


def test_another_checkpoint_of_the_same_step_replaces_that_in_the_store(address, place, tmp_path):
    local = local_run(place, tmp_path / "local", 4)
    mirror = mirror_of(address, local)
    assert mirror.publish()
    for name in ("job.yaml", "my_task.py"):
        shutil.copy(place / name, tmp_path)
    other = evenstep("run", "job.yaml", "seed=1", "length.steps=4", cwd=tmp_path)
    assert other.returncode == 0, other.stderr
    replaced = local.checkpoints / "step-00000004"
    shutil.rmtree(replaced)
    shutil.copytree(tmp_path / "runs/job/checkpoints/step-00000004", replaced)
    assert mirror.publish()
    assert_same(brought_back(address, tmp_path / "back"), local)


def test_what_was_uploaded_for_a_publication_that_failed_is_deleted_if_it_has_changed_since(
    address, place, tmp_path, harm
):
    local = local_run(place, tmp_path / "local", 4)
    mirror = mirror_of(address, local)

    def unpublished(verb, path):
        if verb == "write" and "/published/" in path:
            raise ConnectionError("down")

    harm(unpublished)
    with pytest.raises(EvenstepError, match="down"):
        mirror.publish()
    harm(nothing)
    local.metrics.write_text('{"step": 1}\n')
    assert mirror.publish()
    assert store_at(address / "job").sizes("data/").keys() == mirror.published.objects()


def test_a_file_with_a_name_for_no_store_is_left_out_and_named(address, place, tmp_path):
    local, said = local_run(place, tmp_path / "local", 4), []
    (local.path / "notes\u00a0.txt").write_text("x")
    os.close(os.open(os.fsencode(local.path) + b"/bad\xff.txt", os.O_CREAT | os.O_WRONLY))
    uploading = uploading_of(address, local, said.append)
    uploading.start(when_lost=lambda: None)
    assert uploading.finish(in_time()) is None
    assert len(said) == 2
    assert r"bad\udcff.txt' is not uploaded: rename it" in "".join(said)
    assert steps_in(address) == [4]


def test_however_long_an_upload_takes_it_holds_one_checkpoint_on_the_disk(
    address, place, tmp_path, harm
):
    local = local_run(place, tmp_path / "local", 4, 8)  # keep is 2
    going_on, at_data = threading.Event(), threading.Event()

    def slow(verb, path):
        if verb == "write" and "/data/" in path:
            at_data.set()
            assert going_on.wait(DEADLINE_SECONDS)

    uploading = uploading_of(address, local, print)
    harm(slow)
    uploading.start(when_lost=lambda: None)
    assert at_data.wait(DEADLINE_SECONDS)
    for step in (12, 16, 20, 24):
        add_checkpoint(place, local, step)
        shutil.rmtree(local.checkpoints / f"step-{step - 8:08d}")
        assert len(weights_on_disk(local)) <= 2 + 1
    going_on.set()
    assert uploading.finish(in_time()) is None
    assert steps_in(address) == [20, 24]
    assert len(weights_on_disk(local)) == 2


def weights_on_disk(run):
    """The weights below the scratch directory of a run, linked or not."""
    files = run.path.parent.rglob("*model.safetensors")
    return {os.stat(file).st_ino for file in files}


# ---- what is in the store


def test_a_run_is_held_while_it_is_brought(address, place, tmp_path, harm, monkeypatch):
    monkeypatch.setenv("EVENSTEP_LEASE_SECONDS", "6")  # on a busy machine 1.5 s run out
    published(address, local_run(place, tmp_path / "local", 4))
    going_on, at_data = threading.Event(), threading.Event()

    def slow(verb, path):
        if verb == "read" and "/data/" in path:
            at_data.set()
            assert going_on.wait(DEADLINE_SECONDS)

    harm(slow)
    bringing = threading.Thread(target=bring_here, args=(address, place, []))
    bringing.start()
    assert at_data.wait(DEADLINE_SECONDS)
    with pytest.raises(SpecError, match="is being written by process"):
        taken(store_at(address / "job"), say=print)
    going_on.set()
    bringing.join()


def test_a_run_whose_publication_is_damaged_starts_over_where_it_is_asked_to(
    address, place, tmp_path
):
    local, said = local_run(place, tmp_path / "local", 4), []
    mirror = published(address, local)
    store = store_at(address / "job")
    store.put(mirror.published.name, b"{}")
    with pytest.raises(Exception, match=r"is damaged, or of another version .* --fresh"):
        bring_here(address, place, said)
    uploading, run = bring_here(address, place, said, fresh=True)
    assert not run.path.exists()
    shutil.copytree(local_run(place, tmp_path / "new", 8).path, run.path)
    before = set(store.sizes("data/"))
    uploading.start(when_lost=lambda: None)
    assert uploading.finish(in_time()) is None
    assert steps_in(address) == [8]
    assert before < set(store.sizes("data/"))  # perhaps somebody restores the publication


def test_objects_that_were_deleted_are_uploaded_again(address, place, tmp_path):
    local, said = local_run(place, tmp_path / "local", 4, 8), []
    mirror = published(address, local)
    store = store_at(address / "job")
    files = mirror.published.files
    for path in ("checkpoints/step-00000008/model.safetensors", "metrics.jsonl"):
        store.remove([files[path][0].name])
    uploading = uploading_of(address, local, said.append)
    uploading.start(when_lost=lambda: None)
    assert uploading.finish(in_time()) is None
    assert "2 objects are published, but not in the store" in said[0]
    assert_same(brought_back(address, tmp_path / "back"), local)
    assert set(store.sizes("data/")) == newest_published(store).objects()


def test_a_reader_sees_a_newer_run_if_the_run_goes_on_meanwhile(address, place, tmp_path, harm):
    local = local_run(place, tmp_path / "local", 4, 8)
    mirror = mirror_of(address, local)
    assert mirror.publish()
    numbers = iter((12, 16, 20))

    def publishing(verb, path):
        if verb == "read" and "/data/" in path and (step := next(numbers, None)):
            harm(nothing)
            add_checkpoint(place, local, step)
            for old in range(4, step, 4):
                shutil.rmtree(local.checkpoints / f"step-{old:08d}", ignore_errors=True)
            with local.metrics.open("ab") as file:
                file.write(b'{"step": %d}\n' % (step + 90))
            mirror.publish()

    said = []
    harm(publishing)
    with copied(address / "job", checkpoint="latest", say=said.append) as run:
        assert steps_here(run) == [12]
        assert read_metrics(run.metrics)[-1]["step"] == 12 + 90
    harm(publishing)
    told = [(each.step, damage) for each, damage, _ in checkpoints_at(address / "job")]
    assert told == [(16, None)]
    harm(publishing)
    with copied_runs(address) as (copies, unread):
        assert read_metrics(copies / "job/metrics.jsonl")
    assert not unread
    assert not said


def test_names_in_the_store_lead_to_no_other_place_of_the_reader(
    address, place, tmp_path, monkeypatch
):
    published(address, local_run(place, tmp_path / "local", 4))
    driver = store_at(address)._driver
    for key in list(driver.store):
        if key.startswith(f"/{address.path}/job/"):
            driver.store[key.replace("/runs/job/", "/runs/../")] = driver.store[key]
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary/run.json").write_text("mine")
    with copied_runs(address) as (copies, unread):
        assert [path.name for path in copies.iterdir()] == ["job"]
    assert not unread
    assert (tmp_path / "temporary/run.json").read_text() == "mine"


def test_a_damaged_checkpoint_in_the_store_is_passed_over_and_told(address, place, tmp_path):
    mirror = published(address, local_run(place, tmp_path / "local", 4, 8))
    store, said = store_at(address / "job"), []
    held = mirror.published
    for step in (4, 8):
        store.remove([held.files[f"checkpoints/step-{step:08d}/state.json"][0].name])
    with pytest.raises(Gone, match="none of the 2 checkpoints can be read"):
        bring_newest(store, held, tmp_path / "back", say=said.append)
    assert len(said) == 2


# ---- stops and names


def test_a_stop_ends_the_wait_for_a_lease_and_a_download(address, place, tmp_path, harm):
    published(address, local_run(place, tmp_path / "local", 4))
    stopped = threading.Event()

    def stopping(verb, path):
        if verb == "read" and "/data/" in path:
            stopped.set()

    harm(stopping)
    with pytest.raises(Stopped):
        bring_here(address, place, [], is_stopped=stopped.is_set)
    harm(nothing)
    held = taken(store_at(address / "job"), say=print)  # so it was released
    held._record = held._record.__class__(**held._record.__dict__ | {"seconds": 3600.0})
    held.renew()
    stopped.clear()
    with pytest.raises(Stopped):
        taken(store_at(address / "job"), say=lambda told: stopped.set(), is_stopped=stopped.is_set)


def test_a_run_cannot_have_the_name_of_a_part_of_one(address, place):
    spec = load_spec(place / "job.yaml")
    with pytest.raises(SpecError, match="cannot be called 'data'"):
        brought(address / "data", spec, fresh=False, say=print)


@pytest.mark.parametrize("read", [lambda run: next(checkpoints_at(run)), copied_here])
def test_a_full_disk_of_a_reader_is_one_line(address, place, tmp_path, read):
    published(address, local_run(place, tmp_path / "local", 4))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(EvenstepError, match="could not be written: "):
            read(address / "job")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_whose_name_is_too_long_for_a_store_keeps_no_other_from_it(
    address, place, tmp_path, harm
):
    local, said = local_run(place, tmp_path / "local", 4), []
    deep = local.path / "/".join(["ü" * 125] * 3)
    deep.mkdir(parents=True)
    (deep / ("x" * 250)).write_text("an image")
    (deep / "short").write_text("another one")

    def limited(verb, path):
        if verb == "write" and len(path.partition("/")[2].encode()) > 1024:
            raise OSError(errno.EINVAL, "KeyTooLongError")

    harm(limited)
    uploading = uploading_of(address, local, said.append)
    uploading.start(when_lost=lambda: None)
    assert uploading.finish(in_time()) is None
    assert steps_in(address) == [4]
    assert (brought_back(address, tmp_path / "back").path / deep.relative_to(local.path)).is_dir()
    assert [text for text in said if "is not uploaded: rename it" in text]


# ---- several launchers, and those that come back


def test_a_lease_that_goes_while_it_is_looked_at_is_no_traceback(address, harm):
    """Of two launchers that start after a third one was killed, one removes its lease."""
    store = store_at(address / "job")
    taken(store, say=print)
    said = []

    def replaced(verb, path):
        if verb == "age" and path.endswith("lease/000001.json"):
            harm(nothing)
            store.create("lease/000002.json", b"{}")
            store.remove(["lease/000001.json"])

    harm(replaced)
    with pytest.raises(SpecError, match=r"000002\.json is no lease of this version"):
        taken(store, say=said.append)


@pytest.mark.parametrize("request_", ["read", "age", "write"])
def test_a_launcher_that_starts_beside_another_one_blames_no_store(address, harm, request_):
    """The other one has just got the lease of a killed one, and removes what that has left."""
    store, said, seen = store_at(address / "job"), [], []

    def removed(verb, path):
        if "/probe-" in path and verb == request_:
            seen.append(path)
            if len(seen) == (2 if verb == "write" else 1):  # the second one is on condition
                harm(nothing)
                store.remove(store.sizes("lease/"))

    harm(removed)
    taken(store, say=said.append)
    assert seen
    assert not said


def test_a_store_that_does_not_give_what_it_has_taken_is_refused(address, harm):
    def late(verb, path):
        if verb == "read":
            raise FileNotFoundError(errno.ENOENT, "there is no such object", path)

    harm(late)
    with pytest.raises(SpecError, match="was just written cannot be read"):
        taken(store_at(address / "job"), say=print)


def test_an_earlier_launcher_publishes_whole_though_nothing_was_published_before(
    address, place, tmp_path
):
    """It has uploaded all, when its lease runs out and the next one finds nothing published."""
    late = mirror_of(address, local_run(place, tmp_path / "one", 4))
    files, run, _ = late._uploaded()
    late._lease.release()
    mirror_of(address, local_run(place, tmp_path / "two")).take_over()
    late._put(files, run)
    assert steps_in(address) == [4]
    brought_back(address, tmp_path / "back")  # where each is good


def test_an_offer_that_follows_at_once_is_not_forgotten(address, place, tmp_path, monkeypatch):
    """A node that has left while the others waited lets node 0 ask again."""
    uploading = uploading_of(address, local_run(place, tmp_path / "local", 4), print)
    offers, settle = [], beside.Offer.settle

    def settled(offer, term, checkpoint):
        settle(offer, term, checkpoint)
        if not offers:
            offers.append(uploading.offer(fresh=False))

    monkeypatch.setattr(beside.Offer, "settle", settled)
    first = uploading.offer(fresh=False)
    uploading.start(when_lost=lambda: None)
    until(lambda: first.is_settled and offers and offers[0].is_settled, "both answers")
    assert uploading.finish(in_time()) is None


def test_lines_of_the_task_are_uploaded_to_their_last_byte(address, place, tmp_path):
    """Only our own lines are written while they are read: others may end without a newline."""
    local = local_run(place, tmp_path / "local", 4)
    (local.path / "rows.jsonl").write_text('{"row": 1}\n{"row": 2}')
    published(address, local)
    back = brought_back(address, tmp_path / "back")
    assert (back.path / "rows.jsonl").read_text() == '{"row": 1}\n{"row": 2}'


def test_a_run_that_was_started_over_here_is_not_removed_for_one_with_more_steps(
    address, place, tmp_path
):
    said = []
    published(address, local_run(place, tmp_path / "one", 4))
    uploading, run = bring_here(address, place, said)
    uploading.abandon()
    facts = run.read_facts()  # --fresh, while the store takes nothing
    run.facts.write_text(run.facts.read_text().replace(facts["id"], "f" * len(facts["id"])))
    published(address, local_run(place, tmp_path / "two", 4, 8))
    _, run = bring_here(address, place, said)
    assert steps_here(run) == [8]
    assert "moved to" in said[-2]
    [aside] = run.path.parent.glob(".job-*")
    assert (aside / "checkpoints/step-00000004").is_dir()


def test_a_run_keeps_the_note_of_another_whose_name_is_like_that_of_a_leftover(
    address, place, tmp_path
):
    uploading, run = bring_here(address, place, [])
    uploading.abandon()
    other = run.path.with_name(".job.stale-1.scratch")
    other.touch()
    bring_here(address, place, [])
    assert other.exists()


def test_files_whose_names_are_like_those_of_pieces_are_kept_apart(address, place, tmp_path):
    local = local_run(place, tmp_path / "local", 4)
    with (local.path / "rows").open("wb") as large:
        large.truncate((16 << 20) + 1)
    (local.path / "rows@0").write_text("something else")
    published(address, local)
    assert (brought_back(address, tmp_path / "back").path / "rows@0").read_text() == (
        "something else"
    )


def test_a_publication_whose_first_answer_is_cut_is_read_again(
    address, place, tmp_path, monkeypatch
):
    published(address, local_run(place, tmp_path / "local", 4))
    read, seen = Faulty.cat_file, []

    def cut(driver, path, **told):
        seen.append(path)
        content = read(driver, path, **told)
        return content[:50] if len(seen) == 1 else content

    monkeypatch.setattr(Faulty, "cat_file", cut)
    assert newest_published(store_at(address / "job")) is not None
    assert len(seen) == 2


def test_a_launcher_that_was_paused_does_not_give_the_store_up(
    address, place, tmp_path, harm, monkeypatch
):
    """Neither between two generations nor at the end: it was not the store that stood still."""

    def refused(verb, path):
        if "/data/" in path and verb == "write":
            raise ConnectionResetError(errno.ECONNRESET, "the connection is gone")

    uploading, ends = uploading_of(address, local_run(place, tmp_path / "local", 4), print), []
    harm(refused)
    offered = Leading(uploading, say=print).offer(fresh=False)
    uploading.start(when_lost=lambda: None)
    assert offered() is None
    ending = threading.Thread(target=lambda: ends.append(_finished(uploading, lambda: 0.0, True)))
    ending.start()
    later = time.monotonic() + 3600
    with monkeypatch.context() as paused:
        paused.setattr(time, "monotonic", lambda: later)
        paused.setattr(running_time, "monotonic", lambda: later)
        assert offered() is None
        ending.join(1)
        assert not ends
    harm(nothing)
    ending.join(DEADLINE_SECONDS)
    assert ends == [None]
    assert offered()["checkpoint"] == "step-00000004"


def test_an_upload_that_has_nothing_to_do_does_not_stand_still(address, place, tmp_path):
    """Or a store that is away for a minute at the end of a long epoch would be given up."""
    uploading = uploading_of(address, local_run(place, tmp_path / "local", 4), print)
    uploading.start(when_lost=lambda: None)
    until(lambda: newest_step(address) == 4, "the checkpoint in the store")
    uploading._mirror.moved = time.monotonic() - 3600
    until(lambda: time.monotonic() - uploading.moved < 60, "a look at what is new")
    assert uploading.finish(in_time()) is None


def test_a_second_launcher_of_a_node_removes_nothing_of_the_first(address, place, tmp_path):
    published(address, local_run(place, tmp_path / "local", 4))
    first, second = (
        Following(address / "job", tmp_path / "disk", node=1, say=print) for _ in range(2)
    )
    first.begin()
    first.bring()
    with pytest.raises(RunInUse, match="disk-node-1 is being written by process"):
        second.begin()
    assert (first.runs / "job/checkpoints/step-00000004/manifest.json").exists()
    first._lock.close()
