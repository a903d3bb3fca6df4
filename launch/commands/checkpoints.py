"""`evenstep checkpoints` and `evenstep export`: list, verify and export what a run has saved."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import click

from launch.commands.overrides import overridden
from launch.commands.places import Named, Place, run_at
from service.basics.atomic_files import told_when_unread
from service.basics.errors import SpecError, printable
from service.runs.checkpoint_files import (
    Checkpoint,
    checkpoints_in,
    damage_of,
    find_checkpoint,
    in_words,
    ranks_of,
    read_manifest,
)
from service.runs.directory import LATEST_TIME, find_run, is_number
from service.runs.export import export_weights
from service.spec.files import Override
from service.storage.address import Address

_RUN = click.argument("run", type=Place())


@click.command()
@_RUN
def checkpoints(run: Path | Address) -> None:
    """List the checkpoints of RUN, a directory or a name in ./runs, and verify every byte.

    Exits with 1 if one is damaged."""
    if isinstance(run, Address):
        from service.storage.reading import checkpoints_at

        sys.exit(1 if sum(_shown(*each) for each in checkpoints_at(run)) else 0)
    found = find_run(run)
    found.read_facts()
    with told_when_unread(found.checkpoints):
        sys.exit(1 if _listed(found.checkpoints) else 0)


def _shown(checkpoint: Checkpoint, damage: str | None, best: int | None) -> bool:
    """Print a checkpoint; whether it is damaged."""
    rank = 1 if checkpoint.step == best else None
    click.echo(printable("  ".join(_columns(checkpoint, damage, rank=rank))))
    return damage is not None


def _listed(directory: Path) -> int:
    """Print the checkpoints; return how many of them are damaged."""
    damaged, ranks = 0, ranks_of(directory)
    for checkpoint in checkpoints_in(directory):
        damage = damage_of(checkpoint)
        if not os.path.lexists(checkpoint.path):
            continue  # the run continues, and has removed it
        damaged += damage is not None
        told = "  ".join(_columns(checkpoint, damage, rank=ranks.get(checkpoint.step)))
        click.echo(printable(told))
    for aside in sorted(directory.glob(".damaged-*")):
        click.echo(
            f"{'':10}  {printable(aside.name)}: was damaged when the run resumed, and is not used"
        )
    return damaged


def _columns(checkpoint: Checkpoint, damage: str | None, *, rank: int | None) -> Iterator[str]:
    yield f"step {checkpoint.step:>8,}"
    if damage is not None:
        yield f"damaged: {damage}"
        return
    manifest = read_manifest(checkpoint)
    when, processes = manifest.get("time"), manifest.get("processes")
    known = is_number(when, LATEST_TIME)
    yield time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(when)) if known else "at an unknown time"
    yield f"{in_words(sum(file['bytes'] for file in manifest['files'].values())):>9}"
    yield f"{processes} process{'es' if processes != 1 else ''}"
    told = "good" if rank is None else "good, best" if rank == 1 else f"good, {_ordinal(rank)} best"
    yield f"{told}, stopped in its test, which is repeated" if checkpoint.untested else told


def _ordinal(number: int) -> str:
    teen = number % 100 in (11, 12, 13)
    return f"{number}{'th' if teen else {1: 'st', 2: 'nd', 3: 'rd'}.get(number % 10, 'th')}"


@click.command()
@_RUN
@overridden
@click.option("-o", "file", type=Named(), required=True, metavar="FILE|DIR")
@click.option("--checkpoint", default="latest", metavar="best|latest|STEP", show_default=True)
@click.option("--average", is_flag=True, help="Export the moving average of the weights.")
@click.option("--trained", is_flag=True, help="Export only the parameters that the run trains.")
@click.option("--merged", is_flag=True, help="Export the result of the task's `merged`.")
def export(
    run: Path | Address,
    overrides: tuple[Override, ...],
    file: Path,
    checkpoint: str,
    average: bool,
    trained: bool,
    merged: bool,
) -> None:
    """Write the weights of RUN: as FILE.safetensors, which safetensors.torch.load_file reads, or,
    for a transformers model, as a directory DIR that its from_pretrained reads.

    For a directory the task builds the model; KEY=VALUE gives new paths of files that moved."""
    if file.suffix not in ("", ".safetensors"):
        raise SpecError(
            f"-o: {file} must end in .safetensors, or be a directory "
            "for a transformers model, with a name without a suffix."
        )
    if trained and (merged or not file.suffix):
        other = "--merged" if merged else f"-o {file}"
        raise SpecError(f"--trained cannot be combined with {other}.")
    if file.suffix and overrides and not merged:
        raise SpecError(
            f"{overrides[0]}: exporting only the weights needs no task, so there is nothing "
            "to change. Leave it out, or name a directory."
        )
    with run_at(run, checkpoint=checkpoint) as found:
        found.read_facts()
        chosen = find_checkpoint(found.checkpoints, checkpoint)
        place = file.absolute()
        if file.suffix and not merged:
            written = in_words(export_weights(chosen, place, average=average, trained=trained))
        else:
            from service.checkpoints.pretrained import export_merged, export_pretrained

            spec = found.read_spec(overrides)
            if file.suffix:
                written = in_words(export_merged(chosen, place, spec=spec, average=average))
            else:
                written = export_pretrained(
                    chosen, place, spec=spec, average=average, merged=merged
                )
    what = "averaged weights" if average else "weights"
    what = f"trained {what}" if trained else f"merged {what}" if merged else what
    click.echo(printable(f"{file}: {written}, the {what} after step {chosen.step:,}"))
