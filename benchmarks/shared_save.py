"""Benefit of shared saves: the processes of a node write a checkpoint together.

    torchrun --nproc-per-node N -m benchmarks.shared_save [--millions 100] [--rounds 5]
                                                          [--part-mib 16]

A model of that many float32 parameters with Adam on each of N processes, 12 bytes a parameter,
saved by the first of them in one stream and, in turn, in shares of at least four parts: one for
each process, or two for one where training needs no core for the second.  `stall` is the time until
training may go on, `durable` until the checkpoint is published, and `lost` what training lost by
then: the stall, and the slowdown of each unit of training work that runs at the same time as the
writers.  The slowest process of a unit counts, as in a step.  Medians, with the
largest behind.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator

from benchmarks.checkpoint_stall import figures, state_of, work
from service.basics.multipart import PART_BYTES
from service.checkpoints.checkpoints import Checkpoints
from service.checkpoints.snapshots import expected_bytes
from service.distributed.world import World
from service.optimization.train_state import TrainState
from service.spec.models import CheckpointSpec

NEVER = 1 << 50
"""Bytes of a part that is larger than any state, which its lead then writes alone."""
_QUIET = 5


class Way:
    """The saves of one way, and their measurements."""

    def __init__(self, part_bytes: int, asynchronous: bool, world: World, place: Path) -> None:
        self.asynchronous = asynchronous
        self._world = world
        self._made = Checkpoints(
            place / f"{part_bytes}-{asynchronous}",
            world=world,
            spec=CheckpointSpec(keep=1, asynchronous=asynchronous),
            facts={},
            say=print,
            part_bytes=part_bytes,
        )
        self._stalls: list[float] = []
        self._durables: list[float] = []
        self._lost: list[float] = []

    def save(self, state: TrainState) -> None:
        """One save, with concurrent training work of all processes until it is on disk."""
        if not self._stalls:
            self._made.reserve(expected_bytes(state.model, state.optimizer))
        quiet = statistics.median(self._step() for _ in range(_QUIET))
        state.step += 1
        self._world.barrier()
        self._made.save(state)
        told = self._made.timings()
        self._stalls.append(told["save/stall_seconds"])
        lost = self._stalls[-1]
        while not self._world.from_lead("save/durable_seconds" in told):
            lost += self._step() - quiet
            told |= self._made.timings()
        self._lost.append(lost)
        if self._world.is_lead:
            self._durables.append(told["save/durable_seconds"])

    def _step(self) -> float:
        began = time.perf_counter()
        work()
        self._world.barrier()
        return time.perf_counter() - began

    def row(self, name: str) -> str:
        """Its row of the table; the first save, which gets the memory, is left out."""
        how = "asynchronous" if self.asynchronous else "blocking"
        return (
            f"| {self._world.processes} | {how} | {name} | {figures(self._stalls[1:])} "
            f"| {figures(self._durables[1:])} | {figures(self._lost[1:])} |"
        )

    def close(self) -> None:
        self._made.finish()
        self._made.close()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--millions", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--part-mib", type=int, default=PART_BYTES >> 20)
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()))
    told = parser.parse_args()
    torch.set_num_threads(1)
    world, state = World(Accelerator(cpu=True)), state_of(told.millions)
    with tempfile.TemporaryDirectory(dir=told.directory) as own:
        place = Path(world.from_lead(own))
        ways = {
            (name, asynchronous): Way(part_bytes, asynchronous, world, place)
            for asynchronous in (False, True)
            for name, part_bytes in (("the first", NEVER), ("all, in shares", told.part_mib << 20))
        }
        for _ in range(told.rounds + 1):
            for way in ways.values():
                way.save(state)
        for way in ways.values():
            way.close()
        if world.is_lead:
            print("| processes | save | written by | stall | durable | lost |")
            print("|--:|---|---|---|---|---|")
            for (name, _), way in ways.items():
                print(way.row(name), flush=True)
        world.barrier()
    dist.barrier()
    os._exit(0)  # gloo's threads sometimes abort the interpreter at exit


if __name__ == "__main__":
    main()
