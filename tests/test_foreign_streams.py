"""Streams as their libraries make them: torchdata, Hugging Face datasets, webdataset."""

import random
import tarfile
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jobs import spec_of, train_in_process
from test_features import difference
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from service.basics.errors import DataBroken, SpecError
from service.data.serialization import from_plain, plain
from service.data.streams import Stream, contents
from service.data.task import supervised
from service.runs.receipt_file import read_receipt

HERE = __file__
ROWS = 53
INPUTS = torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(0))
TARGETS = torch.arange(ROWS) % 3


def of(stream: Any, named: bool = False) -> supervised:
    test: list[Any] = [(INPUTS[row], int(TARGETS[row])) for row in range(9)]
    if named:
        test = [{"input": inputs, "labels": target} for inputs, target in test]
    return supervised(model=lambda: nn.Linear(4, 3), train=stream, test=test)


def of_torchdata(workers: int = 0) -> supervised:
    rows = TensorDataset(INPUTS, TARGETS)
    from torchdata.stateful_dataloader import StatefulDataLoader

    return of(StatefulDataLoader(rows, batch_size=None, shuffle=True, num_workers=workers))


def of_hugging_face(buffer: int) -> supervised:
    import datasets

    table = datasets.Dataset.from_dict({"input": INPUTS.tolist(), "labels": TARGETS.tolist()})
    stream = table.with_format("torch").to_iterable_dataset(num_shards=3)
    if buffer:
        stream = stream.shuffle(seed=3, buffer_size=buffer)
    return of(stream, named=True)


def of_webdataset(shard: str) -> supervised:
    import webdataset

    rows = webdataset.WebDataset(shard, shardshuffle=False, nodesplitter=lambda shards: shards)
    rows = rows.shuffle(10, rng=random.Random(1)).decode()
    return of(rows.map(lambda row: (torch.from_numpy(row["x.npy"]), int(row["cls"]))))


def written(shard: Path) -> Path:
    with tarfile.open(shard, "w") as file:
        for row in range(ROWS):
            content = BytesIO()
            np.save(content, INPUTS[row].numpy())
            parts = {"x.npy": content.getvalue(), "cls": str(int(TARGETS[row])).encode()}
            for ending, data in parts.items():
                member = tarfile.TarInfo(f"{row:04}.{ending}")
                member.size = len(data)
                file.addfile(member, BytesIO(data))
    return shard


@pytest.mark.filterwarnings("ignore:unclosed file")  # webdataset's, when it is begun anew
@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata's own
@pytest.mark.parametrize(
    ("factory", "arguments"),
    [
        ("of_torchdata", {}),
        ("of_torchdata", {"workers": 2}),
        ("of_hugging_face", {"buffer": 0}),
        ("of_hugging_face", {"buffer": 7}),
        ("of_webdataset", {"shard": "rows.tar"}),
    ],
)
def test_a_stream_of_a_library_gives_the_same_run_and_resumes(
    processes, tmp_path, factory, arguments
):
    if "shard" in arguments:
        arguments = {"shard": str(written(tmp_path / "rows.tar"))}
    job = spec_of("", length={"steps": 6}, test={}, batch={"global_batch": 20, "micro_batch": 7})
    job |= {"task": f"{HERE}:{factory}", "task_args": arguments}  # 120 rows: over two passes
    for count in (1, 2):
        processes(count).run(train_in_process, job, tmp_path / str(count))
    for stop_at in (4, None):  # in the second pass
        processes(1).run(train_in_process, job, tmp_path / "cut", stop_at)
    assert max(difference(tmp_path / "1", tmp_path / "2")) < 1e-5
    assert difference(tmp_path / "1", tmp_path / "cut") == (0, 0)
    receipts = [read_receipt(tmp_path / n / "job/receipt.jsonl") for n in ("1", "2", "cut")]
    assert receipts[0] == receipts[1] == receipts[2]


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
@pytest.mark.parametrize("kind", ["DataLoader", "StatefulDataLoader"])
def test_a_loader_of_batches_is_distinguished_from_a_stream_of_rows(kind):
    from torchdata.stateful_dataloader import StatefulDataLoader

    loader = {"DataLoader": DataLoader, "StatefulDataLoader": StatefulDataLoader}[kind](
        TensorDataset(INPUTS, TARGETS), batch_size=4
    )
    with pytest.raises(SpecError, match=r"returns batches\. Give its data set"):
        Stream(loader, mode="whole", index=0, of=1)
    task = supervised(model=lambda: nn.Linear(4, 3), train=[(INPUTS[0], 0)], test=loader)
    assert task.test_data() is loader.dataset


class Drawn:
    """Its order is drawn from torch's generator, pass by pass; it has no state at all."""

    def __iter__(self) -> Any:
        for row in torch.randperm(ROWS).tolist():
            yield row, random.random(), np.random.rand()


class Torn(Drawn):
    def __iter__(self) -> Any:
        yield from zip(range(5), range(5), strict=True)
        raise OSError("the connection is gone")


def test_what_is_read_again_is_what_was_read():
    whole = Stream(Drawn(), mode="whole", index=0, of=1, seed=4)
    rows = whole.take(150)
    cut = Stream(Drawn(), mode="whole", index=0, of=1, seed=4)
    assert cut.take(130) == rows[:130]
    again = Stream(Drawn(), mode="whole", index=0, of=1, seed=4)
    again.move_to([cut.place()], 0)
    assert again.take(20) == rows[130:]
    assert rows[:ROWS] != rows[ROWS : 2 * ROWS]


def test_a_stream_that_fails_says_where():
    stream = Stream(Torn(), mode="whole", index=0, of=1)
    told = r"The stream Torn failed after 5 rows: OSError: the connection is gone \(.*py:\d+\)"
    with pytest.raises(DataBroken, match=told):
        stream.take(9)


def test_rows_without_ids_are_named_by_what_they_hold():
    one = {"x": torch.tensor([1.0, 2.0]), "y": (3, "a", b"c", None), "z": np.arange(4)}
    same = {"x": torch.tensor([1.0, 2.0]), "y": (3, "a", b"c", None), "z": np.arange(4)}
    changed = [
        one | {"x": torch.tensor([1.0, 2.5])},
        one | {"x": torch.tensor([[1.0, 2.0]])},
        one | {"x": torch.tensor([1.0, 2.0], dtype=torch.float64)},
        one | {"y": (3, "b", b"c", None)},
        one | {"z": np.arange(5)},
        {key: one[key] for key in "xy"},
    ]
    names = contents([one, same, *changed])
    assert names[0] == names[1]
    assert len(set(names.tolist())) == 7


@pytest.mark.parametrize(
    "value",
    [
        None,
        {"a": [1, 2.5, "x", True], "b": {"c": None}},
        {3: "three", (1, 2): "pair"},
        {"$": "a key of ours"},
        (1, (2,), [3]),
        b"\x00\xff",
        torch.tensor([[True, False]]),
        torch.tensor(2.5, dtype=torch.bfloat16),
        torch.Generator().manual_seed(1).get_state(),  # as every run of the tests names it
        np.arange(6, dtype=np.uint32).reshape(2, 3),
        np.float32(0.1),
        np.random.RandomState(1).get_state(),
    ],
    ids=repr,
)
def test_a_foreign_state_is_restored_unchanged(value):
    import json

    back = from_plain(json.loads(json.dumps(plain(value))))
    assert repr(back) == repr(value)
    assert type(back) is type(value)


def test_what_only_a_pickle_could_keep_is_refused():
    with pytest.raises(TypeError, match="object is not supported"):
        plain({"a": [object()]})


def test_a_resumed_stream_leaves_the_next_run_in_this_process_at_the_beginning():
    rows: Any = of_hugging_face(buffer=0).train_data()
    whole = Stream(rows, mode="whole", index=0, of=1)
    first = whole.take(9)
    resumed = Stream(rows, mode="whole", index=0, of=1)
    resumed.move_to([whole.place()], 0)
    assert (contents(resumed.take(7)) == contents(whole.take(7))).all()
    again = Stream(rows, mode="whole", index=0, of=1)
    assert (contents(again.take(9)) == contents(first)).all()
