"""Kills, stops and starts the nodes of an elastic job at random, then compares it with one process.

python -m tests.chaos.elastic [--minutes 10] [--seed 1] [--bitwise] [--bucket]

Every node but the first is killed or asked to stop, and started again; sometimes node 0 is killed
as well, as on a cluster, which starts it again. With `--bitwise` there are two nodes
instead of three, and the runs must be equal in bits. With `--bucket` the run is in an object store,
and a node that is started again has an empty disk.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))
from elastic_nodes import Nodes, elastic_nodes, ended, require_undisturbed
from stored import brought_back
from stores import BUCKET, s3_server

from chaos.options import asked_for
from service.runs.directory import RunDirectory
from service.storage.address import address_in

LEADER_OF_TEN = 1
"""In how many of ten cases node 0 is killed."""


def disturbed(nodes: Nodes, count: int, *, seconds: float, chance: random.Random) -> Counter[str]:
    """Disturb the job of `count` nodes for so long; what happened, and how often.

    At the end all nodes run.
    """
    here = {index: nodes.start(index) for index in range(count)}
    seen: Counter[str] = Counter()
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        time.sleep(chance.uniform(1, 12))
        index = 0 if chance.randrange(10) < LEADER_OF_TEN else chance.randrange(1, count)
        kind = "kill" if index == 0 or chance.random() < 0.7 else "stop"
        if here[index].poll() is None:
            here[index].send_signal(signal.SIGKILL if kind == "kill" else signal.SIGTERM)
            seen[f"{kind} of node {'0' if index == 0 else 'N'}"] += 1
            ended(here[index])
            time.sleep(chance.uniform(0, 8))
        for each, process in here.items():
            if process.poll() is not None:
                seen[f"exit {process.returncode}"] += 1
                if nodes.address is not None:
                    shutil.rmtree(nodes.place / f"disk-{each}", ignore_errors=True)
                here[each] = nodes.start(each)
    nodes.release()
    try:
        codes = [ended(process) for process in here.values()]
    except subprocess.TimeoutExpired:
        codes = [process.poll() for process in here.values()]
    assert codes == [0] * count, f"{codes} {dict(seen)}\n{nodes.everything()}"
    return seen


@contextmanager
def in_a_bucket() -> Iterator[dict[str, Any]]:
    """Where the run is, and how it is reached."""
    with s3_server() as server:
        os.environ.update(server.variables)  # for what the test reads itself
        address = address_in(f"s3://{BUCKET}/elastic")
        yield {"address": address, "EVENSTEP_LEASE_SECONDS": "3", **server.variables}


def main() -> None:
    asked = asked_for(__doc__, "--bucket")
    count = 2 if asked.bitwise else 3
    with (
        tempfile.TemporaryDirectory() as place,
        in_a_bucket() if asked.bucket else nullcontext({}) as store,
        elastic_nodes(
            Path(place),
            f"1:{count}",
            wait_seconds=5,
            steps=int(asked.minutes * 600),
            sections={"exactness": "bitwise"} if asked.bitwise else {},
            JOB_COMPLETION_INDEX="as on a cluster",
            **store,
        ) as nodes,
    ):
        chance = random.Random(asked.seed)
        seen = disturbed(nodes, count, seconds=60 * asked.minutes, chance=chance)
        require_undisturbed(nodes, bits=asked.bitwise)
        run = RunDirectory(Path(place) / "runs/job")
        if nodes.address is not None:
            run = brought_back(nodes.address, Path(place) / "end")
        processes = Counter(attempt["processes"] for attempt in run.read_facts()["attempts"])
        print(f"{dict(seen)}; attempts by processes: {dict(processes)}; equal to one process")


if __name__ == "__main__":
    main()
