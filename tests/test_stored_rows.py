"""Rows of Parquet, WebDataset, MDS and `datasets`: in a directory, and on a server of S3."""

import fcntl
import io
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import stored
import torch
from commands import CLEAN, evenstep, start
from injuring import until
from jobs import spec_of, train_in_process
from stores import BUCKET, Proxy, s3_server
from test_features import difference
from torch import nn
from torch.utils.data import TensorDataset

from service.basics.errors import DataBroken, EvenstepError, SpecError
from service.data.streams import Stream
from service.data.task import supervised
from service.remote.cache import Cache
from service.runs.receipt_file import read_receipt
from service.task import rows_in

pytest.importorskip("moto", reason="needs moto, flask and flask-cors")
pytest.importorskip("s3fs", reason="needs s3fs")
pa = pytest.importorskip("pyarrow", reason="needs pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

HERE = __file__
ROWS = 37
X = [(np.arange(3, dtype=np.float32) * 7 + n) % 11 / 11 for n in range(ROWS)]
Y = [n % 3 for n in range(ROWS)]
FORMATS = ("parquet", "webdataset", "mds", "datasets")


def written(format: str, place: Path) -> Path:
    """A data set of 37 rows in a few files."""
    place.mkdir(parents=True, exist_ok=True)
    cuts = [(0, 10), (10, 21), (21, 31), (31, ROWS)]
    if format == "parquet":
        for number, (begin, end) in enumerate(cuts):
            table = pa.table(
                {"x": X[begin:end], "y": Y[begin:end], "other": ["unused" * 9] * (end - begin)}
            )
            pq.write_table(table, place / f"{number}.parquet", row_group_size=4)
    elif format == "webdataset":
        for number, (begin, end) in enumerate(cuts):
            with tarfile.open(place / f"{number:03}.tar", "w") as shard:
                for row in range(begin, end):
                    for ending, content in (("x", X[row].tobytes()), ("cls", b"%d" % Y[row])):
                        member = tarfile.TarInfo(f"{row:05}.{ending}")
                        member.size = len(content)
                        shard.addfile(member, io.BytesIO(content))
    elif format == "mds":
        with zipfile.ZipFile(Path(HERE).with_name("mosaic_shards.zip")) as shards:
            for name in shards.namelist():
                if name.startswith("zstd/") and not name.endswith("/"):
                    (place / Path(name).name).write_bytes(shards.read(name))
    else:
        import datasets

        data = datasets.Dataset.from_dict({"x": X, "y": Y})
        data.save_to_disk(str(place), num_shards=4)
    return place


def pair(row):
    """The inputs and the target of a stored row of any format."""
    if "cls" in row:
        return np.frombuffer(row["x"], np.float32).copy(), int(row["cls"])
    return np.asarray(row["x"], np.float32), int(row["y"])


server = stored.server


@pytest.fixture
def proxy(server, monkeypatch, tmp_path):
    """A proxy before the server, which this process uses, and an own cache."""
    with Proxy(server) as before:
        for name, value in before.server.variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("EVENSTEP_DATA_CACHE", str(tmp_path / "cache"))
        yield before


numbers = itertools.count()


def uploaded(server, place: Path, name: str | None = None) -> str:
    """The address of a copy of a directory in the bucket."""
    import s3fs

    store = s3fs.S3FileSystem(
        key="test", secret="test", endpoint_url=server.url, skip_instance_cache=True
    )
    name = f"{BUCKET}/{name or f'data-{next(numbers)}'}"
    for file in sorted(path for path in place.iterdir() if path.is_file()):
        store.pipe_file(f"{name}/{file.name}", file.read_bytes())
    return f"s3://{name}"


def store_of(server):
    import s3fs

    return s3fs.S3FileSystem(
        key="test", secret="test", endpoint_url=server.url, skip_instance_cache=True
    )


def stored(address: str, variables: dict[str, str], cache: str, shuffle: int = 0):
    """A task of a run; it is also built in processes that know nothing of the server."""
    os.environ.update(variables)
    test = TensorDataset(torch.tensor(np.stack(X[:9])), torch.tensor(Y[:9]))
    train = rows_in(address, row=pair, shuffle=shuffle, cache=cache, cache_gib=1e-3)
    return supervised(model=lambda: nn.Linear(3, 3), train=train, test=test)


@pytest.mark.parametrize(("format", "shuffle"), [*zip(FORMATS, (2, 0, 3, 2), strict=True)])
def test_a_run_reads_the_same_rows_at_any_number_of_processes_and_resumes(
    processes, server, tmp_path, format, shuffle
):
    address = uploaded(server, written(format, tmp_path / "data"))
    arguments = {"address": address, "variables": server.variables, "shuffle": shuffle}
    arguments["cache"] = str(tmp_path / "cache")
    job = spec_of("", length={"steps": 6}, test={}, batch={"global_batch": 20, "micro_batch": 7})
    job |= {"task": f"{HERE}:stored", "task_args": arguments}  # 120 rows: over three passes
    for count in (1, 3):
        processes(count).run(train_in_process, job, tmp_path / str(count))
    for stop_at in (4, None):
        processes(1).run(train_in_process, job, tmp_path / "cut", stop_at)
    for count, stop_at in ((2, 3), (1, None)):
        processes(count).run(train_in_process, job, tmp_path / "changed", stop_at)
    names = ("1", "3", "cut", "changed")
    receipts = [read_receipt(tmp_path / name / "job/receipt.jsonl") for name in names]
    assert receipts.count(receipts[0]) == 4
    assert difference(tmp_path / "1", tmp_path / "cut") == (0, 0)
    assert max(difference(tmp_path / "1", tmp_path / "3")) < 1e-5
    assert max(difference(tmp_path / "1", tmp_path / "changed")) < 1e-5


@pytest.mark.parametrize("format", FORMATS)
def test_a_bucket_gives_the_rows_of_a_directory(proxy, server, tmp_path, format):
    place = written(format, tmp_path / "data")
    local = [pair(row) for row in rows_in(place)]
    assert [y for _, y in local] == Y
    assert all(np.array_equal(x, expected) for (x, _), expected in zip(local, X, strict=True))
    remote = [pair(row) for row in rows_in(uploaded(server, place))]
    assert repr(remote) == repr(local)


def test_every_shuffled_epoch_has_each_row_once_in_another_order(tmp_path):
    rows = rows_in(written("parquet", tmp_path), shuffle=3)
    orders = []
    for epoch in range(3):
        rows.set_epoch(epoch)
        orders.append([tuple(row["x"]) for row in rows])
    assert len({tuple(order) for order in orders}) == 3
    assert all(sorted(order) == sorted(map(tuple, X)) for order in orders)
    rows.set_epoch(1)
    assert [tuple(row["x"]) for row in rows] == orders[1]


@pytest.mark.parametrize("shuffle", [0, 3])
def test_a_stream_goes_on_at_every_position(tmp_path, shuffle):
    place = written("parquet", tmp_path)
    whole = Stream(rows_in(place, shuffle=shuffle), mode="whole", index=0, of=1).take(3 * ROWS)
    for stop in range(0, 2 * ROWS, 5):
        cut = Stream(rows_in(place, shuffle=shuffle), mode="whole", index=0, of=1)
        cut.pass_over(stop)
        at = json.loads(json.dumps(cut.place()))
        other = Stream(rows_in(place, shuffle=shuffle), mode="whole", index=0, of=1)
        other.move_to([at], 0)
        assert repr(other.take(9)) == repr(whole[stop : stop + 9])


def test_rows_of_other_processes_are_not_made(tmp_path):
    made = []
    rows = rows_in(written("parquet", tmp_path), row=lambda row: made.append(1) or pair(row))
    stream = Stream(rows, mode="whole", index=1, of=2)
    stream.pass_over(50)
    stream.take(3)
    assert len(made) == 3


def test_a_resume_reads_nothing_before_the_position(proxy, server, tmp_path):
    address = uploaded(server, written("parquet", tmp_path / "data"))
    rows = rows_in(address, columns=["y"])
    reading = iter(rows)
    assert reading.skip(26) == 26  # in the second row group of the third file
    state = rows.state_dict()
    expected = next(reading)
    reading.close()
    other = rows_in(address, columns=["y"], cache=tmp_path / "empty")
    other.load_state_dict(state)
    proxy.seen.clear()
    assert next(iter(other)) == expected
    asked = {path.rpartition("/")[2] for method, path in proxy.seen if method == "GET"}
    assert not asked & {"0.parquet", "1.parquet"}
    assert "2.parquet" in asked
    assert all(file.stat().st_size < 200 for file in (tmp_path / "empty").iterdir()), (
        "one column of a row group, not whole files"
    )


def test_split_gives_each_process_other_files(tmp_path):
    rows = rows_in(written("webdataset", tmp_path))
    parts = [[row["__key__"] for row in rows.shard(3, index)] for index in range(3)]
    assert sorted(key for part in parts for key in part) == [f"{n:05}" for n in range(ROWS)]
    with pytest.raises(SpecError, match="4 files cannot be split among 5 processes"):
        next(iter(rows.shard(5, 0)))


# ---- addresses


def test_patterns_and_lists_name_files(tmp_path):
    place = written("webdataset", tmp_path / "shards")
    every = [row["__key__"] for row in rows_in(place)]
    for address in (
        f"{place}/*.tar",
        f"{place}/{{000..003}}.tar",
        [f"{place}/{n:03}.tar" for n in range(4)],
        f"{place.parent}/**/{place.name}/*.tar",
    ):
        assert [row["__key__"] for row in rows_in(address)] == every
    assert len(list(rows_in(f"{place}/{{001..002}}.tar"))) == 21


def test_files_that_are_not_named_are_not_looked_at(tmp_path):
    place = written("webdataset", tmp_path / "shards")
    every = [row["__key__"] for row in rows_in(place)]
    (tmp_path / "loop").symlink_to("loop")
    assert [row["__key__"] for row in rows_in(f"{tmp_path}/**/*.tar")] == every
    (place / "loop.tar").symlink_to("loop.tar")
    with pytest.raises(SpecError, match=r"loop\.tar cannot be read: Too many levels"):
        next(iter(rows_in(place)))


def test_a_file_that_is_removed_while_files_are_listed_is_no_row(tmp_path):
    place = written("webdataset", tmp_path)
    every = [row["__key__"] for row in rows_in(place)]
    (place / "removed.tar").symlink_to("gone")  # listed, and not there when it is looked at
    assert [row["__key__"] for row in rows_in(place)] == every


@pytest.mark.parametrize(
    ("address", "options", "told"),
    [
        ("DIR/none/*.tar", {}, r"there is no \*.tar file|No such file|cannot be read"),
        ("DIR/{000..004}.tar", {}, r"004.tar: there is no"),
        ("DIR", {"format": "parquet"}, r"there is no \*.parquet file"),
        ("DIR", {"format": "csv"}, "format is 'csv'; known: parquet"),
        ("DIR", {"shuffle": -1}, "shuffle is -1"),
        ("DIR", {"columns": "x"}, r"Write columns=\['x'\]"),
        ("DIR/000.tar.gz", {}, "a compressed tar file has no positions"),
        (["DIR", "s3://bucket/x"], {}, "must be in one place"),
        ([], {}, "no address is given"),
        ("s3://user@bucket/x", {}, "must not hold credentials"),
        ("none://bucket/x.tar", {}, "there is no driver for none://"),
    ],
)
def test_a_wrong_argument_is_told(tmp_path, address, options, told):
    place = str(written("webdataset", tmp_path))
    named = [
        each.replace("DIR", place) for each in ([address] if isinstance(address, str) else address)
    ]
    with pytest.raises(SpecError, match=told) as raised:
        next(iter(rows_in(named if not isinstance(address, str) else named[0], **options)))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("shuffle", [0, 3])
@pytest.mark.parametrize("error", [ValueError("bad image"), StopIteration()], ids=["value", "stop"])
def test_a_row_that_cannot_be_made_is_named(tmp_path, error, shuffle):
    """A StopIteration in `row=` ended the epoch before, without a word."""
    files = written("parquet", tmp_path)
    every = list(rows_in(files))
    last = every[-1]

    def made(row):
        if all(np.array_equal(row[name], last[name]) for name in row):
            raise error
        return row

    stream = Stream(rows_in(files, row=made, shuffle=shuffle), mode="whole", index=0, of=1)
    told = rf"parquet, part \d+, row \d+: row= of rows_in failed: {type(error).__name__}"
    with pytest.raises(DataBroken, match=told) as caught:
        stream.take(len(every))
    file, part, row = re.search(
        r"(\S+\.parquet), part (\d+), row (\d+)", str(caught.value)
    ).groups()
    group = pq.ParquetFile(file).read_row_group(int(part)).to_pylist()[int(row)]
    assert all(np.array_equal(group[name], last[name]) for name in last)


def test_a_column_that_is_not_there_is_told(tmp_path):
    for format in ("parquet", "mds", "datasets"):
        rows = rows_in(written(format, tmp_path / format), columns=["xx"])
        with pytest.raises(SpecError, match=r"has no column 'xx'; (did you mean|known:)"):
            next(iter(rows))


def test_a_task_of_changed_files_is_refused(tmp_path):
    place = written("parquet", tmp_path)
    rows = rows_in(place)
    next(iter(rows))
    state = rows.state_dict()
    with pytest.raises(SpecError, match="shuffle was 0 when this run began, and is 2 now"):
        rows_in(place, shuffle=2).load_state_dict(state)
    (place / "3.parquet").unlink()
    with pytest.raises(SpecError, match="the files are not those that this run began with"):
        rows_in(place).load_state_dict(state)


# ---- formats


@pytest.mark.parametrize("kind", ["none", "zstd", "gz", "br", "bz2", "snappy"])
def test_shards_of_mosaics_own_writer_are_read(tmp_path, kind):
    """The files were written by mosaicml-streaming 0.13, from the values that are expected here."""
    with zipfile.ZipFile(Path(HERE).with_name("mosaic_shards.zip")) as shards:
        shards.extractall(tmp_path)
    rows = list(rows_in(tmp_path / kind))
    assert len(rows) == ROWS
    for n, row in enumerate(rows):
        assert set(row) == {"x", "any", "y", "name", "raw", "small", "f", "js", "big", "flat"}
        assert np.array_equal(row["x"], X[n])
        assert row["x"].dtype == np.float32
        assert np.array_equal(row["any"], np.arange(2 * (n % 3 + 1)).reshape(2, n % 3 + 1))
        assert (row["y"], row["name"], row["raw"]) == (n % 3, f"row {n} é", bytes(range(n)))
        assert (row["small"], row["f"], row["js"]) == (n, n / 7, {"n": [n]})
        assert row["big"] == 10**30 + n
        assert np.array_equal(row["flat"], np.arange(n % 4 + 1, dtype=np.int16))


def test_a_pickle_in_a_shard_is_never_read(tmp_path):
    place = written("mds", tmp_path)
    index = json.loads((place / "index.json").read_text())
    for shard in index["shards"]:
        shard["column_encodings"][shard["column_names"].index("raw")] = "pkl"
    (place / "index.json").write_text(json.dumps(index))
    with pytest.raises(SpecError, match=r"'raw' is encoded as 'pkl'.*Leave it out by `columns`"):
        next(iter(rows_in(place)))
    assert len(list(rows_in(place, columns=["x", "y"]))) == ROWS


def test_columns_of_every_kind(tmp_path):
    columns = {
        "number": pa.array([1, 2, 3], pa.int16()),
        "hole": pa.array([1.5, None, 2.5], pa.float32()),
        "text": pa.array(["a", "b", None]),
        "list": pa.array([[1.0], [], [2.0, 3.0]], pa.list_(pa.float32())),
        "fixed": pa.array([[1, 2], [3, 4], [5, 6]], pa.list_(pa.int32(), 2)),
        "nested": pa.array([[[1]], [], [[2], [3, 4]]]),
        "struct": pa.array([{"bytes": b"1"}, {"bytes": b"2"}, {"bytes": b"3"}]),
        "flag": pa.array([True, False, True]),
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet", row_group_size=2)
    rows = list(rows_in(tmp_path))
    assert [row["number"] for row in rows] == [1, 2, 3]
    assert isinstance(rows[0]["number"], np.int16)
    assert [row["hole"] for row in rows] == [1.5, None, 2.5]
    assert [row["text"] for row in rows] == ["a", "b", None]
    assert [row["list"].tolist() for row in rows] == [[1.0], [], [2.0, 3.0]]
    assert [row["fixed"].tolist() for row in rows] == [[1, 2], [3, 4], [5, 6]]
    assert rows[2]["fixed"].dtype == np.int32
    assert [row["nested"] for row in rows] == [[[1]], [], [[2], [3, 4]]]
    assert rows[1]["struct"] == {"bytes": b"2"}
    assert bool(rows[1]["flag"]) is False


# ---- faults


def broken(format: str, place: Path, harm: str, server) -> str:
    """The address of a data set with one object that is not as it should be."""
    address = uploaded(server, written(format, place))
    store, key = store_of(server), address.removeprefix("s3://")
    name = next(
        file
        for file in sorted(store.find(key, refresh=True))
        if file.endswith((".parquet", ".tar", ".arrow")) or ".mds" in file
    )
    if harm == "missing":
        store.rm_file(name)
    else:
        content = store.cat_file(name)
        store.pipe_file(name, content[: len(content) // 2] if harm == "truncated" else b"")
    return address


@pytest.mark.parametrize(
    ("format", "harm", "told"),
    [
        (
            "parquet",
            "truncated",
            r"0\.parquet: does not end as a Parquet file does.*upload it again",
        ),
        ("webdataset", "truncated", r"000\.tar: is no complete tar file"),
        ("mds", "truncated", r"shard\.00000\.mds\.zstd: has only .* bytes. Upload it again"),
        ("mds", "emptied", r"shard\.00000\.mds\.zstd: has only 0 of .* bytes"),
        ("parquet", "emptied", r"0\.parquet: does not end as a Parquet file does"),
        ("datasets", "truncated", r"arrow: cannot be read as an Arrow file of `datasets`"),
        ("mds", "missing", r"shard\.00000\.mds\.zstd: there is no such object"),
        ("datasets", "missing", r"arrow: is not there, but state.json names it"),
    ],
)
def test_a_damaged_object_is_told_in_one_line(proxy, server, tmp_path, format, harm, told):
    address = broken(format, tmp_path / "data", harm, server)
    with pytest.raises(DataBroken, match=told) as raised:
        list(rows_in(address))
    assert "\n" not in str(raised.value)
    assert "s3://" in str(raised.value)


def test_a_changed_byte_of_a_shard_is_found_by_its_hash(proxy, server, tmp_path):
    address = uploaded(server, written("mds", tmp_path / "data"))
    store, name = store_of(server), f"{address.removeprefix('s3://')}/shard.00002.mds.zstd"
    content = bytearray(store.cat_file(name))
    content[len(content) // 2] ^= 1
    store.pipe_file(name, bytes(content))
    with pytest.raises(DataBroken, match=r"shard\.00002\.mds\.zstd: its sha1 is "):
        list(rows_in(address))
    assert not [file for file in os.listdir(tmp_path / "cache") if file.endswith(".part")]


@pytest.mark.parametrize("name", ["xxh64", "xxh32", "xxh128", "xxh3_64", "xxh3_128"])
def test_a_changed_byte_is_found_by_xxhash_alone(tmp_path, name):
    """The xxh64 are those of mosaicml-streaming."""
    import xxhash

    with zipfile.ZipFile(Path(HERE).with_name("mosaic_shards.zip")) as shards:
        shards.extractall(tmp_path)
    place = tmp_path / "none"
    index = json.loads((place / "index.json").read_text())
    for shard in index["shards"]:
        raw = shard["raw_data"]
        content = (place / raw["basename"]).read_bytes()
        own = getattr(xxhash, name)(content).hexdigest()
        raw["hashes"] = {name: raw["hashes"].get(name, own)}
    (place / "index.json").write_text(json.dumps(index))
    assert len(list(rows_in(place))) == ROWS
    content = bytearray((place / "shard.00001.mds").read_bytes())
    content[-1] ^= 1
    (place / "shard.00001.mds").write_bytes(content)
    with pytest.raises(DataBroken, match=rf"shard\.00001\.mds: its {name} is .*Upload it again"):
        list(rows_in(place))


def test_two_endpoints_with_one_bucket_share_no_cache(server, tmp_path, monkeypatch):
    """Mosaic's writer makes no hashes by default: the indexes of both are the same."""
    monkeypatch.setenv("EVENSTEP_DATA_CACHE", str(tmp_path / "cache"))
    with zipfile.ZipFile(Path(HERE).with_name("mosaic_shards.zip")) as shards:
        shards.extractall(tmp_path)
    place = tmp_path / "none"
    index = json.loads((place / "index.json").read_text())
    for shard in index["shards"]:
        shard["raw_data"]["hashes"] = {}
    (place / "index.json").write_text(json.dumps(index))
    read = {}
    with s3_server() as other:
        for store in (server, other):
            name = uploaded(store, place, name="same-data")
            for variable, value in store.variables.items():
                monkeypatch.setenv(variable, value)
            read[store.port] = [str(row) for row in rows_in(name)]
            shard = place / "shard.00000.mds"
            shard.write_bytes(shard.read_bytes()[:-1] + b"\xff")
    assert read[server.port] != read[other.port]


def test_an_object_that_goes_during_a_run_is_told(proxy, server, tmp_path):
    address = uploaded(server, written("webdataset", tmp_path / "data"))
    reading = iter(rows_in(address))
    next(reading)
    store_of(server).rm_file(f"{address.removeprefix('s3://')}/003.tar")
    with pytest.raises(DataBroken, match=r"s3://.*/003\.tar: there is no such object"):
        list(reading)


def test_passing_faults_are_tried_again_and_missing_rights_are_told(proxy, server, tmp_path):
    address = uploaded(server, written("webdataset", tmp_path / "data"))
    faults = itertools.cycle(["cut", None, 503, None, "drop", None, 500, None])
    proxy.harm = lambda method, path: next(faults) if ".tar" in path else None
    assert len(list(rows_in(address))) == ROWS
    proxy.harm = lambda method, path: 403 if path.endswith("001.tar") else None
    with pytest.raises(SpecError, match=r"no right to read objects there \(s3:GetObject") as raised:
        list(rows_in(address, cache=tmp_path / "empty"))
    assert "\n" not in str(raised.value)


def test_a_run_without_rights_ends_with_one_line(proxy, server, tmp_path):
    address = uploaded(server, written("parquet", tmp_path / "data"))
    proxy.harm = lambda method, path: 403
    (tmp_path / "my_task.py").write_text(
        "from torch import nn\nfrom service.task import rows_in, supervised\n\n\n"
        "def task():\n"
        f"    rows = rows_in({address!r})\n"
        "    return supervised(model=lambda: nn.Linear(3, 3), train=rows, loss='cross_entropy')\n"
    )
    spec = {"name": "job", "task": "./my_task.py:task", "batch": {"global_batch": 4}}
    spec |= {"length": {"steps": 3}, "optimizer": {"name": "sgd", "lr": 0.1}}
    (tmp_path / "job.yaml").write_text(json.dumps(spec))
    done = evenstep("run", "job.yaml", cwd=tmp_path, **proxy.server.variables)
    assert done.returncode == 64, done.stderr
    assert "no right to list objects" in done.stderr
    assert "Traceback" not in done.stderr


# ---- the cache


def filled(size: int):
    def fetch(descriptor: int) -> None:
        os.pwrite(descriptor, bytes(size), 0)

    return fetch


def bytes_in(place: Path) -> int:
    return sum(file.stat().st_size for file in place.iterdir())


def test_the_cache_keeps_its_limit_and_removes_the_oldest(tmp_path):
    cache = Cache(tmp_path, limit_bytes=350)
    for key in "abc":
        cache.hold(key, 100, filled(100)).close()
    cache.hold("a", 100, filled(100)).close()  # b is the oldest now
    cache.hold("d", 100, filled(100)).close()
    assert bytes_in(tmp_path) == 300
    fetched = []
    for key in "acdb":
        cache.hold(key, 100, lambda file, key=key: fetched.append(key)).close()
    assert fetched == ["b"]


def test_a_file_in_use_is_not_removed(tmp_path):
    cache = Cache(tmp_path, limit_bytes=250)
    held = cache.hold("a", 100, filled(100))
    for key in "bcd":
        cache.hold(key, 100, filled(100)).close()
    assert held.path.exists()
    held.close()
    with pytest.raises(SpecError, match="Raise cache_gib of rows_in"):
        cache.hold("large", 251, filled(251))


def test_a_failed_download_leaves_nothing(tmp_path):
    def fetch(descriptor: int) -> None:
        raise EvenstepError("gone")

    cache = Cache(tmp_path, limit_bytes=250)
    with pytest.raises(EvenstepError, match="gone"):
        cache.hold("a", 100, fetch)
    assert [file.name for file in tmp_path.iterdir()] == [".lock"]


READER = """
import sys
from service.task import rows_in
print(len(list(rows_in(sys.argv[1], shuffle=2, cache_gib=float(sys.argv[2])))))
"""


def reader(address: str, proxy, cache: Path, *, gib: float = 1.0):
    return start(
        [sys.executable, "-c", READER, address, gib],
        cwd=cache.parent,
        env=CLEAN | proxy.server.variables | {"EVENSTEP_DATA_CACHE": str(cache)},
        stdout=subprocess.PIPE,
        text=True,
    )


def test_processes_download_each_object_once_and_survive_a_kill_of_another(proxy, server, tmp_path):
    address = uploaded(server, written("webdataset", tmp_path / "data"))
    asked, released = threading.Event(), threading.Event()

    def harm(method: str, path: str) -> None:
        if method == "GET" and path.endswith(".tar") and not released.is_set():
            asked.set()
            released.wait(60)

    proxy.harm = harm
    killed = reader(address, proxy, tmp_path / "cache")
    assert asked.wait(60)
    until(lambda: list((tmp_path / "cache").glob("*.part")), "a partial file")
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    released.set()
    assert list((tmp_path / "cache").glob("*.part")), "it was killed in the middle"
    proxy.seen.clear()
    both = [reader(address, proxy, tmp_path / "cache") for _ in range(2)]
    assert [process.communicate()[0].strip() for process in both] == [str(ROWS)] * 2
    loaded = [path for method, path in proxy.seen if method == "GET" and path.endswith(".tar")]
    assert len(loaded) == len(set(loaded)) == 4
    assert not list((tmp_path / "cache").glob("*.part"))


def test_a_partial_file_of_a_dead_process_counts_and_is_removed(tmp_path):
    (tmp_path / "dead-200.part").write_bytes(bytes(200))
    with (tmp_path / "alive-50.part").open("wb") as alive:
        alive.write(bytes(50))
        alive.flush()
        fcntl.flock(alive, fcntl.LOCK_EX)
        Cache(tmp_path, limit_bytes=250).hold("a", 100, filled(100)).close()
        assert {file.name for file in tmp_path.glob("*.part")} == {"alive-50.part"}
    assert bytes_in(tmp_path) == 150


def test_a_small_cache_is_enough_for_two_processes(proxy, server, tmp_path):
    place = written("webdataset", tmp_path / "data")
    address = uploaded(server, place)
    limit = 4.5 * max(file.stat().st_size for file in place.iterdir()) / 2**30
    both = [reader(address, proxy, tmp_path / "cache", gib=limit) for _ in range(2)]
    assert [process.communicate()[0].strip() for process in both] == [str(ROWS)] * 2
    assert bytes_in(tmp_path / "cache") <= limit * 2**30
