"""Cost of a look at many runs in a bucket: its time, and its requests by kind.

    python -m benchmarks.stored_runs s3://bucket/prefix RUN [--runs 1000] [--going-on 20]

The server and its credentials are those of the environment (AWS_ENDPOINT_URL, ...); the bucket must
exist, and nothing below the prefix. RUN is the directory of a finished run: its files without
checkpoints are published under so many names, some of which look as if they went on. Measured are
the first look, as `watch --all` and `report --all --serve` take it, and the looks after it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from service.monitoring.live_runs import StoredRuns
from service.storage.address import address_in
from service.storage.copies import Copies
from service.storage.lease import taken
from service.storage.published import DATA, Piece, Published, Stamp
from service.storage.store import Store, in_parallel, open_store

_FILES = ("metrics.jsonl", "spec.yaml", "run.json")
_LOOKS = 40


def publish(store: Store, run: Path, *, goes_on: bool) -> None:
    """Publish the files of a run; one that goes on has a lease of this process."""
    if goes_on:
        taken(store, say=lambda text: None)
    stamp, files = Stamp(1, 1), {}
    for name in _FILES:
        content = (run / name).read_bytes()
        if name == "run.json" and goes_on:
            content = json.dumps(json.loads(content) | {"state": "running"}).encode()
        piece = f"{DATA}{stamp}/{name}"
        store.put(piece, content)
        files[name] = [Piece(0, len(content), hashlib.sha256(content).hexdigest(), piece)]
    published = Published(stamp, "benchmark", "benchmark", files)
    store.put(published.name, published.encoded())


@contextmanager
def counted(store: Store) -> Iterator[Counter[str]]:
    """How many requests of each kind the driver makes meanwhile."""
    client, counts, lock = store._driver._client(), Counter[str](), threading.Lock()

    def count(model: Any, **told: Any) -> None:
        with lock:
            counts[model.name] += 1

    client.meta.events.register("before-call.s3", count)
    yield counts
    client.meta.events.unregister("before-call.s3", count)


def main() -> None:
    """Publish the runs, look at them, and print a line for each measurement."""
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("address")
    asked.add_argument("run", type=Path)
    asked.add_argument("--runs", type=int, default=1000)
    asked.add_argument("--going-on", type=int, default=20)
    given = asked.parse_args()
    address = address_in(given.address)
    assert address is not None
    store = open_store(address)
    in_parallel(
        lambda n: publish(store.below(f"run-{n:05d}"), given.run, goes_on=n < given.going_on),
        range(given.runs),
    )
    with tempfile.TemporaryDirectory() as text:
        runs = StoredRuns(Copies(Path(text), below=[store]), every_seconds=1e-9)
        for number in range(_LOOKS):
            with counted(store) as counts:
                began, used = time.monotonic(), time.process_time()
                found, broken = runs.look()
                took, used = time.monotonic() - began, time.process_time() - used
            if number in (0, 1, 2, _LOOKS - 1):
                states = Counter(run.state for run in found)
                print(
                    f"look {number}: {took:.2f} s ({used:.2f} s of this process), "
                    f"{dict(counts)}, {dict(states)}, {len(broken)} unread",
                    flush=True,
                )
        size = sum(file.stat().st_blocks * 512 for file in Path(text).rglob("*") if file.is_file())
        print(f"copies on disk: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
