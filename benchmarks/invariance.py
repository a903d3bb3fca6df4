"""How far runs at 2, 3, 4 and 5 processes are from the same run at 1, feature by feature.

python -m benchmarks.invariance [--steps 100] [--only dropout]

Prints the table of docs/explanation/world-size.md: the largest difference of the loss of any step
and of any weight after the last step, over all process counts.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from features import AMPLIFYING, FEATURES, at
from jobs import train_in_process
from processes import Processes
from test_features import difference

WHOLE = FEATURES | AMPLIFYING
SHARDED = {
    f"sharded: {name}": WHOLE[name] | {"exchange": {"mode": "sharded"}}
    for name in (
        "nothing but rows",
        "dropout",
        "BatchNorm, micro",
        "gradient clipping",
        "weights of rows",
        "AdamW",
    )
}


def worst(job: dict[str, Any], pools: dict[int, Processes]) -> tuple[float, float]:
    """The largest difference of (losses, weights) from one process."""
    bitwise = job.get("exactness") == "bitwise"
    counts = [n for n in pools if not bitwise or n in (1, 2, 4)]
    with tempfile.TemporaryDirectory() as place:
        for count in counts:
            pools[count].run(
                train_in_process, at(job, count), Path(place, str(count)), timeout_seconds=600
            )
        found = [difference(Path(place, "1"), Path(place, str(n))) for n in counts if n > 1]
    return max(losses for losses, _ in found), max(weights for _, weights in found)


def told(value: float) -> str:
    return "0" if value == 0 else f"{value:.1e}"


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--steps", type=int, default=100)
    arguments.add_argument("--only", default="", help="features whose name contains this")
    given = arguments.parse_args()
    pools = {count: Processes(count) for count in (1, 2, 3, 4, 5)}
    print("| | losses, float64 | weights, float64 | losses, float32 | weights, float32 |")
    print("|---|---|---|---|---|")
    for name, job in (WHOLE | SHARDED).items():
        if given.only not in name:
            continue
        cells = []
        for double in (True, False):
            arguments_of_task = job["task_args"] | {"double": double}
            cut = job | {"task_args": arguments_of_task, "length": {"steps": given.steps}}
            cells += [told(value) for value in worst(cut, pools)]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    for pool in pools.values():
        pool.close()


if __name__ == "__main__":
    main()
