"""Cost of a training step and a test pass of other trainers, relative to hand-written loops.

    pip install accelerate lightning pytorch-ignite torchtnt torcheval torchmetrics transformers
    python -m benchmarks.peers [--pairs 12] [--only ignite]
    torchrun --nproc-per-node 2 -m benchmarks.peers

The task is that of benchmarks/by_hand.py; every trainer gets the same DataLoader, the same
fused optimizer and nothing to log, save or display.  Each epoch of a trainer follows one of the
hand-written loop, in the same process, so that a busy machine slows both: medians of the ratios of
processor time.  The test pass follows each trainer's documentation for loss and accuracy; whether
it counts every row once is measured.  The line of a trainer that is not installed says so; for one
that fails, its line shows the error.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import importlib.util
import io
import logging
import math
import os
import pstats
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from operator import truediv
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from benchmarks import step
from benchmarks.by_hand import ROWS, ByHand, Fetched, as_it_is, network, rows
from launch.environment import Environment, launched
from launch.rank.process_group import process_group
from service.distributed.world import World

BATCH, TEST_BATCH = 32, 256
WARM = 1  # epochs before the one whose calls are counted; later ones are timed


class Turns:
    """A DataLoader; runs and times a hand-written epoch before each epoch over it."""

    def __init__(self, loader: Iterable[Any], hand: ByHand, *, passes: int) -> None:
        self.loader, self.hand = loader, hand
        self.by_hand: list[float] = []
        self.theirs: list[float] = []
        """Processor seconds per step, for each timed epoch."""
        self.calls = 0.0
        """Python calls per step of the trainer."""
        self._batches = hand.batches()
        self._passes = iter([*["warm"] * WARM, "counted", *["timed"] * (passes - WARM - 1)])

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)  # attributes that a trainer reads, such as `sampler`

    def __iter__(self) -> Iterator[Any]:
        kind, steps = next(self._passes), len(self) - 2
        began = time.process_time()
        self.hand.train_steps(self._batches, steps)
        if kind == "timed":
            self.by_hand.append((time.process_time() - began) / steps)
        profile = cProfile.Profile()
        # Some prefetch a batch, and some never reach the end: from the second to the last.
        for number, batch in enumerate(self.loader):
            if number == 1:
                began = time.process_time()
                if kind == "counted":
                    profile.enable()
            if number == steps + 1:
                profile.disable()
                if kind == "timed":
                    self.theirs.append((time.process_time() - began) / steps)
                elif kind == "counted":
                    stats: Any = pstats.Stats(profile, stream=io.StringIO())
                    self.calls = stats.total_calls / steps
            yield batch


class Peer(NamedTuple):
    """Another trainer on the task."""

    package: str
    train: Callable[[ByHand, int], Turns]
    """Train a number of epochs; returns the timings."""
    test: Callable[[nn.Module, Fetched], Callable[[], float]]
    """From the model and the rows: a function that runs a test pass and returns the accuracy."""


def train_loader(*, sharded: bool = True) -> DataLoader[Any]:
    """The loader of the hand-written loop; `sharded` where the user supplies the sampler."""
    data = Fetched(rows(ROWS, seed=1))
    sampler: DistributedSampler[Any] | None = None
    if sharded and dist.is_initialized():
        sampler = DistributedSampler(data)
    return DataLoader(
        data,  # type: ignore[arg-type]
        batch_size=BATCH,
        sampler=sampler,
        shuffle=sampler is None,
        collate_fn=as_it_is,
        drop_last=True,
    )


def evaluation_loader(data: Fetched, *, sharded: bool = True) -> DataLoader[Any]:
    sampler: DistributedSampler[Any] | None = None
    if sharded and dist.is_initialized():
        sampler = DistributedSampler(data, shuffle=False)
    return DataLoader(data, batch_size=TEST_BATCH, sampler=sampler, collate_fn=as_it_is)  # type: ignore[arg-type]


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)


def joined(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model) if dist.is_initialized() else model


def with_accelerate(hand: ByHand, passes: int) -> Turns:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = network()
    model, optimizer, loader = accelerator.prepare(model, adamw(model), train_loader(sharded=False))
    turns = Turns(loader, hand, passes=passes)
    for _ in range(passes):
        model.train()
        for inputs, targets in turns:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs), targets)
            accelerator.backward(loss)
            optimizer.step()
    return turns


def test_with_accelerate(model: nn.Module, data: Fetched) -> Callable[[], float]:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    loader = accelerator.prepare(evaluation_loader(data, sharded=False))

    @torch.no_grad()
    def tested() -> float:
        model.eval()
        hits, loss, count = 0.0, 0.0, 0
        for inputs, targets in loader:
            outputs = model(inputs)
            outputs, targets = accelerator.gather_for_metrics((outputs, targets))
            loss += F.cross_entropy(outputs, targets, reduction="sum").item()
            hits += (outputs.argmax(1) == targets).sum().item()
            count += len(targets)
        return hits / count

    return tested


def launched_fabric() -> Any:
    from lightning.fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=world_size(), strategy=strategy())
    fabric.launch()
    return fabric


def with_fabric(hand: ByHand, passes: int) -> Turns:
    fabric = launched_fabric()
    model = network()
    model, optimizer = fabric.setup(model, adamw(model))
    loader = fabric.setup_dataloaders(train_loader(sharded=False))
    turns = Turns(loader, hand, passes=passes)
    for _ in range(passes):
        model.train()
        for inputs, targets in turns:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs), targets)
            fabric.backward(loss)
            optimizer.step()
    return turns


def test_with_fabric(model: nn.Module, data: Fetched) -> Callable[[], float]:
    fabric = launched_fabric()
    loader = fabric.setup_dataloaders(evaluation_loader(data, sharded=False))

    @torch.no_grad()
    def tested() -> float:
        model.eval()
        sums = torch.zeros(3, dtype=torch.float64)
        for inputs, targets in loader:
            outputs = model(inputs)
            sums[0] += F.cross_entropy(outputs, targets, reduction="sum")
            sums[1] += (outputs.argmax(1) == targets).sum()
            sums[2] += len(targets)
        total = fabric.all_reduce(sums, reduce_op="sum")
        assert isinstance(total, Tensor)
        return float(total[1] / total[2])

    return tested


def with_ignite(hand: ByHand, passes: int) -> Turns:
    from ignite.engine import Engine

    model = joined(network())
    optimizer = adamw(model)

    def update(engine: Engine, batch: list[Tensor]) -> None:
        model.train()
        optimizer.zero_grad()
        loss = F.cross_entropy(model(batch[0]), batch[1])
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    turns = Turns(train_loader(), hand, passes=passes)
    Engine(update).run(turns, max_epochs=passes)
    return turns


def test_with_ignite(model: nn.Module, data: Fetched) -> Callable[[], float]:
    from ignite.engine import create_supervised_evaluator
    from ignite.metrics import Accuracy, Loss

    metrics: Any = {"accuracy": Accuracy(), "loss": Loss(F.cross_entropy)}
    evaluator = create_supervised_evaluator(model, metrics=metrics)
    loader = evaluation_loader(data)
    return lambda: float(evaluator.run(loader).metrics["accuracy"])


def lightning_module(model: nn.Module) -> Any:
    import lightning as L
    from torchmetrics.classification import MulticlassAccuracy

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model
            self.accuracy = MulticlassAccuracy(10, average="micro")

        def training_step(self, batch: list[Tensor], _: int) -> Tensor:
            return F.cross_entropy(self.model(batch[0]), batch[1])

        def validation_step(self, batch: list[Tensor], _: int) -> None:
            outputs = self.model(batch[0])
            self.accuracy(outputs, batch[1])
            loss = F.cross_entropy(outputs, batch[1])
            self.log("loss", loss, sync_dist=True, batch_size=len(batch[1]))
            self.log("accuracy", self.accuracy, batch_size=len(batch[1]))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return adamw(self.model)

    return Module()


def lightning_trainer(passes: int) -> Any:
    import lightning as L

    return L.Trainer(
        accelerator="cpu",
        devices=world_size(),
        strategy=strategy(),
        max_epochs=passes,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def with_lightning(hand: ByHand, passes: int) -> Turns:
    turns = Turns(train_loader(), hand, passes=passes)
    lightning_trainer(passes).fit(lightning_module(network()), train_dataloaders=turns)
    return turns


def test_with_lightning(model: nn.Module, data: Fetched) -> Callable[[], float]:
    trainer, module = lightning_trainer(1), lightning_module(model)
    loader = evaluation_loader(data, sharded=False)
    return lambda: float(trainer.validate(module, loader, verbose=False)[0]["accuracy"])


def with_torchtnt(hand: ByHand, passes: int) -> Turns:
    from torchtnt.framework.state import State
    from torchtnt.framework.train import train
    from torchtnt.framework.unit import TrainUnit

    model = joined(network())

    class Unit(TrainUnit[list[Tensor]]):  # type: ignore[misc,unused-ignore]
        def __init__(self) -> None:
            super().__init__()
            self.model = model
            self.optimizer = adamw(model)

        def train_step(self, state: State, data: list[Tensor]) -> None:
            self.optimizer.zero_grad()
            loss = F.cross_entropy(self.model(data[0]), data[1])
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()

    turns = Turns(train_loader(), hand, passes=passes)
    train(Unit(), turns, max_epochs=passes)
    return turns


def test_with_torchtnt(model: nn.Module, data: Fetched) -> Callable[[], float]:
    from torcheval.metrics import MulticlassAccuracy
    from torcheval.metrics.toolkit import sync_and_compute
    from torchtnt.framework.evaluate import evaluate
    from torchtnt.framework.state import State
    from torchtnt.framework.unit import EvalUnit

    class Unit(EvalUnit[list[Tensor]]):  # type: ignore[misc,unused-ignore]
        def __init__(self) -> None:
            super().__init__()
            self.model = model
            self.accuracy = MulticlassAccuracy()

        def eval_step(self, state: State, data: list[Tensor]) -> None:
            outputs = self.model(data[0])
            F.cross_entropy(outputs, data[1])
            self.accuracy.update(outputs, data[1])

    loader = evaluation_loader(data)

    def tested() -> float:
        unit = Unit()
        evaluate(unit, loader)
        found = sync_and_compute(unit.accuracy)
        return math.nan if found is None else float(found)  # only the lead receives it

    return tested


class Mappings(Dataset[dict[str, Tensor]]):
    """The rows in the form that transformers' Trainer requires."""

    def __init__(self, data: Fetched) -> None:
        self._data = data

    def __len__(self) -> int:
        return len(self._data)

    def __getitems__(self, asked: list[int]) -> dict[str, Tensor]:
        inputs, labels = self._data.__getitems__(asked)
        return {"inputs": inputs, "labels": labels}


class WithLoss(nn.Module):
    """The model in the form that transformers' Trainer requires."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.model(inputs)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def transformers_trainer(model: nn.Module, hand: ByHand | None, passes: int, place: str) -> Any:
    from transformers import Trainer, TrainingArguments

    class Paired(Trainer):
        turns: Turns

        def get_train_dataloader(self) -> Any:
            assert hand is not None
            self.turns = Turns(super().get_train_dataloader(), hand, passes=passes)
            return self.turns

    arguments = TrainingArguments(
        place,
        use_cpu=True,
        num_train_epochs=passes,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=TEST_BATCH,
        dataloader_drop_last=hand is not None,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        max_grad_norm=0.0,
        remove_unused_columns=False,
    )
    wrapped = WithLoss(model)
    return Paired(
        wrapped,
        arguments,
        train_dataset=Mappings(Fetched(rows(ROWS, seed=1))),
        data_collator=as_it_is,  # type: ignore[arg-type]
        optimizers=(adamw(wrapped), None),
        compute_metrics=lambda found: {
            "accuracy": float((found.predictions.argmax(1) == found.label_ids).mean())
        },
    )


def with_transformers(hand: ByHand, passes: int) -> Turns:
    with tempfile.TemporaryDirectory() as place:
        trainer = transformers_trainer(network(), hand, passes, place)
        trainer.train()
        turns: Turns = trainer.turns
        return turns


def test_with_transformers(model: nn.Module, data: Fetched) -> Callable[[], float]:
    place = tempfile.mkdtemp()
    trainer = transformers_trainer(model, None, 1, place)
    asked = Mappings(data)
    return lambda: float(trainer.evaluate(asked)["eval_accuracy"])


PEERS = {
    "ignite": Peer("ignite", with_ignite, test_with_ignite),
    "Fabric": Peer("lightning", with_fabric, test_with_fabric),
    "accelerate": Peer("accelerate", with_accelerate, test_with_accelerate),
    "torchtnt": Peer("torchtnt", with_torchtnt, test_with_torchtnt),
    "Lightning": Peer("lightning", with_lightning, test_with_lightning),
    "transformers Trainer": Peer("transformers", with_transformers, test_with_transformers),
}


def world_size() -> int:
    """Number of processes of this run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def strategy() -> str:
    return "ddp" if dist.is_initialized() else "auto"


def row(name: str, peer: Peer, *, pairs: int) -> str:
    """One line of the table."""
    hand = ByHand(batch=BATCH, loader=True)
    turns = peer.train(hand, WARM + 1 + pairs)
    steps = statistics.median(a / b for a, b in zip(turns.theirs, turns.by_hand, strict=True))
    reference = ByHand(batch=TEST_BATCH, loader=False)
    tested = peer.test(reference.model, Fetched(reference.test))
    exact = abs(tested() - reference.tested(TEST_BATCH)[1]) < 1e-6
    passes = []
    for _ in range(pairs):
        began = time.process_time()
        tested()
        ended = time.process_time()
        reference.tested(TEST_BATCH)
        passes.append((ended - began) / (time.process_time() - ended))
    test = statistics.median(passes)
    return f"| {name} | {turns.calls:.0f} | {steps:.2f} | {test:.1f} | {'yes' if exact else 'no'} |"


def line(name: str, peer: Peer, *, pairs: int) -> str:
    """The row of a trainer; if it fails here, a row that says why, and the others still count."""
    if not importlib.util.find_spec(peer.package):
        return f"| {name} | not installed | | | |"
    try:
        return row(name, peer, pairs=pairs)
    except Exception as error:  # on every process, and before any of them waits for another
        told = " ".join(f"{type(error).__name__}: {error}".split()).replace("|", "\\|")
        return f"| {name} | not measured: {told} | | | |"


def ours(world: World, *, pairs: int) -> list[str]:
    """The table rows of the hand-written loops and of Evenstep, from the same epochs."""
    times = step.trained(world, pairs=pairs)
    index = statistics.median(map(truediv, times.by_index, times.by_loader))
    steps = statistics.median(map(truediv, times.ours, times.by_loader))
    test = statistics.median(step.tested(world, pairs=pairs))
    calls = times.calls
    return [
        f"| hand-written, DataLoader | {calls['by loader']:.0f} | 1 | 1 | yes |",
        f"| hand-written, rows by index | {calls['by index']:.0f} | {index:.2f} | 1 | yes |",
        f"| **Evenstep** | {calls['ours']:.0f} | {steps:.2f} | {test:.2f} | yes |",
    ]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--only", default="", help="trainers whose name contains this")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    os.environ.setdefault("EVENSTEP_DEVICE", "cpu")
    torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", "1")))
    with process_group(launched() or Environment()) as world:
        lines = [
            "| loop | Python calls a step | step | test pass | exact |",
            "|---|---|---|---|---|",
        ]
        with contextlib.redirect_stdout(io.StringIO()):
            lines += ours(world, pairs=given.pairs)
            for name, peer in PEERS.items():
                if given.only.lower() in name.lower():
                    lines.append(line(name, peer, pairs=given.pairs))
        if world.is_lead:
            print("\n".join(lines))


if __name__ == "__main__":
    main()
