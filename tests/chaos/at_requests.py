"""Kills a run that lives in a store at each of its requests, and resumes it on an empty disk.

python -m tests.chaos.at_requests [--begin 1] [--end 1000]

For every request: killed just before it, and, if it changes something, also just after the store
has done it and before it is answered. After each kill every checkpoint that the store holds is
good; a resume on an empty disk ends in the bits of the undisturbed run, its metrics have each step
once, and the store holds no object that nothing needs.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import NamedTuple

sys.path.append(str(Path(__file__).parents[1]))
from commands import BIN, CLEAN, DEADLINE_SECONDS, evenstep, start
from stored import brought_back, make_job, newest_step, store_at
from stores import BUCKET, Harm, Proxy, Server, s3_server

from service.runs.directory import find_run
from service.runs.metrics_file import read_metrics
from service.runs.verification import compare
from service.storage.address import Address
from service.storage.published import newest_published

STEPS, SAVE_EVERY, ROWS = 12, 4, 7
SAVED = range(SAVE_EVERY, STEPS, SAVE_EVERY)
"""The steps that are saved, without the last one."""
LENGTH = f"length.steps={STEPS}"
ENOUGH_UNREACHED = 5
"""Numbers in a row that no run comes to, after which the sweep ends: how many requests a run makes
depends on how often its lease is renewed, and on whether its end is published with step 12."""


class Kill(NamedTuple):
    """What one kill did."""

    request: str
    """The method and the name of the object; empty if the run ended before."""
    step: int
    """The newest step in the store after it."""


def undisturbed(place: Path) -> None:
    """The job, and a run of it that nothing happens to."""
    make_job(place)
    done = evenstep("run", "job.yaml", LENGTH, "--runs", "short", cwd=place)
    assert done.returncode == 0, done.stderr


def killed_at(
    number: int, *, done: bool, server: Server, place: Path, address: Address, scratch: Path
) -> Kill:
    """Kill a run at its request of this number, before or after it is done, and resume it."""
    words = ("run", "job.yaml", LENGTH, "--runs", str(address))
    plain = server.variables | {"EVENSTEP_LEASE_SECONDS": "1.5"}
    struck: list[str] = []
    uploaded: set[str] = set()
    requests, is_started = itertools.count(1), threading.Event()
    with Proxy(server) as proxy:
        scratch.mkdir()

        def harm(method: str, path: str) -> Harm:
            # After each save, the run waits until that checkpoint is published.
            if method == "PUT" and "/published/" in path:
                for index, step in enumerate(SAVED):
                    if f"step-{step:08d}" in uploaded:
                        (scratch / f"go-on-{index}").touch()
            elif method == "PUT":
                uploaded.update(path.split("/"))
            if next(requests) != number:
                return "drop" if struck else None
            struck.append(f"{method} {path.partition(address.path)[2].partition('?')[0]}")
            assert is_started.wait(DEADLINE_SECONDS)
            if done:
                return process.kill
            process.kill()
            return "drop"

        proxy.harm = harm
        rows = " ".join(str((step + 1) * ROWS) for step in SAVED)
        hold = {"HOLD_AT_ROWS": rows, "GO_ON_WITH": f"{scratch}/go-on-"}
        environ = plain | hold | {"EVENSTEP_SCRATCH": str(scratch / "one")}
        process = start(
            (BIN / "evenstep", *words),
            cwd=place,
            env=CLEAN | environ | {"AWS_ENDPOINT_URL": proxy.server.url},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        is_started.set()
        _, told = process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == (-9 if struck else 0), told
    held = newest_published(store_at(address / "job"))
    if held is not None:
        brought_back(address, scratch / "after")  # each checkpoint is good
    step = newest_step(address)
    again = evenstep(*words, cwd=place, **plain, EVENSTEP_SCRATCH=str(scratch / "two"))
    assert again.returncode == 0, again.stderr
    assert_undisturbed(place, address, scratch)
    return Kill(struck[0] if struck else "", step)


def assert_undisturbed(place: Path, address: Address, scratch: Path) -> None:
    """The run in the store is the undisturbed one, and nothing else is there."""
    store = store_at(address / "job")
    at_end = brought_back(address, scratch / "end")
    compared = compare(find_run(place / "short/job"), at_end, level="bits", tolerance=0)
    assert compared.equal, compared.lines
    assert [row["step"] for row in read_metrics(at_end.metrics)] == [*range(1, STEPS + 1)]
    assert at_end.read_facts()["state"] == "done"
    held = newest_published(store)
    assert held is not None
    assert set(store.sizes("data/")) == held.objects()
    assert set(store.sizes("published/")) == {held.name}


def main() -> None:
    """Every request, until no run comes to some of them."""
    asked = argparse.ArgumentParser()
    asked.add_argument("--begin", type=int, default=1)
    asked.add_argument("--end", type=int, default=1000)
    given = asked.parse_args()
    kills: list[Kill] = []
    with tempfile.TemporaryDirectory() as directory, s3_server() as server:
        os.environ.update(server.variables)
        place = Path(directory)
        undisturbed(place)
        unreached = 0
        for number in range(given.begin, given.end + 1):
            kills_before = len(kills)
            for done in (False, True):
                kill = killed_at(
                    number,
                    done=done,
                    server=server,
                    place=place,
                    address=Address("s3", f"{BUCKET}/{number}-{done}"),
                    scratch=place / f"{number}-{done}",
                )
                if not kill.request:
                    continue
                kills.append(kill)
                when = "after " if done else "before"
                print(f"{number:4} {when} {kill.request}: step {kill.step}", flush=True)
                if kill.request.split()[0] not in ("PUT", "DELETE"):
                    break
            unreached = unreached + 1 if len(kills) == kills_before else 0
            if unreached == ENOUGH_UNREACHED:
                break
    steps = {step: sum(kill.step == step for kill in kills) for step in (0, 4, 8, 12)}
    print(
        f"{len(kills)} kills; the store held no checkpoint after {steps.pop(0)} of them, and step "
        + ", ".join(f"{step} after {count}" for step, count in steps.items())
        + "; every resume ended in the bits of the undisturbed run."
    )


if __name__ == "__main__":
    main()
