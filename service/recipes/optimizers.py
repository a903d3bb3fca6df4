"""The classic optimizers side by side: the digits network, one run for each of them.

    python -m service.recipes.optimizers
    evenstep report runs/optimizers-*

A run is this recipe with another optimizer, which a person would write as

    evenstep run optimizers 'optimizer={name: adam, lr: 0.002}' --name optimizers-adam
"""

from __future__ import annotations

import json
import subprocess
import sys

from service.recipes.digits import task

__all__ = ["CLASSICS", "task"]

# Each at a rate that suits it; everything else is the same, the rows of every step too.
CLASSICS: dict[str, dict[str, object]] = {
    "sgd": {"name": "sgd", "lr": 0.1},
    "momentum": {"name": "sgd", "lr": 0.03, "momentum": 0.9},
    "nesterov": {"name": "sgd", "lr": 0.03, "momentum": 0.9, "nesterov": True},
    "adagrad": {"name": "adagrad", "lr": 0.02},
    "rmsprop": {"name": "rmsprop", "lr": 0.001},
    "adam": {"name": "adam", "lr": 0.002},
}


def main(more: list[str]) -> int:
    """Run them one after the other; `more` are words for each, such as `--processes 2`.

    Returns:
        The exit code of the first that fails, or 0.
    """
    for name, optimizer in CLASSICS.items():
        words = ["optimizers", f"optimizer={json.dumps(optimizer)}", "--name", f"optimizers-{name}"]
        ended = subprocess.run([sys.executable, "-m", "launch", "run", *words, *more], check=False)
        if ended.returncode != 0:
            return ended.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
