"""Runs at az:// and gs://: the drivers of fsspec, on emulators of the two stores."""

import itertools
import random
import re

import emulators
import pytest
import stored
from commands import evenstep
from stored import (
    add_checkpoint,
    assert_same,
    brought_back,
    local_run,
    mirror_of,
    run_through_a_kill,
    start_together,
    steps_in,
    store_at,
)

from service.basics.errors import SpecError
from service.storage.address import Address, address_in
from service.storage.lease import require_rights
from service.storage.store import NoObject, StoreFailed, open_store


@pytest.fixture(scope="module", params=["azure", "google"])
def emulator(request):
    with getattr(emulators, request.param)() as running:
        yield running


@pytest.fixture
def client(emulator, monkeypatch):
    """The variables of a client of the emulator."""
    for name, value in emulator.variables.items():
        monkeypatch.setenv(name, value)
    return emulator


place = stored.place


numbers = itertools.count()


@pytest.fixture
def address(client):
    """An address of runs that no other test uses."""
    found = address_in(f"{client.scheme}://{emulators.BUCKET}/runs-{next(numbers)}")
    assert found is not None
    return found


# ---- whole runs, by the command


def test_a_killed_run_goes_on_with_the_same_bits_on_an_empty_disk(client, place, address, tmp_path):
    run_through_a_kill(place, address, client.variables, tmp_path)


def test_a_stored_run_is_read_by_the_commands(client, address, tmp_path):
    def said_by(*words):
        done = evenstep(*words, cwd=tmp_path, **client.variables)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        return done.stdout

    run = ("run", "digits", "length.steps=3", "length.epochs=null")
    said_by(*run, "--runs", address)
    said_by(*run)
    at = f"{address}/digits"
    assert re.search(r"^digits +done +3/3", said_by("runs", address), re.MULTILINE)
    assert re.search(r"step +3 .*good", said_by("checkpoints", at))
    said_by("verify", at, "runs/digits", "--level", "bits")
    assert said_by("test", at) == said_by("test", "runs/digits")
    said_by("report", at, "-o", "page.html")
    assert "digits" in (tmp_path / "page.html").read_text()
    for run, name in ((at, "remote"), ("runs/digits", "local")):
        said_by("export", run, "-o", f"{name}.safetensors")
    remote, local = (tmp_path / f"{name}.safetensors" for name in ("remote", "local"))
    assert remote.read_bytes() == local.read_bytes()


def test_old_checkpoints_are_deleted_and_the_rest_comes_back(client, place, address, tmp_path):
    local = local_run(place, tmp_path / "local", 4, 8)
    mirror = mirror_of(address, local)
    assert mirror.publish()
    for path in local.checkpoints.glob("step-00000004/*"):
        path.unlink()
    (local.checkpoints / "step-00000004").rmdir()
    add_checkpoint(place, local, 12)
    assert mirror.publish()
    assert steps_in(address) == [8, 12]
    assert set(store_at(address / "job").sizes("data/")) == mirror.published.objects()
    assert_same(brought_back(address, tmp_path / "back"), local)


def test_of_launchers_that_start_together_one_gets_the_run(client, address, monkeypatch):
    monkeypatch.setenv("EVENSTEP_LEASE_SECONDS", "60")
    start_together(address)


# ---- the requests


def test_a_list_is_whole_and_holds_no_neighbours(address):
    store = store_at(address)
    names = {f"rows/{number:02}" for number in range(15)} | {"rows/deep/er"}
    for name in (*names, "rows", "rows-not", "row/s", "single", "single-not"):
        store.put(name, name.encode())
    assert store.sizes("rows/") == {name: len(name) for name in names}
    assert store.sizes("single") == {"single": len("single")}
    assert store.sizes("nothing") == store.sizes("nothing/") == {}
    assert store.children() == ["row", "rows", "rows-not", "single", "single-not"]
    assert address.path.partition("/")[2] in store_at(in_bucket(address)).children()


def in_bucket(address):
    return Address(address.scheme, emulators.BUCKET)


def test_a_replaced_object_has_another_version(address):
    store = store_at(address)
    store.put("object", b"one")
    before = store.listing("object")["object"]
    store.put("object", b"two")
    assert store.listing("object")["object"].version != before.version != ""


def test_bytes_of_an_object_are_those_between_two_positions(address, capfd):
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
    assert capfd.readouterr().err == ""  # gcsfs logs a traceback of each error


def test_an_object_is_created_once_and_deleted_again(address):
    store = store_at(address)
    assert store.create("object", b"one")
    assert not store.create("object", b"two")
    assert store.create("object", b"one"), "the answer to an earlier try may have been lost"
    store.remove(["object", "never-was"])
    assert store.sizes("") == {}


# ---- mistakes


def test_a_missing_bucket_is_named(client):
    address = Address(client.scheme, "no-such-bucket/runs")
    with pytest.raises(SpecError, match="no-such-bucket/runs: the bucket does not exist"):
        require_rights(open_store(address), say=print)
    if client.scheme == "az":  # gcsfs tells no more than that there is no such object
        with pytest.raises(SpecError, match="no-such-bucket/runs: the bucket does not exist"):
            open_store(address).get("object")


def test_wrong_and_missing_credentials_are_named(client, address, monkeypatch):
    if client.scheme == "gs":
        pytest.skip("fake-gcs-server asks for no credentials")
    variable = "AZURE_STORAGE_CONNECTION_STRING"
    right = client.variables[variable]
    monkeypatch.setenv(variable, right.replace("AccountKey=Eby8", "AccountKey=AAAA"))
    with pytest.raises(SpecError, match=r"the credentials, .*, are not accepted"):
        require_rights(open_store(address), say=print)
    monkeypatch.setenv(variable, "nonsense")
    with pytest.raises(SpecError, match=r"Connection string .*Check its credentials"):
        open_store(address)
    monkeypatch.delenv(variable)
    with pytest.raises(
        SpecError, match=r"connection_string or account_name.*Check its credentials"
    ):
        open_store(address)


@pytest.mark.slow  # the drivers make a request again by themselves, for half a minute and for one
def test_a_store_that_does_not_answer_is_named(client, address, monkeypatch, capfd):
    for name, value in client.variables.items():
        monkeypatch.setenv(name, re.sub(r"127\.0\.0\.1:\d+", "127.0.0.1:9", value))
    with pytest.raises(StoreFailed, match=f"cannot be reached.*{next(iter(client.variables))}"):
        require_rights(open_store(address, patience_seconds=0.0), say=print)
    assert "Traceback" not in capfd.readouterr().err
