"""Tasks and an optimizer for `test_ready`, in a file that a spec can name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset, default_collate

from service.data.batches import Batch
from service.data.losses import Losses
from service.data.task import Task, custom, supervised


def rows(count: int = 103) -> TensorDataset:
    draw = torch.Generator().manual_seed(0)
    points = torch.rand(count, 4, generator=draw, dtype=torch.float64)
    return TensorDataset(points, torch.arange(count) % 3)


def task_of(model: type[nn.Module], **more: Any) -> Task:
    return supervised(model=lambda: model().double(), train=rows(), test=rows(17), **more)


class Normalised(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def normalised() -> Task:
    return task_of(Normalised)


class Reentrant(nn.Module):
    """One checkpoint, or the same layer in two; a parameter in none where `spare`."""

    def __init__(self, times: int, spare: bool = False) -> None:
        super().__init__()
        self.first, self.again, self.last = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.times = times
        if spare:
            self.spare = nn.Linear(2, 2)

    def forward(self, points: Tensor) -> Tensor:
        seen = self.first(points)
        for _ in range(self.times):
            seen = checkpoint(self.again, seen, use_reentrant=True).tanh()
        out: Tensor = self.last(seen)
        return out


def once() -> Task:
    return supervised(model=lambda: Reentrant(1).double(), train=rows())


def twice() -> Task:
    return supervised(model=lambda: Reentrant(2).double(), train=rows())


def spare() -> Task:
    return supervised(model=lambda: Reentrant(1, spare=True).double(), train=rows())


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, points: Tensor, *, scale: float = 1.0) -> Tensor:
        out: Tensor = self.layer(points) * scale
        return out


class NamedLazily(Named):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LazyLinear(3)


def by_name(count: int, **others: Any) -> list[dict[str, Any]]:
    points, labels = rows(count).tensors
    return [
        {"points": p, "labels": y, **others} for p, y in zip(points.float(), labels, strict=True)
    ]


def with_text(column: str = "text", lazy: bool = False) -> Task:
    return supervised(model=NamedLazily if lazy else Named, train=by_name(103, **{column: "a row"}))


def with_other_tests() -> Task:
    return supervised(model=Named, train=by_name(103), test=by_name(17, id=3))


def renamed() -> Task:
    kept = [{"pixels": row["points"], "labels": row["labels"]} for row in by_name(103)]
    return supervised(model=Named, train=kept)


def without_text() -> Task:
    def collate(some: list[dict[str, Any]]) -> Any:
        return default_collate([{key: row[key] for key in ("points", "labels")} for row in some])

    return supervised(model=Named, train=by_name(103, text="a row"), collate=collate)


class Sam(torch.optim.Optimizer):
    """Sharpness-aware minimisation as its users write it (Foret et al., arXiv:2010.01412)."""

    def __init__(self, params: Any, lr: float = 0.1, rho: float = 0.05, share: bool = True):
        super().__init__(params, {"lr": lr, "rho": rho})
        self.share = share
        self.base = torch.optim.SGD(self.param_groups, lr=lr, momentum=0.9)
        self._join()

    def _join(self) -> None:
        self.base.param_groups = self.param_groups
        if self.share:
            self.base.state = self.state

    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict(state_dict)
        self._join()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is not None, "SAM requires a closure"
        closure = torch.enable_grad()(closure)
        parameters = [p for group in self.param_groups for p in group["params"]]
        norm = torch.stack([p.grad.norm() for p in parameters]).norm()
        before = [p.clone() for p in parameters]
        for p in parameters:
            p.add_(p.grad * self.param_groups[0]["rho"] / norm)
        closure()
        for p, old in zip(parameters, before, strict=True):
            p.copy_(old)
        self.base.step()


def plain() -> Task:
    return task_of(lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)))


def from_loader() -> Task:
    return supervised(model=lambda: nn.Linear(4, 3).double(), train=loader())


def loader() -> DataLoader[Any]:
    return DataLoader(rows(), batch_size=20, shuffle=True)


def hooked_without_tests() -> Task:
    return supervised(model=lambda: nn.Linear(4, 3).double(), train=rows(), after_test=print)


def own_step(**more: Any) -> Task:
    return custom(
        step=lambda model, batch, context: each_row(model, batch),
        model=lambda: nn.Linear(4, 3).double(),
        train=rows(),
        **more,
    )


def each_row(model: nn.Module, batch: Batch) -> Losses:
    return {
        "loss": nn.functional.cross_entropy(model(batch.inputs), batch.targets, reduction="none")
    }


def broken_after_update() -> Task:
    def follow(model: nn.Module, context: Any) -> None:
        raise KeyError("a name that is none")

    return own_step(after_update=follow)
