"""Micro-batches are brought to the device beside its work, and arrive before they are used."""

from __future__ import annotations

import pytest
import torch

from service.data.batches import carrier


def test_a_nest_keeps_its_form() -> None:
    value = {"images": torch.ones(3, 2), "lengths": (torch.arange(3), "of each")}
    brought = carrier(torch.device("cpu"))(value)
    assert brought["images"] is value["images"], "it is there already"
    assert brought["lengths"][1] == "of each"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("pinned", [True, False])
def test_what_is_brought_to_a_gpu_under_load_is_right(pinned: bool) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    bring = carrier(device)
    factor = torch.randn(4096, 4096, device=device)
    sums = []
    for number in range(60):
        sent = torch.full((1 << 20,), float(number))
        for _ in range(4):
            factor @ factor  # the stream of the work is behind all the time
        brought = bring((sent.pin_memory() if pinned else sent, number))
        sums.append(brought[0].sum())
        del sent, brought  # whoever takes this memory next must not write into it too soon
    assert torch.stack(sums).tolist() == [float(n << 20) for n in range(60)]
