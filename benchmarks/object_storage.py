"""Cost of a run that lives in a bucket: stall of a save, upload and resume, beside plain clients.

    python -m benchmarks.object_storage s3://bucket/prefix [--millions 25] [--rounds 5]

The server and its credentials are those of the environment (AWS_ENDPOINT_URL, ...); the bucket must
exist.  A model of that many float32 parameters with Adam: 12 bytes per parameter.

* upload: one checkpoint, published under a new name, against the same files put by boto3 in pieces
  of 16 MiB, eight at a time, and by s3fs; the ways take turns, and ratios are of each round.
* resume: bring the newest checkpoint to an empty directory, verify and load it, against boto3
  that gets the same pieces, eight at a time, into files on disk, and a local resume from these.
* stall: how long training waits for a save, with and without the upload of the checkpoints beside
  it; `slowdown` is that of training work while a checkpoint is written or uploaded.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import secrets
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import boto3
import fsspec
import torch
from accelerate import Accelerator
from botocore.config import Config

from benchmarks.checkpoint_stall import figures, state_of, wait_for, work
from service.basics.multipart import PART_BYTES
from service.checkpoints.checkpoints import Checkpoints
from service.checkpoints.snapshots import expected_bytes, load
from service.distributed.world import World, alone
from service.runs.checkpoint_files import checkpoints_in, damage_of
from service.runs.directory import RunDirectory, first_facts
from service.spec.files import dump_spec, load_spec
from service.spec.models import CheckpointSpec, Spec
from service.storage.address import Address, address_in
from service.storage.beside import Uploading
from service.storage.lease import taken
from service.storage.mirror import Mirror
from service.storage.published import newest_published
from service.storage.scratch import Note, bring
from service.storage.store import AT_ONCE, open_store

SPEC = {
    "name": "job",
    "task": "./task.py:task",
    "batch": {"global_batch": 1},
    "length": {"steps": 1},
    "optimizer": {"name": "adam", "lr": 0.1},
    "checkpoint": {"keep": 1},
}
Part = tuple[Path, int, str]
"""A file, where the part begins in it, and the key of its object."""


def quiet(text: str) -> None:
    """Nothing: the figures are what is printed."""


def run_in(place: Path) -> tuple[RunDirectory, Spec]:
    """The directory of a run that has begun."""
    (place / "job.yaml").write_text(json.dumps(SPEC))
    spec = load_spec(place / "job.yaml")
    run = RunDirectory(place / "job")
    run.path.mkdir()
    run.spec.write_text(dump_spec(spec))
    run.write_facts(first_facts(spec, run))
    return run, spec


def save(millions: int, run: RunDirectory) -> int:
    """Save one checkpoint; its size in bytes."""
    state = state_of(millions)
    state.step = 1
    made = Checkpoints(
        run.checkpoints,
        world=alone(),
        spec=CheckpointSpec(asynchronous=False),
        facts={},
        say=print,
    )
    made.save(state)
    made.close()
    (checkpoint,) = checkpoints_in(run.checkpoints)
    return sum(file.stat().st_size for file in checkpoint.path.iterdir())


def mirror_to(address: Address, run: RunDirectory, spec: Spec) -> tuple[Mirror, Any]:
    """The upload of a run to an address, with its lease."""
    store = open_store(address)
    lease = taken(store, say=quiet)
    told = {"held": newest_published(store), "scratch": "benchmark", "spec": spec.checkpoint}
    return Mirror(store, lease, run, say=quiet, **told), lease


def client() -> Any:
    """A plain client of S3."""
    return boto3.client("s3", config=Config(max_pool_connections=AT_ONCE))


def parts_of(run: RunDirectory, prefix: str) -> list[Part]:
    """The files of the checkpoint in pieces."""
    (checkpoint,) = checkpoints_in(run.checkpoints)
    return [
        (file, begin, f"{prefix}/{file.name}@{begin}")
        for file in sorted(checkpoint.path.iterdir())
        for begin in range(0, file.stat().st_size, PART_BYTES)
    ]


def content_of(part: Part) -> bytes:
    file, begin, _ = part
    with file.open("rb") as opened:
        opened.seek(begin)
        return opened.read(PART_BYTES)


class Cost(NamedTuple):
    """What an action took."""

    seconds: float
    processor_seconds: float
    """Of this process, in all of its threads; not of the server."""


def cost_of(action: Callable[[], object]) -> Cost:
    began, used = time.perf_counter(), time.process_time()
    action()
    return Cost(time.perf_counter() - began, time.process_time() - used)


def by_boto3(s3: Any, run: RunDirectory, address: Address) -> list[Part]:
    """Put the checkpoint with a plain client."""
    bucket, _, prefix = address.path.partition("/")
    parts = parts_of(run, f"{prefix}/{secrets.token_hex(4)}")
    with ThreadPoolExecutor(AT_ONCE) as threads:
        put = [
            threads.submit(
                lambda p=part: s3.put_object(Bucket=bucket, Key=p[2], Body=content_of(p))
            )
            for part in parts
        ]
        for each in put:
            each.result()
    return parts


def by_s3fs(driver: Any, run: RunDirectory, address: Address) -> None:
    """Put the checkpoint with fsspec's driver, eight objects at a time."""
    parts = parts_of(run, f"{address.path}/{secrets.token_hex(4)}")
    for first in range(0, len(parts), AT_ONCE):
        driver.pipe({part[2]: content_of(part) for part in parts[first : first + AT_ONCE]})


def takes_turns(names: Iterable[str], number: int) -> list[str]:
    """The names, every second time in reverse: the first way pays for what the disk still does."""
    return list(names)[:: -1 if number % 2 else 1]


def upload(address: Address, millions: int, rounds: int, parent: Path) -> None:
    """The table of uploads."""
    with tempfile.TemporaryDirectory(dir=parent) as place:
        run, spec = run_in(Path(place))
        size = save(millions, run)
        s3, driver = client(), fsspec.filesystem("s3", use_listings_cache=False)
        found: dict[str, list[Cost]] = {"boto3": [], "s3fs": [], "Evenstep": []}
        for number in range(rounds + 1):
            (saved,) = checkpoints_in(run.checkpoints)
            aside = saved.path.rename(Path(place) / "aside")
            mirror, lease = mirror_to(address / secrets.token_hex(4), run, spec)
            aside.rename(saved.path)  # as a save of a run that is on: it needs no verification
            ways: dict[str, Callable[[], object]] = {
                "boto3": partial(by_boto3, s3, run, address),
                "s3fs": partial(by_s3fs, driver, run, address),
                "Evenstep": mirror.publish,
            }
            for name in takes_turns(ways, number):
                found[name].append(cost_of(ways[name]))
            lease.release()
    told(f"upload of {size / 2**20:,.0f} MiB", size, found)


def resume(address: Address, millions: int, rounds: int, parent: Path) -> None:
    """The table of resumes."""
    with tempfile.TemporaryDirectory(dir=parent) as place:
        run, spec = run_in(Path(place))
        size = save(millions, run)
        parts = by_boto3(client(), run, address)
        mirror, lease = mirror_to(address / secrets.token_hex(4), run, spec)
        mirror.publish()
        lease.release()
        state = state_of(millions, stepped=False)

        def by_hand(directory: Path) -> None:
            gotten(parts, address, directory)
            loaded(directory, state)

        def ours(directory: Path) -> None:
            fetched(mirror, directory)
            loaded(directory, state)

        ways = {"boto3 and a local resume": by_hand, "Evenstep": ours}
        found: dict[str, list[Cost]] = {name: [] for name in ways}
        for number in range(rounds + 1):
            for name in takes_turns(ways, number):
                with tempfile.TemporaryDirectory(dir=parent) as one:
                    found[name].append(cost_of(partial(ways[name], Path(one) / "job")))
    told(f"resume from {size / 2**20:,.0f} MiB", size, found)


def gotten(parts: list[Part], address: Address, directory: Path) -> None:
    """Get the checkpoint with a plain client, and sync it."""
    s3 = client()
    bucket = address.path.partition("/")[0]
    target = directory / "checkpoints" / parts[0][0].parent.name
    target.mkdir(parents=True)
    files = {
        part[0].name: os.open(target / part[0].name, os.O_WRONLY | os.O_CREAT) for part in parts
    }

    def get(part: Part) -> None:
        content = s3.get_object(Bucket=bucket, Key=part[2])["Body"].read()
        os.pwrite(files[part[0].name], content, part[1])

    with ThreadPoolExecutor(AT_ONCE) as threads:
        list(threads.map(get, parts))
    for descriptor in files.values():
        os.fsync(descriptor)
        os.close(descriptor)


def fetched(mirror: Mirror, directory: Path) -> None:
    """Bring the run as a resume does."""
    store = open_store(mirror._store.address)
    held = newest_published(store)
    assert held is not None
    bring(store, held, RunDirectory(directory), quiet)


def loaded(directory: Path, state: Any) -> None:
    """Verify and load the checkpoint, as a local resume does."""
    (checkpoint,) = checkpoints_in(directory / "checkpoints")
    assert damage_of(checkpoint) is None
    load(checkpoint.path, state)


def told(title: str, size: int, found: dict[str, list[Cost]]) -> None:
    """Print a table, without the first round."""
    print(
        f"\n{title}\n\n| way | seconds, median (largest) | MB/s | time of ours, relative |", end=""
    )
    print(" processor seconds here |\n|---|---|---|---|---|")
    ours = found["Evenstep"][1:]
    for name, costs in found.items():
        seconds = [cost.seconds for cost in costs[1:]]
        rate = size / 1e6 / statistics.median(seconds)
        pairs = zip(ours, seconds, strict=True)
        ratio = statistics.median(own.seconds / other for own, other in pairs)
        used = figures([cost.processor_seconds for cost in costs[1:]])
        print(f"| {name} | {figures(seconds)} | {rate:,.0f} | {ratio:.2f}x | {used} |", flush=True)


def saving(directory: Path, millions: int, rounds: int, between: float, to: Connection) -> None:
    """Save again and again, with training work between: stalls, durations and slowdowns."""
    torch.set_num_threads(1)
    world, state = World(Accelerator(cpu=True)), state_of(millions)
    alone_takes = statistics.median(work() for _ in range(5))
    spec = CheckpointSpec(keep=1)
    made = Checkpoints(directory, world=world, spec=spec, facts={}, say=print)
    made.reserve(expected_bytes(state.model, state.optimizer))
    wait_for(between)
    stalls, beside = [], []
    for _ in range(rounds + 1):
        state.step += 1
        made.save(state)
        until = time.perf_counter() + between
        while time.perf_counter() < until:
            beside.append(work() / alone_takes)
        stalls.append(made.timings()["save/stall_seconds"])
    made.finish()
    made.close()
    to.send((stalls[1:], beside))


def stall(address: Address, millions: int, rounds: int, between: float, parent: Path) -> None:
    """The table of stalls."""
    context = multiprocessing.get_context("spawn")
    print("\n| runs are in | stall, median (largest) | slowdown of work between saves |")
    print("|---|---|---|", flush=True)
    for name in ("a directory", "a bucket"):
        with tempfile.TemporaryDirectory(dir=parent) as place:
            run, spec = run_in(Path(place))
            here, there = context.Pipe(duplex=False)
            how = (run.checkpoints, millions, rounds, between, there)
            child = context.Process(target=saving, args=how)
            if name == "a bucket":
                mirror, lease = mirror_to(address / secrets.token_hex(4), run, spec)
                uploading = Uploading(mirror, lease, run, Note(run, "benchmark"), say=print)
                lease.keep(print)
                uploading.start(when_lost=lambda: print("lost"))
            child.start()
            stalls, beside = here.recv()
            child.join()
            if name == "a bucket":
                assert uploading.finish(lambda: 600.0) is None
            print(f"| {name} | {figures(stalls)} | {statistics.mean(beside):.2f}x |", flush=True)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("address")
    arguments.add_argument("--millions", type=int, default=25)
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--between", type=float, default=6.0, help="seconds between two saves")
    arguments.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()))
    arguments.add_argument("--parts", nargs="+", default=["upload", "resume", "stall"])
    given = arguments.parse_args()
    address = address_in(given.address)
    assert address is not None, "write s3://bucket/prefix"
    if "upload" in given.parts:
        upload(address, given.millions, given.rounds, given.directory)
    if "resume" in given.parts:
        resume(address, given.millions, given.rounds, given.directory)
    if "stall" in given.parts:
        stall(address, given.millions, given.rounds, given.between, given.directory)


if __name__ == "__main__":
    main()
