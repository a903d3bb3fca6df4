"""How far runs at 2, 3, 4 and 5 processes are from the same run at 1, feature by feature.

python -m benchmarks.invariance [--steps 100] [--only dropout]

Prints the table of docs/explanation/world-size.md: the largest difference of the loss of any step
and of any weight after the last step, over all process counts. In hybrid mode: 2 nodes of 2
processes against one process.
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
from test_sharding import on_nodes

WHOLE = FEATURES | AMPLIFYING
HYBRID = {
    f"hybrid: {name}": WHOLE[name] | {"exchange": {"mode": "hybrid"}}
    for name in ("dropout", "gradient clipping", "AdamW")
}
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


def worst(
    job: dict[str, Any], pools: dict[int, Processes], *, from_ddp: bool = False
) -> tuple[float, float]:
    """The largest difference of (losses, weights) from one process, or from as many with DDP."""
    counts = list(pools)
    if job.get("exactness") == "bitwise":
        counts = [1, 2, 4]
    if job.get("exchange", {}).get("mode") == "hybrid":
        counts = [1, 4]
    ddp = {key: value for key, value in job.items() if key != "exchange"}
    with tempfile.TemporaryDirectory() as place:
        for count in counts:
            trained(at(job, count), pools[count], Path(place, str(count)))
            if from_ddp:
                trained(at(ddp, count), pools[count], Path(place, f"ddp-{count}"))
        pairs = [(f"ddp-{n}" if from_ddp else "1", str(n)) for n in counts if n > 1 or from_ddp]
        found = [difference(Path(place, one), Path(place, other)) for one, other in pairs]
    return max(losses for losses, _ in found), max(weights for _, weights in found)


def trained(job: dict[str, Any], pool: Processes, place: Path) -> None:
    """A run; in hybrid mode on nodes of two processes."""
    if job.get("exchange", {}).get("mode") == "hybrid" and pool.count > 1:
        pool.run(on_nodes, job, place, 2, None, timeout_seconds=600)
    else:
        pool.run(train_in_process, job, place, timeout_seconds=600)


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
    against_ddp = {
        f"sharded against DDP: {name}": SHARDED[f"sharded: {name}"] for name in ("dropout", "AdamW")
    }
    for name, job in (WHOLE | SHARDED | against_ddp | HYBRID).items():
        if given.only not in name:
            continue
        cells = []
        for double in (True, False):
            arguments_of_task = job["task_args"] | {"double": double}
            cut = job | {"task_args": arguments_of_task, "length": {"steps": given.steps}}
            found = worst(cut, pools, from_ddp=name in against_ddp)
            cells += [told(value) for value in found]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    for pool in pools.values():
        pool.close()


if __name__ == "__main__":
    main()
