"""`evenstep fork`: a new run that starts from a checkpoint of another one."""

from __future__ import annotations

import json
import secrets
import shlex
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from launch.commands.overrides import overridden
from launch.commands.places import Place, run_at, say
from service.basics.atomic_files import (
    in_the_way,
    is_there,
    make_directory,
    plain,
    remove_if_possible,
    replace_file,
    sync_directory,
    sync_file,
    told_when_unread,
)
from service.basics.errors import NoCheckpoint, SpecError, printable
from service.plan.changing import Change, changes
from service.runs.checkpoint_files import (
    BEST,
    Checkpoint,
    damage_of,
    find_checkpoint,
    name_of,
    read_state,
)
from service.runs.directory import (
    RunDirectory,
    change_entry,
    changes_in,
    first_facts,
    told_of_fixed,
)
from service.runs.metrics_file import rows_in
from service.runs.receipt_file import ReceiptFile, read_weights
from service.runs.tracking import MetricsFile
from service.spec.files import Override, dump_spec
from service.spec.models import Spec
from service.storage.address import Address


@click.command()
@click.argument("run", type=Place())
@overridden
@click.option("--at", "step", required=True, metavar="best|latest|STEP", help="Its checkpoint.")
@click.option("--name", required=True, help="Name of the new run, in the same place as RUN.")
def fork(run: Path | Address, overrides: tuple[Override, ...], step: str, name: str) -> None:
    """Start a new run from a checkpoint of RUN, with KEY=VALUE changed from there on.

    RUN is not changed. The new run has its own copy of the checkpoint, and of the metrics
    and the receipt up to it."""
    with run_at(run, checkpoint=step, with_best=True) as source:
        held = source.read_spec()
        spec = source.read_spec((*overrides, f"name={json.dumps(name)}"))
        found = changes(held, spec)
        fixed = told_of_fixed(found, held)
        if fixed:
            raise SpecError(f"A run cannot be forked with these changes:{fixed}")
        runs = run.parent if isinstance(run, Address) else source.path.parent
        with _new_run(runs, spec) as target:
            chosen = _forked(source, step, spec, found, target)
    origin = run if isinstance(run, Address) else source.path
    told = f"{runs / spec.name}: a fork of {origin} after step {chosen.step:,}. Continue with:"
    click.echo(printable(told))
    click.echo(printable(f"  evenstep run {shlex.quote(str(target.spec))}{_elsewhere(runs)}"))


@contextmanager
def _new_run(runs: Path | Address, spec: Spec) -> Iterator[RunDirectory]:
    """The directory of a new run; of one in a store, it is uploaded when the context ends.

    Raises:
        SpecError: the store has a run of this name, or cannot be used.
    """
    if isinstance(runs, Path):
        yield RunDirectory(runs / spec.name)
        return
    from service.storage.beside import brought
    from service.storage.published import newest_published
    from service.storage.store import open_store

    address = runs / spec.name
    if newest_published(open_store(address)) is not None:
        raise SpecError(f"--name: {address} exists. Choose another name, or remove it.")
    uploading = brought(address, spec, fresh=False, say=say)
    target = RunDirectory(uploading.runs / spec.name)
    is_new = not target.path.exists()
    try:
        yield target
        uploading.publish_now()
    except BaseException:
        if is_new:
            remove_if_possible(target.path)
        raise
    finally:
        uploading.abandon()


def _forked(
    source: RunDirectory, step: str, spec: Spec, found: list[Change], target: RunDirectory
) -> Checkpoint:
    """Write the fork to the directory `target`; return the checkpoint from which it starts.

    Raises:
        SpecError: it exists, or cannot be written; or there is no such checkpoint.
        NoCheckpoint: the checkpoint is damaged.
    """
    if target.path.exists():
        raise SpecError(f"--name: {target.path} exists. Choose another name, or remove it.")
    chosen = find_checkpoint(source.checkpoints, step)
    partial = target.path.with_name(f".{spec.name}.partial-{secrets.token_hex(4)}")
    try:
        _write(RunDirectory(partial), source, chosen, spec, found, target)
        partial.rename(target.path)
        sync_directory(target.path.parent)
    except OSError as error:
        remove_if_possible(partial)
        raise SpecError(f"--name: {target.path} cannot be written: {in_the_way(error)}.") from error
    except BaseException:
        remove_if_possible(partial)
        raise
    return chosen


def _elsewhere(runs: Path | Address) -> str:
    return "" if runs == Path("runs") else f" --runs {shlex.quote(str(runs))}"


def _write(
    partial: RunDirectory,
    source: RunDirectory,
    chosen: Checkpoint,
    spec: Spec,
    found: list[Change],
    target: RunDirectory,
) -> None:
    """Write the complete directory of the fork to disk.

    Raises:
        NoCheckpoint: the run has removed or damaged the checkpoint in the meantime.
        OSError: it cannot be written.
    """
    facts = source.read_facts()
    for place in (partial.path, partial.checkpoints, partial.logs):
        make_directory(place)
    for checkpoint in _with_the_best(chosen, source):
        copied = partial.checkpoints / checkpoint.path.name
        _require_readable(checkpoint.path)
        make_directory(copied)
        try:
            for file in sorted(checkpoint.path.iterdir()):
                _copy(file, copied / file.name)
        except FileNotFoundError as error:
            raise NoCheckpoint(f"The run has just removed {checkpoint.path}; try again.") from error
        damage = damage_of(Checkpoint(copied, checkpoint.step))
        if damage is not None:
            raise NoCheckpoint(f"The checkpoint {checkpoint.path} has changed: {damage}.")
        for file in copied.iterdir():
            sync_file(file)
        sync_directory(copied)
        if _is_the_best(checkpoint, chosen):
            replace_file(partial.checkpoints / BEST, f"{name_of(checkpoint.step)}\n")
    sync_directory(partial.checkpoints)
    for record, lines_of in ((source.metrics, rows_in), (source.receipt, read_weights)):
        if is_there(record):
            _require_readable(record)
            for _ in lines_of(record):  # all of them, so that an error names the source
                pass
            _copy(record, partial.path / record.name)
    MetricsFile(partial.metrics, resume_step=chosen.step).close("stopped")
    text = dump_spec(spec)
    # The hash of earlier changes is not needed here: it shows whether spec.yaml was written.
    known = [
        {key: value for key, value in entry.items() if key != "spec_sha256"}
        for entry in changes_in(facts)
        if entry["step"] <= chosen.step
    ]
    if found:
        known.append(change_entry(found, step=chosen.step, text=text))
    ReceiptFile(partial.receipt, step=chosen.step, changes=known).close()
    own: dict[str, Any] = first_facts(spec, target) | {
        "state": "stopped",
        "forked_from": {"run": source.name, "id": facts["id"], "step": chosen.step},
        "changes": known,
        "created": time.time(),
    }
    replace_file(partial.spec, text)
    partial.write_facts(own)


def _copy(file: Path, target: Path) -> None:
    """Copy a regular file. Whoever can write to the source must not choose what else is copied."""
    with open(file, "rb", opener=plain) as source, open(target, "xb") as copied:
        shutil.copyfileobj(source, copied)


def _require_readable(place: Path) -> None:
    """Check a file of the source, or those of a checkpoint, so that the target is not blamed.

    Raises:
        SpecError: permission is denied, or it is not a regular file.
        EvenstepError: it cannot be read at the moment.
    """
    is_checkpoint = place.parent.name == "checkpoints"
    with told_when_unread(place):
        for file in sorted(place.iterdir()) if is_checkpoint else [place]:
            with open(file, "rb", opener=plain) as opened:
                opened.read(1)


def _is_the_best(checkpoint: Checkpoint, chosen: Checkpoint) -> bool:
    best = read_state(chosen.path)["best"]
    return bool(best) and best["step"] == checkpoint.step and not checkpoint.untested


def _with_the_best(chosen: Checkpoint, source: RunDirectory) -> list[Checkpoint]:
    """The checkpoint, and the best one up to it if it still exists."""
    best = read_state(chosen.path)["best"]
    if not best or best["step"] == chosen.step:
        return [chosen]
    try:
        return [chosen, find_checkpoint(source.checkpoints, str(best["step"]))]
    except SpecError:
        return [chosen]  # the run has removed it
