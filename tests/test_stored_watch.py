"""`watch` and `report --serve` of runs in a bucket: what they show, and which requests it takes."""

import json
import os
import signal
import subprocess
import time
from collections import Counter
from urllib.parse import unquote

import pytest
import stored
from clients import get
from commands import BIN, CLEAN, DEADLINE_SECONDS, evenstep, start
from injuring import until
from stored import add_checkpoint, local_run, mirror_of, store_at
from stores import BUCKET, Proxy, free_port

from service.basics.errors import SpecError
from service.monitoring import live_runs
from service.monitoring.live_runs import StoredRuns
from service.runs.metrics_file import read_metrics
from service.storage import copies as module
from service.storage.address import Address, address_in
from service.storage.copies import Copies
from service.storage.lease import taken
from service.storage.store import StoreFailed, open_store

pytest.importorskip("moto", reason="needs moto, flask and flask-cors")
pytest.importorskip("botocore", reason="needs botocore")


server = stored.server
place = stored.place


@pytest.fixture
def client(server, monkeypatch):
    """A proxy of the server, and the variables of a client of it."""
    for name, value in server.variables.items():
        monkeypatch.setenv(name, value)
    with Proxy(server) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.server.url)
        yield proxy


@pytest.fixture
def address(request):
    name = "".join(c for c in request.node.name if c.isalnum())[:40]
    found = address_in(f"s3://{BUCKET}/{name}")
    assert found is not None
    return found


def cut(run, step, state="running"):
    """Make the run one that has come so far."""
    rows = run.metrics.read_text().splitlines(keepends=True)[:step]
    run.metrics.write_text("".join(rows))
    facts = json.loads(run.facts.read_text())
    facts["state"] = state
    for attempt in facts["attempts"]:
        attempt.pop("ended", None)
        attempt["to_step"] = 0
    run.facts.write_text(json.dumps(facts))


def go_on(place, run, step, state="running"):
    """Rows and a checkpoint are added."""
    rows = (place / "runs/job/metrics.jsonl").read_text().splitlines(keepends=True)
    with run.metrics.open("a") as file:
        file.writelines(rows[len(read_metrics(run.metrics)) : step])
    add_checkpoint(place, run, step)
    if state != "running":
        facts = json.loads(run.facts.read_text()) | {"state": state}
        run.facts.write_text(json.dumps(facts))


def kinds_of(proxy, begin):
    """How many requests of each kind were made since: lists, other reads of data, the rest."""

    def kind(method, path):
        if "list-type=2" in path:
            return "list"
        return method if method != "GET" else f"get {unquote(path.split('?')[0].split('/')[-1])}"

    return Counter(kind(*each) for each in proxy.seen[begin:])


def copied_in_store(address, name, *others):
    """Other runs with the same objects."""
    store = store_at(address)
    for each in store.sizes(f"{name}/"):
        for other in others:
            store.put(f"{other}/{each.removeprefix(f'{name}/')}", store.get(each))


def live(tmp_path, *runs, below=(), every_seconds=1e9):
    stores = [open_store(each, patience_seconds=0.0) for each in (*runs, *below)]
    copies = Copies(tmp_path / "copies", stores[: len(runs)], below=stores[len(runs) :])
    return StoredRuns(copies, every_seconds=every_seconds)


def test_a_look_makes_one_request_unless_something_is_new(place, address, client, tmp_path):
    run = local_run(place, tmp_path / "one", 4)
    cut(run, 5)
    mirror = mirror_of(address, run)
    mirror.publish()
    runs = live(tmp_path, address / "job", every_seconds=1e-9)
    [now], broken = runs.look()
    assert (now.state, now.step, now.steps, len(now.losses), broken) == ("running", 5, 24, 5, [])
    assert now.latest["train/loss"] == read_metrics(run.metrics)[4]["train/loss"]

    begin = len(client.seen)
    runs.look()
    assert kinds_of(client, begin) == {"list": 1}

    mirror._lease.renew()
    begin = len(client.seen)
    assert runs.look()[0][0].state == "running"
    assert kinds_of(client, begin) == {"list": 1}

    go_on(place, run, 8)
    mirror.publish()
    begin, file = len(client.seen), now.path / "metrics.jsonl"
    inode = file.stat().st_ino
    [now], _ = runs.look()
    assert (now.step, len(now.losses)) == (8, 8)
    made = kinds_of(client, begin)
    # The three new rows are fewer than the five before, so they are a piece of their own.
    added = next(name for name in made if name.startswith("get metrics.jsonl@"))
    assert made == {"list": 1, f"get {mirror.published.stamp}.json": 1, added: 1}
    assert file.stat().st_ino == inode, "its readers go on where they were"
    assert file.read_bytes() == run.metrics.read_bytes()

    go_on(place, run, 24, state="done")
    mirror.publish()
    [now], _ = runs.look()
    assert (now.state, now.step, list(now.losses)[-1]) == (
        "done",
        24,
        read_metrics(run.metrics)[-1]["train/loss"],
    )
    assert file.read_bytes() == run.metrics.read_bytes()


def test_of_long_metrics_the_end_is_brought_and_all_of_it_for_a_page(
    place, address, client, tmp_path, monkeypatch
):
    monkeypatch.setattr("service.storage.mirror.PART_BYTES", 1000)
    monkeypatch.setattr(module, "_TAIL_BYTES", 1500)
    monkeypatch.setattr(module, "MOST_WHOLE", 1)
    mirror_of(address, local_run(place, tmp_path / "one", 4)).publish()
    copied_in_store(address, "job", "other")
    whole = (place / "runs/job/metrics.jsonl").read_bytes()
    assert len(whole) > 4000

    runs = live(tmp_path, below=[address])
    found, _ = runs.look()
    assert sorted(run.name for run in found) == ["job", "other"]
    assert {run.latest["train/loss"] for run in found} == {
        read_metrics(place / "runs/job/metrics.jsonl")[-1]["train/loss"]
    }
    for run in found:
        copy = (run.path / "metrics.jsonl").read_bytes()
        assert len(copy) == len(whole)
        assert copy[:1000] == bytes(1000), "not requested"
        assert copy[-1500:] == whole[-1500:]
    for run in found:
        history = runs.history(run)
        assert len(history.rows) == 24
        assert history.place == str(address / run.name)
    assert (found[1].path / "metrics.jsonl").read_bytes() == whole
    assert (found[0].path / "metrics.jsonl").read_bytes()[:1000] == bytes(1000), "let go again"
    begin = len(client.seen)
    runs.history(found[1])
    assert kinds_of(client, begin) == {}, "it is here"


def test_a_run_that_starts_over_and_one_whose_rows_are_taken_back_are_read_anew(
    place, address, client, tmp_path
):
    run = local_run(place, tmp_path / "one", 4)
    cut(run, 9)
    mirror = mirror_of(address, run)
    mirror.publish()
    runs = live(tmp_path, address / "job", every_seconds=1e-9)
    assert runs.look()[0][0].step == 9
    cut(run, 3)
    text = run.metrics.read_text().replace('"train/loss": ', '"train/loss": 7')
    run.metrics.write_text(text)
    add_checkpoint(place, run, 8)
    mirror.publish()
    [now], _ = runs.look()
    assert (now.step, len(now.losses)) == (3, 3)
    assert (now.path / "metrics.jsonl").read_text() == text

    # Taken back and written anew until there are more than before: the same length at the begin.
    rows = (place / "runs/job/metrics.jsonl").read_text().splitlines(keepends=True)[:12]
    text = "".join(rows).replace('"train/loss": ', '"train/loss": 8')
    run.metrics.write_text(text)
    add_checkpoint(place, run, 12)
    mirror.publish()
    [now], _ = runs.look()
    assert (now.step, len(now.losses)) == (12, 12)
    assert (now.path / "metrics.jsonl").read_text() == text

    mirror._lease.release()
    run = local_run(place, tmp_path / "two", 4)
    facts = json.loads(run.facts.read_text()) | {"id": "started-over"}
    run.facts.write_text(json.dumps(facts))
    cut(run, 2)
    mirror_of(address, run).publish()
    [now], _ = runs.look()
    assert (now.step, len(now.losses)) == (2, 2)


def test_what_was_not_uploaded_is_not_shown(place, address, client, tmp_path):
    run = local_run(place, tmp_path / "one", 4)
    cut(run, 5)
    mirror = mirror_of(address, run)
    mirror.publish()
    false = run.metrics.read_bytes().replace(b'"train/loss": ', b'"train/loss": 7')
    told = iter([false])
    client.harm = lambda method, path: next(told, None) if "metrics.jsonl" in path else None
    runs = live(tmp_path, address / "job", every_seconds=1e-9)
    [now], _ = runs.look()
    assert (now.path / "metrics.jsonl").read_bytes() == run.metrics.read_bytes(), "asked again"

    go_on(place, run, 8)
    mirror.publish()
    client.harm = lambda method, path: false if "metrics.jsonl" in path else None
    [now], broken = runs.look()
    assert now.step == 5
    assert "metrics.jsonl" in str(broken) + str(runs.trouble)
    assert "is not what was uploaded" in str(broken) + str(runs.trouble)


def test_a_run_whose_launcher_is_gone_is_lost_and_is_seen_to_go_on(
    place, address, client, tmp_path, monkeypatch
):
    run = local_run(place, tmp_path / "one", 4)
    cut(run, 5)
    mirror = mirror_of(address, run)
    mirror.publish()
    runs = live(tmp_path, address / "job", every_seconds=1e-9)
    assert runs.look()[0][0].state == "running"
    mirror._lease.release()
    monkeypatch.setattr(module, "_RENEWAL_SECONDS", 0.0)
    assert runs.look()[0][0].state == "running", "the release is a change of the lease"
    assert runs.look()[0][0].state == "lost"
    begin = len(client.seen)
    assert runs.look()[0][0].state == "lost"
    assert kinds_of(client, begin) == {"list": 1}, "a lost run costs no more than another"
    again = mirror_of(address, run)
    again.take_over()
    assert runs.look()[0][0].state == "running"


def test_runs_at_an_address_that_do_not_go_on_are_looked_at_now_and_then(
    place, address, client, tmp_path, monkeypatch
):
    monkeypatch.setattr(module, "_REST_LOOKS", 5)
    run = local_run(place, tmp_path / "one", 4)
    mirror = mirror_of(address, run)
    mirror.publish()
    copied_in_store(address, "job", "done-0", "done-1", "done-2", "done-3")
    cut(run, 5)
    add_checkpoint(place, run, 8)
    mirror.publish()
    runs = live(tmp_path, below=[address], every_seconds=1e-9)
    assert Counter(each.state for each in runs.look()[0]) == {"done": 4, "running": 1}
    begin, looks = len(client.seen), 5
    for _ in range(looks):
        runs.look()
    lists = kinds_of(client, begin)["list"]
    # In each look the names, and the run that goes on; the others once.
    assert lists == looks * 2 + 4
    store_at(address).remove(store_at(address).sizes("done-3/"))
    assert len(runs.look()[0]) == 4


def test_a_store_that_does_not_answer_ends_no_watch(place, address, client, tmp_path):
    run = local_run(place, tmp_path / "one", 4)
    cut(run, 5)
    mirror = mirror_of(address, run)
    mirror.publish()
    words = (BIN / "evenstep", "watch", f"{address}/job", "--every", "0.2")
    variables = CLEAN | {"AWS_ENDPOINT_URL": client.server.url}
    out = tmp_path / "out"
    with out.open("wb") as file:
        process = start(words, cwd=tmp_path, env=variables | _client_variables(), stdout=file,
                        stderr=subprocess.STDOUT)  # fmt: skip
    try:
        until(lambda: "step=5/24" in out.read_text(), "the first line", of=process)
        client.harm = lambda method, path: 503
        until(lambda: "warning" in out.read_text(), "a warning", of=process)
        seen = len(client.seen)
        until(lambda: len(client.seen) > seen + 3, "that it asks again", of=process)
        client.harm = lambda method, path: None
        until(lambda: "answers again" in out.read_text(), "the end of the trouble", of=process)
        go_on(place, run, 24, state="done")
        mirror.publish()
        process.wait(DEADLINE_SECONDS)
    finally:
        process.kill()
    assert process.returncode == 0, out.read_text()
    lines = out.read_text().splitlines()
    assert [line.split(" ")[0] for line in lines] == ["job", "warning:", "The", "job"]
    assert "What was read before stays, and it is asked again." in lines[1]
    assert lines[0].startswith("job state=running step=5/24 ")
    assert " news=" in lines[0]
    assert lines[3].startswith("job state=done step=24 ")


def _client_variables():
    return {key: value for key, value in os.environ.items() if key.startswith(("AWS_", "EVENSTEP"))}


def test_mistakes_at_an_address_are_one_line(place, address, client, tmp_path):
    mirror_of(address, local_run(place, tmp_path / "one", 4)).publish()
    beginning = address / "beginning"
    taken(store_at(beginning), say=lambda text: None)
    client.harm = lambda method, path: "AccessDenied" if "refused" in path else None
    for words, code, told in (
        (("watch", f"{address}/jbo"), 64, "did you mean 'job'?"),
        (("watch", f"{beginning}"), 64, "nothing of this run is in the store yet"),
        (("watch", "--all", "--runs", f"{address}-none"), 64, "There is no run in"),
        (("watch", f"{address}/refused"), 64, "give no right to list objects"),
        (("report", f"{address}/jbo", "--serve"), 64, "did you mean 'job'?"),
    ):
        ended = evenstep(*words, cwd=tmp_path, **_client_variables())
        assert ended.returncode == code, ended
        assert told in ended.stderr, ended.stderr
        assert len(ended.stderr.splitlines()) == 1
        assert ended.stdout == ""


def test_a_page_of_runs_in_a_bucket_is_live(place, address, client, tmp_path):
    run = local_run(place, tmp_path / "one", 4)
    cut(run, 5)
    mirror = mirror_of(address, run)
    mirror.publish()
    port, own = free_port(), len(client.seen)
    words = (BIN / "evenstep", "report", "--all", "--runs", address, "--serve", "--port", port)
    process = start(
        words,
        cwd=tmp_path,
        env=CLEAN | _client_variables(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert "shows job (read from the store " in process.stdout.readline()

        def state(path="/state"):
            return json.loads(get(port, path).text)

        assert "5/24" in get(port, "/").text
        assert state()["seen"].startswith("read from the store ")
        page = get(port, "/?run=job")
        assert page.status == 200
        assert f"{address}/job" in page.text
        begin = len(client.seen)
        for _ in range(5):
            get(port, "/")
        assert len(client.seen) - begin <= 2, "browsers cost no requests"
        written = [each for each in client.seen[own:] if each[0] not in ("GET", "HEAD")]
        assert written == [], "it only reads"
        client.harm = lambda method, path: 503
        page = get(port, "/?run=job")
        assert page.status == 200, "it is here"
    finally:
        process.send_signal(signal.SIGINT)
        told, _ = process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == 0, told
    assert "Traceback" not in told


def test_a_look_in_the_background_waits_for_no_store(place, address, client, tmp_path):
    run = local_run(place, tmp_path / "one", 4)
    cut(run, 5)
    mirror = mirror_of(address, run)
    mirror.publish()
    stores = [open_store(address / "job", patience_seconds=0.0)]
    copies = Copies(tmp_path / "copies", stores)
    runs = StoredRuns(copies, every_seconds=0.01, in_background=True)
    assert runs.look()[0][0].step == 5
    go_on(place, run, 8)
    mirror.publish()
    client.harm = lambda method, path: 500
    time.sleep(0.02)
    begin = len(client.seen)
    assert runs.look()[0][0].step == 5
    until(lambda: runs.look() and runs.trouble is not None, "the trouble is told")
    assert len(client.seen) > begin
    client.harm = lambda method, path: None
    until(lambda: runs.look()[0][0].step == 8, "the new rows")
    assert runs.trouble is None


def test_the_first_look_in_the_background_is_waited_for_a_moment(
    place, address, client, tmp_path, monkeypatch
):
    mirror_of(address, local_run(place, tmp_path / "one", 4)).publish()

    def first(name):
        store = open_store(address / "job", patience_seconds=0.0)
        copies = Copies(tmp_path / name, [store])
        return StoredRuns(copies, every_seconds=1e9, in_background=True)

    runs, now = first("a"), time.time()
    client.harm = lambda method, path: 0.5
    monkeypatch.setattr(live_runs, "FIRST_SECONDS", 0.01)
    assert runs.look() == ([], [])
    assert runs.seen(now) == "being read from the store"
    client.harm = lambda method, path: None
    until(lambda: runs.look()[0], "the run")
    until(lambda: "ago" in runs.seen(now), "the end of the look")

    client.harm = lambda method, path: 503
    monkeypatch.setattr(live_runs, "FIRST_SECONDS", DEADLINE_SECONDS)
    with pytest.raises(StoreFailed):
        first("b").look()


def test_the_first_look_tells_what_is_wrong(address, client, tmp_path):
    client.harm = lambda method, path: 503
    with pytest.raises(StoreFailed):
        live(tmp_path, address / "job").look()
    client.harm = lambda method, path: "NoSuchBucket"
    with pytest.raises(SpecError, match="bucket"):
        live(tmp_path, below=[Address("s3", "no-such-bucket/runs")]).look()
