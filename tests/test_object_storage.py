"""Runs that live in an object store: a real server that speaks S3, and a proxy that does harm."""

import base64
import hashlib
import itertools
import json
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import stored
from click.testing import CliRunner
from commands import BIN, CLEAN, DEADLINE_SECONDS, command, evenstep, start
from injuring import descendants, is_alive, until
from stored import (
    Dying,
    Killed,
    add_checkpoint,
    assert_same,
    brought_back,
    local_run,
    mirror_of,
    newest_step,
    run_through_a_kill,
    start_together,
    steps_in,
    store_at,
    uploading_of,
)
from stores import BUCKET, DRIP_SECONDS, LISTED_AT_ONCE, Proxy, put_bucket, s3_server

from launch.cli import evenstep as commands
from launch.commands.doctor import Asked, _store
from service.basics.errors import EvenstepError, NoCheckpoint, SpecError
from service.drivers.endpoints import endpoint_of
from service.runs.checkpoint_files import Checkpoint, checkpoints_in, damage_of
from service.runs.directory import RunDirectory, find_run
from service.runs.metrics_file import read_metrics
from service.runs.verification import compare
from service.spec.files import load_spec
from service.storage.address import Address, address_in
from service.storage.beside import brought
from service.storage.bringing import bring_files, bring_newest
from service.storage.lease import is_abandoned, require_rights, taken
from service.storage.mirror import LeaseLost
from service.storage.published import newest_published
from service.storage.store import (
    _STANDING_SECONDS,
    NoObject,
    Store,
    StoreFailed,
    open_store,
)

pytest.importorskip("moto", reason="needs moto, flask and flask-cors")
pytest.importorskip("botocore", reason="needs botocore")

EMPTY_LIST = b"<ListBucketResult><IsTruncated>false</IsTruncated></ListBucketResult>"


server = stored.server
place = stored.place


@pytest.fixture
def client(server, monkeypatch):
    """The variables of a client of the server."""
    for name, value in server.variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("EVENSTEP_LEASE_SECONDS", "1.5")
    return server


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
    at_end = run_through_a_kill(place, address, server.variables, tmp_path)
    assert at_end.read_facts()["state"] == "done"
    run = ("run", "job.yaml", "--runs", str(address))
    scratch = {"EVENSTEP_SCRATCH": str(tmp_path / "one")}
    again = evenstep(*run, cwd=place, **server.variables, **scratch)
    assert again.returncode == 0, again.stderr
    assert "Nothing to do" in again.stdout


def under_torchrun(place, address, scratch, client, *words, **variables):
    """Start the job on two processes of torchrun, with this scratch directory."""
    command = (BIN / "torchrun", "--standalone", "--nproc-per-node", "2", "-m", "launch", "run")
    variables |= client.variables | {"EVENSTEP_SCRATCH": str(scratch)}
    return start(
        (*command, "job.yaml", TWO, *words, "--runs", str(address)),
        cwd=place,
        env=CLEAN | variables | {"EVENSTEP_LEASE_SECONDS": "1.5"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


TWO = "batch={global_batch: 7, micro_batch: 4}"


def test_a_run_of_torchrun_goes_on_with_the_same_bits_after_a_kill(
    place, address, client, tmp_path
):
    whole = evenstep("run", "job.yaml", TWO, "--processes", "2", "--runs", "two", cwd=place)
    assert whole.returncode == 0, whole.stderr
    hold = {"HOLD_AT_ROWS": "40", "GO_ON_WITH": str(tmp_path / "never")}
    killed = under_torchrun(place, address, tmp_path / "a", client, **hold)
    try:
        until(lambda: newest_step(address) == 8, "step 8 in the store", of=killed)
        below = descendants(killed.pid)
        assert len(below) > 2, "rank 0, its child and rank 1"
    finally:
        killed.send_signal(signal.SIGKILL)
        told, _ = killed.communicate(timeout=DEADLINE_SECONDS)
    until(lambda: not any(map(is_alive, below)), "the end of all that it started")

    done = under_torchrun(place, address, tmp_path / "b", client)
    told, _ = done.communicate(timeout=DEADLINE_SECONDS)
    assert done.returncode == 0, told
    assert "Resuming after step 8" in told
    assert f"Everything is in {address}/job." in told
    at_end = brought_back(address, tmp_path / "end")
    compared = compare(find_run(place / "two/job"), at_end, level="bits", tolerance=0)
    assert compared.equal, compared.lines
    assert [row["step"] for row in read_metrics(at_end.metrics)] == [*range(1, 25)]


def test_fresh_starts_over_once_in_a_torchrun_that_restarts(place, address, client, tmp_path):
    scratch = tmp_path / "a"
    earlier = ("run", "job.yaml", "length.steps=28", "--runs", str(address))
    done = evenstep(*earlier, cwd=place, EVENSTEP_SCRATCH=str(scratch), **client.variables)
    assert done.returncode == 0, done.stderr
    hold = {"HOLD_AT_ROWS": "40", "GO_ON_WITH": str(tmp_path / "go-"), "PET_MAX_RESTARTS": "1"}
    agent = under_torchrun(place, address, scratch, client, "--fresh", **hold)
    try:
        until(lambda: newest_step(address) == 8, "step 8 of the new run in the store", of=agent)
        (child,) = (each for each in descendants(agent.pid) if brought_to(each))
        (tmp_path / "go-0").touch()
        os.kill(child, signal.SIGKILL)
        told, _ = agent.communicate(timeout=DEADLINE_SECONDS)
    finally:
        agent.kill()
    assert agent.returncode == 0, told
    assert "Resuming after step" in told, told
    at_end = brought_back(address, tmp_path / "end")
    assert [attempt["from_step"] > 0 for attempt in at_end.read_facts()["attempts"]] == [0, 1]
    assert len(list(scratch.glob("*/.job-*/run.json"))) == 1, "the earlier run"


def on_nodes_of_torchrun(place, address, scratch, client, *more, **variables):
    """Start the job under torchrun on two nodes, each with its own scratch directory."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    job = ("--nnodes", "2", "--nproc-per-node", "1", "--rdzv-id", "job", "--max-restarts", "3")
    meeting = ("--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}")
    words = ("--monitor-interval", "0.1", "-m", "launch", "run", "job.yaml", TWO, *more)
    variables |= client.variables | {"EVENSTEP_LEASE_SECONDS": "1.5"}
    return [
        start(
            (BIN / "torchrun", *job, *meeting, *words, "--runs", str(address)),
            cwd=place,
            env=CLEAN | variables | {"EVENSTEP_SCRATCH": str(scratch / str(index))},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in (0, 1)
    ]


@pytest.mark.parametrize("mode", ["ddp", "sharded"])
def test_two_nodes_of_torchrun_go_on_with_the_same_bits_after_kills(
    place, address, client, tmp_path, mode
):
    """First rank 1 is killed, which torchrun restarts; then all, and both disks are lost."""
    words = (f"exchange={{mode: {mode}}}",)
    two = ("--processes", "2", "--runs", f"two-{mode}")
    whole = evenstep("run", "job.yaml", TWO, *words, *two, cwd=place)
    assert whole.returncode == 0, whole.stderr
    hold = {"HOLD_AT_ROWS": "40 44", "GO_ON_WITH": str(tmp_path / "go-")}
    nodes = on_nodes_of_torchrun(place, address, tmp_path / "a", client, *words, **hold)
    try:
        until(lambda: newest_step(address) == 8, "step 8 in the store", of=nodes[0])
        for process in [each for node in nodes for each in descendants(node.pid)]:
            if b"\0RANK=1\0" in Path(f"/proc/{process}/environ").read_bytes():
                os.kill(process, signal.SIGKILL)
        (tmp_path / "go-0").touch()
        until(lambda: newest_step(address) == 16, "step 16 in the store", of=nodes[0])
        below = [each for node in nodes for each in descendants(node.pid)]
    finally:
        for node in nodes:
            node.send_signal(signal.SIGKILL)
        told = [node.communicate(timeout=DEADLINE_SECONDS)[0] for node in nodes]
    assert all("Resuming after step 8" in text or "Brought" in text for text in told), told
    until(lambda: not any(map(is_alive, below)), "the end of all that they started")

    nodes = on_nodes_of_torchrun(place, address, tmp_path / "b", client, *words)
    told = [node.communicate(timeout=DEADLINE_SECONDS)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], told
    assert "Resuming after step 16" in "".join(told)
    assert all("(step-00000016) in" in text for text in told), "each brings it"
    at_end = brought_back(address, tmp_path / "end")
    compared = compare(find_run(place / f"two-{mode}/job"), at_end, level="bits", tolerance=0)
    assert compared.equal, compared.lines
    assert [row["step"] for row in read_metrics(at_end.metrics)] == [*range(1, 25)]
    assert len(list((tmp_path / "b").glob("*/*-node-1/job/logs"))) == 1


def test_torchrun_tests_a_run_with_one_copy_for_each_machine(place, address, client, tmp_path):
    assert mirror_of(address, local_run(place, tmp_path / "local", 4, 8)).publish()
    variables = client.variables | {"WITH_TEST_ROWS": "1"}
    variables["EVENSTEP_SCRATCH"] = str(tmp_path / "scratch")
    # Not in tmp_path, whose path may be too long for the sockets of processes.
    with Proxy(client) as proxy, tempfile.TemporaryDirectory() as temporary:
        variables["TMPDIR"] = temporary
        alone = evenstep("test", f"{address}/job", cwd=place, **variables)
        assert alone.returncode == 0, alone.stderr
        done = command(
            *(BIN / "torchrun", "--standalone", "--nproc-per-node", "2", "-m", "launch"),
            *("test", f"{address}/job"),
            cwd=place,
            timeout=DEADLINE_SECONDS,
            **(variables | {"AWS_ENDPOINT_URL": proxy.server.url}),
        )
        assert done.returncode == 0, done.stderr
        read = [path for method, path in proxy.seen if path.endswith("/manifest.json")]
        left = [*(tmp_path / "scratch").iterdir(), *Path(temporary).glob("evenstep-*")]
    assert json.loads(done.stdout) == pytest.approx(json.loads(alone.stdout))
    assert len(read) == 1, "one process has brought it"
    assert not left


def brought_to(process):
    """Whether it is the child that trains as rank 0."""
    return b"EVENSTEP_BROUGHT_TO=" in Path(f"/proc/{process}/environ").read_bytes()


def test_a_run_that_fresh_began_gets_no_checkpoint_of_the_one_before(
    place, address, client, tmp_path, monkeypatch
):
    """It ended before anything of it was published."""
    variables = client.variables | {"EVENSTEP_SCRATCH": str(tmp_path / "scratch")}
    monkeypatch.setenv("EVENSTEP_SCRATCH", str(tmp_path / "scratch"))
    earlier = evenstep("run", "job.yaml", "--runs", address, cwd=place, **variables)
    assert earlier.returncode == 0, earlier.stderr
    (there,) = (tmp_path / "scratch").glob("*/job")
    there.rename(tmp_path / "aside")  # as --fresh does
    begun = local_run(place, tmp_path / "begun")
    begun.path.rename(there)
    spec = load_spec(place / "job.yaml")
    uploading = brought(address / "job", spec, fresh=False, say=print)
    uploading.abandon()
    assert checkpoints_in(RunDirectory(there).checkpoints) == []


def test_a_stop_of_torchrun_is_saved_and_uploaded(place, address, client, tmp_path):
    long = ("length.steps=100000", "checkpoint.every_steps=100", "tracking.log_every_steps=100")
    stopped = under_torchrun(place, address, tmp_path / "a", client, *long)
    try:
        until(lambda: newest_step(address), "a step in the store", of=stopped)
        stopped.send_signal(signal.SIGTERM)
    except BaseException:
        stopped.kill()
        raise
    told, _ = stopped.communicate(timeout=DEADLINE_SECONDS)
    assert f"Everything is in {address}/job." in told
    at_end = brought_back(address, tmp_path / "end")
    facts = at_end.read_facts()
    assert facts["state"] == "stopped"
    assert facts["attempts"][-1]["to_step"] == newest_step(address)
    assert json.loads(store_at(address / "job").get("lease/000001.json"))["released"]


def without(directory):
    """What starts a command to which this directory is empty, where root may do so."""
    directory.mkdir(parents=True)
    hide = ("unshare", "--mount", "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', directory)
    if os.geteuid() or shutil.which("unshare") is None:
        return ()
    return hide if subprocess.run((*hide, "true"), capture_output=True).returncode == 0 else ()


def on_nodes(place, address, scratch, server, port, *words):
    """Run the job on two nodes, each with its own scratch directory; the outputs and codes."""
    command = [BIN / "evenstep", "run", "job.yaml", *words, "--runs", str(address)]
    before = [(), without(scratch / "0")]  # node 1 must not write on the disk of node 0
    nodes = [
        start(
            (*before[index], *command),
            cwd=place,
            env=CLEAN
            | server.variables
            | {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "1", "PET_NODE_RANK": str(index)}
            | {"PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": str(port)}
            | {"EVENSTEP_SCRATCH": str(scratch / str(index)), "EVENSTEP_LEASE_SECONDS": "1.5"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in (0, 1)
    ]
    outputs = [node.communicate(timeout=DEADLINE_SECONDS)[0] for node in nodes]
    return outputs, [node.returncode for node in nodes]


@pytest.mark.parametrize("mode", ["ddp", "sharded"])
def test_two_nodes_without_a_shared_disk_go_on_with_the_same_bits_on_empty_disks(
    place, address, client, tmp_path, mode
):
    def port():
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            return free.getsockname()[1]

    two = (TWO, f"exchange={{mode: {mode}}}")
    whole = on_nodes(place, address / "whole", tmp_path / "w", client, port(), *two)
    assert whole[1] == [0, 0], whole[0]
    cut = on_nodes(place, address / "cut", tmp_path / "a", client, port(), *two, "--stop-at", "9")
    assert cut[1] == [75, 75], cut[0]
    scratch = tmp_path / "b"
    assert not scratch.exists(), "both disks are empty"
    done = on_nodes(place, address / "cut", scratch, client, port(), *two)
    assert done[1] == [0, 0], done[0]
    assert "Brought" in done[0][1], done[0][1]
    assert "(step-00000009)" in done[0][1]
    late = on_nodes(place, address / "cut", tmp_path / "c", client, port(), *two)
    assert late[1] == [0, 0], late[0]
    assert "Nothing to do" in late[0][1]
    ends = [brought_back(address / name, tmp_path / name) for name in ("whole", "cut")]
    compared = compare(*ends, level="bits", tolerance=0)
    assert compared.equal, compared.lines


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
def test_a_missing_driver_is_named_with_what_installs_it(scheme, told, monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)  # as where it is not installed
    with pytest.raises(SpecError, match=told):
        open_store(Address(scheme, "bucket/runs"))


def test_a_missing_bucket_is_named(client):
    with pytest.raises(SpecError, match="s3://no-such-bucket/runs: the bucket does not exist"):
        require_rights(open_store(Address("s3", "no-such-bucket/runs")), say=print)


@pytest.mark.parametrize(
    ("method", "verb"),
    [
        ("PUT", "write"),
        ("GET", "read"),
        ("HEAD", "read"),
        ("LIST", "list"),
        ("DELETE", "delete"),
    ],
)
def test_a_missing_right_is_named(client, address, monkeypatch, method, verb):
    with Proxy(client) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.server.url)
        proxy.harm = lambda m, path: (
            403 if method == ("LIST" if "list-type" in path else m) else None
        )
        with pytest.raises(SpecError, match=f"no right to {verb} objects"):
            require_rights(open_store(address), say=print)


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("RequestTimeTooSkewed", "clock of this machine"),
        ("PermanentRedirect", "another region, or at another endpoint"),
        ("ExpiredToken", "session token has expired"),
        ("NotImplemented", "the store does not know a request that runs need"),
        ("AuthorizationHeaderMalformed", "another region"),
        ("IllegalLocationConstraintException", "another region"),
        ("InvalidAccessKeyId", "does not know this access key"),
        ("InvalidObjectState", "in an archive, to which a lifecycle rule"),
        ("SignatureDoesNotMatch", "secret key does not fit"),
    ],
)
def test_what_the_store_says_is_said_in_words(client, address, monkeypatch, code, told):
    with Proxy(client) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.server.url)
        # A client asks for the region of the bucket by HEAD, and follows the answer.
        proxy.harm = lambda method, path: code if method != "HEAD" else None
        with pytest.raises(SpecError, match=told):
            require_rights(open_store(address), say=print)


def test_missing_credentials_are_named(client, address, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(SpecError, match=r"no credentials were found.*AWS_ACCESS_KEY_ID"):
        require_rights(open_store(address), say=print)


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (405, "what answers is perhaps no object store"),
        ("nonsense", "Invalid endpoint: nonsense. Correct AWS_ENDPOINT_URL"),
        ("https", "what answers is perhaps no object store"),
        ("http://no-such-host.invalid", "cannot be reached"),
    ],
)
def test_an_endpoint_that_is_no_store_is_named(client, address, monkeypatch, answer, told):
    with Proxy(client) as proxy:
        url = proxy.server.url if answer == 405 else answer
        url = proxy.server.url.replace("http", "https") if answer == "https" else url
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        proxy.harm = lambda method, path: answer
        with pytest.raises((SpecError, StoreFailed), match=told):
            require_rights(open_store(address, patience_seconds=0.0), say=print)


def test_a_store_whose_listings_are_late_is_refused(client, address, monkeypatch):
    with Proxy(client) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.server.url)
        proxy.harm = lambda method, path: EMPTY_LIST if "list-type" in path else None
        with pytest.raises(SpecError, match="a store in which a write is visible at once"):
            require_rights(open_store(address), say=print)


def test_a_list_that_lacks_what_was_uploaded_publishes_nothing(
    client, address, place, tmp_path, monkeypatch
):
    local = local_run(place, tmp_path / "local", 4)
    with Proxy(client) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.server.url)
        mirror = mirror_of(address, local)
        proxy.harm = lambda method, path: EMPTY_LIST if "%2Fdata%2F" in path else None
        told = r"objects did not arrive as they were sent, such as data/.*; they are sent again"
        with pytest.raises(EvenstepError, match=told):
            mirror.publish()
        assert newest_published(store_at(address / "job")) is None
        proxy.harm = lambda method, path: None
        assert mirror.publish()
        assert_same(brought_back(address, tmp_path / "back"), local)
        proxy.harm = lambda method, path: (
            "NoSuchKey" if method == "GET" and "/published/" in path else None
        )
        told = "lists this object, but does not give it. Listings of this store may be out of date"
        with pytest.raises(NoCheckpoint, match=told):
            newest_published(store_at(address / "job"))


def test_a_store_without_conditional_writes_is_named(client, address, monkeypatch):
    said = []
    with Proxy(client) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.server.url)
        proxy.ignored = {"if-none-match"}
        require_rights(open_store(address), say=said.append)
    assert "this store has no conditional writes" in said[0]


def test_what_the_bucket_does_by_itself_is_told(client, place, tmp_path):
    store = open_store(Address("s3", "with-rules/runs/job"))
    put_bucket(client.port, "with-rules")
    assert not list(store.rules())
    store._driver.call_s3(
        "put_bucket_versioning",
        Bucket="with-rules",
        VersioningConfiguration={"Status": "Enabled"},
    )

    def expiring(prefix, **what):
        rule = {"ID": f"old {prefix}", "Status": "Enabled", "Filter": {"Prefix": prefix}}
        return rule | (what or {"Expiration": {"Days": 30}})

    rules = [
        expiring("logs/"),
        expiring("runs/"),
        expiring("runs/job/", NoncurrentVersionExpiration={"NoncurrentDays": 3}),
    ]
    store._driver.call_s3(
        "put_bucket_lifecycle_configuration",
        Bucket="with-rules",
        LifecycleConfiguration={"Rules": rules},
    )
    versions, lifecycle = store.rules()
    assert "the bucket keeps versions" in versions
    assert "the lifecycle rule 'old runs/' of the bucket deletes objects here" in lifecycle

    address = Address("s3", "with-rules/runs")  # and such a bucket holds runs as any other
    local = local_run(place, tmp_path / "local", 4, 8)
    mirror = mirror_of(address, local)
    mirror.publish()
    shutil.rmtree(local.checkpoints / "step-00000004")
    add_checkpoint(place, local, 12)
    mirror.publish()
    assert steps_in(address) == [8, 12]
    assert_same(brought_back(address, tmp_path / "back"), local)


def test_a_store_that_does_not_answer_is_named(client, address, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StoreFailed, match=r"cannot be reached.*AWS_ENDPOINT_URL"):
        require_rights(open_store(address, patience_seconds=0.1), say=print)


# ---- the requests to S3


def test_a_list_of_many_pages_is_whole_and_holds_no_neighbours(client, address):
    store = store_at(address)
    names = {f"rows/{number:02}" for number in range(2 * LISTED_AT_ONCE + 1)} | {"rows/deep/er"}
    for name in (*names, "rows", "rows-not", "row/s", "single", "single-not"):
        store.put(name, name.encode())
    assert store.sizes("rows/") == {name: len(name) for name in names}
    assert store.sizes("single") == {"single": len("single")}
    assert store.sizes("nothing") == store.sizes("nothing/") == {}
    assert store.children() == ["row", "rows", "rows-not", "single", "single-not"]
    bucket = store_at(Address("s3", BUCKET))
    assert address.path.partition("/")[2] in bucket.children()
    assert f"{address.path.partition('/')[2]}/rows/deep/er" in bucket.sizes("")


def test_bytes_of_an_object_are_those_between_two_positions(client, address):
    store, content = store_at(address), random.Random(3).randbytes(300_000)
    store.put("object", content)
    assert store.get("object") == content
    assert store.get_range("object", 7, 299_000) == content[7:299_000]
    assert store.get_range("object", 299_990, 400_000) == content[299_990:]
    assert store.get_range("object", 400_000, 400_010) == b""
    assert store.get_range("object", 5, 5) == b""
    for asked in (store.get, store.modified, lambda name: store.get_range(name, 0, 9)):
        with pytest.raises(NoObject):
            asked("no-object")


def test_a_body_is_signed_where_the_configuration_says_so(client, address, monkeypatch, tmp_path):
    settings = "[default]\ns3 =\n  payload_signing_enabled = true\n"
    (tmp_path / "config").write_text(settings)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    content = random.Random(1).randbytes(1000)
    with Proxy(client) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.server.url)
        open_store(address).put("object", content)
    [sent] = proxy.headers
    assert sent["x-amz-content-sha256"] == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("size", [100, 300_000], ids=["small", "large"])
def test_the_store_gets_the_hash_of_what_it_is_to_keep(client, address, monkeypatch, size):
    content, sent = random.Random(size).randbytes(size), []
    digest = hashlib.sha256(content)
    told = base64.b64encode(digest.digest()).decode()
    with Proxy(client) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.server.url)
        for setting, known in (("when_supported", digest.hexdigest()), ("when_required", None)):
            monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", setting)
            store = open_store(address)
            store.put("object", content, sha256=known)
            assert store.get("object") == content
            assert [method for method, _ in proxy.seen] == ["PUT", "GET"], "one request for each"
            sent.append(proxy.headers[0])
            proxy.seen.clear()
            proxy.headers.clear()
    assert sent[0]["x-amz-checksum-sha256"] == told
    assert "x-amz-checksum-sha256" in sent[0]["authorization"], "nobody else can have set it"
    assert not any("checksum" in name for name in sent[1])
    assert sent[1]["x-amz-content-sha256"] == digest.hexdigest()


def test_a_large_object_that_takes_too_long_is_given_up(client, address, monkeypatch):
    monkeypatch.setattr("service.storage.store._ANSWER_SECONDS", -1.0)
    monkeypatch.setattr("service.storage.store._LEAST_BYTES_PER_SECOND", 1e9)
    store = Store(store_at(address)._driver, address, patience_seconds=0.0)
    store.put("object", bytes(40_000))  # these are sent at once
    with pytest.raises(StoreFailed, match="did not answer a request to write in time"):
        store.put("object", bytes(300_000))
    assert store.sizes("object") == {"object": 40_000}


def reads_of(store, copy):
    """The ways to read the object, which has 300,000 bytes."""
    return (
        lambda: store.get("object"),
        lambda: store.get_range("object", 0, 300_000),
        lambda: store.copy("object", copy.fileno(), begin=0, end=300_000),
    )


def test_an_object_that_drips_is_given_up(client, address, monkeypatch, tmp_path):
    store_at(address).put("object", bytes(300_000))
    monkeypatch.setattr("service.storage.store._ANSWER_SECONDS", 10 * DRIP_SECONDS)
    monkeypatch.setattr("service.storage.store._LEAST_BYTES_PER_SECOND", 1e9)
    with Proxy(client) as proxy, (tmp_path / "copy").open("wb") as copy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.server.url)
        proxy.harm = lambda method, path: "drip"
        store = open_store(address, patience_seconds=0.0)
        for asked in reads_of(store, copy):
            with pytest.raises(StoreFailed, match="did not answer a request to read in time"):
                asked()  # all of it would take four hours


def test_an_answer_of_unknown_length_is_read_to_its_end(client, address, monkeypatch):
    content = random.Random(0).randbytes(300_000)
    store_at(address).put("object", content)
    with Proxy(client) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.server.url)
        proxy.harm = lambda method, path: "chunk"
        assert open_store(address, patience_seconds=0.0).get("object") == content


def test_an_answer_that_is_cut_is_no_content(client, address, monkeypatch, tmp_path):
    store_at(address).put("object", bytes(300_000))
    with Proxy(client) as proxy, (tmp_path / "copy").open("wb") as copy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.server.url)
        proxy.harm = lambda method, path: "cut"
        store = open_store(address, patience_seconds=0.0)
        for asked in reads_of(store, copy):
            with pytest.raises(StoreFailed, match="the answer ended 150,000 bytes before its end"):
                asked()


def test_a_copy_stays_within_its_place_and_tells_what_was_there(client, address, tmp_path):
    store, content = store_at(address), random.Random(5).randbytes(700_000)
    store.put("object", content)
    with (tmp_path / "copy").open("wb") as copy:
        copy.write(b"." * 1_000_000)
        copy.flush()
        sha256 = hashlib.sha256(content).hexdigest()
        assert store.copy("object", copy.fileno(), begin=7, end=700_007) == (700_000, sha256)
        inside = store.copy("object", copy.fileno(), begin=800_000, end=800_005)
        assert inside == (700_000, sha256)
    written = b"." * 7 + content + b"." * 99_993 + content[:5] + b"." * 199_995
    assert (tmp_path / "copy").read_bytes() == written


def test_a_disk_that_takes_nothing_is_no_fault_of_the_store(client, address):
    store = Store(store_at(address)._driver, address, patience_seconds=DEADLINE_SECONDS)
    store.put("object", bytes(300_000))
    with open("/dev/full", "wb") as full, pytest.raises(OSError, match="No space left"):
        store.copy("object", full.fileno(), begin=0, end=300_000)


def test_a_profile_that_does_not_exist_is_named(client, address, monkeypatch):
    monkeypatch.setenv("AWS_PROFILE", "no-such-profile")
    with pytest.raises(SpecError, match=r"no-such-profile.* could not be found"):
        open_store(address)


# ---- leases


def test_of_launchers_that_start_together_one_gets_the_run(client, address, monkeypatch):
    monkeypatch.setenv("EVENSTEP_LEASE_SECONDS", "60")  # on a busy machine 1.5 s run out
    start_together(address)


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
    for module in ("store", "beside"):  # the same tries, in less time
        monkeypatch.setattr(f"service.storage.{module}._FIRST_PAUSE_SECONDS", 0.02)
        monkeypatch.setattr(f"service.storage.{module}._LONGEST_PAUSE_SECONDS", 0.2)
    draw = random.Random(23)
    harms = []
    local = local_run(place, tmp_path / "local", 4)
    said = []
    with Proxy(client) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.server.url)

        def harm(method, path):
            drawn = draw.choice(["drop", "lose", "cut", 500, 503, 0.2, *[None] * 6])
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
    assert len(set(harms)) == 7
    assert "lost" not in said
    monkeypatch.setenv("AWS_ENDPOINT_URL", client.url)  # the proxy has ended
    assert_same(brought_back(address, tmp_path / "back"), local)


def test_an_upload_of_which_nothing_is_taken_is_made_again(
    client, address, place, tmp_path, monkeypatch
):
    monkeypatch.setattr("service.storage.store._STANDING_SECONDS", 1.0)
    local, stalled = local_run(place, tmp_path / "local", 4), []
    local.logged.mkdir(exist_ok=True)
    (local.logged / "large.bin").write_bytes(random.Random(1).randbytes(12 << 20))

    def harm(method, path):
        if method == "PUT" and "large.bin" in path and not stalled:
            stalled.append(path)
            return "stall"
        return None

    with Proxy(client) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.server.url)
        uploading = uploading_of(address, local, print, patience_seconds=60.0)
        proxy.harm = harm
        uploading.start(when_lost=lambda: None)
        assert uploading.finish(lambda: DEADLINE_SECONDS) is None
    assert stalled
    monkeypatch.setenv("AWS_ENDPOINT_URL", client.url)  # the proxy has ended
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


@pytest.mark.parametrize(
    ("words", "at", "number", "code"),
    [
        (("run", "job.yaml", "--runs", "{runs}"), "/data/", signal.SIGTERM, 75),
        (("run", "job.yaml", "--runs", "{runs}"), "/data/", signal.SIGINT, 130),
        (("run", "job.yaml", "--runs", "{runs}"), "", signal.SIGTERM, 75),
        (("test", "{runs}/job"), "/data/", signal.SIGTERM, 75),
        (("sweep", "job.yaml", "seed=0,1", "--runs", "{runs}"), "", signal.SIGTERM, 75),
        (("checkpoints", "{runs}/job"), "/data/", signal.SIGINT, 130),
    ],
)
def test_a_stop_waits_for_no_store_that_stands_still(
    client, address, place, tmp_path, words, at, number, code
):
    mirror_of(address, local_run(place, tmp_path / "local", 4)).publish()
    stalled = threading.Event()

    def harm(method, path):
        if at in path:
            stalled.set()
        return "stall" if stalled.is_set() else None

    with Proxy(client) as proxy:
        proxy.harm = harm
        variables = client.variables | {"AWS_ENDPOINT_URL": proxy.server.url}
        with start(
            (BIN / "evenstep", *(word.format(runs=address) for word in words)),
            cwd=place,
            env=CLEAN | variables | {"EVENSTEP_SCRATCH": str(tmp_path / "scratch")},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            try:
                until(stalled.is_set, "a request that stands still", of=process)
                process.send_signal(number)
                told, _ = process.communicate(timeout=_STANDING_SECONDS / 2)
            finally:
                process.kill()
    assert process.returncode == code, told
    assert "Traceback" not in told
    assert number == signal.SIGINT or "Stopped by SIGTERM before" in told


def test_one_address_at_two_endpoints_is_two_runs(client, address, place, tmp_path):
    run = ("run", "job.yaml", "length.steps=4", "--runs", str(address))
    scratch = {"EVENSTEP_SCRATCH": str(tmp_path / "scratch")}
    with s3_server() as other:
        for server in (client, other):
            done = evenstep(*run, cwd=place, **server.variables, **scratch)
            assert done.returncode == 0, done.stderr
            assert "Nothing to do" not in done.stdout
            assert "WARNING" not in done.stderr
    facts = [json.loads(each.read_text()) for each in (tmp_path / "scratch").glob("*/job/run.json")]
    assert len({each["id"] for each in facts}) == 2


CONFIGURED = """
[default]
endpoint_url = {one}
[profile other]
services = ours
[services ours]
s3 =
  endpoint_url = {two}
"""


def test_an_endpoint_is_found_wherever_it_is_set(tmp_path, monkeypatch):
    one, two = "http://127.0.0.1:1", "http://127.0.0.1:2/"
    (tmp_path / "config").write_text(CONFIGURED.format(one=one, two=two))
    names = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_PROFILE", "STORAGE_EMULATOR_HOST")
    for name in (*names, "AZURE_STORAGE_CONNECTION_STRING", "AZURE_STORAGE_ACCOUNT_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    assert [endpoint_of(scheme) for scheme in ("s3", "gs", "az", "memory")] == [""] * 4
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    assert endpoint_of("s3") == one
    monkeypatch.setenv("AWS_PROFILE", "other")
    assert endpoint_of("s3") == two.rstrip("/")
    monkeypatch.setenv("AWS_PROFILE", "missing")
    assert endpoint_of("s3") == ""
    monkeypatch.setenv("AWS_ENDPOINT_URL", one)
    assert endpoint_of("s3") == one
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", two)
    assert endpoint_of("s3") == two.rstrip("/")
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", "AccountName=a;AccountKey=b;Suffix=c")
    assert endpoint_of("az") == "accountname=a;suffix=c"


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


def test_rows_are_appended_in_few_objects_and_none_is_lost(place, tmp_path):
    address, local = Address("memory", "appended"), local_run(place, tmp_path / "local", 4)
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


def test_a_fork_in_a_store_goes_on_from_the_checkpoint_of_the_other_run(
    client, address, place, tmp_path, monkeypatch
):
    monkeypatch.chdir(place)
    monkeypatch.setenv("EVENSTEP_SCRATCH", str(tmp_path / "one"))
    assert mirror_of(address, local_run(place, tmp_path / "local", 4, 8)).publish()
    before = store_at(address / "job").sizes("")
    told = said_by("fork", f"{address}/job", "--at", "latest", "--name", "other")
    assert f"{address}/other: a fork of {address}/job after step 8. Continue with:" in told
    words = shlex.split(told.splitlines()[1])
    assert words[-2:] == ["--runs", str(address)]
    with pytest.raises(SpecError, match=f"--name: {address}/other exists"):
        said_by("fork", f"{address}/job", "--at", "4", "--name", "other")
    assert store_at(address / "job").sizes("") == before, "the source is not changed"
    shutil.copy(words[2], tmp_path / "other.yaml")
    again = ("run", tmp_path / "other.yaml", "--runs", address)
    elsewhere = client.variables | {"EVENSTEP_SCRATCH": str(tmp_path / "two")}
    done = evenstep(*again, cwd=place, **elsewhere)
    assert done.returncode == 0, done.stderr
    assert "Resuming after step 8" in done.stdout
    at_end = brought_back(address, tmp_path / "end", name="other")
    compared = compare(find_run(place / "runs/job"), at_end, level="bits", tolerance=0)
    assert compared.equal, compared.lines
    assert at_end.read_facts()["forked_from"]["step"] == 8


def test_a_fork_in_a_store_has_the_best_checkpoint_too(
    client, address, place, tmp_path, monkeypatch
):
    monkeypatch.chdir(place)
    monkeypatch.setenv("EVENSTEP_SCRATCH", str(tmp_path / "scratch"))
    # The loss falls, so the first test is the best one.
    words = ("test={every_steps: 4}", "checkpoint.best={measure: test/loss, mode: max}")
    run = ("run", "job.yaml", *words, "--runs", address)
    scratch = {"WITH_TEST_ROWS": "1", "EVENSTEP_SCRATCH": str(tmp_path / "scratch")}
    done = evenstep(*run, cwd=place, **client.variables, **scratch)
    assert done.returncode == 0, done.stderr
    said_by("fork", f"{address}/job", "--at", "latest", "--name", "other")
    assert steps_in(address, "other") == [4, 24]


def test_a_fork_that_cannot_be_uploaded_leaves_nothing_here(
    client, address, place, tmp_path, monkeypatch
):
    monkeypatch.setenv("EVENSTEP_SCRATCH", str(tmp_path / "one"))
    assert mirror_of(address, local_run(place, tmp_path / "local", 4)).publish()
    with Proxy(client) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.server.url)
        proxy.harm = lambda method, path: 403 if "/other/data" in path and method == "PUT" else None
        with pytest.raises(SpecError, match="no right to write objects"):
            said_by("fork", f"{address}/job", "--at", "4", "--name", "other")
        proxy.harm = lambda method, path: None
        assert not list((tmp_path / "one").glob("*/other"))
        said_by("fork", f"{address}/job", "--at", "4", "--name", "other")
        assert newest_published(store_at(address / "other")) is not None


def test_plan_of_a_run_in_a_store_makes_no_request(client, address, place, tmp_path, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setenv("EVENSTEP_SCRATCH", str(tmp_path / "scratch"))
    with Proxy(client) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.server.url)
        told = said_by("plan", "job.yaml", "--runs", address)
    assert re.search(r"a stop takes +.*MB/s of this disk", told), told
    assert proxy.seen == []


def test_doctor_tries_the_store_of_the_runs(client, address, place, tmp_path, monkeypatch):
    scratch = {"EVENSTEP_SCRATCH": str(tmp_path)} | client.variables
    done = evenstep("doctor", "--runs", address, "--json", cwd=place, **scratch)
    (found,) = (each for each in json.loads(done.stdout) if each["name"] == "store")
    assert found["state"] == "ok", found
    assert f"objects of {address} can be written, read and deleted" in found["told"]
    assert not store_at(address).sizes("")
    with Proxy(client) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.server.url)
        proxy.harm = lambda method, path: 403 if method == "DELETE" else None
        (found,) = _store(Asked(store=address))
    assert found.state == "failed"
    assert "no right to delete objects" in found.told


def test_a_run_whose_launcher_is_gone_is_shown_as_lost(client, address, place, tmp_path):
    local = local_run(place, tmp_path / "local", 4)
    facts = json.loads(local.facts.read_text())
    del facts["attempts"][-1]["outcome"], facts["attempts"][-1]["ended"]
    local.facts.write_text(json.dumps(facts | {"state": "running"}))

    def states():
        listed = re.findall(r"^job +(\w+) ", said_by("runs", str(address)), re.MULTILINE)
        said_by("report", f"{address}/job", "-o", tmp_path / "page.html")
        return listed + re.findall('class="pill[^>]*>(\\w+)<', (tmp_path / "page.html").read_text())

    lease = taken(store_at(address / "job"), say=print)
    lease._record = replace(lease._record, place="another-machine 1:1", seconds=3600.0)
    lease.renew()
    assert mirror_of(address, local, lease=lease).publish()
    assert states() == ["running", "running"]
    lease._record = replace(lease._record, seconds=1.5)
    lease.renew()  # for the last time
    until(lambda: states() == ["lost", "lost"], "the end of its lease")
    lease._record = replace(lease._record, seconds=3600.0)
    lease.renew()
    assert states() == ["running", "running"]
    lease.release()
    assert states() == ["lost", "lost"]


@pytest.mark.parametrize("seconds", [-600, 600])
def test_the_age_of_a_lease_is_that_of_the_clock_of_the_store(
    client, address, monkeypatch, seconds
):
    with Proxy(client) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.server.url)
        proxy.clock_seconds = seconds
        store = open_store(address / "job")
        lease = taken(store, say=print)
        lease._record = replace(lease._record, place="another-machine 1:1", seconds=300.0)
        lease.renew()
        assert not is_abandoned(store)
        lease._record = replace(lease._record, seconds=1.5)
        lease.renew()  # for the last time
        until(lambda: is_abandoned(store), "the end of the lease")


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
