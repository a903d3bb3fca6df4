"""Runs the real command, injures it by a seeded plan, and compares bits with an undisturbed run.

python -m tests.chaos.campaign --injuries 200 --seed 1     (what `make chaos` runs)
python -m tests.chaos.campaign --mode sharded              (the same, sharded)
python -m tests.chaos.campaign --mode moved                (each start at another place of MOVES)

After the injuries by chance comes one run that is killed at every operation of its saves.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file

from service.runs.receipt_file import read_receipt
from service.runs.tracking import tells_of_speed

sys.path.append(str(Path(__file__).parents[1]))
from commands import BIN, CLEAN, start

MOVES = ((3, "sharded"), (2, "ddp"), (2, "sharded"), (1, "ddp"))
"""Processes and mode of the first start of a run that moves, of the second, and so on."""
MOMENTS = ("start-up", "rehearsal", "forward", "backward", "test", "save", "disk", "exit")
SAVE_EVERY = 4
FIRST_STEPS = 6
"""Steps before the first injury that waits for a step: there are two checkpoints then."""
OPERATIONS = 93
"""More operations on the file system than to restore and to save once takes."""
WRITERS, OPERATIONS_OF_OTHERS = 3, 6
"""The state of a job is cut into three shares (job.py), each of a few operations."""

AGAIN = "starts again by itself"
KILLS = ("kill one", "kill all", "raise", "out of memory")
HANGS = ("SIGSTOP", "hang", "hang, lock held")
DAMAGES = ("cut a file", "flip a bit")
STOPS = ("SIGTERM", "SIGINT", "SIGTERM to all", "SIGTERM, slow test")
EXPECTED = {
    **dict.fromkeys((*KILLS, *HANGS, *DAMAGES), AGAIN),
    **dict.fromkeys(STOPS, "exit 75"),
    "kill launcher": "exit -9",
    "disk full": "exit 42",
}
"""What follows: the launcher answers, or the command ends and somebody enters it again."""
LEAVING = [*STOPS, "kill launcher", "disk full"]
"""After these the command is entered again, where others are answered by the launcher."""
MOST_LOST = {
    **dict.fromkeys(EXPECTED, 2 * SAVE_EVERY),  # killed before the checkpoint under way was whole
    **dict.fromkeys(DAMAGES, 3 * SAVE_EVERY),
    **dict.fromkeys(STOPS, 0),
}
"""Steps that may have to be taken again."""


@dataclass(frozen=True)
class Injury:
    """What happens to which rank, when it comes to `moment` the `count`-th time."""

    number: int
    kind: str
    moment: str
    rank: int
    count: int
    delay: float = 0.0
    step: int = 0
    """Not before the run has logged this step."""


@dataclass(frozen=True)
class Seen:
    """What an injury did."""

    injury: Injury
    struck: bool
    followed: str = ""
    expected: bool = True
    """Whether what followed is what belongs to it, or to another one of the same attempt."""
    lost: int | None = None
    """Steps taken again; None where the next injury struck before any was taken."""
    seconds: float | None = None
    """To the first forward pass of a step on all ranks; None likewise."""


def planned(
    count: int, *, seed: int, processes: int, steps: int, kinds: Sequence[str]
) -> list[Injury]:
    """Injuries by chance, all over the run; every kind and moment as soon as there are enough."""
    chance = random.Random(seed)
    moments = [m for _ in range(count) for m in chance.sample(MOMENTS, len(MOMENTS))]
    many = [k for _ in range(count) for k in chance.sample(kinds, len(kinds))]
    drawn = [_injury(kind, moments[n], chance, processes) for n, kind in enumerate(many[:count])]
    # One injury waits for the one before it, and the way out comes once, after the last step.
    in_order = sorted(drawn, key=lambda injury: injury.moment == "exit")
    apart = (steps - FIRST_STEPS - 4) / count
    return [
        replace(
            injury,
            number=n,
            # These come as soon as a process does, which the injury before them sees to.
            step=0
            if injury.moment in ("start-up", "rehearsal", "exit")
            else FIRST_STEPS + int(n * apart),
        )
        for n, injury in enumerate(in_order)
    ]


def _injury(kind: str, moment: str, chance: random.Random, processes: int) -> Injury:
    if kind == "disk full":
        moment = "disk"
    elif kind in DAMAGES:
        moment = "forward"
    elif kind == "SIGTERM, slow test":
        moment = "test"
    elif moment == "exit" and kind not in ("kill one", "kill all", "kill launcher"):
        moment = "forward"  # on its way out a process has nothing left to save or to wait for
    elif moment in ("start-up", "rehearsal", "backward") and kind in ("raise", "out of memory"):
        moment = "forward"  # before the first step, what a task raises is its author's mistake
    elif moment in ("start-up", "rehearsal") and kind in HANGS:
        moment = "test"  # in start-up a hang is given more time, which a campaign has not
    writing = moment == "disk"
    rank = chance.randrange(min(processes, WRITERS) if writing else processes)
    of_writer = OPERATIONS if rank == 0 else OPERATIONS_OF_OTHERS
    most = {"forward": 9, "backward": 9, "rehearsal": 2, "disk": of_writer}.get(moment, 1)
    late = moment == "save" and kind.startswith("kill")
    delay = chance.uniform(0.0, 0.04) if late else 0.0
    return Injury(0, kind, moment, rank, chance.randint(1, most), delay)


def kills_on_disk(*, every: int = 1) -> list[Injury]:
    """A kill at each operation on checkpoints after a start, or every nth; a write is cut."""
    counts = range(1, OPERATIONS + 1, every)
    return [Injury(n, "kill one", "disk", rank=0, count=count) for n, count in enumerate(counts)]


def spec_of(name: str, *, steps: int, hang_seconds: float, mode: str = "ddp") -> dict[str, Any]:
    """The job of the campaign; 50 rows a step in six micro-batches, the last of 5 rows.

    A run that moves computes in float64, where another order of sums makes no difference to see.
    """
    return {
        "name": name,
        "task": f"{Path(__file__).with_name('job.py')}:task",
        "seed": 7,
        "batch": {"global_batch": 50, "micro_batch": 9},
        "length": {"steps": steps},
        "model": {"batchnorm": "micro"},
        "exchange": {"mode": "ddp" if mode == "moved" else mode},
        "task_args": {"double": mode == "moved"},
        "optimizer": {"name": "adamw", "lr": 0.003},
        "schedule": {"name": "cosine", "warmup_steps": 5},
        "tracking": {"log_every_steps": 1},
        "test": {"every_steps": 5, "micro_batch": 6},  # 22 of them, the last of 5 rows
        "checkpoint": {
            "every_steps": SAVE_EVERY,
            "best": {"measure": "test/accuracy", "mode": "max"},
        },
        "faults": {
            "hang_timeout_seconds": hang_seconds,
            "startup_timeout_seconds": 20 + hang_seconds,
            "stop_poll_steps": 2,
            "attempts_without_progress": 1000,
        },
    }


def write_plan(
    place: Path, run: Path, injuries: Sequence[Injury], *, pause_seconds: float = 0.0
) -> None:
    """Leave the plan where the job finds it; it pauses so long in each training pass."""
    plan = {"run": str(run), "injuries": [asdict(injury) for injury in injuries]}
    plan["pause_seconds"] = pause_seconds
    (place / "plan.json").write_text(json.dumps(plan))


def run(
    place: Path,
    name: str,
    injuries: Sequence[Injury],
    *,
    processes: int,
    steps: int,
    hang: float,
    mode: str = "ddp",
) -> list[Seen]:
    """Run the job to its end through all of the injuries; the command again as often as needed."""
    chaos = place / f"chaos-{name}"
    chaos.mkdir()
    if mode != "ddp":  # a rehearsal has one pass where DDP lays out no buckets
        injuries = [replace(i, count=1) if i.moment == "rehearsal" else i for i in injuries]
    write_plan(chaos, place / "runs" / name, injuries)
    spec = place / f"{name}.yaml"
    spec.write_text(json.dumps(spec_of(name, steps=steps, hang_seconds=hang, mode=mode)))
    moves = MOVES if mode == "moved" and injuries else [(processes, "")]
    for again in range(len(injuries) + 1):
        count, moved = moves[again % len(moves)]
        words = [BIN / "evenstep", "run", spec, "--processes", count, "--max-restarts", 1000]
        code = _command([*words, f"exchange.mode={moved}"] if moved else words, place, chaos)
        if code == 0:
            return list(seen((chaos / "log").read_text(), injuries))
        assert f"exit {code}" in EXPECTED.values(), f"exit code {code}; see {chaos / 'output'}"
    raise AssertionError(f"the run did not end; see {chaos / 'output'}")


def _command(words: Sequence[object], place: Path, chaos: Path) -> int:
    with (chaos / "output").open("ab") as output, (chaos / "log").open("a") as log:
        environ = CLEAN | {"CHAOS": str(chaos)}
        with start(words, cwd=place, env=environ, stdout=output, stderr=output) as command:
            code = command.wait(timeout=900)
        output.write(f"--- exit code {code}\n".encode())
        log.write(f"{time.time():.4f} - - - exit {code}\n")
    return code


# ---- what happened, by the log that the job keeps


class Event(NamedTuple):
    """A line of the log."""

    at: float
    rank: str
    attempt: str
    launcher: str
    what: str


def seen(log: str, injuries: Sequence[Injury]) -> Iterator[Seen]:
    """What each injury did, in their order."""
    lines = [line.split(maxsplit=4) for line in log.splitlines()]
    events = [Event(float(at), *words) for at, *words in lines]
    strikes = {int(e.what.split()[1]): e for e in events if e.what.startswith("struck")}
    attempts = list(dict.fromkeys(event.attempt for event in events if event.attempt != "-"))
    for injury in injuries:
        strike = strikes.get(injury.number)
        if strike is None:
            yield Seen(injury, struck=False)
            continue
        followed = _followed(strike, events, attempts)
        together = [i for i in injuries if (s := strikes.get(i.number)) and s[2] == strike.attempt]
        yield Seen(
            injury,
            True,
            followed,
            followed in {EXPECTED[other.kind] for other in together},
            *_lost(strike, events, attempts),
        )


def _followed(strike: Event, events: Sequence[Event], attempts: Sequence[str]) -> str:
    after = attempts[attempts.index(strike.attempt) + 1 :]
    following = next((e for e in events if after and e.attempt == after[0]), None)
    if following is not None and following.launcher == strike.launcher:
        return AGAIN
    return next(e.what for e in events if e.at > strike.at and e.what.startswith("exit"))


def _lost(
    strike: Event, events: Sequence[Event], attempts: Sequence[str]
) -> tuple[int | None, float | None]:
    """Steps taken again, and seconds until all ranks took one."""
    was_stepping = any(e.attempt == strike.attempt and e.what[:5] == "steps" for e in events)
    after = attempts[attempts.index(strike.attempt) + 1 :]
    undisturbed = True
    for event in (e for e in events if e.at > strike.at):
        if event.what.startswith("struck"):
            if event.attempt == strike.attempt:
                return None, None  # it is the next one's doing
            undisturbed = False  # on its way back: it is the next one's time that counts
        stepping = [e for e in events if e.attempt == event.attempt and e.what[:5] == "steps"]
        ranks = {e.rank for e in events if e.attempt == event.attempt and e.what == "start"}
        if event.attempt in after and len(stepping) == len(ranks):
            start, at = int(stepping[0].what.split()[1]), int(strike.what.split()[2])
            back = max(e.at for e in stepping) - strike.at
            return max(0, at - start) if was_stepping else None, back if undisturbed else None
    return None, None  # it struck on the way out of a run that was done


def differences(run: Path, undisturbed: Path, *, mode: str = "ddp") -> list[str]:
    """In what two finished runs differ; nothing, where no injury has left a trace."""
    found = []
    one, other = (sorted((r / "checkpoints").glob("step-*"))[-1] for r in (run, undisturbed))
    if one.name != other.name:
        found.append(f"{one.name} is not {other.name}")
    if mode == "moved":
        found += [f"{n} of {one.name}" for n in ("model", "optimizer") if not _close(n, one, other)]
        ours, theirs = (_rows(r / "metrics.jsonl") for r in (run, undisturbed))
        if [_near(row) for row in ours] != [_near(row) for row in theirs]:
            found.append("metrics.jsonl")
        if read_receipt(run / "receipt.jsonl") != read_receipt(undisturbed / "receipt.jsonl"):
            found.append("receipt.jsonl")
        return found
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
    if read_receipt(run / "receipt.jsonl") != read_receipt(undisturbed / "receipt.jsonl"):
        found.append("receipt.jsonl")
    return found


def _close(name: str, one: Path, other: Path) -> bool:
    """Whether two checkpoints hold the same numbers up to rounding, in one file."""
    ours, theirs = (load_file(place / f"{name}.safetensors") for place in (one, other))
    return ours.keys() == theirs.keys() and all(
        torch.allclose(ours[n].double(), theirs[n].double(), rtol=0, atol=1e-9) for n in ours
    )


def _near(row: dict[str, Any]) -> dict[str, Any]:
    return {k: round(v, 7) if isinstance(v, float) else v for k, v in row.items()}


def _rows(path: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in row.items() if not tells_of_speed(k)} for row in rows]


def wrong(found: Sequence[Seen]) -> list[Seen]:
    """What did not go as it should have, bits aside."""
    return [
        one
        for one in found
        if not one.expected or (one.lost is not None and one.lost > MOST_LOST[one.injury.kind])
    ]


def table(found: Sequence[Seen]) -> str:
    """What happened, by kind and moment, as Markdown."""
    rows = [
        "| injury | moment | times | expected | seen | steps lost: median, most "
        "| seconds to recover: median, most |",
        "|---|---|---|---|---|---|---|",
    ]
    struck = [one for one in found if one.struck]
    for kind, moment in sorted({(s.injury.kind, s.injury.moment) for s in struck}):
        those = [s for s in struck if (s.injury.kind, s.injury.moment) == (kind, moment)]
        came = ", ".join(sorted({s.followed for s in those}))
        lost = _median_and_most([s.lost for s in those if s.lost is not None], ".0f")
        seconds = _median_and_most([s.seconds for s in those if s.seconds is not None], ".2f")
        rows.append(
            f"| {kind} | {moment} | {len(those)} | {EXPECTED[kind]} | {came} | {lost} | {seconds} |"
        )
    kills = sorted(
        one.seconds
        for one in found
        if one.injury.kind in KILLS[:2] and one.followed == AGAIN and one.seconds is not None
    )
    if kills:
        last = kills[min(len(kills) - 1, round(0.99 * len(kills)))]
        rows.append(
            f"\nkill to all ranks stepping, by itself, {len(kills)} times: median "
            f"{statistics.median(kills):.2f} s, 99 % within {last:.2f} s"
        )
    return "\n".join(rows)


def _median_and_most(values: Sequence[float], style: str) -> str:
    return f"{statistics.median(values):{style}}, {max(values):{style}}" if values else "-"


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--injuries", type=int, default=200)
    words.add_argument("--per-run", type=int, default=20)
    words.add_argument("--seed", type=int, default=1)
    words.add_argument("--processes", type=int, default=3)
    words.add_argument("--steps", type=int, default=200)
    words.add_argument("--hang", type=float, default=3.0)
    words.add_argument("--mode", choices=("ddp", "sharded", "moved"), default="ddp")
    words.add_argument("--kinds", nargs="*", default=[])
    asked = words.parse_args()
    # A shell lets what it starts in the background ignore SIGINT, and so would the commands.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    moved = asked.mode == "moved"
    kinds = asked.kinds or (LEAVING if moved else [*EXPECTED])
    ranks = min(count for count, _ in MOVES) if moved else asked.processes
    of_runs = {
        "processes": asked.processes,
        "steps": asked.steps,
        "hang": asked.hang,
        "mode": asked.mode,
    }
    found: list[Seen] = []
    differ = 0
    place = Path(tempfile.mkdtemp(prefix="chaos-"))
    run(place, "undisturbed", [], **of_runs)
    plans = [
        planned(
            asked.per_run,
            seed=asked.seed + number,
            kinds=kinds,
            processes=ranks,
            steps=asked.steps,
        )
        for number in range(asked.injuries // asked.per_run)
    ]
    for number, plan in enumerate([*plans, *([] if moved else [kills_on_disk()])]):
        started, name = time.time(), f"injured-{number}"
        these = run(place, name, plan, **of_runs)
        runs = place / "runs"
        different = differences(runs / name, runs / "undisturbed", mode=asked.mode)
        differ += bool(different)
        found += these
        print(
            f"{name}: {sum(s.struck for s in these)} injuries, {time.time() - started:.0f} s, "
            f"{different or 'equal in every bit'}",
            flush=True,
        )
    print(f"\n{table(found)}\n\nruns that differ: {differ}; all of it is in {place}")
    for one in wrong(found):
        print(f"not as expected: {one}")
    sys.exit(bool(differ or wrong(found)))


if __name__ == "__main__":
    main()
