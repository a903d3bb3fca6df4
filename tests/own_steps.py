"""Tasks with a step of their own, small enough to run at several numbers of processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from service.data.batches import Batch
from service.data.losses import Loss, Losses, StepContext, StepResult, own_loss
from service.data.task import Task, custom, supervised


def points(rows: int = 103, width: int = 6) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(3))


# ---- a variational autoencoder: two losses of a row, one of which warms up


class Autoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(6, 4), nn.Linear(2, 6)

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_variance = self.encoder(rows).chunk(2, dim=1)
        drawn = mean + torch.randn_like(mean) * (log_variance / 2).exp()
        return self.decoder(drawn), mean, log_variance


def vae_step(model: nn.Module, batch: Batch, context: StepContext) -> Losses:
    [rows] = batch.inputs
    rebuilt, mean, log_variance = model(rows)
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1)
    context.log("spread", log_variance.exp().sum(), log_variance.numel())
    return {
        "rebuilding": (rebuilt - rows).square().sum(1),  # [B]
        "divergence": Loss.each(divergence, scale=min(1.0, context.step / 10)),
    }


def vae() -> Task:
    rows = points().double()
    return custom(
        step=vae_step,
        model=lambda: Autoencoder().double(),
        train=TensorDataset(rows[:71]),
        test=TensorDataset(rows[71:]),
    )


# ---- a detector: images with any number of boxes, and a model that computes its own losses


class Detector(nn.Module):
    """As those of torchvision: losses by name in training, and found boxes otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.box, self.label = nn.Linear(6, 4), nn.Linear(6, 3)

    def forward(
        self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        if targets is None:
            return [{"boxes": self.box(i), "labels": self.label(i).argmax(-1)} for i in images]
        boxes = [(self.box(i) - t["boxes"]).square() for i, t in zip(images, targets, strict=True)]
        labels = torch.stack([self.label(image) for image in images])
        first = torch.stack([target["labels"][0] for target in targets])
        return {"box": torch.cat(boxes).mean(), "label": F.cross_entropy(labels, first)}


def detect(model: nn.Module, batch: Batch, context: StepContext) -> StepResult:
    losses = model(batch.inputs, batch.targets)
    boxes = sum(len(target["boxes"]) for target in batch.targets)
    found = None if context.training else model(batch.inputs)
    return {
        "box": Loss.mean(losses["box"], weight=boxes),
        "label": Loss.mean(losses["label"]),
    }, found


def as_lists(rows: list[tuple[Tensor, dict[str, Tensor]]]) -> tuple[list[Any], list[Any]]:
    images, targets = zip(*rows, strict=True)
    return list(images), list(targets)


def detector() -> Task:
    rows: list[tuple[Tensor, dict[str, Tensor]]] = []
    for number, image in enumerate(points().double()):
        boxes = torch.linspace(0, 1, 4 * (1 + number % 3), dtype=torch.float64).view(-1, 4)
        rows.append((image, {"boxes": boxes, "labels": torch.arange(len(boxes)) % 3}))
    return custom(
        step=detect,
        model=lambda: Detector().double(),
        train=rows[:71],
        test=rows[71:],
        collate=as_lists,
    )


# ---- the loss of a classifier, in its ways of being given


def classified() -> tuple[TensorDataset, TensorDataset]:
    rows = points().double()
    labels = (rows[:, 0] > 0).long() + (rows[:, 1] > 0).long()
    return TensorDataset(rows[:71], labels[:71]), TensorDataset(rows[71:], labels[71:])


def classifier(dropout: float = 0.2) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Dropout(dropout), nn.Tanh(), nn.Linear(8, 3)).double()


def by_loss(weight: bool = False) -> Task:
    train, test = classified()
    if weight:
        return supervised(model=classifier, train=train, test=test, weight=by_class)
    return supervised(model=classifier, train=train, test=test, measures=("accuracy",))


def by_class(targets: Tensor) -> Tensor:
    """What a row counts: not what the others do, so that no count of rows is its sum."""
    return 0.3 + targets.double()


def each_step(model: nn.Module, batch: Batch, context: StepContext) -> StepResult:
    outputs = model(batch.inputs)
    return {"loss": F.cross_entropy(outputs, batch.targets, reduction="none")}, outputs


def mean_step(model: nn.Module, batch: Batch, context: StepContext) -> StepResult:
    outputs = model(batch.inputs)
    return {"loss": Loss.mean(F.cross_entropy(outputs, batch.targets))}, outputs


def weighed_step(model: nn.Module, batch: Batch, context: StepContext) -> StepResult:
    outputs = model(batch.inputs)
    total = F.cross_entropy(outputs, batch.targets, reduction="sum")
    return {"loss": Loss(total, batch.targets.numel())}, outputs


def counted_step(model: nn.Module, batch: Batch, context: StepContext) -> Losses:
    losses = F.cross_entropy(model(batch.inputs), batch.targets, reduction="none")
    counts = by_class(batch.targets)
    return {"loss": Loss((losses * counts).sum(), counts.sum())}


def by_step(step: str, dropout: float = 0.2) -> Task:
    train, test = classified()
    steps: dict[str, Any] = {"each": each_step, "mean": mean_step, "weighed": weighed_step}
    steps["counted"] = counted_step
    return custom(
        step=steps[step],
        model=lambda: classifier(dropout),
        train=train,
        test=test,
        measures=() if step == "counted" else ("accuracy",),
    )


def noisy_update() -> Task:
    """Whose weights get noise after each update, as in stochastic gradient Langevin dynamics."""

    def add_noise(model: nn.Module, context: StepContext) -> None:
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.01)

    train, test = classified()
    return custom(step=each_step, model=classifier, train=train, test=test, after_update=add_noise)


# ---- several test sets


def two_tests(**more: Any) -> Task:
    train, test = classified()
    far = TensorDataset(test.tensors[0][:11] * 3, test.tensors[1][:11])
    tests = {"val": test, "ood": lambda: far}
    return supervised(model=classifier, train=train, test=tests, measures=("accuracy",), **more)


def broken_test() -> Task:
    def breaks(outputs: Tensor, targets: Tensor) -> Tensor:
        if len(outputs) == 7:  # as no micro-batch of training has
            raise ZeroDivisionError
        return outputs[:, 0]

    train, test = classified()
    return supervised(model=classifier, train=train, test=test, measures={"broken": breaks})


def two_tests_by_step() -> Task:
    tests = two_tests().test_data()
    return custom(step=each_step, model=classifier, train=classified()[0], test=tests)


def by_kind(all_of_none: bool = False) -> Task:
    """Two tasks in one: half of the rows count for the one loss, half for the other."""

    def step(model: nn.Module, batch: Batch, context: StepContext) -> Losses:
        inputs, labels = batch.inputs, batch.targets
        losses = F.cross_entropy(model(inputs), labels, reduction="none")
        first = inputs[:, 0] > 0
        if all_of_none and not context.training:
            first = torch.full_like(first, False)
            losses = losses[:0]
            return {"first": Loss(losses.sum(), 0), "second": Loss(losses.sum(), 0)}
        context.log("margin", losses[first].sum(), first.sum())
        second = ~first
        return {
            "first": Loss((losses * first).sum(), first.sum()),
            "second": Loss((losses * second).sum(), second.sum()),
        }

    train, test = classified()
    kinds = test.tensors[0][:, 0] > 0
    sets = {
        "first": TensorDataset(*(tensor[kinds] for tensor in test.tensors)),
        "second": TensorDataset(*(tensor[~kinds] for tensor in test.tensors)),
    }
    return custom(step=step, model=classifier, train=train, test=sets)


# ---- losses with weights of their own, which only the forward pass shows


def hard_step(model: nn.Module, batch: Batch, context: StepContext) -> StepResult:
    """Only what is classified with little margin counts, besides a loss of every row."""
    outputs = model(batch.inputs)
    losses = F.cross_entropy(outputs, batch.targets, reduction="none")
    hard = losses.detach() > 0.9
    return {
        "hard": Loss((losses * hard).sum(), hard.sum()),
        "size": Loss.each(outputs.square().sum(1), scale=0.01),
        "first": Loss.mean(losses[:3].mean(), weight=min(3, len(losses)), scale=0.5),
    }, outputs


def hard() -> Task:
    train, test = classified()
    return custom(step=hard_step, model=classifier, train=train, test=test, measures=("accuracy",))


class Branched(nn.Module):
    """Two layers, of which the second is used on demand."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare = nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, rows: Tensor, both: bool) -> Tensor:
        outputs: Tensor = self.used(rows)
        return outputs + self.spare(rows) if both else outputs


def late_branch() -> Task:
    """One whose branch is used from the fourth step on, in the first micro-batch only."""

    def step(model: nn.Module, batch: Batch, context: StepContext) -> Losses:
        outputs = model(batch.inputs.float(), context.step >= 3 and batch.number == 0)
        return {"loss": F.cross_entropy(outputs, batch.targets, reduction="none")}

    train, test = classified()
    return custom(step=step, model=Branched, train=train, test=test)


# ---- rows that see each other


def nearest(one: Tensor, other: Tensor) -> Tensor:
    """How far the second view of each row is from being the most alike to its first one: [N]."""
    likeness = F.normalize(one) @ F.normalize(other).T / 0.3  # [N, N]
    return F.cross_entropy(likeness, torch.arange(len(one), device=one.device), reduction="none")


def contrast_step(model: nn.Module, batch: Batch, context: StepContext) -> Losses:
    one, other = model(batch.inputs), model(batch.inputs.flip(1))
    return {
        "contrast": Loss.of_all_rows(nearest, one, other),
        "size": Loss.each(one.square().sum(1), scale=0.01),
    }


def contrast(dropout: float = 0.2) -> Task:
    train, test = classified()
    return custom(step=contrast_step, model=lambda: classifier(dropout), train=train, test=test)


def other_row(one: Tensor) -> Tensor:
    """How alike each row is to another one, by chance: [N]."""
    return (one - one[torch.randperm(len(one))]).square().sum(1).neg().exp()


def random_contrast_step(model: nn.Module, batch: Batch, context: StepContext) -> Losses:
    one = model(batch.inputs)
    return {name: Loss.of_all_rows(other_row, one) for name in ("near", "far")}


def random_contrast() -> Task:
    train, test = classified()
    return custom(step=random_contrast_step, model=classifier, train=train, test=test)


def whole_batch(dropout: float = 0.2) -> Task:
    """The same by hand, where a micro-batch is the whole batch."""

    def step(model: nn.Module, batch: Batch, context: StepContext) -> Losses:
        one, other = model(batch.inputs), model(batch.inputs.flip(1))
        return {
            "contrast": nearest(one, other),
            "size": Loss.each(one.square().sum(1), scale=0.01),
        }

    train, test = classified()
    return custom(step=step, model=lambda: classifier(dropout), train=train, test=test)


# ---- a student that learns from a frozen teacher, and one that learns from its own average


class Pupil(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.teacher = nn.Linear(6, 3).requires_grad_(False)
        self.student = classifier()

    def forward(self, rows: Tensor) -> Tensor:
        out: Tensor = self.student(rows)
        return out


def distil_step(model: Any, batch: Batch, context: StepContext) -> StepResult:
    outputs = model(batch.inputs)
    with torch.no_grad():
        wanted = model.teacher(batch.inputs).softmax(1)
    return {
        "soft": -(wanted * outputs.log_softmax(1)).sum(1),
        "hard": F.cross_entropy(outputs, batch.targets, reduction="none"),
    }, outputs


def distillation() -> Task:
    train, test = classified()
    return custom(
        step=distil_step,
        model=lambda: Pupil().double(),
        train=train,
        test=test,
        measures=("accuracy",),
    )


def byol_step(model: nn.Module, batch: Batch, context: StepContext) -> Losses:
    assert context.average is not None
    one, other = (batch.inputs + 0.1 * torch.randn_like(batch.inputs) for _ in range(2))
    with torch.no_grad():
        wanted = context.average(other)
    return {"distance": (F.normalize(model(one)) - F.normalize(wanted)).square().sum(1)}


def byol() -> Task:
    train, test = classified()
    return custom(step=byol_step, model=classifier, train=train, test=test)


# ---- a model that computes its own loss


class Tokens(nn.Module):
    """Named inputs and labels in, a mean over the tokens that are not -100 out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 5), nn.Linear(5, 9)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(self.embed(input_ids))
        flat = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        return {"loss": flat, "logits": logits}


def tokens() -> Task:
    generator = torch.Generator().manual_seed(5)
    rows = []
    for _ in range(103):
        ids = torch.randint(9, (7,), generator=generator)
        kept = int(torch.randint(1, 7, (), generator=generator))
        labels = ids.roll(-1).clone()
        labels[kept:] = -100
        rows.append({"input_ids": ids, "labels": labels})
    return custom(
        step=own_loss,
        model=lambda: Tokens().double(),
        train=rows[:71],
        test=rows[71:],
        weight=lambda labels: labels.ne(-100).double(),
        measures={"accuracy": lambda outputs, labels: outputs["logits"].argmax(-1) == labels},
    )


# ---- the same by a class, without measures and without test


class OwnClass:
    measures: tuple[str, ...] = ()
    train_rows, test_rows = 71, 0

    def model(self) -> nn.Module:
        return classifier()

    def train_data(self) -> TensorDataset:
        return classified()[0]

    def test_data(self) -> tuple[()]:
        return ()

    def step(self, model: nn.Module, batch: Batch, context: StepContext) -> StepResult:
        return each_step(model, batch, context)


# ---- mistakes


def wrong(step: Any, measures: tuple[str, ...] = ()) -> Task:
    train, test = classified()
    return custom(step=step, model=classifier, train=train, test=test, measures=measures)


def late() -> Task:
    """A weight that comes after the first steps."""

    def step(model: nn.Module, batch: Batch, context: StepContext) -> Losses:
        values = model(batch.inputs).square().sum(1)
        return {"a": values if context.step < 3 else Loss(values.sum(), 3)}

    return wrong(step)


def unseen() -> Task:
    return wrong(lambda model, batch, context: {"a": model(batch.inputs).sum(1)}, ("accuracy",))


def taken() -> Task:
    return wrong(lambda model, batch, context: {"lr": model(batch.inputs).sum(1)})


def lopsided() -> Task:
    weight = torch.tensor(-71)
    return wrong(lambda model, batch, context: {"a": Loss(model(batch.inputs).sum(), weight)})
