"""A job of `benchmarks.models` by the script that a person writes for it, alone or by torchrun.

python -m benchmarks.plain NAME DIRECTORY [WORKERS]
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from benchmarks.models import JOBS, OF_FILES, Job


def main() -> None:
    job, directory = (JOBS | OF_FILES)[sys.argv[1]], Path(sys.argv[2])
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
    lead = not dist.is_initialized() or dist.get_rank() == 0
    torch.manual_seed(0)
    model = job.model()
    wrapped: nn.Module = DistributedDataParallel(model) if dist.is_initialized() else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    workers = int(sys.argv[3]) if len(sys.argv) > 3 else 0
    train(job, wrapped, optimizer, workers=workers, telling=lead)
    if lead:
        print(f"test loss {tested(job, model):.4f}")
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(state, directory / "checkpoint.pt")
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def train(
    job: Job,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    workers: int,
    telling: bool,
) -> None:
    data = job.rows(job.train_rows, 1)
    sampler = DistributedSampler(data) if dist.is_initialized() else None
    loader = DataLoader(
        data,
        batch_size=job.batch,
        sampler=sampler,
        shuffle=sampler is None,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    model.train()
    step, epoch, began = 0, 0, time.perf_counter()
    while step < job.steps:
        if sampler is not None:
            sampler.set_epoch(epoch)
        for inputs, targets in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs).flatten(0, -2), targets.flatten())
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            step += 1
            if step % 10 == 0 and telling:
                rate = step * job.batch / (time.perf_counter() - began)
                print(f"step {step}  loss {loss.item():.4f}  {rate:.0f} rows/s")
            if step == job.steps:
                break
        epoch += 1


@torch.no_grad()
def tested(job: Job, model: nn.Module) -> float:
    """The mean loss over the test rows."""
    model.eval()
    total, count = 0.0, 0
    for inputs, targets in DataLoader(job.rows(job.test_rows, 2), batch_size=256):
        scores = model(inputs).flatten(0, -2)
        total += F.cross_entropy(scores, targets.flatten(), reduction="sum").item()
        count += targets.numel()
    return total / count


if __name__ == "__main__":
    main()
