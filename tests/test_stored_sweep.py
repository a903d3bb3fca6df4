"""`evenstep sweep` with runs in a bucket: it is stopped, killed, and goes on elsewhere."""

import signal
import subprocess

import pytest
import stored
from commands import BIN, CLEAN, DEADLINE_SECONDS, evenstep, start
from injuring import descendants, is_alive, until
from stored import brought_back, steps_in, store_at
from stores import BUCKET, Proxy

from launch.commands.sweep import _OWN_AT_ADDRESS, _planned
from launch.stored.swept import add_to_sweep_at, sweep_at
from service.basics.errors import SpecError
from service.runs.directory import find_run
from service.runs.verification import compare
from service.storage.address import address_in

pytest.importorskip("moto", reason="needs moto, flask and flask-cors")
pytest.importorskip("botocore", reason="needs botocore")


server = stored.server
place = stored.place


@pytest.fixture
def client(server, monkeypatch):
    for name, value in server.variables.items():
        monkeypatch.setenv(name, value)
    return server


@pytest.fixture
def address(request):
    found = address_in(f"s3://{BUCKET}/{request.node.name}"[:60])
    assert found is not None
    return found


WORDS = ("sweep", "job.yaml", "optimizer.lr=0.1,0.2")


def sweeping(place, address, server, scratch, **variables):
    """Start the sweep with this scratch directory."""
    variables |= server.variables | {"EVENSTEP_SCRATCH": str(scratch)}
    return start(
        (BIN / "evenstep", *WORDS, "--runs", address),
        cwd=place,
        env=CLEAN | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def is_asked_to_stop(scratch):
    """Whether the launcher of the first run has passed the request on to its process."""
    return any("saving the state" in log.read_text() for log in scratch.rglob("logs/lr-0.1.log"))


def ended(process):
    told, _ = process.communicate(timeout=DEADLINE_SECONDS)
    return told


def test_a_sweep_that_is_stopped_and_killed_goes_on_on_an_empty_disk(
    place, address, client, tmp_path
):
    sweep, go = address / "job-sweep", str(tmp_path / "go-")
    held = sweeping(place, address, client, tmp_path / "a", HOLD_AT_ROWS="70", GO_ON_WITH=go)
    try:
        until(lambda: newest_of(sweep, "lr-0.1") == 8, "step 8 in the store", of=held)
        held.send_signal(signal.SIGTERM)
        until(lambda: is_asked_to_stop(tmp_path / "a"), "the run has heard of it", of=held)
        (tmp_path / "go-0").touch()
        told = ended(held)
    finally:
        held.kill()
    assert held.returncode == 75, told
    assert f"2 runs in {sweep}, 1 at a time" in told
    assert "lr-0.1: stopped, its state is saved" in told
    assert "lr-0.2: starts" not in told
    stopped_at = newest_of(sweep, "lr-0.1")
    assert 8 < stopped_at < 24

    never = str(tmp_path / "never-")
    killed = sweeping(place, address, client, tmp_path / "b", HOLD_AT_ROWS="130", GO_ON_WITH=never)
    try:
        until(lambda: newest_of(sweep, "lr-0.2") == 16, "step 16 in the store", of=killed)
        below = descendants(killed.pid)
    finally:
        killed.send_signal(signal.SIGKILL)
        told = ended(killed)
    until(lambda: not any(map(is_alive, below)), "the end of all that it started")
    assert "lr-0.1: done" in told, told
    listed = evenstep("watch", sweep, "--once", cwd=tmp_path, **client.variables)
    states = [line.split(" ")[:2] for line in sorted(listed.stdout.splitlines())]
    assert states == [["lr-0.1", "state=done"], ["lr-0.2", "state=lost"]], listed

    last = sweeping(place, address, client, tmp_path / "c")
    told = ended(last)
    assert last.returncode == 0, told
    assert "1 at a time; 1 are done" in told
    assert "lr-0.1: starts" not in told
    table = told.splitlines()[-3:]
    assert table[0].split()[:2] == ["optimizer.lr", "done"]
    assert [line.split()[:4] for line in table[1:]] == [
        ["0.1", "1", "of", "1"],
        ["0.2", "1", "of", "1"],
    ]
    log = next((tmp_path / "c").glob("*/job-sweep/logs/lr-0.2.log")).read_text()
    assert "Resuming after step 16" in log
    at_end = brought_back(sweep, tmp_path / "end", "lr-0.1")
    compared = compare(find_run(place / "runs/job"), at_end, level="bits", tolerance=0)
    assert compared.equal, compared.lines

    made = evenstep("report", sweep, "-o", "sweep.html", cwd=tmp_path, **client.variables)
    assert made.returncode == 0, made.stderr
    assert made.stdout.splitlines()[1].split()[:4] == ["0.1", "1", "of", "1"]
    page = (tmp_path / "sweep.html").read_text()
    assert "job-sweep: mean and deviation over seeds" in page
    assert f"{sweep}/lr-0.2" in page

    words = (*WORDS, "batch.micro_batch=3", "--runs", address)
    other = evenstep(*words, cwd=place, **client.variables, EVENSTEP_SCRATCH=str(tmp_path / "d"))
    assert other.returncode == 64
    assert "batch.micro_batch" in other.stderr
    assert "starts" not in other.stdout


def newest_of(address, name):
    return max(steps_in(address, name), default=0)


def test_commands_that_start_together_lose_no_run_of_each_other(client, address):
    sweep = address / "sweep"
    first, second = {"lr-1": (("optimizer.lr", "1"),)}, {"lr-2": (("optimizer.lr", "2"),)}
    assert sweep_at(sweep) is None
    assert add_to_sweep_at(sweep, first) is False
    store = store_at(sweep)
    (part,) = store.sizes("sweep/")
    content = store.get(part)
    store.remove([part])  # the other one has not seen it
    add_to_sweep_at(sweep, second)
    store.put(part, content)
    assert sweep_at(sweep) == first | second
    assert add_to_sweep_at(sweep, second) is True
    assert len(store.sizes("sweep/")) == 2, "what is known is not written again"

    store.put("sweep/000003-0123456789abcdef.json", b'{"format": 1, "runs": {"../up": []}}')
    with pytest.raises(SpecError, match=r"'\.\./up' is not the name of a run\. Remove it"):
        sweep_at(sweep)


def test_a_run_does_not_take_the_address_of_a_sweep(place, address, client, tmp_path):
    """It was trained there, and removed the output of the runs of the sweep from this machine."""
    scratch = {"EVENSTEP_SCRATCH": str(tmp_path)} | client.variables
    store_at(address / "job-sweep").put("sweep/000001-0123456789abcdef.json", b"{}")
    words = ("run", "job.yaml", "--name", "job-sweep", "--runs", address)
    done = evenstep(*words, cwd=place, **scratch)
    assert done.returncode == 64, done.stderr
    assert f"--name: {address}/job-sweep is a sweep. Give the run another name." in done.stderr
    shown = evenstep("watch", "--once", address, cwd=place, **scratch)
    assert shown.returncode == 64, shown.stdout
    assert f"{address} is no run. Below it there is: job-sweep." in shown.stderr
    assert set(store_at(address).sizes("")) == {"job-sweep/sweep/000001-0123456789abcdef.json"}


def test_a_sweep_that_cannot_begin_leaves_nothing(place, address, client, tmp_path):
    scratch = {"EVENSTEP_SCRATCH": str(tmp_path)}
    store_at(address / "job-sweep").put("published/000001-000001.json", b"a run")
    with Proxy(client) as proxy:
        variables = client.variables | {"AWS_ENDPOINT_URL": proxy.server.url} | scratch
        for name, told in (("job-sweep", "is a run. Give the sweep"), ("other", "no right to")):
            proxy.harm = lambda method, path: "AccessDenied" if method == "PUT" else None
            done = evenstep(*WORDS, "--name", name, "--runs", address, cwd=place, **variables)
            assert done.returncode == 64, done.stderr
            assert told in done.stderr
            assert len(done.stderr.splitlines()) == 1
            assert "starts" not in done.stdout
    assert set(store_at(address).sizes("")) == {"job-sweep/published/000001-000001.json"}


def test_the_names_of_a_store_are_no_runs():
    variants = [("data", "digits"), ("sweep", "digits")]
    planned = _planned(variants, (), set(), _OWN_AT_ADDRESS)
    assert [run.name for run in planned] == ["data-2", "sweep-2"]
    assert [run.name for run in _planned(variants, (), set())] == ["data", "sweep"]
