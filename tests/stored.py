"""A small job whose runs live in a store: runs to upload, and what the store holds of them."""

import json
import os
import re
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import BIN, CLEAN, DEADLINE_SECONDS, evenstep, start
from injuring import until
from stores import Server, s3_server

from service.basics.errors import PeerLost, SpecError
from service.runs.checkpoint_files import Checkpoint, checkpoints_in, damage_of
from service.runs.directory import RunDirectory, find_run
from service.runs.metrics_file import read_metrics
from service.runs.verification import compare
from service.spec.files import load_spec
from service.storage.beside import Uploading
from service.storage.bringing import bring_checkpoint, bring_files
from service.storage.lease import taken
from service.storage.mirror import Mirror
from service.storage.published import newest_published
from service.storage.scratch import Note
from service.storage.store import Store, open_store

TASK = """
import os
import time

import torch
from torch import nn

from service.data.task import supervised

HOLD_AT = [int(row) for row in os.environ.get("HOLD_AT_ROWS", "").split()]
GO_ON = os.environ.get("GO_ON_WITH", "")


class Rows:
    read = 0

    def __len__(self):
        return 43

    def __getitem__(self, row):
        Rows.read += 1
        for number, at in enumerate(HOLD_AT):
            while Rows.read > at and not os.path.exists(f"{GO_ON}{number}"):
                time.sleep(0.01)  # at the longest until it is killed
        return torch.tensor([row / 43.0]), int(row > 21)


def task():
    test = Rows() if "WITH_TEST_ROWS" in os.environ else None
    return supervised(
        model=lambda: nn.Linear(1, 2), train=Rows(), test=test, loss="cross_entropy"
    )
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


def make_job(directory):
    """Write the job, and train one undisturbed run of it in `runs`, with all its checkpoints."""
    (directory / "my_task.py").write_text(TASK)
    (directory / "job.yaml").write_text(json.dumps(SPEC))
    done = evenstep("run", "job.yaml", "checkpoint.keep=9", cwd=directory)
    assert done.returncode == 0, done.stderr


def run_through_a_kill(place, address, variables, tmp_path):
    """Kill a run in a store, and go on with it on an empty disk to the bits of the undisturbed run.

    Meanwhile a second launcher is refused, and after the kill the run is shown as lost. Returns
    what is in the store at the end, brought to another empty disk.
    """
    run = ("run", "job.yaml", "--runs", str(address))
    # A launcher is refused when it has seen the lease renewed: after a third of its duration.
    common = variables | {"EVENSTEP_LEASE_SECONDS": "6"}
    one = common | {"EVENSTEP_SCRATCH": str(tmp_path / "one"), "HOLD_AT_ROWS": "70"}
    two = common | {"EVENSTEP_SCRATCH": str(tmp_path / "two")}
    first = start(
        (BIN / "evenstep", *run),
        cwd=place,
        env=CLEAN | one,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        until(lambda: first.poll() is not None or newest_step(address) == 8, "step 8 in the store")
        refused = evenstep(*run, cwd=place, **two)
        pod = evenstep(*run, cwd=place, **two, PET_NNODES="1", JOB_COMPLETION_INDEX="0")
    finally:
        first.send_signal(signal.SIGKILL)
        told, _ = first.communicate(timeout=DEADLINE_SECONDS)
    assert first.returncode == -signal.SIGKILL, told
    assert refused.returncode == SpecError.exit_code, refused.stderr
    assert f"{address}/job is being written by process {first.pid} of " in refused.stderr
    assert pod.returncode == PeerLost.exit_code, pod.stderr  # a cluster starts it again
    listed = evenstep("runs", address, cwd=tmp_path, **common)
    assert re.search(r"^job +lost +", listed.stdout, re.MULTILINE), listed

    done = evenstep(*run, cwd=place, **two)
    assert done.returncode == 0, done.stderr
    assert "Resuming after step 8" in done.stdout
    assert f"Everything is in {address}/job." in done.stdout
    assert "WARNING" not in done.stdout + done.stderr  # such as of a store without conditions
    at_end = brought_back(address, tmp_path / "three")
    compared = compare(find_run(place / "runs/job"), at_end, level="bits", tolerance=0)
    assert compared.equal, compared.lines
    assert [row["step"] for row in read_metrics(at_end.metrics)] == [*range(1, 25)]
    assert [each.step for each in checkpoints_in(at_end.checkpoints)] == [20, 24]
    return at_end


def start_together(address):
    """Let four launchers start at the same moment: one gets the run, and three are refused."""
    got, refused, over = [], [], threading.Event()

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


def mirror_of(address, run, lease=None, patience_seconds=0.0, say=print):
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
        say=say,
    )


def uploading_of(address, run, say, patience_seconds=0.0):
    """The same beside training; it notes what it says."""
    mirror = mirror_of(address, run, patience_seconds=patience_seconds, say=say)
    return Uploading(mirror, mirror._lease, run, Note(run, "test"), say=say)


def store_at(address):
    """The store of an address; to make a client of S3 takes half a second, so it is made once."""
    key = (address.scheme, os.environ.get("AWS_ENDPOINT_URL"))
    if key not in drivers:
        drivers[key] = open_store(address)._driver
    return Store(drivers[key], address, patience_seconds=0.0)


drivers = {}


def newest_step(address):
    return max(steps_in(address), default=0)


def steps_in(address, name="job"):
    """The steps of the checkpoints that the store holds."""
    held = newest_published(store_at(address / name))
    paths = held.files if held is not None else ()
    return sorted({int(path.split("/")[1][5:]) for path in paths if path.endswith("manifest.json")})


def brought_back(address, directory, name="job"):
    """All that the store holds of a run, in a new directory; each checkpoint is good."""
    shutil.rmtree(directory, ignore_errors=True)
    store = store_at(address / name)
    held = newest_published(store)
    assert held is not None
    run = RunDirectory(directory / name)
    bring_files(store, held, run.path)
    for step in steps_in(address, name):
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


# Fixtures, which a file of tests takes over by their names: `place = stored.place`.


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A server that speaks S3."""
    with s3_server() as running:
        yield running


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the job, and one undisturbed run of it in `runs`."""
    directory = tmp_path_factory.mktemp("job")
    make_job(directory)
    return directory
