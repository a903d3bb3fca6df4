"""A comparison of the classic optimizers: the digits network, one run for each of them.

    python -m service.recipes.optimizers
    evenstep report runs/optimizers-*

A run is this recipe with another optimizer, like this command:

    evenstep run optimizers 'optimizer={name: adam, lr: 0.002}' --name optimizers-adam

`SAM`, which takes two passes per step, is an example of a custom optimizer.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any, ClassVar

import torch

from service.recipes.digits import task

__all__ = ["CLASSICS", "SAM", "task"]

# Each with a suitable rate; everything else is the same, including the rows of every step.
CLASSICS: dict[str, dict[str, object]] = {
    "sgd": {"name": "sgd", "lr": 0.1},
    "momentum": {"name": "sgd", "lr": 0.03, "momentum": 0.9},
    "nesterov": {"name": "sgd", "lr": 0.03, "momentum": 0.9, "nesterov": True},
    "adagrad": {"name": "adagrad", "lr": 0.02},
    "rmsprop": {"name": "rmsprop", "lr": 0.001},
    "adam": {"name": "adam", "lr": 0.002},
}


class SAM(torch.optim.SGD):
    """Sharpness-aware minimization: SGD along the gradients at the worst point near the weights.

    A step computes the loss twice.  The second point is `rho` away from the weights, along the
    gradients of the whole step.
    Source: Foret et al., arXiv:2010.01412, algorithm 1 and eq. 2 with p = 2.
    """

    takes_groups: ClassVar[bool] = True
    asks_before_it_moves: ClassVar[bool] = True

    def __init__(
        self,
        params: Any,
        lr: float,
        *,
        rho: float = 0.05,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
    ) -> None:
        super().__init__(
            params, lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov
        )
        for group in self.param_groups:
            group.setdefault("rho", rho)

    def step(self, closure: Callable[[], float]) -> float:  # type: ignore[override]  # it needs one
        """Update the weights; the closure computes loss and gradients at the current weights."""
        loss = closure()
        with torch.no_grad():
            moved = [
                (parameter, parameter.clone(), group["rho"])
                for group in self.param_groups
                for parameter in group["params"]
                if parameter.grad is not None
            ]
            norms = [torch.linalg.vector_norm(parameter.grad) for parameter, _, _ in moved]
            norm = torch.linalg.vector_norm(torch.stack(norms)) + 1e-12
            for parameter, _, rho in moved:
                parameter.add_(parameter.grad * (rho / norm))
        with torch.enable_grad():
            closure()
        with torch.no_grad():
            for parameter, before, _ in moved:
                parameter.copy_(before)
        super().step()
        return loss


def main(more: list[str]) -> int:
    """Run them one after the other; `more` are arguments for each, such as `--processes 2`.

    Returns:
        The exit code of the first run that fails, or 0.
    """
    for name, optimizer in CLASSICS.items():
        words = ["optimizers", f"optimizer={json.dumps(optimizer)}", "--name", f"optimizers-{name}"]
        ended = subprocess.run(
            [sys.executable, "-P", "-m", "launch", "run", *words, *more], check=False
        )
        if ended.returncode != 0:
            return ended.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
