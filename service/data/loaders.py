"""DataLoaders and samplers of torch that the user passes: interpreted, or refused with a hint."""

from __future__ import annotations

from collections.abc import Callable, Sized
from typing import Any, NamedTuple, cast

from torch.utils.data import DataLoader, default_collate
from torch.utils.data.dataloader import default_convert

from service.basics.errors import SpecError
from service.data.streams import is_stream
from service.plan.plan import Plan
from service.plan.sampling import Sampling, weighted

_DISTRIBUTED = ("DistributedSampler", "StatefulDistributedSampler")
_WHOLE = ("SequentialSampler", "RandomSampler", *_DISTRIBUTED)


class FromLoader(NamedTuple):
    """The parts of a DataLoader that a task uses."""

    data: Any
    collate: Callable[[list[Any]], Any] | None
    """None if it is torch's default."""
    sampling: Sampling | None
    rows: int | None
    """Rows of one batch."""


def taken_from(loader: DataLoader[Any], *, test: bool = False) -> FromLoader:
    """The data set of a DataLoader, its collate function and the meaning of its sampler.

    Its workers and pinned memory are ignored: see `loader.workers` in the spec.

    Raises:
        SpecError: its sampler has another meaning here; says what to write instead.
    """
    what = "test" if test else "train"
    _require_plain(loader, what)
    if loader.batch_sampler is None:  # a stream of rows, as a StatefulDataLoader can be
        return FromLoader(loader, None, None, None)
    if not _is(loader.batch_sampler, "BatchSampler"):
        raise SpecError(
            f"task.{what}: a DataLoader with the batch sampler "
            f"{type(loader.batch_sampler).__name__} cannot be used: the rows of a step are "
            f"determined "
            f"by the seed. Write {what}=loader.dataset, and in the spec batch.global_batch."
        )
    collates = (default_collate, default_convert)
    collate = None if loader.collate_fn in collates else loader.collate_fn
    # Not those of the loader: with a custom batch sampler they are torch's defaults.
    batches = cast(Any, loader.batch_sampler)
    sampler, rows = batches.sampler, batches.batch_size
    sampling = None
    if not is_stream(loader.dataset):
        if test:
            _require_whole(sampler)
        else:
            sampling = _of_trained(sampler, loader.dataset)
    return FromLoader(loader.dataset, collate, sampling, rows)


_KNOWN_LOADERS = ("torch", "torchdata", "accelerate")


def _require_plain(loader: DataLoader[Any], what: str) -> None:
    """Refuse a class of the user that makes batches in its own way: it would not be called."""
    owner = next(kind for kind in type(loader).__mro__ if "__iter__" in vars(kind))
    if owner.__module__.partition(".")[0] not in _KNOWN_LOADERS:
        raise SpecError(
            f"task.{what}: {owner.__name__} has its own __iter__, which is not called: Evenstep "
            "makes the batches. Do what it does in the data set or in collate_fn, and write "
            f"{what}=loader.dataset."
        )


def _require_whole(sampler: Any) -> None:
    whole = _is(sampler, *_WHOLE)
    if not whole or (_is(sampler, "RandomSampler") and _draws_otherwise(sampler)):
        raise SpecError(
            f"task.test: a DataLoader with a {type(sampler).__name__} does not test each row once. "
            "Write test=loader.dataset, or a torch.utils.data.Subset of it."
        )


def _of_trained(sampler: Any, data: Any) -> Sampling | None:
    if _is(sampler, "SequentialSampler"):
        raise SpecError(
            "task.train: this DataLoader has shuffle=False, but rows are shuffled again in each "
            "epoch. Write train=loader.dataset; or make it a stream, which is read in order."
        )
    return sampling_of_sampler(sampler, rows=len(cast(Sized, data)))


def sampling_of_sampler(sampler: Any, *, rows: int) -> Sampling | None:
    """The meaning of a torch sampler over this many rows; None for a plain shuffle.

    Raises:
        SpecError: it has another meaning here; says what to write instead.
    """
    if _is(sampler, *_DISTRIBUTED) and sampler.shuffle:
        return None
    if _is(sampler, "RandomSampler") and not _draws_otherwise(sampler):
        return None
    if _is(sampler, "WeightedRandomSampler") and sampler.replacement:
        if sampler.num_samples != rows:
            raise SpecError(
                f"task.sampling: a WeightedRandomSampler of {sampler.num_samples:,} draws an epoch "
                f"over {rows:,} rows cannot be used: an epoch has as many rows as the data set. "
                "Write "
                "sampling=weighted(weights), and give length.steps or length.epochs accordingly."
            )
        return weighted(sampler.weights)
    raise SpecError(
        f"task.sampling: a {type(sampler).__name__} cannot be used: which rows are read is a "
        "function of the seed and the step. Write sampling=weighted(weights), balanced(labels), "
        "proportions({...}) or stages({...}) of service.task; or leave it out to shuffle."
    )


def _is(sampler: Any, *names: str) -> bool:
    """Whether it is exactly one of these samplers of torch or torchdata, not a subclass."""
    kind = type(sampler)
    return kind.__name__ in names and kind.__module__.partition(".")[0] in ("torch", "torchdata")


def _draws_otherwise(sampler: Any) -> bool:
    return bool(sampler.replacement or sampler.num_samples != len(sampler.data_source))


def require_batch(task: Any, plan: Plan) -> None:
    """Check that the batch size of the task's DataLoader is that of the spec.

    Raises:
        SpecError: it is not.
    """
    rows = getattr(task, "loader_rows", None)
    if rows not in (None, plan.global_batch):
        raise SpecError(
            f"batch.global_batch: {plan.global_batch} rows, but the task's DataLoader makes "
            f"batches of {rows}. Make them equal, or write train=loader.dataset."
        )
