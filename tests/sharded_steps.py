"""Tasks with steps of their own whose models have units, and what goes wrong with them."""

from __future__ import annotations

from typing import Any

import torch
from own_steps import classified, points
from several_models import ROWS, byol_models, byol_step, network
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from service.data.batches import Batch
from service.data.losses import Losses, StepContext
from service.data.task import Task, custom


class Deep(nn.Module):
    """Blocks, which are units, between two layers, which are not."""

    def __init__(self, first: int, last: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(first, 5), nn.Linear(5, last)
        self.blocks = nn.ModuleList(network(5, 7, 5) for _ in range(2))

    def forward(self, rows: Tensor) -> Tensor:
        rows = self.first(rows)
        for block in self.blocks:
            rows = rows + block(rows)
        last: Tensor = self.last(rows)
        return last


def deep_models() -> dict[str, nn.Module]:
    return {"critic": Deep(6, 1).double(), "generator": Deep(3, 6).double()}


def deep_step(models: Any, batch: Batch, context: StepContext) -> Losses:
    """The models are called several times, and parts of them, before the backward pass."""
    [real] = batch.inputs
    fake = models["generator"](torch.randn(len(real), 3, dtype=real.dtype))
    if context.optimizer == "generator":
        near = models["critic"].first(fake) - models["critic"].first(real)
        return {
            "generator": -models["critic"](fake).flatten(),
            "features": near.square().sum(1),
        }
    return {"distance": (models["critic"](fake) - models["critic"](real)).flatten()}


def deep() -> Task:
    rows = points().double()
    return custom(
        step=deep_step,
        model=deep_models,
        train=TensorDataset(rows[:ROWS]),
        test=TensorDataset(rows[ROWS:]),
    )


# ---- mistakes


def inner_backward() -> Task:
    """A penalty on a gradient, which goes through units."""

    def step(models: Any, batch: Batch, context: StepContext) -> Losses:
        [real] = batch.inputs
        if context.optimizer == "generator":
            fake = models["generator"](torch.randn(len(real), 3, dtype=real.dtype))
            return {"generator": fake.square().sum(1)}
        with torch.enable_grad():
            rows = real.detach().requires_grad_()
            [slope] = torch.autograd.grad(models["critic"](rows).sum(), rows, create_graph=True)
        return {"penalty": slope.square().sum(1)}

    return custom(step=step, model=deep_models, train=TensorDataset(points().double()))


def changed_by(what: str) -> Task:
    def after(models: Any, context: StepContext) -> None:
        weight = models["target"][0].weight
        if what == "tensor":
            weight.add_(torch.ones(weight.shape, dtype=weight.dtype))
        else:
            weight.bernoulli_(0.5)

    train, test = classified()
    return custom(step=byol_step, model=byol_models, train=train, test=test, after_update=after)


def of_two_types() -> Task:
    """One model in float32 and one in float64, both trained and in no unit of their own."""

    def step(models: Any, batch: Batch, context: StepContext) -> Losses:
        [real] = batch.inputs
        wide, narrow = models["wide"](real), models["narrow"](real.float())
        return {"both": wide.flatten() + narrow.flatten().double()}

    return custom(
        step=step,
        model=lambda: {"wide": network(6, 4, 1), "narrow": network(6, 4, 1).float()},
        train=TensorDataset(points().double()),
    )
