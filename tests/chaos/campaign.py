"""Runs the real command, injures it by a seeded plan, and compares bits with an undisturbed run.

python -m tests.chaos.campaign --injuries 200 --seed 1     (what `make chaos` runs)
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
EVENSTEP = Path(sys.executable).with_name("evenstep")
MOMENTS = ("start-up", "forward", "backward", "test", "save", "exit")
IN_PLACE = ("kill one", "kill all", "raise", "SIGSTOP", "hang", "hang, lock held")
"""What the launcher answers by itself; after the others somebody starts the command again."""
FROM_OUTSIDE = ("kill launcher", "SIGTERM", "SIGINT", "SIGTERM to all")
KILLS = ("kill one", "kill all", "raise")
HANGS = ("SIGSTOP", "hang", "hang, lock held")
MEASURED_ANEW = ("time", "train/rows_per_second", "train/data_wait", "save/", "system/")
REHEARSALS = 3
"""Forward passes before the first step."""


@dataclass(frozen=True)
class Injury:
    """What happens to which rank, when it comes to `moment` the `count`-th time."""

    number: int
    kind: str
    moment: str
    rank: int
    count: int
    delay: float


@dataclass(frozen=True)
class Seen:
    """What an injury did."""

    injury: Injury
    lost: int | None
    """Steps taken again after it."""
    seconds: float | None
    """From the injury to the first forward pass of a step on all ranks."""


def planned(count: int, *, seed: int, processes: int, kinds: Sequence[str]) -> list[Injury]:
    """Injuries by chance, every kind and every moment among them as soon as there are enough."""
    chance = random.Random(seed)
    moments = [m for n in range(count // len(MOMENTS) + 1) for m in chance.sample(MOMENTS, 6)]
    many = [k for n in range(count // len(kinds) + 1) for k in chance.sample(kinds, len(kinds))]
    drawn = [
        _injury(number, kind, moment, chance, processes)
        for number, (kind, moment) in enumerate(zip(many[:count], moments[:count], strict=True))
    ]
    # One injury waits for the one before it, and the way out comes once, after the last step.
    in_order = sorted(drawn, key=lambda injury: injury.moment == "exit")
    return [replace(injury, number=number) for number, injury in enumerate(in_order)]


def _injury(number: int, kind: str, moment: str, chance: random.Random, processes: int) -> Injury:
    if moment == "exit" and kind not in ("kill one", "kill all", "kill launcher"):
        moment = "forward"  # on its way out a process has nothing left to save or to wait for
    if kind == "raise" and moment in ("start-up", "backward"):
        moment = "forward"  # before the first step, what a task raises is its author's mistake
    rank = 0 if moment == "save" else chance.randrange(processes)
    if kind in HANGS and moment == "start-up":
        moment = "test"  # in start-up a hang is given more time, which a campaign has not
    first = REHEARSALS + 1 if kind in ("raise", *HANGS) else 1
    count = chance.randint(first, 12) if moment in ("forward", "backward") else 1
    late = moment == "save" and kind.startswith("kill")
    return Injury(number, kind, moment, rank, count, chance.uniform(0.0, 0.04) if late else 0.0)


def spec_of(name: str, *, steps: int, hang_seconds: float) -> dict[str, Any]:
    """The job of the campaign; 50 rows a step in six micro-batches, the last of 5 rows."""
    return {
        "name": name,
        "task": f"{Path(__file__).with_name('job.py')}:task",
        "seed": 7,
        "batch": {"global_batch": 50, "micro_batch": 9},
        "length": {"steps": steps},
        "model": {"batchnorm": "micro"},
        "optimizer": {"name": "adamw", "lr": 0.003},
        "schedule": {"name": "cosine", "warmup_steps": 5},
        "tracking": {"log_every_steps": 1},
        "test": {"every_steps": 5, "micro_batch": 32},
        "checkpoint": {"every_steps": 4, "best": {"measure": "test/accuracy", "mode": "max"}},
        "faults": {
            "hang_timeout_seconds": hang_seconds,
            "startup_timeout_seconds": 20 + hang_seconds,
            "attempts_without_progress": 1000,
        },
    }


def run(
    place: Path, name: str, injuries: Sequence[Injury], *, processes: int, steps: int, hang: float
) -> list[Seen]:
    """Run the job to its end through all of the injuries; the command again as often as needed."""
    chaos = place / f"chaos-{name}"
    chaos.mkdir()
    (chaos / "plan.json").write_text(json.dumps([asdict(injury) for injury in injuries]))
    (chaos / "log").touch()
    spec = place / f"{name}.yaml"
    spec.write_text(json.dumps(spec_of(name, steps=steps, hang_seconds=hang)))
    words = [EVENSTEP, "run", spec, "--processes", processes, "--max-restarts", 1000]
    for _ in range(len(injuries) + 1):
        code = _command(words, place, chaos)
        if code == 0:
            return seen(chaos, injuries, processes)
        assert code in (75, 130, 137, -9), f"exit code {code}; see {chaos / 'output'}"
    raise AssertionError(f"the run did not end; see {chaos / 'output'}")


def _command(words: Sequence[object], place: Path, chaos: Path) -> int:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    with (chaos / "output").open("ab") as output:
        ended = subprocess.run(
            [str(word) for word in words],
            cwd=place,
            env=clean | {"CHAOS": str(chaos), "OMP_NUM_THREADS": "1", "CI": "1"},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            timeout=900,
        )
        output.write(f"--- exit code {ended.returncode}\n".encode())
    return ended.returncode


def seen(chaos: Path, injuries: Sequence[Injury], processes: int) -> list[Seen]:
    """How long each injury took to get over, by the job's own log of its forward passes."""
    lines = [line.split(maxsplit=3) for line in (chaos / "log").read_text().splitlines()]
    found = []
    for injury in injuries:
        struck = [float(at) for at, _, _, what in lines if what == f"struck {injury.number}"]
        seconds = None
        if struck:
            later: dict[tuple[str, str], list[float]] = {}
            before = {pid for at, _, pid, _ in lines if float(at) <= struck[0]}
            for at, rank, pid, what in lines:
                if what == "forward" and pid not in before:
                    later.setdefault((rank, pid), []).append(float(at))
            firsts = [times[REHEARSALS] for times in later.values() if len(times) > REHEARSALS]
            nexts = [float(at) for at, *_, what in lines if what.startswith("struck")]
            if len(firsts) >= processes:
                back = sorted(firsts)[processes - 1]
                # Struck again on its way back, it is the next one's time that counts.
                if not any(struck[0] < at < back for at in nexts):
                    seconds = back - struck[0]
        found.append(Seen(injury, None, seconds))
    return found


def differences(run: Path, undisturbed: Path) -> list[str]:
    """In what two finished runs differ; nothing, where no injury has left a trace."""
    found = []
    one, other = (sorted((r / "checkpoints").glob("step-*"))[-1] for r in (run, undisturbed))
    if one.name != other.name:
        found.append(f"{one.name} is not {other.name}")
    found += [
        f"{name} of {one.name}"
        for name in ("model.safetensors", "optimizer.safetensors", "state.json")
        if (one / name).read_bytes() != (other / name).read_bytes()
    ]
    ours, theirs = (_rows(r / "metrics.jsonl") for r in (run, undisturbed))
    if [row["step"] for row in ours] != [row["step"] for row in theirs]:
        found.append(f"metrics.jsonl has the steps {[row['step'] for row in ours]}")
    elif ours != theirs:
        different = [a["step"] for a, b in zip(ours, theirs, strict=True) if a != b]
        found.append(f"metrics.jsonl differs at the steps {different}")
    if _digests(run) != _digests(undisturbed):
        found.append("receipt.jsonl")
    return found


def _rows(path: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(MEASURED_ANEW)} for row in rows]


def _digests(run: Path) -> dict[int, str]:
    from service.receipt_file import read_receipt

    return read_receipt(run / "receipt.jsonl")


def table(found: Sequence[Seen]) -> str:
    """What happened, by kind and moment, as Markdown."""
    rows = ["| injury | moment | times | seconds to recover: median, most |", "|---|---|---|---|"]
    kinds = sorted({(s.injury.kind, s.injury.moment) for s in found})
    for kind, moment in kinds:
        those = [s for s in found if (s.injury.kind, s.injury.moment) == (kind, moment)]
        seconds = [s.seconds for s in those if s.seconds is not None]
        told = f"{statistics.median(seconds):.2f}, {max(seconds):.2f}" if seconds else "-"
        rows.append(f"| {kind} | {moment} | {len(those)} | {told} |")
    whole = [s.seconds for s in found if s.injury.kind in KILLS and s.seconds is not None]
    if whole:
        last = sorted(whole)[min(len(whole) - 1, round(0.99 * len(whole)))]
        rows.append(
            f"\nkill to all ranks stepping, by itself, {len(whole)} times: median "
            f"{statistics.median(whole):.2f} s, 99 % within {last:.2f} s"
        )
    return "\n".join(rows)


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--injuries", type=int, default=200)
    words.add_argument("--per-run", type=int, default=20)
    words.add_argument("--seed", type=int, default=1)
    words.add_argument("--processes", type=int, default=3)
    words.add_argument("--steps", type=int, default=90)
    words.add_argument("--hang", type=float, default=3.0)
    words.add_argument("--kinds", nargs="*", default=[*IN_PLACE, *FROM_OUTSIDE])
    asked = words.parse_args()
    how = {"processes": asked.processes, "steps": asked.steps, "hang": asked.hang}
    found: list[Seen] = []
    wrong = 0
    place = Path(tempfile.mkdtemp(prefix="chaos-"))
    run(place, "undisturbed", [], **how)
    for number in range(asked.injuries // asked.per_run):
        started, name = time.time(), f"injured-{number}"
        plan = planned(
            asked.per_run,
            seed=asked.seed + number,
            processes=asked.processes,
            kinds=asked.kinds,
        )
        these = run(place, name, plan, **how)
        different = differences(place / "runs" / name, place / "runs" / "undisturbed")
        wrong += bool(different)
        found += these
        print(
            f"{name}: {len(these)} injuries, {time.time() - started:.0f} s, "
            f"{different or 'equal in every bit'}",
            flush=True,
        )
    print(f"\n{table(found)}\n\nruns that differ: {wrong}; all of it is in {place}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
