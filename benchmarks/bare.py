"""The digits recipe as a plain PyTorch script; prints the time of its first step.

The baseline of benchmarks/first_step.py.
"""

from __future__ import annotations

import os
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from service.recipes import digits


def main() -> None:
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
    data, _ = digits.split_by_class(*digits.load())
    model: nn.Module = digits.network(32, 0.25)
    if dist.is_initialized():
        model = DistributedDataParallel(model)
    sampler = DistributedSampler(data) if dist.is_initialized() else None
    batches = DataLoader(data, batch_size=96, sampler=sampler, shuffle=sampler is None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    inputs, targets = next(iter(batches))
    loss = F.cross_entropy(model(inputs), targets)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(time.time(), flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()
    # On a normal interpreter exit gloo sometimes aborts ("terminate called without an active
    # exception"), and torchrun would report the job as failed.
    os._exit(0)


if __name__ == "__main__":
    main()
