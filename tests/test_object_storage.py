"""Runs that live in an object store: a real server that speaks S3, and a proxy that does harm."""

import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from click.testing import CliRunner
from commands import BIN, CLEAN, DEADLINE_SECONDS, evenstep
from injuring import until
from stores import BUCKET, Proxy, s3_server

from launch.cli import evenstep as commands
from service.basics.errors import SpecError
from service.runs.checkpoint_files import Checkpoint, checkpoints_in, damage_of
from service.runs.directory import RunDirectory, find_run
from service.runs.metrics_file import read_metrics
from service.runs.verification import compare
from service.spec.files import load_spec
from service.storage.address import Address, address_in
from service.storage.beside import Uploading, brought
from service.storage.bringing import bring_checkpoint, bring_files, bring_newest
from service.storage.lease import require_rights, taken
from service.storage.mirror import LeaseLost, Mirror
from service.storage.published import newest_published
from service.storage.store import Store, StoreFailed, open_store

pytest.importorskip("moto", reason="needs moto, flask and flask-cors")
pytest.importorskip("s3fs", reason="needs s3fs")

TASK = """
import os
import time

import torch
from torch import nn

from service.data.task import supervised

HOLD_AT = int(os.environ.get("HOLD_AT_ROW", 10**9))


class Rows:
    read = 0

    def __len__(self):
        return 43

    def __getitem__(self, row):
        Rows.read += 1
        while Rows.read > HOLD_AT:  # until it is killed
            time.sleep(0.01)
        return torch.tensor([row / 43.0]), int(row > 21)


def task():
    return supervised(model=lambda: nn.Linear(1, 2), train=Rows(), loss="cross_entropy")
"""
SPEC = {
    "name": "job",
    "task": "./my_task.py:task",
    "batch": {"global_batch": 7},
    "length": {"steps": 24},
    "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9},
    "checkpoint": {"every_steps": 4, "keep": 2},
    "tracking": {"log_every_steps": 1},
}


@pytest.fixture(scope="module")
def server():
    with s3_server() as running:
        yield running


@pytest.fixture
def client(server, monkeypatch):
    """The variables of a client of the server."""
    for name, value in server.variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("EVENSTEP_LEASE_SECONDS", "1.5")
    return server


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with the job, and one undisturbed run of it in `runs`."""
    directory = tmp_path_factory.mktemp("job")
    (directory / "my_task.py").write_text(TASK)
    (directory / "job.yaml").write_text(json.dumps(SPEC))
    done = evenstep("run", "job.yaml", "checkpoint.keep=9", cwd=directory)
    assert done.returncode == 0, done.stderr
    return directory


numbers = itertools.count()


@pytest.fixture
def address():
    """An address of runs that no other test uses."""
    found = address_in(f"s3://{BUCKET}/runs-{next(numbers)}")
    assert found is not None
    return found


# ---- whole runs, by the command


def test_a_killed_run_goes_on_with_the_same_bits_on_an_empty_machine(
    server, place, address, client, tmp_path
):
    start = ("run", "job.yaml", "--runs", str(address))
    one = server.variables | {"EVENSTEP_SCRATCH": str(tmp_path / "one"), "HOLD_AT_ROW": "70"}
    two = server.variables | {"EVENSTEP_SCRATCH": str(tmp_path / "two")}
    first = subprocess.Popen(
        [BIN / "evenstep", *start],
        cwd=place,
        env=CLEAN | one,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        until(lambda: first.poll() is not None or newest_step(address) == 8, "step 8 in the store")
        refused = evenstep(*start, cwd=place, **two)
    finally:
        first.send_signal(signal.SIGKILL)
        told, _ = first.communicate(timeout=DEADLINE_SECONDS)
    assert first.returncode == -signal.SIGKILL, told
    assert refused.returncode == SpecError.exit_code, refused.stderr
    assert f"{address}/job is being written by process {first.pid} of " in refused.stderr

    done = evenstep(*start, cwd=place, **two)
    assert done.returncode == 0, done.stderr
    assert "Resuming after step 8" in done.stdout
    assert f"Everything is in {address}/job." in done.stdout
    at_end = brought_back(address, tmp_path / "three")
    compared = compare(find_run(place / "runs/job"), at_end, level="bits", tolerance=0)
    assert compared.equal, compared.lines
    assert [row["step"] for row in read_metrics(at_end.metrics)] == [*range(1, 25)]
    assert at_end.read_facts()["state"] == "done"
    assert [each.step for each in checkpoints_in(at_end.checkpoints)] == [20, 24]

    again = evenstep(*start, cwd=place, **one)
    assert again.returncode == 0, again.stderr
    assert "Nothing to do" in again.stdout


def test_what_cannot_live_in_a_store_yet_is_refused_by_name(place, address):
    torchrun = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    torchrun |= {"MASTER_PORT": "1", "LOCAL_WORLD_SIZE": "1"}
    nodes = {"PET_NNODES": "2", "PET_NODE_RANK": "0", "PET_NPROC_PER_NODE": "1"}
    nodes |= {"PET_MASTER_ADDR": "127.0.0.1"}
    for variables, told in ((torchrun, "torchrun cannot"), (nodes, "on several nodes (2 here)")):
        done = evenstep("run", "job.yaml", "--runs", str(address), cwd=place, **variables)
        assert done.returncode == SpecError.exit_code, done.stderr
        assert told in done.stderr


def test_no_driver_is_imported_without_an_address():
    asked = "import sys, launch.cli; print(*{m.partition('.')[0] for m in sys.modules})"
    done = subprocess.run(  # a new interpreter: those of the other commands are forked warm
        [sys.executable, "-c", asked],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
    )
    assert "launch" in done.stdout.split(), done.stderr
    assert not {"fsspec", "s3fs", "botocore", "aiohttp", "asyncio"} & set(done.stdout.split())


# ---- mistakes


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("s3://", "names no bucket"),
        ("s3://key:secret@bucket/runs", "must not hold credentials"),
        ("file:///tmp/runs", "Write its path, without file://"),
        ("s3://bucket/../runs", "no `..` in it"),
        ("simplecache::s3://bucket/runs", "is no address"),
    ],
)
def test_an_address_that_is_none_is_refused(text, told):
    with pytest.raises(SpecError, match=told):
        address_in(text)


def test_a_path_is_no_address():
    assert address_in("runs") is None
    assert address_in("/a/b:c/d") is None


@pytest.mark.parametrize(
    ("scheme", "told"), [("s4", "no driver for s4://; known: .*s3"), ("gs", "evenstep.gcs")]
)
def test_a_missing_driver_is_named_with_what_installs_it(scheme, told):
    with pytest.raises(SpecError, match=told):
        open_store(Address(scheme, "bucket/runs"))


def test_a_missing_bucket_is_named(client):
    with pytest.raises(SpecError, match="s3://no-such-bucket/runs: the bucket does not exist"):
        require_rights(open_store(Address("s3", "no-such-bucket/runs")))


@pytest.mark.parametrize(
    ("method", "verb"), [("PUT", "write"), ("GET", "read"), ("LIST", "list"), ("DELETE", "delete")]
)
def test_a_missing_right_is_named(client, address, monkeypatch, method, verb):
    with Proxy(client) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.server.url)
        proxy.harm = lambda m, path: (
            403 if method == ("LIST" if "list-type" in path else m) else None
        )
        with pytest.raises(SpecError, match=f"no right to {verb} objects"):
            require_rights(open_store(address))


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("RequestTimeTooSkewed", "clock of this machine"),
        ("AuthorizationHeaderMalformed", "another region"),
        ("SignatureDoesNotMatch", "secret key does not fit"),
    ],
)
def test_what_the_store_says_is_said_in_words(client, address, monkeypatch, code, told):
    with Proxy(client) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.server.url)
        proxy.harm = lambda method, path: code
        with pytest.raises(SpecError, match=told):
            require_rights(open_store(address))


def test_a_store_that_does_not_answer_is_named(client, address, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StoreFailed, match=r"cannot be reached.*AWS_ENDPOINT_URL"):
        require_rights(open_store(address, patience_seconds=0.1))


# ---- leases


def test_of_launchers_that_start_together_one_gets_the_run(client, address):
    got, refused = [], []
    over = threading.Event()

    def launch():
        try:
            lease = taken(store_at(address / "job"), say=lambda text: None)
        except SpecError as error:
            refused.append(str(error))
            return
        got.append(lease)
        while not over.wait(0.2):
            lease.renew()

    threads = [threading.Thread(target=launch) for _ in range(4)]
    for thread in threads:
        thread.start()
    until(lambda: len(refused) == 3, "three refusals")
    over.set()
    for thread in threads:
        thread.join()
    assert len(got) == 1
    assert all("is being written by process" in told for told in refused)


def test_a_lease_that_is_not_renewed_runs_out_and_its_holder_publishes_no_more(
    client, address, place, tmp_path
):
    old = local_run(place, tmp_path / "old", 4)
    first = mirror_of(address, old)
    assert first.publish()
    add_checkpoint(place, old, 8)
    second = taken(store_at(address / "job"), say=lambda text: None)  # waits until it has run out
    assert second.term == 2
    new = local_run(place, tmp_path / "new", 4)
    later = mirror_of(address, new, lease=second)
    later.take_over()
    with pytest.raises(LeaseLost, match="another launcher has taken this run over"):
        first.publish()
    assert newest_step(address) == 4  # what the late one has published does not count
    add_checkpoint(place, new, 8)
    assert later.publish()
    assert newest_step(address) == 8
    later.take_over()
    assert_same(brought_back(address, tmp_path / "back"), new)


# ---- uploads and their faults


class Killed(BaseException):
    """The process is gone."""


class Dying:
    """A driver whose process is killed at one of its requests, just before or just after it."""

    def __init__(self, driver, *, at, done):
        self._driver, self._at, self._done = driver, at, done
        self._counting = threading.Lock()
        self.requests = 0

    def __getattr__(self, name):
        request = getattr(self._driver, name)

        def counted(*told, **named):
            with self._counting:
                self.requests += 1
                number = self.requests
            if number < self._at or (number == self._at and self._done):
                answer = request(*told, **named)
            if number >= self._at:
                raise Killed
            return answer

        return counted


@pytest.mark.parametrize("done", [False, True], ids=["before", "after"])
def test_a_run_that_is_killed_at_any_request_leaves_a_good_checkpoint(place, tmp_path, done):
    address = Address("memory", f"killed-{done}")
    killed = 0
    for number in itertools.count(1):
        here = address / f"{number}"
        local = local_run(place, tmp_path / f"{number}", 4)
        mirror = mirror_of(here, local)
        assert mirror.publish()
        for step in (8, 12):
            add_checkpoint(place, local, step)
        shutil.rmtree(local.checkpoints / "step-00000004")  # keep is 2
        lease, driver = mirror._lease, Dying(mirror._store._driver, at=number, done=done)
        mirror._store = lease.store = Store(driver, here / "job")
        try:
            mirror.publish()
        except Killed:
            killed += 1
        back = brought_back(here, tmp_path / "back")  # verifies every byte
        assert checkpoints_in(back.checkpoints)[-1].step == newest_step(here)
        assert newest_step(here) in (4, 12)
        lease.store = store_at(here / "job")
        lease.release()  # which spares the wait until it has run out
        again = mirror_of(here, local, lease=taken(store_at(here / "job"), say=print))
        again.take_over()
        again.publish()
        assert_same(brought_back(here, tmp_path / "back"), local)
        store = store_at(here / "job")
        held = newest_published(store)
        assert set(store.sizes("data/")) == held.objects()  # nothing is left behind
        if driver.requests < number:
            break
    assert killed == number - 1 > 15


def test_uploads_go_on_through_every_fault(client, address, place, tmp_path, monkeypatch):
    draw = random.Random(23)
    harms = []
    local = local_run(place, tmp_path / "local", 4)
    said = []
    with Proxy(client) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.server.url)

        def harm(method, path):
            drawn = draw.choice(["drop", "lose", "cut", 500, 503, None, None, None, None, None])
            harms.append(drawn)
            return drawn

        uploading = uploading_of(address, local, said.append, patience_seconds=60.0)
        monkeypatch.setenv("AWS_ENDPOINT_URL", client.url)  # the test itself sees no harm
        proxy.harm = harm
        uploading.start(when_lost=lambda: said.append("lost"))
        until(lambda: newest_step(address) == 4, "step 4 in the store")
        add_checkpoint(place, local, 8)
        assert uploading.finish(lambda: DEADLINE_SECONDS) is None, said
        proxy.harm = lambda method, path: None
    assert len(set(harms)) == 6
    assert "lost" not in said
    assert_same(brought_back(address, tmp_path / "back"), local)


def test_a_stop_says_what_is_not_in_the_store(client, address, place, tmp_path, monkeypatch):
    local = local_run(place, tmp_path / "local", 4)
    said = []
    with Proxy(client) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.server.url)
        uploading = uploading_of(address, local, said.append)
        uploading.start(when_lost=lambda: None)
        until(lambda: newest_step(address) == 4, "step 4 in the store")
        proxy.harm = lambda method, path: 403 if method == "PUT" else None
        add_checkpoint(place, local, 8)
        until(lambda: said, "words about the missing right")
        failed = uploading.finish(lambda: 0.0)
    assert "no right to write objects" in said[0]
    assert "Training goes on" in said[0]
    assert failed is not None
    assert "step 4 is in the store, and step 8 is here" in str(failed)


def test_an_object_that_somebody_has_deleted_costs_one_checkpoint(client, address, place, tmp_path):
    local = local_run(place, tmp_path / "local", 4, 8)
    assert mirror_of(address, local).publish()
    store = store_at(address / "job")
    held = newest_published(store)
    assert held is not None
    store.remove([held.files["checkpoints/step-00000008/model.safetensors"][0].name])
    said = []
    assert bring_newest(store, held, tmp_path / "back", say=said.append) == "step-00000004"
    assert "lifecycle rule of the bucket" in said[0]


def test_rows_are_appended_in_few_objects_and_none_is_lost(client, address, place, tmp_path):
    local = local_run(place, tmp_path / "local", 4)
    mirror = mirror_of(address, local)
    content = local.metrics.read_bytes()
    for number in range(40):
        with local.metrics.open("ab") as file:
            file.write(b'{"step": %d, "torn' % (100 + number))
        mirror.publish()
        assert mirror.published is not None
        pieces = mirror.published.files["metrics.jsonl"]
        assert pieces[-1].end == len(content)  # not the half of a line
        assert len(pieces) <= 8
        local.metrics.write_bytes(content := content + b'{"step": %d}\n' % (100 + number))
    mirror.publish()
    bring_files(store_at(address / "job"), mirror.published, tmp_path / "back")
    assert (tmp_path / "back/metrics.jsonl").read_bytes() == content


def test_only_the_newest_checkpoint_is_brought_and_the_others_stay(
    client, address, place, tmp_path, monkeypatch
):
    local = local_run(place, tmp_path / "local", 4, 8)
    mirror = mirror_of(address, local)
    assert mirror.publish()
    mirror._lease.release()
    monkeypatch.setenv("EVENSTEP_SCRATCH", str(tmp_path / "scratch"))
    spec = load_spec(place / "job.yaml")
    uploading = brought(address / "job", spec, fresh=False, say=lambda text: None)
    [scratch] = (tmp_path / "scratch").iterdir()
    here = RunDirectory(scratch / "job")
    assert [each.step for each in checkpoints_in(here.checkpoints)] == [8]
    add_checkpoint(place, here, 12)
    uploading.start(when_lost=lambda: None)
    assert uploading.finish(lambda: DEADLINE_SECONDS) is None
    assert steps_in(address) == [8, 12]  # keep is 2
    assert damage_of(Checkpoint(here.checkpoints / "step-00000008", 8)) is None


# ---- commands that read


def test_runs_in_a_store_are_read_by_the_commands(client, address, place, tmp_path, monkeypatch):
    local = local_run(place, tmp_path / "local", 4, 8)
    assert mirror_of(address, local).publish()
    monkeypatch.chdir(tmp_path)
    at = f"{address}/job"
    told = said_by("runs", str(address))
    assert re.search(r"^job +done +24", told, re.MULTILINE), told
    assert re.findall(r"step +(\d+) .*good", said_by("checkpoints", at)) == ["4", "8"]
    said_by("export", at, "--checkpoint", "4", "-o", "remote.safetensors")
    said_by("export", local.path, "--checkpoint", "4", "-o", "local.safetensors")
    assert Path("remote.safetensors").read_bytes() == Path("local.safetensors").read_bytes()
    assert "job" in said_by("report", at)
    assert said_by("verify", at, local.path, "--level", "bits")
    for words, told in (
        (("export", at, "--checkpoint", "5", "-o", "a.safetensors"), "there is no '5'; .* 4, 8"),
        (("export", f"{address}/jab", "-o", "a.safetensors"), "no run .*jab; did you mean 'job'"),
    ):
        with pytest.raises(SpecError, match=told):
            said_by(*words)


def test_a_deleted_object_is_found_by_checkpoints(client, address, place, tmp_path):
    local = local_run(place, tmp_path / "local", 4, 8)
    mirror = mirror_of(address, local)
    assert mirror.publish()
    store = store_at(address / "job")
    store.remove([mirror.published.files["checkpoints/step-00000008/state.json"][0].name])
    told = said_by("checkpoints", f"{address}/job", code=1)
    assert re.search(r"step +4 .*good\nstep +8 +damaged: .*lifecycle rule", told), told


def said_by(*words, code=0):
    """What a command prints, in this process."""
    done = CliRunner().invoke(commands, [str(word) for word in words], standalone_mode=False)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == code, done.output
    return done.output


# ---- runs to upload


def local_run(place, directory, *steps):
    """A copy of the undisturbed run with the checkpoints of these steps only."""
    directory.mkdir()
    shutil.copytree(place / "runs/job", directory / "job")
    run = RunDirectory(directory / "job")
    for part in ("checkpoints", "logs", "failures"):
        shutil.rmtree(run.path / part, ignore_errors=True)
    for step in steps:
        add_checkpoint(place, run, step)
    return run


def add_checkpoint(place, run, step):
    """What a save does: a checkpoint appears whole."""
    name = f"step-{step:08d}"
    partial = run.checkpoints / f".{name}.partial-test"
    shutil.copytree(place / "runs/job/checkpoints" / name, partial)
    partial.rename(run.checkpoints / name)


def mirror_of(address, run, lease=None, patience_seconds=0.0):
    """The upload of a run, by one that has just got the lease."""
    lease = lease or taken(store_at(address / "job"), say=lambda text: None)
    store = lease.store
    store._patience_seconds = patience_seconds
    spec = load_spec(run.spec)
    return Mirror(
        store,
        lease,
        run,
        held=newest_published(store),
        scratch="test",
        spec=spec.checkpoint.model_copy(update={"keep": 2}),
        say=print,
    )


def uploading_of(address, run, say, patience_seconds=0.0):
    """The same beside training; it notes what it says."""
    from service.storage.beside import _Note

    mirror = mirror_of(address, run, patience_seconds=patience_seconds)
    return Uploading(mirror, mirror._lease, run, _Note(run, "test", published=False), say=say)


def store_at(address):
    """The store of an address; to make a client of S3 takes half a second, so it is made once."""
    key = (address.scheme, os.environ.get("AWS_ENDPOINT_URL"))
    if key not in drivers:
        drivers[key] = open_store(address)._driver
    return Store(drivers[key], address, patience_seconds=0.0)


drivers = {}


def newest_step(address):
    return max(steps_in(address), default=0)


def steps_in(address):
    """The steps of the checkpoints that the store holds."""
    held = newest_published(store_at(address / "job"))
    paths = held.files if held is not None else ()
    return sorted({int(path.split("/")[1][5:]) for path in paths if path.endswith("manifest.json")})


def brought_back(address, directory):
    """All that the store holds of a run, in a new directory; each checkpoint is good."""
    shutil.rmtree(directory, ignore_errors=True)
    store = store_at(address / "job")
    held = newest_published(store)
    assert held is not None
    run = RunDirectory(directory / "job")
    bring_files(store, held, run.path)
    for step in steps_in(address):
        bring_checkpoint(store, held, f"step-{step:08d}", run.path)
        damage = damage_of(Checkpoint(run.checkpoints / f"step-{step:08d}", step))
        assert damage is None, damage
    return run


def assert_same(one, other):
    """Two directories of a run hold the same files with the same bytes."""

    def content(run):
        files = (path for path in run.path.rglob("*") if path.is_file())
        paths = {path.relative_to(run.path): path for path in files}
        return {
            path: file.read_bytes()
            for path, file in paths.items()
            if path.name[0] != "." and path.parts[0] != "wandb"
        }

    assert content(one) == content(other)
