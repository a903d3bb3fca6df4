"""The task that the user brings: a model, its data, its loss and its measures."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import (
    Any,
    NamedTuple,
    Protocol,
    Required,
    TypedDict,
    Unpack,
    cast,
    runtime_checkable,
)

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parameter import is_lazy
from torch.utils.data import ConcatDataset, DataLoader, Sampler, default_collate

from service.basics import randomness
from service.basics.errors import SpecError, did_you_mean, is_out_of_memory, is_own_code, with_place
from service.data.batches import Batch, forward, split
from service.data.loaders import sampling_of_sampler, taken_from
from service.data.losses import AfterUpdate, OwnStep, StepContext, StepResult
from service.data.streams import is_stream, reads_at_once
from service.distributed.generators import seed_generators
from service.plan.sampling import Sampling

# A map-style data set: __len__, __getitem__ and, when present, __getitems__.  For training it may
# be a stream: __iter__ and, when present, state_dict, load_state_dict, set_epoch and shard.
Data = Any


@runtime_checkable
class Task(Protocol):
    """A job's content.  `supervised` builds one from parts."""

    train_rows: int | None
    """None if the training data can only be iterated."""
    test_rows: int
    measures: tuple[str, ...]

    def model(self) -> nn.Module | Mapping[str, nn.Module]:
        """A new model; its random numbers are drawn from torch's generator, seeded by the spec."""
        ...

    def train_data(self) -> Data:
        """The training rows."""
        ...

    def test_data(self) -> Data:
        """The test rows; if the task has `tests`, a mapping with the rows of each."""
        ...

    # A task also has a loss (`WithLoss`) or its own step (`WithStep`).  It may also have
    #   tests                       names of several test sets; `test_rows` is then their sum;
    #   weight(targets) -> Tensor   the weight of each value, in the loss's shape, instead of 1;
    #   ignored                     without a weight: the target whose row the loss ignores;
    #   metrics                     a mapping from names to torchmetrics metrics;
    #   predict(outputs) -> Tensor  what `evenstep test --predictions` writes for each row;
    #   collate(rows)               makes (inputs, targets), or a mapping, of a list of rows;
    #   sampling                    how often each row is used: service/plan/sampling.py;
    #   merged(model) -> nn.Module  what `evenstep export --merged` writes;
    #   after_test, after_epoch     hooks: functions of a context (`Further`).


@runtime_checkable
class WithLoss(Task, Protocol):
    """A task whose loss is a function of the model's outputs and the targets."""

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """One value for each row [B], or for each token [B, T]; never a mean."""
        ...

    def measure(self, outputs: Any, targets: Any) -> Tensor:
        """One value for each row or token and measure: [B, measures] or [B, T, measures]."""
        ...


@runtime_checkable
class WithStep(Task, Protocol):
    """A task with its own step.  If it has measures, it has `measure` as well."""

    def step(self, model: nn.Module, batch: Batch, context: StepContext) -> StepResult:
        """The losses of one micro-batch by name; or these, and the outputs for measures."""
        ...


RowLoss = Callable[[Any, Any], Tensor]


def _cross_entropy(outputs: Any, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits(outputs), targets, reduction="none")


def _cross_entropy_sum(outputs: Any, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits(outputs), targets, reduction="sum")


def _mean_squared(outputs: Any, targets: Tensor) -> Tensor:
    errors = (_as_targets(logits(outputs), targets) - targets).square()
    return errors.flatten(1).mean(1) if errors.dim() > 1 else errors


def _binary_cross_entropy(outputs: Any, targets: Tensor) -> Tensor:
    given = _as_targets(logits(outputs), targets)
    values = F.binary_cross_entropy_with_logits(given, targets.to(given.dtype), reduction="none")
    return values.flatten(1).mean(1) if values.dim() > 1 else values


LOSSES: dict[str, RowLoss] = {
    "cross_entropy": _cross_entropy,
    "mean_squared": _mean_squared,
    "binary_cross_entropy": _binary_cross_entropy,
}


# Losses that torch sums in one call: this makes a step of a small network 4 % faster.
SUMMED_LOSSES: dict[str, RowLoss] = {"cross_entropy": _cross_entropy_sum}


IGNORED = -100
"""The target that torch's losses ignore by default."""
_TORCHS = (nn.CrossEntropyLoss, nn.NLLLoss)


def _counted_as_by_torch(loss: Any) -> tuple[RowLoss, Callable[[Any], Tensor] | None, int]:
    """A loss of torch, the weights of its values, and the target that it ignores.

    With class weights torch's mean is divided by their sum: so the weight of a value is that of
    its class, and the value itself is not multiplied by it.

    Raises:
        SpecError: the weights are smoothed over the classes, and belong to no single value.
    """
    if loss.weight is None:
        return loss, None, loss.ignore_index
    if getattr(loss, "label_smoothing", 0.0):
        raise SpecError(
            "task.loss: in CrossEntropyLoss with weight and label_smoothing no value has its own "
            "weight. "
            "Leave one of them out, or give a function as the loss, and a weight."
        )
    classes, ignored = {loss.weight.device: loss.weight}, loss.ignore_index  # on each device

    def weight(targets: Tensor) -> Tensor:
        if targets.is_floating_point():
            raise SpecError(
                "task.loss: class weights need class indices as targets, but these are "
                f"{targets.dtype}. Give a function as the loss, and a weight."
            )
        targets = targets.long()  # uint8 would select as a mask does
        left_out = targets == ignored
        if targets.device not in classes:  # once: the host waits for the device in such a copy
            classes[targets.device] = loss.weight.to(targets.device)
        counts: Tensor = classes[targets.device][targets.masked_fill(left_out, 0)]
        return counts.masked_fill(left_out, 0.0)

    return type(loss)(ignore_index=ignored, reduction="none"), weight, ignored


def _accuracy(outputs: Any, targets: Tensor) -> Tensor:
    scores = logits(outputs)
    if scores.dim() < 2 or scores.shape[1] == 1:
        raise SpecError(
            "task.measures: accuracy and error need several outputs per row, of which the largest "
            "counts, "
            f"but the outputs are {list(scores.shape)}. With one output, give a function, such as "
            "`lambda outputs, targets: (outputs.flatten() > 0) == (targets.flatten() > 0.5)`."
        )
    return (_as_targets(scores.argmax(1), targets) == targets).double()


def _absolute_error(outputs: Any, targets: Tensor) -> Tensor:
    errors = (_as_targets(logits(outputs), targets) - targets).abs().double()
    return errors.flatten(1).mean(1) if errors.dim() > 1 else errors


def _as_targets(given: Tensor, targets: Tensor) -> Tensor:
    """The outputs in the shape of the targets: torch would broadcast [B, 1] and [B] to [B, B].

    Raises:
        SpecError: it is unclear whether they are the same values in the same order.
    """
    if given.shape == targets.shape:
        return given
    inner = [[n for n in tensor.shape[1:] if n != 1] for tensor in (given, targets)]
    in_a_row = min(map(len, inner)) <= 1  # otherwise dimensions may be swapped
    same_rows = given.shape[:1] == targets.shape[:1] or given.numel() == 1
    if given.numel() != targets.numel() or not same_rows or not (inner[0] == inner[1] or in_a_row):
        raise SpecError(
            f"task: the compared outputs have the shape {list(given.shape)}, and the "
            f"targets {list(targets.shape)}. Bring one of them to the shape of the other, in the "
            "model or in the data; or give a loss and measures that are functions of both."
        )
    return given.reshape(targets.shape)


MEASURES: dict[str, RowLoss] = {
    "accuracy": _accuracy,
    "error": lambda outputs, targets: 1.0 - _accuracy(outputs, targets),
    "absolute_error": _absolute_error,
    "squared_error": lambda outputs, targets: _mean_squared(outputs, targets).double(),
}


def step_of(task: Task) -> WithStep | None:
    """The task if it has its own step, which replaces its loss."""
    return task if isinstance(task, WithStep) else None


def after_update_of(task: Task) -> AfterUpdate | None:
    """The task's function that is called after each update, if any."""
    found: AfterUpdate | None = getattr(task, "after_update", None)
    return found if step_of(task) is not None else None


def with_loss(task: Task) -> WithLoss:
    """The task, which has no step of its own and so has a loss."""
    assert isinstance(task, WithLoss), "load_task refuses a task with neither"
    return task


def measured_by(task: Task) -> tuple[str, ...]:
    """Names of everything that the test loop measures on a test set."""
    return ("loss", *task.measures, *metrics_of(task))


def require_names(task: Task) -> None:
    """Check that no measure has the name of another, or of the loss, whose value it would replace.

    Raises:
        SpecError: one has.
    """
    names = measured_by(task)
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        told = "the name of the loss" if twice == "loss" else "the name of two measures"
        raise SpecError(f"task.measures: {twice!r} is {told}. Give the measure another name.")


def bring_losses(task: Task, device: torch.device) -> None:
    """Move the tensors of the task's loss, weight and measures to the device of the model.

    Those are modules with weights of their own, such as nn.BCEWithLogitsLoss(pos_weight=...).
    """
    named = [getattr(task, "loss", None), getattr(task, "weight", None)]
    for each in (*named, *getattr(task, "_measures", ())):
        if isinstance(each, nn.Module):
            each.to(device)


def metrics_of(task: Task) -> dict[str, Any]:
    """The torchmetrics metrics of a task by name; those of a collection as `collection/metric`."""
    found: dict[str, Any] = {}
    for name, metric in getattr(task, "metrics", {}).items():
        parts = {name: metric}
        if _is_collection(metric):
            parts = {f"{name}/{key}": part for key, part in metric.items()}
        for part in parts.values():
            if not hasattr(part, "merge_state"):
                raise SpecError(
                    f"task.measures: {name} is a {type(part).__name__}, which is neither a "
                    "function nor a metric of torchmetrics 1.7 or newer."
                )
        found |= parts
    return found


class TestSet(NamedTuple):
    """The rows of one test pass."""

    name: str
    """Empty if the task has only one."""
    data: Data
    rows: int

    def key(self, measure: str) -> str:
        """`test/loss`, or `test/val/loss`."""
        return f"test/{self.name}/{measure}" if self.name else f"test/{measure}"

    def named(self, values: Mapping[str, float]) -> dict[str, float]:
        """The results of the test loop, `test/loss`, under the keys of this set."""
        return {self.key(key.removeprefix("test/")): value for key, value in values.items()}


def test_sets(task: Task | _FromParts, data: Data) -> list[TestSet]:
    """The test sets of a task; `data` are their rows.

    Raises:
        SpecError: a name or a set is invalid.
    """
    names = getattr(task, "tests", None)
    if names is None:
        return [TestSet("", data, _length(data, "test"))]
    if not isinstance(data, Mapping) or {*data} != {*names}:
        there = sorted(data) if isinstance(data, Mapping) else f"a {type(data).__name__}"
        raise SpecError(
            f"task.tests: names {', '.join(names)}, so test_data must return a mapping of these "
            f"names, but "
            f"it returns {there}."
        )
    for name in names:
        if not (isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9_.-]+", name)):
            raise SpecError(
                f"task.test: the name of a test set must consist of letters, digits and _ . -, but "
                f"is {name!r}."
            )
        if _length(data[name], "test") == 0:
            raise SpecError(f"task.test: the test set {name!r} is empty. Leave it out.")
    return [TestSet(name, data[name], len(data[name])) for name in names]


def chosen_test_sets(sets: Sequence[TestSet], name: str | None) -> list[TestSet]:
    """The test set of this name, or all of them.

    Raises:
        SpecError: there is no test set of this name.
    """
    if name is None:
        return list(sets)
    found = [part for part in sets if part.name == name]
    if not found:
        known = [part.name for part in sets if part.name]
        told = did_you_mean(name, known) if known else ": the task has one test set, without a name"
        raise SpecError(f"--data: there is no test set {name!r}{told}")
    return found


def _is_collection(metric: Any) -> bool:
    """Whether it is a MetricCollection of torchmetrics."""
    return hasattr(metric, "compute") and hasattr(metric, "items")


def logits(outputs: Any) -> Tensor:
    """The tensor in a model's outputs: the output itself, or the `logits` of a transformers model.

    Raises:
        SpecError: the outputs have no such tensor.
    """
    if isinstance(outputs, Tensor):
        return outputs
    found = outputs.get("logits") if isinstance(outputs, Mapping) else None
    found = getattr(outputs, "logits", found)
    if not isinstance(found, Tensor):
        raise SpecError(
            f"task: the model returns a {type(outputs).__name__}, which is not a tensor and has no "
            "logits. Give a loss, measures and predict that accept it."
        )
    return found


def new_model(task: Task, *, seed: int) -> nn.Module:
    """A new model of the task, always the same one for the same seed of the spec.

    What the model draws outside of its state, such as the frequencies of random Fourier features
    in a plain attribute, belongs to the run too: whoever builds the model of a run again, to test
    or to export it, gets the same.

    Raises:
        SpecError: the task raised, or returned something else.
    """
    key = randomness.key(randomness.WEIGHTS, seed)
    seed_generators(key)
    torch.manual_seed(key)  # also seeds the devices
    try:
        model: object = task.model()
    except SpecError:
        raise
    except (Exception, SystemExit) as error:
        if is_out_of_memory(error):
            raise
        if isinstance(task.model, nn.Module):  # calling it ran a forward pass
            raise SpecError(
                "task.model: must be a function that creates a new model, but is a model: a "
                f"{type(task.model).__name__}. "
                "Write model=lambda: ..., so that each process and each test creates its own."
            ) from error
        raise SpecError(f"task.model: raised {with_place(error)}") from error
    if isinstance(model, Mapping) and not isinstance(model, nn.Module):
        model = _several(model, task)
    if not isinstance(model, nn.Module):
        raise SpecError(
            f"task.model: must return an nn.Module, but returned a {type(model).__name__}. If it "
            f"is a "
            "class, calling it creates a model."
        )
    _give_sizes(model, task)
    return model


def _several(models: Mapping[Any, object], task: Task) -> nn.ModuleDict:
    """Several models by name as one module, whose parameters are named `NAME.PARAMETER`.

    Raises:
        SpecError: their names are invalid, they are not models, or the task has no step that calls
            them.
    """
    if step_of(task) is None:
        raise SpecError(
            f"task.model: returned several models ({', '.join(map(str, models))}), but a loss of "
            "outputs and targets cannot use several. Give the task its own step: "
            "service.task.custom."
        )
    named: dict[str, nn.Module] = {}
    for name, model in models.items():
        if not (isinstance(name, str) and name.isidentifier()):
            raise SpecError(
                f"task.model: the name of a model must consist of letters, digits and _, but is "
                f"{name!r}."
            )
        if not isinstance(model, nn.Module):
            raise SpecError(
                f"task.model: {name!r} must be an nn.Module, but is a {type(model).__name__}."
            )
        named[name] = model
    try:
        return nn.ModuleDict(named)
    except KeyError as error:  # a name that torch's own class has, such as `keys`
        raise SpecError(f"task.model: invalid name of a model: {error.args[0]}.") from error


def _give_sizes(model: nn.Module, task: Task) -> None:
    """Give lazy layers their sizes with a forward pass over the first training row.

    Raises:
        SpecError: it raised, or left some without a size.
    """

    def lazy() -> list[str]:
        tensors = (*model.named_parameters(), *model.named_buffers())
        return [name for name, tensor in tensors if is_lazy(tensor)]

    if not lazy():
        return
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            forward(model, split(first_row(task))[0])
    except SpecError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise SpecError(
            "task.model: its lazy layers get their sizes from a forward pass over the first "
            f"training row, which raised {with_place(error)}. Set the sizes in the model."
        ) from error
    finally:
        model.train(was_training)
    if left := lazy():
        raise SpecError(
            f"task.model: {left[0]} has no size after a forward pass over the first training row. "
            "Set the size in the model."
        )


def first_row(task: Task) -> Any:
    """The first training row, collated: a batch of one."""
    data = task.train_data()
    if is_stream(data):
        rows = [next(iter(data))]
    else:
        rows = data.__getitems__([0]) if reads_at_once(data) else [data[0]]
    return collate_of(task)(list(rows))


def collate_of(task: Task) -> Callable[[list[Any]], Any]:
    """The function that makes a batch from rows: the task's `collate`, or torch's default."""
    return getattr(task, "collate", default_collate)


class Further(TypedDict, total=False):
    """Additional arguments of `supervised` and `custom`.

    A hook is a function of a `service.task.HookContext` that rank 0 calls, and that cannot change
    the run: docs/how-to/hooks.md.
    """

    sampling: Any
    """How often each row is used, if not each once per epoch: docs/how-to/sampling.md."""
    merged: Callable[[Any], nn.Module] | None
    """The model to export, from the trained one, for `evenstep export --merged`."""
    after_test: Callable[[Any], object] | None
    """Called after the test of each test set."""
    after_epoch: Callable[[Any], object] | None
    """Called after the step that ends an epoch."""


class _FromParts:
    """The common part of `supervised` and `custom`: a model, its data, and its measures."""

    def __init__(
        self,
        *,
        model: Callable[[], nn.Module | Mapping[str, nn.Module]],
        train: Data,
        test: Data = None,
        measures: Sequence[str] | Mapping[str, Any] = (),
        weight: Callable[[Any], Tensor] | None = None,
        collate: Callable[[list[Any]], Any] | None = None,
        predict: Callable[[Any], Tensor] | None = None,
        **further: Unpack[Further],
    ) -> None:
        self.model = model
        self._collate_of_loader: Callable[[list[Any]], Any] | None = None
        self._train = self._brought(train() if callable(train) else train)
        test = test() if callable(test) else test
        if collate is not None:
            self.collate = collate
        self._test: Data = () if test is None else self._without_loader(test)
        self.train_rows = None if is_stream(self._train) else _length(self._train, "training")
        if isinstance(test, Mapping):
            made = {name: data() if callable(data) else data for name, data in test.items()}
            self._test = {name: self._without_loader(data) for name, data in made.items()}
            self.tests = tuple(self._test)
        self.test_rows = sum(part.rows for part in test_sets(self, self._test))
        if _is_collection(measures):
            measures = dict(cast(Any, measures).items())
        if not isinstance(measures, Mapping):
            measures = {name: name for name in measures}
        measures = {
            name: _known(measure, MEASURES, "measure") if isinstance(measure, str) else measure
            for name, measure in measures.items()
        }
        self.metrics = {n: m for n, m in measures.items() if hasattr(m, "compute")}
        sums = {name: m for name, m in measures.items() if name not in self.metrics}
        self._measures = list(sums.values())
        self.measures = tuple(sums)
        if weight is not None:
            self.weight = weight
        if predict is not None:
            self.predict = predict
        for name, value in further.items():
            if name not in Further.__annotations__:
                raise TypeError(f"{type(self).__name__}() got an unknown argument {name!r}")
            if value is not None:
                setattr(self, name, value)
        sampling_of(self)  # raises if it is invalid

    def _without_loader(self, test: Data) -> Data:
        """The rows of a test set, which may be given as a DataLoader."""
        if not isinstance(test, DataLoader):
            return test
        taken = taken_from(test, test=True)
        of_task = getattr(self, "collate", None)
        wanted = taken.collate or of_task
        if of_task is not None and of_task is self._collate_of_loader:
            wanted = taken.collate  # None, torch's default, is not what the training loader does
        if wanted != of_task:
            raise SpecError(
                "task.test: its DataLoader has another collate_fn than the training data. A task "
                "has one for both: pass it as collate=, and write test=loader.dataset."
            )
        return taken.data

    def _brought(self, train: Data) -> Data:
        """The training rows of a data set, of several by name, or of a DataLoader."""
        if isinstance(train, DataLoader):
            taken = taken_from(train)
            self.loader_rows = taken.rows
            if taken.collate is not None:
                self.collate = self._collate_of_loader = taken.collate
            if taken.sampling is not None:
                self.sampling = taken.sampling
            return taken.data
        if not isinstance(train, Mapping) or not all(isinstance(name, str) for name in train):
            return train
        made = {name: data() if callable(data) else data for name, data in train.items()}
        for name, data in made.items():
            if is_stream(data):
                raise SpecError(
                    f"task.train: {name!r} can only be iterated, but several data sets are mixed "
                    f"by "
                    "row numbers. Give data sets with __len__ and __getitem__."
                )
        self.sources = {name: _length(data, f"training ({name})") for name, data in made.items()}
        return ConcatDataset(list(made.values()))

    def train_data(self) -> Data:
        """The training rows."""
        return self._train

    def test_data(self) -> Data:
        """The test rows."""
        return self._test

    def measure(self, outputs: Any, targets: Any) -> Tensor:
        """Every measure of every row: float64 [B, measures]; an empty tensor if there are none."""
        if not self._measures:
            return torch.zeros(0, 0, dtype=torch.float64)
        values: list[Tensor] = [m(outputs, targets).double() for m in self._measures]
        if len(values) == 1:
            return values[0].unsqueeze(-1)
        if len({value.shape for value in values}) > 1:
            told = [f"{n} {list(v.shape)}" for n, v in zip(self.measures, values, strict=True)]
            raise SpecError(
                "task.measures: each must return one value for each value of the loss, so all must "
                f"have the same shape, but they return {', '.join(told)}."
            )
        return torch.stack(values, dim=-1)


class supervised(_FromParts):  # reads as the function a user calls; it is a Task
    """A task from parts.

    Args:
        model: a function that creates a new model.
        train: a map-style data set whose rows are (inputs, targets) or mappings with the targets
            under `labels`, `label`, `targets` or `target`; a stream of them; or a function that
            creates one.
        test: such a data set, but not a stream; a mapping from names to several of them;
            None for a task without a test.
        loss: a name in `LOSSES`, or a function of (outputs, targets) that returns one value per
            row.
        measures: names in `MEASURES`; or a mapping from a name to one of these, to such a function,
            or to a torchmetrics metric or collection, which gets the outputs (their logits, if they
            have any) and the targets.
        weight: a function of the targets that returns the weight of each value of the loss: 0 for
            padding, for example.  Without it each row has weight 1; a loss with several values
                per row needs it.
            collate: makes a batch of a list of rows that torch cannot stack, such as texts of
                unequal length; it runs in the loader's workers if there are any.
            predict: a function of the model's outputs that returns what `evenstep test
                --predictions` writes: [B, ...].  By default the logits.
            further: `sampling`, `merged`, `after_test` and `after_epoch`, see `Further`.
    Raises:
        SpecError: an unknown loss or measure, or data that is not a data set.
    """

    def __init__(
        self,
        *,
        model: Callable[[], nn.Module],
        train: Data,
        test: Data = None,
        loss: str | RowLoss = "cross_entropy",
        measures: Sequence[str] | Mapping[str, Any] = (),
        weight: Callable[[Any], Tensor] | None = None,
        collate: Callable[[list[Any]], Any] | None = None,
        predict: Callable[[Any], Tensor] | None = None,
        **further: Unpack[Further],
    ) -> None:
        ignored: int | None = None
        if weight is None and isinstance(loss, str):
            ignored = IGNORED if loss == "cross_entropy" else None
        elif weight is None and type(loss) in _TORCHS and loss.reduction == "none":  # type: ignore[union-attr]
            loss, weight, ignored = _counted_as_by_torch(loss)
        super().__init__(
            model=model,
            train=train,
            test=test,
            measures=measures,
            weight=weight,
            collate=collate,
            predict=predict,
            **further,
        )
        self.loss = _known(loss, LOSSES, "loss") if isinstance(loss, str) else loss
        if isinstance(loss, str) and loss in SUMMED_LOSSES:
            self.summed_loss = SUMMED_LOSSES[loss]
        self.ignored = ignored


class Parts(Further, total=False):
    """The arguments of `custom` besides the step, as for `supervised`."""

    model: Required[Callable[[], nn.Module | Mapping[str, nn.Module]]]
    train: Required[Data]
    test: Data
    measures: Sequence[str] | Mapping[str, Any]
    weight: Callable[[Any], Tensor] | None
    collate: Callable[[list[Any]], Any] | None
    predict: Callable[[Any], Tensor] | None


class custom(_FromParts):  # reads as the function a user calls; it is a Task
    """A task with its own step, from parts.

    Args:
        step: a function of (model, batch, context) that returns losses by name, or these and the
            outputs for measures and predictions: see `Loss` and `StepContext`.
        model: a function that creates a new model, or a mapping from names to models. The step
            then gets an `nn.ModuleDict`.
        train, test, measures, collate, predict, further: as for `supervised`. A row may also be
            neither a pair nor a mapping with targets: then `batch.inputs` is the whole row.
        weight: a function of the targets that returns the weights of the batch: a tensor. By
            default each row has weight 1.
        after_update: a function of (model, context) that is called after each update of an
                optimizer, without gradients, on every process: for a teacher that follows the
                student, or to clip weights. It may use only the weights and the context, so that
                the result is the same on every process.
    Raises:
        SpecError: an unknown measure, or data that is not a data set.
    """

    def __init__(
        self, *, step: OwnStep, after_update: AfterUpdate | None = None, **parts: Unpack[Parts]
    ) -> None:
        super().__init__(**parts)
        self.step = step
        if after_update is not None:
            self.after_update = after_update


def sampling_of(task: Any) -> Sampling | None:
    """The sampling of the training rows of a task; None: each row once per epoch.

    Raises:
        SpecError: it does not match the data.
    """
    asked = getattr(task, "sampling", None)
    if asked is None:
        return None
    if task.train_rows is None:
        raise SpecError(
            "task.sampling: the training data is a stream, whose rows cannot be chosen. Leave "
            "sampling out, or give a data set with __len__ and __getitem__."
        )
    if isinstance(asked, Sampler):
        asked = sampling_of_sampler(asked, rows=task.train_rows)
        if asked is None:
            return None
    if not hasattr(asked, "rows_at"):
        raise SpecError(
            f"task.sampling: is a {type(asked).__name__}. Write weighted(weights), "
            "balanced(labels), proportions({...}) or stages({...}) of service.task."
        )
    chosen: Sampling = asked.over(task.train_rows, getattr(task, "sources", {}))
    return chosen


def _length(data: Data, what: str) -> int:
    kind = f"the {what} data is a {type(data).__name__}"
    if not is_stream(data) and hasattr(type(data), "__len__"):
        return len(data)
    if is_stream(data):
        raise SpecError(
            f"task: {kind}, which can only be iterated. Each row is tested once, so its rows must "
            "be known: give a list of them, or a data set with __len__ and __getitem__."
        )
    raise SpecError(f"task: {kind}, which is not a data set: it has no __len__.")


def _known(name: str, table: Mapping[str, RowLoss], what: str) -> RowLoss:
    if name not in table:
        raise SpecError(f"task: unknown {what} {name!r}{did_you_mean(name, table)}")
    return table[name]


def load_task(where: str, arguments: Mapping[str, Any], *, seed: int = 0) -> Task:
    """The task that `package.module:name` or `path/to/file.py:name` names.

    A function or class is called with `arguments`; anything else is the task itself.  The
    generators of Python, numpy and torch are seeded with `seed` first: data that is drawn or split
    at random is then the same on every process, and again when the run is resumed.

    Raises:
        SpecError: it cannot be imported or called, or is not a task; says which and where.
    """
    source, _, name = where.rpartition(":")
    seed_generators(randomness.key(randomness.TASK, seed))
    module = _import(source)
    if not hasattr(module, name):
        public = [n for n in vars(module) if not n.startswith("_")]
        raise SpecError(f"task: {source} has no {name!r}{did_you_mean(name, public)}")
    task = getattr(module, name)
    if isinstance(task, type) or (callable(task) and not isinstance(task, WithLoss | WithStep)):
        task = _call(task, arguments, where)
    elif arguments:
        raise SpecError(f"task_args: {where} is not a function, so it takes no arguments.")
    if not isinstance(task, WithLoss | WithStep):
        lacking = [n for n in _task_names() if not hasattr(task, n)]
        raise SpecError(
            f"task: {where} returns a {type(task).__name__}, which is not a task: "
            f"it lacks {', '.join(lacking)}. See service.task.supervised."
        )
    return task


_OF_THE_COMMAND = {"__main__", "__mp_main__", "service", "launch"}


def source_digests(where: str) -> dict[str, str]:
    """SHA-256 of each file with code of the loaded task, sorted by name.

    These are the file of its module, and of every loaded module that belongs to the user, not to an
    installed package. Below the folder of the module (for a module of a package: below the folder
    of the package) names are relative to it; elsewhere the name is that of the module. So a copy
    at another place has the same names.  Empty for a notebook.
    """
    source = where.rpartition(":")[0]
    name = Path(source).stem if source.endswith(".py") else source
    file = getattr(sys.modules.get(name), "__file__", None)
    if file is None:
        return {}
    folder = Path(file).resolve().parents[0 if source.endswith(".py") else source.count(".")]
    found: dict[str, Path] = {}
    for name, module in list(sys.modules.items()):
        each = getattr(module, "__file__", None)
        path = Path(each).resolve() if each and is_own_code(each) else folder
        if path.is_relative_to(folder):
            found[path.relative_to(folder).as_posix()] = path
        elif name.partition(".")[0] not in _OF_THE_COMMAND:
            found[name] = path
    files = {name: path for name, path in sorted(found.items()) if path.is_file()}
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}


@contextmanager
def files_may_have_moved() -> Iterator[None]:
    """A context in which the task and the model of a finished run are created again.

    Raises:
        SpecError: that fails; says how to name other files.
    """
    try:
        yield
    except SpecError as error:
        raise SpecError(
            f"{error}\nThe checkpoint contains all weights. If files have moved, add their new "
            f"paths: "
            "task=PATH:NAME or task_args.KEY=PATH (or task_args.KEY= for none)."
        ) from error


def _task_names() -> list[str]:
    methods = [n for kind in (Task, WithLoss) for n in vars(kind) if not n.startswith("_")]
    return [*Task.__annotations__, *methods]


def _import(source: str) -> Any:
    try:
        if source.endswith(".py"):
            return _import_file(Path(source))
        if "" not in sys.path:
            sys.path.insert(0, "")  # a module in the current directory, as with `python -m`
        return importlib.import_module(source)
    except SpecError:
        raise
    except (Exception, SystemExit) as error:
        told = f"task: cannot import {source}: {with_place(error)}{_taken_name(error)}"
        raise SpecError(told) from error


def _taken_name(error: BaseException) -> str:
    """`. Rename ...`, if a module of the user's has the name of a package of ours; or nothing."""
    if not isinstance(error, ImportError) or error.name is None:
        return ""
    name = error.name.partition(".")[0]
    if name not in ("service", "launch"):
        return ""
    ours = Path(__file__).parents[2]
    directories = [Path(each or ".").absolute() for each in ("", *sys.path)]
    places = [place / end for place in directories if place != ours for end in (name, f"{name}.py")]
    found = next((place for place in places if place.exists()), None)
    if found is None:
        return ""
    return f". Rename {found}: {name!r} is a package of Evenstep, which is found instead."


def imported(where: str, key: str) -> Any:
    """The object named `package.module:name` or `path/to/file.py:name`; `key` is the spec's key.

    A file that the task has imported is not run a second time.

    Raises:
        SpecError: it cannot be imported.
    """
    source, _, name = where.rpartition(":")
    try:
        if not source.endswith(".py"):
            return getattr(importlib.import_module(source), name)
        loaded = sys.modules.get(Path(source).stem)
        if getattr(loaded, "__file__", None) != source:
            loaded = _import_file(Path(source), key)
        return getattr(loaded, name)
    except SpecError:
        raise
    except AttributeError as error:
        raise SpecError(f"{key}: cannot import {where}: {error}.") from error
    except (Exception, SystemExit) as error:
        told = f"{key}: cannot import {where}: {with_place(error)}{_taken_name(error)}"
        raise SpecError(told) from error


def _import_file(path: Path, key: str = "task") -> Any:
    if not path.is_file():
        near = did_you_mean(path.name, [p.name for p in path.parent.glob("*.py")])
        raise SpecError(f"{key}: there is no file {path}{near}")
    # Data-loader workers and pickles find the module under this name.
    name = path.stem
    if name in sys.modules and getattr(sys.modules[name], "__file__", None) != str(path):
        raise SpecError(f"{key}: {path} shadows the module {name!r}; give the file another name.")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None, f"{path} ends in .py"
    assert spec.loader is not None, f"{path} ends in .py"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, str(path.parent))
    spec.loader.exec_module(module)
    return module


def _call(factory: Callable[..., Any], arguments: Mapping[str, Any], where: str) -> Any:
    signature = inspect.signature(factory)
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise SpecError(
            f"task_args: {where} takes {signature}, but was given {sorted(arguments)}: {error}."
        ) from error
    try:
        return factory(**arguments)
    except SpecError:
        raise
    except (Exception, SystemExit) as error:
        raise SpecError(f"task: {where} raised {with_place(error)}") from error
