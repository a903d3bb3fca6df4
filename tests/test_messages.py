"""What processes tell each other is data: all else is refused, and nothing of it runs."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from processes import ProcessesFailed, ProcessesOf

from service.basics.errors import NotSaved, PeerLost, WillFailAgain
from service.basics.multipart import Part
from service.distributed.messages import from_bytes, to_bytes
from service.distributed.world import World


class Point(NamedTuple):
    x: torch.Tensor
    y: int


class Bomb:
    """Makes the file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


VALUES = [
    None,
    [True, 3, -1.5, float("inf"), "é\udcff", 10**30],
    {"a": (1, [2, ()]), "$": {1, 2}},
    {Part("model", 0, 7): "digest", ("x",): None},
    {"state": b"\0\xff", "path": Path("/runs/a")},
]


@pytest.mark.parametrize("value", VALUES, ids=range(len(VALUES)))
def test_plain_values_come_back_equal(value: Any) -> None:
    told = from_bytes(to_bytes(value))
    assert told == value
    assert type(told) is type(value)
    if isinstance(told, dict):
        assert [type(key) for key in told] == [type(key) for key in value]


def test_tensors_and_arrays_come_back_with_their_type_and_shape() -> None:
    kinds = [torch.float64, torch.bfloat16, torch.bool, torch.int8, torch.complex64]
    tensors = [torch.arange(6).reshape(2, 3).to(kind) for kind in kinds]
    tensors += [torch.tensor(2.5), torch.empty(0, 4), torch.arange(6.0).reshape(2, 3).T]
    for tensor, told in zip(tensors, from_bytes(to_bytes(tensors)), strict=True):
        assert (told.dtype, told.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(told, tensor)
    arrays = [np.arange(4, dtype=">i2").reshape(2, 2), np.array(["a", "bc"])]
    for array, told in zip(arrays, from_bytes(to_bytes(arrays)), strict=True):
        assert told.dtype == array.dtype
        assert np.array_equal(told, array)
    assert type(from_bytes(to_bytes(np.float32(1.5)))) is np.float32


def test_a_named_tuple_and_an_error_of_ours_keep_their_class() -> None:
    point, error = from_bytes(to_bytes((Point(torch.ones(2), 3), NotSaved("no space"))))
    assert type(point) is Point
    assert point.x.tolist() == [1, 1]
    assert type(error) is NotSaved
    assert str(error) == "no space"


@pytest.mark.parametrize(
    "header",
    [
        b'{"$": ["named", ["os:system", ["true"]]]}',
        b'{"$": ["named", ["service.distributed.messages:Path", ["x"]]]}',
        b'{"$": ["error", ["builtins:SystemExit", "0"]]}',
        b'{"$": ["tensor", ["load", [1]]]}',
        b'{"$": ["tensor", ["float32", [4611686018427387904]]]}',
        b'{"$": ["tensor", ["float32", [-1]]]}',
        b'{"$": ["array", ["O", [1]]]}',
        b'{"$": ["bytes", -3]}',
        b'{"$": 5}',
        b"[" * 60_000,
        b"\xff",
    ],
)
def test_what_was_not_made_by_us_is_refused(header: bytes) -> None:
    with pytest.raises(PeerLost, match="not in Evenstep's format"):
        from_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(PeerLost):
        from_bytes(pickle.dumps(header))


def send_a_pickle(world: World, mark: Path) -> None:
    """Process 1 sends what torch's own all_gather_object would: a pickle, and a harmful one."""
    if world.index == 0:
        world.gather("a word")
        return
    message = torch.frombuffer(bytearray(pickle.dumps(Bomb(mark))), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(2)]
    dist.all_gather(sizes, torch.tensor([message.numel()]))
    longest = max(int(size) for size in sizes)
    padded = torch.zeros(longest, dtype=torch.uint8)
    padded[: message.numel()] = message
    dist.all_gather([torch.empty_like(padded) for _ in range(2)], padded)


def test_a_pickle_that_comes_from_another_process_is_not_loaded(
    tmp_path: Path, processes: ProcessesOf
) -> None:
    with pytest.raises(ProcessesFailed, match="not in Evenstep's format"):
        processes(2).run(send_a_pickle, tmp_path / "mark")
    assert not (tmp_path / "mark").exists()


def say_what_cannot_travel(world: World) -> list[str]:
    said = []
    for ask in (world.gather, world.from_lead):
        try:
            ask(object() if world.is_lead else 1)
        except WillFailAgain as error:
            said.append(str(error))
    return said


def test_what_cannot_travel_ends_on_every_process_alike(processes: ProcessesOf) -> None:
    first, second = processes(2).run(say_what_cannot_travel)
    assert first == second
    assert len(first) == 2
    assert first[0].startswith("Object: it cannot be sent between processes: only numbers")
