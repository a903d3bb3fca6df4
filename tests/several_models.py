"""Tasks of several models: a GAN, a frozen teacher, a teacher that follows; and each by hand."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from typing import Any

import torch
from own_steps import classified, points
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from service.basics import randomness
from service.data.batches import Batch
from service.data.losses import Losses, StepContext, StepResult
from service.data.task import Task, custom, supervised
from service.plan.samplers import rows_at

ROWS, SEED, GLOBAL, MICRO = 71, 7, 23, 5  # of tests/jobs.py and tests/test_several_models.py


def network(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for one, next_one in itertools.pairwise(widths):
        layers += [nn.Linear(one, next_one), nn.Tanh()]
    return nn.Sequential(*layers[:-1]).double()


# ---- a critic that steps five times as often as its generator


def gan_models() -> dict[str, nn.Module]:
    return {"critic": network(6, 8, 1), "generator": network(3, 8, 6)}


def gan_step(models: Any, batch: Batch, context: StepContext) -> Losses:
    [real] = batch.inputs
    fake = models["generator"](torch.randn(len(real), 3, dtype=real.dtype))
    if context.optimizer == "generator":
        return {"generator": -models["critic"](fake).flatten()}
    mixed = torch.lerp(real, fake, torch.rand(len(real), 1, dtype=real.dtype))
    with torch.enable_grad():
        mixed = mixed.detach().requires_grad_()
        [slope] = torch.autograd.grad(
            models["critic"](mixed).sum(), mixed, create_graph=context.training
        )
    context.log("steepness", slope.norm(dim=1).sum(), len(real))
    return {
        "distance": (models["critic"](fake) - models["critic"](real)).flatten(),
        "penalty": 3 * (slope.norm(dim=1) - 1).square(),
    }


def clip(models: Any, context: StepContext) -> None:
    """The weights of the critic in a box: after each of its updates."""
    if context.optimizer == "critic":
        for parameter in models["critic"].parameters():
            parameter.clamp_(-0.5, 0.5)


def plain_step(models: Any, batch: Batch, context: StepContext) -> Losses:
    """The same without the penalty, which differentiates a gradient."""
    [real] = batch.inputs
    fake = models["generator"](torch.randn(len(real), 3, dtype=real.dtype))
    if context.optimizer == "generator":
        return {"generator": -models["critic"](fake).flatten()}
    return {"distance": (models["critic"](fake) - models["critic"](real)).flatten()}


class Slow(torch.optim.Optimizer):
    """A class of the user's whose constructor makes all its state."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["slow"] = torch.full_like(parameter, 0.5)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    slow = self.state[parameter]["slow"]
                    slow.lerp_(parameter.grad, 0.3)
                    parameter.add_(slow, alpha=-group["lr"])


def gan(after: bool = True, penalty: bool = True) -> Task:
    rows = points().double()
    return custom(
        step=gan_step if penalty else plain_step,
        model=gan_models,
        train=TensorDataset(rows[:ROWS]),
        test=TensorDataset(rows[ROWS:]),
        after_update=clip if after else None,
    )


GAN = {
    "critic": {"optimizer": {"name": "adam", "lr": 0.02, "betas": [0.5, 0.9]}},
    "generator": {
        "every": 5,
        "optimizer": {"name": "rmsprop", "lr": 0.01},
        "schedule": {"name": "linear"},
    },
}


def batches_by_hand(step: int, turn: int = 0) -> list[tuple[Tensor, int]]:
    """The rows of each micro-batch of a step, and the key of its random numbers."""
    first = step * GLOBAL
    rows = rows_at(torch.arange(first, first + GLOBAL).numpy(), rows=ROWS, seed=SEED)
    found = []
    for number, part in enumerate(torch.as_tensor(rows).split(MICRO)):
        key = randomness.key(randomness.FORWARD, SEED, step, number)
        if turn:
            key = randomness.key(randomness.FORWARD, key, turn)
        found.append((part, key))
    return found


def drawn_by_hand(make: Callable[[], dict[str, nn.Module]]) -> nn.ModuleDict:
    torch.manual_seed(randomness.key(randomness.WEIGHTS, SEED))
    return nn.ModuleDict(make())


def gan_by_hand(steps: int, *, max_norm: float | None = None) -> dict[str, Tensor]:
    models = drawn_by_hand(gan_models)
    critic, generator = models["critic"], models["generator"]
    real_rows = points().double()[:ROWS]
    of_critic = torch.optim.Adam(critic.parameters(), lr=0.02, betas=(0.5, 0.9))
    of_generator = torch.optim.RMSprop(generator.parameters(), lr=0.01)

    def update(optimizer: torch.optim.Optimizer, module: nn.Module) -> None:
        if max_norm is not None:
            nn.utils.clip_grad_norm_(module.parameters(), max_norm)
        optimizer.step()

    for step in range(steps):
        of_critic.zero_grad()
        for part, key in batches_by_hand(step):
            torch.manual_seed(key)
            real = real_rows[part]
            fake = generator(torch.randn(len(real), 3, dtype=real.dtype)).detach()
            mixed = torch.lerp(real, fake, torch.rand(len(real), 1, dtype=real.dtype))
            mixed.requires_grad_()
            [slope] = torch.autograd.grad(critic(mixed).sum(), mixed, create_graph=True)
            loss = (critic(fake) - critic(real)).sum()
            loss = loss + 3 * (slope.norm(dim=1) - 1).square().sum()
            (loss / GLOBAL).backward()
        update(of_critic, critic)
        with torch.no_grad():
            for parameter in critic.parameters():
                parameter.clamp_(-0.5, 0.5)
        if (step + 1) % 5 == 0:
            of_generator.param_groups[0]["lr"] = 0.01 * (1 - step / steps)
            of_generator.zero_grad()
            for part, key in batches_by_hand(step, turn=1):
                torch.manual_seed(key)
                fake = generator(torch.randn(len(part), 3, dtype=torch.float64))
                (-critic(fake).sum() / GLOBAL).backward()
            update(of_generator, generator)
    return models.state_dict()


def wide_critic() -> Task:
    """A generator of little memory, and a critic that takes 8 MB a row."""

    def step(models: Any, batch: Batch, context: StepContext) -> Losses:
        if context.optimizer == "generator":
            return {"generator": models["generator"](batch.inputs).flatten()}
        return {"critic": models["critic"](batch.inputs).mean(1)}

    rows = torch.randn(256, 1)
    return custom(
        step=step,
        model=lambda: {
            "critic": nn.Sequential(nn.Linear(1, 10**6), nn.ReLU(), nn.AdaptiveAvgPool1d(9)),
            "generator": nn.Linear(1, 1),
        },
        train=TensorDataset(rows, rows),
    )


def by_parts() -> Task:
    """A model that the step calls in its parts only."""

    def step(model: Any, batch: Batch, context: StepContext) -> Losses:
        [rows] = batch.inputs
        return {"loss": model.last(model.first(rows)).flatten()}

    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 4), nn.Linear(4, 1)

        def forward(self, rows: Tensor) -> Tensor:
            return self.last(self.first(rows))

    return custom(step=step, model=Parts, train=TensorDataset(points()))


# ---- a frozen teacher


def distil_models() -> dict[str, nn.Module]:
    teacher = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 3))
    return {"teacher": teacher.double(), "student": network(6, 5, 3)}


def distil_step(models: Any, batch: Batch, context: StepContext) -> StepResult:
    outputs = models["student"](batch.inputs)
    wanted = models["teacher"].eval()(batch.inputs).softmax(1)
    return {"soft": -(wanted * outputs.log_softmax(1)).sum(1)}, outputs


def distillation() -> Task:
    train, test = classified()
    return custom(
        step=distil_step, model=distil_models, train=train, test=test, measures=("accuracy",)
    )


STUDENT = {"student": {"optimizer": {"name": "sgd", "lr": 0.3, "momentum": 0.9}}}


def distillation_by_hand(steps: int) -> dict[str, Tensor]:
    models = drawn_by_hand(distil_models)
    teacher, student = models["teacher"].eval(), models["student"]
    optimizer = torch.optim.SGD(student.parameters(), lr=0.3, momentum=0.9)
    inputs = classified()[0].tensors[0]
    for step in range(steps):
        optimizer.zero_grad()
        for part, key in batches_by_hand(step):
            torch.manual_seed(key)
            rows = inputs[part]
            with torch.no_grad():
                wanted = teacher(rows).softmax(1)
            (-(wanted * student(rows).log_softmax(1)).sum() / GLOBAL).backward()
        optimizer.step()
    return models.state_dict()


# ---- a teacher that follows its student


def byol_models() -> dict[str, nn.Module]:
    online, target = network(6, 8, 4), network(6, 8, 4)
    target.load_state_dict(online.state_dict())
    return {"online": online, "predictor": network(4, 4), "target": target.requires_grad_(False)}


def byol_step(models: Any, batch: Batch, context: StepContext) -> Losses:
    one, other = (batch.inputs + 0.1 * torch.randn_like(batch.inputs) for _ in range(2))
    wanted = F.normalize(models["target"](other))
    given = F.normalize(models["predictor"](models["online"](one)))
    return {"distance": (given - wanted).square().sum(1)}


def follow(models: Any, context: StepContext) -> None:
    share = 0.1 / (1 + context.step / 10)
    pairs = zip(models["target"].parameters(), models["online"].parameters(), strict=True)
    for target, online in pairs:
        target.lerp_(online, share)


def byol() -> Task:
    train, test = classified()
    return custom(step=byol_step, model=byol_models, train=train, test=test, after_update=follow)


def byol_by_hand(steps: int) -> dict[str, Tensor]:
    models = drawn_by_hand(byol_models)
    trained = [*models["online"].parameters(), *models["predictor"].parameters()]
    optimizer = torch.optim.AdamW(trained, lr=0.01, weight_decay=0.1)
    inputs = classified()[0].tensors[0]
    for step in range(steps):
        optimizer.zero_grad()
        for part, key in batches_by_hand(step):
            torch.manual_seed(key)
            rows = inputs[part]
            one, other = (rows + 0.1 * torch.randn_like(rows) for _ in range(2))
            given = F.normalize(models["predictor"](models["online"](one)))
            wanted = F.normalize(models["target"](other))
            ((given - wanted).square().sum() / GLOBAL).backward()
        optimizer.step()
        share = 0.1 / (1 + step / 10)
        with torch.no_grad():
            for target, online in zip(
                models["target"].parameters(), models["online"].parameters(), strict=True
            ):
                target.add_(share * (online - target))
    return models.state_dict()


# ---- what goes wrong


def spoilt_gan() -> Task:
    """One micro-batch of one turn of the generator gives a loss that is not finite."""

    def step(models: Any, batch: Batch, context: StepContext) -> Losses:
        losses = dict(gan_step(models, batch, context))
        if "generator" in losses and context.step == 4 and batch.number == 3:
            losses["generator"] = losses["generator"] * torch.nan
        return losses

    rows = points().double()
    return custom(step=step, model=gan_models, train=TensorDataset(rows[:ROWS]))


def by_loss() -> Task:
    train, test = classified()
    return supervised(model=lambda: network(6, 8, 3), train=train, test=test)


def two_by_loss() -> Task:
    train, _ = classified()
    return supervised(model=gan_models, train=train)  # type: ignore[arg-type]  # the mistake


def named(name: str) -> Task:
    train, _ = classified()
    return custom(step=gan_step, model=lambda: {name: network(6, 8, 1)}, train=train)


def same_name() -> Task:
    def step(models: Any, batch: Batch, context: StepContext) -> Losses:
        return {
            "a": sum(model[0].weight.sum() for model in models.values()).expand(len(batch.rows))
        }

    train, _ = classified()
    return custom(step=step, model=gan_models, train=train)


def changed_by(what: str) -> Task:
    def after(models: Any, context: StepContext) -> None:
        if what == "process":
            models["target"][0].weight.add_(os.getpid())
        else:
            context.log("seen", 1, 1)

    train, test = classified()
    return custom(step=byol_step, model=byol_models, train=train, test=test, after_update=after)
