"""Cost of the commands that read a long run: a million logged rows, and 2,000 parameter groups.

    python -m benchmarks.large_runs [--rows 1000000] [--groups 2000] [--turns 3] [--only verify]

Each line is a complete command, including the start of Python: the lowest wall and processor time
of several turns, and the peak memory. The rows are those of a job that logs every step and tests
every 1,000 steps; the receipt has a line for each, as with `tracking.log_every_steps: 1`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import sys
import tempfile
import time
from pathlib import Path

from service.runs.tracking import Row, _line

COMMANDS = {
    "runs": ("runs", "runs"),
    "report": ("report", "runs/a", "-o", "a.html"),
    "report of two": ("report", "runs/a", "runs/b", "-o", "two.html"),
    "verify": ("verify", "runs/a", "runs/b"),
    "verify --level bits": ("verify", "runs/a", "runs/b", "--level", "bits"),
    "checkpoints": ("checkpoints", "runs/a"),
}
TASK = """
import torch
from torch import nn
from torch.utils.data import TensorDataset
from service.data.task import supervised


def task(layers: int):
    model = lambda: nn.Sequential(*(nn.Linear(2, 2) for _ in range(layers)))
    rows = TensorDataset(torch.rand(64, 2), torch.arange(64) % 2)
    return supervised(model=model, train=rows, test=rows)
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--groups", type=int, default=2_000)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--only", default="", help="lines with this word, such as verify")
    told = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        for name in ("a", "b"):
            write_run(Path("runs", name), told.rows)
        write_spec(Path("job.json"), told.groups)
        size = Path("runs/a/metrics.jsonl").stat().st_size
        print(
            f"{told.rows:,} rows, {size / 2**20:.0f} MiB; {os.cpu_count()} cores, load "
            f"{os.getloadavg()[0]:.1f}"
        )
        print(f"{'':24}{'wall':>8}{'CPU':>8}{'memory':>10}")
        plan = {f"plan of {told.groups:,} groups": ("plan", "job.json")}
        for name, words in (COMMANDS | plan).items():
            if told.only in name:
                show(name, words, told.turns)


def write_run(run: Path, rows: int) -> None:
    """Write the directory of a run of `rows` steps, with values that need all their digits."""
    (run / "checkpoints").mkdir(parents=True)
    began = 1.76e9
    attempt = {"started": began, "ended": began + rows, "from_step": 0, "to_step": rows}
    facts = {"format": 1, "id": run.name, "created": began, "state": "done"}
    attempts = [attempt | {"outcome": "done", "processes": 1, "seconds": {}}]
    (run / "run.json").write_text(json.dumps(facts | {"attempts": attempts}))
    (run / "spec.yaml").write_text(f"name: {run.name}\nlength: {{steps: {rows}}}\n")
    draw = random.Random(7)
    with open(run / "metrics.jsonl", "wb") as metrics, open(run / "receipt.jsonl", "w") as receipt:
        for step in range(1, rows + 1):
            values = {
                "train/loss": 2.3 * math.exp(-step / rows) + draw.random(),
                "train/lr": 1e-3 * (1 - step / rows),
                "train/grad_norm": draw.random(),
                "train/rows_per_second": 1e4 * draw.random(),
                "train/data_wait": draw.random(),
            }
            if step % 1000 == 0:
                values |= {"test/loss": draw.random(), "test/accuracy": draw.random()}
            metrics.write(_line(Row(step, step / 777, began + step, values)))
            digest = f"{draw.getrandbits(64):016x}"
            receipt.write(json.dumps({"from": step, "to": step, "rows": [digest]}) + "\n")


def write_spec(file: Path, groups: int) -> None:
    file.with_name("task.py").write_text(TASK)
    spec = {
        "name": "groups",
        "task": "./task.py:task",
        "task_args": {"layers": groups},
        "batch": {"global_batch": 32},
        "length": {"steps": 100},
        "optimizer": {
            "name": "adamw",
            "lr": 0.01,
            "groups": [{"match": f"{n}.*", "lr": 0.01 / (n + 1)} for n in range(groups)],
        },
    }
    file.write_text(json.dumps(spec))


def show(name: str, words: tuple[str, ...], turns: int) -> None:
    each = [cost(words) for _ in range(turns)]
    wall, processor, memory = (min(kind) for kind in zip(*each, strict=True))
    print(f"{name:24}{wall:>6.2f} s{processor:>6.2f} s{memory:>6.0f} MiB", flush=True)


def cost(words: tuple[str, ...]) -> tuple[float, float, float]:
    """Wall and processor seconds of a command, and its peak memory in MiB."""
    began = time.perf_counter()
    command = str(Path(sys.executable).with_name("evenstep"))
    nowhere = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
    child = os.posix_spawn(command, [command, *words], os.environ, file_actions=nowhere)
    _, status, used = os.wait4(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code not in (0, 1):
        raise SystemExit(f"evenstep {' '.join(words)} exited with code {code}")
    seconds = time.perf_counter() - began
    return seconds, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024


if __name__ == "__main__":
    main()
