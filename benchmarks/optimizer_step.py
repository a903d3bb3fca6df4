"""Milliseconds per optimizer step, for each of torch's implementations.

OMP_NUM_THREADS=1 python -m benchmarks.optimizer_step
"""

from __future__ import annotations

import statistics
import time

import torch
from torch import nn

from service.recipes.digits import network

MODELS = {
    "digits, 21k": lambda: network(32, 0.25),
    "16 linear layers, 4.2M": lambda: nn.Sequential(*[nn.Linear(512, 512) for _ in range(16)]),
}
OPTIMIZERS = {"SGD": {"momentum": 0.9}, "Adagrad": {}, "Adam": {}, "AdamW": {}}
WAYS = {"single": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
ON = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def milliseconds(model: nn.Module, name: str, options: dict[str, object], steps: int = 40) -> float:
    """Median over `steps` steps, after five warm-up steps."""
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=1e-3, **options)
    times = []
    for _ in range(steps + 5):
        begin = time.perf_counter()
        optimizer.step()
        if ON.type != "cpu":
            torch.accelerator.synchronize()
        times.append(time.perf_counter() - begin)
    return statistics.median(times[5:]) * 1000


def main() -> None:
    """Print one line for each model and optimizer."""
    print("| model | optimizer | " + " | ".join(WAYS) + " |\n|---|---|---|---|---|")
    for model, make in MODELS.items():
        for name, options in OPTIMIZERS.items():
            took = [milliseconds(make().to(ON), name, {**options, **way}) for way in WAYS.values()]
            print(f"| {model} | {name} | " + " | ".join(f"{ms:.3f}" for ms in took) + " |")


if __name__ == "__main__":
    main()
